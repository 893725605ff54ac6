// The CUDA kernels of similarity and its derivative, on the host (cuda_shim), against double precision.
#include <string>

#include "cuda/similarity.cu"
#include "cuda/similarity_backward.cu"
#include "cuda_cases.h"

namespace {

using namespace cases;
using equifast::cuda::SimilarityParams;

// Of test (theta maps the view's positions to the anchor's): the matrix that maps the anchor's to the view's,
// or NaN.
std::vector<double> inverted(const std::vector<double>& theta) {
  std::vector<double> inverse;
  for (std::size_t at = 0; at < theta.size(); at += 6) {
    const double *t = theta.data() + at, det = t[0] * t[4] - t[1] * t[3];
    const double over = std::fabs(det) >= 1e-12 && std::isfinite(det) ? 1 / det : NAN;
    const double a = t[4] * over, b = -t[1] * over, c = -t[3] * over, d = t[0] * over;
    inverse.insert(inverse.end(), {a, b, -(a * t[2] + b * t[5]), c, d, -(c * t[2] + d * t[5])});
  }
  return inverse;
}

struct Expected {
  std::vector<double> similarity, sums;  // (N, K), (N, K, 3)
  std::vector<Doubles> gradients;        // of the anchor and of the views
};

// Cosine of a, b, and what its derivative by them is made of.
struct Cosine {
  double value = 0, cross = 0, own0 = 0, own1 = 0;
  Cosine(double inner, double square0, double square1) {
    const double norm0 = std::sqrt(square0), norm1 = std::sqrt(square1);
    if (norm0 < 1e-6 || norm1 < 1e-6) return;
    value = inner / (norm0 * norm1);
    cross = 1 / (norm0 * norm1), own0 = value / square0, own1 = value / square1;
  }
};

// By definition: each view is warped back whole, its derivative is that of the samples, and their adjoint.
Expected evaluate(const Doubles& f0, const std::vector<Doubles>& views, const std::vector<double>& theta,
                  bool pixel, const std::vector<double>& upstream) {
  const int images = f0.n, count = static_cast<int>(views.size());
  const std::vector<double> inverse = inverted(theta);
  Expected e;
  e.similarity.assign(static_cast<std::size_t>(images * count), 0);
  e.sums.assign(e.similarity.size() * 3, 0);
  e.gradients.emplace_back(f0.n, f0.c, f0.h, f0.w);
  for (int k = 0; k < count; ++k) {
    const Doubles& view = views[static_cast<std::size_t>(k)];
    const Doubles fk = warp(view, inverse, k, {f0.h, f0.w});
    Doubles by_sample(f0.n, f0.c, f0.h, f0.w);
    for (int n = 0; n < images; ++n) {
      const auto seen = [&](int j, int i) {
        return sample(matrix_of(inverse, images, k, n), i, j, f0.w, f0.h, view.w, view.h).inside;
      };
      double s[3] = {0, 0, 0}, cosines = 0, positions = 0;
      for (int j = 0; j < f0.h; ++j)
        for (int i = 0; i < f0.w; ++i) {
          if (!seen(j, i)) continue;
          double own[3] = {0, 0, 0};
          for (int c = 0; c < f0.c; ++c) {
            const double a = f0.at(n, c, j, i), b = fk.at(n, c, j, i);
            own[0] += a * b, own[1] += a * a, own[2] += b * b;
          }
          for (int q = 0; q < 3; ++q) s[q] += own[q];
          cosines += Cosine(own[0], own[1], own[2]).value;
          positions += 1;
        }
      const std::size_t at = static_cast<std::size_t>(n * count + k);
      const Cosine whole(s[0], s[1], s[2]);
      e.similarity[at] = pixel ? (positions > 0 ? cosines / positions : 0) : whole.value;
      const double kept[3] = {pixel ? cosines : s[0], pixel ? positions : s[1], pixel ? 0 : s[2]};
      for (std::size_t q = 0; q < 3; ++q) e.sums[at * 3 + q] = kept[q];
      for (int j = 0; j < f0.h; ++j)
        for (int i = 0; i < f0.w; ++i) {
          if (!seen(j, i)) continue;
          double own[3] = {0, 0, 0};
          for (int c = 0; c < f0.c; ++c) {
            const double a = f0.at(n, c, j, i), b = fk.at(n, c, j, i);
            own[0] += a * b, own[1] += a * a, own[2] += b * b;
          }
          const Cosine w = pixel ? Cosine(own[0], own[1], own[2]) : whole;
          const double share = upstream[at] / (pixel ? positions : 1);
          for (int c = 0; c < f0.c; ++c) {
            const double a = f0.at(n, c, j, i), b = fk.at(n, c, j, i);
            e.gradients[0].at(n, c, j, i) += share * (w.cross * b - w.own0 * a);
            by_sample.at(n, c, j, i) = share * (w.cross * a - w.own1 * b);
          }
        }
    }
    Doubles by_view(view.n, view.c, view.h, view.w);
    add_adjoint(by_sample, inverse, k, by_view);
    e.gradients.push_back(by_view);
  }
  return e;
}

void check_numbers(const std::vector<double>& actual, const std::vector<double>& expected, double bound,
                   const std::string& what) {
  for (std::size_t i = 0; i < actual.size(); ++i) {
    if (std::fabs(actual[i] - expected[i]) <= bound * std::fmax(1, std::fabs(expected[i]))) continue;
    ++failures;
    std::fprintf(stderr, "failed: %s: number %zu is %g, not %g\n", what.c_str(), i, actual[i], expected[i]);
    return;
  }
}

// Memory of (N, K) reals, float or double.
struct Reals {
  bool doubles;
  std::vector<double> wide;
  std::vector<float> narrow;
  Reals(Dtype dtype, std::size_t count)
      : doubles(dtype == Dtype::float64), wide(doubles ? count : 0, NAN), narrow(doubles ? 0 : count, NAN) {}
  void* data() { return doubles ? static_cast<void*>(wide.data()) : static_cast<void*>(narrow.data()); }
  std::vector<double> get() const {
    return doubles ? wide : std::vector<double>(narrow.begin(), narrow.end());
  }
  void set(const std::vector<double>& values) {
    for (std::size_t i = 0; i < values.size(); ++i) {
      if (doubles) wide[i] = values[i];
      if (!doubles) narrow[i] = static_cast<float>(values[i]);
    }
  }
};

// All memory that the two passes want.
struct Run {
  Dtype dtype;
  Tensor anchor;
  std::vector<Tensor> views, gradients;
  std::vector<Map> maps, gradient_maps;
  std::vector<double> theta, sums, partial;
  Reals result, upstream, weights;
  SimilarityParams p{};

