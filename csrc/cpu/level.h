// Similarity by rows, under views without rotation and shear: features stay as they lie in memory, where
// panels (panels.h) would turn every pixel round, and a row of the view is one line for all positions that
// read it. Included by kernels that are compiled once per instruction set, hence the unnamed namespace.
#pragma once

#include <cmath>

#include "axis.h"
#include "panels.h"

namespace equifast::cpu {
namespace {

constexpr int prefetched = 512;        // pixels, of a gradient that is about to be written
constexpr int least_level_width = 24;  // of an anchor: below, vectors are half empty
// Pixels of the view per position: fewer, and too many positions read one row or one vector of it; more, and
// a vector of positions reads too many pixels.
constexpr double least_level_slope = 0.27, most_level_slope = 3.9;
constexpr int most_added = 128;  // numbers in float32 in one lane, beyond in float64
// Bytes of a thread; maps that need more go by panels. Two threads and the partial sums stay below a
// megabyte.
constexpr int64_t level_scratch = (1 << 19) - (1 << 13);

// Whether rows of positions read rows of a view, few enough of them.
inline bool is_level(const core::PixelMap& map) {
  return map.xj == 0 && map.yi == 0 && std::fabs(map.xi) >= least_level_slope &&
         std::fabs(map.yj) >= least_level_slope;
}

// At most, positions that read a pixel of an axis, which lie within two pixels; that read it or the next one,
// within three. One more for rounding.
inline int most_readers(double slope) { return static_cast<int>(2 / std::fabs(slope)) + 2; }
inline int most_kept(double slope) { return static_cast<int>(3 / std::fabs(slope)) + 2; }

// The positions of an axis that are inside: they follow each other.
template <typename real>
Range inside(const Axis<real>& axis) {
  Range seen{0, axis.size};
  while (seen.begin < seen.end && axis.count(seen.begin) == 0) ++seen.begin;
  while (seen.begin < seen.end && axis.count(seen.end - 1) == 0) --seen.end;
  return seen;
}

// Of planar maps: some channels of a view at a time, which share what is known of the positions.
template <typename T>
class LevelPlanes {
 public:
  using real = Real<T>;

  LevelPlanes(const SimilarityParams& p, Scratch& s) : p_(p), scratch_(s) {}

  // Whether a view of that map may go by rows.
  static bool serves(const SimilarityParams& p, const core::PixelMap& map, int k) {
    if (p.interleaved || !is_level(map) || std::fabs(map.xi) > most_level_slope) return false;
    if (p.anchor.width < least_level_width) return false;
    const Map &anchor = p.anchor, &view = p.view[k];
    if (anchor.width > level_scratch || view.width > level_scratch) return false;  // and the sum overflows
    return 2 * line_bytes(anchor.width) + 2 * line_bytes(view.width) + axis_bytes(anchor.width, view.width) +
               axis_bytes(anchor.height, view.height) + columns_bytes(anchor.width, 2) +
               columns_bytes(view.width, most_readers(map.xi)) +
               most_kept(map.yj) * Scratch::bytes<real>(slope_row(anchor.width)) +
               Scratch::bytes<int>(most_kept(map.yj)) <=
           level_scratch;
  }

  // Whether its gradients may too: the anchor's is added up over the views in its own dtype.
  static bool serves_gradient(const SimilarityParams& p, const core::PixelMap& map, int k) {
    return (std::is_same<T, real>::value || p.views == 1) && serves(p, map, k);
  }

  // The sums over channels [first, last).
  void add_products(int n, int k, const core::PixelMap& map, int first, int last, double* out) {
    const Sampled view = sample(map, n, k);
    visit_planes(first, last, [&](auto planes, int c) { add_products<planes>(view, n, c, out); });
  }

