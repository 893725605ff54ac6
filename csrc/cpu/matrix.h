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
// Of which every number of rows is a divisor.
constexpr int whole_rows = 24;

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
  // So many numbers from one row to the next.
  EQUIFAST_INLINE inline void add(const real* a, int64_t a_apart, const real* b, int64_t b_apart, int n) {
    for (int k = 0; k < n; ++k, b += b_apart) {
      Lanes<real> right[vectors];
      for (int v = 0; v < vectors; ++v) get<real>(right[v], b + v * lanes<real>);
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
