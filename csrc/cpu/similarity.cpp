// Cosine similarity, one per image, of features and of those of K views warped back, forward and backward.
// Warped features exist in registers only. Gradients gather: a task owns the pixels that it writes, and goes
// through the positions that read them. Compiled once per instruction set.
#include <new>
#include <optional>

#include "../core/cosine.h"
#include "level.h"
#include "panels.h"

namespace equifast::cpu::EQUIFAST_ISA {
namespace {

using core::Cosine;
using core::PixelMap;
using core::Products;

// Where the positions of the anchor lie in view k of image n.
inline PixelMap map_back(const SimilarityParams& p, int n, int k) {
  return {core::invert(theta_of(p.theta, p.images, k, n)), double(p.anchor.width), double(p.anchor.height),
          double(p.view[k].width), double(p.view[k].height)};
}

template <typename T>
const T* image_of(const Map& map, int n, int channel) {
  return static_cast<const T*>(map.data) + n * map.sn + channel * map.sc;
}

template <typename T>
T* image_of(const Gradient& map, int n, int channel) {
  return static_cast<T*>(map.data) + n * map.sn + channel * map.sc;
}

inline Rect rows_of(const Map& map, int band, int rows) {
  const int top = band * rows;
  return {0, map.width, top, top + rows < map.height ? top + rows : map.height};
}

// Calls work(rectangle) on pieces of columns and, where it declines, on their halves.
template <typename Work>
void visit(const Rect& r, const Work& work) {
  if (work(r)) return;
  Rect first, second;
  halve(r, first, second);
  visit(first, work), visit(second, work);
}

// Calls work on the tiles of a band.
template <typename Work>
void visit_band(const Rect& band, int rows, const Work& work) {
  const int columns = parts(band.width(), parts(band.width(), tile_columns));  // of about one width
  for (int top = band.top; top < band.bottom; top += rows) {
    const int bottom = top + rows < band.bottom ? top + rows : band.bottom;
    for (int left = band.left; left < band.right; left += columns) {
      visit({left, left + columns < band.right ? left + columns : band.right, top, bottom}, work);
    }
  }
}

// Calls work(lanes, first channel, number of channels) on blocks of [first, last).
template <typename Work>
void visit_channels(int first, int last, const Work& work) {
  for (int c = first, count; c < last; c += count) {
    const int lanes = lanes_for(last - c);
    count = lanes < last - c ? lanes : last - c;
    switch (lanes) {
      case 24:
        work(std::integral_constant<int, 24>(), c, count);
        break;
      case 20:
        work(std::integral_constant<int, 20>(), c, count);
        break;
      case 16:
        work(std::integral_constant<int, 16>(), c, count);
        break;
      case 8:
        work(std::integral_constant<int, 8>(), c, count);
        break;
      default:
        work(std::integral_constant<int, 4>(), c, count);
    }
  }
}

// The pixel whose upper left tap is at `tap` of a panel of `pitch` pixels a row.
template <int lanes, typename real>
inline void sample(const real* tap, int64_t pitch, real fx, real fy, Pack<lanes, real>& v) {
  Pack<lanes, real> a, b, c, d, low, high;
  a.get(tap), b.get(tap + lanes), c.get(tap + pitch), d.get(tap + pitch + lanes);
  low.between(fx, a, b), high.between(fx, c, d), v.between(fy, low, high);
}

template <int lanes, typename real>
inline void add(real* to, const Pack<lanes, real>& v) {
  Pack<lanes, real> sum;
  sum.get(to), sum.add(v), sum.put(to);
}

template <int lanes, typename real>  // const or not
real* at(real* panel, const Rect& of, int column, int row) {
  return panel + (int64_t{row - of.top} * of.width() + (column - of.left)) * lanes;
}

// The sums over the positions of a rectangle of the anchor. Along a row in `real`, beyond in double.
template <int lanes, typename real>
void add_products(const Geometry<real>& g, const Rect& anchor, const real* panel0, const real* panel1,
                  double* out) {
  const int64_t pitch = int64_t{g.window.width()} * lanes;
  for (int s = 0; s < g.spans; ++s) {
    const auto& span = g.span[s];
    const real* f0 = at<lanes>(panel0, anchor, span.begin, span.row);
    Sums<lanes, real> sums;
    Pack<lanes, real> v0, v1;
    for (int i = span.first; i < span.first + span.end - span.begin; ++i, f0 += lanes) {
      v0.get(f0);
      sample(panel1 + int64_t{g.offset[i]} * lanes, pitch, g.fx[i], g.fy[i], v1);
      sums.add(v0, v1);
    }
    sums.give(out);
  }
}

// Some positions of a row of the anchor, straight from memory: 16 channels of a pixel lie there as in a
// vector.
template <typename T>
struct Direct {
  using real = Real<T>;
  static constexpr int most = 64;
  int channel, row, column, count;
  const T* view;                  // at that channel
  const int *tap, *right, *down;  // elements
  const real *fx, *fy;

