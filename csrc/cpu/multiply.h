// Products of small packed matrices, of which attention on the CPU consists.
//
// c (+)= a b. A tile of c is summed in registers: six rows of up to four vectors with AVX-512, of
// up to two elsewhere. Numbers are packed into words of 32 bits: one fp32, or a pair of bf16 that
// are neighbours along the sum. AVX512-BF16 multiplies pairs in one instruction, with fp32 sums.

#pragma once

#include <algorithm>

#include "dispatch.h"

namespace prismer {

struct Factors {
  const float* a;  // word (row, step) at a[row * a_row + step * a_step]
  int64_t a_row, a_step;
  const float* b;  // word (step, column) at b[step * b_step + column]
  int64_t b_step;
  float* c;  // fp32 (row, column) at c[row * c_row + column]
  int64_t c_row;
  // `rows` must be even, `columns` a multiple of kLanes; `steps` may be any number
  int64_t rows, columns, steps;
  bool add;  // add to c, instead of overwriting it
};

template <bool paired>
struct Multiply {
  template <int Width>
  PRISMER_INLINE static void run(const Factors& f) {
    constexpr int64_t most = Width == kLanes ? 4 : 2;  // vectors of a tile
    const int64_t vectors = f.columns / Width;
    for (int64_t done = 0; done < vectors;) {
      // as even as possible: six vectors are twice three
      const int64_t left = vectors - done, tiles = (left + most - 1) / most;
      const int64_t here = (left + tiles - 1) / tiles;
      if constexpr (most == 4) {
        if (here == 4) down<Width, 4>(f, done * Width);
        if (here == 3) down<Width, 3>(f, done * Width);
        if (here == 1) down<Width, 1>(f, done * Width);
      }
      if (here == 2) down<Width, 2>(f, done * Width);
      done += here;
    }
  }

 private:
  template <int Width, int Vectors>
  PRISMER_INLINE static void down(const Factors& f, int64_t column) {
    int64_t row = 0;
    for (; row + 6 <= f.rows; row += 6) tile<Width, 6, Vectors>(f, row, column);
    if (f.rows - row == 4) tile<Width, 4, Vectors>(f, row, column);
    if (f.rows - row == 2) tile<Width, 2, Vectors>(f, row, column);
  }

  template <int Width, int Rows, int Vectors>
  PRISMER_INLINE static void tile(const Factors& f, int64_t row, int64_t column) {
    using Vector = Tree<float, Width, Width>;
    const float* a = f.a + row * f.a_row;
    const float* b = f.b + column;
    float* c = f.c + row * f.c_row + column;
    Vector sum[Rows][Vectors];
#pragma GCC unroll 6
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < Vectors; ++j) {
        sum[i][j] = f.add ? load<Vector>(c + i * f.c_row + j * Width) : broadcast<Vector>(0.0f);
      }
    }
    for (int64_t step = 0; step < f.steps; ++step, a += f.a_step, b += f.b_step) {
      Vector right[Vectors];
#pragma GCC unroll 4
      for (int j = 0; j < Vectors; ++j) right[j] = load<Vector>(b + j * Width);
#pragma GCC unroll 6
      for (int i = 0; i < Rows; ++i) {
        const Vector left = broadcast<Vector>(a[i * f.a_row]);
#pragma GCC unroll 4
        for (int j = 0; j < Vectors; ++j) sum[i][j] = plus(sum[i][j], left, right[j]);
      }
    }
#pragma GCC unroll 6
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < Vectors; ++j) store(c + i * f.c_row + j * Width, sum[i][j]);
    }
  }

  template <typename Vector>
  PRISMER_INLINE static Vector plus(Vector sum, const Vector& left, const Vector& right) {
#if defined(__x86_64__)
    if constexpr (paired && sizeof(Vector) == 64) {
      asm("vdpbf16ps %2, %1, %0" : "+v"(sum.v) : "v"(left.v), "v"(right.v));
      return sum;
    }
#endif
    return sum + left * right;
  }
};

}  // namespace prismer
