// What CPU kernels share: the dispatch by dtype; and, for similarity per pixel, what a row of positions reads
// in a map. Included by kernels that are compiled once per instruction set, hence the unnamed namespace.
#pragma once

#include <cstdint>
#include <cstring>

#include "../core/sample.h"
#include "../core/storage.h"
#include "kernels.h"
#include "products.h"
#include "scratch.h"

namespace equifast::cpu {
namespace {

using core::BFloat16;
using core::Half;
using core::load;
using core::Real;
using core::store;
using core::theta_of;

// Calls f with a 0 of the type that a dtype stands for.
template <typename F>
void dispatch(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::float32:
      return f(float{});
    case Dtype::float64:
      return f(double{});
    case Dtype::float16:
      return f(Half{});
    case Dtype::bfloat16:
      return f(BFloat16{});
  }
}

// The positions of one row of `out` that lie inside `in`: an interval of columns, since the frame is convex.
template <typename real>
class Row {
 public:
  int begin = 0, end = 0;  // columns
  bool level = false;      // all columns read the same two rows of the input (no rotation, no shear)
  int step = 0;  // 1 or -1: where level, column i reads the one input column first + step * (i - begin)
  int first = 0;
  int lowest = 0, highest = 0;        // where level: the input columns that are read, both included
  core::Tap<real> vertical{0, 0, 0};  // where level
  // By column: taps on x, and where not level on y.
  int *left, *right, *top, *bottom;
  real *fx, *fy;

  static int64_t scratch(int width) {
    return 4 * Scratch::bytes<int>(width) + 2 * Scratch::bytes<real>(width);
  }

  Row(Scratch& s, int width)
      : left(s.take<int>(width)),
        right(s.take<int>(width)),
        top(s.take<int>(width)),
        bottom(s.take<int>(width)),
        fx(s.take<real>(width)),
        fy(s.take<real>(width)),
        width_(width) {}

  // Positions of an image's rows of `out` pixels in a map of `in` pixels.
  void aim(const core::Theta& theta, int out_height, int out_width, int in_height, int in_width) {
    map_ = {theta, double(out_width), double(out_height), double(in_width), double(in_height)};
    in_height_ = in_height, in_width_ = in_width;
    level = map_.xj == 0 && map_.yi == 0;
    known_ = false;
  }

  void move_to(int j) {
    if (level) {
      const core::Position p = map_.at(0, j);
      const core::Position inside_x{(map_.w - 1) / 2, p.y};
      if (!map_.inside(inside_x)) {
        begin = end = 0;
        return;
      }
      vertical = core::tap<real>(p.y, in_height_);
      if (!known_) columns(j);
      begin = begin_, end = end_;
    } else {
      columns(j);
      begin = begin_, end = end_;
    }
  }

 private:
  core::PixelMap map_{{1, 0, 0, 0, 1, 0}, 1, 1, 1, 1};
  int width_, in_height_ = 1, in_width_ = 1;
  int begin_ = 0, end_ = 0;
  bool known_ = false;

