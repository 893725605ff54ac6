// The derivative of cosine similarity of features and of those of K views warped back. With the weights
// cross, own0 and own1 of core/cosine.h, at a position p of the anchor (of its (n, k), or for "pixel" its
// own):
//   anchor:  g0(p) = sum_k cross f_k(p) - own0 f0(p)
//   view k:  g_k(v) = sum_p w(p, v) (cross f0(p) - own1 f_k(p)),  f_k(p) = sum_v' w(p, v') f_k(v')
// where w(p, v) is the weight with which p reads pixel v. All v' that a reader of v reads are v or its
// neighbors, so the second term is a stencil of 3 x 3 coefficients: they are summed once for all channels.
#include "../core/cosine.h"
#include "common.cuh"

namespace equifast::cuda {
namespace {

using core::Cosine;
using core::Products;

constexpr int most_maps = most_views + 1, log_most_bands = 6;

struct BackwardLaunch {
  Map map[most_maps];       // the anchor (N, C, H, W), then the views (N, C, h, w)
  Map gradient[most_maps];  // of each
  const double* theta;      // (views, N, 2, 3)
  const double* sums;       // (N, K, 3)
  const void* upstream;     // (N, K)
  const void* weights;      // (N, K, 3, H, W) for "pixel", or null
  int images, channels, views;
  int first_view, all_views;  // this launch's views start at the first one of K
  bool wide, accumulate;      // of the anchor's gradient: in the accumulator's type; adds to what is there
  Plan plan;
  Tiles tiles[most_maps];
  int log_bands;
  int band_first[(1 << log_most_bands) + 1];  // tiles before a band, of all maps; then all tiles
};

// Which tile of which map a block computes. Both gradients read the anchor and the views. Blocks go through
// bands of the maps from top to bottom, and in a band through all maps: what one of them reads from memory
// the next ones find in the cache, unless a view is turned upside down.
struct Role {
  int map, tile;
};

EQUIFAST_HD inline int tiles_before(const Tiles& t, int band, int log_bands) {
  return static_cast<int>(int64_t{t.count} * band >> log_bands);
}

__device__ inline Role role_of(const BackwardLaunch& p, int tile) {
  // maps round down the beginnings of their bands, so that the band may be a later one
  int band = static_cast<int>((int64_t{tile} << p.log_bands) / p.band_first[1 << p.log_bands]);
  while (p.band_first[band + 1] <= tile) ++band;
  int rest = tile - p.band_first[band];
  for (int m = 0; m < p.views; ++m) {
    const int first = tiles_before(p.tiles[m], band, p.log_bands);
    const int count = tiles_before(p.tiles[m], band + 1, p.log_bands) - first;
    if (rest < count) return {m, first + rest};
    rest -= count;
  }
  return {p.views, tiles_before(p.tiles[p.views], band, p.log_bands) + rest};
}

// The weights of one image and view, or where to find those of its positions.
template <typename real>
struct Weights {
  Cosine<real> image;
  const real* plane;  // cross of every position, then own0, then own1; or null

  __device__ Weights(const BackwardLaunch& p, int image_index, int k) {
    const int64_t pair = int64_t{image_index} * p.all_views + p.first_view + k;
    plane = nullptr;
    image = {0, 0, 0, 0};
    if (p.weights != nullptr) {
      plane = static_cast<const real*>(p.weights) + pair * 3 * p.map[0].height * p.map[0].width;
      return;
    }
    const double* sums = p.sums + pair * 3;
    const double upstream = double(static_cast<const real*>(p.upstream)[pair]);
    const Cosine<double> c = core::cosine(Products<double>{sums[0], sums[1], sums[2]});
    image = {0, real(c.cross * upstream), real(c.own0 * upstream), real(c.own1 * upstream)};
  }
  Weights() = default;  // of indeterminate value, as shared memory wants it

  // Whether there is nothing to add, so that features of any value need not be read.
  __device__ bool none() const {
    return plane == nullptr && image.cross == 0 && image.own0 == 0 && image.own1 == 0;
  }

