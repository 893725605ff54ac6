// Vectors: a few numbers that are computed with at once, and how they get from memory and to it. Included by
// kernels that are compiled once per instruction set, hence the unnamed namespace.
#pragma once

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define EQUIFAST_WIDE 1
#else
#define EQUIFAST_WIDE 0
#endif

#if defined(__AVX2__)
#pragma GCC diagnostic push
#ifndef __clang__
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // of registers that GCC 12's header leaves undefined
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#include <cstring>
#include <type_traits>

#include "rows.h"

// Vectors that functions pass to each other stay in registers only where these are inlined.
#define EQUIFAST_INLINE __attribute__((always_inline))

namespace equifast::cpu {
namespace {

// A pointer of which the compiler forgets how it came about: some planes at one place are then addressed from
// it, where each would have a pointer of its own, more than there are registers.
template <typename T>
EQUIFAST_INLINE inline T* opaque(T* p) {
#if defined(__GNUC__)
  asm("" : "+r"(p));
#endif
  return p;
}

// Whether 16 lanes are one register.
template <typename T>
constexpr bool wide = EQUIFAST_WIDE && !std::is_same<T, double>::value;

// Whether some lanes of 16 are read and written about as fast as all.
#if defined(__AVX2__)
template <typename T>
constexpr bool maskable = wide<T> || std::is_same<T, float>::value;
#else
template <typename T>
constexpr bool maskable = false;
#endif

// Bytes of a register. A vector of more would live in memory.
#if EQUIFAST_WIDE
constexpr int register_bytes = 64;
#elif defined(__AVX__)
constexpr int register_bytes = 32;
#else
constexpr int register_bytes = 16;
#endif

// `lanes` numbers that are computed with at once: a register full of them, and a pack of the rest. As a type
// of its own, since compilers unroll a loop over them before they think of vectors. Never passed by value:
// the calling convention depends on the instruction set.
template <int lanes, typename real>
struct Pack {
  static constexpr int most = register_bytes / int{sizeof(real)}, head = lanes < most ? lanes : most;
  typedef real Head __attribute__((vector_size(head * sizeof(real))));  // an alias would not take it
  Head h;
  Pack<lanes - head, real> rest;

  EQUIFAST_INLINE inline void zero() { h = Head{}, rest.zero(); }
  EQUIFAST_INLINE inline void get(const real* from) {
    std::memcpy(&h, from, sizeof(h)), rest.get(from + head);
  }
  EQUIFAST_INLINE inline void put(real* to) const { std::memcpy(to, &h, sizeof(h)), rest.put(to + head); }
  EQUIFAST_INLINE inline void add(const Pack& a) { h += a.h, rest.add(a.rest); }
  EQUIFAST_INLINE inline void subtract(const Pack& a) { h -= a.h, rest.subtract(a.rest); }
  EQUIFAST_INLINE inline void scaled(real f, const Pack& a) { h = f * a.h, rest.scaled(f, a.rest); }
  EQUIFAST_INLINE inline void add_scaled(real f, const Pack& a) { h += f * a.h, rest.add_scaled(f, a.rest); }
  EQUIFAST_INLINE inline void add_product(const Pack& a, const Pack& b) {
    h += a.h * b.h, rest.add_product(a.rest, b.rest);
  }
  // f a - g b
  EQUIFAST_INLINE inline void combine(real f, const Pack& a, real g, const Pack& b) {
    h = f * a.h - g * b.h, rest.combine(f, a.rest, g, b.rest);
  }
  // a + f (b - a)
  EQUIFAST_INLINE inline void between(real f, const Pack& a, const Pack& b) {
    h = a.h + f * (b.h - a.h), rest.between(f, a.rest, b.rest);
  }
  // In the order of the lanes.
  EQUIFAST_INLINE inline void sum_to(double& total) const {
    for (int i = 0; i < head; ++i) total += double(h[i]);
    rest.sum_to(total);
  }
  EQUIFAST_INLINE inline double sum() const {
    double total = 0;
    sum_to(total);
    return total;
  }
};

template <typename real>
struct Pack<0, real> {
  void zero() {}
  void get(const real*) {}
  void put(real*) const {}
  void add(const Pack&) {}
  void subtract(const Pack&) {}
  void scaled(real, const Pack&) {}
  void add_scaled(real, const Pack&) {}
  void add_product(const Pack&, const Pack&) {}
  void combine(real, const Pack&, real, const Pack&) {}
  void between(real, const Pack&, const Pack&) {}
  void sum_to(double&) const {}
};

// The three sums of a cosine, over a few positions and channels: in `real`, and given away in double.
template <int lanes, typename real>
struct Sums {
  Pack<lanes, real> inner, square0, square1;
  Sums() { zero(); }
  void add(const Pack<lanes, real>& v0, const Pack<lanes, real>& v1) {
    inner.add_product(v0, v1), square0.add_product(v0, v0), square1.add_product(v1, v1);
  }
  void give(double* out) {
    out[0] += inner.sum(), out[1] += square0.sum(), out[2] += square1.sum();
    zero();
  }

