// LayerNorm in CUDA, forward and backward, as kernels/layer_norm.py defines it; one block per row.
//
// A row is read once, in 128-bit loads if its width and the pointers allow it, and kept in
// registers; numbers beyond kCached per thread are read again. Mean and variance are two block
// reductions: shuffles within a warp, then the warps' sums in order. The gradients of weight and
// bias are sums over rows in two stages of fixed order, without atomics: the same bits on every run
// and every GPU.

#include "launch.cuh"

#include "../shared/norm.h"

namespace prismer {
namespace {

constexpr int kMaxThreads = 256;
constexpr int kCached = 16;
constexpr int kColumns = 32, kLanes = 8;  // block of the sums over rows

// loads weights of a type chosen at run time; this is cheap, as they are small and stay in the
// cache
template <int kVec>
__device__ __forceinline__ void load_any(
    const void* source, Element type, int64_t i, float fallback, float (&out)[kVec]) {
  if (source == nullptr) {
#pragma unroll
    for (int k = 0; k < kVec; ++k) out[k] = fallback;
  } else if (type == Element::kFloat) {
    load(static_cast<const float*>(source) + i, out);
  } else if (type == Element::kBFloat16) {
    load(static_cast<const __nv_bfloat16*>(source) + i, out);
  } else {
    load(static_cast<const __half*>(source) + i, out);
  }
}

// sums over the block, with the same bits in every thread; `warps` has room for a float per warp
__device__ __forceinline__ float block_sum(float value, float* warps) {
  value = warp_sum(value);
  __syncthreads();  // all threads have read the last sum
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = value;
  __syncthreads();
  float total = 0.0f;
  for (unsigned i = 0; i < blockDim.x / kWarp; ++i) total += warps[i];
  return total;
}

template <typename T, int kVec>
__global__ void __launch_bounds__(kMaxThreads, 3) forward_kernel(LayerNorm args) {
  PRISMER_DYNAMIC_SHARED(shared);
  float* warps = reinterpret_cast<float*>(shared);
  constexpr int kChunks = kCached / kVec < 8 ? kCached / kVec : 8;
  const int64_t width = args.width, offset = blockIdx.x * width;
  const int64_t start = threadIdx.x * kVec, step = int64_t{blockDim.x} * kVec;
  const T* x = static_cast<const T*>(args.x) + offset;
  const T* residual = static_cast<const T*>(args.residual);
  T* total = static_cast<T*>(args.total);
  T* y = static_cast<T*>(args.y) + offset;

  // reads x, or x + residual rounded to the stored type
  const auto read = [&](int64_t i, float (&v)[kVec]) {
    load(x + i, v);
    if (residual == nullptr) return;
    float added[kVec];
    load(residual + offset + i, added);
#pragma unroll
    for (int k = 0; k < kVec; ++k) v[k] = to_float(from_float<T>(v[k] + added[k]));
  };

  float cache[kChunks][kVec], far[kVec];
  float sum = 0.0f;
  const auto first = [&](int64_t i, float (&v)[kVec]) {
    read(i, v);
    if (residual != nullptr) store(total + offset + i, v);
#pragma unroll
    for (int k = 0; k < kVec; ++k) sum += v[k];
  };
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    if (start + c * step < width) first(start + c * step, cache[c]);
  }
  for (int64_t i = start + kChunks * step; i < width; i += step) first(i, far);
  const float mean = block_sum(sum, warps) / static_cast<float>(width);

  float squares = 0.0f;
  const auto second = [&](const float (&v)[kVec]) {
#pragma unroll
    for (int k = 0; k < kVec; ++k) squares += (v[k] - mean) * (v[k] - mean);
  };
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    if (start + c * step < width) second(cache[c]);
  }
  for (int64_t i = start + kChunks * step; i < width; i += step) {
    read(i, far);
    second(far);
  }
  const float rstd = rstd_of(block_sum(squares, warps), width, args.eps);

  const auto last = [&](int64_t i, const float (&v)[kVec]) {
    float weight[kVec], bias[kVec], out[kVec];
    load_any(args.weight, args.weight_type, i, 1.0f, weight);
    load_any(args.bias, args.bias_type, i, 0.0f, bias);
#pragma unroll
    for (int k = 0; k < kVec; ++k) {
      out[k] = affine(normalised(v[k], mean, rstd), weight[k], bias[k]);
    }
    store(y + i, out);
  };
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    if (start + c * step < width) last(start + c * step, cache[c]);
  }
  for (int64_t i = start + kChunks * step; i < width; i += step) {
    read(i, far);
    last(i, far);
  }
  if (threadIdx.x == 0) {
    args.mean[blockIdx.x] = mean;
    args.rstd[blockIdx.x] = rstd;
  }
}

