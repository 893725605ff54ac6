// Convolutions of 3x3 filters by Winograd's minimal filtering (Lavin and Gray 2016): 36 products for 16
// outputs, where the sum itself takes 144. Compiled once per instruction set.
//
// A task takes some tiles of 4x4 outputs, of whichever images. Of each, the 6x6 inputs are transformed, which
// gives 36 numbers per channel; at each of the 36 places those of all tiles are a matrix that is multiplied
// by the filters'; and what comes out is transformed to the 4x4 outputs. A tile's numbers do not depend on
// what else is in the task.
#include <algorithm>

#include "matrix.h"

namespace equifast::cpu::EQUIFAST_ISA {
namespace {

constexpr int places = 36, inputs = 6, outputs = 4;  // of a tile: products; positions along a side

// The transforms, along one side: of inputs, by the points 0, 1, -1, 2, -2 and infinity, and to outputs.
template <typename real>
EQUIFAST_INLINE inline void transform(const Lanes<real> (&d)[inputs], Lanes<real> (&to)[inputs]) {
  const real two = 2, four = 4, five = 5;
  const Lanes<real> a = d[4] - four * d[2], b = d[3] - four * d[1], c = d[4] - d[2], e = two * (d[3] - d[1]);
  to[0] = four * d[0] - five * d[2] + d[4];
  to[1] = a + b;
  to[2] = a - b;
  to[3] = c + e;
  to[4] = c - e;
  to[5] = four * d[1] - five * d[3] + d[5];
}
template <typename real>
EQUIFAST_INLINE inline void gather(const Lanes<real> (&m)[inputs], Lanes<real> (&to)[outputs]) {
  const real two = 2, four = 4, eight = 8;
  const Lanes<real> a = m[1] + m[2], b = m[1] - m[2], c = m[3] + m[4], e = m[3] - m[4];
  to[0] = m[0] + a + c;
  to[1] = b + two * e;
  to[2] = a + four * c;
  to[3] = b + eight * e + m[5];
}

struct Tile {
  int64_t image;
  int y, x;  // of its first output
};

Tile tile_of(const WinogradParams& p, int64_t number) {
  const int64_t column = number % p.column_tiles, row = number / p.column_tiles;
  return {row / p.row_tiles, p.rows[row % p.row_tiles], p.columns[column]};
}

// Inputs of a tile to `to`: 36 rows of channels, `apart` numbers from one to the next.
template <typename real>
void read_tile(const WinogradParams& p, const Tile& tile, real* to, int64_t apart) {
  constexpr int step = lanes<real>;
  const real* image =
      static_cast<const real*>(p.x) + tile.image * p.height * p.width * static_cast<int64_t>(p.channels);
  const real* from[inputs][inputs];
  for (int i = 0; i < inputs; ++i) {
    const int y = tile.y - p.top + i * p.dilation;
    for (int j = 0; j < inputs; ++j) {
      const int x = tile.x - p.left + j * p.dilation;
      const bool inside = y >= 0 && y < p.height && x >= 0 && x < p.width;
      from[i][j] = inside ? image + (int64_t{y} * p.width + x) * p.channels : nullptr;
    }
  }
  for (int c = 0; c < p.channels; c += step) {
    Lanes<real> half[inputs][inputs];
    for (int j = 0; j < inputs; ++j) {
      Lanes<real> column[inputs], along[inputs];
      for (int i = 0; i < inputs; ++i) {
        column[i] = Lanes<real>{};
        if (from[i][j] != nullptr) get<real>(column[i], from[i][j] + c);
      }
      transform<real>(column, along);
      for (int i = 0; i < inputs; ++i) half[i][j] = along[i];
    }
    for (int i = 0; i < inputs; ++i) {
      Lanes<real> across[inputs];
      transform<real>(half[i], across);
      for (int j = 0; j < inputs; ++j) put<real>(to + (i * inputs + j) * apart + c, across[j]);
    }
  }
}

// Outputs of a tile from channel `first` on, by the products, 36 rows of `channels` of them.
template <typename real>
void write_tile(const WinogradParams& p, const Tile& tile, const real* from, int64_t apart, int first,
                int channels) {
  constexpr int step = lanes<real>;
  const real* bias = static_cast<const real*>(p.bias);
  real* image = static_cast<real*>(p.result) +
                tile.image * p.out_height * p.out_width * static_cast<int64_t>(p.outputs) + first;
  for (int c = 0; c < channels; c += step) {
    Lanes<real> half[outputs][inputs];
    for (int j = 0; j < inputs; ++j) {
      Lanes<real> column[inputs], along[outputs];
      for (int i = 0; i < inputs; ++i) get<real>(column[i], from + (i * inputs + j) * apart + c);
      gather<real>(column, along);
      for (int i = 0; i < outputs; ++i) half[i][j] = along[i];
    }
    Lanes<real> shift{};
    if (bias != nullptr) get<real>(shift, bias + first + c);
    for (int i = 0; i < outputs; ++i) {
      const int y = tile.y + i * p.dilation;
      if (y >= p.out_height) break;
      Lanes<real> across[outputs];
      gather<real>(half[i], across);
      for (int j = 0; j < outputs; ++j) {
        const int x = tile.x + j * p.dilation;
        if (x >= p.out_width) break;
        put<real>(image + (int64_t{y} * p.out_width + x) * p.outputs + c, across[j] + shift);
      }
    }
  }
}

template <typename real>
struct Task {
  const WinogradParams& p;
  int64_t first;  // tile
  int tiles;
  int begin, end;                // channels of the result
  real *transformed, *products;  // (36, tiles, C) and (36, tiles, channels of a panel)
  int64_t transformed_apart, products_apart;

