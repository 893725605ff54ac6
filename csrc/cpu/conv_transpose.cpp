// Transposed convolutions: gradients of strided ones. Compiled once per instruction set.
//
// Every stride-th pixel of a row reads its neighbors in x by the same weights, and those of the next pixel of
// them are the next ones: a product of matrices, whose rows are where x has them, beside zeros. Of few
// channels, which would leave most of a register empty, all pixels of a block of stride x stride are computed
// at once, by the neighbors that any of them has.
#include <algorithm>

#include "matrix.h"

namespace equifast::cpu::EQUIFAST_ISA {
namespace {

// Rounded down, of a divisor above 0.
int floor_of(int a, int b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }

template <typename real>
class Rows {
 public:
  explicit Rows(const ConvTransposeParams& params)
      : p(params),
        before_y(blocks_before(p.top, p.block)),
        before_x(blocks_before(p.left, p.block)),
        width(blocks_along(p.out_width, p.left, p.block)),
        first_column(std::min(0, floor_of(before_x - p.kernel_width + 1, p.stride))),
        // beyond the last that is read, those of rows that complete a product
        columns(std::max(p.width, (width - 1 + before_x) / p.stride + 1) + most_rows - first_column),
        size(row_size() * ((p.rows + p.kernel_height) / p.stride + 2)),
        scratch(Scratch::bytes<real>(size) + Scratch::bytes<Tap>(int64_t{p.kernel_height} * p.kernel_width)),
        padded(scratch.template take<real>(size)),
        taps(scratch.template take<Tap>(int64_t{p.kernel_height} * p.kernel_width)) {
    std::fill_n(padded, size, real{0});
  }

  // Rows [top, bottom) of blocks of an image's result, channels [first, last) of filters.
  void work(int64_t image, int top, int bottom, int first, int last) {
    const int low = std::max(0, floor_of(top + before_y - p.kernel_height + 1, p.stride)),
              high = std::min(p.height - 1, (bottom - 1 + before_y) / p.stride);
    const real* from =
        static_cast<const real*>(p.x) + image * p.height * p.width * static_cast<int64_t>(p.channels);
    const int64_t row = int64_t{p.width} * p.channels;
    for (int i = low; i <= high; ++i) {
      std::copy_n(from + i * row, row, padded + (i - low) * row_size() - int64_t{first_column} * p.channels);
    }
    // all rows by the same filters, which stay in cache
    each_panel<real>(first, last, [&](int channel, auto vectors) {
      for (int y = top; y < bottom; ++y) {
        for (int phase = 0; phase < p.stride && phase < width; ++phase) {
          const int count = find_taps(y, phase, low, high);
          row_of_blocks<vectors.value>(image, y, phase, count, channel);
        }
      }
    });
  }

 private:
  struct Tap {
    const real *from, *filter;  // of the first block: (O), and (O, 16), of the first channels
  };

  const ConvTransposeParams& p;
  int before_y, before_x, width;  // blocks
  int first_column, columns;      // of padded rows
  int64_t size;                   // of all of them
  Scratch scratch;
  real* padded;
  Tap* taps;

  int64_t row_size() const { return int64_t{columns} * p.channels; }

  // What blocks `phase`, `phase` + stride, ... of row y read, of rows [low, high] of x.
  int find_taps(int y, int phase, int low, int high) {
    int count = 0;
    for (int ky = 0; ky < p.kernel_height; ++ky) {
      const int row = y + before_y - ky, i = floor_of(row, p.stride);
      if (i * p.stride != row || i < low || i > high) continue;
      for (int kx = 0; kx < p.kernel_width; ++kx) {
        const int column = phase + before_x - kx, j = floor_of(column, p.stride);
        if (j * p.stride != column) continue;
        const int64_t place = int64_t{ky} * p.kernel_width + kx;
        taps[count++] = {padded + (i - low) * row_size() + int64_t{j - first_column} * p.channels,
                         static_cast<const real*>(p.filters) + place * p.channels * whole_channels};
      }
    }
    return count;
  }

