// What follows the tasks: their partial sums, added in the order of the tasks.
#include <cmath>
#include <limits>

#include "../core/cosine.h"
#include "kernels.h"

namespace equifast::cpu {

void similarity_finish(const SimilarityParams& p, void* result) {
  const int blocks = similarity_blocks(p);
  const int64_t pairs = int64_t{p.images} * p.views;
  for (int64_t pair = 0; pair < pairs; ++pair) {
    double* sums = p.sums + pair * 3;
    for (int i = 0; i < 3; ++i) sums[i] = 0;
    for (int block = 0; block < blocks; ++block) {
      for (int i = 0; i < 3; ++i) sums[i] += p.partial[(pair * blocks + block) * 3 + i];
    }
    const double value = core::similarity(sums, p.pixel);
    if (p.dtype == Dtype::float64) {
      static_cast<double*>(result)[pair] = value;
    } else {
      static_cast<float*>(result)[pair] = static_cast<float>(value);
    }
  }
}

void pairs_finish_squares(const PairsParams& p) {
  const int64_t chunks = pairs_chunks(p);
  for (int n = 0; n < p.images; ++n) {
    for (int i = 0; i < p.maps; ++i) {
      double square = 0;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        square += p.partial[(n * chunks + chunk) * (p.maps + 1) + i];
      }
      double* sums = p.sums + (int64_t{n} * p.maps + i) * 2;
      sums[0] = square >= core::small_norm * core::small_norm ? 1 / std::sqrt(square) : 0;
      sums[1] = 0;
    }
  }
}

void pairs_finish_total(const PairsParams& p, void* result) {
  const int64_t chunks = pairs_chunks(p);
  for (int n = 0; n < p.images; ++n) {
    double square = 0, own = 0;  // of the total; of the maps, each at unit length
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const double* partial = p.partial + (n * chunks + chunk) * (p.maps + 1);
      for (int i = 0; i < p.maps; ++i) p.sums[(int64_t{n} * p.maps + i) * 2 + 1] += partial[i];
      square += partial[p.maps];
    }
    for (int i = 0; i < p.maps; ++i) own += p.sums[(int64_t{n} * p.maps + i) * 2] != 0 ? 1 : 0;
    const double value = (square - own) / 2;
    if (p.dtype == Dtype::float64) {
      static_cast<double*>(result)[n] = value;
    } else {
      static_cast<float*>(result)[n] = static_cast<float>(value);
    }
  }
}

void step_finish_largest(const StepParams& p) {
  const int64_t chunks = step_chunks(p);
  // of the dtype that accumulates: a gradient of zeros is divided by it and stays 0
  const double least = p.dtype == Dtype::float64 ? std::numeric_limits<double>::min()
                                                 : double(std::numeric_limits<float>::min());
  for (int n = 0; n < p.images; ++n) {
    double most = least;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const double v = p.partial[n * chunks + chunk];
      most = v > most || v != v ? v : most;
      if (most != most) break;
    }
    p.norms[2 * n] = most;
    p.norms[2 * n + 1] = 1;
  }
}

void step_finish_norm(const StepParams& p) {
  const int64_t chunks = step_chunks(p);
  for (int n = 0; n < p.images; ++n) {
    double sum = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += p.partial[n * chunks + chunk];
    const double norm = std::sqrt(sum);
    p.norms[2 * n + 1] = norm < 1e-12 ? 1e-12 : norm;
  }
}

void color_jitter_finish(const ColorJitterParams& p, double* means) {
  const int64_t chunks = color_jitter_chunks(p);
  for (int n = 0; n < p.images; ++n) {
    double sum = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += p.partial[n * chunks + chunk];
    means[n] = sum / static_cast<double>(p.pixels);
  }
}

}  // namespace equifast::cpu
