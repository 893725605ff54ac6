// Checks at the entry of operators. equifast/ops.py has refused bad input in words before; these keep a
// caller of torch.ops.equifast from memory that is not the tensors'.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/DeviceType.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

namespace equifast {

using torch::stable::Tensor;
using Scalar = torch::headeronly::ScalarType;

inline bool is_feature_dtype(Scalar dtype) {
  return dtype == Scalar::Float || dtype == Scalar::Double || dtype == Scalar::Half ||
         dtype == Scalar::BFloat16;
}

inline void check_features(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 4, name, " must be (N, C, H, W)");
  STD_TORCH_CHECK(is_feature_dtype(t.scalar_type()), name, " must be float32, float64, float16 or bfloat16");
  for (const std::int64_t size : t.sizes()) {
    STD_TORCH_CHECK(size < (std::int64_t{1} << 31), name,
                    " must have less than 2^31 elements along every axis");
  }
}

inline void check_same(const Tensor& t, const Tensor& like, const char* name, const char* like_name) {
  STD_TORCH_CHECK(t.scalar_type() == like.scalar_type(), name, " must have the dtype of ", like_name);
  STD_TORCH_CHECK(t.device() == like.device(), name, " must be on the device of ", like_name);
}

// (K, N, 2, 3) float64, contiguous.
inline void check_theta(const Tensor& theta, std::int64_t views, std::int64_t images) {
  STD_TORCH_CHECK(theta.dim() == 4 && theta.size(0) == views && theta.size(1) == images &&
                      theta.size(2) == 2 && theta.size(3) == 3,
                  "theta must be (K, N, 2, 3) with K and N those of the other arguments");
  STD_TORCH_CHECK(theta.scalar_type() == Scalar::Double && theta.is_contiguous(),
                  "theta must be float64 and contiguous");
}

// What the backward pass of similarity gets: (N, K), and the sums (N, K, 3) of the forward pass.
inline void check_upstream(const Tensor& upstream, const Tensor& sums, std::int64_t images,
                           std::int64_t views) {
  STD_TORCH_CHECK(upstream.dim() == 2 && upstream.size(0) == images && upstream.size(1) == views,
                  "upstream must be (N, K)");
  STD_TORCH_CHECK(sums.dim() == 3 && sums.size(0) == images && sums.size(1) == views && sums.size(2) == 3 &&
                      sums.scalar_type() == Scalar::Double && sums.is_contiguous(),
                  "sums must be those that similarity returned");
}

}  // namespace equifast
