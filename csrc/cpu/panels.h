// Similarity works on panels: a rectangle of a map, some channels at a time, the channels of a pixel side by
// side whatever the layout in memory. A sample is then four vector loads, and its adjoint vector additions,
// for every geometry. Included by kernels that are compiled once per instruction set, hence the unnamed
// namespace.
#pragma once

#include <type_traits>
#include <utility>

#include "../core/preimage.h"
#include "pack.h"
#include "quads.h"

namespace equifast::cpu {
namespace {

// What is worked on at once: long rows, which memory likes, and few of them, so that what they read stays in
// cache.
constexpr int tile_columns = 64, tile_rows = 12;
constexpr int tile_positions = tile_columns * tile_rows;
constexpr int halo_rows = 16;
constexpr int halo = (tile_columns + 2) * (halo_rows + 2);  // pixels of a tile of a view and its neighbors
constexpr int most_positions = 1536;                        // of an anchor, that read such a tile
constexpr int most_rows = 128;                              // of a panel
constexpr int most_line = 1800;                             // pixels of a row of a panel
// Numbers that a tile of an anchor reads of a view: 12 rows of 64 at twice the size, in 16 lanes.
constexpr int most_window = 57600;

// Pixels of columns [left, right) and rows [top, bottom). Of a map continued by its border pixels, where
// column -1 and row -1 are of it too.
struct Rect {
  int left, right, top, bottom;
  int width() const { return right - left; }
  int height() const { return bottom - top; }
  int64_t area() const { return int64_t{width()} * height(); }
  bool operator==(const Rect& o) const {
    return left == o.left && right == o.right && top == o.top && bottom == o.bottom;
  }
};

inline bool fits(const Rect& r, int pixels) {
  return r.area() <= pixels && r.height() <= most_rows && r.width() <= most_line;
}

// The halves of a rectangle, cut across its longer side.
inline void halve(const Rect& r, Rect& first, Rect& second) {
  first = second = r;
  if (r.width() >= r.height()) {
    first.right = second.left = r.left + r.width() / 2;
  } else {
    first.bottom = second.top = r.top + r.height() / 2;
  }
}

struct Range {  // columns [begin, end)
  int begin, end;
};

// What the positions of a rectangle read in another map.
template <typename real>
class Geometry {
 public:
  struct Span {  // positions [begin, end) of a row, the first of them at `first` in the arrays
    int row, begin, end, first;
  };
  int spans = 0;
  Span* span;
  Rect window{0, 0, 0, 0};  // the pixels that are read
  Range* columns;           // of each row of the window, that are read
  // By position, of those in spans: its upper left tap, a pixel of the window; the weights of the others.
  int* offset;
  real *fx, *fy;

  static constexpr int64_t scratch(int positions) {
    return Scratch::bytes<Span>(most_rows) + Scratch::bytes<Range>(most_rows) +
           Scratch::bytes<int>(positions) + 2 * Scratch::bytes<real>(positions);
  }
  Geometry(Scratch& s, int positions)
      : span(s.take<Span>(most_rows)),
        columns(s.take<Range>(most_rows)),
        offset(s.take<int>(positions)),
        fx(s.take<real>(positions)),
        fy(s.take<real>(positions)) {}

  // The positions of `r` in a map of `width` x `height`. False where they read more than `most_pixels`, which
  // one position never does.
  bool look(const core::PixelMap& map, const Rect& r, int width, int height, int most_pixels) {
    if (knows(map, r, {})) return true;
    forget();
    Corners at(map, r);
    // coordinates grow along rows and columns or shrink, rounding included: extremes are at the corners
    const double left = least(at.x), right = most(at.x), top = least(at.y), bottom = most(at.y);
    if (!(left <= right && top <= bottom)) return true;  // NaN: nothing is inside
    window = {low(left, width), low(right, width) + 2, low(top, height), low(bottom, height) + 2};
    if (!fits(window, most_pixels)) return false;
    find(map, r, width, height);
    const bool level = map.xj == 0 && map.yi == 0;
    for (int y = window.top; y < window.bottom; ++y) {
      columns[y - window.top] = level ? Range{window.left, window.right} : at.read(y, window, width);
    }
    remember(map, r, {});
    return true;
  }

