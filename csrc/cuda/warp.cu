// Warp of an image under K affine views, and its adjoint.
#include "common.cuh"

namespace equifast::cuda {
namespace {

struct WarpLaunch {
  Map source;              // (N, C, H, W)
  Map target[most_views];  // (N, C, h, w)
  const double* theta;     // (views, N, 2, 3)
  int images, channels, views;
  bool wide, accumulate;  // the adjoint writes the accumulator's type; it adds to what is there
  Plan plan;
  ViewTiles target_tiles;  // of warp
  Tiles source_tiles;      // of the adjoint
};

template <typename T, int V>
__global__ void __launch_bounds__(block_threads, 3) warp_kernel(const __grid_constant__ WarpLaunch p) {
  constexpr int E = few_channels<T>;
  __shared__ core::PixelMap map;
  const Part part = part_of(p.target_tiles.count, p.plan.chunks);
  const int k = view_of(p.target_tiles, p.views, part.tile);
  const Map& target = p.target[k];
  if (threadIdx.x == 0) {
    map = core::PixelMap(core::theta_of(p.theta, p.images, k, part.image), target.width, target.height,
                         p.source.width, p.source.height);
  }
  __syncthreads();
  const Pixel pixel = pixel_of(p.target_tiles.view[k], p.plan.log_lanes, part.tile - p.target_tiles.first[k],
                               static_cast<int>(threadIdx.x) >> p.plan.log_lanes);
  if (!within(pixel, target)) return;
  const Slice<T, V, E> slice(p.plan, part.chunk, p.channels);
  Real<T> values[E] = {};
  const core::Position position = map.at(pixel.i, pixel.j);
  if (map.inside(position)) {
    const Corners<T> corners(p.source, image_of<const T>(p.source, part.image), position);
    corners.add(1, slice, p.source.sc, values);
  }
  slice.store(image_of<T>(target, part.image) + offset_of(target, pixel.i, pixel.j), target.sc, values);
}

// A thread owns pixels of the source and gathers what the targets read there.
template <typename T, int V>
__global__ void __launch_bounds__(block_threads, 2)
    warp_adjoint_kernel(const __grid_constant__ WarpLaunch p) {
  constexpr int E = many_channels<T>;
  __shared__ core::PixelMap maps[most_views];
  __shared__ core::Preimage preimages[most_views];
  const Part part = part_of(p.source_tiles.count, p.plan.chunks);
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < p.views) {
    const Map& target = p.target[thread];
    maps[thread] = core::PixelMap(core::theta_of(p.theta, p.images, thread, part.image), target.width,
                                  target.height, p.source.width, p.source.height);
    preimages[thread] = core::Preimage(maps[thread], target.width, target.height);
  }
  __syncthreads();
  const Pixel pixel = pixel_of(p.source_tiles, p.plan.log_lanes, part.tile, thread >> p.plan.log_lanes);
  if (!within(pixel, p.source)) return;
  const Slice<T, V, E> slice(p.plan, part.chunk, p.channels);
  Real<T> total[E] = {};
  for (int k = 0; k < p.views; ++k) {
    const Map& target = p.target[k];
    const T* image = image_of<const T>(target, part.image);
    visit_readers<T>(maps[k], preimages[k], p.source, pixel,
                     [&](int i, int j, const core::Tap<Real<T>>& x, const core::Tap<Real<T>>& y) {
                       const Real<T> weight = core::weight(x, pixel.i) * core::weight(y, pixel.j);
                       if (weight != 0) slice.add(weight, image + offset_of(target, i, j), target.sc, total);
                     });
  }
  store_gradient(slice, p.source, part.image, pixel, p.wide, p.accumulate, total);
}

WarpLaunch launch_of(const WarpParams& p, int first) {
  WarpLaunch l{};
  l.source = p.source;
  l.images = p.shape.images, l.channels = p.shape.channels;
  l.views = p.shape.views - first < most_views ? p.shape.views - first : most_views;
  l.theta = p.theta + int64_t{first} * p.shape.images * 6;
  for (int k = 0; k < l.views; ++k) l.target[k] = p.targets[first + k];
  l.wide = p.wide;
  l.accumulate = first > 0;
  return l;
}

}  // namespace

cudaError_t warp(const WarpParams& p, cudaStream_t stream) {
  const bool vectors = has_vectors(p.shape, p.source) && have_vectors(p.shape, p.targets, p.shape.views);
  return dispatch(p.shape.dtype, vectors, [&](auto access) {
    using T = typename decltype(access)::T;
    constexpr int V = decltype(access)::V;
    cudaError_t error = cudaSuccess;
    for (int first = 0; first < p.shape.views && error == cudaSuccess; first += most_views) {
      WarpLaunch l = launch_of(p, first);
      l.plan = plan_of(p.shape, few_channels<T>, V);
      l.target_tiles = view_tiles_of(l.target, l.views, l.plan.log_lanes);
      error = launch(warp_kernel<T, V>, int64_t{l.target_tiles.count} * l.plan.chunks * l.images, l, stream);
    }
    return error;
  });
}

cudaError_t warp_adjoint(const WarpParams& p, cudaStream_t stream) {
  const bool vectors = have_vectors(p.shape, p.targets, p.shape.views) && has_vectors(p.shape, p.source);
  return dispatch(p.shape.dtype, vectors, [&](auto access) {
    using T = typename decltype(access)::T;
    constexpr int V = decltype(access)::V;
    cudaError_t error = cudaSuccess;
    for (int first = 0; first < p.shape.views && error == cudaSuccess; first += most_views) {
      WarpLaunch l = launch_of(p, first);
      l.plan = plan_of(p.shape, many_channels<T>, V);
      l.source_tiles = tiles_of(l.source, l.plan.log_lanes);
      error = launch(warp_adjoint_kernel<T, V>, int64_t{l.source_tiles.count} * l.plan.chunks * l.images, l,
                     stream);
    }
    return error;
  });
}

}  // namespace equifast::cuda
