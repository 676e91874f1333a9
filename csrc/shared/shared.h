// Marks a function that CPU kernels, CUDA kernels and the host build of the latter all compile.

#pragma once

#if defined(__CUDACC__)
#define PRISMER_SHARED __host__ __device__ __forceinline__
#else
// always_inline, so that the function is compiled for the instruction set of its caller
#define PRISMER_SHARED [[gnu::always_inline]] inline
#endif