  // The gradient of channels [first, last) of a view; adds what they give to that of the anchor. The
  // derivatives by the products are `cross`, `own0` and `own1`.
  void add_gradients(int n, int k, const core::PixelMap& map, real cross, real own0, real own1, int first,
                     int last) {
    const Map &anchor = p_.anchor, &map_k = p_.view[k];
    const Sampled view = sample(map, n, k);
    Scratch& s = scratch_;
    Axis<real> rows(s, map_k.height, 2 * anchor.height), across(s, map_k.width, 2 * anchor.width);
    rows.transpose(view.rows, 0, map_k.height), across.transpose(view.across, 0, map_k.width);
    Columns<real> columns(s, map_k.width, parts(map_k.width, Columns<real>::chunk) * most_readers(map.xi));
    columns.lay(across, anchor.width);
    const int kept = most_kept(map.yj);
    real *slopes = s.take<real>(kept * slope_row(anchor.width)),
         *line = s.take<real>(line_size(anchor.width)), *values = s.take<real>(line_size(map_k.width));
    int* holds = s.take<int>(kept);
    const Gradient& g = p_.view_gradient[k];
    visit_planes(first, last, [&](auto some, int c) {
      constexpr int planes = decltype(some)::value;  // a lambda within may not name a parameter of this one
      Slopes<planes> from{view, slopes, holds, kept, anchor.width, cross, own0, own1};
      from.aim(p_, n, c);
      const auto row = [&](int j) { return from.row(j); };
      T* out = static_cast<T*>(g.data) + n * g.sn + c * g.sc;
      for (int y = 0; y < map_k.height; ++y, out += g.sy) {
        if (rows.count(y) == 0) {
          for (int p = 0; p < planes; ++p) {
            for (int x = 0; x < map_k.width; ++x) store(out[p * g.sc + x], real(0));
          }
          continue;
        }
        // the next row's too: what has just been written is slow to read
        for (int e = rows.begin[y + 1]; y + 1 < map_k.height && e < rows.begin[y + 2]; ++e) row(rows.at[e]);
        T* const to = out;  // copies: what is written could be these
        const int64_t to_sc = g.sc;
        const int width = map_k.width;
        separable_row<planes, real>(rows, y, columns, row, line_size(anchor.width), line, values,
                                    [=](int x, const Pack<16, real>(&v)[planes]) EQUIFAST_INLINE {
                                      with_lanes(0, width - x, [&](auto lanes) EQUIFAST_INLINE {
                                        for (int p = 0; p < planes; ++p) {
                                          T* pixels = opaque(to + x) + p * to_sc;
                                          __builtin_prefetch(pixels + prefetched, 1),
                                              put(pixels, lanes, v[p]);
                                        }
                                      });
                                    });
      }
    });
  }

 private:
  const SimilarityParams& p_;
  Scratch& scratch_;

  static int64_t line_size(int width) { return width + Columns<real>::beyond; }
  static int64_t line_bytes(int width) { return Scratch::bytes<real>(line_size(width)); }
  static int64_t slope_row(int width) { return most_planes * line_size(width); }
  static int64_t axis_bytes(int anchor, int view) {  // and of its transpose
    return Axis<real>::scratch(anchor, 2 * anchor) + Axis<real>::scratch(view, 2 * anchor);
  }
  static int64_t columns_bytes(int width, int terms) {
    return Columns<real>::scratch(width, parts(width, Columns<real>::chunk) * terms);
  }

  static constexpr int most_planes = wide<T> ? 4 : 1;
  template <typename Work>
  static void visit_planes(int first, int last, const Work& work) {
    int c = first;
    for (; c + most_planes <= last; c += most_planes) work(std::integral_constant<int, most_planes>(), c);
    if (most_planes > 2 && c + 2 <= last) work(std::integral_constant<int, 2>(), c), c += 2;
    for (; c < last; ++c) work(std::integral_constant<int, 1>(), c);
  }

  // An image's view, read at rows of the anchor.
  struct Sampled {
    Axis<real> across, rows;
    Columns<real> columns;
    Range seen;  // columns of the anchor
    const T* image;
    const Map* map;
    real *line, *values;

