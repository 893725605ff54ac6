// The operators on the CPU: tensors in, parameters out, tasks over threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <optional>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "../tensors.h"
#include "kernels.h"

namespace equifast::cpu {
namespace {

Map map_of(const Tensor& t, const char* name) {
  const std::int64_t row = t.stride(2) < 0 ? -t.stride(2) : t.stride(2);
  STD_TORCH_CHECK(row * t.size(2) < (std::int64_t{1} << 31), name,
                  " must have less than 2^31 elements in a plane");
  return {t.const_data_ptr(),          t.stride(0), t.stride(1), t.stride(2), static_cast<int>(t.size(2)),
          static_cast<int>(t.size(3)), t.stride(3)};
}

Gradient gradient_of(const Tensor& t) {
  return {t.mutable_data_ptr(), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

// Runs a kernel's tasks; threads take them as they come, since the result does not depend on who computes
// what.
template <typename Params>
void run(void (*kernel)(const Params&, int64_t, int64_t), const Params& p, int64_t tasks, int64_t elements) {
  const int64_t threads = elements < 16384 ? 1 : torch::stable::get_num_threads();
  if (threads <= 1 || tasks <= 1) return kernel(p, 0, tasks);
  const int64_t portion = tasks / (threads * 8) < 1 ? 1 : tasks / (threads * 8);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (;;) {
      const int64_t first = next.fetch_add(portion);
      if (first >= tasks) return;
      kernel(p, first, first + portion < tasks ? first + portion : tasks);
    }
  });
}

std::vector<Tensor> warp(Tensor images, Tensor theta, std::vector<int64_t> heights,
                         std::vector<int64_t> widths) {
  check_features(images, "images");
  STD_TORCH_CHECK(heights.size() == widths.size(), "widths must have as many entries as heights");
  const auto views = static_cast<int64_t>(heights.size());
  check_theta(theta, views, images.size(0));
  const bool interleaved = !is_planar(images) && is_interleaved(images);
  const Tensor source = readable(images, interleaved);
  std::vector<Tensor> outputs;
  std::vector<Map> targets;
  int64_t elements = 0;
  for (std::size_t k = 0; k < heights.size(); ++k) {
    STD_TORCH_CHECK(heights[k] >= 1 && widths[k] >= 1, "heights and widths must be at least 1");
    outputs.push_back(
        new_map(source, source.size(1), heights[k], widths[k], source.scalar_type(), interleaved));
    targets.push_back(map_of(outputs.back(), "an output"));
    elements += outputs.back().numel();
  }
  if (elements == 0) return outputs;
  if (source.numel() == 0) {
    for (Tensor& output : outputs) torch::stable::zero_(output);
    return outputs;
  }
  const WarpParams p{dtype_of(source),
                     interleaved,
                     static_cast<int>(source.size(0)),
                     static_cast<int>(source.size(1)),
                     static_cast<int>(views),
                     map_of(source, "images"),
                     static_cast<const double*>(theta.const_data_ptr()),
                     targets.data(),
                     {}};
  run(kernels().warp, p, warp_tasks(p), elements);
  return outputs;
}

Tensor warp_adjoint(std::vector<Tensor> gradients, Tensor theta, int64_t height, int64_t width) {
  STD_TORCH_CHECK(!gradients.empty(), "gradients must not be empty");
  STD_TORCH_CHECK(height >= 0 && width >= 0 && height < (int64_t{1} << 31) && width < (int64_t{1} << 31),
                  "height and width must be sizes of an image");
  const Tensor& first = gradients[0];
  check_features(first, "gradients");
  const bool interleaved = !is_planar(first) && is_interleaved(first);
  check_theta(theta, static_cast<int64_t>(gradients.size()), first.size(0));
  std::vector<Tensor> kept;
  std::vector<Map> targets;
  int64_t elements = 0;
  for (const Tensor& gradient : gradients) {
    check_features(gradient, "gradients");
    check_same(gradient, first, "gradients", "the first of them");
    STD_TORCH_CHECK(gradient.size(0) == first.size(0) && gradient.size(1) == first.size(1),
                    "gradients must have one number of images and channels");
    kept.push_back(readable(gradient, interleaved));
    targets.push_back(map_of(kept.back(), "gradients"));
    elements += gradient.numel();
  }
  Tensor output = new_map(first, first.size(1), height, width, first.scalar_type(), interleaved);
  if (output.numel() == 0) return output;
  const WarpParams p{dtype_of(first),
                     interleaved,
                     static_cast<int>(first.size(0)),
                     static_cast<int>(first.size(1)),
                     static_cast<int>(gradients.size()),
                     map_of(output, "the output"),
                     static_cast<const double*>(theta.const_data_ptr()),
                     targets.data(),
                     gradient_of(output)};
  run(kernels().warp_adjoint, p, warp_adjoint_tasks(p), elements);
  return output;
}

// The arguments of similarity and of its backward pass, and what keeps their memory alive.
struct SimilarityArguments {
  Tensor anchor;
  std::vector<Tensor> views;
  std::vector<Map> maps;
  std::vector<Gradient> gradients;
  SimilarityParams p{};
  int64_t elements = 0;

