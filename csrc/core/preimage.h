// The other way round: which output pixels of an affine view can read a given input pixel. With it the
// adjoint of a warp gathers, and needs no atomics.
#pragma once

#include <cmath>

#include "sample.h"

namespace equifast::core {

// Positions on one axis whose taps include a pixel, both ends included.
struct Reach {
  double low, high;  // input pixels
};

// Pixel `at` of `size`, where the frame is [first, last]. A border pixel also serves the frame beyond it.
EQUIFAST_HD inline Reach reach(int at, int size, double first, double last) {
  const double low = at - 1.0, high = at + 1.0;
  return {at == 0 || low < first ? first : low, at == size - 1 || high > last ? last : high};
}

// The weight with which a tap reads a pixel. Both of its neighbors may be the same one, at the border.
template <typename real>
EQUIFAST_HD inline real weight(const Tap<real>& tap, int pixel) {
  return (tap.low == pixel ? 1 - tap.fraction : real(0)) + (tap.high == pixel ? tap.fraction : real(0));
}

// Output pixels [left, right) x [top, bottom).
struct Box {
  int left, right, top, bottom;
};

// A PixelMap turned round. Boxes hold every output pixel whose position, rounding included, lies in a
// rectangle of the input, and some more: whoever walks through one tests each position.
class Preimage {
 public:
  Preimage() = default;  // of indeterminate value, as shared memory wants it
  EQUIFAST_HD Preimage(const PixelMap& m, int out_width, int out_height)
      : x0_(m.x0), y0_(m.y0), width_(out_width), height_(out_height) {
    // v - v is 0 but for NaN and infinities. A coefficient that is not finite makes every position so:
    // outside.
    const double finite =
        (m.xi - m.xi) + (m.xj - m.xj) + (m.x0 - m.x0) + (m.yi - m.yi) + (m.yj - m.yj) + (m.y0 - m.y0);
    if (finite != 0) {
      kind_ = Kind::empty;
      return;
    }
    const double det = m.xi * m.yj - m.xj * m.yi;
    const double size = std::fabs(det), terms = std::fabs(m.xi * m.yj) + std::fabs(m.xj * m.yi);
    // Here a rounded determinant is right to 1e-6. Else every output pixel is looked at: slow but right.
    kind_ = size > 1e-9 * terms && size > 1e-290 && terms < 1e290 ? Kind::inverse : Kind::everything;
    ix_ = m.yj / det, iy_ = -m.xj / det;
    jx_ = -m.yi / det, jy_ = m.xi / det;
    // Positions are computed with a rounding error far below this.
    constexpr double rounding = 1e-12;
    ex_ = rounding * (std::fabs(m.xi) * out_width + std::fabs(m.xj) * out_height + std::fabs(m.x0));
    ey_ = rounding * (std::fabs(m.yi) * out_width + std::fabs(m.yj) * out_height + std::fabs(m.y0));
  }

  EQUIFAST_HD Box box(const Reach& x, const Reach& y) const {
    if (kind_ == Kind::empty) return {0, 0, 0, 0};
    if (kind_ == Kind::everything) return {0, width_, 0, height_};
    const double cx = (x.low + x.high) / 2, cy = (y.low + y.high) / 2;
    const double hx = (x.high - x.low) / 2 + ex_, hy = (y.high - y.low) / 2 + ey_;
    constexpr double slack = 2e-6;  // relative error of the inverse
    const double sx = hx + slack * (std::fabs(cx) + std::fabs(x0_) + hx);
    const double sy = hy + slack * (std::fabs(cy) + std::fabs(y0_) + hy);
    const double i = ix_ * (cx - x0_) + iy_ * (cy - y0_) - 0.5;
    const double j = jx_ * (cx - x0_) + jy_ * (cy - y0_) - 0.5;
    const double ri = std::fabs(ix_) * sx + std::fabs(iy_) * sy + slack;
    const double rj = std::fabs(jx_) * sx + std::fabs(jy_) * sy + slack;
    return {first(i - ri, width_), last(i + ri, width_), first(j - rj, height_), last(j + rj, height_)};
  }

 private:
  enum class Kind : int { empty, inverse, everything };
  double x0_, y0_;
  double ix_, iy_, jx_, jy_;  // output pixels per input pixel
  double ex_, ey_;            // input pixels
  int width_, height_;        // of the output, pixels
  Kind kind_;

  // The first pixel at or after v, and the one after the last at or before v; all of them for NaN.
  EQUIFAST_HD static int first(double v, int size) {
    return !(v > 0) ? 0 : (v >= size ? size : static_cast<int>(std::ceil(v)));
  }
  EQUIFAST_HD static int last(double v, int size) {
    return v < 0 ? 0 : (!(v < size) ? size : static_cast<int>(std::floor(v)) + 1);
  }
};

}  // namespace equifast::core
