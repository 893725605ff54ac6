// Pixels of four channels side by side, whatever the layout in memory: a tap of a sample is then one vector,
// for every geometry. Included by kernels that are compiled once per instruction set, hence the unnamed
// namespace.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "../core/preimage.h"
#include "rows.h"

namespace equifast::cpu {
namespace {

constexpr int quad = 4;  // channels

template <typename real>
struct Vector;
template <>
struct Vector<float> {
  using type = float __attribute__((vector_size(16)));
  using index = int __attribute__((vector_size(16)));
};
template <>
struct Vector<double> {
  using type = double __attribute__((vector_size(32)));
  using index = long long __attribute__((vector_size(32)));
};

#if defined(__clang__)
#define EQUIFAST_MIX(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
#define EQUIFAST_MIX(a, b, i, j, k, l) __builtin_shuffle(a, b, typename Vector<real>::index{i, j, k, l})
#endif

// Four lines of four numbers, turned round.
template <typename real>
inline void turn(const real* from0, const real* from1, const real* from2, const real* from3, real* to0,
                 real* to1, real* to2, real* to3) {
  using V = typename Vector<real>::type;
  V a, b, c, d;
  std::memcpy(&a, from0, sizeof a), std::memcpy(&b, from1, sizeof b);
  std::memcpy(&c, from2, sizeof c), std::memcpy(&d, from3, sizeof d);
  const V ab = EQUIFAST_MIX(a, b, 0, 4, 1, 5), cd = EQUIFAST_MIX(c, d, 0, 4, 1, 5);
  const V ba = EQUIFAST_MIX(a, b, 2, 6, 3, 7), dc = EQUIFAST_MIX(c, d, 2, 6, 3, 7);
  a = EQUIFAST_MIX(ab, cd, 0, 1, 4, 5), b = EQUIFAST_MIX(ab, cd, 2, 3, 6, 7);
  c = EQUIFAST_MIX(ba, dc, 0, 1, 4, 5), d = EQUIFAST_MIX(ba, dc, 2, 3, 6, 7);
  std::memcpy(to0, &a, sizeof a), std::memcpy(to1, &b, sizeof b);
  std::memcpy(to2, &c, sizeof c), std::memcpy(to3, &d, sizeof d);
}

#undef EQUIFAST_MIX

template <typename real>
inline void turn(const real* from, int64_t from_stride, real* to, int64_t to_stride) {
  turn(from, from + from_stride, from + 2 * from_stride, from + 3 * from_stride, to, to + to_stride,
       to + 2 * to_stride, to + 3 * to_stride);
}

inline int rounded(int count) { return (count + quad - 1) / quad * quad; }

// Reads a piece of a row, `filled` channels from the first on; the other lanes are 0. There is room for
// rounded(count) pixels, and in `lines` for as many.
template <typename T, typename real>
void load_quads(const T* from, int64_t sc, int64_t sx, int filled, int count, real* lines, real* quads) {
  if (sx != 1) {
    for (int i = 0; i < count; ++i, from += sx, quads += quad) {
      if (filled == quad) {
        for (int l = 0; l < quad; ++l) quads[l] = load(from[l * sc]);
      } else {
        for (int l = 0; l < quad; ++l) quads[l] = l < filled ? real(load(from[l * sc])) : real(0);
      }
    }
    return;
  }
  const int stride = rounded(count);
  const real* line[quad];
  int whole = 0;  // pixels of which every channel lies in `line`
  for (int l = 0; l < quad; ++l) {
    real* __restrict copy = lines + l * stride;
    line[l] = copy;
    if (l >= filled) {
      std::fill(copy, copy + stride, real(0));
    } else if constexpr (std::is_same_v<T, real>) {
      line[l] = from + l * sc, whole = count / quad * quad;
    } else {
      const T* __restrict channel = from + l * sc;
      for (int i = 0; i < count; ++i) copy[i] = load(channel[i]);
      whole = stride;
    }
  }
  for (int i = 0; i < whole; i += quad) {
    real* to = quads + i * quad;
    turn(line[0] + i, line[1] + i, line[2] + i, line[3] + i, to, to + quad, to + 2 * quad, to + 3 * quad);
  }
  for (int i = whole; i < count; ++i) {
    for (int l = 0; l < quad; ++l) quads[i * quad + l] = line[l][i];
  }
}

// Writes a piece of a row.
template <typename T, typename real>
void store_quads(const real* quads, int filled, int count, real* lines, T* to, int64_t sc, int64_t sx) {
  if (sx != 1) {
    for (int i = 0; i < count; ++i, to += sx, quads += quad) {
      for (int l = 0; l < filled; ++l) store(to[l * sc], quads[l]);
    }
    return;
  }
  const int stride = rounded(count);
  real* line[quad];
  int whole = stride;
  for (int l = 0; l < quad; ++l) {
    line[l] = lines + l * stride;
    if constexpr (std::is_same_v<T, real>) {
      if (l < filled) line[l] = to + l * sc, whole = count / quad * quad;
    }
  }
  for (int i = 0; i < whole; i += quad) {
    const real* from = quads + i * quad;
    turn(from, from + quad, from + 2 * quad, from + 3 * quad, line[0] + i, line[1] + i, line[2] + i,
         line[3] + i);
  }
  for (int l = 0; l < filled; ++l) {
    if constexpr (std::is_same_v<T, real>) {
      for (int i = whole; i < count; ++i) line[l][i] = quads[i * quad + l];
    } else {
      const real* __restrict copy = line[l];
      T* __restrict channel = to + l * sc;
      for (int i = 0; i < count; ++i) store(channel[i], copy[i]);
    }
  }
}

// By position, of up to `most` in a row: where the four taps lie, as the first of them and the steps to its
// neighbors, and the weights. Arrays of fixed size, so that one register addresses them all.
template <typename real>
struct Taps {
  static constexpr int most = Positions::most, step = 16;
  int left[most], top[most];                  // pixels
  int offset[most], right[most], down[most];  // pixels, and after `place` elements
  real fx[most], fy[most];