  template <typename Lanes>
  EQUIFAST_INLINE inline void sample(int l, Lanes lanes, Pack<16, real>& v) const {
    Pack<16, real> a, b, low, high;
    const T* from = view + tap[l];
    get(from, lanes, a), get(from + right[l], lanes, b), low.between(fx[l], a, b);
    from += down[l];
    get(from, lanes, a), get(from + right[l], lanes, b), high.between(fx[l], a, b);
    v.between(fy[l], low, high);
  }
};

// Calls work on the positions of a view in rows [top, bottom) of the anchor and channels [first, last), where
// these are interleaved, 64 at a time. What positions read is known long before it is used: numbers that were
// stored as vectors just now are slow to read one by one.
template <typename T, typename Work>
EQUIFAST_INLINE inline void visit_directly(const SimilarityParams& p, int n, int k, const PixelMap& map,
                                           int top, int bottom, int first, int last, const Work& work) {
  using real = Real<T>;
  const Map &anchor = p.anchor, &view = p.view[k];
  constexpr int most = 1024, some = Direct<T>::most;  // positions that are known; that are worked on
  Positions at;
  int tap[most], right[most], down[most];  // elements
  real fx[most], fy[most];
  const int step = static_cast<int>(view.sx), row = static_cast<int>(view.sy);
  const int width = view.width, height = view.height;
  for (int j = top; j < bottom; ++j) {
    Range c{0, anchor.width};
    inside(map, j, c.begin, c.end);
    for (int begin = c.begin; begin < c.end; begin += most) {
      const int known = begin + most < c.end ? most : c.end - begin;
      for (int i = 0; i < known; i += Positions::most) {
        const int count = i + Positions::most < known ? Positions::most : known - i;
        at.look(map, j, begin + i, count);
#pragma omp simd
        for (int l = 0; l < count; ++l) {
          const auto x = core::tap<real>(at.x[l], width);
          const auto y = core::tap<real>(at.y[l], height);
          tap[i + l] = y.low * row + x.low * step;
          right[i + l] = (x.high - x.low) * step, down[i + l] = (y.high - y.low) * row;
          fx[i + l] = x.fraction, fy[i + l] = y.fraction;
        }
      }
      for (int channel = first; channel < last; channel += 16) {
        for (int i = 0; i < known; i += some) {
          work(Direct<T>{channel, j, begin + i, i + some < known ? some : known - i,
                         image_of<T>(view, n, channel), tap + i, right + i, down + i, fx + i, fy + i});
        }
      }
    }
  }
}

// The sums over such positions; 64 at a time in float32.
template <typename T>
void add_products_directly(const SimilarityParams& p, int n, int k, const PixelMap& map, int top, int bottom,
                           int first, int last, double* out) {
  using real = Real<T>;
  const Map& anchor = p.anchor;
  visit_directly<T>(p, n, k, map, top, bottom, first, last, [&](const Direct<T>& d) EQUIFAST_INLINE {
    const T* f0 = image_of<T>(anchor, n, d.channel) + d.row * anchor.sy + d.column * anchor.sx;
    Sums<16, real> sums;
    with_lanes(0, last - d.channel, [&](auto lanes) EQUIFAST_INLINE {
      for (int l = 0; l < d.count; ++l, f0 += anchor.sx) {
        Pack<16, real> v0, v1;
        __builtin_prefetch(f0 + prefetched);
        d.sample(l, lanes, v1), get(f0, lanes, v0);
        sums.add(v0, v1);
      }
    });
    sums.give(out);
  });
}

// What all views read at a tile of the anchor, and the features there.
template <typename T>
class Tile {
 public:
  using real = Real<T>;

  static constexpr int64_t scratch(int views, int channels) {
    return views * (Geometry<real>::scratch(tile_positions) + Scratch::bytes<Geometry<real>>(1)) +
           lines_scratch<real>() + Scratch::bytes<real>(tile_positions * most_lanes(channels)) +
           Scratch::bytes<real>(most_window);
  }

  Tile(const SimilarityParams& p, Scratch& s)
      : p_(p),
        seen_(s.take<Geometry<real>>(p.views)),
        lines_(s.take<real>(4 * most_line)),
        panel0_(s.take<real>(tile_positions * most_lanes(p.channels))),
        panel1_(s.take<real>(most_window)) {
    for (int k = 0; k < p.views; ++k) new (seen_ + k) Geometry<real>(s, tile_positions);
  }

  // Looks at those views of image n for which seen(k); false where a view's window is too large.
  template <typename Seen>
  bool look(int n, const Rect& r, const Seen& seen) {
    const int most_pixels = most_window / most_lanes(p_.channels);
    for (int k = 0; k < p_.views; ++k) {
      const Map& view = p_.view[k];
      if (!seen(k)) {
        seen_[k].forget();
      } else if (!seen_[k].look(map_back(p_, n, k), r, view.width, view.height, most_pixels)) {
        return false;
      }
    }
    return true;
  }

  // Calls begin(lanes, first channel, number of channels, lines), then work(lanes, k, geometry, panel of the
  // anchor, panel of the view) for the views that see the tile, then end as begin, by blocks of channels.
  template <typename Begin, typename Work, typename End>
  void visit_views(int n, const Rect& r, int first, int last, const Begin& begin, const Work& work,
                   const End& end) {
    visit_channels(first, last, [&](auto lanes, int c, int count) {
      load_panel<lanes>(p_.anchor, image_of<T>(p_.anchor, n, c), count, p_.interleaved, r, nullptr, panel0_,
                        lines_);
      begin(lanes, c, count, lines_);
      for (int k = 0; k < p_.views; ++k) {
        const Geometry<real>& g = seen_[k];
        if (g.spans == 0) continue;
        const Map& view = p_.view[k];
        load_panel<lanes>(view, image_of<T>(view, n, c), count, p_.interleaved, g.window, g.columns, panel1_,
                          lines_);
        work(lanes, k, g, panel0_, panel1_);
      }
      end(lanes, c, count, lines_);
    });
  }

