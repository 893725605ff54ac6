// Mean over positions of the cosine over channels, of features and of those of K views warped back, forward
// and backward. Warped features exist a row at a time only. Compiled once per instruction set.
#include "../core/cosine.h"
#include "rows.h"

namespace equifast::cpu::EQUIFAST_ISA {
namespace {

using core::Cosine;
using core::Products;

// A view's features at the positions of an anchor's row, and what it takes to compute them.
template <typename T>
class WarpedBack {
 public:
  using real = Real<T>;

  static int64_t scratch(const SimilarityParams& p) {
    int64_t widest = p.anchor.width;
    for (int k = 0; k < p.views; ++k) widest = widest > p.view[k].width ? widest : p.view[k].width;
    return Row<real>::scratch(p.anchor.width) + Scratch::bytes<real>(widest);
  }

  WarpedBack(const SimilarityParams& p, Scratch& s) : row(s, p.anchor.width), p_(p) {
    int64_t widest = p.anchor.width;
    for (int k = 0; k < p.views; ++k) widest = widest > p.view[k].width ? widest : p.view[k].width;
    line_ = s.take<real>(widest);
  }

  void aim(int n, int k) {
    view_ = &p_.view[k];
    image_ = static_cast<const T*>(view_->data) + n * view_->sn;
    const core::Theta inverse = core::invert(theta_of(p_.theta, p_.images, k, n));
    row.aim(inverse, p_.anchor.height, p_.anchor.width, view_->height, view_->width);
  }

  // Planar: channel c at the row's columns.
  void channel(int c, real* values) { gather(image_ + c * view_->sc, view_->sy, row, values, line_); }

  void add_channel(real* image, const Gradient& g, int c, const real* values) {
    scatter(image + c * g.sc, g.sy, row, values, line_);
  }

  // Interleaved: all channels at column i.
  void pixel(int i, real* values) {
    gather_pixel(image_, corners(row, i, view_->sy, view_->sx), p_.channels, values);
  }

  void add_pixel(real* image, const Gradient& g, int i, const real* values) {
    scatter_pixel(image, corners(row, i, g.sy, g.sx), p_.channels, values);
  }

  Row<real> row;

