// Arithmetic of an online softmax: it keeps a running maximum, and rescales its sums when that
// rises.
//   rescale = raise_max(state, max of the tile); sum and accumulator *= rescale
//   weight  = exp(score - shift(state.max)); sum += weight; accumulator += weight * value
// A masked score is -inf. Its weight is 0, even before the first visible key (max = -inf).

#pragma once

#include <cmath>

#include "shared.h"

namespace prismer {

constexpr float kMasked = -__builtin_huge_valf();

struct Softmax {
  float max = kMasked;
  float sum = 0.0f;
};

// the number that is subtracted from a score before exp: never -inf, because -inf - -inf is NaN
PRISMER_SHARED float shift(float max) { return max == kMasked ? 0.0f : max; }

PRISMER_SHARED float weight(float score, float max) { return expf(score - shift(max)); }

// raises the maximum to that of a tile; returns the factor for all sums so far, which is 0 before
// the first key
PRISMER_SHARED float raise_max(Softmax& state, float tile_max) {
  const float max = fmaxf(state.max, tile_max);
  const float rescale = weight(state.max, max);
  state.max = max;
  state.sum *= rescale;
  return rescale;
}

// 1 / sum; 0 for a query that sees no key, whose output is zeros
PRISMER_SHARED float inverse(float sum) { return sum > 0.0f || sum != sum ? 1.0f / sum : 0.0f; }

}  // namespace prismer
