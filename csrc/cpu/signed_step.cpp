// The noisy sign step of an L-infinity ascent and its projection. Compiled once per instruction set.
#include <cmath>

#include "../core/philox.h"
#include "rows.h"

namespace equifast::cpu::EQUIFAST_ISA {
namespace {

constexpr std::uint32_t noise_stream = 1;  // rng.Stream.NOISE

struct Chunk {
  int64_t n, chunk, first, last;  // image, chunk of it, elements of it
};

inline Chunk chunk_of(const StepParams& p, int64_t task) {
  const int64_t chunks = step_chunks(p), n = task / chunks, chunk = task % chunks, first = chunk * step_chunk;
  return {n, chunk, first, first + step_chunk < p.elements ? first + step_chunk : p.elements};
}

template <typename real>
inline real magnitude(real v) {
  return v < 0 ? -v : v;
}

// Sums go over fixed chunks, each in `lanes` interleaved sums: the order is that of the elements alone.
constexpr int lanes = 16;

template <typename T>
void largest(const StepParams& p, int64_t task) {
  using real = Real<T>;
  const Chunk at = chunk_of(p, task);
  const T* __restrict g = static_cast<const T*>(p.gradient) + at.n * p.elements;
  real most = 0;
  bool nan = false;
  for (int64_t i = at.first; i < at.last; ++i) {
    const real v = load(g[i]);
    nan |= v != v;
    most = magnitude(v) > most ? magnitude(v) : most;
  }
  p.partial[task] = nan ? double(NAN) : double(most);
}

template <typename T>
void squares(const StepParams& p, int64_t task) {
  using real = Real<T>;
  const Chunk at = chunk_of(p, task);
  const T* __restrict g = static_cast<const T*>(p.gradient) + at.n * p.elements;
  const double scale = p.norms[2 * at.n];
  double sums[lanes] = {};
  int64_t i = at.first;
  for (; i + lanes <= at.last; i += lanes) {
    for (int lane = 0; lane < lanes; ++lane) {
      const double v = double(real(load(g[i + lane]))) / scale;
      sums[lane] += v * v;
    }
  }
  for (int lane = 0; i < at.last; ++i, ++lane) {
    const double v = double(real(load(g[i]))) / scale;
    sums[lane] += v * v;
  }
  double total = 0;
  for (double s : sums) total += s;
  p.partial[task] = total;
}

template <typename real>
inline real sign(real v) {
  return v > 0 ? real(1) : (v < 0 ? real(-1) : real(0));  // 0 for NaN, as torch.sign
}

template <typename real>
inline real clamp(real v, real low, real high) {  // NaN stays, and comes of NaN bounds
  if (low != low) return low;
  v = v < low ? low : v;
  return v > high ? high : v;
}

constexpr int noise_block = 1024;  // elements that are drawn at once; step_chunk is a multiple of it

// Of noise_block elements from 4 * quad on. What lies beyond the image is drawn as well, and not used. Loops
// of one purpose each, over words laid side by side: so that compilers find their vectors.
void noise(const StepParams& p, int64_t n, int64_t quad, float* __restrict out) {
  constexpr int quads = noise_block / 4;
  std::uint32_t words[4][quads];
  const core::PhiloxKey key{p.seed, noise_stream};
  const auto first = static_cast<std::uint32_t>(quad);
  const int64_t id = p.ids[n];
#pragma omp simd
  for (int i = 0; i < quads; ++i) {
    const core::Words4 drawn =
        core::philox(key, core::philox_counter(first + static_cast<std::uint32_t>(i), p.draw, p.t, id));
    words[0][i] = drawn.word[0], words[1][i] = drawn.word[1];
    words[2][i] = drawn.word[2], words[3][i] = drawn.word[3];
  }
#pragma omp simd
  for (int i = 0; i < quads; ++i) {
    const core::Normals4 normals = core::box_muller({{words[0][i], words[1][i], words[2][i], words[3][i]}});
    out[4 * i] = normals.value[0], out[4 * i + 1] = normals.value[1];
    out[4 * i + 2] = normals.value[2], out[4 * i + 3] = normals.value[3];
  }
}

template <typename T>
void move(const StepParams& p, int64_t task) {
  using real = Real<T>;
  const Chunk at = chunk_of(p, task);
  const int64_t base = at.n * p.elements;
  const T* __restrict x = static_cast<const T*>(p.x) + base;
  const T* __restrict g = static_cast<const T*>(p.gradient) + base;
  const T* __restrict origin = static_cast<const T*>(p.origin) + base;
  T* __restrict next = static_cast<T*>(p.next) + base;
  const real eps = real(p.eps), step = real(p.step), sigma = real(p.sigma);
  const auto finish = [&](int64_t i, real direction) {
    const real o = load(origin[i]);
    const real moved = clamp(real(load(x[i])) + step * sign(direction), o - eps, o + eps);
    store(next[i], clamp(moved, real(0), real(1)));
  };
  if (p.sigma == 0) {  // the norm does not change a sign
    const real nan = real(p.norms[2 * at.n]) * 0;
    for (int64_t i = at.first; i < at.last; ++i) finish(i, real(load(g[i])) + nan);
    return;
  }
  const real scale = real(p.norms[2 * at.n]), norm = real(p.norms[2 * at.n + 1]);
  float xi[noise_block];
  for (int64_t first = at.first; first < at.last; first += noise_block) {
    noise(p, at.n, first / 4, xi);
    const int64_t last = first + noise_block < at.last ? first + noise_block : at.last;
    for (int64_t i = first; i < last; ++i) {
      finish(i, real(load(g[i])) / scale / norm + sigma * real(xi[i - first]));
    }
  }
}

}  // namespace

void step_largest(const StepParams& p, int64_t begin, int64_t end) {
  dispatch(p.dtype, [&](auto zero) {
    for (int64_t task = begin; task < end; ++task) largest<decltype(zero)>(p, task);
  });
}

void step_squares(const StepParams& p, int64_t begin, int64_t end) {
  dispatch(p.dtype, [&](auto zero) {
    for (int64_t task = begin; task < end; ++task) squares<decltype(zero)>(p, task);
  });
}

void step_move(const StepParams& p, int64_t begin, int64_t end) {
  dispatch(p.dtype, [&](auto zero) {
    for (int64_t task = begin; task < end; ++task) move<decltype(zero)>(p, task);
  });
}

}  // namespace equifast::cpu::EQUIFAST_ISA
