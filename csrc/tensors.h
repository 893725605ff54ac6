// What operators of every device ask of their tensors: the type that accumulates, and the layout. The fakes
// in equifast/ops.py decide about layouts alike.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "checks.h"
#include "core/storage.h"

namespace equifast {

using torch::headeronly::MemoryFormat;

inline core::Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case Scalar::Double:
      return core::Dtype::float64;
    case Scalar::Half:
      return core::Dtype::float16;
    case Scalar::BFloat16:
      return core::Dtype::bfloat16;
    default:
      return core::Dtype::float32;
  }
}

inline Scalar accumulator(const Tensor& t) {
  return t.scalar_type() == Scalar::Double ? Scalar::Double : Scalar::Float;
}

// Planar: the columns of a row are neighbors. Interleaved: the channels of a pixel are, and pixels follow
// each other.
inline bool is_planar(const Tensor& t) { return t.stride(3) == 1 || t.size(3) == 1; }
inline bool is_interleaved(const Tensor& t) {
  return t.stride(1) == 1 && t.stride(3) == t.size(1) &&
         (t.size(2) == 1 || t.stride(2) >= t.size(1) * t.size(3));
}

// The same, in a layout that the kernels read; a copy only where it has neither.
inline Tensor readable(const Tensor& t, bool interleaved) {
  if (interleaved ? is_interleaved(t) : is_planar(t)) return t;
  return torch::stable::contiguous(t, interleaved ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

inline Tensor new_map(const Tensor& like, std::int64_t channels, std::int64_t height, std::int64_t width,
                      Scalar dtype, bool interleaved) {
  const std::int64_t sizes[] = {like.size(0), channels, height, width};
  return torch::stable::empty(sizes, dtype, std::nullopt, like.device(), std::nullopt,
                              interleaved ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

inline Tensor narrowed(const Tensor& t, Scalar dtype) {
  return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
}

}  // namespace equifast
