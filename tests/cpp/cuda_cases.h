// What the tests of the CUDA kernels share: tensors that end where their memory ends, matrices that are hard,
// and bilinear sampling in double precision, written after the design's formulas and not after the kernels.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "cuda/kernels.h"

namespace cases {

using equifast::core::BFloat16;
using equifast::core::Dtype;
using equifast::core::Half;
using equifast::cuda::Map;

inline int failures = 0;

// Tolerances for values near 1, per dtype: rounding of the storage type; sums are in float32 or better.
inline double tolerance(Dtype dtype) {
  switch (dtype) {
    case Dtype::float64:
      return 1e-11;
    case Dtype::float32:
      return 2e-5;
    case Dtype::float16:
      return 4e-3;
    case Dtype::bfloat16:
      return 3e-2;
  }
  return 0;
}

inline Dtype accumulator(Dtype dtype) { return dtype == Dtype::float64 ? dtype : Dtype::float32; }

inline const char* name_of(Dtype dtype) {
  const char* names[] = {"float32", "float64", "float16", "bfloat16"};
  return names[static_cast<int>(dtype)];
}

constexpr Dtype dtypes[] = {Dtype::float32, Dtype::float64, Dtype::float16, Dtype::bfloat16};

enum class Layout { planar, interleaved, misaligned };  // the last: interleaved, 16-byte reads not allowed
constexpr Layout layouts[] = {Layout::planar, Layout::interleaved, Layout::misaligned};
inline const char* name_of(Layout layout) {
  const char* names[] = {"planar", "interleaved", "misaligned"};
  return names[static_cast<int>(layout)];
}

struct Size {
  int h, w;
};

// (N, C, H, W) in memory of exactly its size, filled with NaN.
class Tensor {
 public:
  int n, c, h, w;

  Tensor(Dtype dtype, Layout layout, int n_, int c_, Size size)
      : n(n_), c(c_), h(size.h), w(size.w), dtype_(dtype), layout_(layout) {
    const std::size_t extra = layout == Layout::misaligned ? bytes() : 0;
    memory_.assign(count() * bytes() + extra, 0xff);
    start_ = extra;
  }

  std::size_t count() const { return static_cast<std::size_t>(n) * static_cast<std::size_t>(c * h * w); }

  Map map() {
    const std::int64_t plane = std::int64_t{h} * w;
    void* data = memory_.data() + start_;
    if (layout_ == Layout::planar) return {data, c * plane, plane, w, 1, h, w};
    return {data, c * plane, 1, std::int64_t{w} * c, c, h, w};
  }

  double get(int in, int ic, int iy, int ix) const {
    const unsigned char* from = memory_.data() + offset(in, ic, iy, ix);
    switch (dtype_) {
      case Dtype::float32:
        return as<float>(from);
      case Dtype::float64:
        return as<double>(from);
      case Dtype::float16:
        return equifast::core::load(as<Half>(from));
      case Dtype::bfloat16:
        return equifast::core::load(as<BFloat16>(from));
    }
    return 0;
  }

  void set(int in, int ic, int iy, int ix, double value) {
    unsigned char* to = memory_.data() + offset(in, ic, iy, ix);
    const auto narrow = static_cast<float>(value);
    if (dtype_ == Dtype::float32) std::memcpy(to, &narrow, 4);
    if (dtype_ == Dtype::float64) std::memcpy(to, &value, 8);
    Half half;
    equifast::core::store(half, narrow);
    if (dtype_ == Dtype::float16) std::memcpy(to, &half, 2);
    BFloat16 brain;
    equifast::core::store(brain, narrow);
    if (dtype_ == Dtype::bfloat16) std::memcpy(to, &brain, 2);
  }

  void poison() { memory_.assign(memory_.size(), 0xff); }

  void randomize(unsigned seed) {
    std::mt19937 random(seed);
    visit([&](int in, int ic, int iy, int ix) {
      set(in, ic, iy, ix, std::uniform_real_distribution<double>(-0.8, 1.2)(random));
    });
  }

  // f(n, c, y, x) for all elements
  template <typename F>
  void visit(const F& f) const {
    for (int in = 0; in < n; ++in)
      for (int ic = 0; ic < c; ++ic)
        for (int iy = 0; iy < h; ++iy)
          for (int ix = 0; ix < w; ++ix) f(in, ic, iy, ix);
  }

 private:
  Dtype dtype_;
  Layout layout_;
  std::vector<unsigned char> memory_;
  std::size_t start_ = 0;

