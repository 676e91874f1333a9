// Arithmetic of the activations and their derivatives. Vector is a vector of floats with the
// functions exp2, abs, min, max, less and select of cpu/vector_math.h. `full` is false for results
// that are rounded to 16 bits.

#pragma once

#include "shared.h"

namespace prismer {

// beyond this distance from the mean the tail is smaller than any fp32 number
constexpr float kFar = 15.0f;

// P(normal variable < -t) for 0 <= t <= kFar: 2 to the power of a polynomial, which follows the
// tail where a sum would cancel. Coefficients by weighted minimax over 0..14, within 4e-8 (full) or 2e-6.
template <bool full, typename Vector>
PRISMER_SHARED Vector normal_tail(const Vector& t) {
  Vector p;
  if constexpr (full) {
    p = t * 4.4959752e-10f - 2.57151941e-08f;
    p = p * t + 6.10122644e-07f;
    p = p * t - 7.78383698e-06f;
    p = p * t + 5.69396329e-05f;
    p = p * t - 0.000212169484f;
    p = p * t - 0.000137318564f;
    p = p * t + 0.00710927602f;
    p = p * t - 0.0525466312f;
    p = p * t - 0.459187637f;
    p = p * t - 1.15110808f;
    p = p * t - 0.999999929f;
  } else {
    // pairs first: in one chain each multiply-add would wait for the one before it
    const Vector t2 = t * t;
    const Vector low = (t * -0.0525173847f - 0.459449923f) * t2 + (t * -1.15101176f - 1.00000469f);
    const Vector high = t2 * 2.14683044e-05f + (t * -0.00064000266f + 0.00756771617f);
    p = high * (t2 * t2) + low;
  }
  return exp2<full>(p);
}

// x / (1 + e^(-1.702 x)), which is x * sigmoid(1.702 x); the power is a power of two
struct QuickGelu {
  template <bool full, typename Vector>
  PRISMER_SHARED static Vector value(const Vector& x) {
    return x / (1.0f + exp2<full>(min(max(x * -2.45546696f, -200.0f), 200.0f)));
  }

  template <bool full, typename Vector>
  PRISMER_SHARED static Vector derivative(const Vector& x) {
    // beyond 50 the derivative is 0 or 1; up to there no power overflows
    const Vector near = min(max(x, -50.0f), 50.0f);
    const Vector power = exp2<full>(near * -2.45546696f);
    const Vector s = 1.0f / (1.0f + power);
    // power * s equals 1 - s, but does not cancel
    return s * (1.0f + 1.702f * near * (power * s));
  }
};

// x * P(normal variable < x)
struct Gelu {
  template <bool full, typename Vector>
  PRISMER_SHARED static Vector value(const Vector& x) {
    const Vector t = min(abs(x), kFar);
    return max(x, 0.0f) - t * normal_tail<full>(t);
  }

  // P(normal variable < x) + x * density(x); the derivative at -x is 1 minus the one at x
  template <bool full, typename Vector>
  PRISMER_SHARED static Vector derivative(const Vector& x) {
    const Vector t = min(abs(x), kFar);
    // e^(-t^2 / 2) / sqrt(2 pi) as a power of two
    const Vector density = exp2<full>(t * t * -0.72134752f - 1.32574806f);
    Vector below;
    if constexpr (full) {
      below = normal_tail<full>(t) - t * density;
    } else {
      // saves the second power: a minimax fit of tail / density - t over 0..6; the error of the
      // product is below 3e-5
      const Vector u = min(t, 6.0f), u2 = u * u;
      const Vector low = (u * -0.288595376f + 0.609646461f) * u2 + (u * -1.99754473f + 1.25325634f);
      const Vector high =
          (u * -0.000122202172f + 0.00249912555f) * u2 + (u * -0.0210539491f + 0.0976807788f);
      below = density * (high * (u2 * u2) + low);
    }
    return select(less(x, 0.0f), below, 1.0f - below);
  }
};

// max(x, 0)^2
struct SquaredRelu {
  template <bool full, typename Vector>
  PRISMER_SHARED static Vector value(const Vector& x) {
    const Vector r = relu(x);
    return r * r;
  }

  template <bool full, typename Vector>
  PRISMER_SHARED static Vector derivative(const Vector& x) {
    return 2.0f * relu(x);
  }

  // NaN stays NaN
  template <typename Vector>
  PRISMER_SHARED static Vector relu(const Vector& x) {
    return select(less(x, 0.0f), 0.0f, x);
  }
};

}  // namespace prismer
