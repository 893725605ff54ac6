// Similarity works on panels: a rectangle of a map, some channels at a time, the channels of a pixel side by
// side whatever the layout in memory. A sample of `lanes` channels is then four vector loads, and its adjoint
// four vector additions, for every geometry. Included by kernels that are compiled once per instruction set,
// hence the unnamed namespace.
#pragma once

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include <initializer_list>
#include <type_traits>

#include "../core/preimage.h"
#include "rows.h"

namespace equifast::cpu {
namespace {

constexpr int most_lanes = 16;
// What is worked on at once: long rows, which memory likes, and few of them, so that what they read stays in
// cache.
constexpr int tile_columns = 64, tile_rows = 16;
constexpr int halo = (tile_columns + 2) * (tile_rows + 2);  // pixels of a tile and of its neighbors
constexpr int most_positions = 2048;  // of an anchor, that a tile of a view is read by at once
constexpr int most_window = 4608;     // pixels of a panel: what 16 rows of 64 read at twice the size

// Pixels of columns [left, right) and rows [top, bottom).
struct Rect {
  int left, right, top, bottom;
  int width() const { return right - left; }
  int height() const { return bottom - top; }
  int64_t area() const { return int64_t{width()} * height(); }
};

// The halves of a rectangle, cut across its longer side.
inline void halve(const Rect& r, Rect& first, Rect& second) {
  first = second = r;
  if (r.width() >= r.height()) {
    first.right = second.left = r.left + r.width() / 2;
  } else {
    first.bottom = second.top = r.top + r.height() / 2;
  }
}

// Whether one of two pixels, neighbors or both the same, lies in [first, last).
inline bool overlap(int low, int high, int first, int last) { return high >= first && low < last; }

// What the positions of a rectangle read in another map. Arrays by position, only of those inside the frame.
template <typename real>
class Geometry {
 public:
  struct Span {  // positions [begin, end) of a row, the first of them at `first` in the arrays
    int row, begin, end, first;
  };
  int spans = 0;
  Span* span;
  Rect window{0, 0, 0, 0};  // the pixels that are read
  // By position: the upper left tap and the steps to its neighbors, pixels of the window; the weights.
  int *offset, *right, *down;
  real *w00, *w01, *w10, *w11;

  static int64_t scratch(int positions) {
    return Scratch::bytes<Span>(positions) + 4 * Scratch::bytes<int>(positions) +
           4 * Scratch::bytes<real>(positions);
  }
  Geometry(Scratch& s, int positions)
      : span(s.take<Span>(positions)),
        offset(s.take<int>(positions)),
        right(s.take<int>(positions)),
        down(s.take<int>(positions)),
        w00(s.take<real>(positions)),
        w01(s.take<real>(positions)),
        w10(s.take<real>(positions)),
        w11(s.take<real>(positions)),
        left_(s.take<int>(positions)) {}

  // The positions of `r` (no more than there is scratch for) in a map of `width` x `height`; where `touched`
  // is given, only those that read a pixel of it, and the window is that rectangle and its neighbors.
  void look(const core::PixelMap& map, const Rect& r, int width, int height, const Rect* touched = nullptr) {
    spans = 0;
    int count = 0;
    Rect read{width, 0, height, 0};
    for (int j = r.top; j < r.bottom; ++j) {
      int begin = r.left, end = r.right;
      while (begin < end && !map.inside(map.at(begin, j))) ++begin;
      while (end > begin && !map.inside(map.at(end - 1, j))) --end;
      if (begin == end) continue;
      taps(map, j, begin, end, count, width, height);
      int first = count, last = count + (end - begin);
      if (touched != nullptr) {
        while (first < last && !touches(first, *touched)) ++first, ++begin;
        while (last > first && !touches(last - 1, *touched)) --last, --end;
        if (first == last) continue;
      }
      // along a row positions are monotone, so the ends tell what is read
      for (const int at : {first, last - 1}) {
        read.left = left_[at] < read.left ? left_[at] : read.left;
        read.right = right[at] >= read.right ? right[at] + 1 : read.right;
        read.top = offset[at] < read.top ? offset[at] : read.top;
        read.bottom = down[at] >= read.bottom ? down[at] + 1 : read.bottom;
      }
      span[spans++] = {j, begin, end, first};
      count = last;
    }
    window = read;
    if (spans == 0) window = {0, 0, 0, 0};
    if (touched != nullptr) window = around(*touched, width, height);
    count_ = count;
  }