  // Those positions of `r` that read a pixel of `touched`; the window is that rectangle and its neighbors.
  void look_at(const Rect& touched, const core::PixelMap& map, const Rect& r, int width, int height) {
    if (knows(map, r, touched)) return;
    window = {touched.left - 1, touched.right + 1, touched.top - 1, touched.bottom + 1};
    find(map, r, width, height);
    remember(map, r, touched);
  }

  // No position.
  void forget() { spans = 0, known_ = false; }

 private:
  // What it was last looked at for: most views are the same for many images.
  bool known_ = false;
  core::PixelMap map_{{}, 1, 1, 1, 1};
  Rect positions_{}, touched_{};

  bool knows(const core::PixelMap& map, const Rect& r, const Rect& touched) const {
    return known_ && map_ == map && positions_ == r && touched_ == touched;
  }
  void remember(const core::PixelMap& map, const Rect& r, const Rect& touched) {
    known_ = true, map_ = map, positions_ = r, touched_ = touched;
  }

  // The positions of a rectangle's corners, in turn.
  struct Corners {
    double x[4], y[4];
    Corners(const core::PixelMap& map, const Rect& r) {
      const int i[4] = {r.left, r.right - 1, r.right - 1, r.left},
                j[4] = {r.top, r.top, r.bottom - 1, r.bottom - 1};
      double across[4], down[4];  // as map.at has them
      for (int c = 0; c < 4; ++c) x[c] = map.xi * (i[c] + 0.5), across[c] = map.xj * (j[c] + 0.5);
      for (int c = 0; c < 4; ++c) y[c] = map.yi * (i[c] + 0.5), down[c] = map.yj * (j[c] + 0.5);
      hide(x), hide(across), hide(y), hide(down);
      for (int c = 0; c < 4; ++c) x[c] = x[c] + across[c] + map.x0, y[c] = y[c] + down[c] + map.y0;
    }

    // The columns that row `row` of a window is read at: where the corners' parallelogram meets (row - 1, row
    // + 1).
    Range read(int row, const Rect& of, int width) const {
      constexpr double slack = 1e-3, everything = 1e300, precise = 1e9;  // beyond, rounding passes the slack
      for (int c = 0; c < 4; ++c) {
        if (!(x[c] < precise && x[c] > -precise && y[c] < precise && y[c] > -precise)) {
          return {of.left, of.right};
        }
      }
      const double above = row == of.top ? -everything : row - 1 - slack,
                   below = row == of.bottom - 1 ? everything : row + 1 + slack;
      double first = everything, last = -everything;
      for (int c = 0; c < 4; ++c) {
        double x0 = x[c], x1 = x[(c + 1) % 4], y0 = y[c], y1 = y[(c + 1) % 4];
        if (y0 > y1) std::swap(x0, x1), std::swap(y0, y1);
        if (y1 < above || y0 > below) continue;
        const double slope = y1 - y0 > slack ? (x1 - x0) / (y1 - y0) : 0;
        if (slope != 0 && y1 > below) x1 = x0 + slope * (below - y0);
        if (slope != 0 && y0 < above) x0 += slope * (above - y0);
        first = x0 < first ? x0 : first, first = x1 < first ? x1 : first;
        last = x0 > last ? x0 : last, last = x1 > last ? x1 : last;
      }
      if (first > last) return {0, 0};
      const int left = low(first - slack, width), right = low(last + slack, width) + 2;
      return {left > of.left ? left : of.left, right < of.right ? right : of.right};
    }
  };

  static double least(const double* v) {
    double value = v[0];
    for (int i = 1; i < 4; ++i) value = v[i] >= value ? value : v[i];
    return value;
  }
  static double most(const double* v) {
    double value = v[0];
    for (int i = 1; i < 4; ++i) value = v[i] <= value ? value : v[i];
    return value;
  }