  std::size_t bytes() const { return dtype_ == Dtype::float64 ? 8 : (dtype_ == Dtype::float32 ? 4 : 2); }
  std::size_t offset(int in, int ic, int iy, int ix) const {
    const int at =
        layout_ == Layout::planar ? ((in * c + ic) * h + iy) * w + ix : ((in * h + iy) * w + ix) * c + ic;
    return start_ + static_cast<std::size_t>(at) * bytes();
  }
  template <typename T>
  static T as(const unsigned char* from) {
    T value;
    std::memcpy(&value, from, sizeof(T));
    return value;
  }
};

// The same in double precision.
class Doubles {
 public:
  int n, c, h, w;
  std::vector<double> values;

  Doubles(int n_, int c_, int h_, int w_)
      : n(n_),
        c(c_),
        h(h_),
        w(w_),
        values(static_cast<std::size_t>(n) * static_cast<std::size_t>(c * h * w)) {}
  explicit Doubles(const Tensor& t) : Doubles(t.n, t.c, t.h, t.w) {
    t.visit([&](int in, int ic, int iy, int ix) { at(in, ic, iy, ix) = t.get(in, ic, iy, ix); });
  }
  double& at(int in, int ic, int iy, int ix) {
    return values[static_cast<std::size_t>(((in * c + ic) * h + iy) * w + ix)];
  }
  double at(int in, int ic, int iy, int ix) const {
    return values[static_cast<std::size_t>(((in * c + ic) * h + iy) * w + ix)];
  }
};

// Compares all elements; relative to the largest where that is above `least`: gradients are small.
inline void check(const Tensor& actual, const Doubles& expected, Dtype dtype, const char* what,
                  double least = 1) {
  double largest = least, worst = 0;
  for (const double v : expected.values) largest = std::fmax(largest, std::fabs(v));
  bool equal_nan = true;
  actual.visit([&](int in, int ic, int iy, int ix) {
    const double a = actual.get(in, ic, iy, ix), e = expected.at(in, ic, iy, ix);
    if (std::isnan(a) != std::isnan(e)) equal_nan = false;
    if (!std::isnan(a) && !std::isnan(e)) worst = std::fmax(worst, std::fabs(a - e));
  });
  if (equal_nan && worst <= tolerance(dtype) * largest) return;
  ++failures;
  std::fprintf(stderr, "failed: %s: off by %g of %g%s\n", what, worst, largest,
               equal_nan ? "" : ", or not written");
}

using Matrix = std::vector<double>;  // a, b, x, c, d, y

inline const std::vector<Matrix>& matrices() {
  const double nan = std::numeric_limits<double>::quiet_NaN(), inf = std::numeric_limits<double>::infinity();
  const auto rotation = [](double angle) -> Matrix {
    return {std::cos(angle), -std::sin(angle), 0.05, std::sin(angle), std::cos(angle), -0.1};
  };
  static const std::vector<Matrix> all = {
      {1, 0, 0, 0, 1, 0},   // identity, and with another size a resize
      {-1, 0, 0, 0, 1, 0},  // flip
      rotation(0.3),
      {1, 0, 0.37, 0, 1, -0.21},     // shift
      {0.01, 0, 0.3, 0, 0.01, 0.1},  // a hundredth of the input fills the output
      {100, 0, 0, 0, 100, 0},        // a hundredth of the output sees the input
      {1, 0.4, 0, 0, 1, 0.1},        // shear
      rotation(1.5707963267948966),
      {0.02, 3, -0.1, -4, 0.01, 0.2},  // unequal axes, turned
      {1, 1.01, 0, 1, 1, 0},           // a hundred times as long as wide
      {1, 0, 5, 0, 1, 0},              // outside
      {1.02, 0, 0, 0, 0.98, 0},        // a little over the border
      {0, 0, 0.2, 0, 0, 0.4},          // all positions are one
      {1, 2, 0, 2, 4, 0},              // all positions are on a line
      {1e-200, 0, 0, 0, 1e-200, 0},
      {1e9, 0, 0, 0, 1e9, 3e8},
      {1e300, 1e300, 1.23e298, -1e300, 1e300, 0},
      {nan, 0, 0, 0, 1, 0},
      {1, 0, inf, 0, 1, 0},
      {1, 0, 1e17, 0, 1, -1e17},
  };
  return all;
}

// (K, N, 2, 3): view k of image n has matrix first + k + n of the list.
inline std::vector<double> theta_of(int first, int views, int images) {
  std::vector<double> theta;
  for (int k = 0; k < views; ++k) {
    for (int n = 0; n < images; ++n) {
      const Matrix& m = matrices()[static_cast<std::size_t>(first + k + n) % matrices().size()];
      theta.insert(theta.end(), m.begin(), m.end());
    }
  }
  return theta;
}

inline const double* matrix_of(const std::vector<double>& theta, int images, int k, int n) {
  return theta.data() + (k * images + n) * 6;
}

// What output pixel (i, j) of w x h reads in an input of in_w x in_h.
struct Sample {
  bool inside;
  int x[2], y[2];
  double wx[2], wy[2];
};

inline Sample sample(const double* t, int i, int j, int w, int h, int in_w, int in_h) {
  const double u = (2.0 * i + 1) / w - 1, v = (2.0 * j + 1) / h - 1;
  const double qx = t[0] * u + t[1] * v + t[2], qy = t[3] * u + t[4] * v + t[5];
  Sample s{};
  s.inside = std::fabs(qx) <= 1 + 1e-6 && std::fabs(qy) <= 1 + 1e-6;
  if (!s.inside) return s;
  const auto axis = [](double q, int size, int* at, double* weight) {
    const double position = ((q + 1) * size - 1) / 2, low = std::floor(position);
    for (int side = 0; side < 2; ++side) {
      at[side] = static_cast<int>(std::fmin(std::fmax(low + side, 0), size - 1));
      weight[side] = side == 0 ? 1 - (position - low) : position - low;
    }
  };
  axis(qx, in_w, s.x, s.wx);
  axis(qy, in_h, s.y, s.wy);
  return s;
}

// (N, C, h, w) of the samples of `input`, 0 outside.
inline Doubles warp(const Doubles& input, const std::vector<double>& theta, int k, Size size) {
  Doubles out(input.n, input.c, size.h, size.w);
  for (int n = 0; n < input.n; ++n)
    for (int j = 0; j < size.h; ++j)
      for (int i = 0; i < size.w; ++i) {
        const Sample s = sample(matrix_of(theta, input.n, k, n), i, j, size.w, size.h, input.w, input.h);
        for (int corner = 0; s.inside && corner < 4; ++corner) {
          const int a = corner % 2, b = corner / 2;
          for (int c = 0; c < input.c; ++c)
            out.at(n, c, j, i) += s.wx[a] * s.wy[b] * input.at(n, c, s.y[b], s.x[a]);
        }
      }
  return out;
}

// Adds the adjoint of `warp`, applied to `gradient`, to `total`.
inline void add_adjoint(const Doubles& gradient, const std::vector<double>& theta, int k, Doubles& total) {
  for (int n = 0; n < total.n; ++n)
    for (int j = 0; j < gradient.h; ++j)
      for (int i = 0; i < gradient.w; ++i) {
        const Sample s =
            sample(matrix_of(theta, total.n, k, n), i, j, gradient.w, gradient.h, total.w, total.h);
        for (int corner = 0; s.inside && corner < 4; ++corner) {
          const int a = corner % 2, b = corner / 2;
          for (int c = 0; c < total.c; ++c)
            total.at(n, c, s.y[b], s.x[a]) += s.wx[a] * s.wy[b] * gradient.at(n, c, j, i);
        }
      }
}

struct Problem {
  int images, channels;
  Size size;
  std::vector<Size> views;
};

// 1-pixel maps, odd and even sizes, rows and columns, more than a tile, more channels than a thread or a
// block has.
inline std::vector<Problem> problems() {
  std::vector<Size> many;
  for (int k = 0; k < 18; ++k) many.push_back({2 + k % 3, 3 + k % 2});  // more than one launch holds
  return {
      {1, 1, {1, 1}, {{1, 1}, {3, 2}}},
      {2, 3, {7, 5}, {{7, 5}, {14, 10}, {3, 2}}},
      {2, 19, {8, 12}, {{8, 12}, {5, 3}, {17, 11}}},
      {1, 8, {9, 1}, {{9, 1}, {4, 2}}},
      {1, 4, {1, 9}, {{2, 4}}},
      {1, 40, {5, 6}, {{5, 6}, {9, 4}}},
      {1, 2, {30, 44}, {{31, 44}, {60, 70}, {9, 13}}},
      {2, 2, {4, 3}, many},
      {1, 264, {2, 3}, {{2, 3}, {4, 4}}},
  };
}

inline int report() {
  if (failures == 0) std::puts("all hold");
  return failures == 0 ? 0 : 1;
}

}  // namespace cases
