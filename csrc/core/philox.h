// Counter-based random numbers: Philox-4x32-10 (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3,
// SC 2011) and normals by Box-Muller. Torch-free, for host and device. The same stream is produced in Python
// by equifast/rng.py: what is drawn is a function of seed, stream, element, draw, step and id alone.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"

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

// sqrt(-2 log u) of u = (word + 1/2) * 2^-32. Near u = 1 float32 has no u that says how far below 1 it is
// (the upper 129 words would round to 1 and give 0), but 1 - u = (~word + 1/2) * 2^-32 is exact there, and
// log1p keeps the relative accuracy of -log u.
EQUIFAST_HD inline float box_muller_radius(std::uint32_t word) {
  constexpr float scale = 1.0f / 4294967296.0f;  // 2^-32
  const bool upper = word >= 0x80000000u;        // u > 1/2
  const float u = (static_cast<float>(upper ? ~word : word) + 0.5f) * scale;
  return std::sqrt(-2.0f * (upper ? std::log1p(-u) : std::log(u)));
}

// 2 pi u less a whole turn where u > 1/2: in (-pi, pi) float32 carries the angle with half the error.
EQUIFAST_HD inline float box_muller_angle(std::uint32_t word) {
  constexpr float scale = 1.46291807926715968e-9f;  // pi * 2^-31
  const bool upper = word >= 0x80000000u;
  const float turned = (static_cast<float>(upper ? ~word : word) + 0.5f) * scale;
  return upper ? -turned : turned;
}

// Words (0, 1) and (2, 3): radius, angle; cosine, then sine. Within 1e-5 of a float64 evaluation, everywhere.
EQUIFAST_HD inline Normals4 box_muller(Words4 words) {
  Normals4 normals;
  for (int pair = 0; pair < 4; pair += 2) {
    const float radius = box_muller_radius(words.word[pair]);
    const float angle = box_muller_angle(words.word[pair + 1]);
    normals.value[pair] = radius * std::cos(angle);
    normals.value[pair + 1] = radius * std::sin(angle);
  }
  return normals;
}

}  // namespace equifast::core
