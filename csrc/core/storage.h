// Storage types, what they are converted to for arithmetic, and how: bit by bit, since that vectorizes with
// every compiler and instruction set, and on a device by its own instructions, which round alike.
#pragma once

#include <cstdint>
#include <cstring>

#include "host_device.h"

namespace equifast::core {

enum class Dtype { float32, float64, float16, bfloat16 };

struct Half {
  std::uint16_t bits;
};
struct BFloat16 {
  std::uint16_t bits;
};

// Sums are taken in float32, or float64 where the features are.
template <typename T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <typename T>
using Real = typename Accumulator<T>::type;

EQUIFAST_HD inline float as_float(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
EQUIFAST_HD inline std::uint32_t as_bits(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

EQUIFAST_HD inline float load(float v) { return v; }
EQUIFAST_HD inline double load(double v) { return v; }
EQUIFAST_HD inline float load(BFloat16 v) { return as_float(static_cast<std::uint32_t>(v.bits) << 16); }
EQUIFAST_HD inline float load(Half v) {
#ifdef __CUDA_ARCH__
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(v.bits));
  return value;
#else
  const std::uint32_t sign = (v.bits & 0x8000u) << 16, rest = v.bits & 0x7fffu;
  // The exponent of float; subnormals as what they add to 2^-14, since float's own may be taken for 0.
  const std::uint32_t wide = rest << 13;
  const float tiny = as_float(wide + 0x38800000u) - as_float(0x38800000u);
  const std::uint32_t bits = rest >= 0x7c00u  ? wide | 0x7f800000u
                             : rest < 0x0400u ? as_bits(tiny)
                                              : wide + 0x38000000u;
  return as_float(bits | sign);
#endif
}

// To nearest, ties to even.
EQUIFAST_HD inline void store(float& to, float v) { to = v; }
EQUIFAST_HD inline void store(double& to, double v) { to = v; }
EQUIFAST_HD inline void store(BFloat16& to, float v) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to.bits) : "f"(v));
#else
  const std::uint32_t bits = as_bits(v);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to.bits = static_cast<std::uint16_t>(v != v ? 0x7fc0u : rounded);
#endif
}
EQUIFAST_HD inline void store(Half& to, float v) {
#ifdef __CUDA_ARCH__
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(v));
#else
  const std::uint32_t bits = as_bits(v), sign = (bits >> 16) & 0x8000u, rest = bits & 0x7fffffffu;
  std::uint32_t out;
  if (rest >= 0x47800000u) {  // 65536 and above, infinity, NaN
    out = rest > 0x7f800000u ? 0x7e00u : 0x7c00u;
  } else if (rest < 0x38800000u) {  // subnormal: adding 1/2 lets the addition round
    out = as_bits(as_float(rest) + 0.5f) - 0x3f000000u;
  } else {
    out = (rest + 0xfffu + ((rest >> 13) & 1u) - 0x38000000u) >> 13;
  }
  to.bits = static_cast<std::uint16_t>(out | sign);
#endif
}

}  // namespace equifast::core