 private:
  const SimilarityParams& p_;
  Geometry<real>* seen_;  // by view
  real *lines_, *panel0_, *panel1_;
};

// How many views of an image do not go by rows, of interleaved maps.
template <typename T>
int turned(const SimilarityParams& p, int n) {
  int count = 0;
  for (int k = 0; k < p.views; ++k) count += !LevelPixels<T>::serves(p, map_back(p, n, k), k);
  return count;
}

// Task: of an image, some rows of the anchor in a group of channels, with all views that go by panels, or a
// single one of these straight from memory; or some channels with those whose planes go by rows.
template <typename T>
void run_similarity(const SimilarityParams& p, int64_t begin, int64_t end) {
  using real = Real<T>;
  const int64_t panels_need = Tile<T>::scratch(p.views, p.channels);
  Scratch scratch(panels_need > level_scratch ? panels_need : level_scratch);
  const int blocks = similarity_blocks(p), panels = similarity_panel_blocks(p),
            bands = parts(p.anchor.height, similarity_anchor_rows);
  std::optional<Tile<T>> tile;  // until rows need the memory
  for (int64_t task = begin; task < end; ++task) {
    const int n = static_cast<int>(task / blocks), block = static_cast<int>(task % blocks);
    const bool by_rows = block >= panels;
    const Rect band = rows_of(p.anchor, block % bands, similarity_anchor_rows);
    const bool direct =
        wide<T> && p.interleaved && turned<T>(p, n) == 1;  // several share a panel of the anchor
    const auto mine = [&](int k) {
      const PixelMap map = map_back(p, n, k);
      return !direct && LevelPlanes<T>::serves(p, map, k) == by_rows && !LevelPixels<T>::serves(p, map, k);
    };
    const auto sums = [&](int k) { return p.partial + ((int64_t{n} * p.views + k) * blocks + block) * 3; };
    const int group = by_rows ? block - panels : block / bands;
    const int some = by_rows ? similarity_level_channels(p) : similarity_group, first = group * some;
    const int last = first + some < p.channels ? first + some : p.channels;
    bool any = false;
    for (int k = 0; k < p.views; ++k) {
      std::memset(sums(k), 0, 3 * sizeof(double));
      const PixelMap map = map_back(p, n, k);
      if (LevelPixels<T>::serves(p, map, k)) {
        tile.reset();
        LevelPixels<T>(p, scratch).add_products(n, k, map, band.top, band.bottom, sums(k));
      } else if (direct) {
        add_products_directly<T>(p, n, k, map, band.top, band.bottom, first, last, sums(k));
      }
      if (!mine(k)) continue;
      any = true;
      if (by_rows) tile.reset(), LevelPlanes<T>(p, scratch).add_products(n, k, map, first, last, sums(k));
    }
    if (by_rows || !any) continue;
    if (!tile) tile.emplace(p, scratch.clear());
    visit_band(band, tile_rows, [&](const Rect& r) {
      if (!tile->look(n, r, mine)) return false;
      tile->visit_views(
          n, r, first, last, [](auto, int, int, real*) {},
          [&](auto lanes, int k, const Geometry<real>& g, const real* panel0, const real* panel1) {
            add_products<lanes>(g, r, panel0, panel1, sums(k));
          },
          [](auto, int, int, real*) {});
      return true;
    });
  }
}

// The derivative of the objective by the similarity of (n, k), times that of the similarity by its vectors.
template <typename real>
struct Weights {
  real cross, own0, own1;
  Weights(const SimilarityParams& p, int n, int k) {
    const int64_t i = int64_t{n} * p.views + k;
    const Cosine<double> c =
        core::cosine(Products<double>{p.sums[i * 3], p.sums[i * 3 + 1], p.sums[i * 3 + 2]});
    const double u = p.upstream[i];
    cross = real(c.cross * u), own0 = real(c.own0 * u), own1 = real(c.own1 * u);
  }
  bool zero() const { return cross == 0 && own0 == 0 && own1 == 0; }
};

template <int lanes, typename real>
void add_to_anchor(const Geometry<real>& g, const Rect& anchor, const Weights<real>& w, const real* panel0,
                   const real* panel1, real* gradient) {
  const int64_t pitch = int64_t{g.window.width()} * lanes;
  for (int s = 0; s < g.spans; ++s) {
    const auto& span = g.span[s];
    int64_t from = at<lanes>(panel0, anchor, span.begin, span.row) - panel0;
    Pack<lanes, real> v0, v1, slope;
    for (int i = span.first; i < span.first + span.end - span.begin; ++i, from += lanes) {
      v0.get(panel0 + from);
      sample(panel1 + int64_t{g.offset[i]} * lanes, pitch, g.fx[i], g.fy[i], v1);
      slope.combine(w.cross, v1, w.own0, v0);
      add(gradient + from, slope);
    }
  }
}

// What positions give to their four taps, added up in registers as long as the next position reads some of
// the same: an addition in memory waits for the one before it.
template <int lanes, typename real>
class Scatter {
 public:
  Scatter(real* gradient, int64_t pitch, int first) : pitch_(pitch), at_(first), gradient_(gradient) {
    a_.zero(), b_.zero(), c_.zero(), d_.zero();
  }

  void add(int tap, real fx, real fy, const Pack<lanes, real>& v) {
    if (tap != at_) move(tap);
    Pack<lanes, real> low, high, part;
    high.scaled(fy, v), low = v, low.subtract(high);
    part.scaled(fx, low), b_.add(part), low.subtract(part), a_.add(low);
    part.scaled(fx, high), d_.add(part), high.subtract(part), c_.add(high);
  }

  void flush() { flush_left(), flush_right(); }

 private:
  const int64_t pitch_;
  int at_;  // the upper left tap, pixels
  real* gradient_;
  Pack<lanes, real> a_, b_, c_, d_;  // upper left and right, lower left and right

  void flush_left() {
    real* to = gradient_ + int64_t{at_} * lanes;
    EQUIFAST_ISA::add(to, a_), EQUIFAST_ISA::add(to + pitch_, c_);
  }
  void flush_right() {
    real* to = gradient_ + int64_t{at_} * lanes + lanes;
    EQUIFAST_ISA::add(to, b_), EQUIFAST_ISA::add(to + pitch_, d_);
  }
  void move(int tap) {
    if (tap == at_ + 1) {
      flush_left();
      a_ = b_, c_ = d_, b_.zero(), d_.zero();
    } else if (tap == at_ - 1) {
      flush_right();
      b_ = a_, d_ = c_, a_.zero(), c_.zero();
    } else {
      flush();
      a_.zero(), b_.zero(), c_.zero(), d_.zero();
    }
    at_ = tap;
  }
};

// Of planar maps that are small enough: whole views that rows do not serve, in panels of eight lanes. A view
// is sampled once for both gradients, and the anchor's features pass by row by row.
template <typename T>
class WholePlanes {
 public:
  using real = Real<T>;

  WholePlanes(const SimilarityParams& p, Scratch& s) : p_(p), scratch_(s) {}

  // The anchor's gradient is added up over the views in its own dtype.
  static bool serves(const SimilarityParams& p, int k) {
    if (p.interleaved || !std::is_same<T, real>::value || similarity_whole(p)) return false;
    const Map &anchor = p.anchor, &view = p.view[k];
    if (anchor.height > most_rows || anchor.width > most_line || view.width + 2 > most_line) return false;
    const int64_t positions = int64_t{anchor.height} * anchor.width, pixels = pixels_of(view);
    if (positions > level_scratch || pixels > level_scratch) return false;  // and the sum overflows
    return Geometry<real>::scratch(static_cast<int>(positions)) + lines_scratch<real>() +
               2 * Scratch::bytes<real>(pixels * lanes) + 2 * Scratch::bytes<real>(anchor.width * lanes) <=
           level_scratch;
  }