  SimilarityArguments(const Tensor& anchor_given, const std::vector<Tensor>& views_given, const Tensor& theta,
                      bool pixel) {
    check_features(anchor_given, "anchor");
    STD_TORCH_CHECK(!views_given.empty(), "views must not be empty");
    check_theta(theta, static_cast<int64_t>(views_given.size()), anchor_given.size(0));
    p.interleaved = !is_planar(anchor_given) && is_interleaved(anchor_given);
    anchor = readable(anchor_given, p.interleaved);
    p.anchor = map_of(anchor, "anchor");
    for (const Tensor& view : views_given) {
      check_features(view, "views");
      check_same(view, anchor, "views", "anchor");
      STD_TORCH_CHECK(view.size(0) == anchor.size(0) && view.size(1) == anchor.size(1),
                      "views must have the numbers of images and channels of anchor");
      views.push_back(readable(view, p.interleaved));
      maps.push_back(map_of(views.back(), "views"));
      elements += view.numel();
    }
    p.dtype = dtype_of(anchor);
    p.pixel = pixel;
    p.images = static_cast<int>(anchor.size(0));
    p.channels = static_cast<int>(anchor.size(1));
    p.views = static_cast<int>(views.size());
    p.view = maps.data();
    p.theta = static_cast<const double*>(theta.const_data_ptr());
    elements += anchor.numel() * p.views;
  }

