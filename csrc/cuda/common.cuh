// What the kernels share: how positions and channels are dealt to threads, how features are read, and
// launches.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <limits>

#include "../core/preimage.h"
#include "../core/sample.h"
#include "../core/storage.h"
#include "kernels.h"

namespace equifast::cuda {
namespace {

using core::Real;

constexpr int log_block = 8, block_threads = 1 << log_block;
constexpr int log_warp = 5, warp_threads = 1 << log_warp, block_warps = block_threads / warp_threads;
constexpr unsigned whole_warp = 0xffffffffu;

// Channels that a thread holds in registers: few where every one comes with four reads that can be in flight
// together, many where the geometry is dear and the reads are not.
template <typename T>
constexpr int few_channels = sizeof(Real<T>) == 8 ? 4 : 8;
template <typename T>
constexpr int many_channels = sizeof(Real<T>) == 8 ? 8 : 16;

// How a block of threads is laid over positions and channels. 2^log_lanes threads share a position, each with
// channels of its own. Planar: neighboring threads have neighboring positions. Interleaved: they have
// neighboring channels, as many at a time as 16 bytes hold where the maps allow it.
struct Plan {
  int log_lanes;
  int channels;  // of a block
  int chunks;    // blocks that share a tile of positions, each with its own channels
};

// A map in tiles of 2^(log_block - log_lanes) positions: reads of a tile overlap, also where a view is
// rotated.
struct Tiles {
  int log_width;  // of a tile, positions
  int columns;    // tiles in a row of them
  int count;
};

// The tiles of the views of one launch, one view after the other.
struct ViewTiles {
  Tiles view[most_views];
  int first[most_views];  // tile of a view
  int count;
};

inline int log2_from(int value, int most) {  // of the least power of 2 that is no less
  int log = 0;
  while (log < most && (1 << log) < value) ++log;
  return log;
}

// For threads of `each` channels, in vectors of `vector`.
inline Plan plan_of(const Shape& s, int each, int vector) {
  Plan p{};
  p.log_lanes = s.interleaved ? log2_from((s.channels + each - 1) / each, log_warp) : 0;
  const int most = each << p.log_lanes;
  p.chunks = (s.channels + most - 1) / most;
  const int balanced = (s.channels + p.chunks - 1) / p.chunks;
  p.channels = (balanced + vector - 1) / vector * vector;
  return p;
}

inline Tiles tiles_of(const Map& map, int log_lanes) {
  const int log_positions = log_block - log_lanes;
  Tiles t{};
  t.log_width = log2_from(map.width, log_positions < log_warp ? log_positions : log_warp);
  const int log_height = log_positions - t.log_width;
  t.columns = ((map.width - 1) >> t.log_width) + 1;
  t.count = t.columns * (((map.height - 1) >> log_height) + 1);
  return t;
}

inline ViewTiles view_tiles_of(const Map* maps, int views, int log_lanes) {
  ViewTiles t{};
  for (int k = 0; k < views; ++k) {
    t.view[k] = tiles_of(maps[k], log_lanes);
    t.first[k] = t.count;
    t.count += t.view[k].count;
  }
  return t;
}

// Which part of the work a block has. Blocks go through the tiles first, then the chunks, then the images.
struct Part {
  int tile, chunk, image;
};

__device__ inline Part part_of(int tiles, int chunks) {
  const int block = static_cast<int>(blockIdx.x), rest = block / tiles;
  return {block - rest * tiles, rest % chunks, rest / chunks};
}

// The view to which a tile belongs.
__device__ inline int view_of(const ViewTiles& tiles, int views, int tile) {
  int k = 0;
  while (k + 1 < views && tiles.first[k + 1] <= tile) ++k;
  return k;
}

struct Pixel {
  int i, j;  // column, row; may lie beyond the map's right and lower edge
};

// `slot`: which of the tile's positions.
__device__ inline Pixel pixel_of(const Tiles& t, int log_lanes, int tile, int slot) {
  const int row = tile / t.columns, column = tile - row * t.columns;
  const int log_height = log_block - log_lanes - t.log_width;
  return {(column << t.log_width) + (slot & ((1 << t.log_width) - 1)),
          (row << log_height) + (slot >> t.log_width)};
}

__device__ inline bool within(const Pixel& p, const Map& map) { return p.i < map.width && p.j < map.height; }

__device__ inline int64_t offset_of(const Map& map, int i, int j) { return i * map.sx + j * map.sy; }

template <typename T>
__device__ inline T* image_of(const Map& map, int n) {
  return static_cast<T*>(map.data) + n * map.sn;
}

template <typename T>
struct Word {
  using type = T;
};
template <>
struct Word<core::Half> {
  using type = unsigned short;
};
template <>
struct Word<core::BFloat16> {
  using type = unsigned short;
};

// V neighbors in memory, 16 bytes of them if V is not 1; zeros, and no access, where not `on`. No branches,
// so that all reads of a thread are in flight together.
template <int V, typename T>
__device__ inline void read(bool on, const T* from, Real<T>* to) {
  T value[V];
  if constexpr (V == 1) {
    typename Word<T>::type word{};
    if (on) word = __ldg(reinterpret_cast<const typename Word<T>::type*>(from));
    std::memcpy(value, &word, sizeof(word));
  } else {
    static_assert(V * sizeof(T) == sizeof(uint4));
    uint4 words{0, 0, 0, 0};
    if (on) words = __ldg(reinterpret_cast<const uint4*>(from));
    std::memcpy(value, &words, sizeof(words));
  }
  for (int v = 0; v < V; ++v) to[v] = core::load(value[v]);
}

template <int V, typename T>
__device__ inline void write(T* to, const Real<T>* from) {
  T value[V];
  for (int v = 0; v < V; ++v) core::store(value[v], from[v]);
  if constexpr (V == 1) {
    *to = value[0];
  } else {
    static_assert(V * sizeof(T) == sizeof(uint4));
    uint4 words;
    std::memcpy(&words, value, sizeof(words));
    *reinterpret_cast<uint4*>(to) = words;
  }
}

// The channels of one thread: E of them, in E / V vectors.
template <typename T, int V, int E>
struct Slice {
  static constexpr int vectors = E / V;
  int first;  // channel
  int step;   // channels from a vector to the next
  int end;    // channels from here on are not the block's