  // After look, where the window is small enough: offsets and weights.
  void finish() {
    const int columns = window.width(), left = window.left, top = window.top;
#pragma omp simd
    for (int i = 0; i < count_; ++i) {
      const int x = left_[i], y = offset[i];
      const real fx = w01[i], fy = w10[i];
      offset[i] = (y - top) * columns + (x - left);
      right[i] -= x;
      down[i] = (down[i] - y) * columns;
      w00[i] = (1 - fx) * (1 - fy), w01[i] = fx * (1 - fy), w10[i] = (1 - fx) * fy, w11[i] = fx * fy;
    }
  }

  static Rect around(const Rect& r, int width, int height) {
    return {r.left > 0 ? r.left - 1 : 0, r.right < width ? r.right + 1 : width, r.top > 0 ? r.top - 1 : 0,
            r.bottom < height ? r.bottom + 1 : height};
  }

 private:
  int* left_;
  int count_ = 0;

  // Until `finish`, rows stand in `offset` and `down`, columns in `left_` and `right`, fractions in w01 and
  // w10.
  void taps(const core::PixelMap& map, int j, int begin, int end, int first, int width, int height) {
    const int count = end - begin;
#pragma omp simd
    for (int i = 0; i < count; ++i) {
      const core::Position p = map.at(begin + i, j);
      const auto x = core::tap<real>(p.x, width);
      const auto y = core::tap<real>(p.y, height);
      left_[first + i] = x.low, right[first + i] = x.high, w01[first + i] = x.fraction;
      offset[first + i] = y.low, down[first + i] = y.high, w10[first + i] = y.fraction;
    }
  }

  bool touches(int at, const Rect& r) const {
    return overlap(left_[at], right[at], r.left, r.right) && overlap(offset[at], down[at], r.top, r.bottom);
  }
};

// Four channels of four pixels, turned round. Where the compiler has vectors, in registers.
using Quad = float __attribute__((vector_size(16)));

#if defined(__clang__)
#define EQUIFAST_SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
using QuadIndex = int __attribute__((vector_size(16)));
#define EQUIFAST_SHUFFLE(a, b, i, j, k, l) __builtin_shuffle(a, b, QuadIndex{i, j, k, l})
#endif

inline void transpose(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  Quad a, b, c, d;
  std::memcpy(&a, from, 16), std::memcpy(&b, from + from_stride, 16);
  std::memcpy(&c, from + 2 * from_stride, 16), std::memcpy(&d, from + 3 * from_stride, 16);
  const Quad ab = EQUIFAST_SHUFFLE(a, b, 0, 4, 1, 5), cd = EQUIFAST_SHUFFLE(c, d, 0, 4, 1, 5);
  const Quad ba = EQUIFAST_SHUFFLE(a, b, 2, 6, 3, 7), dc = EQUIFAST_SHUFFLE(c, d, 2, 6, 3, 7);
  a = EQUIFAST_SHUFFLE(ab, cd, 0, 1, 4, 5), b = EQUIFAST_SHUFFLE(ab, cd, 2, 3, 6, 7);
  c = EQUIFAST_SHUFFLE(ba, dc, 0, 1, 4, 5), d = EQUIFAST_SHUFFLE(ba, dc, 2, 3, 6, 7);
  std::memcpy(to, &a, 16), std::memcpy(to + to_stride, &b, 16);
  std::memcpy(to + 2 * to_stride, &c, 16), std::memcpy(to + 3 * to_stride, &d, 16);
}

#undef EQUIFAST_SHUFFLE

inline void transpose(const double* from, int64_t from_stride, double* to, int64_t to_stride) {
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < 4; ++j) to[j * to_stride + i] = from[i * from_stride + j];
  }
}