  // The gradient of channels [first, last) of a view; adds what they give to that of the anchor.
  void add_gradients(int n, int k, const PixelMap& map, const Weights<real>& w, int first, int last) {
    const Map &anchor = p_.anchor, &view = p_.view[k];
    Scratch& s = scratch_.clear();
    Geometry<real> g(s, anchor.height * anchor.width);
    const Rect all{0, view.width, 0, view.height};
    g.look_at(all, map, {0, anchor.width, 0, anchor.height}, view.width, view.height);
    const int64_t size = pixels_of(view) * lanes;
    real *lines = s.take<real>(4 * most_line), *panel = s.take<real>(size), *gradient = s.take<real>(size),
         *row = s.take<real>(anchor.width * lanes), *own = s.take<real>(anchor.width * lanes);
    const Gradient &to = p_.view_gradient[k], &to_own = p_.anchor_gradient;
    for (int c = first; c < last; c += lanes) {
      const int count = last - c < lanes ? last - c : lanes;
      load_panel<lanes>(view, image_of<T>(view, n, c), count, false, g.window, nullptr, panel, lines);
      std::memset(gradient, 0, sizeof(real) * std::size_t(size));
      for (int i = 0; i < g.spans; ++i) {
        const auto& span = g.span[i];
        const Rect r{span.begin, span.end, span.row, span.row + 1};
        load_panel<lanes>(anchor, image_of<T>(anchor, n, c), count, false, r, nullptr, row, lines);
        add_row(g, span, w, row, panel, gradient, own);
        add_to_row(own, r.width(), count, image_of<T>(to_own, n, c) + span.row * to_own.sy + span.begin,
                   to_own.sc);
      }
      fold_border<lanes>(g.window, view.width, view.height, gradient);
      store_panel<lanes>(to, image_of<T>(to, n, c), count, false, g.window, all, gradient, lines);
    }
  }

 private:
  static constexpr int lanes = 8;
  const SimilarityParams& p_;
  Scratch& scratch_;

  static int64_t pixels_of(const Map& view) { return int64_t{view.height + 2} * (view.width + 2); }

  // Positions of a row, whose features are `row`: what they give to the view's gradient is added, the
  // anchor's is put into `own`.
  static void add_row(const Geometry<real>& g, const typename Geometry<real>::Span& span,
                      const Weights<real>& weights, const real* row, const real* panel, real* gradient,
                      real* own) {
    const int64_t pitch = int64_t{g.window.width()} * lanes;
    const int* const offset = g.offset + span.first;
    const real *const fx = g.fx + span.first, *const fy = g.fy + span.first;
    const Weights<real> w = weights;  // a copy: what is written could be these, as far as the compiler knows
    Scatter<lanes, real> scatter(gradient, pitch, offset[0]);
    Pack<lanes, real> v0, v1, slope;
    for (int i = 0; i < span.end - span.begin; ++i, row += lanes, own += lanes) {
      v0.get(row);
      sample(panel + int64_t{offset[i]} * lanes, pitch, fx[i], fy[i], v1);
      slope.combine(w.cross, v1, w.own0, v0), slope.put(own);
      slope.combine(w.cross, v0, w.own1, v1), scatter.add(offset[i], fx[i], fy[i], slope);
    }
    scatter.flush();
  }

  // Adds `columns` pixels of a panel to a row of planes.
  static void add_to_row(const real* from, int columns, int channels, T* to, int64_t sc) {
#if EQUIFAST_WIDE
    if constexpr (wide<T>) {
      for (int x = 0; x < columns; x += 16) {
        const int pixels = columns - x < 16 ? columns - x : 16;
        const __mmask16 mask = first_of_16(pixels);
        __m512 a[8];
        get_pixels(from + int64_t{x} * lanes, pixels, a);
        turn_to_channels(a);
        for (int i = 0; i < 8 && i < channels; ++i) {
          T* sum = to + i * sc + x;
          put_16(sum, pixels, _mm512_add_ps(load_16(sum, mask), a[i]));
        }
      }
      return;
    }
#endif
    for (int c = 0; c < channels; ++c) {
      T* sum = to + c * sc;
      for (int x = 0; x < columns; ++x) store(sum[x], load(sum[x]) + from[x * lanes + c]);
    }
  }
};

// Whether a view's gradients are added by channels of an image, after those of the panels.
template <typename T>
bool by_planes(const SimilarityParams& p, const PixelMap& map, int k) {
  if (p.view_gradient == nullptr) return false;
  return LevelPlanes<T>::serves_gradient(p, map, k) || WholePlanes<T>::serves(p, k);
}

// Whether no view of an image is left to panels.
template <typename T>
bool all_by_planes(const SimilarityParams& p, int n) {
  for (int k = 0; k < p.views; ++k) {
    if (!by_planes<T>(p, map_back(p, n, k), k)) return false;
  }
  return true;
}

// Some rows of the anchor's gradient: the sum over the views that go by panels.
template <typename T>
class AnchorGradient {
 public:
  using real = Real<T>;

  static constexpr int64_t scratch(int views, int channels) {
    return Tile<T>::scratch(views, channels) + Scratch::bytes<real>(tile_positions * most_lanes(channels));
  }

  AnchorGradient(const SimilarityParams& p, Scratch& s)
      : p_(p), tile_(p, s), gradient_(s.take<real>(tile_positions * most_lanes(p.channels))) {}

  // Band `band` of image n, channels [first, last).
  void run(int n, int band, int first, int last) {
    if (all_by_planes<T>(p_, n)) return;
    const Gradient& to = p_.anchor_gradient;
    const auto seen = [&](int k) {
      return !Weights<real>(p_, n, k).zero() && !by_planes<T>(p_, map_back(p_, n, k), k);
    };
    visit_band(rows_of(p_.anchor, band, similarity_anchor_rows), tile_rows, [&](const Rect& r) {
      if (!tile_.look(n, r, seen)) return false;
      tile_.visit_views(
          n, r, first, last,
          [&](auto lanes, int, int, real*) {
            std::memset(gradient_, 0, sizeof(real) * std::size_t(r.area() * lanes));
          },
          [&](auto lanes, int k, const Geometry<real>& g, const real* panel0, const real* panel1) {
            add_to_anchor<lanes>(g, r, Weights<real>(p_, n, k), panel0, panel1, gradient_);
          },
          [&](auto lanes, int c, int count, real* lines) {
            store_panel<lanes>(to, image_of<T>(to, n, c), count, p_.interleaved, r, r, gradient_, lines);
          });
      return true;
    });
  }

 private:
  const SimilarityParams& p_;
  Tile<T> tile_;
  real* gradient_;
};

// The gradient of the anchor alone, where the channels of a pixel lie in memory as in a vector: each view's
// part is added to lines of numbers, and the sum over all views is written once.
template <typename T>
class TargetGradient {
 public:
  using real = Real<T>;

  explicit TargetGradient(const SimilarityParams& p)
      : p_(p), memory_(Scratch::bytes<real>(most_numbers)), scratch_(level_scratch) {
    lines_ = memory_.take<real>(most_numbers);
  }