    template <int planes, typename Visit>
    EQUIFAST_INLINE inline void read(int row, int c, const Visit& visit) const {
      const T* plane = image + c * map->sc;
      separable_row<planes, T>(
          rows, row, columns, [plane, this](int y) { return plane + y * map->sy; }, map->sc, line, values,
          visit);
    }
  };

  template <int planes>
  void add_products(const Sampled& view, int n, int c, double* out) {
    const Map& anchor = p_.anchor;
    Sums<16, real> sums;
    const T* f0 = static_cast<const T*>(anchor.data) + n * anchor.sn + c * anchor.sc;
    int added = 0;
    for (int j = 0; j < anchor.height; ++j, f0 += anchor.sy) {
      if (view.rows.count(j) == 0) continue;
      view.template read<planes>(j, c, [&](int i, const Pack<16, real>(&v1)[planes]) EQUIFAST_INLINE {
        with_lanes(view.seen.begin - i, view.seen.end - i, [&](auto lanes) EQUIFAST_INLINE {
          for (int p = 0; p < planes; ++p) {
            Pack<16, real> v0;
            get(opaque(f0 + i) + p * anchor.sc, lanes, v0);
            sums.add(v0, v1[p]);
          }
        });
      });
      added += planes * (view.seen.end - view.seen.begin);
      if (added >= 16 * most_added) sums.give(out), added = 0;
    }
    sums.give(out);
  }

  // The gradients of rows of positions, by the sample that each reads. Some rows are kept: those that read
  // one row of the view follow each other. Adds to the anchor's gradient on the way.
  template <int planes>
  struct Slopes {
    const Sampled& view;
    real* slopes;
    int *holds, kept, width;  // rows of the anchor that `slopes` has; how many it can have
    real cross, own0, own1;
    int c = 0;
    const T* f0 = nullptr;
    T* own = nullptr;
    int64_t f0_sc = 0, f0_sy = 0, own_sc = 0, own_sy = 0;

    void aim(const SimilarityParams& p, int n, int channel) {
      c = channel;
      for (int i = 0; i < kept; ++i) holds[i] = -1;
      f0_sc = p.anchor.sc, f0_sy = p.anchor.sy, own_sc = p.anchor_gradient.sc, own_sy = p.anchor_gradient.sy;
      f0 = static_cast<const T*>(p.anchor.data) + n * p.anchor.sn + c * f0_sc;
      own = static_cast<T*>(p.anchor_gradient.data) + n * p.anchor_gradient.sn + c * own_sc;
    }

    const real* row(int j) {
      real* to = slopes + j % kept * slope_row(width);
      if (holds[j % kept] != j) {
        holds[j % kept] = j;
        compute(j, to);
      }
      return to;
    }

    void compute(int j, real* to) const {
      const T* from = f0 + j * f0_sy;
      T* sum = own + j * own_sy;
      // copies: what is written could be these, as far as the compiler knows
      const real across = cross, self0 = own0, self1 = own1;
      const int64_t from_sc = f0_sc, sum_sc = own_sc, to_sc = line_size(width);
      const Range seen = view.seen;
      view.template read<planes>(j, c, [=](int i, const Pack<16, real>(&v1)[planes]) EQUIFAST_INLINE {
        with_lanes(seen.begin - i, seen.end - i, [&](auto lanes) EQUIFAST_INLINE {
          for (int p = 0; p < planes; ++p) {
            Pack<16, real> v0, total, part;
            T* own_sum = opaque(sum + i) + p * sum_sc;
            get(opaque(from + i) + p * from_sc, lanes, v0), get(own_sum, lanes, total);
            part.combine(across, v1[p], self0, v0), total.add(part), put(own_sum, lanes, total);
            part.combine(across, v0, self1, v1[p]), part.put(opaque(to + i) + p * to_sc);
          }
        });
      });
    }
  };