  __device__ Cosine<real> at(const Map& anchor, int i, int j) const {
    if (plane == nullptr) return image;
    const int64_t size = int64_t{anchor.height} * anchor.width;
    const real* from = plane + int64_t{j} * anchor.width + i;
    return {0, __ldg(from), __ldg(from + size), __ldg(from + 2 * size)};
  }
};

// Where the anchor's positions lie in view k.
__device__ inline core::PixelMap back_to_view(const BackwardLaunch& p, int image, int k) {
  const Map &anchor = p.map[0], &view = p.map[1 + k];
  return {core::invert(core::theta_of(p.theta, p.images, k, image)), double(anchor.width),
          double(anchor.height), double(view.width), double(view.height)};
}

// What the threads of a block share: of all views where it has a tile of the anchor, else of its one view.
template <typename real>
struct Shared {
  Role role;
  core::PixelMap maps[most_views];
  Weights<real> weights[most_views];
  core::Preimage preimage;
};

template <typename T, typename Channels>
__device__ inline void add_to_anchor(const BackwardLaunch& p, const Shared<Real<T>>& shared, int image,
                                     const Pixel& pixel, const Channels& slice, Real<T>* total) {
  const Map& anchor = p.map[0];
  Real<T> own = 0;
  for (int k = 0; k < p.views; ++k) {
    const core::Position position = shared.maps[k].at(pixel.i, pixel.j);
    if (shared.weights[k].none() || !shared.maps[k].inside(position)) continue;
    const Cosine<Real<T>> weight = shared.weights[k].at(anchor, pixel.i, pixel.j);
    own += weight.own0;
    const Map& view = p.map[1 + k];
    const Corners<T> corners(view, image_of<const T>(view, image), position);
    corners.add(weight.cross, slice, view.sc, total);
  }
  if (own == 0) return;
  slice.add(-own, image_of<const T>(anchor, image) + offset_of(anchor, pixel.i, pixel.j), anchor.sc, total);
}

template <typename T, typename Channels>
__device__ inline void add_to_view(const BackwardLaunch& p, const Shared<Real<T>>& shared, int k, int image,
                                   const Pixel& pixel, const Channels& slice, Real<T>* total) {
  using real = Real<T>;
  const Weights<real>& weights = shared.weights[0];
  if (weights.none()) return;
  const Map &anchor = p.map[0], &view = p.map[1 + k];
  const T* anchor_image = image_of<const T>(anchor, image);
  const T* view_image = image_of<const T>(view, image);
  real stencil[3][3] = {};
  visit_readers<T>(shared.maps[0], shared.preimage, view, pixel,
                   [&](int i, int j, const core::Tap<real>& x, const core::Tap<real>& y) {
                     const real wx[3] = {core::weight(x, pixel.i - 1), core::weight(x, pixel.i),
                                         core::weight(x, pixel.i + 1)};
                     const real wy[3] = {core::weight(y, pixel.j - 1), core::weight(y, pixel.j),
                                         core::weight(y, pixel.j + 1)};
                     const real reads = wx[1] * wy[1];
                     if (reads == 0) return;
                     const Cosine<real> weight = weights.at(anchor, i, j);
#pragma unroll
                     for (int row = 0; row < 3; ++row) {
#pragma unroll
                       for (int column = 0; column < 3; ++column)
                         stencil[row][column] += weight.own1 * reads * wy[row] * wx[column];
                     }
                     slice.add(weight.cross * reads, anchor_image + offset_of(anchor, i, j), anchor.sc,
                               total);
                   });
#pragma unroll  // or the coefficients would lie in local memory
  for (int row = 0; row < 3; ++row) {
#pragma unroll
    for (int column = 0; column < 3; ++column) {
      // beyond the map the coefficient is 0, or NaN where a weight is
      const Pixel at{pixel.i + column - 1, pixel.j + row - 1};
      if (stencil[row][column] == 0 || at.i < 0 || at.j < 0 || !within(at, view)) continue;
      slice.add(-stencil[row][column], view_image + offset_of(view, at.i, at.j), view.sc, total);
    }
  }
}

// Of a thread: as many as leave it registers for the geometry.
template <typename T, int V>
constexpr int backward_channels = V == 1 ? many_channels<T> * (sizeof(T) == 2 ? 2 : 3) / 4 : many_channels<T>;

template <typename T, int V>
__global__ void __launch_bounds__(block_threads, 2)
    backward_kernel(const __grid_constant__ BackwardLaunch p) {
  constexpr int E = backward_channels<T, V>;
  __shared__ Shared<Real<T>> shared;
  const Part part = part_of(p.band_first[1 << p.log_bands], p.plan.chunks);
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) shared.role = role_of(p, part.tile);
  __syncthreads();
  const Role role = shared.role;
  const int first = role.map == 0 ? 0 : role.map - 1, count = role.map == 0 ? p.views : 1;
  if (thread < count) {
    shared.maps[thread] = back_to_view(p, part.image, first + thread);
    shared.weights[thread] = Weights<Real<T>>(p, part.image, first + thread);
    if (role.map != 0) shared.preimage = core::Preimage(shared.maps[0], p.map[0].width, p.map[0].height);
  }
  __syncthreads();
  const Map& map = p.map[role.map];
  const Pixel pixel = pixel_of(p.tiles[role.map], p.plan.log_lanes, role.tile, thread >> p.plan.log_lanes);
  if (!within(pixel, map)) return;
  const Slice<T, V, E> slice(p.plan, part.chunk, p.channels);
  Real<T> total[E] = {};
  if (role.map == 0) {
    add_to_anchor<T>(p, shared, part.image, pixel, slice, total);
  } else {
    add_to_view<T>(p, shared, first, part.image, pixel, slice, total);
  }
  const bool anchor = role.map == 0;
  store_gradient(slice, p.gradient[role.map], part.image, pixel, anchor && p.wide, anchor && p.accumulate,
                 total);
}

template <typename T, int V>
cudaError_t run(const SimilarityParams& p, cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  for (int first = 0; first < p.shape.views && error == cudaSuccess; first += most_views) {
    BackwardLaunch l{};
    l.views = p.shape.views - first < most_views ? p.shape.views - first : most_views;
    l.map[0] = p.anchor, l.gradient[0] = p.anchor_gradient;
    for (int k = 0; k < l.views; ++k)
      l.map[1 + k] = p.views[first + k], l.gradient[1 + k] = p.view_gradients[first + k];
    l.theta = p.theta + int64_t{first} * p.shape.images * 6;
    l.sums = p.sums, l.upstream = p.upstream, l.weights = p.pixel ? p.weights : nullptr;
    l.images = p.shape.images, l.channels = p.shape.channels;
    l.first_view = first, l.all_views = p.shape.views;
    l.wide = p.wide, l.accumulate = first > 0;
    l.plan = plan_of(p.shape, backward_channels<T, V>, V);
    int64_t bytes = 0;  // of an image's features, in the channels of a block
    for (int m = 0; m <= l.views; ++m) {
      l.tiles[m] = tiles_of(l.map[m], l.plan.log_lanes);
      bytes += int64_t{l.map[m].height} * l.map[m].width * l.plan.channels * static_cast<int64_t>(sizeof(T));
    }
    while (l.log_bands < log_most_bands && bytes >> l.log_bands > p.cached) ++l.log_bands;
    for (int band = 0; band <= 1 << l.log_bands; ++band) {
      for (int m = 0; m <= l.views; ++m) l.band_first[band] += tiles_before(l.tiles[m], band, l.log_bands);
    }
    const int tile_count = l.band_first[1 << l.log_bands];
    error = launch(backward_kernel<T, V>, int64_t{tile_count} * l.plan.chunks * l.images, l, stream);
  }
  return error;
}

}  // namespace

cudaError_t similarity_backward(const SimilarityParams& p, cudaStream_t stream) {
  if (p.pixel) {
    const cudaError_t error = similarity_weights(p, stream);
    if (error != cudaSuccess) return error;
  }
  const bool vectors = has_vectors(p.shape, p.anchor) && has_vectors(p.shape, p.anchor_gradient) &&
                       have_vectors(p.shape, p.views, p.shape.views) &&
                       have_vectors(p.shape, p.view_gradients, p.shape.views);
  return dispatch(p.shape.dtype, vectors, [&](auto access) {
    return run<typename decltype(access)::T, decltype(access)::V>(p, stream);
  });
}

}  // namespace equifast::cuda