// Sixteen channels of sixteen pixels, where a register holds a row of them: a quarter of the loads and
// stores.
#if defined(__AVX512F__)
constexpr bool wide = true;

inline void interleave(const __m512* from, __m512* to) {
  for (int i = 0; i < 8; ++i) {
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    to[2 * i] = _mm512_permutex2var_ps(from[i], low, from[i + 8]);
    to[2 * i + 1] = _mm512_permutex2var_ps(from[i], high, from[i + 8]);
  }
}

inline void transpose_wide(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  __m512 a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_ps(from + i * from_stride);
  interleave(a, b), interleave(b, a), interleave(a, b), interleave(b, a);
  for (int i = 0; i < 16; ++i) _mm512_storeu_ps(to + i * to_stride, a[i]);
}
#else
constexpr bool wide = false;
inline void transpose_wide(const float*, int64_t, float*, int64_t) {}
#endif
inline void transpose_wide(const double*, int64_t, double*, int64_t) {}

// Scratch of the two functions below: four lines of a window, in real numbers.
template <typename real>
constexpr int64_t lines_scratch() {
  return 4 * Scratch::bytes<real>(most_window);
}

// Asks for a piece of some planes' rows before it is wanted: pieces are too short for the hardware to see a
// stream.
template <typename T>
inline void prefetch(const T* first, int64_t stride, int planes, int columns) {
  for (int l = 0; l < planes; ++l) {
    const char* from = reinterpret_cast<const char*>(first + l * stride);
    for (int64_t i = 0; i < columns * int64_t{sizeof(T)}; i += 64) __builtin_prefetch(from + i);
  }
}

// Reads `channels` (at most lanes) of a window: panel[pixel * lanes + channel]. The other lanes are 0.
// `image`: the first of the channels.
template <int lanes, typename T>
void load_panel(const Map& map, const T* image, int channels, bool interleaved, const Rect& w,
                Real<T>* __restrict panel, Real<T>* lines) {
  using real = Real<T>;
  const int columns = w.width();
  if (interleaved) {
    for (int y = w.top; y < w.bottom; ++y) {
      const T* from = image + y * map.sy + w.left * map.sx;
      real* __restrict out = panel + int64_t{y - w.top} * columns * lanes;
      if (channels == lanes) {
        for (int x = 0; x < columns; ++x, from += map.sx, out += lanes) {
          for (int l = 0; l < lanes; ++l) out[l] = load(from[l]);
        }
        continue;
      }
      // All channels, and fewer than lanes: a row is converted as one, and each pixel taken with some of the
      // next.
      const int64_t row = columns * int64_t{channels};
      if (map.sx == channels && row + lanes <= 4 * most_window) {
        for (int64_t i = 0; i < row; ++i) lines[i] = load(from[i]);
        for (int64_t i = row; i < row + lanes; ++i) lines[i] = 0;
        const real* line = lines;
        for (int x = 0; x < columns; ++x, line += channels, out += lanes) {
          for (int l = 0; l < lanes; ++l) out[l] = l < channels ? line[l] : real(0);
        }
        continue;
      }
      for (int x = 0; x < columns; ++x, from += map.sx, out += lanes) {
        for (int l = 0; l < channels; ++l) out[l] = load(from[l]);
        for (int l = channels; l < lanes; ++l) out[l] = 0;
      }
    }
    return;
  }
  constexpr int ahead = 4;  // rows
  for (int c = 0; c < lanes; c += 4) {
    const int filled = channels - c;  // of the four
    for (int y = w.top; y < w.bottom; ++y) {
      const int later = y + ahead < w.bottom ? y + ahead : y + ahead - w.height();  // of the next four planes
      const int planes = y + ahead < w.bottom ? filled : filled - 4;
      if (planes > 0 && later >= w.top) {
        const T* row = image + (channels - planes) * map.sc + later * map.sy + w.left;
        prefetch(row, map.sc, planes < 4 ? planes : 4, columns);
      }
      real* __restrict out = panel + int64_t{y - w.top} * columns * lanes + c;
      const T* first = image + c * map.sc + y * map.sy + w.left;
      const real* from = lines;
      int64_t stride = most_window;
      if (std::is_same<T, real>::value && filled >= 4) {
        from = reinterpret_cast<const real*>(first), stride = map.sc;
      } else {
        for (int l = 0; l < 4; ++l) {
          real* __restrict line = lines + l * most_window;
          if (l < filled) {
            const T* channel = first + l * map.sc;
            for (int x = 0; x < columns; ++x) line[x] = load(channel[x]);
          } else {
            for (int x = 0; x < columns; ++x) line[x] = 0;
          }
        }
      }
      int x = 0;
      for (; x + 4 <= columns; x += 4) transpose(from + x, stride, out + x * lanes, lanes);
      for (; x < columns; ++x) {
        for (int l = 0; l < 4; ++l) out[x * lanes + l] = from[l * stride + x];
      }
    }
  }
}

