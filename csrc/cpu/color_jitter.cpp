// The color jitter of images and its derivative. Compiled once per instruction set, and without contraction
// to fused products: each operation rounds as in the reference, see core/color.h.
#include "../core/color.h"
#include "rows.h"

namespace equifast::cpu::EQUIFAST_ISA {
namespace {

using core::Color;
using core::Jitter;

// Pixels that are worked on at once, channel by channel whatever the layout in memory; sums go over `lanes`
// interleaved sums, in the order of the pixels alone.
constexpr int block = 256, lanes = 16;

template <typename real>
struct Block {
  real channel[3][block];

  Color<real> at(int i) const { return {channel[0][i], channel[1][i], channel[2][i]}; }
  void set(int i, const Color<real>& x) {
    channel[0][i] = x.red, channel[1][i] = x.green, channel[2][i] = x.blue;
  }
};

template <typename T>
inline void read(const T* image, bool interleaved, int64_t pixels, int64_t first, int count,
                 Block<Real<T>>& to) {
  if (interleaved) {
    for (int i = 0; i < count; ++i) {
      const T* at = image + 3 * (first + i);
      to.channel[0][i] = load(at[0]), to.channel[1][i] = load(at[1]), to.channel[2][i] = load(at[2]);
    }
  } else {
    for (int c = 0; c < 3; ++c) {
      for (int i = 0; i < count; ++i) to.channel[c][i] = load(image[c * pixels + first + i]);
    }
  }
}

template <typename T>
inline void write(T* image, bool interleaved, int64_t pixels, int64_t first, int count,
                  const Block<Real<T>>& from) {
  if (interleaved) {
    for (int i = 0; i < count; ++i) {
      T* at = image + 3 * (first + i);
      store(at[0], from.channel[0][i]), store(at[1], from.channel[1][i]), store(at[2], from.channel[2][i]);
    }
  } else {
    for (int c = 0; c < 3; ++c) {
      for (int i = 0; i < count; ++i) store(image[c * pixels + first + i], from.channel[c][i]);
    }
  }
}

template <typename real>
class LaneSums {
 public:
  void add(real (&values)[block], int count) {  // overwrites what follows the last value
    for (int i = count; i < (count + lanes - 1) / lanes * lanes; ++i) values[i] = 0;
    for (int i = 0; i < count; i += lanes) {
      for (int lane = 0; lane < lanes; ++lane) sums_[lane] += double(values[i + lane]);
    }
  }
  double total() const {
    double sum = 0;
    for (double s : sums_) sum += s;
    return sum;
  }

 private:
  double sums_[lanes] = {};
};

// One chunk of one image.
template <typename T>
struct Task {
  using real = Real<T>;
  int64_t n, pixels, begin, end;  // image, its pixels, those of the chunk
  bool interleaved, upstream_interleaved;
  const T *images, *upstream;  // of image n
  T* result;
  real* gradient;
  Jitter<real> jitter;
  real mean, mean_gradient;

  Task(const ColorJitterParams& p, int64_t task)
      : n(task / color_jitter_chunks(p)),
        pixels(p.pixels),
        begin(task % color_jitter_chunks(p) * color_jitter_chunk),
        end(begin + color_jitter_chunk < pixels ? begin + color_jitter_chunk : pixels),
        interleaved(p.interleaved),
        upstream_interleaved(p.upstream_interleaved),
        images(of(static_cast<const T*>(p.images_data))),
        upstream(of(static_cast<const T*>(p.upstream))),
        result(of(static_cast<T*>(p.result))),
        gradient(of(static_cast<real*>(p.gradient))),
        mean(p.mean == nullptr ? 0 : real(p.mean[n])),
        mean_gradient(p.mean_gradient == nullptr ? 0 : real(p.mean_gradient[n])) {
    const double* given = p.parameters + 5 * n;
    jitter = {real(given[0]), real(given[1]), real(given[2]), 6 * real(given[3]), given[4] != 0};
  }