  static bool serves(const SimilarityParams& p) {
    const int channels = p.channels < similarity_group ? p.channels : similarity_group;
    return maskable<T> && p.interleaved && int64_t{p.anchor.width} * channels <= most_numbers;
  }

  // Some rows of image n, channels [first, last).
  void run(int n, const Rect& band, int first, int last) {
    const int rows = static_cast<int>(most_numbers / line(first, last));
    for (int top = band.top; top < band.bottom; top += rows) {
      const int bottom = top + rows < band.bottom ? top + rows : band.bottom;
      std::memset(lines_, 0, sizeof(real) * std::size_t(line(first, last) * (bottom - top)));
      for (int k = 0; k < p_.views; ++k) {
        const Weights<real> w(p_, n, k);
        const PixelMap map = map_back(p_, n, k);
        if (w.zero()) continue;
        if (LevelPixels<T>::serves(p_, map, k)) {  // and all channels are in one group
          LevelPixels<T>(p_, scratch_).add_to_anchor(n, k, map, w.cross, w.own0, top, bottom, lines_);
        } else {
          add_directly(n, k, map, w, top, bottom, first, last);
        }
      }
      write(n, top, bottom, first, last);
    }
  }

 private:
  static constexpr int64_t most_numbers = 1 << 15;  // of some lines, what the cache next to the core holds
  const SimilarityParams& p_;
  Scratch memory_, scratch_;
  real* lines_;

  int64_t line(int first, int last) const { return int64_t{p_.anchor.width} * (last - first); }

  void add_directly(int n, int k, const PixelMap& map, const Weights<real>& weights, int top, int bottom,
                    int first, int last) {
    const Weights<real> w = weights;
    const Map& anchor = p_.anchor;
    const int pitch = last - first;
    visit_directly<T>(p_, n, k, map, top, bottom, first, last, [&](const Direct<T>& d) EQUIFAST_INLINE {
      const T* f0 = image_of<T>(anchor, n, d.channel) + d.row * anchor.sy + d.column * anchor.sx;
      real* to = lines_ + (d.row - top) * line(first, last) + int64_t{d.column} * pitch + d.channel - first;
      if (pitch == p_.channels && pitch <= 16) {
        combine_line(d, w, f0, to, pitch);
        return;
      }
      with_lanes(0, last - d.channel, [&](auto lanes) EQUIFAST_INLINE {
        for (int l = 0; l < d.count; ++l, f0 += anchor.sx, to += pitch) {
          Pack<16, real> v0, v1, part, total;
          __builtin_prefetch(f0 + prefetched);
          d.sample(l, lanes, v1), get(f0, lanes, v0), get(to, lanes, total);
          part.combine(w.cross, v1, w.own0, v0), total.add(part), put(to, lanes, total);
        }
      });
    });
  }

  // Of all channels: pixels follow each other without a gap, and are combined as one line of numbers. Where
  // pixel by pixel the sums were read again, each would wait for the masked store before it.
  static void combine_line(const Direct<T>& d, const Weights<real>& w, const T* f0, real* to, int channels) {
    real sampled[(Direct<T>::most + 1) * 16];
    with_lanes(0, channels, [&](auto lanes) EQUIFAST_INLINE {
      for (int l = 0; l < d.count; ++l) {
        Pack<16, real> v1;
        d.sample(l, lanes, v1), put(sampled + l * channels, AllLanes(), v1);
      }
    });
    each_16(int64_t{d.count} * channels, [&](int64_t i, auto lanes) EQUIFAST_INLINE {
      Pack<16, real> v0, v1, part, total;
      __builtin_prefetch(f0 + i + prefetched);
      get(f0 + i, lanes, v0), get(sampled + i, lanes, v1), get(to + i, lanes, total);
      part.combine(w.cross, v1, w.own0, v0), total.add(part), put(to + i, lanes, total);
    });
  }

  void write(int n, int top, int bottom, int first, int last) {
    const Gradient& own = p_.anchor_gradient;
    const int channels = last - first;
    const bool whole = channels == p_.channels;  // a row is one line
    const int64_t piece = whole ? line(first, last) : channels;
    const real* from = lines_;
    for (int j = top; j < bottom; ++j) {
      T* to = image_of<T>(own, n, first) + j * own.sy;
      for (int x = 0; x < (whole ? 1 : p_.anchor.width); ++x, from += piece) {
        store_line(from, piece, to + x * own.sx);
      }
    }
  }

  static void store_line(const real* from, int64_t count, T* to) {
    each_16(count, [&](int64_t i, auto lanes) EQUIFAST_INLINE {
      Pack<16, real> v;
      __builtin_prefetch(to + i + prefetched, 1);
      get(from + i, lanes, v), put(to + i, lanes, v);
    });
  }

  // Calls work(i, lanes) on so many numbers, 16 at a time.
  template <typename Work>
  EQUIFAST_INLINE static inline void each_16(int64_t count, const Work& work) {
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) work(i, AllLanes());
    if (i < count) work(i, SomeLanes{0, static_cast<int>(count - i)});
  }
};

// What becomes of the gradients of the anchor's positions: left alone, put into a panel (its own may be), or
// added.
enum class Own { none, put, add };

template <int lanes, Own own, typename real>
void add_to_view(const Geometry<real>& g, const Rect& anchor, const Weights<real>& w, const real* panel0,
                 const real* panel1, real* gradient, real* own_gradient = nullptr) {
  const int64_t pitch = int64_t{g.window.width()} * lanes;
  for (int s = 0; s < g.spans; ++s) {
    const auto& span = g.span[s];
    int64_t from = at<lanes>(panel0, anchor, span.begin, span.row) - panel0;
    Scatter<lanes, real> scatter(gradient, pitch, g.offset[span.first]);
    Pack<lanes, real> v0, v1, slope;
    for (int i = span.first; i < span.first + span.end - span.begin; ++i, from += lanes) {
      v0.get(panel0 + from);
      sample(panel1 + int64_t{g.offset[i]} * lanes, pitch, g.fx[i], g.fy[i], v1);
      if constexpr (own != Own::none) slope.combine(w.cross, v1, w.own0, v0);
      if constexpr (own == Own::put) slope.put(own_gradient + from);
      if constexpr (own == Own::add) add(own_gradient + from, slope);
      slope.combine(w.cross, v0, w.own1, v1);
      scatter.add(g.offset[i], g.fx[i], g.fy[i], slope);
    }
    scatter.flush();
  }
}

// Some rows of the gradient of a view.
template <typename T>
class ViewGradient {
 public:
  using real = Real<T>;

