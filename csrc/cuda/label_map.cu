// label_map and its gradient in CUDA, as kernels/label_map.py defines them.
//
// Forward: a block per output line, a thread per 128 bits of a pixel's numbers; neighbouring threads
// write neighbouring bytes. An entry of `rows` outside the features cannot be reported without waiting
// for the device: nothing is read, and its pixels become NaN, which the next loss shows.
//
// Backward: many pixels add to few rows. Float atomics would add in a different order on every run,
// and sorting the taps costs more than the sum. Instead a warp has 32 channels, one for each lane,
// and adds its share of the pixels in order to a table in shared memory that no other thread uses.
// The tables of all shares are then added in order. The shares depend on shapes only.

#include "launch.cuh"

#include "../shared/label_map.h"

namespace prismer {
namespace {

constexpr int kThreads = 128;
constexpr int kTableRows = 256;  // rows of a table in shared memory: 32 KB
constexpr int kAhead = 8;        // pixels whose dy is loaded before it is needed

// the rows of the four taps of a pixel; -1 for a row outside the features
struct Rows {
  int r00, r01, r10, r11;
};

__device__ __forceinline__ int row_of(const int64_t* rows, uint8_t id, int64_t num_rows) {
  const int64_t row = rows[id];
  return row >= 0 && row < num_rows ? static_cast<int>(row) : -1;
}

__device__ __forceinline__ Rows rows_of(
    const uint8_t* top, const uint8_t* bottom, const Tap<float, int>& x, const int64_t* rows,
    int64_t num_rows) {
  return {
      row_of(rows, top[x.low], num_rows), row_of(rows, top[x.high], num_rows),
      row_of(rows, bottom[x.low], num_rows), row_of(rows, bottom[x.high], num_rows)};
}

template <typename T, int kVec>
__device__ __forceinline__ void load_row(
    const T* features, int64_t width, int row, int channel, float (&out)[kVec]) {
  if (row >= 0) {
    load(features + row * width + channel, out);
  } else {
#pragma unroll
    for (int k = 0; k < kVec; ++k) out[k] = __int_as_float(0x7fffffff);
  }
}

template <typename T, int kVec>
__global__ void __launch_bounds__(kThreads, 4) forward_kernel(LabelMap args) {
  const int size = static_cast<int>(args.size), lanes = static_cast<int>(args.width) / kVec;
  const int64_t batch = blockIdx.x / args.size;
  const auto y = tap<float, int>(
      static_cast<int>(blockIdx.x % args.size), static_cast<int>(args.h), size);
  const uint8_t* top = args.ids + (batch * args.h + y.low) * args.w;
  const uint8_t* bottom = args.ids + (batch * args.h + y.high) * args.w;
  const int64_t* rows = args.rows + batch * 256;
  const T* features = static_cast<const T*>(args.features);
  T* out = static_cast<T*>(args.out) + blockIdx.x * args.size * args.width;
  for (int i = threadIdx.x; i < size * lanes; i += kThreads) {
    const int pixel = i / lanes, channel = i % lanes * kVec;
    const auto x = tap<float, int>(pixel, static_cast<int>(args.w), size);
    const Rows r = rows_of(top, bottom, x, rows, args.num_rows);
    float t00[kVec];
    load_row(features, args.width, r.r00, channel, t00);
    // blend only where the taps differ: most pixels lie inside one region of the label map
    if (r.r00 != r.r01 || r.r00 != r.r10 || r.r00 != r.r11) {
      float t01[kVec], t10[kVec], t11[kVec];
      load_row(features, args.width, r.r01, channel, t01);
      load_row(features, args.width, r.r10, channel, t10);
      load_row(features, args.width, r.r11, channel, t11);
      const auto weights = tap_weights(y.upper, x.upper);
#pragma unroll
      for (int k = 0; k < kVec; ++k) t00[k] = blend(weights, t00[k], t01[k], t10[k], t11[k]);
    }
    store(out + int64_t{pixel} * args.width + channel, t00);
  }
}

// block (p, c, t), one warp: adds the lines of part p to channels c of the rows t of the features
template <typename T>
__global__ void __launch_bounds__(kWarp, 8) partial_kernel(
    LabelMapBackward args, int64_t lines_per_part) {
  PRISMER_DYNAMIC_SHARED(shared);
  // this lane's column of the table; no other thread reads or writes it
  float* table = reinterpret_cast<float*>(shared) + threadIdx.x;
  const int64_t first_row = int64_t{blockIdx.z} * kTableRows;
  const int table_rows = static_cast<int>(
      args.num_rows - first_row < kTableRows ? args.num_rows - first_row : kTableRows);
  const int64_t channel = int64_t{blockIdx.y} * kWarp + threadIdx.x;
  const bool active = channel < args.width;
  const int size = static_cast<int>(args.size);
  const int64_t lines = args.batch * args.size, begin = blockIdx.x * lines_per_part;
  const int64_t end = begin + lines_per_part < lines ? begin + lines_per_part : lines;
  for (int row = 0; row < table_rows; ++row) table[row * kWarp] = 0.0f;

  const auto add = [&](int row, float value) {
    // skip rows of other tables, and -1
    const int64_t place = row - first_row;
    if (row >= 0 && place >= 0 && place < table_rows) table[place * kWarp] += value;
  };
  for (int64_t line = begin; line < end; ++line) {
    const int64_t batch = line / args.size;
    const auto y =
        tap<float, int>(static_cast<int>(line % args.size), static_cast<int>(args.h), size);
    const uint8_t* top = args.ids + (batch * args.h + y.low) * args.w;
    const uint8_t* bottom = args.ids + (batch * args.h + y.high) * args.w;
    const T* dy = static_cast<const T*>(args.dy) + line * args.size * args.width + channel;
    for (int base = 0; base < size; base += kWarp) {
      // each lane looks up one pixel for the whole warp
      const int own = base + static_cast<int>(threadIdx.x) < size ? base + threadIdx.x : size - 1;
      const auto x = tap<float, int>(own, static_cast<int>(args.w), size);
      const Rows rows = rows_of(top, bottom, x, args.rows + batch * 256, args.num_rows);
      const int count = size - base < kWarp ? size - base : kWarp;
      for (int group = 0; group < count; group += kAhead) {
        float ahead[kAhead];
#pragma unroll
        for (int k = 0; k < kAhead; ++k) {
          const bool there = active && group + k < count;
          ahead[k] = there ? to_float(dy[(base + group + k) * args.width]) : 0.0f;
        }
#pragma unroll
        for (int k = 0; k < kAhead; ++k) {
          const int lane = group + k;
          const int r00 = __shfl_sync(kAllLanes, rows.r00, lane);
          const int r01 = __shfl_sync(kAllLanes, rows.r01, lane);
          const int r10 = __shfl_sync(kAllLanes, rows.r10, lane);
          const int r11 = __shfl_sync(kAllLanes, rows.r11, lane);
          const float upper_x = __shfl_sync(kAllLanes, x.upper, lane);
          if (lane >= count) continue;
          if (r00 == r01 && r00 == r10 && r00 == r11) {
            add(r00, ahead[k]);
            continue;
          }
          const auto weights = tap_weights(y.upper, upper_x);
          add(r00, weights.w00 * ahead[k]);
          add(r01, weights.w01 * ahead[k]);
          add(r10, weights.w10 * ahead[k]);
          add(r11, weights.w11 * ahead[k]);
        }
      }
    }
  }
  if (!active) return;
  float* out = args.partial + (blockIdx.x * args.num_rows + first_row) * args.width + channel;
  for (int row = 0; row < table_rows; ++row) out[row * args.width] = table[row * kWarp];
}

__global__ void __launch_bounds__(kThreads) finish_kernel(LabelMapBackward args, int64_t parts) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t count = args.num_rows * args.width;
  if (i >= count) return;
  float sum = 0.0f;
  for (int64_t part = 0; part < parts; ++part) sum += args.partial[part * count + i];
  args.dfeatures[i] = sum;
}

int64_t lines_per_part(int64_t lines, int64_t num_rows, int64_t width) {
  // at most 256 parts, and 16 MB of tables
  const int64_t fitting = (int64_t{1} << 22) / (num_rows * width + 1) + 1;
  const int64_t parts = fitting < 256 ? fitting : 256;
  const int64_t share = (lines + parts - 1) / parts;
  return share > 1 ? share : 1;
}

}  // namespace

