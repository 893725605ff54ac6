// Warp of an image under K affine views, and its adjoint. Compiled once per instruction set.
#include "rows.h"

namespace equifast::cpu::EQUIFAST_ISA {
namespace {

// Rows [first, last) of the target of image n and view k.
template <typename T>
void warp_rows(const WarpParams& p, int k, int n, int first, int last) {
  using real = Real<T>;
  const Map& target = p.targets[k];
  const int width = target.width, widest = width > p.source.width ? width : p.source.width;
  Scratch scratch(Row<real>::scratch(width) + 2 * Scratch::bytes<real>(widest) +
                  Scratch::bytes<real>(p.channels));
  Row<real> row(scratch, width);
  real* values = scratch.take<real>(widest);
  real* line = scratch.take<real>(widest);
  real* pixel = scratch.take<real>(p.channels);
  row.aim(theta_of(p.theta, p.images, k, n), target.height, width, p.source.height, p.source.width);
  const T* image = static_cast<const T*>(p.source.data) + n * p.source.sn;
  T* out_image = static_cast<T*>(const_cast<void*>(target.data)) + n * target.sn;
  for (int j = first; j < last; ++j) {
    row.move_to(j);
    if (p.interleaved) {
      T* out = out_image + j * target.sy;
      for (int64_t i = 0; i < int64_t{row.begin} * p.channels; ++i) store(out[i], real(0));
      for (int64_t i = int64_t{row.end} * p.channels; i < int64_t{width} * p.channels; ++i)
        store(out[i], real(0));
      for (int i = row.begin; i < row.end; ++i) {
        gather_pixel(image, corners(row, i, p.source.sy, p.source.sx), p.channels, pixel);
        for (int c = 0; c < p.channels; ++c) store(out[int64_t{i} * p.channels + c], pixel[c]);
      }
      continue;
    }
    for (int c = 0; c < p.channels; ++c) {
      T* __restrict out = out_image + c * target.sc + j * target.sy;
      gather(image + c * p.source.sc, p.source.sy, row, values, line);
      for (int i = 0; i < row.begin; ++i) store(out[i], real(0));
      for (int i = row.begin; i < row.end; ++i) store(out[i], values[i - row.begin]);
      for (int i = row.end; i < width; ++i) store(out[i], real(0));
    }
  }
}

// The gradient of channel c of image n, or of all its channels where they are interleaved.
template <typename T>
void adjoint_plane(const WarpParams& p, int n, int c) {
  using real = Real<T>;
  int widest = p.source.width;
  for (int k = 0; k < p.views; ++k) widest = widest > p.targets[k].width ? widest : p.targets[k].width;
  Scratch scratch(Row<real>::scratch(widest) + 2 * Scratch::bytes<real>(widest) +
                  Scratch::bytes<real>(p.channels));
  Row<real> row(scratch, widest);
  real* values = scratch.take<real>(widest);
  real* line = scratch.take<real>(widest);
  real* pixel = scratch.take<real>(p.channels);
  real* image = static_cast<real*>(p.gradient.data) + n * p.gradient.sn;
  real* plane = image + c * p.gradient.sc;
  for (int y = 0; y < p.source.height; ++y) {
    const int64_t count = int64_t{p.source.width} * (p.interleaved ? p.channels : 1);
    std::memset(plane + y * p.gradient.sy, 0, sizeof(real) * static_cast<std::size_t>(count));
  }
  for (int k = 0; k < p.views; ++k) {
    const Map& target = p.targets[k];
    if (target.data == nullptr) continue;  // no gradient comes from this view
    Row<real> part = row.of_width(target.width);
    part.aim(theta_of(p.theta, p.images, k, n), target.height, target.width, p.source.height, p.source.width);
    const T* from_image = static_cast<const T*>(target.data) + n * target.sn;
    for (int j = 0; j < target.height; ++j) {
      part.move_to(j);
      if (p.interleaved) {
        for (int i = part.begin; i < part.end; ++i) {
          const T* from = from_image + j * target.sy + i * target.sx;
          for (int ch = 0; ch < p.channels; ++ch) pixel[ch] = load(from[ch]);
          scatter_pixel(image, corners(part, i, p.gradient.sy, p.gradient.sx), p.channels, pixel);
        }
        continue;
      }
      const T* __restrict from = from_image + c * target.sc + j * target.sy;
      for (int i = part.begin; i < part.end; ++i) values[i - part.begin] = load(from[i]);
      scatter(plane, p.gradient.sy, part, values, line);
    }
  }
}

template <typename T>
void run_warp(const WarpParams& p, int64_t begin, int64_t end) {
  // Tasks go through the views, their images and their blocks of rows, in this order.
  int64_t task = 0;
  for (int k = 0; k < p.views && task < end; ++k) {
    const int height = p.targets[k].height;
    const int64_t blocks = (height + warp_task_rows - 1) / warp_task_rows;
    for (int64_t i = begin > task ? begin - task : 0; i < blocks * p.images && task + i < end; ++i) {
      const int first = static_cast<int>(i % blocks) * warp_task_rows;
      const int last = first + warp_task_rows < height ? first + warp_task_rows : height;
      warp_rows<T>(p, k, static_cast<int>(i / blocks), first, last);
    }
    task += blocks * p.images;
  }
}

template <typename T>
void run_adjoint(const WarpParams& p, int64_t begin, int64_t end) {
  const int planes = p.interleaved ? 1 : p.channels;
  for (int64_t i = begin; i < end; ++i)
    adjoint_plane<T>(p, static_cast<int>(i / planes), static_cast<int>(i % planes));
}

}  // namespace

void warp(const WarpParams& p, int64_t begin, int64_t end) {
  switch (p.dtype) {
    case Dtype::float32:
      return run_warp<float>(p, begin, end);
    case Dtype::float64:
      return run_warp<double>(p, begin, end);
    case Dtype::float16:
      return run_warp<Half>(p, begin, end);
    case Dtype::bfloat16:
      return run_warp<BFloat16>(p, begin, end);
  }
}

void warp_adjoint(const WarpParams& p, int64_t begin, int64_t end) {
  switch (p.dtype) {
    case Dtype::float32:
      return run_adjoint<float>(p, begin, end);
    case Dtype::float64:
      return run_adjoint<double>(p, begin, end);
    case Dtype::float16:
      return run_adjoint<Half>(p, begin, end);
    case Dtype::bfloat16:
      return run_adjoint<BFloat16>(p, begin, end);
  }
}

}  // namespace equifast::cpu::EQUIFAST_ISA
