// Products of matrices whose sums stay in registers. Included by kernels that are compiled once per
// instruction set, hence the unnamed namespace.
#pragma once

#include <cstddef>
#include <utility>

#include "pack.h"

namespace equifast::cpu {
namespace {

// One register of numbers.
template <typename real>
constexpr int lanes = register_bytes / int{sizeof(real)};
template <typename real>
struct Register {
  typedef real type __attribute__((vector_size(register_bytes)));  // an alias would not take it
};
template <typename real>
using Lanes = typename Register<real>::type;

template <typename real>
EQUIFAST_INLINE inline void get(Lanes<real>& to, const real* from) {
  std::memcpy(&to, from, sizeof(to));
}
template <typename real>
EQUIFAST_INLINE inline void put(real* to, const Lanes<real>& from) {
  std::memcpy(to, &from, sizeof(from));
}
// In a form that compilers take for a load of one number to all lanes.
template <typename real, std::size_t... lane>
EQUIFAST_INLINE inline void spread(Lanes<real>& to, real value, std::index_sequence<lane...>) {
  to = Lanes<real>{((void)lane, value)...};
}

// Rows whose sums, of so many registers each, fill what registers there are.
template <int vectors>
constexpr int rows_at_once = EQUIFAST_WIDE ? (vectors == 1 ? 12 : 24 / vectors) : 6;
// At most so many, and a multiple of every number of them.
constexpr int most_rows = 12, whole_rows = 24;

// Of channels in multiples of 16: calls work(first channel, registers as a constant) on one panel after the
// other.
template <typename real, typename Work>
EQUIFAST_INLINE inline void each_panel(int begin, int end, const Work& work) {
  while (begin < end) {
    const int left = (end - begin) / lanes<real>;
#if EQUIFAST_WIDE
    const int vectors = left < 5 ? left : (left == 5 || left % 3 == 0 ? 3 : 4);
    if (vectors == 4) work(begin, std::integral_constant<int, 4>());
    if (vectors == 3) work(begin, std::integral_constant<int, 3>());
    if (vectors == 1) work(begin, std::integral_constant<int, 1>());
#else
    (void)left;
    constexpr int vectors = 2;
#endif
    if (vectors == 2) work(begin, std::integral_constant<int, 2>());
    begin += vectors * lanes<real>;
  }
}

// Where registers of a panel of channels are in filters (C / 16, ..., n, 16), which lie side by side for
// whoever reads one panel alone: the first of n, so many numbers from one 16 of channels to the next.
template <typename real, int vectors>
struct Filters {
  const real* from[vectors];
  EQUIFAST_INLINE inline Filters(const real* filters, int64_t apart, int channel) {
    for (int v = 0; v < vectors; ++v) {
      const int c = channel + v * lanes<real>;
      from[v] = filters + c / whole_channels * apart + c % whole_channels;
    }
  }
};

// Sums of products, (rows, n) times (n, registers). All rows are summed alike, so that none depends on the
// others.
template <typename real, int rows, int vectors>
struct Product {
  Lanes<real> sum[rows][vectors];

  EQUIFAST_INLINE inline void zero() {
    for (int r = 0; r < rows; ++r) {
      for (int v = 0; v < vectors; ++v) sum[r][v] = Lanes<real>{};
    }
  }
  // Of a so many numbers from one row to the next; b as `Filters` gives it.
  EQUIFAST_INLINE inline void add(const real* a, int64_t a_apart, const Filters<real, vectors>& b, int n) {
    for (int k = 0; k < n; ++k) {
      Lanes<real> right[vectors];
      for (int v = 0; v < vectors; ++v) get<real>(right[v], b.from[v] + int64_t{k} * whole_channels);
      for (int r = 0; r < rows; ++r) {
        Lanes<real> left;
        spread<real>(left, a[r * a_apart + k], std::make_index_sequence<lanes<real>>());
        for (int v = 0; v < vectors; ++v) sum[r][v] += left * right[v];
      }
    }
  }
  EQUIFAST_INLINE inline void put(real* to, int64_t apart) const {
    for (int r = 0; r < rows; ++r) {
      for (int v = 0; v < vectors; ++v) cpu::put<real>(to + r * apart + v * lanes<real>, sum[r][v]);
    }
  }
};

}  // namespace
}  // namespace equifast::cpu
