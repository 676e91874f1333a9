// Arithmetic of LayerNorm, forward and backward. Vector is float or a vector of floats.

#pragma once

#include <cmath>
#include <cstdint>

#include "shared.h"

namespace prismer {

// takes the sum of squares about the mean, which needs two passes: E[x^2] - mean^2 cancels for
// large means
PRISMER_SHARED float rstd_of(float squares_about_mean, int64_t width, float eps) {
  return 1.0f / sqrtf(squares_about_mean / static_cast<float>(width) + eps);
}

template <typename Vector>
PRISMER_SHARED Vector normalised(Vector x, float mean, float rstd) {
  return (x - mean) * rstd;
}

template <typename Vector>
PRISMER_SHARED Vector affine(Vector x_hat, Vector weight, Vector bias) {
  return x_hat * weight + bias;
}

// g = dy * weight; mean_g and mean_g_x_hat are the means of g and of g * x_hat over the row
template <typename Vector>
PRISMER_SHARED Vector input_gradient(
    Vector g, Vector x_hat, float mean_g, float mean_g_x_hat, float rstd) {
  return rstd * (g - mean_g - x_hat * mean_g_x_hat);
}

}  // namespace prismer