  // Of columns [begin, end) of row j, all of them inside a map of width x height.
  void look(const core::PixelMap& map, int j, int begin, int end, int width, int height) {
    const int count = end - begin;
    Positions p;
    p.look(map, j, begin, count);
    for (int i = count; i % step != 0; ++i) p.x[i] = p.x[count - 1], p.y[i] = p.y[count - 1];  // whole steps
    for (int at = 0; at < count; at += step) {
#pragma omp simd
      for (int i = at; i < at + step; ++i) {
        const auto x = core::tap<real>(p.x[i], width);
        const auto y = core::tap<real>(p.y[i], height);
        left[i] = x.low, right[i] = x.high - x.low, fx[i] = x.fraction;
        top[i] = y.low, down[i] = y.high - y.low, fy[i] = y.fraction;
      }
    }
  }

  // After look: the places in memory, where rows are `sy` apart and columns `sx`, and (x, y) is the first.
  void place(int count, int x, int y, int sx, int sy) {
    for (int at = 0; at < count; at += step) {
#pragma omp simd
      for (int i = at; i < at + step; ++i) {
        offset[i] = (top[i] - y) * sy + (left[i] - x) * sx;
        right[i] *= sx, down[i] *= sy;
      }
    }
  }

  // quads[i]: the sample of position i in a panel of quads. Not inlined, so that the loop has all registers.
  __attribute__((noinline)) void gather(const real* panel, int count, real* __restrict quads) const {
    using V = typename Vector<real>::type;
    const V one{1, 1, 1, 1};
    for (int i = 0; i < count; ++i, quads += quad) {
      const real *above = panel + offset[i], *below = above + down[i];
      V a, b, c, d;
      std::memcpy(&a, above, sizeof a), std::memcpy(&b, above + right[i], sizeof b);
      std::memcpy(&c, below, sizeof c), std::memcpy(&d, below + right[i], sizeof d);
      const V x{fx[i], fx[i], fx[i], fx[i]}, y{fy[i], fy[i], fy[i], fy[i]};
      const V sum = (one - y) * ((one - x) * a + x * b) + y * ((one - x) * c + x * d);
      std::memcpy(quads, &sum, sizeof sum);
    }
  }

  // The adjoint: adds quads[i], from position `first` on, to the pixels of the panel that the positions read.
  __attribute__((noinline)) void scatter(const real* __restrict quads, int first, int last,
                                         real* panel) const {
    using V = typename Vector<real>::type;
    const V one{1, 1, 1, 1};
    for (int i = first; i < last; ++i, quads += quad) {
      real *above = panel + offset[i], *below = above + down[i];
      V value;
      std::memcpy(&value, quads, sizeof value);
      const V x{fx[i], fx[i], fx[i], fx[i]}, y{fy[i], fy[i], fy[i], fy[i]};
      const V upper = (one - y) * value, lower = y * value;
      // One after the other: at the border two of them may be the same.
      add(above, (one - x) * upper), add(above + right[i], x * upper);
      add(below, (one - x) * lower), add(below + right[i], x * lower);
    }
  }

 private:
  template <typename V>
  static void add(real* to, const V& value) {
    V sum;
    std::memcpy(&sum, to, sizeof sum);
    sum += value;
    std::memcpy(to, &sum, sizeof sum);
  }
};

// Takes columns off both ends of [begin, end) whose position, slope * (i + 1/2) + start, is surely not in
// [low, high]. NaN and a slope of 0 take none off.
inline void narrow(double slope, double start, double low, double high, int& begin, int& end) {
  const double a = (low - start) / slope, b = (high - start) / slope;
  // two columns for what is not computed exactly here, and more where the slope is tiny
  const double slack = 2 + 1e-12 * (std::fabs(low) + std::fabs(high) + std::fabs(start)) / std::fabs(slope);
  const double least = (a < b ? a : b) - slack, most = (a < b ? b : a) + slack;
  if (least > begin) begin = least < end ? static_cast<int>(least) : end;
  if (most < end) end = most > begin ? static_cast<int>(most) + 1 : begin;
}

// Columns of row j inside the frame, among [begin, end): an interval, since the frame is convex.
inline void inside(const core::PixelMap& map, int j, int& begin, int& end) {
  narrow(map.xi, map.xj * (j + 0.5) + map.x0, map.left, map.right, begin, end);
  narrow(map.yi, map.yj * (j + 0.5) + map.y0, map.top, map.bottom, begin, end);
  while (begin < end && !map.inside(map.at(begin, j))) ++begin;
  while (end > begin && !map.inside(map.at(end - 1, j))) --end;
}

}  // namespace
}  // namespace equifast::cpu