  Run(const Problem& problem, Dtype dtype_, Layout layout, bool pixel, int first)
      : dtype(dtype_),
        anchor(dtype, layout, problem.images, problem.channels, problem.size),
        theta(theta_of(first, static_cast<int>(problem.views.size()), problem.images)),
        result(dtype, static_cast<std::size_t>(problem.images) * problem.views.size()),
        upstream(dtype, static_cast<std::size_t>(problem.images) * problem.views.size()),
        weights(dtype, static_cast<std::size_t>(problem.images * problem.size.h * problem.size.w) *
                           problem.views.size() * 3) {
    const int views_count = static_cast<int>(problem.views.size());
    const bool wide = equifast::cuda::launches(views_count) > 1;
    anchor.randomize(1);
    gradients.emplace_back(wide ? accumulator(dtype) : dtype, layout, problem.images, problem.channels,
                           problem.size);
    for (int k = 0; k < views_count; ++k) {
      const Size size = problem.views[static_cast<std::size_t>(k)];
      views.emplace_back(dtype, layout, problem.images, problem.channels, size);
      views.back().randomize(static_cast<unsigned>(2 + k));
      gradients.emplace_back(dtype, layout, problem.images, problem.channels, size);
    }
    for (Tensor& view : views) maps.push_back(view.map());
    for (Tensor& gradient : gradients) gradient_maps.push_back(gradient.map());
    std::vector<double> up;
    for (int i = 0; i < problem.images * views_count; ++i) up.push_back(0.25 + 0.5 * (i % 5) - (i % 3));
    upstream.set(up);
    p.shape = {dtype, layout != Layout::planar, problem.images, problem.channels, views_count};
    p.pixel = pixel;
    p.anchor = anchor.map();
    p.views = maps.data();
    p.theta = theta.data();
    partial.assign(up.size() * static_cast<std::size_t>(equifast::cuda::similarity_blocks(p)) * 3, NAN);
    sums.assign(up.size() * 3, NAN);
    p.partial = partial.data(), p.sums = sums.data();
    p.result = result.data(), p.upstream = upstream.data();
    p.weights = pixel ? weights.data() : nullptr;
    p.anchor_gradient = gradient_maps[0];
    p.wide = wide;
    p.view_gradients = gradient_maps.data() + 1;
    p.cached = first % 8 == 0 ? 4096 : 1 << 30;  // several bands, or one
  }

