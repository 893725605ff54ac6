// csrc/core/philox.h against published words, against float64 and against the moments of a normal.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <vector>

#include "core/philox.h"

namespace {

using equifast::core::Normals4;
using equifast::core::PhiloxKey;
using equifast::core::Words4;

int failures = 0;

void check(bool holds, const char* what) {
  if (holds) return;
  ++failures;
  std::fprintf(stderr, "failed: %s\n", what);
}

void check_below(double value, double bound, const char* what) {
  std::printf("%-56s %.3g (bound %.3g)\n", what, value, bound);
  check(value <= bound, what);  // false for NaN too
}

bool equal(const Words4& a, const Words4& b) {
  for (int i = 0; i < 4; ++i) {
    if (a.word[i] != b.word[i]) return false;
  }
  return true;
}

struct Known {
  Words4 counter;
  PhiloxKey key;
  Words4 expected;
};

void test_known_answers() {
  // Random123, tests/kat_vectors, the lines "philox4x32 10": counter, key, result.
  const Known published[] = {
      {{{0, 0, 0, 0}}, {0, 0}, {{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}}},
      {{{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}},
       {0xffffffff, 0xffffffff},
       {{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}}},
      {{{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}},
       {0xa4093822, 0x299f31d0},
       {{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}}},
  };
  for (const Known& known : published) {
    check(equal(equifast::core::philox(known.key, known.counter), known.expected), "published words");
  }
}

void test_counter() {
  // Results of an independent implementation in Python integers, counter packed as the design says:
  // quad, draw * 2^16 + step, id low, id high.
  const std::int64_t id = (std::int64_t{1} << 32) + 9;
  check(equal(equifast::core::philox_counter(7, 3, 5, id), {{7, 3 * 65536 + 5, 9, 1}}), "counter layout");
  check(equal(equifast::core::philox({12345, 1}, equifast::core::philox_counter(7, 3, 5, id)),
              {{0xfe71fbcb, 0xe7ee893b, 0xbed3f7b2, 0xdf66fb05}}),
        "words of (seed 12345, stream 1, quad 7, draw 3, step 5, id 2^32 + 9)");
  check(equal(equifast::core::philox({0xffffffff, 0}, equifast::core::philox_counter(7, 3, 5, -1)),
              {{0xe6eda9a3, 0xc1f349d8, 0x5f81c92c, 0xeceec4e1}}),
        "words of (seed 2^32 - 1, stream 0, quad 7, draw 3, step 5, id -1)");
}

// Largest absolute difference of the four normals to the same formula in float64.
double error(const Words4& words) {
  const Normals4 normals = equifast::core::box_muller(words);
  double worst = 0;
  for (int pair = 0; pair < 4; pair += 2) {
    const double pi = 3.14159265358979323846;
    const double u0 = (words.word[pair] + 0.5) / 4294967296.0;      // exact
    const double u1 = (words.word[pair + 1] + 0.5) / 4294967296.0;  // exact
    const double radius = std::sqrt(-2 * std::log(u0));
    worst = std::fmax(worst, std::fabs(normals.value[pair] - radius * std::cos(2 * pi * u1)));
    worst = std::fmax(worst, std::fabs(normals.value[pair + 1] - radius * std::sin(2 * pi * u1)));
    if (!std::isfinite(normals.value[pair]) || !std::isfinite(normals.value[pair + 1])) return INFINITY;
  }
  return worst;
}

void test_accuracy() {
  std::vector<std::uint32_t> edges;
  for (const std::uint32_t centre : {0x00000000u, 0x40000000u, 0x80000000u, 0xc0000000u}) {
    for (std::uint32_t distance = 0; distance < 512; ++distance) {
      edges.push_back(centre + distance);
      edges.push_back(centre - 1 - distance);  // wraps to the words nearest u = 1
    }
  }
  for (int power = 1; power < 32; ++power) {
    edges.push_back((1u << power) - 1);
    edges.push_back(1u << power);
    edges.push_back(~(1u << power));
  }
  double worst = 0;
  for (const std::uint32_t a : edges) {
    for (const std::uint32_t b : edges) worst = std::fmax(worst, error({{a, b, b, a}}));
  }
  check_below(worst, 1e-5, "normals against float64, words at the edges");

  worst = 0;
  for (std::uint32_t quad = 0; quad < 1000000; ++quad) {
    worst = std::fmax(worst,
                      error(equifast::core::philox({1, 2}, equifast::core::philox_counter(quad, 0, 0, 0))));
  }
  check_below(worst, 1e-5, "normals against float64, 4,000,000 drawn");
  // The word nearest u = 1 must not collapse to 0: sqrt(-2 log(1 - 2^-33)) = 1.526e-5.
  check(equifast::core::box_muller_radius(0xffffffff) > 1.52e-5f, "radius at u = 1 - 2^-33");
}

void test_moments() {
  constexpr int quads = 1000000;
  constexpr double n = 4.0 * quads;
  double sum[4] = {};    // of x, x^2, x^3, x^4
  double cross[6] = {};  // of the products of two of the four lanes
  for (std::uint32_t quad = 0; quad < quads; ++quad) {
    // The id and the step move as well: neighbours in every coordinate of the counter must be independent.
    const Words4 counter = equifast::core::philox_counter(quad / 16, 0, quad % 4, (quad / 4) % 4);
    const Normals4 normals = equifast::core::box_muller(equifast::core::philox({0, 0}, counter));
    int product = 0;
    for (int i = 0; i < 4; ++i) {
      const double x = normals.value[i];
      sum[0] += x;
      sum[1] += x * x;
      sum[2] += x * x * x;
      sum[3] += x * x * x * x;
      for (int j = i + 1; j < 4; ++j) cross[product++] += x * normals.value[j];
    }
  }
  // Five standard errors: the variances of x, x^2, x^3, x^4 under N(0, 1) are 1, 2, 15 and 96.
  check_below(std::fabs(sum[0] / n), 5 * std::sqrt(1 / n), "mean");
  check_below(std::fabs(sum[1] / n - 1), 5 * std::sqrt(2 / n), "variance");
  check_below(std::fabs(sum[2] / n), 5 * std::sqrt(15 / n), "third moment");
  check_below(std::fabs(sum[3] / n - 3), 5 * std::sqrt(96 / n), "fourth moment");
  for (const double product : cross) {
    check_below(std::fabs(product / quads), 5 * std::sqrt(1.0 / quads), "correlation of two lanes");
  }
}

}  // namespace

int main() {
  test_known_answers();
  test_counter();
  test_accuracy();
  test_moments();
  if (failures == 0) std::puts("all hold");
  return failures == 0 ? 0 : 1;
}
