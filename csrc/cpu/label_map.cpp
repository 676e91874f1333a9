// Forward of label_map on the CPU, as defined in kernels/label_map.py:
//   out[b, i, j, :] = sum over 4 taps of weight * features[rows[b, ids[b, y, x]], :]
// The loops over a pixel's numbers are plain, for the compiler to vectorise; they are compiled once
// per instruction set and the best one is chosen at run time.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <bit>
#include <cstdint>
#include <type_traits>
#include <vector>

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

// where one output line or column reads: two source positions and the weight of the second
template <typename Value>
struct Tap {
  int64_t low;
  int64_t high;
  Value upper;
};

template <typename Value>
std::vector<Tap<Value>> taps(int64_t source, int64_t size) {
  std::vector<Tap<Value>> result(size);
  const int64_t steps = size > 1 ? size - 1 : 1;
  for (int64_t i = 0; i < size; ++i) {
    // integers: exact, where a float position may land just below a whole pixel
    const int64_t scaled = i * (source - 1);
    const int64_t low = scaled / steps;
    const int64_t high = low + 1 < source ? low + 1 : low;
    result[i] = {low, high, static_cast<Value>(scaled - low * steps) / static_cast<Value>(steps)};
  }
  return result;
}

template <typename Out, typename Value>
[[gnu::always_inline]] inline Out store(Value value) {
  return static_cast<Out>(value);
}

// round to nearest even on integers: vectorises, unlike the header's branch on NaN
template <>
[[gnu::always_inline]] inline uint16_t store<uint16_t, float>(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return static_cast<uint16_t>(value != value ? 0x7fc0 : rounded);
}

template <typename Value, typename Out>
struct Job {
  const uint8_t* ids;        // (B, h, w)
  const int64_t* rows;       // (B, 256)
  const Value* features;     // (F, width)
  Out* out;                  // (B, size, size, width)
  int64_t h, w, size, width;
  const Tap<Value>* taps_y;
  const Tap<Value>* taps_x;
};

// output lines [begin, end) of B * size
template <int64_t Width, typename Value, typename Out>
[[gnu::always_inline]] inline void lines(const Job<Value, Out>& job, int64_t begin, int64_t end) {
  const int64_t width = Width ? Width : job.width;
  for (int64_t line = begin; line < end; ++line) {
    const int64_t b = line / job.size;
    const Tap<Value> y = job.taps_y[line % job.size];
    const uint8_t* top = job.ids + (b * job.h + y.low) * job.w;
    const uint8_t* bottom = job.ids + (b * job.h + y.high) * job.w;
    const int64_t* rows = job.rows + b * 256;
    Out* __restrict out = job.out + line * job.size * width;
    for (int64_t j = 0; j < job.size; ++j, out += width) {
      const Tap<Value> x = job.taps_x[j];
      const int64_t r00 = rows[top[x.low]], r01 = rows[top[x.high]];
      const int64_t r10 = rows[bottom[x.low]], r11 = rows[bottom[x.high]];
      const Value* __restrict t00 = job.features + r00 * width;
      // most pixels lie inside one region of a label map: nothing to blend
      if (r00 == r01 && r00 == r10 && r00 == r11) {
        for (int64_t c = 0; c < width; ++c) out[c] = store<Out>(t00[c]);
        continue;
      }
      const Value* __restrict t01 = job.features + r01 * width;
      const Value* __restrict t10 = job.features + r10 * width;
      const Value* __restrict t11 = job.features + r11 * width;
      const Value w00 = (1 - y.upper) * (1 - x.upper), w01 = (1 - y.upper) * x.upper;
      const Value w10 = y.upper * (1 - x.upper), w11 = y.upper * x.upper;
      for (int64_t c = 0; c < width; ++c) {
        out[c] = store<Out>(w00 * t00[c] + w01 * t01[c] + w10 * t10[c] + w11 * t11[c]);
      }
    }
  }
}

template <typename Value, typename Out>
[[gnu::always_inline]] inline void lines_any(
    const Job<Value, Out>& job, int64_t begin, int64_t end) {
  if (job.width == 64) {
    lines<64>(job, begin, end);
  } else {
    lines<0>(job, begin, end);
  }
}

