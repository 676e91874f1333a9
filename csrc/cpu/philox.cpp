// The dropout mask of attention on the CPU, drawn with Philox 4x32-10 as kernels/philox.py defines
// it.

#include <cstring>

#include "dispatch.h"

namespace prismer {
namespace {

constexpr int64_t kKeys = 4 * kLanes;  // keys at a time: each lane's counter gives four numbers
constexpr int64_t kGrain = 16384;      // a thread gets at least this many keys

struct Kept {
  uint32_t seed[2];
  uint32_t threshold;
  int64_t row, rows, keys;
  uint8_t* out;  // (heads, rows, keys)

  // lines [begin, end) of heads * rows
  template <int Width>
  PRISMER_INLINE static void run(const Kept& job, const int64_t& begin, const int64_t& end) {
    for (int64_t line = begin; line < end; ++line) job.one_line(line);
  }

  PRISMER_INLINE void one_line(int64_t line) const {
    uint8_t* const kept = out + line * keys;
    const auto query = static_cast<uint32_t>(row + line % rows);
    const auto head = static_cast<uint32_t>(line / rows);
    for (int64_t first = 0; first < keys; first += kKeys) {
      uint32_t word[4][kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        word[0][i] = static_cast<uint32_t>(first / 4 + i);
        word[1][i] = query;
        word[2][i] = head;
        word[3][i] = 0;
      }
      rounds(word);
      uint8_t drawn[kKeys];
      for (int64_t i = 0; i < kLanes; ++i) {
        for (int64_t w = 0; w < 4; ++w) drawn[4 * i + w] = word[w][i] >> 8 >= threshold;
      }
      std::memcpy(kept + first, drawn, std::min(kKeys, keys - first));
    }
  }

  PRISMER_INLINE void rounds(uint32_t (&word)[4][kLanes]) const {
    uint32_t key[2] = {seed[0], seed[1]};
    for (int round = 0; round < 10; ++round) {
      for (int64_t i = 0; i < kLanes; ++i) {
        const uint64_t a = uint64_t{0xD2511F53} * word[0][i], b = uint64_t{0xCD9E8D57} * word[2][i];
        word[0][i] = static_cast<uint32_t>(b >> 32) ^ word[1][i] ^ key[0];
        word[1][i] = static_cast<uint32_t>(b);
        word[2][i] = static_cast<uint32_t>(a >> 32) ^ word[3][i] ^ key[1];
        word[3][i] = static_cast<uint32_t>(a);
      }
      key[0] += 0x9E3779B9;
      key[1] += 0xBB67AE85;
    }
  }
};

}  // namespace

Tensor philox_kept_cpu(
    const Tensor& seed, int64_t heads, int64_t row, int64_t rows, int64_t keys,
    int64_t threshold) {
  constexpr const char* op = "philox_kept";
  STD_TORCH_CHECK(
      seed.numel() == 1 && seed.scalar_type() == ScalarType::Long, op, ": seed is ",
      shape_of(seed), " ", dtype_of(seed), "; expected one int64");
  STD_TORCH_CHECK(
      heads >= 0 && row >= 0 && rows >= 0 && keys >= 0 && threshold >= 0 && threshold <= 1 << 24, op,
      ": got heads ", heads, ", row ", row, ", rows ", rows, ", keys ", keys, ", threshold ",
      threshold, "; expected none below 0, and a threshold up to 2^24");
  const int64_t sizes[] = {heads, rows, keys}, strides[] = {rows * keys, keys, 1};
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      3, sizes, strides, aoti_torch_dtype_bool(), aoti_torch_device_type_cpu(), 0, &handle));
  Tensor out(handle);
  if (heads * rows * keys == 0) return out;
  const auto bits = static_cast<uint64_t>(*data<int64_t>(seed));
  const Kept job{
      {static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32)},
      static_cast<uint32_t>(threshold), row, rows, keys,
      static_cast<uint8_t*>(out.mutable_data_ptr())};
  const auto body = runner<Kept, Kept, int64_t, int64_t>();
  torch::stable::parallel_for(
      0, heads * rows, kGrain / keys + 1,
      [&](int64_t begin, int64_t end) { body(job, begin, end); });
  return out;
}

}  // namespace prismer