  // The lower tap of a coordinate that need not be inside.
  static int low(double v, int size) { return v < 0 ? -1 : (v < size ? static_cast<int>(v) : size - 1); }

  bool reads(const core::PixelMap& map, int i, int j, int width, int height) const {
    const core::Position p = map.at(i, j);
    if (!map.inside(p)) return false;
    const int x = core::lower<real>(p.x, width).pixel, y = core::lower<real>(p.y, height).pixel;
    return x >= window.left && x + 1 < window.right && y >= window.top && y + 1 < window.bottom;
  }

  // The positions of `r` that read inside the window only.
  void find(const core::PixelMap& map, const Rect& r, int width, int height) {
    constexpr double everything = 1e300;
    const double left = window.left < 0 ? map.left : window.left,
                 right = window.right > width ? everything : window.right - 1,
                 top = window.top < 0 ? map.top : window.top,
                 bottom = window.bottom > height ? everything : window.bottom - 1;
    spans = 0;
    int count = 0;
    for (int j = r.top; j < r.bottom; ++j) {
      Range c{r.left, r.right};
      const double x0 = map.xj * (j + 0.5) + map.x0, y0 = map.yj * (j + 0.5) + map.y0;
      narrow(map.xi, x0, left, right < map.right ? right : map.right, c.begin, c.end);
      narrow(map.yi, y0, top, bottom < map.bottom ? bottom : map.bottom, c.begin, c.end);
      while (c.begin < c.end && !reads(map, c.begin, j, width, height)) ++c.begin;
      while (c.end > c.begin && !reads(map, c.end - 1, j, width, height)) --c.end;
      if (c.begin == c.end) continue;
      taps(map, j, c, count, width, height);
      span[spans++] = {j, c.begin, c.end, count};
      count += c.end - c.begin;
    }
  }

  void taps(const core::PixelMap& map, int j, const Range& c, int first, int width, int height) {
    const int pitch = window.width(), left = window.left, top = window.top;
    int* __restrict o = offset + first;
    real* __restrict right = fx + first, * __restrict down = fy + first;
    const int count = c.end - c.begin;
    Positions p;
    for (int some = 0; some < count; some += Positions::most) {
      const int n = count - some < Positions::most ? count - some : Positions::most;
      p.look(map, j, c.begin + some, n);
#pragma omp simd
      for (int i = 0; i < n; ++i) {
        const auto x = core::lower<real>(p.x[i], width);
        const auto y = core::lower<real>(p.y[i], height);
        o[some + i] = (y.pixel - top) * pitch + (x.pixel - left);
        right[some + i] = x.fraction, down[some + i] = y.fraction;
      }
    }
  }
};

// How many lanes serve the channels that are left: as few as hold them, up to 24, and 16 where there are
// more.
constexpr int lanes_for(int channels) {
  return channels > 24   ? 16
         : channels > 20 ? 24
         : channels > 16 ? 20
         : channels > 8  ? 16
         : channels > 4  ? 8
                         : 4;
}

// The most that a block of them takes.
constexpr int most_lanes(int channels) {
  const int rest = channels % 16;
  return channels <= 24 ? lanes_for(channels) : (rest == 0 || rest > 8 ? 16 : (rest > 4 ? 24 : 20));
}

#if EQUIFAST_WIDE
// Sixteen channels of sixteen pixels, where a register holds a row of them: a quarter of the loads and
// stores.
// Four registers, turned round within each quarter of a register.
inline void transpose_quarters(__m512& a, __m512& b, __m512& c, __m512& d) {
  const __m512d ab = _mm512_castps_pd(_mm512_unpacklo_ps(a, b)),
                ba = _mm512_castps_pd(_mm512_unpackhi_ps(a, b)),
                cd = _mm512_castps_pd(_mm512_unpacklo_ps(c, d)),
                dc = _mm512_castps_pd(_mm512_unpackhi_ps(c, d));
  a = _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)), b = _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd));
  c = _mm512_castpd_ps(_mm512_unpacklo_pd(ba, dc)), d = _mm512_castpd_ps(_mm512_unpackhi_pd(ba, dc));
}

