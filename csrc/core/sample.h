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

// The lower tap of a position, on an axis that is continued by its border pixels, the other is the next
// pixel.
template <typename real>
struct Lower {
  int pixel;      // in [-1, size)
  real fraction;  // in [0, 1)
};

// Only for positions inside the frame: their floor is in [-1, size], so that the conversion is defined.
template <typename real>
EQUIFAST_HD inline Lower<real> lower(double position, int size) {
  int low = static_cast<int>(position);  // toward zero
  low -= position < low ? 1 : 0;         // floor
  const auto fraction = static_cast<real>(position - low);
  return {low < -1 ? -1 : (low > size - 1 ? size - 1 : low), fraction};
}

template <typename real>
EQUIFAST_HD inline Tap<real> tap(double position, int size) {
  const Lower<real> low = lower<real>(position, size);
  const int high = low.pixel + 1;
  return {low.pixel < 0 ? 0 : low.pixel, high > size - 1 ? size - 1 : high, low.fraction};
}

}  // namespace equifast::core
