// Cosine similarity of features and of those of K views warped back: the sums, and for "pixel" the weights of
// the backward pass. Neither warped features nor masks ever exist in memory.
#include "../core/cosine.h"
#include "common.cuh"

namespace equifast::cuda {
namespace {

using core::Cosine;
using core::Products;

// Blocks per image: enough to fill a large device with one image, so few that the sums of blocks stay small.
// Not a function of N, so that an image's sums are added in one order whatever the batch.
constexpr int most_blocks = 512;

struct SimilarityLaunch {
  Map anchor;            // (N, C, H, W)
  Map view[most_views];  // (N, C, h, w)
  const double* theta;   // (views, N, 2, 3)
  double* partial;       // (N, K, groups * chunks, 3)
  const double* sums;    // (N, K, 3)
  const void* upstream;  // (N, K)
  void* weights;         // (N, K, 3, H, W)
  bool interleaved;
  int images, channels, views;
  int first_view, all_views;  // this launch's views start at the first one of K
  Plan plan;
  Tiles tiles;  // of the anchor
  int groups;   // of blocks that share the tiles of an image and a chunk of channels
};

__device__ inline double warp_sum(double v) {
  for (int distance = warp_threads / 2; distance > 0; distance /= 2)
    v += __shfl_down_sync(whole_warp, v, distance);
  return v;
}
__device__ inline float warp_sum(float v) {
  for (int distance = warp_threads / 2; distance > 0; distance /= 2)
    v += __shfl_down_sync(whole_warp, v, distance);
  return v;
}

// Where the anchor's positions lie in each view: the inverse maps, by the first threads of a block.
__device__ inline void aim(core::PixelMap* maps, const double* theta, int images, int image,
                           const Map& anchor, const Map* view, int views) {
  const int k = static_cast<int>(threadIdx.x);
  if (k >= views) return;
  maps[k] = core::PixelMap(core::invert(core::theta_of(theta, images, k, image)), anchor.width, anchor.height,
                           view[k].width, view[k].height);
}

// The sums of a block: of its warps', which they have kept in double since a tile's.
template <int count>
__device__ inline void write_partial(const SimilarityLaunch& p, int image, int block,
                                     const double (&sums)[block_warps][most_views][count]) {
  __syncthreads();
  for (int at = static_cast<int>(threadIdx.x); at < p.views * 3; at += block_threads) {
    const int k = at / 3, i = at % 3;
    double total = 0;
    for (int warp = 0; i < count && warp < block_warps; ++warp) total += sums[warp][k][i];
    const int64_t pair = int64_t{image} * p.all_views + p.first_view + k;
    p.partial[(pair * (p.groups * p.plan.chunks) + block) * 3 + i] = total;
  }
}

// One cosine per image and view. A block has a chunk of channels at some tiles of the anchor: its features
// are read once for all views.
template <typename T, int V>
__global__ void __launch_bounds__(block_threads, 2)
    similarity_kernel(const __grid_constant__ SimilarityLaunch p) {
  constexpr int E = few_channels<T>;
  using real = Real<T>;
  __shared__ core::PixelMap maps[most_views];
  __shared__ double sums[block_warps][most_views][3];
  const Part part = part_of(p.groups, p.plan.chunks);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / warp_threads,
            lane = thread % warp_threads;
  aim(maps, p.theta, p.images, part.image, p.anchor, p.view, p.views);
  for (int at = lane; at < most_views * 3; at += warp_threads) sums[warp][at / 3][at % 3] = 0;
  __syncthreads();
  const Slice<T, V, E> slice(p.plan, part.chunk, p.channels);
  for (int tile = part.tile; tile < p.tiles.count; tile += p.groups) {
    const Pixel pixel = pixel_of(p.tiles, p.plan.log_lanes, tile, thread >> p.plan.log_lanes);
    const bool exists = within(pixel, p.anchor);
    real anchor[E], square = 0;
    slice.load(exists, image_of<const T>(p.anchor, part.image) + offset_of(p.anchor, pixel.i, pixel.j),
               p.anchor.sc, anchor);
    for (int e = 0; e < E; ++e) square += anchor[e] * anchor[e];
    for (int k = 0; k < p.views; ++k) {
      const core::Position position = maps[k].at(pixel.i, pixel.j);
      const bool seen = exists && maps[k].inside(position);
      if (!__any_sync(whole_warp, seen)) continue;
      Products<real> own{0, 0, 0};
      if (seen) {
        real values[E] = {};
        Corners<T>(p.view[k], image_of<const T>(p.view[k], part.image), position)
            .add(1, slice, p.view[k].sc, values);
        for (int e = 0; e < E; ++e) own.inner += anchor[e] * values[e], own.square1 += values[e] * values[e];
        own.square0 = square;
      }
      own = {warp_sum(own.inner), warp_sum(own.square0), warp_sum(own.square1)};
      if (lane == 0) {
        sums[warp][k][0] += double(own.inner);
        sums[warp][k][1] += double(own.square0);
        sums[warp][k][2] += double(own.square1);
      }
    }
  }
  write_partial(p, part.image, part.tile * p.plan.chunks + part.chunk, sums);
}

// Of a thread of pixel_kernel. It goes through all channels in turns, and few of them at a time leave it
// registers.
template <typename T, int V>
constexpr int pixel_channels = V == 1 ? few_channels<T> / 2 : few_channels<T>;

// One cosine per position. 2^log_lanes threads share a position and all its channels, which are read again
// for every view, most of them from the cache. Forward it gives sums; backward the weights cross, own0 and
// own1 of every position, times the derivative of the objective by the similarity.
template <typename T, int V>
__global__ void __launch_bounds__(block_threads, 2) pixel_kernel(const __grid_constant__ SimilarityLaunch p) {
  constexpr int E = pixel_channels<T, V>;
  using real = Real<T>;
  __shared__ core::PixelMap maps[most_views];
  __shared__ double sums[block_warps][most_views][2];
  __shared__ real shares[3][block_threads];  // by lane, then position
  const Part part = part_of(p.groups, 1);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / warp_threads;
  const int lanes = 1 << p.plan.log_lanes, positions = block_threads >> p.plan.log_lanes;
  // Neighbors in memory go to neighboring threads.
  const int lane = p.interleaved ? thread % lanes : thread / positions;
  const int slot = p.interleaved ? thread / lanes : thread % positions;
  const bool finishes = thread < positions;  // this position's sum over lanes
  aim(maps, p.theta, p.images, part.image, p.anchor, p.view, p.views);
  for (int at = thread % warp_threads; at < most_views * 2; at += warp_threads)
    sums[warp][at / 2][at % 2] = 0;
  __syncthreads();
  const T* anchor_image = image_of<const T>(p.anchor, part.image);
  for (int tile = part.tile; tile < p.tiles.count; tile += p.groups) {
    const Pixel pixel = pixel_of(p.tiles, p.plan.log_lanes, tile, slot);
    const Pixel finished = pixel_of(p.tiles, p.plan.log_lanes, tile, thread);
    for (int k = 0; k < p.views; ++k) {
      const core::Position position = maps[k].at(pixel.i, pixel.j);
      Products<real> own{0, 0, 0};
      if (within(pixel, p.anchor) && maps[k].inside(position)) {
        const Corners<T> corners(p.view[k], image_of<const T>(p.view[k], part.image), position);
        const T* f0 = anchor_image + offset_of(p.anchor, pixel.i, pixel.j);
        for (int from = 0; from < p.channels; from += E << p.plan.log_lanes) {
          const Slice<T, V, E> slice(lane, p.plan.log_lanes, from, p.channels);
          real anchor[E], values[E] = {};
          slice.load(true, f0, p.anchor.sc, anchor);
          corners.add(1, slice, p.view[k].sc, values);
          for (int e = 0; e < E; ++e) {
            own.inner += anchor[e] * values[e];
            own.square0 += anchor[e] * anchor[e];
            own.square1 += values[e] * values[e];
          }
        }
      }
      shares[0][lane * positions + slot] = own.inner;
      shares[1][lane * positions + slot] = own.square0;
      shares[2][lane * positions + slot] = own.square1;
      __syncthreads();
      if (warp * warp_threads < positions) {  // whole warps
        Products<real> whole{0, 0, 0};
        const bool exists = finishes && within(finished, p.anchor);
        const bool seen = exists && maps[k].inside(maps[k].at(finished.i, finished.j));
        for (int other = 0; seen && other < lanes; ++other) {
          whole.inner += shares[0][other * positions + thread];
          whole.square0 += shares[1][other * positions + thread];
          whole.square1 += shares[2][other * positions + thread];
        }
        const Cosine<real> cosine = core::cosine(whole);
        const int64_t pair = int64_t{part.image} * p.all_views + p.first_view + k;
        if (p.weights == nullptr) {
          const double value = double(warp_sum(seen ? cosine.value : real(0)));
          const double count = double(warp_sum(seen ? real(1) : real(0)));
          if (thread % warp_threads == 0) sums[warp][k][0] += value, sums[warp][k][1] += count;
        } else if (exists) {
          const int64_t plane = int64_t{p.anchor.height} * p.anchor.width;
          real* to = static_cast<real*>(p.weights) + pair * 3 * plane + int64_t{finished.j} * p.anchor.width +
                     finished.i;
          // a position that is seen is counted, so that the divisor is at least 1
          const real share =
              seen ? real(double(static_cast<const real*>(p.upstream)[pair]) / p.sums[pair * 3 + 1])
                   : real(0);
          to[0] = seen ? cosine.cross * share : real(0);
          to[plane] = seen ? cosine.own0 * share : real(0);
          to[2 * plane] = seen ? cosine.own1 * share : real(0);
        }
      }
      __syncthreads();
    }
  }
  if (p.weights == nullptr) write_partial(p, part.image, part.tile, sums);
}

struct FinishLaunch {
  const double* partial;  // (pairs, blocks, 3)
  double* sums;           // (pairs, 3)
  void* result;           // (pairs), real
  int blocks;
  bool pixel;
};

// A block adds the sums of one (n, k), in an order that is always the same.
template <typename real>
__global__ void __launch_bounds__(block_threads) finish_kernel(const __grid_constant__ FinishLaunch p) {
  __shared__ double sums[3][block_threads];
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t pair = blockIdx.x;
  double own[3] = {0, 0, 0};
  for (int block = thread; block < p.blocks; block += block_threads) {
    for (int i = 0; i < 3; ++i) own[i] += p.partial[(pair * p.blocks + block) * 3 + i];
  }
  for (int i = 0; i < 3; ++i) sums[i][thread] = own[i];
  for (int half = block_threads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread < half) {
      for (int i = 0; i < 3; ++i) sums[i][thread] += sums[i][thread + half];
    }
  }
  if (thread == 0) {
    const double total[3] = {sums[0][0], sums[1][0], sums[2][0]};
    for (int i = 0; i < 3; ++i) p.sums[pair * 3 + i] = total[i];
    static_cast<real*>(p.result)[pair] = static_cast<real>(core::similarity(total, p.pixel));
  }
}

template <typename T, int V>
Plan plan_of(const SimilarityParams& p) {
  if (!p.pixel) return plan_of(p.shape, few_channels<T>, V);
  constexpr int each = pixel_channels<T, V>;
  Plan plan = plan_of(p.shape, each, V);
  // Planar: at most 8 lanes, so that the positions of a warp are neighbors.
  if (!p.shape.interleaved) plan.log_lanes = log2_from((p.shape.channels + each - 1) / each, 3);
  plan.chunks = 1, plan.channels = p.shape.channels;
  return plan;
}

// Runs f for the type and the width of reads that the features allow.
template <typename F>
cudaError_t dispatch(const SimilarityParams& p, const F& f) {
  return dispatch(p.shape.dtype,
                  has_vectors(p.shape, p.anchor) && have_vectors(p.shape, p.views, p.shape.views), f);
}

int groups_of(const Plan& plan, const Tiles& tiles) {
  const int most = most_blocks / plan.chunks < 1 ? 1 : most_blocks / plan.chunks;
  return tiles.count < most ? tiles.count : most;
}

template <typename T, int V>
cudaError_t run(const SimilarityParams& p, bool weights, cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  for (int first = 0; first < p.shape.views && error == cudaSuccess; first += most_views) {
    SimilarityLaunch l{};
    l.anchor = p.anchor;
    l.views = p.shape.views - first < most_views ? p.shape.views - first : most_views;
    for (int k = 0; k < l.views; ++k) l.view[k] = p.views[first + k];
    l.images = p.shape.images, l.channels = p.shape.channels, l.interleaved = p.shape.interleaved;
    l.first_view = first, l.all_views = p.shape.views;
    l.theta = p.theta + int64_t{first} * p.shape.images * 6;
    l.partial = p.partial, l.sums = p.sums, l.upstream = p.upstream,
    l.weights = weights ? p.weights : nullptr;
    l.plan = plan_of<T, V>(p);
    l.tiles = tiles_of(l.anchor, l.plan.log_lanes);
    l.groups = weights ? l.tiles.count : groups_of(l.plan, l.tiles);
    const int64_t blocks = int64_t{l.groups} * l.plan.chunks * l.images;
    error = launch(p.pixel ? pixel_kernel<T, V> : similarity_kernel<T, V>, blocks, l, stream);
  }
  return error;
}

}  // namespace

int similarity_blocks(const SimilarityParams& p) {
  int blocks = 0;
  dispatch(p, [&](auto access) {
    const Plan plan = plan_of<typename decltype(access)::T, decltype(access)::V>(p);
    blocks = plan.chunks * groups_of(plan, tiles_of(p.anchor, plan.log_lanes));
    return cudaSuccess;
  });
  return blocks;
}

cudaError_t similarity(const SimilarityParams& p, cudaStream_t stream) {
  const cudaError_t error = dispatch(p, [&](auto access) {
    return run<typename decltype(access)::T, decltype(access)::V>(p, false, stream);
  });
  if (error != cudaSuccess) return error;
  const FinishLaunch l{p.partial, p.sums, p.result, similarity_blocks(p), p.pixel};
  return launch(p.shape.dtype == Dtype::float64 ? finish_kernel<double> : finish_kernel<float>,
                int64_t{p.shape.images} * p.shape.views, l, stream);
}

cudaError_t similarity_weights(const SimilarityParams& p, cudaStream_t stream) {
  return dispatch(p, [&](auto access) {
    return run<typename decltype(access)::T, decltype(access)::V>(p, true, stream);
  });
}

}  // namespace equifast::cuda