  Expected expected() const {
    std::vector<Doubles> doubles(views.begin(), views.end());
    return evaluate(Doubles(anchor), doubles, theta, p.pixel, upstream.get());
  }

  void forward() {
    if (equifast::cuda::similarity(p, nullptr) != cudaSuccess) ++failures;
  }
  void backward() {
    if (equifast::cuda::similarity_backward(p, nullptr) != cudaSuccess) ++failures;
  }
};

void test(const Problem& problem, Dtype dtype, Layout layout, bool pixel, int first, unsigned seed) {
  equifast_shim::shuffle(seed);
  const std::string what = std::string(name_of(dtype)) + " " + name_of(layout) +
                           (pixel ? " pixel " : " image ") + std::to_string(problem.channels) +
                           " channels of " + std::to_string(problem.size.h) + "x" +
                           std::to_string(problem.size.w) + ", matrices from " + std::to_string(first) + ", ";
  Run run(problem, dtype, layout, pixel, first);
  const Expected expected = run.expected();
  const double bound = tolerance(accumulator(dtype));
  run.forward();
  check_numbers(run.result.get(), expected.similarity, bound, what + "similarity");
  check_numbers(run.sums, expected.sums, bound, what + "sums");
  run.backward();
  for (std::size_t i = 0; i < run.gradients.size(); ++i)
    check(run.gradients[i], expected.gradients[i], dtype, (what + "gradient " + std::to_string(i)).c_str(),
          4e-3);
}

const Problem small{1, 3, {4, 5}, {{4, 5}, {6, 3}}};

// A vector of norm below 1e-6 counts as zero: similarity 0, gradient 0.
void test_small_vectors(Layout layout, bool pixel) {
  Run run(small, Dtype::float32, layout, pixel, 0);
  run.anchor.visit([&](int n, int c, int y, int x) { run.anchor.set(n, c, y, x, 1e-8); });
  run.forward();
  check_numbers(run.result.get(), {0, 0}, 0, "similarity of small vectors");
  run.backward();
  for (const Tensor& gradient : run.gradients)
    check(gradient, Doubles(gradient.n, gradient.c, gradient.h, gradient.w), Dtype::float64,
          "gradient of small vectors");
}

// Features that are NaN make results NaN, and nothing else: no access leaves the tensors, no other image is
// touched.
void test_nan(Layout layout, bool pixel) {
  Problem problem = small;
  problem.images = 2;
  Run run(problem, Dtype::float32, layout, pixel, 0);
  const Expected expected = run.expected();
  for (int c = 0; c < problem.channels; ++c) run.anchor.set(0, c, 0, 0, NAN);
  run.forward();
  run.backward();
  const std::vector<double> result = run.result.get();
  if (!std::isnan(result[0]) || std::fabs(result[2] - expected.similarity[2]) > 2e-5) {
    ++failures;
    std::fprintf(stderr, "failed: NaN features\n");
  }
}

// A view without weight adds nothing, whatever its features are.
void test_unweighted_views_are_not_read(Layout layout) {
  Run run(small, Dtype::float32, layout, false, 0);
  const Expected expected = [&] {
    run.upstream.set({0, 1});
    return run.expected();
  }();
  run.forward();
  run.views[0].poison();
  run.backward();
  for (std::size_t i = 0; i < run.gradients.size(); ++i)
    check(run.gradients[i], expected.gradients[i], Dtype::float32, "gradient beside a view without weight",
          4e-3);
}

}  // namespace

// test_similarity_cuda [image|pixel]: of one reduction, or of both.
int main(int arguments, char** argument) {
  const std::string asked = arguments > 1 ? argument[1] : "";
  const int count = static_cast<int>(matrices().size());
  for (const bool pixel : {false, true}) {
    if (asked == (pixel ? "image" : "pixel")) continue;
    unsigned seed = pixel ? 100000 : 0;
    for (const Layout layout : layouts) {
      for (const Dtype dtype : dtypes) {
        int first = 0;
        for (const Problem& problem : problems()) {
          // every matrix is met, in float32 by every size
          for (int i = 0; i < (dtype == Dtype::float32 ? count : 8); i += 4, first += 4)
            test(problem, dtype, layout, pixel, first, ++seed);
        }
      }
      test_small_vectors(layout, pixel);
      test_nan(layout, pixel);
    }
  }
  for (const Layout layout : layouts) test_unweighted_views_are_not_read(layout);
  return report();
}
