// Warp of an image under K affine views, and its adjoint. Compiled once per instruction set.
//
// Under a view without rotation and shear planar maps, and interleaved ones of few channels, are warped by
// rows (axis.h), everything else by panels of four channels (quads.h); the forward pass samples straight from
// memory where a panel would not pay.
#include <algorithm>
#include <cmath>

#include "../core/preimage.h"
#include "axis.h"
#include "quads.h"

namespace equifast::cpu::EQUIFAST_ISA {
namespace {

constexpr int tile_columns = 32, tile_rows = 32;  // of a target, whose panel stays in cache
constexpr int most_window = 4096;                 // pixels of a panel

core::PixelMap map_of(const WarpParams& p, int k, int n) {
  const Map& target = p.targets[k];
  return {theta_of(p.theta, p.images, k, n), double(target.width), double(target.height),
          double(p.source.width), double(p.source.height)};
}

// By rows.
bool separable(const WarpParams& p, const core::PixelMap& map) {
  return !p.interleaved && map.xj == 0 && map.yi == 0;
}

// Whether a pixel's channels fit into a vector; a task of the adjoint then has all of them.
bool pixels(const WarpParams& p) {
  static_assert(warp_adjoint_channels >= 16);
  return p.interleaved && p.channels <= 16;
}

// By rows of such pixels. The adjoint's of a single view alone.
bool by_pixels(const WarpParams& p, const core::PixelMap& map) {
  return pixels(p) && map.xj == 0 && map.yi == 0;
}

// Entries of such a row, and room behind it for the vector of the last pixel.
int row_of_pixels(const WarpParams& p, int width) { return pixels(p) ? width * p.channels + 16 : 0; }

// The columns' matrix, of pixels of so many channels. What is written beyond a pixel the next one overwrites.
template <typename T>
void apply_to_pixels(const Axis<Real<T>>& axis, const Real<T>* __restrict line, int channels,
                     T* __restrict out) {
  using real = Real<T>;
  const int entries = axis.size * channels;
  for (int i = 0, x = 0; i < axis.size; ++i, x += channels) {
    const int begin = axis.begin[i], end = axis.begin[i + 1];
    if constexpr (maskable<T>) {
      Pack<16, real> sum, other;
      sum.zero();
      if (begin < end) sum.get(line + axis.at[begin] * channels), sum.scaled(axis.weight[begin], sum);
      for (int e = begin + 1; e < end; ++e) {
        other.get(line + axis.at[e] * channels), sum.add_scaled(axis.weight[e], other);
      }
      if (entries - x >= 16) {
        put(out + x, AllLanes(), sum);
      } else {
        put(out + x, SomeLanes{0, channels}, sum);
      }
    } else {
      real sum[16] = {};
      for (int e = begin; e < end; ++e) {
        const real* from = line + axis.at[e] * channels;
        const real weight = axis.weight[e];
        for (int c = 0; c < 16; ++c) sum[c] += weight * from[c];
      }
      const int written = std::is_same_v<T, real> && entries - x >= 16 ? 16 : channels;
      for (int c = 0; c < written; ++c) store(out[x + c], sum[c]);
    }
  }
}

template <typename real>
void sample_columns(Axis<real>& axis, const core::PixelMap& map, int width, int in_width) {
  axis.sample(0, width, in_width, map.left, map.right, map.xi, map.x0);
}

template <typename real>
void sample_rows(Axis<real>& axis, const core::PixelMap& map, int first, int last, int in_height) {
  axis.sample(first, last - first, in_height, map.top, map.bottom, map.yj, map.y0);
}

template <typename T>
class Warp {
 public:
  using real = Real<T>;

