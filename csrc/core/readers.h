// The inverse question of sampling: which output positions may read an input pixel.
#pragma once

#include <cmath>

#include "affine.h"

namespace equifast::core {

// Output positions [left, right] x [top, bottom], empty where an end is below its begin.
struct Box {
  int left, right, top, bottom;  // output pixels, in [0, size)

  EQUIFAST_HD int width() const { return right - left + 1; }
  EQUIFAST_HD int height() const { return bottom - top + 1; }
  EQUIFAST_HD bool empty() const { return right < left || bottom < top; }
};

// A box is allowed to hold positions that do not read, since who adds up tests each position; it must hold
// all that do. So rounding makes it larger, and where the inverse is not finite it is the whole map.
struct Readers {
  PixelMap back;            // input pixels to output pixels
  double slack_x, slack_y;  // output pixels, on either side
  double reach_x, reach_y;  // input pixels: how far from a pixel a position reads it
  int width, height;        // output size

  // `theta` maps output to input positions, `inverse` the other way; one of them was computed from the other.
  EQUIFAST_HD Readers(const Theta& theta, const Theta& inverse, int out_w, int out_h, int in_w, int in_h)
      : back(inverse, in_w, in_h, out_w, out_h), width(out_w), height(out_h) {
    // Relative rounding of the determinant, hence of the computed one of the two maps about its center.
    constexpr double rounding = 1e-15;
    const double product = std::fabs(theta.a * theta.d), other = std::fabs(theta.b * theta.c);
    const double det = std::fabs(theta.a * theta.d - theta.b * theta.c);
    const double relative = rounding * (1 + (product + other) / det);
    const double far = 1 + std::fabs(inverse.x) + std::fabs(inverse.y);
    slack_x = 1e-6 + out_w * far * relative +
              rounding * (std::fabs(back.xi) * in_w + std::fabs(back.xj) * in_h + std::fabs(back.x0));
    slack_y = 1e-6 + out_h * far * relative +
              rounding * (std::fabs(back.yi) * in_w + std::fabs(back.yj) * in_h + std::fabs(back.y0));
    // A tap is less than a pixel away, or at the border half a pixel and the tolerance of the frame; the
    // position itself is rounded.
    reach_x =
        1 + 1e-6 * in_w + rounding * in_w * (std::fabs(theta.a) + std::fabs(theta.b) + std::fabs(theta.x));
    reach_y =
        1 + 1e-6 * in_h + rounding * in_h * (std::fabs(theta.c) + std::fabs(theta.d) + std::fabs(theta.y));
  }

  // Of the pixels within (radius_x, radius_y) of (x, y).
  EQUIFAST_HD Box around(double x, double y, double radius_x, double radius_y) const {
    const Position center = back.at(x, y);
    radius_x += reach_x, radius_y += reach_y;
    const double extent_x = std::fabs(back.xi) * radius_x + std::fabs(back.xj) * radius_y + slack_x;
    const double extent_y = std::fabs(back.yi) * radius_x + std::fabs(back.yj) * radius_y + slack_y;
    return {first(center.x - extent_x, width), last(center.x + extent_x, width),
            first(center.y - extent_y, height), last(center.y + extent_y, height)};
  }

 private:
  // Written so that NaN gives the whole range and no conversion of a huge number is made.
  EQUIFAST_HD static int first(double low, int size) {
    if (!(low > 0)) return 0;
    return low > size - 1 ? size : static_cast<int>(std::ceil(low));
  }
  EQUIFAST_HD static int last(double high, int size) {
    if (!(high < size - 1)) return size - 1;
    return high < 0 ? -1 : static_cast<int>(std::floor(high));
  }
};

}  // namespace equifast::core
