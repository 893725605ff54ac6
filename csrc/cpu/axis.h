// A view without rotation and shear is separable: a sparse matrix for each axis, and its adjoint their
// transposes. Included by kernels that are compiled once per instruction set, hence the unnamed namespace.
#pragma once

#include <algorithm>

#include "pack.h"

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
  int widest = 0;  // entries from the first to the last that a chunk reads, at most

  int size() const { return size_; }  // results

  // Where a weight is 0 `zero_entry` of the line is read, which must be 0: the one behind it.
  void lay(const Axis<real>& axis, int zero_entry) {
    zero = zero_entry, size_ = axis.size;
    chunks_ = parts(axis.size, chunk);
    const int entries = axis.begin[axis.size];
    lowest = entries == 0 ? 0 : axis.at[0], highest = lowest - 1;
    widest = 0;
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
      widest = std::max(widest, high - low + 1);
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

#if EQUIFAST_WIDE
  // Of the lines of some planes, each the sum of some rows: visit(first result, 16 results of each plane) by
  // chunks. Nothing is written to memory, from where the next instructions would have to read it.
  // weigh(plane, x, lanes, to): that sum at 16 entries from x on, of which those lanes exist. Where no chunk
  // reads more than `most_span` entries.
  static constexpr int most_span = 4 * chunk;
  template <int planes, typename Weigh, typename Visit>
  EQUIFAST_INLINE inline void visit(const Weigh& weigh, const Visit& visit) const {
    using Some = Pack<16, real>;
    using Head = typename Some::Head;
    const int* at = at_;
    const float* weight = weight_;
    for (int k = 0; k < chunks_; ++k) {
      const Chunk& c = chunk_[k];
      Some sum[planes], a[planes], b[planes];
      const auto part = [&](int r, Some(&to)[planes]) EQUIFAST_INLINE {
        const int x = c.base + r * chunk;
        with_lanes(0, zero - x, [&](auto lanes) EQUIFAST_INLINE {
          for (int p = 0; p < planes; ++p) weigh(p, x, lanes, to[p]);
        });
      };
      const auto each = [&](auto&& value_at) EQUIFAST_INLINE {
        for (int t = 0; t < c.terms; ++t, at += chunk, weight += chunk) {
          const __m512 w = _mm512_loadu_ps(weight);
          const __mmask16 some = _mm512_cmp_ps_mask(w, _mm512_setzero_ps(), _CMP_NEQ_UQ);
          const __m512i from = _mm512_loadu_si512(at);
          for (int p = 0; p < planes; ++p) {
            sum[p].h = (Head)_mm512_fmadd_ps(w, value_at(p, some, from), (__m512)sum[p].h);
          }
        }
      };
      for (int p = 0; p < planes; ++p) sum[p].zero();
      if (c.terms == 0) {
      } else if (c.span <= chunk) {
        part(0, a);
        each([&](int p, __mmask16 some, __m512i i)
                 EQUIFAST_INLINE { return _mm512_maskz_permutexvar_ps(some, i, (__m512)a[p].h); });
      } else if (c.span <= 2 * chunk) {
        part(0, a), part(1, b);
        each([&](int p, __mmask16 some, __m512i i) EQUIFAST_INLINE {
          return _mm512_maskz_permutex2var_ps(some, (__m512)a[p].h, i, (__m512)b[p].h);
        });
      } else {
        Some d[planes], e[planes];
        for (int p = 0; p < planes; ++p) e[p].zero();
        part(0, a), part(1, b), part(2, d);
        if (c.span > 3 * chunk) part(3, e);
        each([&](int p, __mmask16 some, __m512i i) EQUIFAST_INLINE {
          const __mmask16 later = _mm512_cmpge_epi32_mask(i, _mm512_set1_epi32(2 * chunk));
          const __m512 value = _mm512_maskz_permutex2var_ps(some, (__m512)a[p].h, i, (__m512)b[p].h);
          return _mm512_mask_mov_ps(value, later & some,
                                    _mm512_permutex2var_ps((__m512)d[p].h, i, (__m512)e[p].h));
        });
      }
      visit(k * chunk, sum);
    }
  }
#endif

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
  int chunks_ = 0, size_ = 0;

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

// The rows' matrix: line[x] of entries [first, last) is the sum over the entries of result i. row(y) is where
// row y begins. Up to 15 entries behind them are written too.
template <typename T, typename Row>
void combine(const Axis<Real<T>>& axis, int i, const Row& row, int first, int last,
             Real<T>* __restrict line) {
  using real = Real<T>;
  int e = axis.begin[i];
  const int end = axis.begin[i + 1];
  if constexpr (maskable<T>) {
    for (int x = first; x < last; x += 16) {
      with_lanes(0, last - x, [&](auto lanes) EQUIFAST_INLINE {
        Pack<16, real> sum, other;
        get(row(axis.at[e]) + x, lanes, sum), sum.scaled(axis.weight[e], sum);
        for (int more = e + 1; more < end; ++more) {
          get(row(axis.at[more]) + x, lanes, other), sum.add_scaled(axis.weight[more], other);
        }
        sum.put(line + x);
      });
    }
    return;
  }
  const T* __restrict a = row(axis.at[e]);
  const real wa = axis.weight[e];
  if (e + 1 == end) {
    for (int x = first; x < last; ++x) line[x] = wa * real(load(a[x]));
    return;
  }
  const T* __restrict b = row(axis.at[e + 1]);
  const real wb = axis.weight[e + 1];
  for (int x = first; x < last; ++x) line[x] = wa * real(load(a[x])) + wb * real(load(b[x]));
  for (e += 2; e < end; ++e) {
    const T* __restrict more = row(axis.at[e]);
    const real weight = axis.weight[e];
    for (int x = first; x < last; ++x) line[x] += weight * real(load(more[x]));
  }
}

// Result i of the rows' matrix and of the columns', of some planes that are `stride` apart, 16 columns at a
// time: visit(first column, values of each plane). `line`, `values`: scratch, with Columns::beyond entries
// behind the row that is read and the results. Several planes need wide vectors, chunks of at most most_span
// entries and results of at most most_rows_combined rows: whoever asks for several sees to it.
constexpr int most_rows_combined = 16;
template <int planes, typename T, typename Row, typename Visit>
EQUIFAST_INLINE inline void separable_row(const Axis<Real<T>>& rows, int i, const Columns<Real<T>>& columns,
                                          const Row& row, [[maybe_unused]] int64_t stride, Real<T>* line,
                                          Real<T>* values, const Visit& visit) {
  using real = Real<T>;
#if EQUIFAST_WIDE
  if constexpr (wide<T>) {
    constexpr int ahead = 2048 / int{sizeof(T)};
    const int e = rows.begin[i], count = rows.count(i);
    if (planes > 1 || (columns.widest <= columns.most_span && count <= most_rows_combined)) {
      const real* weight = rows.weight + e;
      const T* from[most_rows_combined];
      for (int j = 0; j < count; ++j) from[j] = row(rows.at[e + j]);
      if (count == 1) {
        const T* first = from[0];
        const real wa = weight[0];
        columns.template visit<planes>(
            [=](int p, int x, auto lanes, Pack<16, real>& v) EQUIFAST_INLINE {
              const T* a = opaque(first + x) + p * stride;
              __builtin_prefetch(a + ahead);
              get(a, lanes, v), v.scaled(wa, v);
            },
            visit);
      } else if (count == 2) {
        const T *first = from[0], *second = from[1];
        const real wa = weight[0], wb = weight[1];
        columns.template visit<planes>(
            [=](int p, int x, auto lanes, Pack<16, real>& v) EQUIFAST_INLINE {
              const T *a = opaque(first + x) + p * stride, *b = opaque(second + x) + p * stride;
              __builtin_prefetch(a + ahead), __builtin_prefetch(b + ahead);
              Pack<16, real> other;
              get(a, lanes, v), get(b, lanes, other);
              v.scaled(wa, v), v.add_scaled(wb, other);
            },
            visit);
      } else {
        columns.template visit<planes>(
            [&](int p, int x, auto lanes, Pack<16, real>& v) EQUIFAST_INLINE {
              const int64_t offset = p * stride + x;
              __builtin_prefetch(from[0] + offset + ahead);
              Pack<16, real> other;
              get(from[0] + offset, lanes, v), v.scaled(weight[0], v);
#pragma GCC unroll 1
              for (int j = 1; j < count; ++j) {
                get(from[j] + offset, lanes, other), v.add_scaled(weight[j], other);
              }
            },
            visit);
      }
      return;
    }
  }
#endif
  if constexpr (planes == 1) {
    combine<T>(rows, i, row, columns.lowest, columns.highest + 1, line);
    line[columns.zero] = 0;
    columns.apply(line, values);
    for (int x = columns.size(); x % 16 != 0; ++x) values[x] = 0;
    Pack<16, real> v[1];
    for (int x = 0; x < columns.size(); x += 16) v[0].get(values + x), visit(x, v);
  }
}

}  // namespace
}  // namespace equifast::cpu
