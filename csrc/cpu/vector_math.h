// Functions of the vectors of `vector.h`: sums over lanes, in one order for every instruction set,
// and the exponential.

#pragma once

#include "vector.h"

namespace prismer {

// ---- over lanes ---------------------------------------------------------------------------------

namespace leaf {

template <int Width, typename Vector>
PRISMER_INLINE auto add_halves(Vector v) {
  if constexpr (Width == 16) {
    return __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
           __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
  } else {
    return __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
  }
}

template <int Width, typename Vector>
PRISMER_INLINE auto sum(Vector v) {
  if constexpr (Width > 4) {
    return leaf::sum<Width / 2>(add_halves<Width>(v));
  } else {
    return (v[0] + v[2]) + (v[1] + v[3]);
  }
}

// a step of sums() below; the compiler wants the indices of a shuffle as literals
template <int Step, int Width, typename Vector>
PRISMER_INLINE Vector fold(Vector a, Vector b) {
  if constexpr (Width == 16 && Step == 8) {
    return __builtin_shufflevector(
               a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           __builtin_shufflevector(
               a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  } else if constexpr (Width == 16 && Step == 4) {
    return __builtin_shufflevector(
               a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
           __builtin_shufflevector(
               a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  } else if constexpr (Width == 16 && Step == 2) {
    return __builtin_shufflevector(
               a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
           __builtin_shufflevector(
               a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  } else if constexpr (Width == 16) {
    return __builtin_shufflevector(
               a, b, 0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30) +
           __builtin_shufflevector(
               a, b, 1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31);
  } else if constexpr (Width == 8 && Step == 4) {
    return __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11) +
           __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
  } else if constexpr (Width == 8 && Step == 2) {
    return __builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13) +
           __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
  } else if constexpr (Width == 8) {
    return __builtin_shufflevector(a, b, 0, 2, 8, 10, 4, 6, 12, 14) +
           __builtin_shufflevector(a, b, 1, 3, 9, 11, 5, 7, 13, 15);
  } else if constexpr (Step == 2) {
    return __builtin_shufflevector(a, b, 0, 1, 4, 5) + __builtin_shufflevector(a, b, 2, 3, 6, 7);
  } else {
    static_assert(Width == 4 && Step == 1);
    return __builtin_shufflevector(a, b, 0, 2, 4, 6) + __builtin_shufflevector(a, b, 1, 3, 5, 7);
  }
}

// exchanges lanes i and i ^ Step
template <int Step, int Width>
PRISMER_INLINE Native<float, Width> swap(Native<float, Width> v) {
  if constexpr (Width == 16 && Step == 8) {
    return __builtin_shufflevector(
        v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
  } else if constexpr (Width == 16 && Step == 4) {
    return __builtin_shufflevector(
        v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
  } else if constexpr (Width == 16 && Step == 2) {
    return __builtin_shufflevector(
        v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
  } else if constexpr (Width == 16) {
    return __builtin_shufflevector(
        v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
  } else if constexpr (Width == 8 && Step == 4) {
    return __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3);
  } else if constexpr (Width == 8 && Step == 2) {
    return __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5);
  } else if constexpr (Width == 8) {
    return __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6);
  } else if constexpr (Step == 2) {
    return __builtin_shufflevector(v, v, 2, 3, 0, 1);
  } else {
    return __builtin_shufflevector(v, v, 1, 0, 3, 2);
  }
}

}  // namespace leaf

template <int Step, int Lanes, int Width>
PRISMER_INLINE Tree<float, Lanes, Width> swap(const Tree<float, Lanes, Width>& a) {
  if constexpr (Lanes == Width) {
    return {leaf::swap<Step, Width>(a.v)};
  } else if constexpr (2 * Step == Lanes) {
    return {a.high, a.low};
  } else {
    return {swap<Step>(a.low), swap<Step>(a.high)};
  }
}

// reduces lanes whose indices are equal modulo Period; each of them holds the result
template <int Period, typename Vector, typename Operation>
PRISMER_INLINE Vector across(Vector a, const Operation& operation) {
  a = operation(a, swap<8>(a));
  if constexpr (Period <= 4) a = operation(a, swap<4>(a));
  if constexpr (Period <= 2) a = operation(a, swap<2>(a));
  if constexpr (Period <= 1) a = operation(a, swap<1>(a));
  return a;
}

template <typename Value, int Lanes, int Width>
PRISMER_INLINE Value sum(const Tree<Value, Lanes, Width>& a) {
  if constexpr (Lanes == Width) {
    return leaf::sum<Width>(a.v);
  } else {
    return sum(a.low + a.high);
  }
}

// Step 8 adds the halves of a, and those of b. Step 4 adds neighbouring chunks of four lanes, first
// of a and then of b. Steps 2 and 1 add pairs within chunks of four.
template <int Step, typename Value, int Lanes, int Width>
PRISMER_INLINE Tree<Value, Lanes, Width> fold(
    const Tree<Value, Lanes, Width>& a, const Tree<Value, Lanes, Width>& b) {
  if constexpr (Lanes == Width) {
    return {leaf::fold<Step, Width>(a.v, b.v)};
  } else if constexpr (Step >= 4 && 2 * Step == Lanes) {
    return {a.low + a.high, b.low + b.high};
  } else if constexpr (Step == 4 && Lanes == 16) {
    return {fold<Step>(a.low, a.high), fold<Step>(b.low, b.high)};
  } else {
    return {fold<Step>(a.low, b.low), fold<Step>(a.high, b.high)};
  }
}

// lane i of the result is the sum of a[i], in the order of sum(), or 0 if i modulo 4 is not less
// than Used
template <int Used = 4, typename Value, int Width>
PRISMER_INLINE Tree<Value, kLanes, Width> sums(const Tree<Value, kLanes, Width> (&a)[kLanes]) {
  Tree<Value, kLanes, Width> quarter[4] = {};
#pragma GCC unroll 4
  for (int i = 0; i < Used; ++i) {
    quarter[i] = fold<4>(fold<8>(a[i], a[i + 4]), fold<8>(a[i + 8], a[i + 12]));
  }
  return fold<1>(fold<2>(quarter[0], quarter[1]), fold<2>(quarter[2], quarter[3]));
}

// ---- functions ----------------------------------------------------------------------------------

// `full` is accurate to about an ulp of fp32; otherwise to 2^-18, for results that are rounded to
// 16 bits

// the nearest integer, for |a| < 2^22
template <int Lanes, int Width>
PRISMER_INLINE Tree<float, Lanes, Width> round(const Tree<float, Lanes, Width>& a) {
  if constexpr (Lanes != Width) {
    return {round(a.low), round(a.high)};
  } else {
    typename Tree<float, Lanes, Width>::Native result;
#if defined(__x86_64__)
    if constexpr (Width == 16) {
      asm("vrndscaleps $8, %1, %0" : "=v"(result) : "v"(a.v));
      return {result};
    } else if constexpr (Width == 8) {
      asm("vroundps $8, %1, %0" : "=v"(result) : "v"(a.v));
      return {result};
    }
#endif
    // adding 1.5 * 2^23 rounds to an integer: a float of this size has no bits for a fraction
    result = (a.v + 12582912.0f) - 12582912.0f;
    return {result};
  }
}

// a * 2^whole for integers |whole| < 2^22; 0 or infinity beyond the range of fp32, 0 for denormals
// on some instruction sets
template <int Lanes, int Width>
PRISMER_INLINE Tree<float, Lanes, Width> scale(
    const Tree<float, Lanes, Width>& a, const Tree<float, Lanes, Width>& whole) {
  if constexpr (Lanes != Width) {
    return {scale(a.low, whole.low), scale(a.high, whole.high)};
  } else {
    using Vector = Tree<float, Lanes, Width>;
#if defined(__x86_64__)
    if constexpr (Width == 16) {
      typename Vector::Native result;
      asm("vscalefps %2, %1, %0" : "=v"(result) : "v"(a.v), "v"(whole.v));
      return {result};
    }
#endif
    // the exponent field of the factor: with 0 the factor is zero, with 255 infinity
    const Vector within = min(max(whole, -127.0f), 128.0f);
    const auto exponent =
        __builtin_convertvector(within.v, typename Tree<int32_t, Lanes, Width>::Native) + 127;
    return {a.v * (typename Vector::Native)(exponent << 23)};
  }
}

// 2^fraction for |fraction| <= 1/2
template <bool full, typename Vector>
PRISMER_INLINE Vector exp2_fraction(const Vector& f) {
  if constexpr (full) {
    Vector p = f * 1.5345808e-4f + 1.3399931e-3f;
    p = p * f + 9.618489e-3f;
    p = p * f + 5.5503288e-2f;
    p = p * f + 2.4022647e-1f;
    p = p * f + 6.9314721e-1f;
    return p * f + 1.0f;
  } else {
    const Vector high = f * (f * 9.5700967e-3f + 5.591786e-2f) + 2.4024745e-1f;
    return high * (f * f) + (f * 6.9312181e-1f + 0.99999926f);
  }
}

// 2^x for |x| < 2^22; see scale() for overflow and underflow. NaN stays NaN.
template <bool full = true, typename Vector>
PRISMER_INLINE Vector exp2(const Vector& x) {
  const Vector whole = round(x);
  return scale(exp2_fraction<full>(x - whole), whole);
}

// e^x for any x; infinity if x is 88.37 or more
template <typename Vector>
PRISMER_INLINE Vector exp(const Vector& exponent) {
  const Vector x = min(max(exponent, -200.0f), 200.0f);
  const Vector whole = round(x * 1.44269504f);
  // ln 2 in two parts: the first has trailing zero bits, so its product with `whole` is exact
  const Vector rest = (x - whole * 0.693359375f) - whole * -2.12194440e-4f;
  return scale(exp2_fraction<true>(rest * 1.44269504f), whole);
}

}  // namespace prismer