  bool empty() const {
    if (anchor.numel() == 0) return true;
    for (const Tensor& view : views) {
      if (view.numel() == 0) return true;
    }
    return false;
  }
};

// Returns the similarities and the sums that the backward pass wants.
std::tuple<Tensor, Tensor> forward(SimilarityArguments& a) {
  SimilarityParams& p = a.p;
  const std::int64_t n = p.images, k = p.views;
  const std::int64_t result_size[] = {n, k}, sums_size[] = {n, k, 3};
  Tensor result = torch::stable::empty(result_size, accumulator(a.anchor), std::nullopt, a.anchor.device());
  Tensor sums = torch::stable::empty(sums_size, Scalar::Double, std::nullopt, a.anchor.device());
  if (a.empty()) return {torch::stable::zero_(result), torch::stable::zero_(sums)};
  const int blocks = similarity_blocks(p);
  std::vector<double> partial(static_cast<std::size_t>(n * k * blocks * 3));
  p.partial = partial.data();
  p.sums = static_cast<double*>(sums.mutable_data_ptr());
  run(p.pixel ? kernels().similarity_pixel : kernels().similarity, p, similarity_tasks(p), a.elements);
  similarity_finish(p, result.mutable_data_ptr());
  return {result, sums};
}

std::tuple<Tensor, Tensor> similarity(Tensor anchor, std::vector<Tensor> views, Tensor theta, bool pixel) {
  SimilarityArguments a(anchor, views, theta, pixel);
  return forward(a);
}

// With one cosine per image.
void backward(const SimilarityArguments& a) {
  run(kernels().similarity_backward, a.p, similarity_backward_tasks(a.p), a.elements);
  const int64_t tasks = similarity_backward_level_tasks(a.p);
  if (tasks > 0) run(kernels().similarity_backward_level, a.p, tasks, a.elements);
}

std::vector<Tensor> similarity_backward(Tensor upstream, Tensor sums, Tensor anchor,
                                        std::vector<Tensor> views, Tensor theta, bool pixel) {
  SimilarityArguments a(anchor, views, theta, pixel);
  SimilarityParams& p = a.p;
  const std::int64_t n = p.images, k = p.views;
  check_upstream(upstream, sums, n, k);
  const Tensor weights = torch::stable::contiguous(narrowed(upstream, Scalar::Double));
  const Scalar dtype = pixel ? accumulator(a.anchor) : a.anchor.scalar_type();
  std::vector<Tensor> gradients;
  const auto add = [&](const Tensor& like) {
    gradients.push_back(new_map(like, like.size(1), like.size(2), like.size(3), dtype, p.interleaved));
    return gradient_of(gradients.back());
  };
  p.anchor_gradient = add(a.anchor);
  for (const Tensor& view : a.views) a.gradients.push_back(add(view));
  if (a.empty()) {
    for (Tensor& gradient : gradients) torch::stable::zero_(gradient);
  } else {
    p.view_gradient = a.gradients.data();
    p.upstream = static_cast<const double*>(weights.const_data_ptr());
    p.sums = static_cast<double*>(sums.mutable_data_ptr());
    if (pixel) {
      run(kernels().similarity_pixel_backward, p, similarity_pixel_backward_tasks(p), a.elements);
    } else {
      if (p.views == 1) torch::stable::zero_(gradients[0]);
      backward(a);
    }
  }
  for (Tensor& gradient : gradients) gradient = narrowed(gradient, a.anchor.scalar_type());
  return gradients;
}

// Of a single view: adds the gradient of the anchor to `total`, and returns the similarity and the gradient
// of the view.
std::tuple<Tensor, Tensor> similarity_gradient(Tensor total, Tensor anchor, Tensor view, Tensor theta) {
  SimilarityArguments a(anchor, {view}, theta, false);
  SimilarityParams& p = a.p;
  check_features(total, "total");
  check_same(total, a.anchor, "total", "anchor");
  STD_TORCH_CHECK(total.sizes().equals(a.anchor.sizes()), "total must have the shape of anchor");
  STD_TORCH_CHECK(p.interleaved ? is_interleaved(total) : is_planar(total),
                  "total must have the layout of anchor");
  auto [result, sums] = forward(a);
  const Tensor& like = a.views[0];
  Tensor gradient =
      new_map(like, like.size(1), like.size(2), like.size(3), like.scalar_type(), p.interleaved);
  if (a.empty()) {
    torch::stable::zero_(gradient);
    return {result, gradient};
  }
  const std::vector<double> upstream(static_cast<std::size_t>(p.images), 1.0);
  a.gradients = {gradient_of(gradient)};
  p.anchor_gradient = gradient_of(total), p.view_gradient = a.gradients.data();
  p.add = true;
  p.upstream = upstream.data();
  p.sums = static_cast<double*>(sums.mutable_data_ptr());
  backward(a);
  return {result, gradient};
}

// The similarities, and the gradient of their sum with respect to the anchor.
std::tuple<Tensor, Tensor> similarity_target(Tensor anchor, std::vector<Tensor> views, Tensor theta) {
  SimilarityArguments a(anchor, views, theta, false);
  SimilarityParams& p = a.p;
  auto [result, sums] = forward(a);
  Tensor gradient = new_map(a.anchor, a.anchor.size(1), a.anchor.size(2), a.anchor.size(3),
                            a.anchor.scalar_type(), p.interleaved);
  if (a.empty()) {
    torch::stable::zero_(gradient);
    return {result, gradient};
  }
  const std::vector<double> upstream(static_cast<std::size_t>(p.images) * p.views, 1.0);
  p.anchor_gradient = gradient_of(gradient);
  p.upstream = upstream.data();
  p.sums = static_cast<double*>(sums.mutable_data_ptr());
  backward(a);
  return {result, gradient};
}

// The arguments of pair_similarity and of its backward pass, and what keeps their memory alive.
struct PairsArguments {
  std::vector<Tensor> maps;
  std::vector<const void*> data;
  std::vector<double> partial;
  PairsParams p{};
  bool interleaved = false;