// The same for the quarters themselves.
inline void transpose_of_quarters(__m512& a, __m512& b, __m512& c, __m512& d) {
  const __m512 ab = _mm512_shuffle_f32x4(a, b, 0x44), ba = _mm512_shuffle_f32x4(a, b, 0xee),
               cd = _mm512_shuffle_f32x4(c, d, 0x44), dc = _mm512_shuffle_f32x4(c, d, 0xee);
  a = _mm512_shuffle_f32x4(ab, cd, 0x88), b = _mm512_shuffle_f32x4(ab, cd, 0xdd);
  c = _mm512_shuffle_f32x4(ba, dc, 0x88), d = _mm512_shuffle_f32x4(ba, dc, 0xdd);
}

inline void transpose(__m512 (&a)[16]) {
  for (int i = 0; i < 16; i += 4) transpose_quarters(a[i], a[i + 1], a[i + 2], a[i + 3]);
  for (int i = 0; i < 4; ++i) transpose_of_quarters(a[i], a[i + 4], a[i + 8], a[i + 12]);
}

// Quarter q of four registers: pixels 4 q + i of a panel, of those that exist.
template <int q, int lanes>
inline void put_quarters(const __m512* a, float* to, int pixels) {
  for (int i = 0; i < 4; ++i) {
    if (4 * q + i < pixels) _mm_storeu_ps(to + (4 * q + i) * lanes, _mm512_extractf32x4_ps(a[i], q));
  }
}

// Every fourth pixel of a panel, of those that exist.
template <int lanes>
inline __m512 get_quarters(const float* from, int pixels) {
  __m512 v = _mm512_setzero_ps();
  if (pixels > 0) v = _mm512_insertf32x4(v, _mm_loadu_ps(from), 0);
  if (pixels > 4) v = _mm512_insertf32x4(v, _mm_loadu_ps(from + 4 * lanes), 1);
  if (pixels > 8) v = _mm512_insertf32x4(v, _mm_loadu_ps(from + 8 * lanes), 2);
  if (pixels > 12) v = _mm512_insertf32x4(v, _mm_loadu_ps(from + 12 * lanes), 3);
  return v;
}

// Sixteen pixels of eight channels, a register per channel, into pixels of eight lanes: i and i + 4 in a[i],
// i + 8 and i + 12 in a[i + 4]. And back.
inline void turn_to_pixels(__m512 (&a)[8]) {
  transpose_quarters(a[0], a[1], a[2], a[3]), transpose_quarters(a[4], a[5], a[6], a[7]);
  const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11),
                second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  for (int i = 0; i < 4; ++i) {
    const __m512d low = _mm512_castps_pd(a[i]), high = _mm512_castps_pd(a[i + 4]);
    a[i] = _mm512_castpd_ps(_mm512_permutex2var_pd(low, first, high));
    a[i + 4] = _mm512_castpd_ps(_mm512_permutex2var_pd(low, second, high));
  }
}
inline void turn_to_channels(__m512 (&a)[8]) {
  const __m512i low = _mm512_setr_epi64(0, 1, 4, 5, 8, 9, 12, 13),
                high = _mm512_setr_epi64(2, 3, 6, 7, 10, 11, 14, 15);
  for (int i = 0; i < 4; ++i) {
    const __m512d first = _mm512_castps_pd(a[i]), second = _mm512_castps_pd(a[i + 4]);
    a[i] = _mm512_castpd_ps(_mm512_permutex2var_pd(first, low, second));
    a[i + 4] = _mm512_castpd_ps(_mm512_permutex2var_pd(first, high, second));
  }
  transpose_quarters(a[0], a[1], a[2], a[3]), transpose_quarters(a[4], a[5], a[6], a[7]);
}

