// Affine views: where an output pixel reads its input. Coordinates are those of affine_grid with
// align_corners=False: an image spans [-1,1] x [-1,1] edge to edge, theta maps an output position to the
// input position that is read. float64 throughout, so that identity and flip are exact.
#pragma once

#include <limits>

#include "host_device.h"

namespace equifast::core {

struct Theta {
  double a, b, x;  // first row: normalized input x of a normalized output position
  double c, d, y;  // second row: normalized input y
};

// The inverse map. NaN where theta is singular (a determinant below 1e-12) or not finite: every position is
// then outside. + 0.0 turns -0.0 into 0.0; the adjugate over the determinant is exact for identity and flips.
EQUIFAST_HD inline Theta invert(const Theta& t) {
  const double det = t.a * t.d - t.b * t.c;
  const bool invertible = (det >= 1e-12 || det <= -1e-12) && det - det == 0;
  constexpr double nan = std::numeric_limits<double>::quiet_NaN();
  const double over = invertible ? det : nan;
  const double a = t.d / over + 0.0, b = -t.b / over + 0.0, c = -t.c / over + 0.0, d = t.a / over + 0.0;
  return {a, b, -(a * t.x + b * t.y) + 0.0, c, d, -(c * t.x + d * t.y) + 0.0};
}

struct Position {
  double x, y;  // input pixels; the center of the first pixel is 0
};

// The same map between pixels: output (i, j) (column, row) of a map of out_w x out_h to an input of w x h.
struct PixelMap {
  double xi, xj, x0;
  double yi, yj, y0;
  double w, h;  // input size, pixels

  EQUIFAST_HD PixelMap(const Theta& t, double out_w, double out_h, double in_w, double in_h)
      : xi(t.a * (in_w / out_w)),
        xj(t.b * (in_w / out_h)),
        x0(in_w / 2 * (1 + t.x - t.a - t.b) - 0.5),
        yi(t.c * (in_h / out_w)),
        yj(t.d * (in_h / out_h)),
        y0(in_h / 2 * (1 + t.y - t.c - t.d) - 0.5),
        w(in_w),
        h(in_h) {}

  EQUIFAST_HD Position at(double i, double j) const {
    return {xi * (i + 0.5) + xj * (j + 0.5) + x0, yi * (i + 0.5) + yj * (j + 0.5) + y0};
  }

  // Whether a position lies in the input frame. False for NaN.
  EQUIFAST_HD bool inside(const Position& p) const {
    constexpr double edge = 1 + 1e-6;
    const double u = (2 * p.x + 1) / w - 1, v = (2 * p.y + 1) / h - 1;
    return u >= -edge && u <= edge && v >= -edge && v <= edge;
  }
};

}  // namespace equifast::core
