// Cosine similarity from its three sums, and its derivative. A vector of norm below 1e-6 counts as zero.
#pragma once

#include <cmath>

#include "host_device.h"

namespace equifast::core {

constexpr double small_norm = 1e-6;

// Sums over positions and channels, or over channels alone, of the anchor f0 and of a view f1 warped back.
template <typename real>
struct Products {
  real inner;    // <f0, f1>
  real square0;  // |f0|^2
  real square1;  // |f1|^2
};

template <typename real>
struct Cosine {
  real value;  // in [-1, 1]
  real cross;  // d value / d f0 = cross * f1 - own0 * f0
  real own0;
  real own1;  // d value / d f1 = cross * f0 - own1 * f1
};

template <typename real>
EQUIFAST_HD inline Cosine<real> cosine(const Products<real>& p) {
  constexpr real small = static_cast<real>(small_norm) * static_cast<real>(small_norm);
  if (!(p.square0 >= small && p.square1 >= small)) {
    // NaN must stay NaN, a small vector gives 0
    const bool nan = p.square0 != p.square0 || p.square1 != p.square1;
    const real none = nan ? p.square0 + p.square1 : real(0);
    return {none, none, none, none};
  }
  const real cross = 1 / (std::sqrt(p.square0) * std::sqrt(p.square1));
  const real value = p.inner * cross;
  return {value, cross, value / p.square0, value / p.square1};
}

// The similarity of an image and a view from its three sums: those of its one cosine, or for reduction
// "pixel" the sum of the positions' cosines, their number, and 0.
EQUIFAST_HD inline double similarity(const double* sums, bool pixel) {
  if (pixel) return sums[1] > 0 ? sums[0] / sums[1] : 0;
  return cosine(Products<double>{sums[0], sums[1], sums[2]}).value;
}

}  // namespace equifast::core
