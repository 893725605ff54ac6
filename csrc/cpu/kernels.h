// The CPU kernels, torch-free. Each is compiled once per instruction set, in a namespace of its own, and
// works on a range of tasks: how the work is cut into tasks depends on the shapes alone, so the result does
// not depend on the number of threads.
#pragma once

#include <cstdint>

#include "../core/storage.h"

namespace equifast::cpu {

using std::int64_t;

using core::Dtype;

// (N, C, H, W). Planar: sx is 1. Interleaved (channels_last): sc is 1 and sx is C.
struct Map {
  const void* data;
  int64_t sn, sc, sy;  // strides of image, channel and row, elements
  int height, width;   // pixels
  int64_t sx;          // stride of a column, elements
};

// Laid out as the map it belongs to and of its dtype; but with one cosine per pixel it is float32, or float64
// where the features are.
struct Gradient {
  void* data;
  int64_t sn, sc, sy, sx;  // elements
};

struct WarpParams {
  Dtype dtype;
  bool interleaved;
  int images, channels, views;  // N, C, K
  Map source;                   // (N, C, H, W); its data is not read by the adjoint
  const double* theta;          // (K, N, 2, 3)
  const Map* targets;           // K maps (N, C, h, w): written by the forward pass, read by the adjoint
  Gradient gradient;            // (N, C, H, W), written by the adjoint
};

struct SimilarityParams {
  Dtype dtype;
  bool interleaved;
  bool pixel;                   // reduction "pixel"
  int images, channels, views;  // N, C, K
  Map anchor;                   // (N, C, H, W)
  const Map* view;              // K maps (N, C, h, w)
  const double* theta;          // (K, N, 2, 3)
  double* partial;              // (N, K, blocks, 3): sums of a task; see similarity_blocks
  double* sums;            // (N, K, 3): <f0,fk>, |f0|^2, |fk|^2; or for "pixel" sum of cosines, positions, 0
  const double* upstream;  // (N, K)
  Gradient anchor_gradient;  // (N, C, H, W)
  bool add;  // to what the anchor's gradient holds: of a single view, with one cosine per image
  const Gradient* view_gradient;  // K times (N, C, h, w); null: not wanted
};

struct PairsParams {
  Dtype dtype;
  int images, maps;        // N, M
  int64_t elements;        // of one image's map
  const void* const* map;  // M times (N, elements), dense and in one order
  void* total;             // (N, elements), float32, or float64 where the maps are: their sum at unit length
  double* sums;            // (N, M, 2): one over the length of a map, or 0; its product with the total
  double* partial;         // (N, pairs_chunks, M + 1)
  const double* upstream;  // (N)
  void* const* gradient;   // M times (N, elements)
};

struct StepParams {
  Dtype dtype;
  int images;
  int64_t elements;                   // of one image
  const void *x, *gradient, *origin;  // (N, elements), contiguous
  void* next;                         // (N, elements)
  double eps, step, sigma;            // units of image values; of image values; none
  const int64_t* ids;                 // (N)
  std::uint32_t seed, draw, t;
  double* norms;    // (N, 2): largest magnitude, L2 norm after division by it
  double* partial;  // (N, step_chunks)
};

struct ColorJitterParams {
  Dtype dtype;
  bool interleaved, upstream_interleaved;
  int images;
  int64_t pixels;            // of one image
  const void* images_data;   // (N, 3, H, W), dense
  const void* upstream;      // likewise, in its own layout
  const double* parameters;  // (N, 5): factors of brightness, contrast, saturation; hue, turns; gray, 0 or 1
  const double* mean;        // (N): of gray, after brightness; null until it is known
  double* mean_gradient;     // (N): the gradient of the mean over the pixels
  double* partial;           // (N, color_jitter_chunks)
  void* result;              // laid out as the images
  void* gradient;            // likewise, float32, or float64 where the images are
};

struct FiltersParams {
  Dtype dtype;
  int64_t orders, rows, weights;  // G, I, J
  const std::int32_t* order;      // (G, J): which of the J weights comes at each place
  const void* filters;            // (O, I, J), or (O, G, I, J) of the adjoint
  void* result;                   // (O, G, I, J), or (O, I, J)
};

// Convolutions compute so many channels at once, at least.
constexpr int whole_channels = 16;

// Maps are interleaved and dense; dtype is float32 or float64.
struct WinogradParams {
  Dtype dtype;
  int images, channels, outputs;  // N, C, O; the latter two multiples of whole_channels
  int height, width;              // pixels, of x
  int out_height, out_width;
  int dilation, top, left;    // pixels; the latter two of padding
  const void* x;              // (N, C, H, W)
  const void* filters;        // (O / 16, 36, C, 16), transformed
  const void* bias;           // (O), or null
  void* result;               // (N, O, h, w)
  const int *rows, *columns;  // of the first outputs of tiles, pixels
  int row_tiles, column_tiles;
  int group;  // of the O channels, that a task gives; whatever it is, the result is the same
};

// Likewise. The result is a grid of blocks of pixels, which are one pixel, or stride x stride of them: then
// filters have a channel for each number of a block, and blocks a stride of 1.
struct ConvTransposeParams {
  Dtype dtype;
  int images, channels, outputs;            // N, O, C
  int padded;                               // C', a multiple of 16, at least block^2 C
  int height, width;                        // pixels, of x
  int out_height, out_width;                // pixels
  int stride, kernel_height, kernel_width;  // of blocks, and weights
  int top, left;                            // of padding, pixels
  int block;                                // pixels along a side
  const void* x;                            // (N, O, h, w)
  const void* filters;                      // (C' / 16, kernel height, kernel width, O, 16)
  void* result;                             // (N, C, H, W)
  int rows;                                 // of blocks, of a task; whatever it is, the result is the same
  int group;                                // of the channels of filters, likewise: a multiple of 16
};
// Padding in blocks, and blocks along a side.
inline int blocks_before(int padding, int block) { return padding / block; }
inline int blocks_along(int pixels, int padding, int block) {
  return (pixels - 1 + padding) / block - padding / block + 1;
}

// Tasks of a kernel; all are counted from the shapes.
inline int parts(int size, int part) { return (size + part - 1) / part; }

constexpr int warp_task_rows = 32;
inline int64_t warp_tasks(const WarpParams& p) {
  int64_t rows = 0;
  for (int k = 0; k < p.views; ++k) rows += parts(p.targets[k].height, warp_task_rows);
  return rows * p.images;
}

// A task owns some rows of the gradient, in a group of channels.
constexpr int warp_adjoint_rows = 32, warp_adjoint_channels = 16;
inline int64_t warp_adjoint_tasks(const WarpParams& p) {
  return int64_t{p.images} * parts(p.channels, warp_adjoint_channels) *
         parts(p.source.height, warp_adjoint_rows);
}

// One cosine per image: tasks own some rows, in a group of channels.
constexpr int similarity_anchor_rows = 24, similarity_view_rows = 32, similarity_group = 64;

// Channels of a task for the views that go by rows (level.h): four at a time, and what fits into cache.
inline int similarity_level_channels(const SimilarityParams& p) {
  const int64_t cached = 32768 / (int64_t{p.anchor.height} * p.anchor.width) / 4 * 4;
  return cached < 4 ? 4 : (cached > 16 ? 16 : static_cast<int>(cached));
}
inline int similarity_level_groups(const SimilarityParams& p) {
  return p.interleaved || p.pixel ? 0 : parts(p.channels, similarity_level_channels(p));
}

// How many parts of one (n, k) have sums of their own: bands of the anchor's rows in groups of channels, then
// the groups of views that go by rows. A position's channels stay together where the cosine is per pixel.
// Never by the number of images, since that would be by how an image's sums are rounded.
inline int similarity_panel_blocks(const SimilarityParams& p) {
  return parts(p.anchor.height, similarity_anchor_rows) * parts(p.channels, similarity_group);
}
inline int similarity_blocks(const SimilarityParams& p) {
  if (!p.pixel) return similarity_panel_blocks(p) + similarity_level_groups(p);
  return p.anchor.height < 16 ? p.anchor.height : 16;
}

// A task is a part of one (n, k), or of one n with all its views where the cosine is per image.
inline int64_t similarity_tasks(const SimilarityParams& p) {
  return int64_t{p.images} * (p.pixel ? p.views : 1) * similarity_blocks(p);
}

// One cosine per pixel: a task owns some rows of the gradient of the anchor, or the gradient of one view.
constexpr int similarity_pixel_rows = 4;
inline int64_t similarity_pixel_backward_tasks(const SimilarityParams& p) {
  return int64_t{p.images} * (p.views + parts(p.anchor.height, similarity_pixel_rows));
}

// With several views of small maps a task takes them whole, in a group of channels: what it reads it reads
// once.
constexpr int similarity_whole_anchor = 768,
              similarity_whole_view = 1024;  // pixels; of a view with its border
constexpr int similarity_whole_rows = 128;
inline bool similarity_whole(const SimilarityParams& p) {
  if (p.views == 1 || p.anchor.height > similarity_whole_rows ||
      int64_t{p.anchor.height} * p.anchor.width > similarity_whole_anchor) {
    return false;
  }
  for (int k = 0; k < p.views; ++k) {
    if ((p.view[k].height + int64_t{2}) * (p.view[k].width + int64_t{2}) > similarity_whole_view)
      return false;
  }
  return true;
}

// One cosine per image: without gradients of views a task owns some rows of the anchor's, in a group of
// channels; else a task owns some rows of a gradient, in a group of channels. The tasks of one image and
// group follow each other, those of the anchor first: what they read is still in cache for those of the
// views. With a single view there are none of the anchor: each position's gradient is written by the task
// that owns the pixel which the position reads first; where planes go by rows or whole, by the tasks after
// these.
inline int64_t similarity_group_tasks(const SimilarityParams& p) {
  const int64_t bands = parts(p.anchor.height, similarity_anchor_rows);
  if (p.view_gradient == nullptr) return bands;
  if (similarity_whole(p)) return 1;
  int64_t tasks = p.views == 1 ? 0 : bands;
  for (int k = 0; k < p.views; ++k) tasks += parts(p.view[k].height, similarity_view_rows);
  return tasks;
}
inline int64_t similarity_backward_tasks(const SimilarityParams& p) {
  return int64_t{p.images} * parts(p.channels, similarity_group) * similarity_group_tasks(p);
}

// After these: a group of channels of an image, with all its views that go by rows or as a whole.
inline int64_t similarity_backward_level_tasks(const SimilarityParams& p) {
  if (p.view_gradient == nullptr) return 0;
  return int64_t{p.images} * similarity_level_groups(p);
}

constexpr int64_t pairs_chunk = 8192;  // elements
inline int64_t pairs_chunks(const PairsParams& p) { return (p.elements + pairs_chunk - 1) / pairs_chunk; }

constexpr int64_t step_chunk = 16384;  // elements, a multiple of 4
inline int64_t step_chunks(const StepParams& p) { return (p.elements + step_chunk - 1) / step_chunk; }

constexpr int64_t color_jitter_chunk = 4096;  // pixels
inline int64_t color_jitter_chunks(const ColorJitterParams& p) {
  return (p.pixels + color_jitter_chunk - 1) / color_jitter_chunk;
}

constexpr int winograd_tiles = 24;  // of a task
inline int64_t winograd_blocks(const WinogradParams& p) {
  return (int64_t{p.images} * p.row_tiles * p.column_tiles + winograd_tiles - 1) / winograd_tiles;
}
inline int64_t winograd_tasks(const WinogradParams& p) {
  return winograd_blocks(p) * parts(p.outputs, p.group);
}

inline int64_t conv_transpose_tasks(const ConvTransposeParams& p) {
  return int64_t{p.images} * parts(blocks_along(p.out_height, p.top, p.block), p.rows) *
         parts(p.padded, p.group);
}

// After the tasks: adds their partial sums in order. `result`: (N, K) float32, or float64 for float64
// features.
void similarity_finish(const SimilarityParams& p, void* result);
void pairs_finish_squares(const PairsParams& p);
void pairs_finish_total(const PairsParams& p, void* result);  // (N), of the dtype of the total
void step_finish_largest(const StepParams& p);
void step_finish_norm(const StepParams& p);
void color_jitter_finish(const ColorJitterParams& p, double* means);  // (N): of the partial sums, over pixels

// One instruction set's kernels; [begin, end) are tasks.
struct Kernels {
  const char* name;
  void (*warp)(const WarpParams& p, int64_t begin, int64_t end);
  void (*warp_adjoint)(const WarpParams& p, int64_t begin, int64_t end);
  void (*similarity)(const SimilarityParams& p, int64_t begin, int64_t end);
  // a single view's: the anchor's gradient must hold zeros, or what is added to
  void (*similarity_backward)(const SimilarityParams& p, int64_t begin, int64_t end);
  // after it
  void (*similarity_backward_level)(const SimilarityParams& p, int64_t begin, int64_t end);
  void (*similarity_pixel)(const SimilarityParams& p, int64_t begin, int64_t end);
  void (*similarity_pixel_backward)(const SimilarityParams& p, int64_t begin, int64_t end);
  void (*pairs_squares)(const PairsParams& p, int64_t begin, int64_t end);  // tasks: N * pairs_chunks
  void (*pairs_total)(const PairsParams& p, int64_t begin, int64_t end);
  void (*pairs_gradient)(const PairsParams& p, int64_t begin, int64_t end);
  void (*step_largest)(const StepParams& p, int64_t begin, int64_t end);  // tasks: N * step_chunks
  void (*step_squares)(const StepParams& p, int64_t begin, int64_t end);
  void (*step_move)(const StepParams& p, int64_t begin, int64_t end);
  // tasks: N * color_jitter_chunks
  void (*color_jitter_gray)(const ColorJitterParams& p, int64_t begin, int64_t end);
  void (*color_jitter)(const ColorJitterParams& p, int64_t begin, int64_t end);
  void (*color_jitter_backward)(const ColorJitterParams& p, int64_t begin, int64_t end);
  void (*color_jitter_add_mean)(const ColorJitterParams& p, int64_t begin, int64_t end);
  void (*turn_filters)(const FiltersParams& p, int64_t begin, int64_t end);  // tasks: O
  void (*turn_filters_adjoint)(const FiltersParams& p, int64_t begin, int64_t end);
  void (*winograd)(const WinogradParams& p, int64_t begin, int64_t end);
  void (*conv_transpose)(const ConvTransposeParams& p, int64_t begin, int64_t end);
};

// The widest set that this machine runs; EQUIFAST_ISA=baseline|avx2|avx512 in the environment asks for less.
const Kernels& kernels();

}  // namespace equifast::cpu
