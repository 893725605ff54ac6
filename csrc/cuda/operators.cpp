// The operators on CUDA devices: tensors in, parameters out, launches on torch's current stream.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>
#include <vector>

#include "../checks.h"
#include "../tensors.h"
#include "kernels.h"

namespace equifast::cuda::operators {  // of the names of the kernels
namespace {

using torch::stable::accelerator::DeviceGuard;

// After a launch: an error of it, and none that it has not caused.
void check_launch(cudaError_t error, const char* name) {
  if (error != cudaSuccess) cudaGetLastError();  // leaves nothing for the next one who asks
  STD_TORCH_CHECK(error == cudaSuccess, "equifast::", name,
                  " could not be launched: ", cudaGetErrorString(error));
}

cudaStream_t current_stream(const Tensor& t) {
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream) == AOTI_TORCH_SUCCESS,
                  "torch has no current stream for the device of a tensor");
  return static_cast<cudaStream_t>(stream);
}

void check_device(const Tensor& t, const Tensor& like, const char* name, const char* like_name) {
  STD_TORCH_CHECK(t.device() == like.device(), name, " must be on the device of ", like_name);
}

Map map_of(const Tensor& t, void* data) {
  return {data,
          t.stride(0),
          t.stride(1),
          t.stride(2),
          t.stride(3),
          static_cast<int>(t.size(2)),
          static_cast<int>(t.size(3))};
}
// A map that is written is asked for as such, since torch may copy a tensor when it is.
Map read(const Tensor& t) { return map_of(t, const_cast<void*>(t.const_data_ptr())); }
Map written(const Tensor& t) { return map_of(t, t.mutable_data_ptr()); }

std::vector<Map> maps_of(const std::vector<Tensor>& tensors, Map (*map)(const Tensor&)) {
  std::vector<Map> maps;
  for (const Tensor& t : tensors) maps.push_back(map(t));
  return maps;
}

Shape shape_of(const Tensor& t, bool interleaved, std::size_t views) {
  return {dtype_of(t), interleaved, static_cast<int>(t.size(0)), static_cast<int>(t.size(1)),
          static_cast<int>(views)};
}

std::vector<Tensor> warp(Tensor images, Tensor theta, std::vector<int64_t> heights,
                         std::vector<int64_t> widths) {
  check_features(images, "images");
  STD_TORCH_CHECK(heights.size() == widths.size(), "widths must have as many entries as heights");
  check_theta(theta, static_cast<int64_t>(heights.size()), images.size(0));
  check_device(theta, images, "theta", "images");
  const DeviceGuard guard(images.get_device_index());
  const bool interleaved = !is_planar(images) && is_interleaved(images);
  const Tensor source = readable(images, interleaved);
  std::vector<Tensor> outputs;
  for (std::size_t k = 0; k < heights.size(); ++k) {
    for (const int64_t size : {heights[k], widths[k]}) {
      STD_TORCH_CHECK(size >= 1 && size < (int64_t{1} << 31),
                      "heights and widths must be at least 1, below 2^31");
    }
    outputs.push_back(
        new_map(source, source.size(1), heights[k], widths[k], source.scalar_type(), interleaved));
  }
  if (source.numel() == 0) {
    for (Tensor& output : outputs) torch::stable::zero_(output);
    return outputs;
  }
  const std::vector<Map> targets = maps_of(outputs, written);
  WarpParams p{};
  p.shape = shape_of(source, interleaved, outputs.size());
  p.source = read(source);
  p.theta = static_cast<const double*>(theta.const_data_ptr());
  p.targets = targets.data();
  check_launch(cuda::warp(p, current_stream(source)), "warp");
  return outputs;
}

Tensor warp_adjoint(std::vector<Tensor> gradients, Tensor theta, int64_t height, int64_t width) {
  STD_TORCH_CHECK(!gradients.empty(), "gradients must not be empty");
  STD_TORCH_CHECK(height >= 0 && width >= 0 && height < (int64_t{1} << 31) && width < (int64_t{1} << 31),
                  "height and width must be sizes of an image");
  const Tensor& first = gradients[0];
  check_features(first, "gradients");
  check_theta(theta, static_cast<int64_t>(gradients.size()), first.size(0));
  check_device(theta, first, "theta", "gradients");
  const DeviceGuard guard(first.get_device_index());
  const bool interleaved = !is_planar(first) && is_interleaved(first);
  std::vector<Tensor> kept;
  for (const Tensor& gradient : gradients) {
    check_features(gradient, "gradients");
    check_same(gradient, first, "gradients", "the first of them");
    STD_TORCH_CHECK(gradient.size(0) == first.size(0) && gradient.size(1) == first.size(1),
                    "gradients must have one number of images and channels");
    kept.push_back(readable(gradient, interleaved));
  }
  WarpParams p{};
  p.shape = shape_of(first, interleaved, kept.size());
  p.wide = launches(p.shape.views) > 1;
  Tensor output = new_map(first, first.size(1), height, width,
                          p.wide ? accumulator(first) : first.scalar_type(), interleaved);
  if (output.numel() > 0) {
    const std::vector<Map> targets = maps_of(kept, read);
    p.source = written(output);
    p.theta = static_cast<const double*>(theta.const_data_ptr());
    p.targets = targets.data();
    check_launch(cuda::warp_adjoint(p, current_stream(first)), "warp_adjoint");
  }
  return narrowed(output, first.scalar_type());
}