  Sampled sample(const core::PixelMap& map, int n, int k) {
    const int width = p_.anchor.width, height = p_.anchor.height;
    const Map& view = p_.view[k];
    Scratch& s = scratch_.clear();
    Sampled v{Axis<real>(s, width, 2 * width),
              Axis<real>(s, height, 2 * height),
              Columns<real>(s, width, parts(width, Columns<real>::chunk) * 2),
              {0, 0},
              static_cast<const T*>(view.data) + n * view.sn,
              &view,
              s.take<real>(view.width + Columns<real>::beyond),
              s.take<real>(width + Columns<real>::beyond)};
    v.across.sample(0, width, view.width, map.left, map.right, map.xi, map.x0);
    v.rows.sample(0, height, view.height, map.top, map.bottom, map.yj, map.y0);
    v.columns.lay(v.across, view.width);
    v.seen = inside(v.across);
    return v;
  }
};

// The same for interleaved maps of few channels: a row is one line of numbers, whatever their channels, until
// columns are combined, and then a pixel is a vector. Where some lanes of one cost no more than all.
template <typename T>
class LevelPixels {
 public:
  using real = Real<T>;

  LevelPixels(const SimilarityParams& p, Scratch& s) : p_(p), scratch_(s) {}

  static bool serves(const SimilarityParams& p, const core::PixelMap& map, int k) {
    if (!maskable<T> || !p.interleaved || p.channels > 32 || !is_level(map)) return false;
    const Map &anchor = p.anchor, &view = p.view[k];
    if (anchor.width > level_scratch || view.width > level_scratch) return false;  // and the sum overflows
    return Axis<real>::scratch(anchor.width, 2 * anchor.width) +
               Axis<real>::scratch(anchor.height, 2 * anchor.height) +
               Axis<real>::scratch(view.width, 2 * anchor.width) +
               Axis<real>::scratch(similarity_view_rows, 2 * anchor.height) +
               (3 + most_kept(map.yj)) * line_bytes(anchor.width, p.channels) +
               2 * line_bytes(view.width, p.channels) + Scratch::bytes<int>(most_kept(map.yj)) <=
           level_scratch;
  }

  // Of a single view, whose tasks own the gradient of the anchor too.
  static bool serves_gradient(const SimilarityParams& p, const core::PixelMap& map, int k) {
    return p.views == 1 && serves(p, map, k);
  }

  // The sums over rows [top, bottom) of the anchor.
  void add_products(int n, int k, const core::PixelMap& map, int top, int bottom, double* out) {
    Sampled view = sample(map, n, k, top, bottom);
    const int64_t begin = int64_t{view.seen.begin} * p_.channels, end = int64_t{view.seen.end} * p_.channels;
    for (int j = top; j < bottom; ++j) {
      if (view.rows.count(j - top) == 0 || begin == end) continue;
      const T* f0 = image(p_.anchor, n) + j * p_.anchor.sy;
      view.read(j - top, [&](const auto& f1) EQUIFAST_INLINE {
        for (int64_t i = begin; i < end; i += 16 * most_added) {
          Sums<16, real> sums;
          each_number(i, std::min(i + 16 * most_added, end), [&](int64_t x, auto lanes) EQUIFAST_INLINE {
            Pack<16, real> v0, v1;
            __builtin_prefetch(f0 + x + prefetched);
            get(f0 + x, lanes, v0), f1.get(x, lanes, v1);
            sums.add(v0, v1);
          });
          sums.give(out);
        }
      });
    }
  }