// Writes the pixels `r` of a panel of the window `w` to memory.
template <int lanes, typename T>
void store_panel(const Gradient& map, T* image, int channels, bool interleaved, const Rect& w, const Rect& r,
                 const Real<T>* panel, Real<T>* lines) {
  using real = Real<T>;
  const int columns = r.width();
  const auto row = [&](int y) {
    return panel + (int64_t{y - w.top} * w.width() + (r.left - w.left)) * lanes;
  };
  if (interleaved) {
    for (int y = r.top; y < r.bottom; ++y) {
      const real* from = row(y);
      T* __restrict to = image + y * map.sy + r.left * map.sx;
      if (channels == lanes) {
        for (int x = 0; x < columns; ++x, to += map.sx, from += lanes) {
          for (int l = 0; l < lanes; ++l) store(to[l], from[l]);
        }
        continue;
      }
      const int64_t length = columns * int64_t{channels};
      if (map.sx == channels && length + lanes <= 4 * most_window) {  // as in load_panel
        real* line = lines;
        for (int x = 0; x < columns; ++x, line += channels, from += lanes) {
          for (int l = 0; l < lanes; ++l) line[l] = from[l];  // the next pixel overwrites the lanes too many
        }
        for (int64_t i = 0; i < length; ++i) store(to[i], lines[i]);
        continue;
      }
      for (int x = 0; x < columns; ++x, to += map.sx, from += lanes) {
        for (int l = 0; l < channels; ++l) store(to[l], from[l]);
      }
    }
    return;
  }
  if (wide && lanes == 16 && channels == 16 && columns >= 16 && std::is_same<T, float>::value) {
    for (int y = r.top; y < r.bottom; ++y) {
      for (int x = 0; x < columns; x += 16) {
        const int at = x + 16 <= columns ? x : columns - 16;
        real* to = reinterpret_cast<real*>(image + y * map.sy + r.left + at);
        transpose_wide(row(y) + at * lanes, lanes, to, map.sc);
      }
    }
    return;
  }
  for (int c = 0; c < channels; c += 4) {
    const int filled = channels - c;  // of the four
    for (int y = r.top; y < r.bottom; ++y) {
      const real* from = row(y) + c;
      T* first = image + c * map.sc + y * map.sy + r.left;
      const bool direct = std::is_same<T, real>::value && filled >= 4;
      real* to = direct ? reinterpret_cast<real*>(first) : lines;
      const int64_t stride = direct ? map.sc : most_window;
      int x = 0;
      for (; x + 4 <= columns; x += 4) transpose(from + x * lanes, lanes, to + x, stride);
      for (; x < columns; ++x) {
        for (int l = 0; l < 4; ++l) to[l * stride + x] = from[x * lanes + l];
      }
      for (int l = 0; l < 4 && l < filled && !direct; ++l) {
        T* __restrict line = first + l * map.sc;
        for (x = 0; x < columns; ++x) store(line[x], to[l * stride + x]);
      }
    }
  }
}

// How many lanes serve the channels that are left: as few as hold them, up to 16.
inline int lanes_for(int channels) { return channels > 8 ? 16 : (channels > 4 ? 8 : 4); }

}  // namespace
}  // namespace equifast::cpu