  static constexpr int64_t scratch(int channels) {
    const int lanes = most_lanes(channels);
    return Geometry<real>::scratch(most_positions) + Scratch::bytes<Range>(most_rows) +
           lines_scratch<real>() + Scratch::bytes<real>(most_positions * lanes) +
           2 * Scratch::bytes<real>(halo * lanes);
  }

  ViewGradient(const SimilarityParams& p, Scratch& s)
      : p_(p),
        g_(s, most_positions),
        seen_(s.take<Range>(most_rows)),
        lines_(s.take<real>(4 * most_line)),
        panel0_(s.take<real>(most_positions * most_lanes(p.channels))),
        panel1_(s.take<real>(halo * most_lanes(p.channels))),
        gradient_(s.take<real>(halo * most_lanes(p.channels))) {}

  // Band `band` of view k of image n, channels [first, last).
  void run(int n, int k, int band, int first, int last) {
    const Map& view = p_.view[k];
    const Weights<real> w(p_, n, k);
    const PixelMap map = map_back(p_, n, k);
    if (by_planes<T>(p_, map, k)) return;
    const core::Preimage preimage(map, p_.anchor.width, p_.anchor.height);
    visit_band(rows_of(view, band, similarity_view_rows), halo_rows, [&](const Rect& r) {
      Rect readers{0, 0, 0, 0};
      if (!w.zero()) {
        const auto x0 = core::reach(r.left, view.width, map.left, map.right),
                   x1 = core::reach(r.right - 1, view.width, map.left, map.right),
                   y0 = core::reach(r.top, view.height, map.top, map.bottom),
                   y1 = core::reach(r.bottom - 1, view.height, map.top, map.bottom);
        const core::Box box = preimage.box({x0.low, x1.high}, {y0.low, y1.high});
        readers = {box.left, box.right, box.top, box.bottom};
      }
      if (!fits(readers, most_positions) && r.area() > 16) return false;
      add(n, k, map, w, r, readers, first, last);
      return true;
    });
  }

 private:
  const SimilarityParams& p_;
  Geometry<real> g_;
  Range* seen_;  // of each row of the positions, those that are needed
  real *lines_, *panel0_, *panel1_, *gradient_;

  // The pixels `r`, which are read by positions in `readers`.
  void add(int n, int k, const PixelMap& map, const Weights<real>& w, const Rect& r, const Rect& readers,
           int first, int last) {
    const Map& view = p_.view[k];
    const Rect window{r.left - 1, r.right + 1, r.top - 1, r.bottom + 1};
    // Few readers, as a rule, and seen once for all channels; many (a view that all but vanishes) part by
    // part.
    const bool once = fits(readers, most_positions);
    if (once) see(map, readers, view, r);
    visit_channels(first, last, [&](auto lanes, int c, int count) {
      std::memset(gradient_, 0, sizeof(real) * std::size_t(window.area() * lanes));
      if (!once || g_.spans > 0) {
        load_panel<lanes>(view, image_of<T>(view, n, c), count, p_.interleaved, window, nullptr, panel1_,
                          lines_);
      }
      visit(readers, [&](const Rect& part) {
        if (!fits(part, most_positions)) return false;
        if (!once) see(map, part, view, r);
        if (g_.spans == 0) return true;
        if constexpr (wide<T> && lanes == 16) {
          if (p_.views == 1 && p_.interleaved && p_.channels <= 16) {  // more: pixels too far apart
            if (p_.add) {
              add_directly<true>(n, c, count, w, r);
            } else {
              add_directly<false>(n, c, count, w, r);
            }
            return true;
          }
        }
        load_panel<lanes>(p_.anchor, image_of<T>(p_.anchor, n, c), count, p_.interleaved, part, seen_,
                          panel0_, lines_);
        if (p_.views > 1) {
          add_to_view<lanes, Own::none>(g_, part, w, panel0_, panel1_, gradient_);
          return true;
        }
        add_to_view<lanes, Own::put>(g_, part, w, panel0_, panel1_, gradient_, panel0_);
        const Gradient& to = p_.anchor_gradient;
        for (int s = 0; s < g_.spans; ++s) {
          const Range mine = owned(s, r);
          const Rect row{mine.begin, mine.end, g_.span[s].row, g_.span[s].row + 1};
          if (p_.add) {
            add_row<lanes>(image_of<T>(to, n, c), count, part, row);
          } else {
            store_panel<lanes>(to, image_of<T>(to, n, c), count, p_.interleaved, part, row, panel0_, lines_);
          }
        }
        return true;
      });
      fold_border<lanes>(window, view.width, view.height, gradient_);
      const Gradient& to = p_.view_gradient[k];
      store_panel<lanes>(to, image_of<T>(to, n, c), count, p_.interleaved, window, r, gradient_, lines_);
    });
  }

  // As add_to_view of a single view, where the channels of a pixel lie in memory as in a vector: no panel of
  // the anchor or of its gradient. Where `adds`, to what that gradient holds.
  template <bool adds>
  void add_directly(int n, int c, int count, const Weights<real>& weights, const Rect& r) {
    const Weights<real> w = weights;
    const Gradient& own = p_.anchor_gradient;
    const int64_t pitch = int64_t{g_.window.width()} * 16, step = p_.anchor.sx, own_step = own.sx;
    const SomeLanes lanes{0, count};
    constexpr int rows_ahead = 2;  // pieces of rows are too short for the hardware to see a stream
    const int64_t ahead = rows_ahead * p_.anchor.sy, own_ahead = rows_ahead * own.sy;
    for (int s = 0; s < g_.spans; ++s) {
      const auto& span = g_.span[s];
      const Range mine = owned(s, r);
      const T* f0 = image_of<T>(p_.anchor, n, c) + span.row * p_.anchor.sy + span.begin * step;
      T* to = image_of<T>(own, n, c) + span.row * own.sy + span.begin * own_step;
      const int* const offset = g_.offset + span.first;
      const real *const fx = g_.fx + span.first, *const fy = g_.fy + span.first;
      const int positions = span.end - span.begin, from = mine.begin - span.begin,
                until = mine.end - span.begin;
      Scatter<16, real> scatter(gradient_, pitch, offset[0]);
      Pack<16, real> v0, v1, slope, total;
      for (int i = 0; i < positions; ++i, f0 += step, to += own_step) {
        __builtin_prefetch(f0 + ahead), __builtin_prefetch(to + own_ahead, 1);
        get(f0, lanes, v0);
        sample(panel1_ + int64_t{offset[i]} * 16, pitch, fx[i], fy[i], v1);
        if (i >= from && i < until) {
          slope.combine(w.cross, v1, w.own0, v0);
          if constexpr (adds) get(to, lanes, total), slope.add(total);
          put(to, lanes, slope);
        }
        slope.combine(w.cross, v0, w.own1, v1);
        scatter.add(offset[i], fx[i], fy[i], slope);
      }
      scatter.flush();
    }
  }