// The arguments of similarity and of its backward pass, and what keeps their memory alive.
struct SimilarityArguments {
  Tensor anchor;
  std::vector<Tensor> views;
  std::vector<Map> maps;
  SimilarityParams p{};
  bool empty = false;

  SimilarityArguments(const Tensor& anchor_given, const std::vector<Tensor>& views_given, const Tensor& theta,
                      bool pixel) {
    check_features(anchor_given, "anchor");
    STD_TORCH_CHECK(!views_given.empty(), "views must not be empty");
    check_theta(theta, static_cast<int64_t>(views_given.size()), anchor_given.size(0));
    check_device(theta, anchor_given, "theta", "anchor");
    const bool interleaved = !is_planar(anchor_given) && is_interleaved(anchor_given);
    anchor = readable(anchor_given, interleaved);
    empty = anchor.numel() == 0;
    for (const Tensor& view : views_given) {
      check_features(view, "views");
      check_same(view, anchor, "views", "anchor");
      STD_TORCH_CHECK(view.size(0) == anchor.size(0) && view.size(1) == anchor.size(1),
                      "views must have the numbers of images and channels of anchor");
      views.push_back(readable(view, interleaved));
      empty = empty || view.numel() == 0;
    }
    maps = maps_of(views, read);
    p.shape = shape_of(anchor, interleaved, views.size());
    p.pixel = pixel;
    p.anchor = read(anchor);
    p.views = maps.data();
    p.theta = static_cast<const double*>(theta.const_data_ptr());
  }
};

std::tuple<Tensor, Tensor> similarity(Tensor anchor, std::vector<Tensor> views, Tensor theta, bool pixel) {
  check_features(anchor, "anchor");
  const DeviceGuard guard(anchor.get_device_index());
  SimilarityArguments a(anchor, views, theta, pixel);
  SimilarityParams& p = a.p;
  const int64_t n = p.shape.images, k = p.shape.views;
  const int64_t result_size[] = {n, k}, sums_size[] = {n, k, 3};
  Tensor result = torch::stable::empty(result_size, accumulator(anchor), std::nullopt, anchor.device());
  Tensor sums = torch::stable::empty(sums_size, Scalar::Double, std::nullopt, anchor.device());
  if (a.empty) return {torch::stable::zero_(result), torch::stable::zero_(sums)};
  const int64_t partial_size[] = {n, k, similarity_blocks(p), 3};
  const Tensor partial = torch::stable::empty(partial_size, Scalar::Double, std::nullopt, anchor.device());
  p.partial = static_cast<double*>(partial.mutable_data_ptr());
  p.sums = static_cast<double*>(sums.mutable_data_ptr());
  p.result = result.mutable_data_ptr();
  check_launch(cuda::similarity(p, current_stream(anchor)), "similarity");
  return {result, sums};
}

std::vector<Tensor> similarity_backward(Tensor upstream, Tensor sums, Tensor anchor,
                                        std::vector<Tensor> views, Tensor theta, bool pixel) {
  check_features(anchor, "anchor");
  const DeviceGuard guard(anchor.get_device_index());
  SimilarityArguments a(anchor, views, theta, pixel);
  SimilarityParams& p = a.p;
  const int64_t n = p.shape.images, k = p.shape.views;
  check_upstream(upstream, sums, n, k);
  check_device(upstream, anchor, "upstream", "anchor");
  check_device(sums, anchor, "sums", "anchor");
  const Tensor weights = torch::stable::contiguous(narrowed(upstream, accumulator(anchor)));
  p.wide = launches(p.shape.views) > 1;
  std::vector<Tensor> gradients;
  const auto add = [&](const Tensor& like, Scalar dtype) {
    gradients.push_back(new_map(like, like.size(1), like.size(2), like.size(3), dtype, p.shape.interleaved));
  };
  add(a.anchor, p.wide ? accumulator(anchor) : anchor.scalar_type());
  for (const Tensor& view : a.views) add(view, anchor.scalar_type());
  if (a.empty) {
    for (Tensor& gradient : gradients) torch::stable::zero_(gradient);
  } else {
    const std::vector<Map> maps = maps_of(gradients, written);
    // For "pixel" the three weights of every position and view, which both gradients want.
    const int64_t positions[] = {pixel ? n * k * 3 * p.anchor.height * p.anchor.width : 0};
    const Tensor scratch =
        torch::stable::empty(positions, accumulator(anchor), std::nullopt, anchor.device());
    p.upstream = weights.const_data_ptr();
    p.sums = const_cast<double*>(static_cast<const double*>(sums.const_data_ptr()));
    p.weights = scratch.mutable_data_ptr();
    p.anchor_gradient = maps[0];
    p.view_gradients = maps.data() + 1;
    check_launch(cuda::similarity_backward(p, current_stream(anchor)), "similarity_backward");
  }
  gradients[0] = narrowed(gradients[0], anchor.scalar_type());
  return gradients;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(equifast, CUDA, m) {
  m.impl("warp", TORCH_BOX(&warp));
  m.impl("warp_adjoint", TORCH_BOX(&warp_adjoint));
  m.impl("similarity", TORCH_BOX(&similarity));
  m.impl("similarity_backward", TORCH_BOX(&similarity_backward));
}

}  // namespace equifast::cuda::operators