int64_t label_map_parts(int64_t lines, int64_t num_rows, int64_t width) {
  const int64_t share = lines_per_part(lines, num_rows, width);
  return (lines + share - 1) / share;
}

int label_map_cuda(const LabelMap& args, void* stream) {
  if (args.batch == 0 || args.width == 0) return 0;
  const bool wide = aligned(args.features) && aligned(args.out);
  const auto lines = static_cast<unsigned>(args.batch * args.size);
  with_element(args.type, [&](auto element) {
    using T = decltype(element);
    if (wide && args.width % kWidest<T> == 0) {
      PRISMER_LAUNCH((forward_kernel<T, kWidest<T>>), lines, kThreads, 0, stream, args);
    } else {
      PRISMER_LAUNCH((forward_kernel<T, 1>), lines, kThreads, 0, stream, args);
    }
  });
  return last_error();
}

int label_map_backward_cuda(const LabelMapBackward& args, void* stream) {
  if (args.num_rows == 0 || args.width == 0) return 0;
  const int64_t lines = args.batch * args.size;
  const int64_t parts = label_map_parts(lines, args.num_rows, args.width);
  if (parts > 0) {
    const auto chunks = static_cast<unsigned>((args.width + kWarp - 1) / kWarp);
    const auto tables = static_cast<unsigned>((args.num_rows + kTableRows - 1) / kTableRows);
    const int64_t table_rows = args.num_rows < kTableRows ? args.num_rows : kTableRows;
    with_element(args.type, [&](auto element) {
      using T = decltype(element);
      PRISMER_LAUNCH(
          (partial_kernel<T>), dim3(static_cast<unsigned>(parts), chunks, tables), kWarp,
          static_cast<unsigned>(table_rows * kWarp * sizeof(float)), stream, args,
          lines_per_part(lines, args.num_rows, args.width));
    });
  }
  const int64_t count = args.num_rows * args.width;
  PRISMER_LAUNCH(
      finish_kernel, static_cast<unsigned>((count + kThreads - 1) / kThreads), kThreads, 0, stream,
      args, parts);
  return last_error();
}

}  // namespace prismer