  // Blocks `phase`, `phase` + stride, ... of row y, of a panel of channels.
  template <int vectors>
  void row_of_blocks(int64_t image, int y, int phase, int tap_count, int channel) const {
    constexpr int rows = rows_at_once<vectors>, wide = vectors * lanes<real>;
    const int count = parts(width - phase, p.stride);
    const int64_t apart = int64_t{p.kernel_height} * p.kernel_width * p.channels * whole_channels;
    for (int first = 0; first < count; first += rows) {
      Product<real, rows, vectors> product;
      product.zero();
      for (int t = 0; t < tap_count; ++t) {
        product.add(taps[t].from + int64_t{first} * p.channels, p.channels,
                    Filters<real, vectors>(taps[t].filter, apart, channel), p.channels);
      }
      const int here = std::min(rows, count - first), x = phase + first * p.stride;
      if (p.block == 1 && here == rows && channel + wide <= p.outputs) {
        product.put(pixel(image, y, x) + channel, int64_t{p.stride} * p.outputs);
        continue;
      }
      real sums[rows * wide];
      product.put(sums, wide);
      if (p.block > 1) {
        write_blocks(image, y, x, here, sums, channel, wide);
        continue;
      }
      const int kept = std::min(wide, p.outputs - channel);
      for (int r = 0; kept > 0 && r < here; ++r) {
        std::copy_n(sums + r * wide, kept, pixel(image, y, x + r * p.stride) + channel);
      }
    }
  }

  // Channels [begin, begin + wide) of neighboring blocks: of each (block, block, C), of which pixels outside
  // the result are left out.
  void write_blocks(int64_t image, int y, int x, int count, const real* sums, int begin, int wide) const {
    const int line = p.block * p.outputs;  // numbers
    const int above = (y + before_y) * p.block - p.top, left = (x + before_x) * p.block - p.left;
    for (int a = std::max(0, -above); a < p.block && above + a < p.out_height; ++a) {
      const int from = std::max(a * line, begin), to = std::min((a + 1) * line, begin + wide);
      if (from >= to) continue;
      real* row = pixel(image, above + a, 0);
      const int first = left * p.outputs + from - a * line,
                end = p.out_width * p.outputs;  // numbers of the row
      for (int r = 0; r < count; ++r) {
        const real* given = sums + r * wide + from - begin;
        const int place = first + r * line;
        if (place >= 0 && place + to - from <= end) {
          for (int k = 0; k < to - from; ++k) row[place + k] = given[k];
        } else {
          for (int k = std::max(0, -place); k < to - from && place + k < end; ++k) row[place + k] = given[k];
        }
      }
    }
  }

  real* pixel(int64_t image, int y, int x) const {
    return static_cast<real*>(p.result) +
           ((image * p.out_height + y) * p.out_width + x) * static_cast<int64_t>(p.outputs);
  }
};

template <typename real>
void transpose(const ConvTransposeParams& p, int64_t begin, int64_t end) {
  Rows<real> rows(p);
  const int height = blocks_along(p.out_height, p.top, p.block), bands = parts(height, p.rows);
  const int64_t together = int64_t{p.images} * bands;
  for (int64_t task = begin; task < end; ++task) {
    const int first = static_cast<int>(task / together) * p.group,
              top = static_cast<int>(task % bands) * p.rows;
    rows.work(task % together / bands, top, std::min(top + p.rows, height), first,
              std::min(first + p.group, p.padded));
  }
}

}  // namespace

void conv_transpose(const ConvTransposeParams& p, int64_t begin, int64_t end) {
  if (p.dtype == Dtype::float64) return transpose<double>(p, begin, end);
  transpose<float>(p, begin, end);
}

}  // namespace equifast::cpu::EQUIFAST_ISA