  explicit PairsArguments(const std::vector<Tensor>& given) {
    STD_TORCH_CHECK(!given.empty() && given.size() < (std::size_t{1} << 16), "maps must be 1 to 65535");
    check_features(given[0], "maps");
    interleaved = !is_planar(given[0]) && is_interleaved(given[0]);
    for (const Tensor& map : given) {
      check_features(map, "maps");
      check_same(map, given[0], "maps", "the first of them");
      STD_TORCH_CHECK(map.sizes().equals(given[0].sizes()), "maps must be of one shape");
      maps.push_back(torch::stable::contiguous(
          map, interleaved ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous));
      data.push_back(maps.back().const_data_ptr());
    }
    p.dtype = dtype_of(maps[0]);
    p.images = static_cast<int>(maps[0].size(0));
    p.maps = static_cast<int>(maps.size());
    p.elements = p.images == 0 ? 0 : maps[0].numel() / p.images;
    p.map = data.data();
    partial.resize(static_cast<std::size_t>(tasks()) * (maps.size() + 1));
    p.partial = partial.data();
  }

  int64_t tasks() const { return p.images * pairs_chunks(p); }
  int64_t elements() const { return maps[0].numel() * p.maps; }
  Tensor like_maps(Scalar dtype) const {
    return new_map(maps[0], maps[0].size(1), maps[0].size(2), maps[0].size(3), dtype, interleaved);
  }
};

std::tuple<Tensor, Tensor, Tensor> pair_similarity(std::vector<Tensor> maps) {
  PairsArguments a(maps);
  PairsParams& p = a.p;
  const Tensor& first = a.maps[0];
  const std::int64_t result_size[] = {p.images}, sums_size[] = {p.images, p.maps, 2};
  Tensor result = torch::stable::empty(result_size, accumulator(first), std::nullopt, first.device());
  Tensor sums = torch::stable::empty(sums_size, Scalar::Double, std::nullopt, first.device());
  Tensor total = a.like_maps(accumulator(first));
  if (total.numel() == 0) return {torch::stable::zero_(result), total, torch::stable::zero_(sums)};
  p.total = total.mutable_data_ptr();
  p.sums = static_cast<double*>(sums.mutable_data_ptr());
  run(kernels().pairs_squares, p, a.tasks(), a.elements());
  pairs_finish_squares(p);
  run(kernels().pairs_total, p, a.tasks(), a.elements());
  pairs_finish_total(p, result.mutable_data_ptr());
  return {result, total, sums};
}

std::vector<Tensor> pair_similarity_backward(Tensor upstream, Tensor total, Tensor sums,
                                             std::vector<Tensor> maps) {
  PairsArguments a(maps);
  PairsParams& p = a.p;
  const Tensor& first = a.maps[0];
  STD_TORCH_CHECK(upstream.dim() == 1 && upstream.size(0) == p.images, "upstream must be (N,)");
  STD_TORCH_CHECK(total.sizes().equals(first.sizes()) && total.scalar_type() == accumulator(first) &&
                      sums.dim() == 3 && sums.size(0) == p.images && sums.size(1) == p.maps &&
                      sums.size(2) == 2 && sums.scalar_type() == Scalar::Double && sums.is_contiguous(),
                  "total and sums must be those that pair_similarity returned");
  const Tensor weights = torch::stable::contiguous(narrowed(upstream, Scalar::Double));
  const Tensor whole =
      torch::stable::contiguous(total, a.interleaved ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  std::vector<Tensor> gradients;
  std::vector<void*> written;
  for (int i = 0; i < p.maps; ++i) {
    gradients.push_back(a.like_maps(first.scalar_type()));
    written.push_back(gradients.back().mutable_data_ptr());
  }
  if (first.numel() == 0) return gradients;
  p.total = const_cast<void*>(whole.const_data_ptr());  // which is read
  p.sums = static_cast<double*>(sums.mutable_data_ptr());
  p.upstream = static_cast<const double*>(weights.const_data_ptr());
  p.gradient = written.data();
  run(kernels().pairs_gradient, p, a.tasks(), a.elements());
  return gradients;
}

Tensor signed_step(Tensor x, Tensor gradient, Tensor origin, double eps, double step, double sigma,
                   int64_t seed, Tensor ids, int64_t draw, int64_t t) {
  check_features(x, "x");
  for (const Tensor* other : {&gradient, &origin}) {
    check_same(*other, x, other == &gradient ? "gradient" : "origin", "x");
    STD_TORCH_CHECK(other->sizes().equals(x.sizes()), other == &gradient ? "gradient" : "origin",
                    " must have the shape of x");
  }
  STD_TORCH_CHECK(ids.dim() == 1 && ids.size(0) == x.size(0) && ids.scalar_type() == Scalar::Long,
                  "ids must be (N,) int64");
  const Tensor from = torch::stable::contiguous(x), slope = torch::stable::contiguous(gradient),
               center = torch::stable::contiguous(origin), numbers = torch::stable::contiguous(ids);
  Tensor next = torch::stable::empty_like(from);
  if (x.numel() == 0) return next;
  StepParams p{};
  p.dtype = dtype_of(x);
  p.images = static_cast<int>(x.size(0));
  p.elements = x.numel() / x.size(0);
  p.x = from.const_data_ptr(), p.gradient = slope.const_data_ptr(), p.origin = center.const_data_ptr();
  p.next = next.mutable_data_ptr();
  p.eps = eps, p.step = step, p.sigma = sigma;
  p.ids = static_cast<const int64_t*>(numbers.const_data_ptr());
  p.seed = static_cast<std::uint32_t>(seed), p.draw = static_cast<std::uint32_t>(draw);
  p.t = static_cast<std::uint32_t>(t);
  const int64_t chunks = step_chunks(p), tasks = chunks * p.images;
  std::vector<double> norms(static_cast<std::size_t>(p.images) * 2), partial(static_cast<std::size_t>(tasks));
  p.norms = norms.data(), p.partial = partial.data();
  run(kernels().step_largest, p, tasks, x.numel());
  step_finish_largest(p);
  if (sigma != 0) {  // without noise the norm changes no sign
    run(kernels().step_squares, p, tasks, x.numel());
    step_finish_norm(p);
  }
  run(kernels().step_move, p, tasks, x.numel());
  return next;
}

// The arguments of color_jitter and of its backward pass, and what keeps their memory alive.
struct ColorJitterArguments {
  Tensor images;
  ColorJitterParams p{};
  std::vector<double> partial;

  static bool interleaved(const Tensor& t) { return !is_planar(t) && is_interleaved(t); }
  static Tensor dense(const Tensor& t) {
    return torch::stable::contiguous(t,
                                     interleaved(t) ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  }

  ColorJitterArguments(const Tensor& given, const Tensor& parameters) {
    check_features(given, "images");
    STD_TORCH_CHECK(given.size(1) == 3, "images must be (N, 3, H, W)");
    STD_TORCH_CHECK(
        parameters.dim() == 2 && parameters.size(0) == given.size(0) && parameters.size(1) == 5 &&
            parameters.scalar_type() == Scalar::Double && parameters.is_contiguous() &&
            parameters.device() == given.device(),
        "parameters must be (N, 5) float64 and contiguous, with N that of images, on the device of images");
    images = dense(given);
    p.dtype = dtype_of(images);
    p.interleaved = interleaved(images);
    p.images = static_cast<int>(images.size(0));
    p.pixels = images.size(2) * images.size(3);
    p.images_data = images.const_data_ptr();
    p.parameters = static_cast<const double*>(parameters.const_data_ptr());
    partial.resize(static_cast<std::size_t>(tasks()));
    p.partial = partial.data();
  }

  int64_t tasks() const { return color_jitter_chunks(p) * p.images; }
  Tensor like_images(Scalar dtype) const {
    return new_map(images, 3, images.size(2), images.size(3), dtype, p.interleaved);
  }
};

std::tuple<Tensor, Tensor> color_jitter(Tensor images, Tensor parameters) {
  ColorJitterArguments a(images, parameters);
  ColorJitterParams& p = a.p;
  Tensor result = a.like_images(a.images.scalar_type());
  const std::int64_t mean_size[] = {p.images};
  Tensor mean = torch::stable::empty(mean_size, Scalar::Double, std::nullopt, a.images.device());
  if (result.numel() == 0) return {result, torch::stable::zero_(mean)};
  p.result = result.mutable_data_ptr();
  run(kernels().color_jitter_gray, p, a.tasks(), result.numel());
  color_jitter_finish(p, static_cast<double*>(mean.mutable_data_ptr()));
  p.mean = static_cast<const double*>(mean.const_data_ptr());
  run(kernels().color_jitter, p, a.tasks(), result.numel());
  return {result, mean};
}

Tensor color_jitter_backward(Tensor upstream, Tensor mean, Tensor images, Tensor parameters) {
  ColorJitterArguments a(images, parameters);
  ColorJitterParams& p = a.p;
  check_same(upstream, images, "upstream", "images");
  STD_TORCH_CHECK(upstream.sizes().equals(images.sizes()), "upstream must have the shape of images");
  STD_TORCH_CHECK(mean.dim() == 1 && mean.size(0) == images.size(0) && mean.scalar_type() == Scalar::Double &&
                      mean.is_contiguous() && mean.device() == images.device(),
                  "mean must be that which color_jitter returned");
  const Tensor from = ColorJitterArguments::dense(upstream);
  Tensor gradient = a.like_images(accumulator(images));
  if (gradient.numel() == 0) return narrowed(gradient, images.scalar_type());
  std::vector<double> mean_gradient(static_cast<std::size_t>(p.images));
  p.upstream = from.const_data_ptr();
  p.upstream_interleaved = ColorJitterArguments::interleaved(from);
  p.mean = static_cast<const double*>(mean.const_data_ptr());
  p.mean_gradient = mean_gradient.data();
  p.gradient = gradient.mutable_data_ptr();
  run(kernels().color_jitter_backward, p, a.tasks(), gradient.numel());
  color_jitter_finish(p, p.mean_gradient);
  run(kernels().color_jitter_add_mean, p, a.tasks(), gradient.numel());
  return narrowed(gradient, images.scalar_type());
}

// An order of J weights for each of G elements: (G, J) int64. Any places among the J are safe.
std::vector<std::int32_t> checked_order(const Tensor& order, int64_t weights) {
  STD_TORCH_CHECK(order.dim() == 2 && order.size(1) == weights && order.scalar_type() == Scalar::Long &&
                      order.is_contiguous() && weights < (int64_t{1} << 31),
                  "order must be (G, J) int64 and contiguous, with J that of the filters");
  const auto* places = static_cast<const int64_t*>(order.const_data_ptr());
  std::vector<std::int32_t> found(static_cast<std::size_t>(order.numel()));
  for (std::size_t i = 0; i < found.size(); ++i) {
    STD_TORCH_CHECK(places[i] >= 0 && places[i] < weights, "order must have places from 0 to J - 1");
    found[i] = static_cast<std::int32_t>(places[i]);
  }
  return found;
}

Tensor turn_filters(Tensor filters, Tensor order) {
  STD_TORCH_CHECK(filters.dim() == 3 && is_feature_dtype(filters.scalar_type()),
                  "filters must be (O, I, J), float32, float64, float16 or bfloat16");
  const auto places = checked_order(order, filters.size(2));
  const Tensor from = torch::stable::contiguous(filters);
  const std::int64_t sizes[] = {from.size(0), order.size(0), from.size(1), from.size(2)};
  Tensor result = torch::stable::empty(sizes, from.scalar_type(), std::nullopt, from.device());
  if (result.numel() == 0) return result;
  const FiltersParams p{
      dtype_of(from),           sizes[1], sizes[2], sizes[3], places.data(), from.const_data_ptr(),
      result.mutable_data_ptr()};
  run(kernels().turn_filters, p, from.size(0), result.numel());
  return result;
}

Tensor turn_filters_adjoint(Tensor turned, Tensor order) {
  STD_TORCH_CHECK(turned.dim() == 4 && is_feature_dtype(turned.scalar_type()),
                  "turned must be (O, G, I, J), float32, float64, float16 or bfloat16");
  STD_TORCH_CHECK(order.dim() == 2 && turned.size(1) == order.size(0), "turned must have the G of order");
  const auto places = checked_order(order, turned.size(3));
  const Tensor from = torch::stable::contiguous(turned);
  const std::int64_t sizes[] = {from.size(0), from.size(2), from.size(3)};
  Tensor result = torch::stable::empty(sizes, from.scalar_type(), std::nullopt, from.device());
  if (result.numel() == 0) return result;
  const FiltersParams p{
      dtype_of(from),           from.size(1), sizes[1], sizes[2], places.data(), from.const_data_ptr(),
      result.mutable_data_ptr()};
  run(kernels().turn_filters_adjoint, p, sizes[0], from.numel());
  return result;
}

// Along a side, for convolutions: so that sums of a few of them are numbers of 32 bits.
constexpr int64_t most_pixels = 1 << 20;

// Where tiles of four outputs begin along a side, those that are `dilation` apart in one tile.
std::vector<int> tiles_of(int size, int dilation) {
  std::vector<int> found;
  for (int phase = 0; phase < dilation && phase < size; ++phase) {
    for (int first = phase; first < size; first += 4 * dilation) found.push_back(first);
  }
  return found;
}

Tensor winograd(Tensor x, Tensor filters, std::optional<Tensor> bias, int64_t dilation,
                std::vector<int64_t> padding) {
  check_features(x, "x");
  STD_TORCH_CHECK(x.scalar_type() == Scalar::Float || x.scalar_type() == Scalar::Double,
                  "x must be float32 or float64");
  check_same(filters, x, "filters", "x");
  STD_TORCH_CHECK(filters.dim() == 4 && filters.size(1) == 36 && filters.size(2) == x.size(1) &&
                      filters.size(3) == whole_channels,
                  "filters must be (O / 16, 36, C, 16) with the C of x");
  const int64_t channels = filters.size(2), outputs = filters.size(0) * whole_channels;
  STD_TORCH_CHECK(channels % whole_channels == 0 && outputs > 0 && outputs < (int64_t{1} << 31),
                  "C must be a multiple of 16, and O at least 16");
  if (bias) {
    check_same(*bias, x, "bias", "x");
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == outputs, "bias must be (O)");
  }
  STD_TORCH_CHECK(dilation >= 1 && dilation < most_pixels, "dilation must be at least 1, and less than 2^20");
  STD_TORCH_CHECK(x.size(2) < most_pixels && x.size(3) < most_pixels, "x must be less than 2^20 pixels long");
  STD_TORCH_CHECK(padding.size() == 2 && padding[0] >= 0 && padding[0] < most_pixels && padding[1] >= 0 &&
                      padding[1] < most_pixels,
                  "padding must be two numbers from 0 on, and less than 2^20");
  const int64_t height = x.size(2) + 2 * (padding[0] - dilation),
                width = x.size(3) + 2 * (padding[1] - dilation);
  STD_TORCH_CHECK(height >= 1 && width >= 1, "x must be as large as the dilated filters");
  Tensor result = new_map(x, outputs, height, width, x.scalar_type(), true);
  if (result.numel() == 0) return result;
  const Tensor source = torch::stable::contiguous(x, MemoryFormat::ChannelsLast);
  const Tensor transformed = torch::stable::contiguous(filters);
  const std::optional<Tensor> shift =
      bias ? std::optional<Tensor>(torch::stable::contiguous(*bias)) : std::nullopt;
  const auto rows = tiles_of(static_cast<int>(height), static_cast<int>(dilation)),
             columns = tiles_of(static_cast<int>(width), static_cast<int>(dilation));
  WinogradParams p{dtype_of(x),
                   static_cast<int>(x.size(0)),
                   static_cast<int>(channels),
                   static_cast<int>(outputs),
                   static_cast<int>(x.size(2)),
                   static_cast<int>(x.size(3)),
                   static_cast<int>(height),
                   static_cast<int>(width),
                   static_cast<int>(dilation),
                   static_cast<int>(padding[0]),
                   static_cast<int>(padding[1]),
                   source.const_data_ptr(),
                   transformed.const_data_ptr(),
                   shift ? shift->const_data_ptr() : nullptr,
                   result.mutable_data_ptr(),
                   rows.data(),
                   columns.data(),
                   static_cast<int>(rows.size()),
                   static_cast<int>(columns.size()),
                   static_cast<int>(outputs)};
  // Where tiles are few, threads share the channels.
  const int64_t wanted = 2 * torch::stable::get_num_threads(), blocks = winograd_blocks(p);
  if (blocks < wanted) {
    const int64_t panel = outputs % 48 == 0 ? 48 : 64, share = outputs * blocks / wanted;
    p.group = static_cast<int>(share < panel ? panel : share / panel * panel);
  }
  run(kernels().winograd, p, winograd_tasks(p), result.numel());
  return result;
}

Tensor conv_transpose(Tensor x, Tensor filters, int64_t channels, std::vector<int64_t> size, int64_t stride,
                      std::vector<int64_t> padding, bool blocks) {
  check_features(x, "x");
  STD_TORCH_CHECK(x.scalar_type() == Scalar::Float || x.scalar_type() == Scalar::Double,
                  "x must be float32 or float64");
  check_same(filters, x, "filters", "x");
  STD_TORCH_CHECK(filters.dim() == 5 && filters.size(3) == x.size(1) && filters.size(4) == whole_channels,
                  "filters must be (C / 16, kernel height, kernel width, O, 16) with the O of x");
  STD_TORCH_CHECK(size.size() == 2 && padding.size() == 2, "size and padding must be two numbers");
  STD_TORCH_CHECK(stride >= 1 && stride < 1024, "stride must be at least 1, and less than 1024");
  for (const std::size_t side : {0, 1}) {
    const auto kernel = filters.size(static_cast<int64_t>(side) + 1);
    STD_TORCH_CHECK(kernel >= 1 && kernel < most_pixels && size[side] >= 1 && size[side] < most_pixels &&
                        x.size(static_cast<int64_t>(side) + 2) < most_pixels,
                    "x, filters and size must be less than 2^20 pixels long, the latter two at least 1");
    STD_TORCH_CHECK(padding[side] >= 0 && padding[side] < most_pixels,
                    "padding must be two numbers from 0 on, and less than 2^20");
  }
  const int64_t block = blocks ? stride : 1, padded = filters.size(0) * whole_channels;
  STD_TORCH_CHECK(padded < (int64_t{1} << 31) && channels >= 1 && channels <= padded / (block * block) &&
                      channels * size[1] < (int64_t{1} << 31),
                  "filters must have enough channels for those of the result");
  Tensor result = new_map(x, channels, size[0], size[1], x.scalar_type(), true);
  if (result.numel() == 0) return result;
  const Tensor source = torch::stable::contiguous(x, MemoryFormat::ChannelsLast);
  const Tensor weights = torch::stable::contiguous(filters);
  ConvTransposeParams p{dtype_of(x),
                        static_cast<int>(x.size(0)),
                        static_cast<int>(x.size(1)),
                        static_cast<int>(channels),
                        static_cast<int>(padded),
                        static_cast<int>(x.size(2)),
                        static_cast<int>(x.size(3)),
                        static_cast<int>(size[0]),
                        static_cast<int>(size[1]),
                        static_cast<int>(stride / block),
                        static_cast<int>(filters.size(1)),
                        static_cast<int>(filters.size(2)),
                        static_cast<int>(padding[0]),
                        static_cast<int>(padding[1]),
                        static_cast<int>(block),
                        source.const_data_ptr(),
                        weights.const_data_ptr(),
                        result.mutable_data_ptr(),
                        8,
                        whole_channels};
  // Filters of a task stay in cache, and threads share them where rows are few.
  const int panel = padded % 48 == 0 ? 48 : 64;
  const int64_t bytes =
      filters.size(1) * filters.size(2) * x.size(1) * static_cast<int64_t>(x.element_size());
  const int64_t cached = (int64_t{1} << 19) / (bytes < 1 ? 1 : bytes) / panel * panel;
  p.group = static_cast<int>(cached < panel ? panel : (cached < padded ? cached : padded));
  const int64_t wanted = 4 * int64_t{torch::stable::get_num_threads()};
  while (p.group > panel && conv_transpose_tasks(p) < wanted) p.group = (p.group / panel + 1) / 2 * panel;
  while (p.rows > 1 && conv_transpose_tasks(p) < wanted) p.rows /= 2;
  run(kernels().conv_transpose, p, conv_transpose_tasks(p), result.numel());
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(equifast, CPU, m) {
  m.impl("warp", TORCH_BOX(&warp));
  m.impl("warp_adjoint", TORCH_BOX(&warp_adjoint));
  m.impl("similarity", TORCH_BOX(&similarity));
  m.impl("similarity_backward", TORCH_BOX(&similarity_backward));
  m.impl("similarity_gradient", TORCH_BOX(&similarity_gradient));
  m.impl("similarity_target", TORCH_BOX(&similarity_target));
  m.impl("pair_similarity", TORCH_BOX(&pair_similarity));
  m.impl("pair_similarity_backward", TORCH_BOX(&pair_similarity_backward));
  m.impl("signed_step", TORCH_BOX(&signed_step));
  m.impl("color_jitter", TORCH_BOX(&color_jitter));
  m.impl("color_jitter_backward", TORCH_BOX(&color_jitter_backward));
  m.impl("turn_filters", TORCH_BOX(&turn_filters));
  m.impl("turn_filters_adjoint", TORCH_BOX(&turn_filters_adjoint));
  m.impl("winograd", TORCH_BOX(&winograd));
  m.impl("conv_transpose", TORCH_BOX(&conv_transpose));
}

}  // namespace equifast::cpu

// For `equifast doctor`, through ctypes.
extern "C" __attribute__((visibility("default"))) const char* equifast_instruction_set() {
  return equifast::cpu::kernels().name;
}