template <typename Value, typename Out>
void lines_baseline(const Job<Value, Out>& job, int64_t begin, int64_t end) {
  lines_any(job, begin, end);
}

#if defined(__x86_64__)
template <typename Value, typename Out>
[[gnu::target("avx2,fma")]] void lines_avx2(
    const Job<Value, Out>& job, int64_t begin, int64_t end) {
  lines_any(job, begin, end);
}

template <typename Value, typename Out>
[[gnu::target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")]] void lines_avx512(
    const Job<Value, Out>& job, int64_t begin, int64_t end) {
  lines_any(job, begin, end);
}
#endif

template <typename Value, typename Out>
auto best_lines() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return &lines_avx512<Value, Out>;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return &lines_avx2<Value, Out>;
  }
#endif
  return &lines_baseline<Value, Out>;
}

// Stored is the type of the tensors, Out what holds its bits here, Value the type of the arithmetic
template <typename Stored, typename Out, typename Value>
void run(const Tensor& ids, const Tensor& rows, const Tensor& features, const Tensor& out) {
  const int64_t size = out.size(1), h = ids.size(1), w = ids.size(2), width = features.size(1);
  const auto* stored = static_cast<const Stored*>(features.const_data_ptr());
  std::vector<Value> widened;
  const Value* table;
  if constexpr (std::is_same_v<Stored, Value>) {
    table = stored;
  } else {
    widened.assign(stored, stored + features.numel());
    table = widened.data();
  }
  const auto taps_y = taps<Value>(h, size);
  const auto taps_x = taps<Value>(w, size);
  const Job<Value, Out> job{
      static_cast<const uint8_t*>(ids.const_data_ptr()),
      static_cast<const int64_t*>(rows.const_data_ptr()),
      table,
      static_cast<Out*>(out.mutable_data_ptr()),
      h,
      w,
      size,
      width,
      taps_y.data(),
      taps_x.data()};
  const auto body = best_lines<Value, Out>();
  // at least 64 K numbers for a thread: less is not worth waking one
  const int64_t grain = 65536 / (size * width + 1) + 1;
  torch::stable::parallel_for(
      0, ids.size(0) * size, grain, [&](int64_t begin, int64_t end) { body(job, begin, end); });
}

}  // namespace

namespace prismer {

// (B, h, w) uint8, (B, 256) int64, (F, C) floating -> (B, size, size, C)
Tensor label_map_cpu(
    const Tensor& ids_any, const Tensor& rows_any, const Tensor& features_any, int64_t size) {
  STD_TORCH_CHECK(
      ids_any.dim() == 3 && rows_any.dim() == 2 && features_any.dim() == 2 && size >= 1 &&
          ids_any.size(1) >= 1 && ids_any.size(2) >= 1 && rows_any.size(0) == ids_any.size(0) &&
          rows_any.size(1) == 256 && ids_any.scalar_type() == ScalarType::Byte &&
          rows_any.scalar_type() == ScalarType::Long,
      "label_map wants uint8 ids (B, h, w), int64 rows (B, 256), features (F, C), size >= 1");
  const Tensor ids = torch::stable::contiguous(ids_any);
  const Tensor rows = torch::stable::contiguous(rows_any);
  const Tensor features = torch::stable::contiguous(features_any);
  const auto* row = static_cast<const int64_t*>(rows.const_data_ptr());
  for (int64_t i = 0; i < rows.numel(); ++i) {
    STD_TORCH_CHECK(
        row[i] >= 0 && row[i] < features.size(0), "rows hold ", row[i], " but features have ",
        features.size(0), " rows; build both from the same class table");
  }
  const Tensor out =
      torch::stable::new_empty(features, {ids.size(0), size, size, features.size(1)});
  switch (features.scalar_type()) {
    case ScalarType::Float:
      run<float, float, float>(ids, rows, features, out);
      break;
    case ScalarType::BFloat16:
      run<c10::BFloat16, uint16_t, float>(ids, rows, features, out);
      break;
    case ScalarType::Half:
      run<c10::Half, c10::Half, float>(ids, rows, features, out);
      break;
    case ScalarType::Double:
      run<double, double, double>(ids, rows, features, out);
      break;
    default:
      STD_TORCH_CHECK(false, "prismer::label_map features must be float32, 64, 16 or bfloat16");
  }
  return out;
}

}  // namespace prismer