template <typename T, int kVec>
__global__ void __launch_bounds__(kMaxThreads, 3) dx_kernel(LayerNormBackward args) {
  PRISMER_DYNAMIC_SHARED(shared);
  float* warps = reinterpret_cast<float*>(shared);
  constexpr int kChunks = kCached / kVec < 8 ? kCached / kVec : 8;
  const int64_t width = args.width, offset = blockIdx.x * width;
  const int64_t start = threadIdx.x * kVec, step = int64_t{blockDim.x} * kVec;
  const T* x = static_cast<const T*>(args.x) + offset;
  const T* dy = static_cast<const T*>(args.dy) + offset;
  const T* dtotal = static_cast<const T*>(args.dtotal);
  T* dx = static_cast<T*>(args.dx) + offset;
  const float mean = args.mean[blockIdx.x], rstd = args.rstd[blockIdx.x];

  const auto read = [&](int64_t i, float (&x_hat)[kVec], float (&g)[kVec]) {
    float weight[kVec];
    load(x + i, x_hat);
    load(dy + i, g);
    load_any(args.weight, args.weight_type, i, 1.0f, weight);
#pragma unroll
    for (int k = 0; k < kVec; ++k) {
      x_hat[k] = normalised(x_hat[k], mean, rstd);
      g[k] *= weight[k];
    }
  };

  float cache[kChunks][kVec], cache_g[kChunks][kVec], far[kVec], far_g[kVec];
  float sum_g = 0.0f, sum_g_x_hat = 0.0f;
  const auto first = [&](int64_t i, float (&x_hat)[kVec], float (&g)[kVec]) {
    read(i, x_hat, g);
#pragma unroll
    for (int k = 0; k < kVec; ++k) {
      sum_g += g[k];
      sum_g_x_hat += g[k] * x_hat[k];
    }
  };
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    if (start + c * step < width) first(start + c * step, cache[c], cache_g[c]);
  }
  for (int64_t i = start + kChunks * step; i < width; i += step) first(i, far, far_g);
  const float mean_g = block_sum(sum_g, warps) / static_cast<float>(width);
  const float mean_g_x_hat = block_sum(sum_g_x_hat, warps) / static_cast<float>(width);

  const auto last = [&](int64_t i, const float (&x_hat)[kVec], const float (&g)[kVec]) {
    float out[kVec], added[kVec];
    if (dtotal != nullptr) load(dtotal + offset + i, added);
#pragma unroll
    for (int k = 0; k < kVec; ++k) {
      out[k] = input_gradient(g[k], x_hat[k], mean_g, mean_g_x_hat, rstd);
      if (dtotal != nullptr) out[k] += added[k];
    }
    store(dx + i, out);
  };
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    if (start + c * step < width) last(start + c * step, cache[c], cache_g[c]);
  }
  for (int64_t i = start + kChunks * step; i < width; i += step) {
    read(i, far, far_g);
    last(i, far, far_g);
  }
}

// the first lane adds the kLanes sums of each column, in order; true in the lane that has the
// result
__device__ __forceinline__ bool column_sum(float& first, float& second, float* sums) {
  const int place = threadIdx.y * kColumns + threadIdx.x;
  sums[place] = first;
  sums[kLanes * kColumns + place] = second;
  __syncthreads();
  if (threadIdx.y != 0) return false;
  for (int lane = 1; lane < kLanes; ++lane) {
    first += sums[lane * kColumns + threadIdx.x];
    second += sums[(kLanes + lane) * kColumns + threadIdx.x];
  }
  return true;
}

// stage one: block (c, p) sums the columns c over the rows of part p
template <typename T>
__global__ void __launch_bounds__(kColumns* kLanes) partial_kernel(
    LayerNormBackward args, int64_t rows_per_part) {
  PRISMER_DYNAMIC_SHARED(shared);
  const int64_t column = int64_t{blockIdx.x} * kColumns + threadIdx.x;
  const int64_t begin = blockIdx.y * rows_per_part;
  const int64_t end = begin + rows_per_part < args.rows ? begin + rows_per_part : args.rows;
  float dweight = 0.0f, dbias = 0.0f;
  if (column < args.width) {
    for (int64_t row = begin + threadIdx.y; row < end; row += kLanes) {
      const float dy = to_float(static_cast<const T*>(args.dy)[row * args.width + column]);
      const float x = to_float(static_cast<const T*>(args.x)[row * args.width + column]);
      dweight += dy * normalised(x, args.mean[row], args.rstd[row]);
      dbias += dy;
    }
  }
  if (column_sum(dweight, dbias, reinterpret_cast<float*>(shared)) && column < args.width) {
    args.partial[(2 * blockIdx.y) * args.width + column] = dweight;
    args.partial[(2 * blockIdx.y + 1) * args.width + column] = dbias;
  }
}