  __device__ Slice(int lane, int log_lanes, int from, int to)
      : first(from + lane * V), step(V << log_lanes), end(to) {}
  __device__ Slice(const Plan& p, int chunk, int channels)
      : Slice(static_cast<int>(threadIdx.x) & ((1 << p.log_lanes) - 1), p.log_lanes, chunk * p.channels,
              (chunk + 1) * p.channels < channels ? (chunk + 1) * p.channels : channels) {}

  __device__ int channel(int r) const { return first + r * step; }
  __device__ bool has(int r) const { return channel(r) < end; }

  // Of the pixel at `from`; sc: stride of a channel.
  __device__ void load(bool on, const T* from, int64_t sc, Real<T>* values) const {
    for (int r = 0; r < vectors; ++r) read<V>(on && has(r), from + channel(r) * sc, values + r * V);
  }

  __device__ void store(T* to, int64_t sc, const Real<T>* values) const {
    for (int r = 0; r < vectors; ++r) {
      if (has(r)) write<V>(to + channel(r) * sc, values + r * V);
    }
  }

  // values += factor * the pixel at `from`
  __device__ void add(Real<T> factor, const T* from, int64_t sc, Real<T>* values) const {
    Real<T> pixel[E];
    load(true, from, sc, pixel);
    for (int e = 0; e < E; ++e) values[e] += factor * pixel[e];
  }
};

// What a position inside a map reads: two neighbors in each of two rows, and their weights.
template <typename T>
struct Corners {
  const T *top, *bottom;   // the left ones
  int right;               // elements from there to the right ones
  Real<T> left_of, above;  // weights of the left ones and of the top ones

  __device__ Corners(const Map& map, const T* image, const core::Position& p) {
    const auto x = core::tap<Real<T>>(p.x, map.width);
    const auto y = core::tap<Real<T>>(p.y, map.height);
    top = image + offset_of(map, x.low, y.low), bottom = image + offset_of(map, x.low, y.high);
    right = (x.high - x.low) * static_cast<int>(map.sx);
    left_of = 1 - x.fraction, above = 1 - y.fraction;
  }

