// The CUDA kernels of warp and its adjoint, on the host (cuda_shim), against double precision.
#include <string>

#include "cuda/warp.cu"
#include "cuda_cases.h"

namespace {

using namespace cases;
using equifast::cuda::WarpParams;

void test(const Problem& problem, Dtype dtype, Layout layout, int first, unsigned seed) {
  const int views = static_cast<int>(problem.views.size());
  const std::vector<double> theta = theta_of(first, views, problem.images);
  const std::string what = std::string(name_of(dtype)) + " " + name_of(layout) + " " +
                           std::to_string(problem.channels) + " channels of " +
                           std::to_string(problem.size.h) + "x" + std::to_string(problem.size.w) +
                           ", matrices from " + std::to_string(first) + ", ";
  equifast_shim::shuffle(seed);

  Tensor source(dtype, layout, problem.images, problem.channels, problem.size);
  source.randomize(1);
  std::vector<Tensor> targets;
  std::vector<Map> maps;
  for (const Size size : problem.views)
    targets.emplace_back(dtype, layout, problem.images, problem.channels, size);
  for (Tensor& target : targets) maps.push_back(target.map());
  WarpParams p{};
  p.shape = {dtype, layout != Layout::planar, problem.images, problem.channels, views};
  p.source = source.map();
  p.theta = theta.data();
  p.targets = maps.data();
  if (equifast::cuda::warp(p, nullptr) != cudaSuccess) ++failures;
  const Doubles input(source);
  for (int k = 0; k < views; ++k) {
    const std::size_t at = static_cast<std::size_t>(k);
    check(targets[at], warp(input, theta, k, problem.views[at]), dtype, (what + "warp").c_str());
  }

  Doubles expected(problem.images, problem.channels, problem.size.h, problem.size.w);
  for (int k = 0; k < views; ++k) {
    Tensor& target = targets[static_cast<std::size_t>(k)];
    target.randomize(static_cast<unsigned>(2 + k));
    add_adjoint(Doubles(target), theta, k, expected);
  }
  p.wide = equifast::cuda::launches(views) > 1;
  Tensor gradient(p.wide ? accumulator(dtype) : dtype, layout, problem.images, problem.channels,
                  problem.size);
  p.source = gradient.map();
  if (equifast::cuda::warp_adjoint(p, nullptr) != cudaSuccess) ++failures;
  check(gradient, expected, dtype, (what + "adjoint").c_str());
}

}  // namespace

int main() {
  unsigned seed = 0;
  const int count = static_cast<int>(matrices().size());
  for (const Dtype dtype : dtypes) {
    for (const Layout layout : layouts) {
      int first = 0;
      for (const Problem& problem : problems()) {
        // every matrix is met, in float32 by every size
        for (int i = 0; i < (dtype == Dtype::float32 ? count : 8); i += 4, first += 4)
          test(problem, dtype, layout, first, ++seed);
      }
    }
  }
  return report();
}
