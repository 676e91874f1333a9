// Arithmetic of the activations and their derivatives. Vector is a vector of floats with the
// functions exp, exp2, abs, min, less and select of cpu/vector.h. Not `full` is for results
// that are rounded to 16 bits.

#pragma once

#include "shared.h"

namespace prismer {

// P(normal variable < -distance) for distance >= 0: 2 to a polynomial, which follows the tail where a sum cancels.
// Coefficients by weighted minimax over 0..14, within 4e-8 (full) or 2e-6.
template <bool full, typename Vector>
PRISMER_SHARED Vector normal_tail(const Vector& distance) {
  // beyond 14 it is less than any fp32
  const Vector t = min(distance, 14.0f);
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
    p = t * 2.14683044e-05f - 0.00064000266f;
    p = p * t + 0.00756771617f;
    p = p * t - 0.0525173847f;
    p = p * t - 0.459449923f;
    p = p * t - 1.15101176f;
    p = p * t - 1.00000469f;
  }
  return exp2<full>(p);
}

// P(normal variable < x)
template <bool full, typename Vector>
PRISMER_SHARED Vector normal_cdf(const Vector& x) {
  const Vector tail = normal_tail<full>(abs(x));
  return select(less(x, 0.0f), tail, 1.0f - tail);
}

template <typename Vector>
PRISMER_SHARED Vector sigmoid(const Vector& x) {
  return 1.0f / (1.0f + exp(0.0f - x));
}

// x * sigmoid(1.702 x)
struct QuickGelu {
  template <bool full, typename Vector>
  PRISMER_SHARED static Vector value(const Vector& x) {
    return x * sigmoid(1.702f * x);
  }

  template <bool full, typename Vector>
  PRISMER_SHARED static Vector derivative(const Vector& x) {
    const Vector s = sigmoid(1.702f * x);
    return s * (1.0f + 1.702f * x * (1.0f - s));
  }
};

// x * normal_cdf(x)
struct Gelu {
  template <bool full, typename Vector>
  PRISMER_SHARED static Vector value(const Vector& x) {
    return x * normal_cdf<full>(x);
  }

  template <bool full, typename Vector>
  PRISMER_SHARED static Vector derivative(const Vector& x) {
    // e^(-x^2 / 2) / sqrt(2 pi), as a power of two
    const Vector density = 0.39894228f * exp2<full>(x * x * -0.72134752f);
    return normal_cdf<full>(x) + x * density;
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