  // What rows [top, bottom) of the anchor's gradient have of a view is added to `lines`, of all channels of
  // those rows.
  void add_to_anchor(int n, int k, const core::PixelMap& map, real cross, real own0, int top, int bottom,
                     real* lines) {
    Sampled view = sample(map, n, k, top, bottom);
    const int64_t begin = int64_t{view.seen.begin} * p_.channels, end = int64_t{view.seen.end} * p_.channels;
    for (int j = top; j < bottom; ++j, lines += int64_t{p_.anchor.width} * p_.channels) {
      if (view.rows.count(j - top) == 0 || begin == end) continue;
      const T* const f0 = image(p_.anchor, n) + j * p_.anchor.sy;
      view.read(j - top, [=](const auto& f1) EQUIFAST_INLINE {
        each_number(begin, end, [=](int64_t i, auto lanes) EQUIFAST_INLINE {
          Pack<16, real> v0, v1, part, total;
          __builtin_prefetch(f0 + i + prefetched);
          get(f0 + i, lanes, v0), f1.get(i, lanes, v1), get(lines + i, lanes, total);
          part.combine(cross, v1, own0, v0), total.add(part), put(lines + i, lanes, total);
        });
      });
    }
  }

  // Rows [first, last) of the gradient of the view, and those of the anchor's that read them first. The
  // derivatives by the products are `cross`, `own0` and `own1`.
  void write_gradients(int n, int k, const core::PixelMap& map, real cross, real own0, real own1, int first,
                       int last) {
    const Map &anchor = p_.anchor, &map_k = p_.view[k];
    const int channels = p_.channels, height = anchor.height;
    int top = 0, bottom = height;
    narrow(map.yj, map.y0, first - 1.0, last, top, bottom);  // others read other rows
    Sampled view = sample(map, n, k, top, bottom);
    Axis<real> rows(scratch_, last - first, 2 * (bottom - top)),
        across(scratch_, map_k.width, 2 * anchor.width);
    rows.transpose(view.rows, first, last), across.transpose(view.across, 0, map_k.width);
    const int kept = most_kept(map.yj);
    real *sum = line(anchor.width), *result = line(map_k.width),
         *slopes = scratch_.take<real>(kept * line_size(anchor.width, channels));
    int* holds = scratch_.take<int>(kept);
    for (int i = 0; i < kept; ++i) holds[i] = -1;
    const Gradient &to_own = p_.anchor_gradient, &to_view = p_.view_gradient[k];
    const int64_t begin = int64_t{view.seen.begin} * channels, end = int64_t{view.seen.end} * channels;

    const auto slope = [&](int j) -> const real* {  // of the positions of row j, by what each reads
      real* to = slopes + j % kept * line_size(anchor.width, channels);
      if (holds[j % kept] == j) return to;
      holds[j % kept] = j;
      const T* const f0 = image(anchor, n) + (top + j) * anchor.sy;
      T* const own = image(to_own, n) + (top + j) * to_own.sy;
      const auto combine = [&](auto mine, auto add) EQUIFAST_INLINE {
        view.read(j, [=](const auto& f1) EQUIFAST_INLINE {
          each_number(begin, end, [=](int64_t i, auto lanes) EQUIFAST_INLINE {
            Pack<16, real> v0, v1, part, total;
            __builtin_prefetch(f0 + i + prefetched);
            get(f0 + i, lanes, v0), f1.get(i, lanes, v1);
            part.combine(cross, v0, own1, v1), put(to + i, lanes, part);
            if constexpr (mine) {
              __builtin_prefetch(own + i + prefetched, 1);
              part.combine(cross, v1, own0, v0);
              if constexpr (add) get(own + i, lanes, total), part.add(total);
              put(own + i, lanes, part);
            }
          });
        });
      };
      const int read_first = view.rows.at[view.rows.begin[j]];
      if (read_first < first || read_first >= last) {
        combine(std::false_type(), std::false_type());
      } else if (p_.add) {
        combine(std::true_type(), std::true_type());
      } else {
        combine(std::true_type(), std::false_type());
      }
      return to;
    };

    for (int y = 0; y < last - first; ++y) {
      const bool any = rows.count(y) > 0 && begin < end;
      if (any) blend<real>(rows, y, slope, begin, end, sum);
      for (int c = 0; c < channels; c += 16) {
        with_lanes(0, channels - c, [&](auto lanes) EQUIFAST_INLINE {
          for (int x = 0; x < map_k.width; ++x) {
            Pack<16, real> total, part;
            total.zero();
            for (int e = across.begin[x]; any && e < across.begin[x + 1]; ++e) {
              get(sum + int64_t{across.at[e]} * channels + c, lanes, part);
              total.add_scaled(across.weight[e], part);
            }
            put(result + int64_t{x} * channels + c, lanes, total);
          }
        });
      }
      store_line(result, 0, int64_t{map_k.width} * channels, image(to_view, n) + (first + y) * to_view.sy);
    }
  }