  // Adds a row of `panel0_`, which is of the positions `part`, to the anchor's gradient.
  template <int lanes>
  void add_row(T* image, int channels, const Rect& part, const Rect& row) {
    constexpr int some = 64;
    const Gradient& to = p_.anchor_gradient;
    const Map held{image, to.sn, to.sc, to.sy, p_.anchor.height, p_.anchor.width, to.sx};
    real sums[some * lanes];
    for (int x = row.left; x < row.right; x += some) {
      const Rect r{x, x + some < row.right ? x + some : row.right, row.top, row.bottom};
      load_panel<lanes>(held, image, channels, p_.interleaved, r, nullptr, sums, lines_);
      const real* more = at<lanes>(panel0_, part, x, row.top);
      for (int i = 0; i < r.width() * lanes; ++i) sums[i] += more[i];
      store_panel<lanes>(to, image, channels, p_.interleaved, r, r, sums, lines_);
    }
  }

  // Of the positions of a span those whose first tap is among the pixels `r`; before the map's edge, its
  // border.
  Range owned(int s, const Rect& r) const {
    const auto& span = g_.span[s];
    const int pitch = g_.window.width(), *offset = g_.offset + span.first - span.begin;
    const auto mine = [&](int i) {
      const int x = g_.window.left + offset[i] % pitch, y = g_.window.top + offset[i] / pitch;
      return x < r.right && y < r.bottom && (x >= r.left || x < 0) && (y >= r.top || y < 0);
    };
    Range c{span.begin, span.end};  // coordinates grow along a row or shrink: what is left is in one piece
    while (c.begin < c.end && !mine(c.begin)) ++c.begin;
    while (c.begin < c.end && !mine(c.end - 1)) --c.end;
    return c;
  }

  void see(const PixelMap& map, const Rect& readers, const Map& view, const Rect& r) {
    g_.look_at(r, map, readers, view.width, view.height);
    for (int j = 0; j < readers.height(); ++j) seen_[j] = {0, 0};
    for (int s = 0; s < g_.spans; ++s) {
      seen_[g_.span[s].row - readers.top] = {g_.span[s].begin, g_.span[s].end};
    }
  }
};

// Both gradients of whole maps, small ones: what goes by panels of an image in a group of channels.
template <typename T>
class WholeGradient {
 public:
  using real = Real<T>;

  static constexpr int64_t scratch(int views, int channels) {
    const int lanes = most_lanes(channels);
    return views * (Geometry<real>::scratch(similarity_whole_anchor) + Scratch::bytes<Geometry<real>>(1)) +
           lines_scratch<real>() + 2 * Scratch::bytes<real>(similarity_whole_anchor * lanes) +
           2 * Scratch::bytes<real>(similarity_whole_view * lanes);
  }

  WholeGradient(const SimilarityParams& p, Scratch& s)
      : p_(p),
        seen_(s.take<Geometry<real>>(p.views)),
        lines_(s.take<real>(4 * most_line)),
        panel0_(s.take<real>(similarity_whole_anchor * most_lanes(p.channels))),
        gradient0_(s.take<real>(similarity_whole_anchor * most_lanes(p.channels))),
        panel1_(s.take<real>(similarity_whole_view * most_lanes(p.channels))),
        gradient1_(s.take<real>(similarity_whole_view * most_lanes(p.channels))) {
    for (int k = 0; k < p.views; ++k) new (seen_ + k) Geometry<real>(s, similarity_whole_anchor);
  }

  // Channels [first, last) of image n.
  void run(int n, int first, int last) {
    if (all_by_planes<T>(p_, n)) return;
    const Rect anchor = all_of(p_.anchor);
    for (int k = 0; k < p_.views; ++k) {
      const Map& view = p_.view[k];
      if (mine(n, k)) seen_[k].look_at(all_of(view), map_back(p_, n, k), anchor, view.width, view.height);
    }
    const Gradient& to = p_.anchor_gradient;
    visit_channels(first, last, [&](auto lanes, int c, int count) {
      load_panel<lanes>(p_.anchor, image_of<T>(p_.anchor, n, c), count, p_.interleaved, anchor, nullptr,
                        panel0_, lines_);
      std::memset(gradient0_, 0, sizeof(real) * std::size_t(anchor.area() * lanes));
      for (int k = 0; k < p_.views; ++k) {
        if (mine(n, k)) add<lanes>(n, k, c, count);
      }
      store_panel<lanes>(to, image_of<T>(to, n, c), count, p_.interleaved, anchor, anchor, gradient0_,
                         lines_);
    });
  }

 private:
  const SimilarityParams& p_;
  Geometry<real>* seen_;  // by view
  real *lines_, *panel0_, *gradient0_, *panel1_, *gradient1_;

  static Rect all_of(const Map& map) { return {0, map.width, 0, map.height}; }
  bool mine(int n, int k) const { return !by_planes<T>(p_, map_back(p_, n, k), k); }