  explicit Warp(const WarpParams& p)
      : p_(p),
        widest_(widest(p)),
        scratch_(Scratch::bytes<real>(row_of_pixels(p, p.source.width)) +
                 Scratch::bytes<real>(p.source.width + Columns<real>::beyond) +
                 Scratch::bytes<real>(widest_ + Columns<real>::beyond) +
                 Axis<real>::scratch(widest_, 2 * widest_) +
                 Axis<real>::scratch(warp_task_rows, 2 * warp_task_rows) +
                 Columns<real>::scratch(widest_, 2 * widest_) + Scratch::bytes<Taps<real>>(tile_rows) +
                 Scratch::bytes<real>((most_window + quad) * quad) +
                 Scratch::bytes<real>(tile_columns * quad) + Scratch::bytes<real>(quad * most_window)),
        pixels_(scratch_.take<real>(row_of_pixels(p, p.source.width))),
        line_(scratch_.take<real>(p.source.width + Columns<real>::beyond)),
        values_(scratch_.take<real>(widest_ + Columns<real>::beyond)),
        x_axis_(scratch_, widest_, 2 * widest_),
        y_axis_(scratch_, warp_task_rows, 2 * warp_task_rows),
        columns_(scratch_, widest_, 2 * widest_),
        taps_(scratch_.take<Taps<real>>(tile_rows)),
        panel_(scratch_.take<real>((most_window + quad) * quad)),
        quads_(scratch_.take<real>(tile_columns * quad)),
        lines_(scratch_.take<real>(quad * most_window)) {}

  // Rows [first, last) of the target of image n and view k.
  void rows(int k, int n, int first, int last) {
    const Map& target = p_.targets[k];
    const core::PixelMap map = map_of(p_, k, n);
    const T* image = static_cast<const T*>(p_.source.data) + n * p_.source.sn;
    T* out = static_cast<T*>(const_cast<void*>(target.data)) + n * target.sn;
    if (separable(p_, map)) return by_rows(map, image, target, out, first, last);
    if (by_pixels(p_, map)) return by_rows_of_pixels(map, image, target, out, first, last);
    for (int y = first; y < last; y += tile_rows) {
      for (int x = 0; x < target.width; x += tile_columns) {
        tile(map, image, target, out,
             {x, std::min(x + tile_columns, target.width), y, std::min(y + tile_rows, last)});
      }
    }
  }

 private:
  const WarpParams& p_;
  int widest_;
  Scratch scratch_;
  real *pixels_, *line_, *values_;
  Axis<real> x_axis_, y_axis_;
  Columns<real> columns_;
  Taps<real>* taps_;  // of the rows of a tile
  real *panel_, *quads_, *lines_;

  static int widest(const WarpParams& p) {
    int width = 1;
    for (int k = 0; k < p.views; ++k) width = std::max(width, p.targets[k].width);
    return width;
  }

  void by_rows(const core::PixelMap& map, const T* image, const Map& target, T* out, int first, int last) {
    const Map& source = p_.source;
    sample_columns(x_axis_, map, target.width, source.width);
    sample_rows(y_axis_, map, first, last, source.height);
    columns_.lay(x_axis_, source.width);
    for (int j = first; j < last; ++j) {
      const auto row = [&](int c) { return out + c * target.sc + j * target.sy; };
      if (y_axis_.count(j - first) == 0) {
        for (int c = 0; c < p_.channels; ++c) clear(row(c), target, 1, 0, target.width);
        continue;
      }
      for (int c = 0; c < p_.channels; ++c) {
        const T* plane = image + c * source.sc;
        T* to = row(c);
        separable_row<1, T>(
            y_axis_, j - first, columns_, [&](int y) { return plane + y * source.sy; }, 0, line_, values_,
            [&](int x, const Pack<16, real>(&v)[1]) EQUIFAST_INLINE {
              with_lanes(0, target.width - x, [&](auto lanes) EQUIFAST_INLINE { put(to + x, lanes, v[0]); });
            });
      }
    }
  }

  void by_rows_of_pixels(const core::PixelMap& map, const T* image, const Map& target, T* out, int first,
                         int last) {
    const Map& source = p_.source;
    sample_columns(x_axis_, map, target.width, source.width);
    sample_rows(y_axis_, map, first, last, source.height);
    for (int j = first; j < last; ++j) {
      T* to = out + j * target.sy;
      if (y_axis_.count(j - first) == 0) {
        clear(to, target, p_.channels, 0, target.width);
        continue;
      }
      const auto row = [&](int y) { return image + y * source.sy; };
      combine<T>(y_axis_, j - first, row, 0, source.width * p_.channels, pixels_);
      apply_to_pixels<T>(x_axis_, pixels_, p_.channels, to);
    }
  }