 private:
  const SimilarityParams& p_;
  Scratch& scratch_;

  static int64_t line_size(int width, int channels) { return (int64_t{width} * channels + 31) / 16 * 16; }
  static int64_t line_bytes(int width, int channels) {
    return Scratch::bytes<real>(line_size(width, channels));
  }
  real* line(int width) { return scratch_.take<real>(line_size(width, p_.channels)); }

  static const T* image(const Map& map, int n) { return static_cast<const T*>(map.data) + n * map.sn; }
  static T* image(const Gradient& map, int n) { return static_cast<T*>(map.data) + n * map.sn; }

  // Calls work(i, lanes) on numbers [begin, end), 16 at a time.
  template <typename Work>
  EQUIFAST_INLINE static inline void each_number(int64_t begin, int64_t end, const Work& work) {
    int64_t i = begin;
    for (; i + 16 <= end; i += 16) work(i, AllLanes());
    if (i < end) work(i, SomeLanes{0, static_cast<int>(end - i)});
  }

  static void store_line(const real* from, int64_t begin, int64_t end, T* to) {
    each_number(begin, end, [&](int64_t i, auto lanes) EQUIFAST_INLINE {
      Pack<16, real> v;
      __builtin_prefetch(to + i + prefetched, 1);
      get(from + i, lanes, v), put(to + i, lanes, v);
    });
  }

  // Numbers [begin, end) of a sum of rows.
  template <typename U, typename Row>
  static void blend(const Axis<real>& rows, int i, const Row& row, int64_t begin, int64_t end, real* to) {
    for (int e = rows.begin[i]; e < rows.begin[i + 1]; e += 2) {
      const bool two = e + 1 < rows.begin[i + 1], before = e > rows.begin[i];
      const U *a = row(rows.at[e]), *b = two ? row(rows.at[e + 1]) : a;
      const real wa = rows.weight[e], wb = two ? rows.weight[e + 1] : real(0);
      each_number(begin, end, [&](int64_t x, auto lanes) EQUIFAST_INLINE {
        Pack<16, real> sum, part;
        __builtin_prefetch(a + x + prefetched);
        get(a + x, lanes, sum), sum.scaled(wa, sum);
        if (two) __builtin_prefetch(b + x + prefetched), get(b + x, lanes, part), sum.add_scaled(wb, part);
        if (before) get(to + x, lanes, part), sum.add(part);
        put(to + x, lanes, sum);
      });
    }
  }

  struct Line {
    const real* values;
    template <typename Lanes>
    EQUIFAST_INLINE inline void get(int64_t i, Lanes lanes, Pack<16, real>& v) const {
      cpu::get(values + i, lanes, v);
    }
  };

  // The sum of two.
  struct Lines {
    const real *first, *second;
    real weight0, weight1;
    template <typename Lanes>
    EQUIFAST_INLINE inline void get(int64_t i, Lanes lanes, Pack<16, real>& v) const {
      Pack<16, real> other;
      cpu::get(first + i, lanes, v), cpu::get(second + i, lanes, other);
      v.scaled(weight0, v), v.add_scaled(weight1, other);
    }
  };

