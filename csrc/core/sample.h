// Bilinear sampling: the taps of a position inside the input frame. Taps clamp to the border pixels.
#pragma once

#include "affine.h"

namespace equifast::core {

// Two neighbors on one axis; their weights are 1 - fraction and fraction.
template <typename real>
struct Tap {
  int low, high;  // pixels, both in [0, size)
  real fraction;  // in [0, 1)
};

// Only for positions inside the frame: their floor is in [-1, size], so that the conversion is defined.
template <typename real>
EQUIFAST_HD inline Tap<real> tap(double position, int size) {
  int low = static_cast<int>(position);  // toward zero
  low -= position < low ? 1 : 0;         // floor
  const auto fraction = static_cast<real>(position - low);
  const int last = size - 1, high = low + 1;
  return {low < 0 ? 0 : (low > last ? last : low), high < 0 ? 0 : (high > last ? last : high), fraction};
}

}  // namespace equifast::core