  struct Span {  // columns of a tile's row that are inside the frame
    int begin, end;
  };

  void tile(const core::PixelMap& map, const T* image, const Map& target, T* out, const core::Box& box) {
    static_assert(tile_columns <= Taps<real>::most);
    const Map& source = p_.source;
    Span spans[tile_rows];
    core::Box window{source.width, 0, source.height, 0};
    int64_t positions = 0;
    for (int j = box.top; j < box.bottom; ++j) {
      int begin = box.left, end = box.right;
      inside(map, j, begin, end);
      spans[j - box.top] = {begin, end};
      if (begin == end) continue;
      Taps<real>& taps = taps_[j - box.top];
      taps.look(map, j, begin, end, source.width, source.height);
      // along a row positions are monotone, so the ends tell what is read
      for (const int i : {0, end - begin - 1}) {
        window.left = std::min(window.left, taps.left[i]);
        window.right = std::max(window.right, taps.left[i] + taps.right[i] + 1);
        window.top = std::min(window.top, taps.top[i]);
        window.bottom = std::max(window.bottom, taps.top[i] + taps.down[i] + 1);
      }
      positions += end - begin;
    }
    const int64_t area = int64_t{window.right - window.left} * (window.bottom - window.top);
    // Panels cost as much as some samples per pixel; pixels of many channels are vectors as they lie there.
    const bool direct =
        area > most_window || area > 4 * positions + 64 || (p_.interleaved && p_.channels > quad);
    const int x = direct ? 0 : window.left, y = direct ? 0 : window.top;
    const int sx = static_cast<int>(direct ? source.sx : quad);
    const int sy = static_cast<int>(direct ? source.sy : quad * (window.right - window.left));
    if (positions > 0) {
      for (int j = box.top; j < box.bottom; ++j) {
        const Span& span = spans[j - box.top];
        taps_[j - box.top].place(span.end - span.begin, x, y, sx, sy);
      }
    }
    for (int c = 0; c < p_.channels; c += quad) {
      const int filled = std::min(p_.channels - c, quad);
      if (positions > 0 && !direct) load_window(image + c * source.sc, window, filled);
      for (int j = box.top; j < box.bottom; ++j) {
        const Span& span = spans[j - box.top];
        const int count = span.end - span.begin;
        T* row = out + c * target.sc + j * target.sy;
        clear(row, target, filled, box.left, span.begin);
        clear(row, target, filled, span.end, box.right);
        if (count == 0) continue;
        if (direct) {
          gather_quads(image + c * source.sc, filled, taps_[j - box.top], count);
        } else {
          taps_[j - box.top].gather(panel_, count, quads_);
        }
        store_quads(quads_, filled, count, lines_, row + span.begin * target.sx, target.sc, target.sx);
      }
    }
  }

  void load_window(const T* image, const core::Box& window, int filled) {
    const int columns = window.right - window.left;
    real* to = panel_;
    for (int y = window.top; y < window.bottom; ++y, to += columns * quad) {
      load_quads(image + y * p_.source.sy + window.left * p_.source.sx, p_.source.sc, p_.source.sx, filled,
                 columns, lines_, to);
    }
  }

  // As Taps::gather, from memory.
  void gather_quads(const T* image, int filled, const Taps<real>& taps, int count) {
    for (int l = 0; l < filled; ++l) {
      const T* channel = image + l * p_.source.sc;
      for (int i = 0; i < count; ++i) {
        const T *above = channel + taps.offset[i], *below = above + taps.down[i];
        const int right = taps.right[i];
        quads_[i * quad + l] =
            blend(taps.fy[i], blend(taps.fx[i], real(load(above[0])), real(load(above[right]))),
                  blend(taps.fx[i], real(load(below[0])), real(load(below[right]))));
      }
    }
  }

  static void clear(T* row, const Map& target, int filled, int begin, int end) {
    for (int l = 0; l < filled; ++l) {
      for (int i = begin; i < end; ++i) store(row[l * target.sc + i * target.sx], real(0));
    }
  }
};

// A task owns rows of the gradient, and finds the positions that read them.
template <typename T>
class Adjoint {
 public:
  using real = Real<T>;

