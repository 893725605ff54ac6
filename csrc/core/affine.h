// Affine views: where an output pixel reads its input. Coordinates are those of affine_grid with
// align_corners=False: an image spans [-1,1] x [-1,1] edge to edge, theta maps an output position to the
// input position that is read. float64 throughout, so that identity and flip are exact.
#pragma once

#include <cstdint>
#include <limits>

#include "host_device.h"

namespace equifast::core {

struct Theta {
  double a, b, x;  // first row: normalized input x of a normalized output position
  double c, d, y;  // second row: normalized input y
};

// Of image n under view k: theta is (K, N, 2, 3).
EQUIFAST_HD inline Theta theta_of(const double* theta, int images, int k, int n) {
  const double* t = theta + (std::int64_t{k} * images + n) * 6;
  return {t[0], t[1], t[2], t[3], t[4], t[5]};
}

constexpr double not_a_number = std::numeric_limits<double>::quiet_NaN();

// Whether the linear part is neither singular (a determinant below 1e-12) nor beyond what a double holds.
EQUIFAST_HD inline bool is_invertible(const Theta& t) {
  const double det = t.a * t.d - t.b * t.c;
  return (det >= 1e-12 || det <= -1e-12) && det - det == 0;
}

// The inverse map. NaN where theta is not invertible: every position is then outside. + 0.0 turns -0.0 into
// 0.0; the adjugate over the determinant is exact for identity and flips.
EQUIFAST_HD inline Theta invert(const Theta& t) {
  const double over = is_invertible(t) ? t.a * t.d - t.b * t.c : not_a_number;
  const double a = t.d / over + 0.0, b = -t.b / over + 0.0, c = -t.c / over + 0.0, d = t.a / over + 0.0;
  return {a, b, -(a * t.x + b * t.y) + 0.0, c, d, -(c * t.x + d * t.y) + 0.0};
}

struct Position {
  double x, y;  // input pixels; the center of the first pixel is 0
};

// A product that no compiler fuses with the sum that follows: all kernels, and all loops of one, see a
// position alike, to the last bit, so that one pass is the exact adjoint of another and nothing is read that
// was not foreseen.
EQUIFAST_HD inline double product(double a, double b) {
#ifdef __CUDA_ARCH__
  return __dmul_rn(a, b);
#elif defined(__GNUC__) && !defined(__clang__) && !defined(__CUDACC__) && __GNUC__ >= 12
  // clang does not fuse across functions, and nvcc does not know the barrier
  return __builtin_assoc_barrier(a * b);
#else
  return a * b;
#endif
}

// The same map between pixels: output (i, j) (column, row) of a map of out_w x out_h to an input of w x h.
struct PixelMap {
  double xi, xj, x0;
  double yi, yj, y0;
  double w, h;                      // input size, pixels
  double left, right, top, bottom;  // the input frame with its tolerance of 1e-6, input pixels

  PixelMap() = default;  // of indeterminate value, as shared memory wants it
  EQUIFAST_HD PixelMap(const Theta& t, double out_w, double out_h, double in_w, double in_h)
      : xi(t.a * (in_w / out_w)),
        xj(t.b * (in_w / out_h)),
        x0(product(in_w / 2, 1 + t.x - t.a - t.b) - 0.5),
        yi(t.c * (in_h / out_w)),
        yj(t.d * (in_h / out_h)),
        y0(product(in_h / 2, 1 + t.y - t.c - t.d) - 0.5),
        w(in_w),
        h(in_h),
        left(-0.5 - product(0.5e-6, in_w)),
        right(in_w - 0.5 + product(0.5e-6, in_w)),
        top(-0.5 - product(0.5e-6, in_h)),
        bottom(in_h - 0.5 + product(0.5e-6, in_h)) {}

  EQUIFAST_HD Position at(double i, double j) const {
    return {product(xi, i + 0.5) + product(xj, j + 0.5) + x0,
            product(yi, i + 0.5) + product(yj, j + 0.5) + y0};
  }

  EQUIFAST_HD bool operator==(const PixelMap& o) const {
    return xi == o.xi && xj == o.xj && x0 == o.x0 && yi == o.yi && yj == o.yj && y0 == o.y0 && w == o.w &&
           h == o.h;
  }

  // Whether a position lies in the input frame. False for NaN.
  EQUIFAST_HD bool inside(const Position& p) const {
    return p.x >= left && p.x <= right && p.y >= top && p.y <= bottom;
  }
};

}  // namespace equifast::core
