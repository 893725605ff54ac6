// Counter-based random numbers: Philox-4x32-10 (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3,
// SC 2011) and normals by Box-Muller. Torch-free, for host and device. The same stream is produced in Python
// by equifast/rng.py: what is drawn is a function of seed, stream, element, draw, step and id alone.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"
#include "storage.h"

namespace equifast::core {

struct Words4 {
  std::uint32_t word[4];
};

struct Normals4 {
  float value[4];
};

struct PhiloxKey {
  std::uint32_t seed;    // 0..2^32-1
  std::uint32_t stream;  // which kind of quantity is drawn
};

// Counter of the four numbers that serve elements 4 * quad .. 4 * quad + 3 of one image.
EQUIFAST_HD inline Words4 philox_counter(
    std::uint32_t quad,  // element // 4, so up to 2^34 elements per image
    std::uint32_t draw,  // 0..2^16-1
    std::uint32_t step,  // 0..2^16-1
    std::int64_t id) {   // of the image; two's complement if negative
  const auto bits = static_cast<std::uint64_t>(id);
  return {
      {quad, (draw << 16) + step, static_cast<std::uint32_t>(bits), static_cast<std::uint32_t>(bits >> 32)}};
}

EQUIFAST_HD inline Words4 philox(PhiloxKey key, Words4 counter) {
  constexpr int rounds = 10;
  constexpr std::uint64_t multiplier0 = 0xD2511F53u, multiplier1 = 0xCD9E8D57u;
  constexpr std::uint32_t weyl0 = 0x9E3779B9u, weyl1 = 0xBB67AE85u;  // golden ratio, sqrt(3) - 1
  std::uint32_t k0 = key.seed, k1 = key.stream;
  for (int round = 0; round < rounds; ++round) {
    const std::uint64_t product0 = multiplier0 * counter.word[0];
    const std::uint64_t product1 = multiplier1 * counter.word[2];
    counter = {{static_cast<std::uint32_t>(product1 >> 32) ^ counter.word[1] ^ k0,
                static_cast<std::uint32_t>(product1),
                static_cast<std::uint32_t>(product0 >> 32) ^ counter.word[3] ^ k1,
                static_cast<std::uint32_t>(product0)}};
    k0 += weyl0;
    k1 += weyl1;
  }
  return counter;
}

// The functions below are branch-free arithmetic, so that a compiler turns a loop over them into vectors,
// which the libraries' logarithm, sine and cosine prevent. Their polynomials are minimax fits on the
// intervals named.

// sqrt(-2 log u) of u = (word + 1/2) * 2^-32. Near u = 1 float32 has no u that says how far below 1 it is
// (the upper 129 words would round to 1 and give 0), but 1 - u = (~word + 1/2) * 2^-32 is exact there.
EQUIFAST_HD inline float box_muller_radius(std::uint32_t word) {
  constexpr float scale = 1.0f / 4294967296.0f;  // 2^-32
  constexpr float ln2 = 0.693147181f;
  const std::int32_t upper = static_cast<std::int32_t>(word) >> 31;  // all ones where u > 1/2
  const std::int32_t below = static_cast<std::int32_t>(word) ^ upper;
  const float nearest = (static_cast<float>(below) + 0.5f) * scale;  // distance to 0 or 1
  const float u = upper != 0 ? 1.0f - nearest : nearest;
  // u = 2^exponent * (1 + f), with 1 + f in [sqrt(1/2), sqrt(2)). Exponent 0: u is above 1/2, and f is exact.
  const std::int32_t exponent = static_cast<std::int32_t>(as_bits(u) - 0x3f3504f3u) >> 23;  // of sqrt(1/2)
  const float f =
      exponent == 0 ? -nearest : as_float(as_bits(u) - (static_cast<std::uint32_t>(exponent) << 23)) - 1.0f;
  // log(1 + f) = f - f^2 / 2 + f^3 p(f), relative error 4e-8
  float p = 0.0870043561f;
  p = p * f - 0.142674863f;
  p = p * f + 0.149147674f;
  p = p * f - 0.16577585f;
  p = p * f + 0.199630633f;
  p = p * f - 0.250013381f;
  p = p * f + 0.333339095f;
  const float log1p = f + f * f * (p * f - 0.5f);
  return std::sqrt(-2.0f * (static_cast<float>(exponent) * ln2 + log1p));
}

struct Direction {
  float cosine, sine;
};

// Of the angle 2 pi u. The nearest quarter turn is taken off in integers, so that no accuracy is lost near
// the multiples of pi / 2, where one of the two is small.
EQUIFAST_HD inline Direction box_muller_direction(std::uint32_t word) {
  constexpr float scale = 1.46291807926715968e-9f;           // pi * 2^-31
  const std::uint32_t quarter = (word + 0x20000000u) >> 30;  // modulo 4, where the sum wraps too
  const auto rest = static_cast<std::int32_t>(word - (quarter << 30));
  const float angle = (static_cast<float>(rest) + 0.5f) * scale;  // in [-pi / 4, pi / 4]
  const float square = angle * angle;
  // errors below 1e-8
  const float sine =
      angle + angle * square * (-0.166666552f + square * (0.008332178f + square * -0.000195172994f));
  const float cosine =
      1.0f -
      square * (0.5f - square * (0.0416666456f + square * (-0.00138873677f + square * 2.44384519e-05f)));
  const bool swapped = (quarter & 1u) != 0;
  const std::uint32_t cosine_sign = ((quarter + 1u) & 2u) << 30, sine_sign = (quarter & 2u) << 30;
  return {as_float(as_bits(swapped ? sine : cosine) ^ cosine_sign),
          as_float(as_bits(swapped ? cosine : sine) ^ sine_sign)};
}

// Words (0, 1) and (2, 3): radius, angle; cosine, then sine. Within 1e-5 of a float64 evaluation, everywhere.
EQUIFAST_HD inline Normals4 box_muller(Words4 words) {
  Normals4 normals;
  for (int pair = 0; pair < 4; pair += 2) {
    const float radius = box_muller_radius(words.word[pair]);
    const Direction direction = box_muller_direction(words.word[pair + 1]);
    normals.value[pair] = radius * direction.cosine;
    normals.value[pair + 1] = radius * direction.sine;
  }
  return normals;
}

}  // namespace equifast::core