// Those pixels, of up to sixteen side by side, that exist.
inline void put_pixels(const __m512 (&a)[8], float* to, int pixels) {
  const auto put = [&](auto all) {
    for (int i = 0; i < 8; ++i) {
      const int x = i % 4 + i / 4 * 8;
      if (all || x < pixels) _mm256_storeu_ps(to + x * 8, _mm512_castps512_ps256(a[i]));
      if (all || x + 4 < pixels) _mm256_storeu_ps(to + (x + 4) * 8, _mm512_extractf32x8_ps(a[i], 1));
    }
  };
  pixels < 16 ? put(std::false_type()) : put(std::true_type());
}
inline void get_pixels(const float* from, int pixels, __m512 (&a)[8]) {
  const auto get = [&](auto all) {
    for (int i = 0; i < 8; ++i) {
      const int x = i % 4 + i / 4 * 8;
      __m256 low = _mm256_setzero_ps(), high = low;
      if (all || x < pixels) low = _mm256_loadu_ps(from + x * 8);
      if (all || x + 4 < pixels) high = _mm256_loadu_ps(from + (x + 4) * 8);
      a[i] = _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
    }
  };
  pixels < 16 ? get(std::false_type()) : get(std::true_type());
}
#endif

// Scratch of the functions below: four lines of a panel, in real numbers.
template <typename real>
constexpr int64_t lines_scratch() {
  return 4 * Scratch::bytes<real>(most_line);
}

// Reads `count` pixels of some planes into lanes [0, 4) of pixels `stride` apart.
template <typename T>
void load_four(const T* first, int64_t sc, int filled, int count, Real<T>* __restrict out, int stride,
               Real<T>* lines) {
  using real = Real<T>;
  const real* from = lines;
  int64_t from_stride = most_line;
  if (std::is_same<T, real>::value && filled >= 4) {
    from = reinterpret_cast<const real*>(first), from_stride = sc;
  } else {
    for (int l = 0; l < 4; ++l) {
      real* __restrict line = lines + l * most_line;
      const T* channel = first + l * sc;
      for (int x = 0; x < count; ++x) line[x] = l < filled ? real(load(channel[x])) : real(0);
    }
  }
  int x = 0;
  for (; x + 4 <= count; x += 4) turn(from + x, from_stride, out + x * stride, stride);
  for (; x < count; ++x) {
    for (int l = 0; l < 4; ++l) out[x * stride + l] = from[l * from_stride + x];
  }
}

// The other way round.
template <typename T>
void store_four(T* first, int64_t sc, int filled, int count, const Real<T>* from, int stride,
                Real<T>* lines) {
  using real = Real<T>;
  const bool direct = std::is_same<T, real>::value && filled >= 4;
  real* to = direct ? reinterpret_cast<real*>(first) : lines;
  const int64_t to_stride = direct ? sc : most_line;
  int x = 0;
  for (; x + 4 <= count; x += 4) turn(from + x * stride, stride, to + x, to_stride);
  for (; x < count; ++x) {
    for (int l = 0; l < 4; ++l) to[l * to_stride + x] = from[x * stride + l];
  }
  for (int l = 0; l < 4 && l < filled && !direct; ++l) {
    T* __restrict line = first + l * sc;
    for (x = 0; x < count; ++x) store(line[x], to[l * to_stride + x]);
  }
}