// stage two: adds the parts of each column
__global__ void __launch_bounds__(kColumns* kLanes) finish_kernel(
    LayerNormBackward args, int64_t parts) {
  PRISMER_DYNAMIC_SHARED(shared);
  const int64_t column = int64_t{blockIdx.x} * kColumns + threadIdx.x;
  float dweight = 0.0f, dbias = 0.0f;
  if (column < args.width) {
    for (int64_t part = threadIdx.y; part < parts; part += kLanes) {
      dweight += args.partial[(2 * part) * args.width + column];
      dbias += args.partial[(2 * part + 1) * args.width + column];
    }
  }
  if (column_sum(dweight, dbias, reinterpret_cast<float*>(shared)) && column < args.width) {
    args.dweight[column] = dweight;
    args.dbias[column] = dbias;
  }
}

// threads of a block, in whole warps and at most kMaxThreads, for a row read in loads of `vec`
unsigned row_threads(int64_t width, int vec) {
  const int64_t loads = (width + vec - 1) / vec;
  const int64_t threads = (loads + kWarp - 1) / kWarp * kWarp;
  return static_cast<unsigned>(threads < kMaxThreads ? threads : kMaxThreads);
}

int64_t rows_per_part(int64_t rows) {
  const int64_t share = (rows + 127) / 128;
  return share > 32 ? share : 32;
}

}  // namespace

int64_t layer_norm_parts(int64_t rows) {
  return (rows + rows_per_part(rows) - 1) / rows_per_part(rows);
}

int layer_norm_cuda(const LayerNorm& args, void* stream) {
  if (args.rows == 0 || args.width == 0) return 0;
  const bool wide = aligned(args.x) && aligned(args.residual) && aligned(args.weight) &&
                    aligned(args.bias) && aligned(args.y) && aligned(args.total);
  const auto grid = static_cast<unsigned>(args.rows);
  constexpr unsigned kBytes = kMaxThreads / kWarp * sizeof(float);
  with_element(args.type, [&](auto element) {
    using T = decltype(element);
    if (wide && args.width % kWidest<T> == 0) {
      const unsigned threads = row_threads(args.width, kWidest<T>);
      PRISMER_LAUNCH((forward_kernel<T, kWidest<T>>), grid, threads, kBytes, stream, args);
    } else {
      const unsigned threads = row_threads(args.width, 1);
      PRISMER_LAUNCH((forward_kernel<T, 1>), grid, threads, kBytes, stream, args);
    }
  });
  return last_error();
}

int layer_norm_backward_cuda(const LayerNormBackward& args, void* stream) {
  if (args.width == 0) return 0;
  const bool wide = aligned(args.x) && aligned(args.dy) && aligned(args.dtotal) &&
                    aligned(args.weight) && aligned(args.dx);
  const auto rows = static_cast<unsigned>(args.rows);
  const auto parts = static_cast<unsigned>(layer_norm_parts(args.rows));
  const auto columns = static_cast<unsigned>((args.width + kColumns - 1) / kColumns);
  constexpr unsigned kBytes = kMaxThreads / kWarp * sizeof(float);
  constexpr unsigned kSumBytes = 2 * kColumns * kLanes * sizeof(float);
  with_element(args.type, [&](auto element) {
    using T = decltype(element);
    if (rows == 0) return;
    if (wide && args.width % kWidest<T> == 0) {
      const unsigned threads = row_threads(args.width, kWidest<T>);
      PRISMER_LAUNCH((dx_kernel<T, kWidest<T>>), rows, threads, kBytes, stream, args);
    } else {
      const unsigned threads = row_threads(args.width, 1);
      PRISMER_LAUNCH((dx_kernel<T, 1>), rows, threads, kBytes, stream, args);
    }
    if (args.dweight == nullptr) return;
    PRISMER_LAUNCH(
        (partial_kernel<T>), dim3(columns, parts), dim3(kColumns, kLanes), kSumBytes, stream, args,
        rows_per_part(args.rows));
  });
  if (args.dweight != nullptr) {
    PRISMER_LAUNCH(
        finish_kernel, columns, dim3(kColumns, kLanes), kSumBytes, stream, args,
        static_cast<int64_t>(parts));
  }
  return last_error();
}

}  // namespace prismer
