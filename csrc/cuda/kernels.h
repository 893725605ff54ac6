// The CUDA kernels, torch-free: parameters in, launches on a stream out. Nothing synchronizes, allocates or
// copies from the host, so that calls can be captured in a graph; how the work is cut depends on the shapes
// alone, and no atomics are used, so that results are the same in every run.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../core/storage.h"

namespace equifast::cuda {

using core::Dtype;
using std::int64_t;

// (N, C, H, W). Planar: sx is 1. Interleaved (channels_last): sc is 1 and sx is C.
struct Map {
  void* data;              // only written where a comment below says so
  int64_t sn, sc, sy, sx;  // strides of image, channel, row and column, elements
  int height, width;       // pixels
};

// What all operators have.
struct Shape {
  Dtype dtype;
  bool interleaved;
  int images, channels, views;  // N, C, K
};

struct WarpParams {
  Shape shape;
  Map source;           // (N, C, H, W); written by the adjoint, in float32 or float64 where it is `wide`
  bool wide;            // as the accumulator's type; must be where `launches` is more than 1
  const double* theta;  // (K, N, 2, 3), device memory
  const Map* targets;   // K maps (N, C, h, w), host memory; written by warp, read by the adjoint
};

struct SimilarityParams {
  Shape shape;
  bool pixel;            // reduction "pixel"
  Map anchor;            // (N, C, H, W)
  const Map* views;      // K maps (N, C, h, w), host memory
  const double* theta;   // (K, N, 2, 3), device memory
  double* partial;       // (N, K, similarity_blocks, 3): sums of a block
  double* sums;          // (N, K, 3): <f0,fk>, |f0|^2, |fk|^2; or for "pixel" sum of cosines, positions, 0
  void* result;          // (N, K) float32, or float64 for float64 features
  const void* upstream;  // (N, K), as the result
  void* weights;  // "pixel" backward only: (N, K, 3, H, W), as the result; cross, own0, own1 of core/cosine.h
  Map anchor_gradient;        // (N, C, H, W), written; float32 or float64 where it is `wide`
  bool wide;                  // as the accumulator's type; must be where `launches` is more than 1
  const Map* view_gradients;  // K maps (N, C, h, w), host memory; written

  // Bytes of features that are likely to be in the L2 cache still when they are read again; the backward pass
  // takes anchor and views by turns of this size. A fifth of an A100's.
  int64_t cached = int64_t{8} << 20;
};

// Views of one launch: their pointers travel with the kernel's arguments, of which there are 4 KB.
constexpr int most_views = 16;
inline int launches(int views) { return (views + most_views - 1) / most_views; }

// Blocks whose sums make those of one (n, k).
int similarity_blocks(const SimilarityParams& p);

cudaError_t warp(const WarpParams& p, cudaStream_t stream);
cudaError_t warp_adjoint(const WarpParams& p, cudaStream_t stream);
cudaError_t similarity(const SimilarityParams& p, cudaStream_t stream);
// Fills `weights` of reduction "pixel", as the backward pass does first.
cudaError_t similarity_weights(const SimilarityParams& p, cudaStream_t stream);
cudaError_t similarity_backward(const SimilarityParams& p, cudaStream_t stream);

}  // namespace equifast::cuda