// A row of a planar map: `count` pixels from `first`. `ahead`: how far a later row is, elements.
template <int lanes, typename T>
void load_planar(const T* first, int64_t sc, int64_t ahead, int channels, int count, Real<T>* out,
                 Real<T>* lines) {
  int done = 0;
#if EQUIFAST_WIDE
  if constexpr (wide<T> && lanes >= 16) {
    for (int x = 0; x < count; x += 16) {
      const int pixels = count - x < 16 ? count - x : 16;
      const __mmask16 mask = first_of_16(pixels);
      __m512 a[16];
      for (int i = 0; i < 16; ++i) {
        const T* from = first + i * sc + x;
        // pieces of rows are too short for the hardware to see a stream
        if (i < channels) __builtin_prefetch(from + ahead);
        a[i] = load_16(from, i < channels ? mask : 0);
      }
      transpose(a);
      float* to = out + int64_t{x} * lanes;
      for (int i = 0; i < 16 && i < pixels; ++i) _mm512_storeu_ps(to + i * lanes, a[i]);
      for (int c = 16; c < lanes; c += 4) {
        for (int i = 0; i < 4; ++i) {
          const T* from = first + (c + i) * sc + x;
          if (c + i < channels) __builtin_prefetch(from + ahead);
          a[i] = load_16(from, c + i < channels ? mask : 0);
        }
        transpose_quarters(a[0], a[1], a[2], a[3]);
        put_quarters<0, lanes>(a, to + c, pixels), put_quarters<1, lanes>(a, to + c, pixels);
        put_quarters<2, lanes>(a, to + c, pixels), put_quarters<3, lanes>(a, to + c, pixels);
      }
    }
    done = lanes;
  }
  if constexpr (wide<T> && lanes == 8) {
    for (int x = 0; x < count; x += 16) {
      const int pixels = count - x < 16 ? count - x : 16;
      const __mmask16 mask = first_of_16(pixels);
      __m512 a[8];
      for (int i = 0; i < 8; ++i) {
        const T* from = first + i * sc + x;
        if (i < channels) __builtin_prefetch(from + ahead);
        a[i] = load_16(from, i < channels ? mask : 0);
      }
      turn_to_pixels(a);
      put_pixels(a, out + int64_t{x} * lanes, pixels);
    }
    done = lanes;
  }
#endif
  for (int c = done; c < lanes; c += 4) {
    for (int l = 0; l < 4 && c + l < channels; ++l) {
      const char* later = reinterpret_cast<const char*>(first + (c + l) * sc + ahead);
      for (int64_t i = 0; i < count * int64_t{sizeof(T)}; i += 64) __builtin_prefetch(later + i);
    }
    load_four(first + c * sc, sc, channels - c, count, out + c, lanes, lines);
  }
}

// A row of an interleaved map.
template <int lanes, typename T>
void load_interleaved(const T* from, int64_t sx, int64_t ahead, int channels, int count, Real<T>* out) {
  for (int64_t i = 0; i < count * sx * int64_t{sizeof(T)};
       i += channels == sx ? 64 : sx * int64_t{sizeof(T)}) {
    __builtin_prefetch(reinterpret_cast<const char*>(from + ahead) + i);
  }
#if EQUIFAST_WIDE
  if constexpr (wide<T> && lanes >= 16) {
    const __mmask16 head = first_of_16(channels), tail = first_of_16(channels > 16 ? channels - 16 : 0);
    for (int x = 0; x < count; ++x, from += sx, out += lanes) {
      _mm512_storeu_ps(out, load_16(from, head));
      if constexpr (lanes > 16) {
        _mm512_mask_storeu_ps(out + 16, first_of_16(lanes - 16), load_16(from + 16, tail));
      }
    }
    return;
  }
#endif
  if constexpr (maskable<T> && lanes == 16) {
    for (int x = 0; x < count; ++x, from += sx, out += lanes) {
      Pack<16, float> v;
      get(from, SomeLanes{0, channels < 16 ? channels : 16}, v), v.put(out);
    }
    return;
  }
  for (int x = 0; x < count; ++x, from += sx, out += lanes) {
    // Lanes beyond the channels are read from the next pixel, where there is one, and dropped.
    const int64_t left = (count - x - 1) * sx + channels;
    if (left >= lanes) {
      for (int l = 0; l < lanes; ++l) {
        const Real<T> v = load(from[l]);
        out[l] = l < channels ? v : 0;
      }
    } else {
      for (int l = 0; l < lanes; ++l) out[l] = l < channels ? Real<T>(load(from[l])) : 0;
    }
  }
}

// Rows that fill their vectors badly: where they lie side by side they are one.
inline bool short_rows(int columns) { return columns < 48 && columns % 16 != 0; }