  void columns(int j) {
    begin_ = 0;
    while (begin_ < width_ && !map_.inside(map_.at(begin_, j))) ++begin_;
    end_ = width_;
    while (end_ > begin_ && !map_.inside(map_.at(end_ - 1, j))) --end_;
    for (int i = begin_; i < end_; ++i) {
      const core::Position p = map_.at(i, j);
      const auto x = core::tap<real>(p.x, in_width_);
      left[i] = x.low, right[i] = x.high, fx[i] = x.fraction;
    }
    if (!level) {
      for (int i = begin_; i < end_; ++i) {
        const auto y = core::tap<real>(map_.at(i, j).y, in_height_);
        top[i] = y.low, bottom[i] = y.high, fy[i] = y.fraction;
      }
      return;
    }
    known_ = true;
    step = 0;
    if (begin_ == end_) return;
    first = left[begin_];
    lowest = highest = first;
    bool up = true, down = true;
    for (int i = begin_; i < end_; ++i) {
      lowest = left[i] < lowest ? left[i] : lowest;
      highest = right[i] > highest ? right[i] : highest;
      up = up && fx[i] == 0 && left[i] == first + (i - begin_);
      down = down && fx[i] == 0 && left[i] == first - (i - begin_);
    }
    step = up ? 1 : (down ? -1 : 0);
  }
};

template <typename real>
inline real blend(real f, real low, real high) {
  return (1 - f) * low + f * high;
}

// Planar maps: a plane's samples at the row's positions. values[i - begin]; line: scratch of a plane's width.
template <typename T, typename real>
void gather(const T* plane, int64_t sy, const Row<real>& row, real* __restrict values,
            real* __restrict line) {
  const int count = row.end - row.begin;
  if (count == 0) return;
  if (row.level) {
    const T* __restrict low = plane + row.vertical.low * sy;
    const T* __restrict high = plane + row.vertical.high * sy;
    const real f = row.vertical.fraction;
    if (row.step == 1) {
      low += row.first, high += row.first;
      if (f == 0) {
        for (int i = 0; i < count; ++i) values[i] = load(low[i]);
      } else {
        for (int i = 0; i < count; ++i) values[i] = blend(f, real(load(low[i])), real(load(high[i])));
      }
    } else if (row.step == -1) {
      low += row.first, high += row.first;
      if (f == 0) {
        for (int i = 0; i < count; ++i) values[i] = load(low[-i]);
      } else {
        for (int i = 0; i < count; ++i) values[i] = blend(f, real(load(low[-i])), real(load(high[-i])));
      }
    } else {
      for (int x = row.lowest; x <= row.highest; ++x) {
        line[x] = f == 0 ? real(load(low[x])) : blend(f, real(load(low[x])), real(load(high[x])));
      }
      const int* __restrict left = row.left + row.begin;
      const int* __restrict right = row.right + row.begin;
      const real* __restrict fx = row.fx + row.begin;
      for (int i = 0; i < count; ++i) values[i] = blend(fx[i], line[left[i]], line[right[i]]);
    }
    return;
  }
  const int stride = static_cast<int>(sy);  // a plane has less than 2^31 elements: checked at entry
  for (int i = 0; i < count; ++i) {
    const int at = row.begin + i;
    const T* low = plane + row.top[at] * stride;
    const T* high = plane + row.bottom[at] * stride;
    const real fx = row.fx[at], fy = row.fy[at];
    values[i] = blend(fy, blend(fx, real(load(low[row.left[at]])), real(load(low[row.right[at]]))),
                      blend(fx, real(load(high[row.left[at]])), real(load(high[row.right[at]]))));
  }
}

// The adjoint: adds values[i - begin] to the pixels that the positions read, by their weights.
template <typename real>
void scatter(real* plane, int64_t sy, const Row<real>& row, const real* __restrict values,
             real* __restrict line) {
  const int count = row.end - row.begin;
  if (count == 0) return;
  if (row.level) {
    real* low = plane + row.vertical.low * sy;
    real* high = plane + row.vertical.high * sy;
    const real f = row.vertical.fraction;
    const real* __restrict from = values;
    int step = row.step, first = row.first, last = count;
    if (step == 0) {
      std::memset(line + row.lowest, 0,
                  sizeof(real) * static_cast<std::size_t>(row.highest - row.lowest + 1));
      for (int i = 0; i < count; ++i) {
        const real fx = row.fx[row.begin + i], v = values[i];
        line[row.left[row.begin + i]] += (1 - fx) * v;
        line[row.right[row.begin + i]] += fx * v;
      }
      from = line + row.lowest, step = 1, first = row.lowest, last = row.highest - row.lowest + 1;
    }
    // One row after the other: at the border both may be the same.
    for (int side = 0; side < (f == 0 ? 1 : 2); ++side) {
      real* __restrict to = (side == 0 ? low : high) + first;
      const real weight = side == 0 ? 1 - f : f;
      if (step == 1) {
        for (int i = 0; i < last; ++i) to[i] += weight * from[i];
      } else {
        for (int i = 0; i < last; ++i) to[-i] += weight * from[i];
      }
    }
    return;
  }
  for (int i = 0; i < count; ++i) {
    const int at = row.begin + i;
    const real fx = row.fx[at], fy = row.fy[at];
    real* low = plane + row.top[at] * sy;
    real* high = plane + row.bottom[at] * sy;
    const real above = (1 - fy) * values[i], below = fy * values[i];
    low[row.left[at]] += (1 - fx) * above;
    low[row.right[at]] += fx * above;
    high[row.left[at]] += (1 - fx) * below;
    high[row.right[at]] += fx * below;
  }
}

// Interleaved maps: the four taps of one position, as offsets of pixels in an image, and their weights.
template <typename real>
struct Corners {
  int64_t offset[4];
  real weight[4];
};

template <typename real>
inline Corners<real> corners(const Row<real>& row, int at, int64_t sy, int64_t sx) {
  const int top = row.level ? row.vertical.low : row.top[at],
            bottom = row.level ? row.vertical.high : row.bottom[at];
  const real fx = row.fx[at], fy = row.level ? row.vertical.fraction : row.fy[at];
  return {{top * sy + row.left[at] * sx, top * sy + row.right[at] * sx, bottom * sy + row.left[at] * sx,
           bottom * sy + row.right[at] * sx},
          {(1 - fx) * (1 - fy), fx * (1 - fy), (1 - fx) * fy, fx * fy}};
}

// The samples of `count` channels at one position.
template <typename T, typename real>
inline void gather_pixel(const T* image, const Corners<real>& c, int count, real* __restrict values) {
  const T *a = image + c.offset[0], *b = image + c.offset[1], *d = image + c.offset[2],
          *e = image + c.offset[3];
  if (c.weight[1] == 0 && c.weight[2] == 0 && c.weight[3] == 0) {
    for (int i = 0; i < count; ++i) values[i] = load(a[i]);
    return;
  }
  for (int i = 0; i < count; ++i) {
    values[i] = c.weight[0] * real(load(a[i])) + c.weight[1] * real(load(b[i])) +
                c.weight[2] * real(load(d[i])) + c.weight[3] * real(load(e[i]));
  }
}

template <typename real>
inline void scatter_pixel(real* image, const Corners<real>& c, int count, const real* __restrict values) {
  for (int corner = 0; corner < 4; ++corner) {
    const real weight = c.weight[corner];
    if (weight == 0) continue;  // a tap of weight 0 adds nothing, and at the border is another one's pixel
    real* __restrict to = image + c.offset[corner];
    for (int i = 0; i < count; ++i) to[i] += weight * values[i];
  }
}

}  // namespace
}  // namespace equifast::cpu
