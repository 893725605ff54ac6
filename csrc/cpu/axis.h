// A view without rotation and shear is separable: a sparse matrix for each axis, and its adjoint their
// transposes. Included by kernels that are compiled once per instruction set, hence the unnamed namespace.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <algorithm>

#include "rows.h"

namespace equifast::cpu {
namespace {

// Result i is the sum of weight[e] * line[at[e]] over e in [begin[i], begin[i + 1]).
template <typename real>
struct Axis {
  int size = 0;  // results
  int* begin;    // (size + 1)
  int* at;
  real* weight;

  static int64_t scratch(int results, int entries) {
    return Scratch::bytes<int>(int64_t{results} + 2) + Scratch::bytes<int>(entries) +
           Scratch::bytes<real>(entries);
  }
  Axis(Scratch& s, int results, int entries)
      : begin(s.take<int>(int64_t{results} + 2)), at(s.take<int>(entries)), weight(s.take<real>(entries)) {}

  int count(int i) const { return begin[i + 1] - begin[i]; }

  // The taps of `results` positions on an axis of `pixels`, whose frame is [first, last]; none outside it. Up
  // to two entries each: a weight of 0 is none, and the border's two taps are one. Position i is
  // slope * (from + i + 1/2) + start, as core::PixelMap computes it.
  void sample(int from, int results, int pixels, double first, double last, double slope, double start) {
    constexpr int step = 16;
    int entries = 0;
    size = results;
    for (int some = 0; some < results; some += step) {
      int low[step], high[step];
      real fraction[step];
      int seen[step];
      double product[step];
      products(slope, from + some, step, product);
#pragma omp simd
      for (int l = 0; l < step; ++l) {
        const double p = product[l] + start;
        const double within = p >= first && p <= last ? p : first;
        seen[l] = within == p;
        const auto tap = core::tap<real>(within, pixels);
        low[l] = tap.low, high[l] = tap.high, fraction[l] = tap.fraction;
      }
      for (int l = 0; l < step && some + l < results; ++l) {
        begin[some + l] = entries;
        const bool two = fraction[l] != 0 && low[l] != high[l];
        at[entries] = low[l], weight[entries] = two ? 1 - fraction[l] : real(1);
        entries += seen[l];
        if (!two || !seen[l]) continue;
        at[entries] = high[l], weight[entries] = fraction[l], ++entries;
      }
    }
    begin[results] = entries;
  }

  // Rows [first, last) of the transpose of a matrix.
  void transpose(const Axis& a, int first, int last) {
    size = last - first;
    for (int x = 0; x <= size + 1; ++x) begin[x] = 0;
    const auto each = [&](auto&& visit) {
      for (int i = 0; i < a.size; ++i) {
        for (int e = a.begin[i]; e < a.begin[i + 1]; ++e) {
          if (a.at[e] >= first && a.at[e] < last) visit(i, e, a.at[e] - first);
        }
      }
    };
    each([&](int, int, int x) { ++begin[x + 2]; });
    for (int x = 2; x <= size + 1; ++x) begin[x] += begin[x - 1];
    // begin[x + 1] counts up from the first entry of x to that of x + 1
    each([&](int i, int e, int x) {
      const int to = begin[x + 1]++;
      at[to] = i, weight[to] = a.weight[e];
    });
  }
};

// The columns' matrix, laid out for vectors: chunks of results with as many terms each as the longest of them
// needs, the others' being of weight 0.
template <typename real>
class Columns {
 public:
#if defined(__AVX512F__)
  static constexpr int chunk = 16;
#else
  static constexpr int chunk = 8;
#endif
  static constexpr int beyond = 4 * chunk;  // entries behind a line, and behind the results

