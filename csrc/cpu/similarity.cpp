// Cosine similarity, one per image, of features and of those of K views warped back, forward and backward.
// Warped features exist in registers only. Gradients gather: a task owns the pixels that it writes, and goes
// through the positions that read them. Compiled once per instruction set.
#include <new>

#include "../core/cosine.h"
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
  for (int c = first; c < last; c += most_lanes) {
    const int count = last - c < most_lanes ? last - c : most_lanes;
    switch (lanes_for(count)) {
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

// `lanes` numbers that are computed with at once. As a type of its own, since compilers unroll a loop over
// them before they think of vectors. Never passed by value: the calling convention depends on the instruction
// set.
template <int lanes, typename real>
struct Pack {
  typedef real type
      __attribute__((vector_size(lanes * sizeof(real))));  // an alias would not take the attribute
};

template <typename Vector, typename real>
inline void get(const real* from, Vector& v) {
  std::memcpy(&v, from, sizeof(v));
}
template <typename Vector, typename real>
inline void put(real* to, const Vector& v) {
  std::memcpy(to, &v, sizeof(v));
}

// Where position i has its taps in a panel.
struct Corners4 {
  int64_t o00, o01, o10, o11;
  template <typename real>
  Corners4(const Geometry<real>& g, int i, int lanes)
      : o00(int64_t{g.offset[i]} * lanes),
        o01(o00 + int64_t{g.right[i]} * lanes),
        o10(o00 + int64_t{g.down[i]} * lanes),
        o11(o10 + int64_t{g.right[i]} * lanes) {}
};

template <typename Vector, typename real>
inline void sample(const Geometry<real>& g, int i, const Corners4& c, const real* panel, Vector& v) {
  Vector a, b, d, e;
  get(panel + c.o00, a), get(panel + c.o01, b), get(panel + c.o10, d), get(panel + c.o11, e);
  v = (g.w00[i] * a + g.w01[i] * b) + (g.w10[i] * d + g.w11[i] * e);
}

template <typename Vector, typename real>
inline void add(real* to, real weight, const Vector& v) {
  Vector sum;
  get(to, sum);
  sum += weight * v;
  put(to, sum);
}

template <int lanes, typename real>
const real* at(const real* panel, const Rect& of, int column, int row) {
  return panel + (int64_t{row - of.top} * of.width() + (column - of.left)) * lanes;
}

// The sums over the positions of a rectangle of the anchor. Along a row in `real`, beyond in double.
template <int lanes, typename real>
void add_products(const Geometry<real>& g, const Rect& anchor, const real* panel0, const real* panel1,
                  double* out) {
  using Vector = typename Pack<lanes, real>::type;
  double total[3][lanes] = {};
  for (int s = 0; s < g.spans; ++s) {
    const auto& span = g.span[s];
    const real* f0 = at<lanes>(panel0, anchor, span.begin, span.row);
    Vector inner{}, square0{}, square1{};
    for (int i = span.first; i < span.first + span.end - span.begin; ++i, f0 += lanes) {
      Vector v0, v1;
      get(f0, v0);
      sample(g, i, Corners4(g, i, lanes), panel1, v1);
      inner += v0 * v1, square0 += v0 * v0, square1 += v1 * v1;
    }
    for (int l = 0; l < lanes; ++l) {
      total[0][l] += double(inner[l]), total[1][l] += double(square0[l]), total[2][l] += double(square1[l]);
    }
  }
  for (int i = 0; i < 3; ++i) {
    for (int l = 0; l < lanes; ++l) out[i] += total[i][l];
  }
}

template <typename T>
void run_similarity(const SimilarityParams& p, int64_t begin, int64_t end) {
  using real = Real<T>;
  Scratch scratch(Geometry<real>::scratch(tile_rows * tile_columns) + lines_scratch<real>() +
                  Scratch::bytes<real>((tile_rows * tile_columns + most_window) * most_lanes));
  Geometry<real> g(scratch, tile_rows * tile_columns);
  real* lines = scratch.take<real>(4 * most_window);
  real* panel0 = scratch.take<real>(tile_rows * tile_columns * most_lanes);
  real* panel1 = scratch.take<real>(most_window * most_lanes);
  const int blocks = similarity_blocks(p);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t pair = task / blocks;
    const int n = static_cast<int>(pair / p.views), k = static_cast<int>(pair % p.views);
    const Map& view = p.view[k];
    const PixelMap map = map_back(p, n, k);
    double* out = p.partial + task * 3;
    out[0] = out[1] = out[2] = 0;
    visit_band(
        rows_of(p.anchor, static_cast<int>(task % blocks), similarity_rows), tile_rows, [&](const Rect& r) {
          g.look(map, r, view.width, view.height);
          if (g.spans == 0) return true;
          if (g.window.area() > most_window && r.area() > 1) return false;
          g.finish();
          visit_channels(0, p.channels, [&](auto lanes, int c, int count) {
            load_panel<lanes>(p.anchor, image_of<T>(p.anchor, n, c), count, p.interleaved, r, panel0, lines);
            load_panel<lanes>(view, image_of<T>(view, n, c), count, p.interleaved, g.window, panel1, lines);
            add_products<lanes>(g, r, panel0, panel1, out);
          });
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
  using Vector = typename Pack<lanes, real>::type;
  for (int s = 0; s < g.spans; ++s) {
    const auto& span = g.span[s];
    int64_t from = at<lanes>(panel0, anchor, span.begin, span.row) - panel0;
    for (int i = span.first; i < span.first + span.end - span.begin; ++i, from += lanes) {
      Vector v0, v1, sum;
      get(panel0 + from, v0), get(gradient + from, sum);
      sample(g, i, Corners4(g, i, lanes), panel1, v1);
      sum += w.cross * v1 - w.own0 * v0;
      put(gradient + from, sum);
    }
  }
}

// Some rows of the anchor's gradient: the sum over the views.
template <typename T>
class AnchorGradient {
 public:
  using real = Real<T>;
  static constexpr int rows = tile_rows / 2;  // the views' geometries are kept together
  static constexpr int positions = rows * tile_columns;

  static int64_t scratch(const SimilarityParams& p) {
    return p.views * (Geometry<real>::scratch(positions) + Scratch::bytes<Geometry<real>>(1)) +
           Scratch::bytes<Geometry<real>>(p.views) + lines_scratch<real>() +
           Scratch::bytes<real>((2 * positions + most_window) * most_lanes);
  }

  AnchorGradient(const SimilarityParams& p, Scratch& s)
      : p_(p),
        seen_(s.take<Geometry<real>>(p.views)),
        lines_(s.take<real>(4 * most_window)),
        panel0_(s.take<real>(positions * most_lanes)),
        gradient_(s.take<real>(positions * most_lanes)),
        panel1_(s.take<real>(most_window * most_lanes)) {
    for (int k = 0; k < p.views; ++k) new (seen_ + k) Geometry<real>(s, positions);
  }

  // Band `band` of image n, channels [first, last).
  void run(int n, int band, int first, int last) {
    visit_band(rows_of(p_.anchor, band, similarity_anchor_rows), rows,
               [&](const Rect& r) { return add(n, r, first, last); });
  }

 private:
  const SimilarityParams& p_;
  Geometry<real>* seen_;  // by view
  real *lines_, *panel0_, *gradient_, *panel1_;

  bool add(int n, const Rect& r, int first, int last) {
    for (int k = 0; k < p_.views; ++k) {
      Geometry<real>& g = seen_[k];
      g.spans = 0;
      if (Weights<real>(p_, n, k).zero()) continue;
      g.look(map_back(p_, n, k), r, p_.view[k].width, p_.view[k].height);
      if (g.window.area() > most_window && r.area() > 1) return false;
      g.finish();
    }
    visit_channels(first, last, [&](auto lanes, int c, int count) {
      load_panel<lanes>(p_.anchor, image_of<T>(p_.anchor, n, c), count, p_.interleaved, r, panel0_, lines_);
      std::memset(gradient_, 0, sizeof(real) * std::size_t(r.area() * lanes));
      for (int k = 0; k < p_.views; ++k) {
        const Geometry<real>& g = seen_[k];
        if (g.spans == 0) continue;
        const Map& view = p_.view[k];
        load_panel<lanes>(view, image_of<T>(view, n, c), count, p_.interleaved, g.window, panel1_, lines_);
        add_to_anchor<lanes>(g, r, Weights<real>(p_, n, k), panel0_, panel1_, gradient_);
      }
      const Gradient& to = p_.anchor_gradient;
      store_panel<lanes>(to, image_of<T>(to, n, c), count, p_.interleaved, r, r, gradient_, lines_);
    });
    return true;
  }
};

template <int lanes, typename real>
void add_to_view(const Geometry<real>& g, const Rect& anchor, const Weights<real>& w, const real* panel0,
                 const real* panel1, real* gradient) {
  using Vector = typename Pack<lanes, real>::type;
  for (int s = 0; s < g.spans; ++s) {
    const auto& span = g.span[s];
    const real* f0 = at<lanes>(panel0, anchor, span.begin, span.row);
    for (int i = span.first; i < span.first + span.end - span.begin; ++i, f0 += lanes) {
      const Corners4 c(g, i, lanes);
      Vector v0, v1;
      get(f0, v0);
      sample(g, i, c, panel1, v1);
      const Vector slope = w.cross * v0 - w.own1 * v1;
      // one tap after the other: at the border two may be the same pixel
      add(gradient + c.o00, g.w00[i], slope), add(gradient + c.o01, g.w01[i], slope);
      add(gradient + c.o10, g.w10[i], slope), add(gradient + c.o11, g.w11[i], slope);
    }
  }
}

// Some rows of the gradient of a view.
template <typename T>
class ViewGradient {
 public:
  using real = Real<T>;

  static int64_t scratch() {
    return Geometry<real>::scratch(most_positions) + lines_scratch<real>() +
           Scratch::bytes<real>((most_positions + 2 * halo) * most_lanes);
  }

  ViewGradient(const SimilarityParams& p, Scratch& s)
      : p_(p),
        g_(s, most_positions),
        lines_(s.take<real>(4 * most_window)),
        panel0_(s.take<real>(most_positions * most_lanes)),
        panel1_(s.take<real>(halo * most_lanes)),
        gradient_(s.take<real>(halo * most_lanes)) {}

  // Band `band` of view k of image n, channels [first, last).
  void run(int n, int k, int band, int first, int last) {
    const Map& view = p_.view[k];
    const Weights<real> w(p_, n, k);
    const PixelMap map = map_back(p_, n, k);
    const core::Preimage preimage(map, p_.anchor.width, p_.anchor.height);
    visit_band(rows_of(view, band, similarity_rows), tile_rows, [&](const Rect& r) {
      Rect readers{0, 0, 0, 0};
      if (!w.zero()) {
        const auto x0 = core::reach(r.left, view.width, map.left, map.right),
                   x1 = core::reach(r.right - 1, view.width, map.left, map.right),
                   y0 = core::reach(r.top, view.height, map.top, map.bottom),
                   y1 = core::reach(r.bottom - 1, view.height, map.top, map.bottom);
        const core::Box box = preimage.box({x0.low, x1.high}, {y0.low, y1.high});
        readers = {box.left, box.right, box.top, box.bottom};
      }
      if (readers.area() > most_positions && r.area() > 16) return false;
      add(n, k, map, w, r, readers, first, last);
      return true;
    });
  }

 private:
  const SimilarityParams& p_;
  Geometry<real> g_;
  real *lines_, *panel0_, *panel1_, *gradient_;

  // The pixels `r`, which are read by positions in `readers`.
  void add(int n, int k, const PixelMap& map, const Weights<real>& w, const Rect& r, const Rect& readers,
           int first, int last) {
    const Map& view = p_.view[k];
    const Rect window = Geometry<real>::around(r, view.width, view.height);
    // Few readers, as a rule, and seen once for all channels; many (a view that all but vanishes) part by
    // part.
    const bool once = readers.area() <= most_positions;
    if (once) see(map, readers, view, r);
    visit_channels(first, last, [&](auto lanes, int c, int count) {
      std::memset(gradient_, 0, sizeof(real) * std::size_t(window.area() * lanes));
      if (!once || g_.spans > 0) {
        load_panel<lanes>(view, image_of<T>(view, n, c), count, p_.interleaved, window, panel1_, lines_);
      }
      visit(readers, [&](const Rect& part) {
        if (part.area() > most_positions) return false;
        if (!once) see(map, part, view, r);
        if (g_.spans == 0) return true;
        load_panel<lanes>(p_.anchor, image_of<T>(p_.anchor, n, c), count, p_.interleaved, part, panel0_,
                          lines_);
        add_to_view<lanes>(g_, part, w, panel0_, panel1_, gradient_);
        return true;
      });
      const Gradient& to = p_.view_gradient[k];
      store_panel<lanes>(to, image_of<T>(to, n, c), count, p_.interleaved, window, r, gradient_, lines_);
    });
  }

  void see(const PixelMap& map, const Rect& readers, const Map& view, const Rect& r) {
    g_.look(map, readers, view.width, view.height, &r);
    g_.finish();
  }
};

template <typename T>
void run_backward(const SimilarityParams& p, int64_t begin, int64_t end) {
  Scratch scratch(AnchorGradient<T>::scratch(p) + ViewGradient<T>::scratch());
  AnchorGradient<T> anchor(p, scratch);
  ViewGradient<T> view(p, scratch);
  const int groups = parts(p.channels, similarity_group),
            bands = parts(p.anchor.height, similarity_anchor_rows);
  const int64_t per_group = similarity_group_tasks(p);
  for (int64_t task = begin; task < end; ++task) {
    const int group = static_cast<int>(task / per_group % groups),
              n = static_cast<int>(task / per_group / groups);
    const int first = group * similarity_group;
    const int last = first + similarity_group < p.channels ? first + similarity_group : p.channels;
    int band = static_cast<int>(task % per_group);
    if (band < bands) {
      anchor.run(n, band, first, last);
      continue;
    }
    band -= bands;
    int k = 0;
    for (; band >= parts(p.view[k].height, similarity_rows); ++k)
      band -= parts(p.view[k].height, similarity_rows);
    view.run(n, k, band, first, last);
  }
}

}  // namespace

void similarity(const SimilarityParams& p, int64_t begin, int64_t end) {
  switch (p.dtype) {
    case Dtype::float32:
      return run_similarity<float>(p, begin, end);
    case Dtype::float64:
      return run_similarity<double>(p, begin, end);
    case Dtype::float16:
      return run_similarity<Half>(p, begin, end);
    case Dtype::bfloat16:
      return run_similarity<BFloat16>(p, begin, end);
  }
}

void similarity_backward(const SimilarityParams& p, int64_t begin, int64_t end) {
  switch (p.dtype) {
    case Dtype::float32:
      return run_backward<float>(p, begin, end);
    case Dtype::float64:
      return run_backward<double>(p, begin, end);
    case Dtype::float16:
      return run_backward<Half>(p, begin, end);
    case Dtype::bfloat16:
      return run_backward<BFloat16>(p, begin, end);
  }
}

}  // namespace equifast::cpu::EQUIFAST_ISA