// Reads `channels` (at most lanes) of a window, or of each of its rows the given columns:
// panel[pixel * lanes + channel]. The other lanes are 0. `image`: the first of the channels.
template <int lanes, typename T>
void load_panel(const Map& map, const T* image, int channels, bool interleaved, const Rect& w,
                const Range* columns, Real<T>* panel, Real<T>* lines) {
  constexpr int rows_ahead = 2;
  if (!interleaved && short_rows(w.width()) && w.left == 0 && w.right == map.width && map.sy == map.width &&
      w.top >= 0 && w.bottom <= map.height &&
      w.area() <= most_line) {  // whole rows, whatever is asked of them
    load_planar<lanes>(image + w.top * map.sy, map.sc, 0, channels, static_cast<int>(w.area()), panel, lines);
    return;
  }
  for (int y = w.top; y < w.bottom; ++y) {
    const Range c = columns != nullptr ? columns[y - w.top] : Range{w.left, w.right};
    if (c.begin >= c.end) continue;
    const Range inner{c.begin < 0 ? 0 : c.begin, c.end > map.width ? map.width : c.end};
    const int row = y < 0 ? 0 : (y < map.height ? y : map.height - 1);
    const T* from = image + row * map.sy + inner.begin * map.sx;
    const int64_t ahead = row + rows_ahead < map.height ? rows_ahead * map.sy : 0;
    Real<T>* out = panel + (int64_t{y - w.top} * w.width() + (inner.begin - w.left)) * lanes;
    const int count = inner.end - inner.begin;
    if (interleaved) {
      load_interleaved<lanes>(from, map.sx, ahead, channels, count, out);
    } else {
      load_planar<lanes>(from, map.sc, ahead, channels, count, out, lines);
    }
    if (c.begin < inner.begin) std::memcpy(out - lanes, out, sizeof(Real<T>) * lanes);
    if (c.end > inner.end) {
      Real<T>* last = out + int64_t{count} * lanes;
      std::memcpy(last, last - lanes, sizeof(Real<T>) * lanes);
    }
  }
}

// Moves the pixels of a panel of the map `all` into one of a window around it, continued by the border.
template <int lanes, typename real>
void frame(const real* from, const Rect& all, real* panel) {
  const int pitch = all.width() + 2;
  for (int y = -1; y <= all.height(); ++y) {
    const int row = y < 0 ? 0 : (y < all.height() ? y : all.height() - 1);
    const real* first = from + int64_t{row} * all.width() * lanes;
    real* to = panel + (int64_t{y + 1} * pitch + 1) * lanes;
    std::memcpy(to, first, sizeof(real) * std::size_t(all.width() * lanes));
    std::memcpy(to - lanes, first, sizeof(real) * lanes);
    real* last = to + int64_t{all.width()} * lanes;
    std::memcpy(last, last - lanes, sizeof(real) * lanes);
  }
}

// Adds what the continuation of a map by its border pixels got to these.
template <int lanes, typename real>
void fold_border(const Rect& w, int width, int height, real* panel) {
  const auto pixel = [&](int x, int y) {
    return panel + (int64_t{y - w.top} * w.width() + (x - w.left)) * lanes;
  };
  const auto add = [&](const real* from, real* to, int pixels) {
    for (int64_t i = 0; i < int64_t{pixels} * lanes; ++i) to[i] += from[i];
  };
  if (w.top < 0) add(pixel(w.left, -1), pixel(w.left, 0), w.width());
  if (w.bottom > height) add(pixel(w.left, height), pixel(w.left, height - 1), w.width());
  for (int y = w.top; y < w.bottom; ++y) {
    if (w.left < 0) add(pixel(-1, y), pixel(0, y), 1);
    if (w.right > width) add(pixel(width, y), pixel(width - 1, y), 1);
  }
}