  static int64_t scratch(int results, int entries) {
    return Scratch::bytes<Chunk>(parts(results, chunk)) + Scratch::bytes<int>(int64_t{chunk} * entries) +
           Scratch::bytes<real>(int64_t{chunk} * entries);
  }
  Columns(Scratch& s, int results, int entries)
      : chunk_(s.take<Chunk>(parts(results, chunk))),
        at_(s.take<int>(int64_t{chunk} * entries)),
        weight_(s.take<real>(int64_t{chunk} * entries)) {}

  int lowest = 0, highest = -1;  // what is read of a line, both included
  int zero = 0;

  // Where a weight is 0 `zero_entry` of the line is read, which must be 0: the one behind it.
  void lay(const Axis<real>& axis, int zero_entry) {
    zero = zero_entry;
    chunks_ = parts(axis.size, chunk);
    const int entries = axis.begin[axis.size];
    lowest = entries == 0 ? 0 : axis.at[0], highest = lowest - 1;
    int* at = at_;
    real* weight = weight_;
    for (int k = 0; k < chunks_; ++k) {
      const int first = k * chunk, last = std::min(first + chunk, axis.size);
      int terms = 0;
      for (int i = first; i < last; ++i) terms = std::max(terms, axis.count(i));
      chunk_[k] = {0, terms, 0};
      if (terms == 0) continue;
      int low = axis.at[axis.begin[first]], high = low;
      for (int e = axis.begin[first]; e < axis.begin[last]; ++e) {
        low = std::min(low, axis.at[e]), high = std::max(high, axis.at[e]);
      }
      lowest = std::min(low, lowest), highest = std::max(high, highest);
      chunk_[k] = {low, terms, high - low + 1};
      std::fill(at, at + terms * chunk, zero - low);
      std::fill(weight, weight + terms * chunk, real(0));
      for (int i = first; i < last; ++i) {
        int to = i - first;
        for (int e = axis.begin[i]; e < axis.begin[i + 1]; ++e, to += chunk) {
          at[to] = axis.at[e] - low, weight[to] = axis.weight[e];
        }
      }
      at += terms * chunk, weight += terms * chunk;
    }
  }

  // Of a line that has `beyond` entries behind it.
  void apply(const real* line, real* __restrict results) const {
    const int* at = at_;
    const real* weight = weight_;
    for (int k = 0; k < chunks_; ++k, results += chunk) {
      const int terms = chunk_[k].terms;
      add(chunk_[k].span, line + chunk_[k].base, at, weight, terms, results);
      at += terms * chunk, weight += terms * chunk;
    }
  }

 private:
  struct Chunk {
    int base, terms;  // the first entry that is read; terms of each result
    int span;         // entries from the first to the last that is read
  };
  Chunk* chunk_;
  int* at_;  // entries after `base`
  real* weight_;
  int chunks_ = 0;

  template <typename R>
  static void add(int, const R* __restrict line, const int* __restrict at, const R* __restrict weight,
                  int terms, R* __restrict results) {
    if (terms == 2) {
#pragma omp simd
      for (int i = 0; i < chunk; ++i) {
        results[i] = weight[i] * line[at[i]] + weight[chunk + i] * line[at[chunk + i]];
      }
      return;
    }
    std::fill(results, results + chunk, R(0));
    for (int t = 0; t < terms; ++t, at += chunk, weight += chunk) {
#pragma omp simd
      for (int i = 0; i < chunk; ++i) results[i] += weight[i] * line[at[i]];
    }
  }

