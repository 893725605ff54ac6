// The color jitter of one pixel and its derivative: brightness, contrast, saturation, hue, then perhaps gray.
// Written without branches, so that loops over pixels vectorize. Each operation rounds where that of
// equifast/reference.py does, so that both agree on which pixels are clamped and which channels are tied.
#pragma once

#include "host_device.h"

namespace equifast::core {

template <typename real>
struct Color {
  real red, green, blue;
};

template <typename real>
struct Jitter {
  real brightness, contrast, saturation;  // factors; 1 changes nothing
  real hue;                               // shift in sixths of a turn, [-3, 3]
  bool gray;                              // whether the result loses its color
};

template <typename real>
EQUIFAST_HD inline real gray(const Color<real>& x) {
  return real(0.2989) * x.red + real(0.587) * x.green + real(0.114) * x.blue;
}

// The adjoint of gray(), channel by channel.
template <typename real>
EQUIFAST_HD inline Color<real> gray_adjoint(real upstream) {
  return {real(0.2989) * upstream, real(0.587) * upstream, real(0.114) * upstream};
}

template <typename real>
EQUIFAST_HD inline real clamp_unit(real v) {  // to [0, 1]; NaN stays
  v = v < 0 ? real(0) : v;
  return v > 1 ? real(1) : v;
}

// The derivative of clamp_unit passes at both ends, as that of torch.clamp.
template <typename real>
EQUIFAST_HD inline real pass_unit(real v, real upstream) {
  return ((v >= 0) & (v <= 1)) ? upstream : real(0);
}

template <typename real>
EQUIFAST_HD inline Color<real> clamp_unit(const Color<real>& x) {
  return {clamp_unit(x.red), clamp_unit(x.green), clamp_unit(x.blue)};
}

template <typename real>
EQUIFAST_HD inline Color<real> pass_unit(const Color<real>& x, const Color<real>& upstream) {
  return {pass_unit(x.red, upstream.red), pass_unit(x.green, upstream.green),
          pass_unit(x.blue, upstream.blue)};
}

template <typename real>
EQUIFAST_HD inline Color<real> scaled(const Color<real>& x, real factor) {
  return {x.red * factor, x.green * factor, x.blue * factor};
}

// Away from a center, or towards it: the contrast and the saturation before their clamps.
template <typename real>
EQUIFAST_HD inline Color<real> spread(const Color<real>& x, real center, real factor) {
  return {center + (x.red - center) * factor, center + (x.green - center) * factor,
          center + (x.blue - center) * factor};
}

// A color in HSV space, and what its derivative wants.
template <typename real>
struct Hue {
  real value, low, chroma;  // the largest channel, the smallest, their difference
  real ratio;               // the difference of the two other channels over the chroma
  real angle;               // sixths of a turn, [-1, 5]
  bool red, green;          // which channel is the value; blue if neither, the first where they are tied
};

template <typename real>
EQUIFAST_HD inline Hue<real> hue(const Color<real>& x) {
  const real most = x.red > x.green ? x.red : x.green, least = x.red < x.green ? x.red : x.green;
  const real value = most > x.blue ? most : x.blue, low = least < x.blue ? least : x.blue;
  const real chroma = value - low, divisor = chroma > 0 ? chroma : real(1);
  const bool red = value == x.red, green = !red & (value == x.green);
  const real difference = red ? x.green - x.blue : (green ? x.blue - x.red : x.red - x.green);
  const real ratio = difference / divisor;
  return {value, low, chroma, ratio, ratio + (red ? real(0) : (green ? real(2) : real(4))), red, green};
}

// Modulo 6 of a number in [-6, 18). What is below 0 by less than rounding sees becomes 6, as in torch.
template <typename real>
EQUIFAST_HD inline real sextant(real v) {
  v = v >= 6 ? v - 6 : v;
  v = v >= 6 ? v - 6 : v;
  return v < 0 ? v + 6 : v;
}

// How much chroma a channel lacks, of 0 to 1, at a sextant in [0, 6]; and its slope, at corners as torch has
// it.
template <typename real>
EQUIFAST_HD inline real lack(real k) {
  const real rest = 4 - k;
  return clamp_unit(k < rest ? k : rest);
}
template <typename real>
EQUIFAST_HD inline real lack_slope(real k) {
  return ((k >= 0) & (k <= 1)) ? real(1) : ((k >= 3) & (k <= 4)) ? real(-1) : real(0);
}

template <typename real>
EQUIFAST_HD inline Color<real> shift_hue(const Color<real>& x, real shift) {
  const Hue<real> h = hue(x);
  const real angle = h.angle + shift;
  return {h.value - h.chroma * lack(sextant(angle + 5)), h.value - h.chroma * lack(sextant(angle + 3)),
          h.value - h.chroma * lack(sextant(angle + 1))};
}

// 1 over how many channels equal one of them: amax and amin share their gradient among ties.
template <typename real>
EQUIFAST_HD inline real share(const Color<real>& x, real of) {
  const real count = (x.red == of ? real(1) : real(0)) + (x.green == of ? real(1) : real(0)) +
                     (x.blue == of ? real(1) : real(0));
  return count > 2 ? real(1) / 3 : (count > 1 ? real(1) / 2 : real(1));
}

// What a channel gets from the gradients of the largest and of the smallest.
template <typename real>
EQUIFAST_HD inline real of_extremes(real channel, const Hue<real>& h, real value, real low) {
  return (channel == h.value ? value : real(0)) - (channel == h.low ? low : real(0));
}

template <typename real>
EQUIFAST_HD inline Color<real> shift_hue_adjoint(const Color<real>& x, real shift,
                                                 const Color<real>& upstream) {
  const Hue<real> h = hue(x);
  const real angle = h.angle + shift;
  const real kr = sextant(angle + 5), kg = sextant(angle + 3), kb = sextant(angle + 1);
  const real lacking = upstream.red * lack(kr) + upstream.green * lack(kg) + upstream.blue * lack(kb);
  const real slope =
      upstream.red * lack_slope(kr) + upstream.green * lack_slope(kg) + upstream.blue * lack_slope(kb);
  // By the angle the derivative is -chroma * slope, and the angle is a difference over the chroma, which
  // cancels.
  const real turn = h.chroma > 0 ? slope : real(0);
  const real chroma = turn * h.ratio - lacking;
  const real value = (upstream.red + upstream.green + upstream.blue + chroma) * share(x, h.value);
  const real low = chroma * share(x, h.low);  // to subtract
  const bool blue = !h.red & !h.green;
  return {of_extremes(x.red, h, value, low) + (h.green ? turn : real(0)) - (blue ? turn : real(0)),
          of_extremes(x.green, h, value, low) + (blue ? turn : real(0)) - (h.red ? turn : real(0)),
          of_extremes(x.blue, h, value, low) + (h.red ? turn : real(0)) - (h.green ? turn : real(0))};
}

// What the mean that contrast is about is the mean of.
template <typename real>
EQUIFAST_HD inline real bright_gray(const Color<real>& x, const Jitter<real>& j) {
  return gray(clamp_unit(scaled(x, j.brightness)));
}

template <typename real>
EQUIFAST_HD inline Color<real> jitter(const Color<real>& x, real mean, const Jitter<real>& j) {
  const Color<real> bright = clamp_unit(scaled(x, j.brightness));
  const Color<real> contrasted = clamp_unit(spread(bright, mean, j.contrast));
  const Color<real> saturated = clamp_unit(spread(contrasted, gray(contrasted), j.saturation));
  const Color<real> turned = shift_hue(saturated, j.hue);
  const real flat = gray(turned);
  return {j.gray ? flat : turned.red, j.gray ? flat : turned.green, j.gray ? flat : turned.blue};
}

template <typename real>
struct JitterGradient {
  Color<real> image;  // of the pixel itself, with the mean held
  real mean;          // this pixel's part of the gradient of the mean
};

template <typename real>
EQUIFAST_HD inline JitterGradient<real> jitter_adjoint(const Color<real>& x, real mean, const Jitter<real>& j,
                                                       const Color<real>& upstream) {
  const Color<real> brightened = scaled(x, j.brightness), bright = clamp_unit(brightened);
  const Color<real> spread1 = spread(bright, mean, j.contrast), contrasted = clamp_unit(spread1);
  const real center = gray(contrasted);
  const Color<real> spread2 = spread(contrasted, center, j.saturation), saturated = clamp_unit(spread2);

  const Color<real> flat = gray_adjoint(upstream.red + upstream.green + upstream.blue);
  const Color<real> turned{j.gray ? flat.red : upstream.red, j.gray ? flat.green : upstream.green,
                           j.gray ? flat.blue : upstream.blue};
  const Color<real> g2 = pass_unit(spread2, shift_hue_adjoint(saturated, j.hue, turned));
  const Color<real> by_center = gray_adjoint((g2.red + g2.green + g2.blue) * (1 - j.saturation));
  const Color<real> g1 = pass_unit(
      spread1, Color<real>{g2.red * j.saturation + by_center.red, g2.green * j.saturation + by_center.green,
                           g2.blue * j.saturation + by_center.blue});
  return {scaled(pass_unit(brightened, scaled(g1, j.contrast)), j.brightness),
          (g1.red + g1.green + g1.blue) * (1 - j.contrast)};
}

// What a pixel gets from the gradient of the sum of bright_gray over the image.
template <typename real>
EQUIFAST_HD inline Color<real> bright_gray_adjoint(const Color<real>& x, const Jitter<real>& j,
                                                   real upstream) {
  return scaled(pass_unit(scaled(x, j.brightness), gray_adjoint(upstream)), j.brightness);
}

}  // namespace equifast::core