// Writes the pixels `r` of a panel of the window `w` to memory.
template <int lanes, typename T>
void store_panel(const Gradient& map, T* image, int channels, bool interleaved, const Rect& w, const Rect& r,
                 const Real<T>* panel, Real<T>* lines) {
  int columns = r.width(), bottom = r.bottom;
  if (!interleaved && short_rows(columns) && columns == w.width() && map.sy == columns &&
      r.area() <= most_line) {
    columns = static_cast<int>(r.area()), bottom = r.top + 1;
  }
  for (int y = r.top; y < bottom; ++y) {
    const Real<T>* from = panel + (int64_t{y - w.top} * w.width() + (r.left - w.left)) * lanes;
    T* to = image + y * map.sy + r.left * map.sx;
    if (interleaved) {
#if EQUIFAST_WIDE
      if constexpr (wide<T> && lanes >= 16) {
        const auto put = [from](T* pixel, int x) {
          put_16(pixel, _mm512_loadu_ps(from + x * lanes));
          if constexpr (lanes > 16) {
            put_16(pixel + 16, _mm512_maskz_loadu_ps(first_of_16(lanes - 16), from + x * lanes + 16));
          }
        };
        if (lanes == 16 && channels == 16) {
          for (int x = 0; x < columns; ++x) put(to + x * map.sx, x);
          continue;
        }
        // Lanes too many are written, which are less than a pixel: where pixels are side by side the next one
        // overwrites them. Not the last one's: what comes after is another task's.
        const bool dense = map.sx == channels;
        T line[32];
        for (int x = 0; x < columns; ++x) {
          T* pixel = to + x * map.sx;
          const bool aside = !dense || x == columns - 1;
          put(aside ? line : pixel, x);
          if (aside) std::memcpy(pixel, line, sizeof(T) * std::size_t(channels));
        }
        continue;
      }
#endif
      if constexpr (maskable<T> && lanes == 16) {
        for (int x = 0; x < columns; ++x, to += map.sx, from += lanes) {
          Pack<16, float> v;
          v.get(from), put(to, SomeLanes{0, channels < 16 ? channels : 16}, v);
        }
        continue;
      }
      for (int x = 0; x < columns; ++x, to += map.sx, from += lanes) {
        for (int l = 0; l < channels; ++l) store(to[l], from[l]);
      }
      continue;
    }
    int done = 0;
#if EQUIFAST_WIDE
    if constexpr (wide<T> && lanes >= 16) {
      for (int x = 0; x < columns; x += 16) {
        const int pixels = columns - x < 16 ? columns - x : 16;
        __m512 a[16];
        for (int i = 0; i < 16; ++i) {
          a[i] = i < pixels ? _mm512_loadu_ps(from + int64_t{x + i} * lanes) : _mm512_setzero_ps();
        }
        transpose(a);
        for (int i = 0; i < 16 && i < channels; ++i) put_16(to + i * map.sc + x, pixels, a[i]);
        for (int c = 16; c < channels; c += 4) {
          const float* pixel = from + int64_t{x} * lanes + c;
          for (int i = 0; i < 4; ++i) a[i] = get_quarters<lanes>(pixel + i * lanes, pixels - i);
          transpose_quarters(a[0], a[1], a[2], a[3]);
          for (int i = 0; i < 4 && c + i < channels; ++i) put_16(to + (c + i) * map.sc + x, pixels, a[i]);
        }
      }
      done = channels;
    }
    if constexpr (wide<T> && lanes == 8) {
      for (int x = 0; x < columns; x += 16) {
        const int pixels = columns - x < 16 ? columns - x : 16;
        __m512 a[8];
        get_pixels(from + int64_t{x} * lanes, pixels, a);
        turn_to_channels(a);
        for (int i = 0; i < 8 && i < channels; ++i) put_16(to + i * map.sc + x, pixels, a[i]);
      }
      done = channels;
    }
#endif
    for (int c = done; c < channels; c += 4) {
      store_four(to + c * map.sc, map.sc, channels - c, columns, from + c, lanes, lines);
    }
  }
}

}  // namespace
}  // namespace equifast::cpu
