// Filters of a convolution in the orders of a group, and the transpose. Compiled once per instruction set.
#include "rows.h"

namespace equifast::cpu::EQUIFAST_ISA {
namespace {

template <typename T>
void turn(const FiltersParams& p, int64_t channel) {
  const T* from = static_cast<const T*>(p.filters) + channel * p.rows * p.weights;
  T* to = static_cast<T*>(p.result) + channel * p.orders * p.rows * p.weights;
  for (int64_t g = 0; g < p.orders; ++g) {
    const std::int32_t* order = p.order + g * p.weights;
    for (int64_t row = 0; row < p.rows; ++row, to += p.weights) {
      const T* source = from + row * p.weights;
      for (int64_t j = 0; j < p.weights; ++j) to[j] = source[order[j]];
    }
  }
}

// Sums in the order of the group; rows of a channel in turn, so that what is read of each stays in cache.
template <typename T>
void turn_back(const FiltersParams& p, int64_t channel) {
  const int64_t block = p.rows * p.weights;
  const T* from = static_cast<const T*>(p.filters) + channel * p.orders * block;
  T* to = static_cast<T*>(p.result) + channel * block;
  Scratch scratch(Scratch::bytes<Real<T>>(p.weights));
  Real<T>* sums = scratch.take<Real<T>>(p.weights);
  for (int64_t row = 0; row < p.rows; ++row) {
    for (int64_t j = 0; j < p.weights; ++j) sums[j] = 0;
    for (int64_t g = 0; g < p.orders; ++g) {
      const std::int32_t* order = p.order + g * p.weights;
      const T* source = from + g * block + row * p.weights;
      for (int64_t j = 0; j < p.weights; ++j) sums[order[j]] += load(source[j]);
    }
    for (int64_t j = 0; j < p.weights; ++j) store(to[row * p.weights + j], sums[j]);
  }
}

}  // namespace

void turn_filters(const FiltersParams& p, int64_t begin, int64_t end) {
  dispatch(p.dtype, [&](auto zero) {
    for (int64_t channel = begin; channel < end; ++channel) turn<decltype(zero)>(p, channel);
  });
}

void turn_filters_adjoint(const FiltersParams& p, int64_t begin, int64_t end) {
  dispatch(p.dtype, [&](auto zero) {
    for (int64_t channel = begin; channel < end; ++channel) turn_back<decltype(zero)>(p, channel);
  });
}

}  // namespace equifast::cpu::EQUIFAST_ISA