  explicit Adjoint(const WarpParams& p)
      : p_(p),
        widest_(widest(p)),
        highest_(highest(p)),
        scratch_(Scratch::bytes<real>(row_of_pixels(p, widest_)) +
                 2 * Scratch::bytes<real>(most_width() + Columns<real>::beyond) +
                 2 * Axis<real>::scratch(most_width(), 2 * widest_) +
                 Axis<real>::scratch(highest_, 2 * highest_) +
                 Axis<real>::scratch(warp_adjoint_rows, 2 * highest_) +
                 Columns<real>::scratch(p.source.width, 2 * widest_) +
                 2 * Scratch::bytes<real>((most_width() + quad) * quad) +
                 Scratch::bytes<real>(panel_size() * groups()) + Scratch::bytes<real>(total_size())),
        pixels_(scratch_.take<real>(row_of_pixels(p, widest_))),
        line_(scratch_.take<real>(most_width() + Columns<real>::beyond)),
        values_(scratch_.take<real>(most_width() + Columns<real>::beyond)),
        x_axis_(scratch_, most_width(), 2 * widest_),
        x_transposed_(scratch_, most_width(), 2 * widest_),
        y_axis_(scratch_, highest_, 2 * highest_),
        y_transposed_(scratch_, warp_adjoint_rows, 2 * highest_),
        columns_(scratch_, p.source.width, 2 * widest_),
        quads_(scratch_.take<real>((most_width() + quad) * quad)),
        lines_(scratch_.take<real>((most_width() + quad) * quad)),
        panel_(scratch_.take<real>(panel_size() * groups())),
        total_(scratch_.take<real>(total_size())) {}

  // Rows [first, last) and `channels` channels, from c on, of the gradient of image n.
  void rows(int n, int c, int channels, int first, int last) {
    Part part{n, c, channels, first, last, false, false};
    for (int k = 0; k < p_.views; ++k) {
      if (p_.targets[k].data == nullptr) continue;  // no gradient comes from this view
      const core::PixelMap map = map_of(p_, k, n);
      if (p_.views == 1 && by_pixels(p_, map)) return by_rows_of_pixels(map, p_.targets[k], part);
      if (separable(p_, map)) {
        by_rows(map, p_.targets[k], part);
      } else {
        by_panels(map, p_.targets[k], part);
      }
    }
    finish(part);
  }

 private:
  struct Part {
    int n, c, channels, first, last;
    bool totals, panels;  // whether something stands in total_, in panel_
  };

  const WarpParams& p_;
  int widest_, highest_;  // of the targets
  Scratch scratch_;
  real *pixels_, *line_, *values_;
  Axis<real> x_axis_, x_transposed_, y_axis_, y_transposed_;
  Columns<real> columns_;
  Taps<real> taps_;
  real *quads_, *lines_;
  real *panel_, *total_;

  static int widest(const WarpParams& p) {
    int width = 1;
    for (int k = 0; k < p.views; ++k) width = std::max(width, p.targets[k].width);
    return width;
  }
  static int highest(const WarpParams& p) {
    int height = 1;
    for (int k = 0; k < p.views; ++k) height = std::max(height, p.targets[k].height);
    return height;
  }
  int most_width() const { return std::max(widest_, p_.source.width); }
  int groups() const { return parts(std::min(p_.channels, warp_adjoint_channels), quad); }
  // With a row above and one below, for what the positions at the edge read of the neighbors' rows.
  int64_t panel_size() const { return int64_t{warp_adjoint_rows + 2} * p_.source.width * quad; }
  // (channels, rows, columns)
  int64_t total_size() const {
    if (p_.interleaved || std::is_same_v<T, real>) return 0;  // see total_row
    return int64_t{std::min(p_.channels, warp_adjoint_channels)} * warp_adjoint_rows * p_.source.width;
  }

