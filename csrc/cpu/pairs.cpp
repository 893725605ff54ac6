// The sum of the cosines of all pairs of maps, and its gradients, in three passes over the maps: their
// lengths; the sum of all at unit length, and what each has along it; the gradients. Compiled once per
// instruction set.
#include "rows.h"

namespace equifast::cpu::EQUIFAST_ISA {
namespace {

constexpr int block = 1024;  // elements at a time, whose sum over the maps stays in cache
constexpr int lanes = 16;    // interleaved sums: their order is that of the elements alone

struct Chunk {
  int64_t n, first, last;  // image, elements of it
  double* partial;         // (M + 1)
};

inline Chunk chunk_of(const PairsParams& p, int64_t task) {
  const int64_t chunks = pairs_chunks(p), first = task % chunks * pairs_chunk;
  return {task / chunks, first, first + pairs_chunk < p.elements ? first + pairs_chunk : p.elements,
          p.partial + task * (p.maps + 1)};
}

// The sum over a block of what `term` gives for each element.
template <typename real, typename Term>
inline double sum(int count, const Term& term) {
  real sums[lanes] = {};
  int j = 0;
  for (; j + lanes <= count; j += lanes) {
    for (int lane = 0; lane < lanes; ++lane) sums[lane] += term(j + lane);
  }
  for (int lane = 0; j < count; ++j, ++lane) sums[lane] += term(j);
  double total = 0;
  for (real s : sums) total += double(s);
  return total;
}

template <typename Work>
inline void blocks(const Chunk& at, const Work& work) {
  for (int64_t first = at.first; first < at.last; first += block) {
    work(first, static_cast<int>(first + block < at.last ? block : at.last - first));
  }
}

template <typename T>
inline const T* map_of(const PairsParams& p, int64_t n, int i) {
  return static_cast<const T*>(p.map[i]) + n * p.elements;
}

template <typename T>
void squares(const PairsParams& p, int64_t task) {
  using real = Real<T>;
  const Chunk at = chunk_of(p, task);
  for (int i = 0; i < p.maps; ++i) {
    const T* all = map_of<T>(p, at.n, i);
    double total = 0;
    blocks(at, [&](int64_t first, int count) {
      const T* __restrict f = all + first;
      total += sum<real>(count, [f](int j) {
        const real v = load(f[j]);
        return v * v;
      });
    });
    at.partial[i] = total;
  }
}

template <typename T>
void add_up(const PairsParams& p, int64_t task) {
  using real = Real<T>;
  const Chunk at = chunk_of(p, task);
  real* out = static_cast<real*>(p.total) + at.n * p.elements;
  for (int i = 0; i <= p.maps; ++i) at.partial[i] = 0;
  blocks(at, [&](int64_t first, int count) {
    real total[block] = {};
    for (int i = 0; i < p.maps; ++i) {
      const T* __restrict f = map_of<T>(p, at.n, i) + first;
      const real scale = real(p.sums[(at.n * p.maps + i) * 2]);
      for (int j = 0; j < count; ++j) total[j] += scale * real(load(f[j]));
    }
    for (int i = 0; i < p.maps; ++i) {
      const T* __restrict f = map_of<T>(p, at.n, i) + first;
      at.partial[i] += sum<real>(count, [&total, f](int j) { return real(load(f[j])) * total[j]; });
    }
    at.partial[p.maps] += sum<real>(count, [&total](int j) { return total[j] * total[j]; });
    std::memcpy(out + first, total, sizeof(real) * static_cast<std::size_t>(count));
  });
}

template <typename T>
void turn(const PairsParams& p, int64_t task) {
  using real = Real<T>;
  const Chunk at = chunk_of(p, task);
  blocks(at, [&](int64_t first, int count) {
    const real* __restrict total = static_cast<const real*>(p.total) + at.n * p.elements + first;
    for (int i = 0; i < p.maps; ++i) {
      const double* sums = p.sums + (at.n * p.maps + i) * 2;
      const double scale = sums[0] * p.upstream[at.n];
      const real across = real(scale), along = real(-scale * sums[0] * sums[0] * sums[1]);
      const T* __restrict f = map_of<T>(p, at.n, i) + first;
      T* __restrict to = static_cast<T*>(p.gradient[i]) + at.n * p.elements + first;
      for (int j = 0; j < count; ++j) store(to[j], across * total[j] + along * real(load(f[j])));
    }
  });
}

}  // namespace

void pairs_squares(const PairsParams& p, int64_t begin, int64_t end) {
  dispatch(p.dtype, [&](auto zero) {
    for (int64_t task = begin; task < end; ++task) squares<decltype(zero)>(p, task);
  });
}

void pairs_total(const PairsParams& p, int64_t begin, int64_t end) {
  dispatch(p.dtype, [&](auto zero) {
    for (int64_t task = begin; task < end; ++task) add_up<decltype(zero)>(p, task);
  });
}

void pairs_gradient(const PairsParams& p, int64_t begin, int64_t end) {
  dispatch(p.dtype, [&](auto zero) {
    for (int64_t task = begin; task < end; ++task) turn<decltype(zero)>(p, task);
  });
}

}  // namespace equifast::cpu::EQUIFAST_ISA
