// Runs the launchers of one file of csrc/cuda, SOURCE, on the CPU: reads calls from stdin, writes what
// they left to stdout.
//
// A call is int64 words: number of the op, order of turns, line of a barrier to leave out, number of integers, the integers, the bits
// of one double, number of buffers, and for each buffer its size in bytes, -1 for null, with its bytes
// padded to whole words. The answer is the number of launches, then all buffers in the same form. Every
// buffer is allocated by itself and to the byte.

#include <unistd.h>

#include <bit>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "simt.h"

#include SOURCE

using namespace prismer;

namespace {

bool read_words(void* target, size_t bytes) { return std::fread(target, 1, bytes, stdin) == bytes; }

int64_t word() {
  int64_t value;
  if (!read_words(&value, sizeof(value))) std::exit(4);
  return value;
}

struct Buffer {
  int64_t bytes;
  // 16 bytes aligned and no longer than asked for, unlike a std::vector
  void* data;
};

Buffer read_buffer() {
  Buffer buffer{word(), nullptr};
  if (buffer.bytes < 0) return buffer;
  buffer.data = std::malloc(buffer.bytes);
  const int64_t padding = (8 - buffer.bytes % 8) % 8;
  int64_t spare;
  if (!read_words(buffer.data, buffer.bytes) || !read_words(&spare, padding)) std::exit(4);
  return buffer;
}

void write_buffer(const Buffer& buffer) {
  std::fwrite(&buffer.bytes, 1, sizeof(buffer.bytes), stdout);
  if (buffer.bytes < 0) return;
  const int64_t zeros = 0;
  std::fwrite(buffer.data, 1, buffer.bytes, stdout);
  std::fwrite(&zeros, 1, (8 - buffer.bytes % 8) % 8, stdout);
  std::free(buffer.data);
}

template <typename T>
T* as(const Buffer& buffer) {
  return static_cast<T*>(buffer.data);
}

Element element(int64_t value) { return static_cast<Element>(value); }

}  // namespace

int main() {
  int64_t op;
  while (read_words(&op, sizeof(op))) {
    simt::order = static_cast<simt::Order>(word());
    simt::skipped_barrier = static_cast<unsigned>(word());
    std::vector<int64_t> n(word());
    for (int64_t& value : n) value = word();
    [[maybe_unused]] const auto eps = static_cast<float>(std::bit_cast<double>(word()));
    std::vector<Buffer> b(word());
    for (Buffer& buffer : b) buffer = read_buffer();
    const int64_t before = simt::launches;
    int error = 0;
    switch (op) {
#if defined(HOST_LAYER_NORM)
      case 0:
        error = layer_norm_cuda(
            {b[0].data, b[1].data, b[2].data, b[3].data, element(n[0]), element(n[1]),
             element(n[2]), b[4].data, b[5].data, as<float>(b[6]), as<float>(b[7]), n[3], n[4],
             eps},
            nullptr);
        break;
      case 1:
        error = layer_norm_backward_cuda(
            {b[0].data, b[1].data, b[2].data, b[3].data, element(n[0]), element(n[1]),
             as<float>(b[4]), as<float>(b[5]), b[6].data, as<float>(b[7]), as<float>(b[8]),
             as<float>(b[9]), n[2], n[3]},
            nullptr);
        break;
      case 2:
        as<int64_t>(b[0])[0] = layer_norm_parts(n[0]);
        break;
#elif defined(HOST_LABEL_MAP)
      case 0:
        error = label_map_cuda(
            {as<uint8_t>(b[0]), as<int64_t>(b[1]), b[2].data, b[3].data, element(n[0]), n[1],
             n[2], n[3], n[4], n[5], n[6]},
            nullptr);
        break;
      case 1:
        error = label_map_backward_cuda(
            {as<uint8_t>(b[0]), as<int64_t>(b[1]), b[2].data, as<float>(b[3]), as<float>(b[4]),
             element(n[0]), n[1], n[2], n[3], n[4], n[5], n[6]},
            nullptr);
        break;
      case 2:
        as<int64_t>(b[0])[0] = label_map_parts(n[0], n[1], n[2]);
        break;
#elif defined(HOST_DECODE_ATTENTION)
      case 0: {
        const DecodeAttention args{
            b[0].data, b[1].data, b[2].data, as<uint8_t>(b[3]), b[4].data, b[5].data,
            as<int64_t>(b[6]), b[7].data, as<float>(b[8]), as<float>(b[9]), as<float>(b[10]),
            element(n[0]), n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8]};
        error = decode_attention_refused(args) ? 1 : decode_attention_cuda(args, nullptr);
        break;
      }
      case 2:
        as<int64_t>(b[0])[0] = decode_attention_splits(n[0], n[1], n[2]);
        break;
#endif
      default:
        error = -1;
    }
    if (error != 0) {
      std::fprintf(stderr, "driver: op %ld returned %d\n", static_cast<long>(op), error);
      return 5;
    }
    const int64_t launched = simt::launches - before;
    std::fwrite(&launched, 1, sizeof(launched), stdout);
    for (const Buffer& buffer : b) write_buffer(buffer);
  }
}