  // What is read fits into few vectors, unless the view is much smaller than the image, and permutations are
  // far cheaper than gathers. A weight of 0 reads nothing.
#if defined(__AVX512F__)
  static void add(int span, const float* line, const int* at, const float* weight, int terms,
                  float* __restrict results) {
    __m512 sum = _mm512_setzero_ps(), a = sum, b = sum, c = sum, d = sum;
    if (span <= 4 * chunk) a = _mm512_loadu_ps(line), b = _mm512_loadu_ps(line + chunk);
    if (span > 2 * chunk && span <= 4 * chunk) {
      c = _mm512_loadu_ps(line + 2 * chunk), d = _mm512_loadu_ps(line + 3 * chunk);
    }
    for (int t = 0; t < terms; ++t, at += chunk, weight += chunk) {
      const __m512i from = _mm512_loadu_si512(at);
      const __m512 w = _mm512_loadu_ps(weight);
      const __mmask16 some = _mm512_cmp_ps_mask(w, _mm512_setzero_ps(), _CMP_NEQ_UQ);
      __m512 value;
      if (span <= 2 * chunk) {
        value = _mm512_maskz_permutex2var_ps(some, a, from, b);
      } else if (span <= 4 * chunk) {
        const __mmask16 later = _mm512_cmpge_epi32_mask(from, _mm512_set1_epi32(2 * chunk));
        value = _mm512_maskz_permutex2var_ps(some, a, from, b);
        value = _mm512_mask_mov_ps(value, later & some, _mm512_permutex2var_ps(c, from, d));
      } else {
        value = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), some, from, line, sizeof(float));
      }
      sum = _mm512_fmadd_ps(w, value, sum);
    }
    _mm512_storeu_ps(results, sum);
  }
#elif defined(__AVX2__)
  static void add(int span, const float* line, const int* at, const float* weight, int terms,
                  float* __restrict results) {
    if (span > 2 * chunk) return add<float>(span, line, at, weight, terms, results);
    __m256 sum = _mm256_setzero_ps();
    const __m256 a = _mm256_loadu_ps(line), b = _mm256_loadu_ps(line + chunk);
    for (int t = 0; t < terms; ++t, at += chunk, weight += chunk) {
      const __m256i from = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
      const __m256 w = _mm256_loadu_ps(weight);
      const __m256 some = _mm256_cmp_ps(w, _mm256_setzero_ps(), _CMP_NEQ_UQ);
      const __m256 later = _mm256_castsi256_ps(_mm256_slli_epi32(from, 28));  // its sign: from >= 8
      const __m256 value =
          _mm256_blendv_ps(_mm256_permutevar8x32_ps(a, from), _mm256_permutevar8x32_ps(b, from), later);
      sum = _mm256_fmadd_ps(w, _mm256_and_ps(some, value), sum);
    }
    _mm256_storeu_ps(results, sum);
  }
#endif
};

// The rows' matrix: line[x] of columns [first, last) is the sum over the entries of result i.
template <typename T>
void combine(const Axis<Real<T>>& axis, int i, const T* plane, int64_t sy, int first, int last,
             Real<T>* __restrict line) {
  using real = Real<T>;
  int e = axis.begin[i];
  const int end = axis.begin[i + 1];
  const T* __restrict a = plane + axis.at[e] * sy;
  const real wa = axis.weight[e];
  if (e + 1 == end) {
    for (int x = first; x < last; ++x) line[x] = wa * real(load(a[x]));
    return;
  }
  const T* __restrict b = plane + axis.at[e + 1] * sy;
  const real wb = axis.weight[e + 1];
  for (int x = first; x < last; ++x) line[x] = wa * real(load(a[x])) + wb * real(load(b[x]));
  for (e += 2; e < end; ++e) {
    const T* __restrict more = plane + axis.at[e] * sy;
    const real weight = axis.weight[e];
    for (int x = first; x < last; ++x) line[x] += weight * real(load(more[x]));
  }
}

// Result i of the rows' matrix and of the columns', of each channel: write(channel, results).
template <typename T, typename Write>
void separable_row(const Axis<Real<T>>& rows, int i, const Columns<Real<T>>& columns, const T* image,
                   int64_t sc, int64_t sy, int channels, Real<T>* line, Real<T>* results, Write&& write) {
  for (int c = 0; c < channels; ++c) {
    line[columns.zero] = 0;
    combine(rows, i, image + c * sc, sy, columns.lowest, columns.highest + 1, line);
    columns.apply(line, results);
    write(c, results);
  }
}

}  // namespace
}  // namespace equifast::cpu
