// Arithmetic of label_map: the positions that an output line or column reads, and the blend of four
// taps.

#pragma once

#include "shared.h"

namespace prismer {

// two source positions and the weight of the second; the first has 1 - upper
template <typename Value, typename Index>
struct Tap {
  Index low;
  Index high;
  Value upper;
};

// the tap of output i when `source` pixels are resized to `size` with aligned corners;
// i * (source - 1) must fit in Index
template <typename Value, typename Index>
PRISMER_SHARED Tap<Value, Index> tap(Index i, Index source, Index size) {
  const Index steps = size > 1 ? size - 1 : 1;
  // integers are exact; a float position could be just below a whole pixel
  const Index scaled = i * (source - 1);
  const Index low = scaled / steps;
  const Index high = low + 1 < source ? low + 1 : low;
  return {low, high, static_cast<Value>(scaled - low * steps) / static_cast<Value>(steps)};
}

// weights of the taps: first digit the line, second the column
template <typename Value>
struct TapWeights {
  Value w00, w01, w10, w11;
};

template <typename Value>
PRISMER_SHARED TapWeights<Value> tap_weights(Value upper_y, Value upper_x) {
  const Value one = 1;
  return {
      (one - upper_y) * (one - upper_x), (one - upper_y) * upper_x, upper_y * (one - upper_x),
      upper_y * upper_x};
}

// Vector is Value or a vector of it
template <typename Value, typename Vector>
PRISMER_SHARED Vector blend(
    const TapWeights<Value>& w, Vector t00, Vector t01, Vector t10, Vector t11) {
  return w.w00 * t00 + w.w01 * t01 + w.w10 * t10 + w.w11 * t11;
}

}  // namespace prismer