  // Where what views give to a row is added up: in the gradient itself, if that can hold it.
  real* total_row(const Part& part, int channel, int row) {
    if constexpr (std::is_same_v<T, real>) return gradient_row(part, channel, row);
    return total_ + (int64_t{channel} * warp_adjoint_rows + row) * p_.source.width;
  }
  T* gradient_row(const Part& part, int channel, int row) {
    const Gradient& g = p_.gradient;
    return static_cast<T*>(g.data) + part.n * g.sn + (part.c + channel) * g.sc + (part.first + row) * g.sy;
  }
  const T* image_of(const Map& target, const Part& part) const {
    return static_cast<const T*>(target.data) + part.n * target.sn + part.c * target.sc;
  }

  // What reads rows of a part, transposed; the first row of the target that does.
  int transpose(const core::PixelMap& map, const Map& target, const Part& part) {
    int top = 0, bottom = target.height;
    narrow(map.yj, map.y0, part.first - 1.0, part.last, top, bottom);  // else they read other rows
    sample_rows(y_axis_, map, top, bottom, p_.source.height);
    y_transposed_.transpose(y_axis_, part.first, part.last);
    sample_columns(x_axis_, map, target.width, p_.source.width);
    x_transposed_.transpose(x_axis_, 0, p_.source.width);
    return top;
  }

  void by_rows_of_pixels(const core::PixelMap& map, const Map& target, const Part& part) {
    const int top = transpose(map, target, part);
    const T* image = image_of(target, part) + top * target.sy;
    for (int y = 0; y < part.last - part.first; ++y) {
      T* out = gradient_row(part, 0, y);
      if (y_transposed_.count(y) == 0) {
        for (int x = 0; x < p_.source.width * p_.channels; ++x) store(out[x], real(0));
        continue;
      }
      const auto row = [&](int j) { return image + j * target.sy; };
      combine<T>(y_transposed_, y, row, 0, target.width * p_.channels, pixels_);
      apply_to_pixels<T>(x_transposed_, pixels_, p_.channels, out);
    }
  }

  void by_rows(const core::PixelMap& map, const Map& target, Part& part) {
    const int width = p_.source.width;
    const int top = transpose(map, target, part);
    columns_.lay(x_transposed_, target.width);
    for (int y = 0; y < part.last - part.first; ++y) {
      if (y_transposed_.count(y) == 0) {
        for (int c = 0; c < part.channels && !part.totals; ++c) {
          std::fill(total_row(part, c, y), total_row(part, c, y) + width, real(0));
        }
        continue;
      }
      for (int c = 0; c < part.channels; ++c) {
        const T* plane = image_of(target, part) + top * target.sy + c * target.sc;
        real* total = total_row(part, c, y);
        separable_row<1, T>(
            y_transposed_, y, columns_, [&](int j) { return plane + j * target.sy; }, 0, line_, values_,
            [&](int x, const Pack<16, real>(&v)[1]) EQUIFAST_INLINE {
              with_lanes(0, width - x, [&](auto lanes) EQUIFAST_INLINE {
                Pack<16, real> sum = v[0], before;
                if (part.totals) get(total + x, lanes, before), sum.add(before);
                put(total + x, lanes, sum);
              });
            });
      }
    }
    part.totals = true;
  }

  void by_panels(const core::PixelMap& map, const Map& target, Part& part) {
    const int group_count = parts(part.channels, quad);
    if (!part.panels) {
      std::fill(panel_, panel_ + panel_size() * group_count, real(0));
      part.panels = true;
    }
    const double above = part.first - 1.0, below = part.last;  // positions between read the rows
    const core::Box box =
        core::Preimage(map, target.width, target.height).box({map.left, map.right}, {above, below});
    for (int j = box.top; j < box.bottom; ++j) {
      int begin = box.left, end = box.right;
      narrow(map.yi, map.yj * (j + 0.5) + map.y0, above, below, begin, end);
      inside(map, j, begin, end);
      if (begin == end) continue;
      for (int i = begin; i < end; i += Taps<real>::most) {
        add_piece(map, target, part, j, i, std::min(i + Taps<real>::most, end));
      }
    }
  }