  // values += factor * the samples of a thread's channels. A pixel of weight 0 is not read.
  template <int V, int E>
  __device__ void add(Real<T> factor, const Slice<T, V, E>& slice, int64_t sc, Real<T>* values) const {
    const Real<T> up = factor * above, down = factor * (1 - above), right_of = 1 - left_of;
    for (int r = 0; r < E / V; ++r) {
      const int64_t offset = slice.channel(r) * sc;
      const bool has = slice.has(r), has_right = has && right_of != 0;
      Real<T> corner[4][V];
      read<V>(has && above != 0, top + offset, corner[0]);
      read<V>(has_right && above != 0, top + offset + right, corner[1]);
      read<V>(has && above != 1, bottom + offset, corner[2]);
      read<V>(has_right && above != 1, bottom + offset + right, corner[3]);
      for (int v = 0; v < V; ++v) {
        values[r * V + v] += up * (left_of * corner[0][v] + right_of * corner[1][v]) +
                             down * (left_of * corner[2][v] + right_of * corner[3][v]);
      }
    }
  }
};

// Calls f(i, j, x tap, y tap) for the output pixels of a view that read pixel (x, y) of its input: some of
// their taps' weights for it may still be 0.
template <typename T, typename F>
__device__ inline void visit_readers(const core::PixelMap& map, const core::Preimage& preimage,
                                     const Map& input, const Pixel& pixel, const F& f) {
  const core::Reach x = core::reach(pixel.i, input.width, map.left, map.right);
  const core::Reach y = core::reach(pixel.j, input.height, map.top, map.bottom);
  const core::Box box = preimage.box(x, y);
  for (int j = box.top; j < box.bottom; ++j) {
    for (int i = box.left; i < box.right; ++i) {
      const core::Position p = map.at(i, j);
      if (!(p.x >= x.low && p.x <= x.high && p.y >= y.low && p.y <= y.high)) continue;
      f(i, j, core::tap<Real<T>>(p.x, input.width), core::tap<Real<T>>(p.y, input.height));
    }
  }
}

// Writes a gradient's pixel, in T or, where it is `wide`, in the accumulator's type; then it may also add to
// what an earlier launch has written.
template <typename T, int V, int E>
__device__ inline void store_gradient(const Slice<T, V, E>& slice, const Map& map, int image,
                                      const Pixel& pixel, bool wide, bool accumulate, Real<T>* values) {
  const int64_t offset = offset_of(map, pixel.i, pixel.j);
  if (!wide) return slice.store(image_of<T>(map, image) + offset, map.sc, values);
  Real<T>* to = image_of<Real<T>>(map, image) + offset;
  for (int r = 0; r < E / V; ++r) {
    if (!slice.has(r)) continue;
    for (int v = 0; v < V; ++v) {
      Real<T>& sum = to[(slice.channel(r) + v) * map.sc];
      sum = (accumulate ? sum : Real<T>(0)) + values[r * V + v];
    }
  }
}

// Whether channels can be read 16 bytes at a time.
inline bool has_vectors(const Shape& s, const Map& map) {
  const int width = s.dtype == Dtype::float64 ? 2 : (s.dtype == Dtype::float32 ? 4 : 8);
  return s.interleaved && s.channels % width == 0 && reinterpret_cast<std::uintptr_t>(map.data) % 16 == 0 &&
         map.sn % width == 0 && map.sy % width == 0 && map.sx % width == 0;
}
inline bool have_vectors(const Shape& s, const Map* maps, int count) {
  for (int i = 0; i < count; ++i) {
    if (maps[i].data != nullptr && !has_vectors(s, maps[i])) return false;
  }
  return true;
}

// Features of type T, read V neighbors at a time.
template <typename T_, int V_>
struct Access {
  using T = T_;
  static constexpr int V = V_;
};

template <typename F>
cudaError_t dispatch(Dtype dtype, bool vectors, const F& f) {
  switch (dtype) {
    case Dtype::float32:
      return vectors ? f(Access<float, 4>{}) : f(Access<float, 1>{});
    case Dtype::float64:
      return vectors ? f(Access<double, 2>{}) : f(Access<double, 1>{});
    case Dtype::float16:
      return vectors ? f(Access<core::Half, 8>{}) : f(Access<core::Half, 1>{});
    case Dtype::bfloat16:
      return vectors ? f(Access<core::BFloat16, 8>{}) : f(Access<core::BFloat16, 1>{});
  }
  return cudaErrorInvalidValue;
}

template <typename Params>
cudaError_t launch(void (*kernel)(Params), int64_t blocks, const Params& p, cudaStream_t stream) {
  static_assert(sizeof(Params) <= 4096, "a kernel has at most 4 KB of arguments");
  if (blocks > std::numeric_limits<int>::max()) return cudaErrorInvalidConfiguration;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(block_threads);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, p);
}

}  // namespace
}  // namespace equifast::cuda
