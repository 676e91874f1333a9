// Shared by the CUDA kernels: the launch, the element types, vector loads and warp reductions.
//
// The tests also compile these sources with a plain C++ compiler and run them, on a header that
// defines PRISMER_SIMT and simulates the GPU. Two macros therefore replace CUDA's own syntax, and
// all shared memory is dynamic: the header allocates it to the byte, so that an overrun is found.

#pragma once

#if !defined(PRISMER_SIMT)

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define PRISMER_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#define PRISMER_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

namespace prismer {
inline int last_error() { return static_cast<int>(cudaGetLastError()); }
}  // namespace prismer

#endif

#include <cstddef>
#include <cstdint>

#include "../shared/shared.h"
#include "launchers.h"

namespace prismer {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }

template <typename T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float value) {
  return __float2half_rn(value);
}

// kSize neighbouring elements, moved by one instruction
template <typename T, int kSize>
struct alignas(sizeof(T) * kSize) Pack {
  T values[kSize];
};

// elements of T in the widest load, 128 bits
template <typename T>
constexpr int kWidest = 16 / static_cast<int>(sizeof(T));

// loads kSize elements from `source`, which is aligned to their size, or to 16 bytes if that is
// less
template <typename T, int kSize>
__device__ __forceinline__ void load(const T* source, float (&out)[kSize]) {
  constexpr int kStep = kSize < kWidest<T> ? kSize : kWidest<T>;
#pragma unroll
  for (int first = 0; first < kSize; first += kStep) {
    const auto pack = *reinterpret_cast<const Pack<T, kStep>*>(source + first);
#pragma unroll
    for (int i = 0; i < kStep; ++i) out[first + i] = to_float(pack.values[i]);
  }
}

template <typename T, int kSize>
__device__ __forceinline__ void store(T* target, const float (&values)[kSize]) {
  Pack<T, kSize> pack;
#pragma unroll
  for (int i = 0; i < kSize; ++i) pack.values[i] = from_float<T>(values[i]);
  *reinterpret_cast<Pack<T, kSize>*>(target) = pack;
}

// the butterfly gives the same bits in every lane, because addition commutes
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int step = kWarp / 2; step; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int step = kWarp / 2; step; step /= 2) {
    value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, step));
  }
  return value;
}

inline bool aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

// calls body(T{}) with the type that `type` names
template <typename Body>
void with_element(Element type, const Body& body) {
  switch (type) {
    case Element::kFloat:
      return body(float{});
    case Element::kBFloat16:
      return body(__nv_bfloat16{});
    case Element::kHalf:
      return body(__half{});
  }
}

}  // namespace prismer
