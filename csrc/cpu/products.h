// Positions of many pixels at once, to the last bit those of core::PixelMap::at.
#pragma once

#include "../core/affine.h"

namespace equifast::cpu {
namespace {

// In loops that it vectorizes GCC fuses products with sums in spite of core::product, so that two passes may
// see a position in two pixels. Behind this it does not know where the numbers come from.
inline void hide(double* numbers) {
#if defined(__GNUC__)
  asm volatile("" : : "r"(numbers) : "memory");
#endif
}

// out[i] = slope * (first + i + 1/2)
inline void products(double slope, int first, int count, double* out) {
#pragma omp simd
  for (int i = 0; i < count; ++i) out[i] = slope * (first + i + 0.5);
  hide(out);
}

// Columns [first, first + count) of row j, at most `most`.
struct Positions {
  static constexpr int most = 64;
  double x[most], y[most];

  void look(const core::PixelMap& map, int j, int first, int count) {
    products(map.xi, first, count, x), products(map.yi, first, count, y);
    const double xj = core::product(map.xj, j + 0.5), yj = core::product(map.yj, j + 0.5);
#pragma omp simd
    for (int i = 0; i < count; ++i) x[i] = x[i] + xj + map.x0, y[i] = y[i] + yj + map.y0;
  }
};

}  // namespace
}  // namespace equifast::cpu