  // The outputs of a panel of so many vectors of channels, from `channel` on. Sums fill the registers.
  template <int vectors>
  void panel(int channel) const {
    constexpr int rows = rows_at_once<vectors>;
    constexpr int wide = vectors * lanes<real>;
    for (int place = 0; place < places; ++place) {
      const int64_t each = int64_t{p.channels} * whole_channels;
      const Filters<real, vectors> filters(static_cast<const real*>(p.filters) + place * each, places * each,
                                           channel);
      const real* from = transformed + place * transformed_apart;
      real* to = products + place * products_apart;
      for (int t = 0; t < tiles; t += rows) {
        Product<real, rows, vectors> product;
        product.zero();
        product.add(from + int64_t{t} * p.channels, p.channels, filters, p.channels);
        product.put(to + int64_t{t} * wide, wide);
      }
    }
    for (int t = 0; t < tiles; ++t) {
      write_tile<real>(p, tile_of(p, first + t), products + int64_t{t} * wide, products_apart, channel, wide);
    }
  }

  void work() const {
    for (int t = 0; t < tiles; ++t) {
      read_tile<real>(p, tile_of(p, first + t), transformed + int64_t{t} * p.channels, transformed_apart);
    }
    // what products of whole rows take beside
    for (int place = 0; place < places; ++place) {
      real* rest = transformed + place * transformed_apart;
      std::fill(rest + int64_t{tiles} * p.channels, rest + int64_t{winograd_tiles} * p.channels, real{0});
    }
    each_panel<real>(begin, end,
                     [this](int channel, auto vectors) { this->template panel<vectors.value>(channel); });
  }
};

template <typename real>
void convolve(const WinogradParams& p, int64_t begin, int64_t end) {
  static_assert(winograd_tiles % whole_rows == 0, "tiles come in whole products");
  // not at a distance of whole pages, which share their places in cache
  const int64_t a_apart = int64_t{winograd_tiles} * p.channels + 16,
                b_apart = winograd_tiles * 4 * lanes<real> + 16;
  Scratch scratch(Scratch::bytes<real>(places * a_apart) + Scratch::bytes<real>(places * b_apart));
  real* transformed = scratch.take<real>(places * a_apart);
  real* products = scratch.take<real>(places * b_apart);
  const int64_t all = int64_t{p.images} * p.row_tiles * p.column_tiles;
  const int groups = parts(p.outputs, p.group);
  for (int64_t number = begin; number < end; ++number) {
    const int64_t first = number / groups * winograd_tiles, left = all - first;
    const int channel = static_cast<int>(number % groups) * p.group;
    const int tiles = static_cast<int>(left < winograd_tiles ? left : winograd_tiles);
    const int last = channel + p.group < p.outputs ? channel + p.group : p.outputs;
    Task<real>{p, first, tiles, channel, last, transformed, products, a_apart, b_apart}.work();
  }
}

}  // namespace

void winograd(const WinogradParams& p, int64_t begin, int64_t end) {
  if (p.dtype == Dtype::float64) return convolve<double>(p, begin, end);
  convolve<float>(p, begin, end);
}

}  // namespace equifast::cpu::EQUIFAST_ISA