 private:
  void zero() { inner.zero(), square0.zero(), square1.zero(); }
};

#if EQUIFAST_WIDE
inline __mmask16 first_of_16(int count) {
  return static_cast<__mmask16>(count >= 16 ? 0xffff : (1 << count) - 1);
}

// Lanes [first, last) of 16, of which the latter may be anything.
inline __mmask16 of_16(int first, int last) {
  return static_cast<__mmask16>(last <= 0 || first > 15 ? 0 : first_of_16(last) & (0xffff << first));
}

inline __m512 load_16(const float* from, __mmask16 m) { return _mm512_maskz_loadu_ps(m, from); }
inline __m512 load_16(const BFloat16* from, __mmask16 m) {
  const __m512i words = _mm512_maskz_cvtepu16_epi32(m, _mm256_maskz_loadu_epi16(m, from));
  return _mm512_castsi512_ps(_mm512_maskz_slli_epi32(m, words, 16));
}
inline __m512 load_16(const Half* from, __mmask16 m) {
  return _mm512_maskz_cvtph_ps(m, _mm256_maskz_loadu_epi16(m, from));
}

inline __m256i words_of(__m512 v, Half) {
  return _mm512_maskz_cvtps_ph(0xffff, v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline __m256i words_of(__m512 v, BFloat16) {  // as core::store
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_maskz_srli_epi32(0xffff, bits, 16), _mm512_set1_epi32(1));
  __m512i words = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  words = _mm512_maskz_srli_epi32(0xffff, words, 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  words = _mm512_mask_mov_epi32(words, nan, _mm512_set1_epi32(0x7fc0));
  return _mm512_maskz_cvtepi32_epi16(0xffff, words);
}

inline void put_16(float* to, __m512 v) { _mm512_storeu_ps(to, v); }
template <typename T>
inline void put_16(T* to, __m512 v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), words_of(v, T{}));
}

// The first `count` of them. Eight or more in two stores that overlap: a masked one of words is slow.
template <typename T>
inline void put_16(T* to, int count, __m512 v) {
  if (count >= 16) return put_16(to, v);
  const __m256i words = words_of(v, T{});
  if (count >= 8) {
    const __m256i last = _mm256_add_epi16(_mm256_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7, 0, 0, 0, 0, 0, 0, 0, 0),
                                          _mm256_set1_epi16(static_cast<short>(count - 8)));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(words));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + count - 8),
                     _mm256_castsi256_si128(_mm256_maskz_permutexvar_epi16(0xffff, last, words)));
    return;
  }
  T values[16];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(values), words);
  for (int i = 0; i < count; ++i) to[i] = values[i];
}
inline void put_16(float* to, int count, __m512 v) { _mm512_mask_storeu_ps(to, first_of_16(count), v); }
#endif

#if defined(__AVX2__) && !EQUIFAST_WIDE
// Eight lanes from `lane` on, of those in [first, last).
inline __m256i of_8(int lane, int first, int last) {
  const __m256i lanes = _mm256_add_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(lane));
  return _mm256_andnot_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32(first), lanes),
                             _mm256_cmpgt_epi32(_mm256_set1_epi32(last), lanes));
}

inline void get_some(const float* from, int first, int last, Pack<16, float>& v) {
  using Head = Pack<16, float>::Head;
  v.h = (Head)_mm256_maskload_ps(from, of_8(0, first, last));
  v.rest.h = (Head)_mm256_maskload_ps(from + 8, of_8(8, first, last));
}