  // Columns [begin, end) of row j of a target, all of them inside the frame.
  void add_piece(const core::PixelMap& map, const Map& target, const Part& part, int j, int begin, int end) {
    const int width = p_.source.width;
    taps_.look(map, j, begin, end, width, p_.source.height);
    // by the taps as they are, so that none lies beyond the panel
    int first = 0, last = end - begin;
    const auto reads = [&](int i) {
      return taps_.top[i] < part.last && taps_.top[i] + taps_.down[i] >= part.first;
    };
    while (first < last && !reads(first)) ++first;
    while (first < last && !reads(last - 1)) --last;
    if (first == last) return;
    taps_.place(end - begin, 0, part.first - 1, quad, quad * width);
    const T* row = image_of(target, part) + j * target.sy + (begin + first) * target.sx;
    for (int c = 0; c < part.channels; c += quad) {
      load_quads(row + c * target.sc, target.sc, target.sx, std::min(part.channels - c, quad), last - first,
                 lines_, quads_);
      taps_.scatter(quads_, first, last, panel_ + c / quad * panel_size());
    }
  }

  // Writes the rows, in the dtype of the images.
  void finish(const Part& part) {
    const Gradient& g = p_.gradient;
    const int width = p_.source.width, stride = rounded(width);
    for (int y = 0; y < part.last - part.first; ++y) {
      for (int c = 0; c < part.channels; c += quad) {
        const int filled = std::min(part.channels - c, quad);
        T* row = gradient_row(part, c, y);
        const real* quads = panel_ + c / quad * panel_size() + int64_t{y + 1} * width * quad;
        if (part.panels && !part.totals) {
          store_quads(quads, filled, width, lines_, row, g.sc, g.sx);
          continue;
        }
        if (part.panels) store_quads(quads, filled, width, lines_, quads_, stride, 1);
        for (int l = 0; l < filled; ++l) {
          const real* total = total_row(part, c + l, y);  // may be the row itself
          const real* panel = quads_ + l * stride;
          T* out = row + l * g.sc;
          if (!part.totals) {
            for (int x = 0; x < width; ++x) store(out[x * g.sx], real(0));
          } else if (part.panels) {
            for (int x = 0; x < width; ++x) store(out[x], total[x] + panel[x]);
          } else if constexpr (!std::is_same_v<T, real>) {
            for (int x = 0; x < width; ++x) store(out[x], total[x]);
          }
        }
      }
    }
  }
};

template <typename T>
void run_warp(const WarpParams& p, int64_t begin, int64_t end) {
  Warp<T> warp(p);
  // Tasks go through the views, their images and their blocks of rows, in this order.
  int64_t task = 0;
  for (int k = 0; k < p.views && task < end; ++k) {
    const int height = p.targets[k].height;
    const int64_t blocks = parts(height, warp_task_rows);
    for (int64_t i = std::max(begin - task, int64_t{0}); i < blocks * p.images && task + i < end; ++i) {
      const int first = static_cast<int>(i % blocks) * warp_task_rows;
      warp.rows(k, static_cast<int>(i / blocks), first, std::min(first + warp_task_rows, height));
    }
    task += blocks * p.images;
  }
}

template <typename T>
void run_adjoint(const WarpParams& p, int64_t begin, int64_t end) {
  Adjoint<T> adjoint(p);
  const int blocks = parts(p.source.height, warp_adjoint_rows);
  const int groups = parts(p.channels, warp_adjoint_channels);
  for (int64_t task = begin; task < end; ++task) {
    const int first = static_cast<int>(task % blocks) * warp_adjoint_rows;
    const int c = static_cast<int>(task / blocks % groups) * warp_adjoint_channels;
    adjoint.rows(static_cast<int>(task / blocks / groups), c, std::min(p.channels - c, warp_adjoint_channels),
                 first, std::min(first + warp_adjoint_rows, p.source.height));
  }
}

}  // namespace

void warp(const WarpParams& p, int64_t begin, int64_t end) {
  dispatch(p.dtype, [&](auto zero) { run_warp<decltype(zero)>(p, begin, end); });
}

void warp_adjoint(const WarpParams& p, int64_t begin, int64_t end) {
  dispatch(p.dtype, [&](auto zero) { run_adjoint<decltype(zero)>(p, begin, end); });
}

}  // namespace equifast::cpu::EQUIFAST_ISA