 private:
  const SimilarityParams& p_;
  const Map* view_ = nullptr;
  const T* image_ = nullptr;
  real* line_;
};

template <typename T>
const T* anchor_row(const SimilarityParams& p, int n, int c, int j) {
  return static_cast<const T*>(p.anchor.data) + n * p.anchor.sn + c * p.anchor.sc + j * p.anchor.sy;
}

// The sums over `count` neighbors in memory.
template <typename T, typename real>
inline Products<real> products(const T* __restrict f0, const real* __restrict f1, int count) {
  real inner = 0, square0 = 0, square1 = 0;
#pragma omp simd reduction(+ : inner, square0, square1)
  for (int i = 0; i < count; ++i) {
    const real a = load(f0[i]), b = f1[i];
    inner += a * b, square0 += a * a, square1 += b * b;
  }
  return {inner, square0, square1};
}

// The products at each of a row's columns, over channels. `values` holds a channel, or a pixel.
template <typename T>
void pixel_products(const SimilarityParams& p, WarpedBack<T>& view, int n, int j, Real<T>* values,
                    Products<Real<T>>* out) {
  using real = Real<T>;
  const int begin = view.row.begin, count = view.row.end - begin;
  if (p.interleaved) {
    const T* f0 = anchor_row<T>(p, n, 0, j) + begin * p.anchor.sx;
    for (int i = 0; i < count; ++i, f0 += p.anchor.sx) {
      view.pixel(begin + i, values);
      out[i] = products(f0, values, p.channels);
    }
    return;
  }
  for (int i = 0; i < count; ++i) out[i] = {0, 0, 0};
  for (int c = 0; c < p.channels; ++c) {
    view.channel(c, values);
    const T* __restrict f0 = anchor_row<T>(p, n, c, j) + begin;
    for (int i = 0; i < count; ++i) {
      const real a = load(f0[i]), b = values[i];
      out[i].inner += a * b, out[i].square0 += a * a, out[i].square1 += b * b;
    }
  }
}

// Sums of some rows of one (n, k): of the cosines, and of the positions. Within a row in `real`, beyond in
// double.
template <typename T>
void sums(const SimilarityParams& p, WarpedBack<T>& view, int n, int first, int last, Real<T>* values,
          Products<Real<T>>* row_products, double* out) {
  double total = 0, positions = 0;
  for (int j = first; j < last; ++j) {
    view.row.move_to(j);
    const int count = view.row.end - view.row.begin;
    if (count == 0) continue;
    pixel_products(p, view, n, j, values, row_products);
    double cosines = 0;
    for (int i = 0; i < count; ++i) cosines += double(core::cosine(row_products[i]).value);
    total += cosines, positions += count;
  }
  out[0] = total, out[1] = positions, out[2] = 0;
}

inline int part(int size, int blocks, int block) { return static_cast<int>(int64_t{size} * block / blocks); }

template <typename T>
void run_similarity(const SimilarityParams& p, int64_t begin, int64_t end) {
  using real = Real<T>;
  const int64_t values = p.anchor.width > p.channels ? p.anchor.width : p.channels;
  Scratch scratch(WarpedBack<T>::scratch(p) + Scratch::bytes<real>(values) +
                  Scratch::bytes<Products<real>>(p.anchor.width));
  WarpedBack<T> view(p, scratch);
  real* row_values = scratch.take<real>(values);
  auto* row_products = scratch.take<Products<real>>(p.anchor.width);
  const int blocks = similarity_blocks(p);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t pair = task / blocks;
    const int block = static_cast<int>(task % blocks);
    const int n = static_cast<int>(pair / p.views), k = static_cast<int>(pair % p.views);
    view.aim(n, k);
    sums<T>(p, view, n, part(p.anchor.height, blocks, block), part(p.anchor.height, blocks, block + 1),
            row_values, row_products, p.partial + task * 3);
  }
}

template <typename real>
void clear(const Gradient& g, real* image, int first_row, int last_row, int64_t width) {
  for (int y = first_row; y < last_row; ++y)
    std::memset(image + y * g.sy, 0, sizeof(real) * std::size_t(width));
}

template <typename real>
real* image_of(const Gradient& g, int n) {
  return static_cast<real*>(g.data) + n * g.sn;
}

// The weights of the columns of a row.
template <typename T>
void row_weights(const SimilarityParams& p, WarpedBack<T>& view, int n, int k, int j, Real<T>* values,
                 Products<Real<T>>* row_products, Cosine<Real<T>>* out) {
  using real = Real<T>;
  const int count = view.row.end - view.row.begin;
  const int64_t at = int64_t{n} * p.views + k;
  const real share = real(p.upstream[at] / p.sums[at * 3 + 1]);  // a row with columns: at least one position
  pixel_products(p, view, n, j, values, row_products);
  for (int i = 0; i < count; ++i) {
    const Cosine<real> c = core::cosine(row_products[i]);
    out[i] = {0, c.cross * share, c.own0 * share, c.own1 * share};
  }
}

// Adds to the anchor's row, or to the view, what (n, k) gives at the row that the view is at.
template <typename T>
void backward_row(const SimilarityParams& p, WarpedBack<T>& view, int n, int k, int j, bool anchor,
                  const Cosine<Real<T>>* weights, Real<T>* values) {
  using real = Real<T>;
  const int begin = view.row.begin, count = view.row.end - begin;
  const Gradient& g = anchor ? p.anchor_gradient : p.view_gradient[k];
  real* to = image_of<real>(g, n);
  if (p.interleaved) {
    for (int i = 0; i < count; ++i) {
      const Cosine<real> w = weights[i];
      const T* __restrict f0 = anchor_row<T>(p, n, 0, j) + (begin + i) * p.anchor.sx;
      real* __restrict f1 = values;
      view.pixel(begin + i, values);
      if (anchor) {
        real* __restrict out = to + j * g.sy + (begin + i) * g.sx;
        for (int c = 0; c < p.channels; ++c) out[c] += w.cross * f1[c] - w.own0 * real(load(f0[c]));
      } else {
        for (int c = 0; c < p.channels; ++c) f1[c] = w.cross * real(load(f0[c])) - w.own1 * f1[c];
        view.add_pixel(to, g, begin + i, values);
      }
    }
    return;
  }
  for (int c = 0; c < p.channels; ++c) {
    const T* __restrict f0 = anchor_row<T>(p, n, c, j) + begin;
    real* __restrict f1 = values;
    view.channel(c, values);
    if (anchor) {
      real* __restrict out = to + c * g.sc + j * g.sy + begin;
      for (int i = 0; i < count; ++i)
        out[i] += weights[i].cross * f1[i] - weights[i].own0 * real(load(f0[i]));
    } else {
      for (int i = 0; i < count; ++i) f1[i] = weights[i].cross * real(load(f0[i])) - weights[i].own1 * f1[i];
      view.add_channel(to, g, c, values);
    }
  }
}

template <typename T>
void run_backward(const SimilarityParams& p, int64_t begin, int64_t end) {
  using real = Real<T>;
  const int64_t most = p.anchor.width > p.channels ? p.anchor.width : p.channels;
  Scratch scratch(WarpedBack<T>::scratch(p) + Scratch::bytes<real>(most) +
                  Scratch::bytes<Products<real>>(p.anchor.width) +
                  Scratch::bytes<Cosine<real>>(p.anchor.width));
  WarpedBack<T> view(p, scratch);
  real* values = scratch.take<real>(most);
  auto* row_products = scratch.take<Products<real>>(p.anchor.width);
  auto* weights = scratch.take<Cosine<real>>(p.anchor.width);
  const int planes = p.interleaved ? 1 : p.channels;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t per_image = similarity_pixel_backward_tasks(p) / p.images;
    const int n = static_cast<int>(task / per_image), part_of_n = static_cast<int>(task % per_image);
    const bool anchor = part_of_n >= p.views;
    const int first = anchor ? (part_of_n - p.views) * similarity_pixel_rows : 0;
    const int last = anchor && first + similarity_pixel_rows < p.anchor.height ? first + similarity_pixel_rows
                                                                               : p.anchor.height;
    const int first_view = anchor ? 0 : part_of_n, last_view = anchor ? p.views : part_of_n + 1;
    const Gradient& g = anchor ? p.anchor_gradient : p.view_gradient[part_of_n];
    const Map& shape = anchor ? p.anchor : p.view[part_of_n];
    for (int c = 0; c < planes; ++c) {
      clear(g, image_of<real>(g, n) + c * g.sc, first, anchor ? last : shape.height,
            int64_t{shape.width} * (p.interleaved ? p.channels : 1));
    }
    for (int k = first_view; k < last_view; ++k) {
      view.aim(n, k);
      for (int j = first; j < last; ++j) {
        view.row.move_to(j);
        if (view.row.begin == view.row.end) continue;
        row_weights<T>(p, view, n, k, j, values, row_products, weights);
        backward_row<T>(p, view, n, k, j, anchor, weights, values);
      }
    }
  }
}

}  // namespace

void similarity_pixel(const SimilarityParams& p, int64_t begin, int64_t end) {
  dispatch(p.dtype, [&](auto zero) { run_similarity<decltype(zero)>(p, begin, end); });
}

void similarity_pixel_backward(const SimilarityParams& p, int64_t begin, int64_t end) {
  dispatch(p.dtype, [&](auto zero) { run_backward<decltype(zero)>(p, begin, end); });
}

}  // namespace equifast::cpu::EQUIFAST_ISA