  template <int lanes>
  void add(int n, int k, int c, int count) {
    const Map& view = p_.view[k];
    const Gradient& to = p_.view_gradient[k];
    const Rect all = all_of(view);
    const Geometry<real>& g = seen_[k];
    const Weights<real> w(p_, n, k);
    if (w.zero() || g.spans == 0) {
      std::memset(gradient1_, 0, sizeof(real) * std::size_t(all.area() * lanes));
    } else {
      load_panel<lanes>(view, image_of<T>(view, n, c), count, p_.interleaved, all, nullptr, gradient1_,
                        lines_);
      frame<lanes>(gradient1_, all, panel1_);
      std::memset(gradient1_, 0, sizeof(real) * std::size_t(g.window.area() * lanes));
      add_to_view<lanes, Own::add>(g, all_of(p_.anchor), w, panel0_, panel1_, gradient1_, gradient0_);
      fold_border<lanes>(g.window, view.width, view.height, gradient1_);
      for (int y = 0; y < view.height; ++y) {
        std::memmove(gradient1_ + int64_t{y} * view.width * lanes,
                     gradient1_ + (int64_t{y + 1} * g.window.width() + 1) * lanes,
                     sizeof(real) * std::size_t(view.width * lanes));
      }
    }
    store_panel<lanes>(to, image_of<T>(to, n, c), count, p_.interleaved, all, all, gradient1_, lines_);
  }
};

// With eight views panels take no more: at most, over the numbers of channels, with 24 lanes.
static_assert(AnchorGradient<float>::scratch(8, 24) <= level_scratch &&
                  ViewGradient<float>::scratch(24) <= level_scratch &&
                  WholeGradient<float>::scratch(8, 24) <= level_scratch,
              "similarity takes more scratch memory than it may");
static_assert(similarity_whole_rows <= most_rows, "a whole map has more rows than a panel");

template <typename T>
void run_backward(const SimilarityParams& p, int64_t begin, int64_t end) {
  const int groups = parts(p.channels, similarity_group);
  const auto last_of = [&](int group) {
    return (group + 1) * similarity_group < p.channels ? (group + 1) * similarity_group : p.channels;
  };
  if (p.view_gradient == nullptr) {
    std::optional<TargetGradient<T>> lines;
    if (TargetGradient<T>::serves(p)) lines.emplace(p);
    Scratch scratch(lines ? 64 : AnchorGradient<T>::scratch(p.views, p.channels));
    const int bands = parts(p.anchor.height, similarity_anchor_rows);
    for (int64_t task = begin; task < end; ++task) {
      const int band = static_cast<int>(task % bands), group = static_cast<int>(task / bands % groups),
                n = static_cast<int>(task / bands / groups);
      const int first = group * similarity_group, last = last_of(group);
      if (lines) {
        lines->run(n, rows_of(p.anchor, band, similarity_anchor_rows), first, last);
      } else {
        AnchorGradient<T>(p, scratch.clear()).run(n, band, first, last);
      }
    }
    return;
  }
  if (similarity_whole(p)) {
    Scratch scratch(WholeGradient<T>::scratch(p.views, p.channels));
    WholeGradient<T> whole(p, scratch);
    for (int64_t task = begin; task < end; ++task) {
      const int group = static_cast<int>(task % groups);
      whole.run(static_cast<int>(task / groups), group * similarity_group, last_of(group));
    }
    return;
  }
  const int64_t for_anchor = AnchorGradient<T>::scratch(p.views, p.channels),
                for_view = ViewGradient<T>::scratch(p.channels);
  const int64_t for_panels = for_anchor > for_view ? for_anchor : for_view;
  Scratch scratch(for_panels > level_scratch ? for_panels : level_scratch);
  const int bands = p.views == 1 ? 0 : parts(p.anchor.height, similarity_anchor_rows);
  const int64_t per_group = similarity_group_tasks(p);
  for (int64_t task = begin; task < end; ++task) {
    const int group = static_cast<int>(task / per_group % groups),
              n = static_cast<int>(task / per_group / groups);
    const int first = group * similarity_group, last = last_of(group);
    int band = static_cast<int>(task % per_group);
    if (band < bands) {
      AnchorGradient<T>(p, scratch.clear()).run(n, band, first, last);
      continue;
    }
    band -= bands;
    int k = 0;
    for (; band >= parts(p.view[k].height, similarity_view_rows); ++k)
      band -= parts(p.view[k].height, similarity_view_rows);
    const PixelMap map = map_back(p, n, k);
    if (!LevelPixels<T>::serves_gradient(p, map, k)) {
      ViewGradient<T>(p, scratch.clear()).run(n, k, band, first, last);
      continue;
    }
    const Rect rows = rows_of(p.view[k], band, similarity_view_rows);
    const Weights<Real<T>> w(p, n, k);
    if (w.zero()) {
      const Gradient& to = p.view_gradient[k];
      std::memset(image_of<T>(to, n, 0) + rows.top * to.sy, 0,
                  sizeof(T) * std::size_t(rows.height() * to.sy));
    } else {
      LevelPixels<T>(p, scratch).write_gradients(n, k, map, w.cross, w.own0, w.own1, rows.top, rows.bottom);
    }
  }
}

// After run_backward. Task: some channels of an image, with all views whose planes go by rows or whole.
template <typename T>
void run_backward_level(const SimilarityParams& p, int64_t begin, int64_t end) {
  if (p.interleaved) return;
  using real = Real<T>;
  Scratch scratch(level_scratch);
  LevelPlanes<T> level(p, scratch);
  WholePlanes<T> whole(p, scratch);
  const int some = similarity_level_channels(p), groups = similarity_level_groups(p);
  const Gradient& own = p.anchor_gradient;
  for (int64_t task = begin; task < end; ++task) {
    const int n = static_cast<int>(task / groups), first = static_cast<int>(task % groups) * some;
    const int last = first + some < p.channels ? first + some : p.channels;
    if (p.views > 1 && all_by_planes<T>(p, n)) {
      for (int c = first; c < last; ++c) {
        std::memset(image_of<T>(own, n, c), 0, sizeof(T) * std::size_t(own.sy * p.anchor.height));
      }
    }
    for (int k = 0; k < p.views; ++k) {
      const PixelMap map = map_back(p, n, k);
      if (!by_planes<T>(p, map, k)) continue;
      const Weights<real> w(p, n, k);
      if (w.zero()) {
        const Gradient& to = p.view_gradient[k];
        for (int c = first; c < last; ++c) {
          std::memset(image_of<T>(to, n, c), 0, sizeof(T) * std::size_t(to.sy * p.view[k].height));
        }
        continue;
      }
      if (LevelPlanes<T>::serves_gradient(p, map, k)) {
        level.add_gradients(n, k, map, w.cross, w.own0, w.own1, first, last);
      } else {
        whole.add_gradients(n, k, map, w, first, last);
      }
    }
  }
}

}  // namespace

void similarity(const SimilarityParams& p, int64_t begin, int64_t end) {
  dispatch(p.dtype, [&](auto zero) { run_similarity<decltype(zero)>(p, begin, end); });
}

void similarity_backward(const SimilarityParams& p, int64_t begin, int64_t end) {
  dispatch(p.dtype, [&](auto zero) { run_backward<decltype(zero)>(p, begin, end); });
}

void similarity_backward_level(const SimilarityParams& p, int64_t begin, int64_t end) {
  dispatch(p.dtype, [&](auto zero) { run_backward_level<decltype(zero)>(p, begin, end); });
}

}  // namespace equifast::cpu::EQUIFAST_ISA