// The first `count`. Eight or more in two stores that overlap: a masked one is slow on some CPUs.
inline void put_first(float* to, int count, const Pack<16, float>& v) {
  if (count < 8) return _mm256_maskstore_ps(to, of_8(0, 0, count), (__m256)v.h);
  const __m256i lanes =
      _mm256_add_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(count - 8));
  const __m256 low = _mm256_permutevar8x32_ps((__m256)v.h, lanes),
               high = _mm256_permutevar8x32_ps((__m256)v.rest.h, lanes);
  const __m256i above = _mm256_cmpgt_epi32(lanes, _mm256_set1_epi32(7));
  _mm256_storeu_ps(to, (__m256)v.h);
  _mm256_storeu_ps(to + count - 8, _mm256_blendv_ps(low, high, _mm256_castsi256_ps(above)));
}
#endif

// All lanes of 16, or those in [first, last).
struct AllLanes {};
struct SomeLanes {
  int first, last;
};

// Calls work(lanes), of which more may be asked for than there are. Masks cost: most vectors need none.
template <typename Work>
EQUIFAST_INLINE inline void with_lanes(int first, int last, const Work& work) {
  if (first <= 0 && last >= 16) {
    work(AllLanes());
  } else {
    work(SomeLanes{first < 0 ? 0 : first, last > 16 ? 16 : last});
  }
}

// Numbers of any type as real ones, and back. Where some lanes are asked for the others are 0, and are not
// written.
template <typename T>
EQUIFAST_INLINE inline void get(const T* from, AllLanes, Pack<16, Real<T>>& v) {
  if constexpr (std::is_same<T, Real<T>>::value) {
    v.get(from);
    return;
  }
#if EQUIFAST_WIDE
  if constexpr (wide<T>) {
    v.h = (typename Pack<16, Real<T>>::Head)load_16(from, 0xffff);
    return;
  }
#endif
  Real<T> numbers[16];
  for (int i = 0; i < 16; ++i) numbers[i] = load(from[i]);
  v.get(numbers);
}

template <typename T>
EQUIFAST_INLINE inline void get(const T* from, SomeLanes lanes, Pack<16, Real<T>>& v) {
#if EQUIFAST_WIDE
  if constexpr (wide<T>) {
    v.h = (typename Pack<16, Real<T>>::Head)load_16(from, of_16(lanes.first, lanes.last));
    return;
  }
#elif defined(__AVX2__)
  if constexpr (maskable<T>) return get_some(from, lanes.first, lanes.last, v);
#endif
  Real<T> numbers[16] = {};
  for (int i = lanes.first; i < lanes.last; ++i) numbers[i] = load(from[i]);
  v.get(numbers);
}

template <typename T>
EQUIFAST_INLINE inline void put(T* to, AllLanes, const Pack<16, Real<T>>& v) {
  if constexpr (std::is_same<T, Real<T>>::value) {
    v.put(to);
    return;
  }
#if EQUIFAST_WIDE
  if constexpr (wide<T>) return put_16(to, (__m512)v.h);
#endif
  Real<T> numbers[16];
  v.put(numbers);
  for (int i = 0; i < 16; ++i) store(to[i], numbers[i]);
}

template <typename T>
EQUIFAST_INLINE inline void put(T* to, SomeLanes lanes, const Pack<16, Real<T>>& v) {
#if EQUIFAST_WIDE
  if constexpr (std::is_same<T, float>::value) {
    _mm512_mask_storeu_ps(to, of_16(lanes.first, lanes.last), (__m512)v.h);
    return;
  }
  if constexpr (wide<T>) {
    if (lanes.first == 0) return put_16(to, lanes.last, (__m512)v.h);
  }
#elif defined(__AVX2__)
  if constexpr (maskable<T>) {
    if (lanes.first == 0) return put_first(to, lanes.last, v);
  }
#endif
  T numbers[16];  // a masked store of words is slow
  put(numbers, AllLanes(), v);
  for (int i = lanes.first; i < lanes.last; ++i) to[i] = numbers[i];
}

}  // namespace
}  // namespace equifast::cpu