  struct Sampled {
    Axis<real> across, rows;
    Range seen;   // columns of the anchor
    Range reads;  // columns of the view
    const T* data;
    const Map* map;
    real* line;       // of the view
    real* values[2];  // of the anchor: what its columns read of two rows of the view, or of their sum
    int holds[2];     // rows of the view
    bool fewer_rows;  // those of the view are fewer than what they are read for: they go first
    int channels;

    // Calls work on what a row of the anchor reads, a Line or Lines.
    template <typename Work>
    EQUIFAST_INLINE inline void read(int row, const Work& work) {
      const int e = rows.begin[row];
      if (!fewer_rows) {
        blend<T>(
            rows, row, [this](int y) { return data + y * map->sy; }, int64_t{reads.begin} * channels,
            int64_t{reads.end} * channels, line);
        to_columns(values[0]);
        work(Line{values[0]});
      } else if (rows.count(row) == 1) {
        work(Line{of_row(rows.at[e])});
      } else {
        const real *const first = of_row(rows.at[e]), *const second = of_row(rows.at[e + 1]);
        work(Lines{first, second, rows.weight[e], rows.weight[e + 1]});
      }
    }

    // What the columns of the anchor read of a row of the view.
    const real* of_row(int y) {
      real* const to = values[y % 2];
      if (holds[y % 2] == y) return to;
      holds[y % 2] = y;
      const T* const from = data + y * map->sy;
      real* const numbers = line;
      each_number(int64_t{reads.begin} * channels, int64_t{reads.end} * channels,
                  [=](int64_t x, auto lanes) EQUIFAST_INLINE {
                    Pack<16, real> v;
                    __builtin_prefetch(from + x + prefetched);
                    get(from + x, lanes, v), put(numbers + x, lanes, v);
                  });
      to_columns(to);
      return to;
    }

    void to_columns(real* to) const {
      for (int c = 0; c < channels; c += 16) {
        if (c + 16 > channels && c > 0) {
          columns(c, to, SomeLanes{0, channels - c});
        } else {  // the next pixel overwrites what is too much, and lines are longer than their pixels
          columns(c, to, AllLanes());
        }
      }
    }

    template <typename Lanes>
    void columns(int c, real* result, Lanes lanes) const {
      const int* const at = across.at;
      const real* const weight = across.weight;
      const real* const from = line + c;
      real* const to = result + c;
      const int pitch = channels;
      for (int i = seen.begin, e = across.begin[i]; i < seen.end; ++i) {
        const int next = across.begin[i + 1];
        Pack<16, real> v, other;
        get(from + int64_t{at[e]} * pitch, lanes, v), v.scaled(weight[e], v);
        if (++e < next) {
          get(from + int64_t{at[e]} * pitch, lanes, other), v.add_scaled(weight[e], other);
          ++e;
        }
        put(to + int64_t{i} * pitch, lanes, v);
      }
    }
  };

  Sampled sample(const core::PixelMap& map, int n, int k, int top, int bottom) {
    const int width = p_.anchor.width, height = bottom - top;
    const Map& view = p_.view[k];
    Scratch& s = scratch_.clear();
    Sampled v{Axis<real>(s, width, 2 * width),
              Axis<real>(s, height, 2 * height),
              {0, 0},
              {view.width, 0},
              image(view, n),
              &view,
              line(view.width),
              {line(width), line(width)},
              {-1, -1},
              std::fabs(map.yj) < 1,
              p_.channels};
    v.across.sample(0, width, view.width, map.left, map.right, map.xi, map.x0);
    v.rows.sample(top, height, view.height, map.top, map.bottom, map.yj, map.y0);
    v.seen = inside(v.across);
    for (int e = 0; e < v.across.begin[width]; ++e) {
      v.reads.begin = std::min(v.reads.begin, v.across.at[e]);
      v.reads.end = std::max(v.reads.end, v.across.at[e] + 1);
    }
    return v;
  }
};

}  // namespace
}  // namespace equifast::cpu