  template <typename Body>
  void blocks(const Body& body) const {
    for (int64_t first = begin; first < end; first += block) {
      body(first, static_cast<int>(first + block < end ? block : end - first));
    }
  }

 private:
  template <typename P>
  P* of(P* all) const {
    return all == nullptr ? nullptr : all + 3 * pixels * n;
  }
};

template <typename T>
void sum_gray(const ColorJitterParams& p, int64_t task) {
  const Task<T> t(p, task);
  Block<Real<T>> x;
  Real<T> grays[block];
  LaneSums<Real<T>> sums;
  t.blocks([&](int64_t first, int count) {
    read(t.images, t.interleaved, t.pixels, first, count, x);
    for (int i = 0; i < count; ++i) grays[i] = core::bright_gray(x.at(i), t.jitter);
    sums.add(grays, count);
  });
  p.partial[task] = sums.total();
}

template <typename T>
void apply(const ColorJitterParams& p, int64_t task) {
  const Task<T> t(p, task);
  Block<Real<T>> x, y;
  t.blocks([&](int64_t first, int count) {
    read(t.images, t.interleaved, t.pixels, first, count, x);
    for (int i = 0; i < count; ++i) y.set(i, core::jitter(x.at(i), t.mean, t.jitter));
    write(t.result, t.interleaved, t.pixels, first, count, y);
  });
}

// The gradient with the mean held, and this chunk's part of the gradient of the mean.
template <typename T>
void backward(const ColorJitterParams& p, int64_t task) {
  const Task<T> t(p, task);
  Block<Real<T>> x, u, g;
  Real<T> means[block];
  LaneSums<Real<T>> sums;
  t.blocks([&](int64_t first, int count) {
    read(t.images, t.interleaved, t.pixels, first, count, x);
    read(t.upstream, t.upstream_interleaved, t.pixels, first, count, u);
    for (int i = 0; i < count; ++i) {
      const auto found = core::jitter_adjoint(x.at(i), t.mean, t.jitter, u.at(i));
      g.set(i, found.image);
      means[i] = found.mean;
    }
    write(t.gradient, t.interleaved, t.pixels, first, count, g);
    sums.add(means, count);
  });
  p.partial[task] = sums.total();
}

// Adds what comes through the mean.
template <typename T>
void add_mean(const ColorJitterParams& p, int64_t task) {
  const Task<T> t(p, task);
  Block<Real<T>> x, g;
  t.blocks([&](int64_t first, int count) {
    read(t.images, t.interleaved, t.pixels, first, count, x);
    read(t.gradient, t.interleaved, t.pixels, first, count, g);
    for (int i = 0; i < count; ++i) {
      const Color<Real<T>> held = g.at(i),
                           more = core::bright_gray_adjoint(x.at(i), t.jitter, t.mean_gradient);
      g.set(i, {held.red + more.red, held.green + more.green, held.blue + more.blue});
    }
    write(t.gradient, t.interleaved, t.pixels, first, count, g);
  });
}

template <void (*kernel)(const ColorJitterParams&, int64_t)>
void run(const ColorJitterParams& p, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task) kernel(p, task);
}

}  // namespace

void color_jitter_gray(const ColorJitterParams& p, int64_t begin, int64_t end) {
  dispatch(p.dtype, [&](auto zero) { run<sum_gray<decltype(zero)>>(p, begin, end); });
}

void color_jitter(const ColorJitterParams& p, int64_t begin, int64_t end) {
  dispatch(p.dtype, [&](auto zero) { run<apply<decltype(zero)>>(p, begin, end); });
}

void color_jitter_backward(const ColorJitterParams& p, int64_t begin, int64_t end) {
  dispatch(p.dtype, [&](auto zero) { run<backward<decltype(zero)>>(p, begin, end); });
}

void color_jitter_add_mean(const ColorJitterParams& p, int64_t begin, int64_t end) {
  dispatch(p.dtype, [&](auto zero) { run<add_mean<decltype(zero)>>(p, begin, end); });
}

}  // namespace equifast::cpu::EQUIFAST_ISA
