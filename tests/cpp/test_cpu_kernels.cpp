// The CPU kernels of warp, of similarity with one cosine per image and of convolutions, on random maps and
// tasks: against sums in float64, position by position, and in memory whose every map ends where a page
// begins that may not be touched, or begins where one ends. EQUIFAST_ISA chooses the instruction set.
#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <type_traits>
#include <vector>

#include "core/cosine.h"
#include "core/sample.h"
#include "cpu/kernels.h"
#include "cpu/scratch.h"

namespace {

using namespace equifast;  // a test of all of it
using core::Real;
using cpu::Gradient;
using cpu::Map;

std::mt19937 generator(1);

int any_of(int low, int high) { return std::uniform_int_distribution<int>(low, high)(generator); }
double between(double low, double high) {
  return std::uniform_real_distribution<double>(low, high)(generator);
}

// Bytes between two pages that may not be touched, at one end of what lies between.
class Guarded {
 public:
  explicit Guarded(std::size_t bytes) {
    const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    const std::size_t inner = (bytes + page - 1) / page * page;
    size_ = inner + 2 * page;
    base_ = static_cast<char*>(mmap(nullptr, size_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED || mprotect(base_ + page, inner, PROT_READ | PROT_WRITE) != 0) std::abort();
    data_ = base_ + page + (any_of(0, 1) == 1 ? inner - bytes : 0);
    std::memset(base_ + page, 0xff, inner);  // NaN of every type
  }
  ~Guarded() { munmap(base_, size_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  void* data() const { return data_; }

 private:
  char* base_;
  std::size_t size_;
  char* data_;
};

// (N, C, H, W) of a storage type, NaN at first.
template <typename T>
struct Tensor {
  std::unique_ptr<Guarded> memory;
  Map map;
  int images, channels;

  Tensor(int n, int c, int h, int w, bool interleaved) : images(n), channels(c) {
    memory = std::make_unique<Guarded>(sizeof(T) * std::size_t(n) * c * h * w);
    const std::int64_t pixels = std::int64_t{h} * w;
    map = interleaved ? Map{memory->data(), c * pixels, 1, std::int64_t{w} * c, h, w, c}
                      : Map{memory->data(), c * pixels, pixels, w, h, w, 1};
  }
  Gradient gradient() const { return {memory->data(), map.sn, map.sc, map.sy, map.sx}; }
  T& at(int n, int c, int y, int x) const {
    return static_cast<T*>(memory->data())[n * map.sn + c * map.sc + y * map.sy + x * map.sx];
  }
  double value(int n, int c, int y, int x) const { return double(core::load(at(n, c, y, x))); }
  void draw() {
    each([this](int n, int c, int y, int x) { core::store(at(n, c, y, x), Real<T>(between(-1, 1))); });
  }
  void clear() {
    each([this](int n, int c, int y, int x) { core::store(at(n, c, y, x), Real<T>(0)); });
  }
  template <typename Work>
  void each(const Work& work) const {
    for (int n = 0; n < images; ++n)
      for (int c = 0; c < channels; ++c)
        for (int y = 0; y < map.height; ++y)
          for (int x = 0; x < map.width; ++x) work(n, c, y, x);
  }
};

struct Wide {  // float64, of the same shape
  std::vector<double> values;
  int channels, height, width;
  Wide(int n, int c, int h, int w) : values(std::size_t(n) * c * h * w), channels(c), height(h), width(w) {}
  double& at(int n, int c, int y, int x) {
    return values[((std::size_t(n) * channels + c) * height + y) * width + x];
  }
};

// Any kind of view, those that no one would ask for among them.
std::vector<double> thetas(int count) {
  std::vector<double> all;
  for (int i = 0; i < count; ++i) {
    const double size = any_of(0, 3) == 0 ? std::exp(between(-3.5, 2.5)) : between(0.4, 1.2),
                 angle = between(0, 6.3);
    double a = size, b = 0, c = 0, d = size * between(0.6, 1.5);
    switch (any_of(0, 9)) {
      case 0:
      case 1:
        a = size * std::cos(angle), b = -size * std::sin(angle), c = -b, d = a;
        break;
      case 2:
        b = between(-1, 1);
        break;
      case 3:
        a = -a;
        break;
      case 4:
        d = -d;
        break;
      case 5:
        a = 1, d = 1;
        break;
      case 6:
        if (any_of(0, 3) == 0) a = NAN;
        if (any_of(0, 3) == 0) a = 1e300;
        if (any_of(0, 3) == 0) a = d = 0;
        break;
      default:
        break;
    }
    const double far = any_of(0, 4) == 0 ? 1 : 0.2;
    for (const double v : {a, b, between(-far, far), c, d, between(-far, far)}) all.push_back(v);
  }
  return all;
}

// Calls work(tap x, tap y, weight) on the taps of a position inside the map; false outside.
template <typename Work>
bool taps(const core::PixelMap& map, int i, int j, int height, int width, const Work& work) {
  const core::Position p = map.at(i, j);
  if (!map.inside(p)) return false;
  const auto x = core::tap<double>(p.x, width), y = core::tap<double>(p.y, height);
  work(x.low, y.low, (1 - x.fraction) * (1 - y.fraction)), work(x.high, y.low, x.fraction * (1 - y.fraction));
  work(x.low, y.high, (1 - x.fraction) * y.fraction), work(x.high, y.high, x.fraction * y.fraction);
  return true;
}

// Runs tasks in some pieces, not in their order.
template <typename Params>
void run(void (*kernel)(const Params&, std::int64_t, std::int64_t), const Params& p, std::int64_t tasks) {
  const std::int64_t cut = tasks < 1 ? 0 : any_of(0, static_cast<int>(tasks));
  kernel(p, cut, tasks), kernel(p, 0, cut);
}

int failures = 0;

void check(double error, double bound, const char* what, const char* type, int seed) {
  if (error <= bound) return;  // false for NaN
  ++failures;
  std::fprintf(stderr, "failed: %s, %s, case %d: %g, at most %g\n", what, type, seed, error, bound);
}

template <typename T>
double apart(const Tensor<T>& actual, Wide& expected) {
  double most = 0,
         largest = std::is_same<T, core::Half>::value ? 1e-4 : 1e-12;  // float16 has no small numbers
  actual.each([&](int n, int c, int y, int x) {
    const double error = std::fabs(actual.value(n, c, y, x) - expected.at(n, c, y, x));
    most = error <= most ? most : error;  // NaN stays
    largest = std::fmax(largest, std::fabs(expected.at(n, c, y, x)));
  });
  return most / largest;
}

template <typename T>
void try_similarity(core::Dtype dtype, const char* type, double tolerance, int seed) {
  const bool wide = any_of(0, 9) == 0;  // what scratch memory holds, and what it does not
  const int images = wide ? 1 : any_of(1, 3), channels = any_of(1, wide ? 5 : 26),
            views = any_of(1, wide ? 2 : 4);
  const bool small = !wide && any_of(0, 4) == 0;  // what is taken whole
  const int height = any_of(1, wide ? 8 : (small ? 20 : 60)),
            width = wide ? any_of(300, 2500) : any_of(1, small ? 35 : 100);
  const bool interleaved = any_of(0, 2) == 0;
  Tensor<T> anchor(images, channels, height, width, interleaved);
  Tensor<T> own(images, channels, height, width, interleaved);
  anchor.draw();
  std::vector<Tensor<T>> view, slope;
  std::vector<Map> maps;
  std::vector<Gradient> gradients;
  for (int k = 0; k < views; ++k) {
    const int h = any_of(1, wide ? 16 : (small ? 24 : 90)),
              w = wide ? width * any_of(1, 5) / 2 : any_of(1, small ? 38 : 150);
    view.emplace_back(images, channels, h, w, interleaved);
    slope.emplace_back(images, channels, h, w, interleaved);
    view.back().draw();
    maps.push_back(view.back().map), gradients.push_back(slope.back().gradient());
  }
  const std::vector<double> theta = thetas(views * images);
  std::vector<double> upstream(std::size_t(images) * views), sums(upstream.size() * 3);
  for (double& u : upstream) u = any_of(0, 5) == 0 ? 0 : between(-1, 1);
  cpu::SimilarityParams p{};
  p.dtype = dtype, p.interleaved = interleaved, p.images = images, p.channels = channels, p.views = views;
  p.anchor = anchor.map, p.view = maps.data(), p.theta = theta.data(), p.upstream = upstream.data();
  std::vector<double> partial(upstream.size() * std::size_t(cpu::similarity_blocks(p)) * 3, NAN);
  p.partial = partial.data(), p.sums = sums.data();
  p.anchor_gradient = own.gradient(), p.view_gradient = gradients.data();
  std::vector<double> result(upstream.size());  // of either type
  run(cpu::kernels().similarity, p, cpu::similarity_tasks(p));
  cpu::similarity_finish(p, result.data());
  Wide own_expected(images, channels, height, width);
  if (any_of(0, 2) == 0) {
    p.view_gradient = nullptr;
  } else if (views == 1) {
    own.clear();
  }
  if (views == 1 && p.view_gradient != nullptr && any_of(0, 1) == 0) {
    p.add = true, own.draw();
    own.each([&](int n, int c, int y, int x) { own_expected.at(n, c, y, x) = own.value(n, c, y, x); });
  }
  run(cpu::kernels().similarity_backward, p, cpu::similarity_backward_tasks(p));
  run(cpu::kernels().similarity_backward_level, p, cpu::similarity_backward_level_tasks(p));

  for (int k = 0; k < views; ++k) {
    const int h = maps[std::size_t(k)].height, w = maps[std::size_t(k)].width;
    Wide expected(images, channels, h, w);
    for (int n = 0; n < images; ++n) {
      const core::PixelMap map(core::invert(core::theta_of(theta.data(), images, k, n)), width, height, w, h);
      std::vector<double> f1(static_cast<std::size_t>(channels));
      const auto each_position = [&](const auto& work) {
        for (int j = 0; j < height; ++j) {
          for (int i = 0; i < width; ++i) {
            for (double& v : f1) v = 0;
            const bool inside = taps(map, i, j, h, w, [&](int x, int y, double weight) {
              for (int c = 0; c < channels; ++c) {
                f1[std::size_t(c)] += weight * view[std::size_t(k)].value(n, c, y, x);
              }
            });
            if (inside) work(i, j);
          }
        }
      };
      core::Products<double> total{0, 0, 0};
      each_position([&](int i, int j) {
        for (int c = 0; c < channels; ++c) {
          const double v0 = anchor.value(n, c, j, i), v1 = f1[std::size_t(c)];
          total.inner += v0 * v1, total.square0 += v0 * v0, total.square1 += v1 * v1;
        }
      });
      const std::size_t pair = std::size_t(n) * views + k;
      const double scale = total.square0 + total.square1 + 1e-9;
      check(std::fabs(sums[3 * pair] - total.inner) / scale, 1e-6, "inner product", type, seed);
      check(std::fabs(sums[3 * pair + 1] - total.square0) / scale, 1e-6, "square of the anchor", type, seed);
      check(std::fabs(sums[3 * pair + 2] - total.square1) / scale, 1e-6, "square of the view", type, seed);
      core::Cosine<double> by = core::cosine(total);
      const double u = upstream[pair];
      each_position([&](int i, int j) {
        for (int c = 0; c < channels; ++c) {
          const double v0 = anchor.value(n, c, j, i), v1 = f1[std::size_t(c)];
          own_expected.at(n, c, j, i) += u * (by.cross * v1 - by.own0 * v0);
          const double back = u * (by.cross * v0 - by.own1 * v1);
          taps(map, i, j, h, w,
               [&](int x, int y, double weight) { expected.at(n, c, y, x) += weight * back; });
        }
      });
    }
    if (p.view_gradient != nullptr) {
      check(apart(slope[std::size_t(k)], expected), tolerance, "gradient of a view", type, seed);
    }
  }
  check(apart(own, own_expected), tolerance, "gradient of the anchor", type, seed);
}

template <typename T>
void try_warp(core::Dtype dtype, const char* type, double tolerance, int seed) {
  const int images = any_of(1, 2), channels = any_of(1, 20), views = any_of(1, 3);
  const int height = any_of(1, 90), width = any_of(1, 150);
  const bool interleaved = any_of(0, 1) == 0;
  Tensor<T> source(images, channels, height, width, interleaved);
  Tensor<T> gradient(images, channels, height, width, interleaved);
  source.draw();
  std::vector<Tensor<T>> output, upstream;
  std::vector<Map> outputs, upstreams;
  for (int k = 0; k < views; ++k) {
    const int h = any_of(1, 120), w = any_of(1, 200);
    output.emplace_back(images, channels, h, w, interleaved);
    upstream.emplace_back(images, channels, h, w, interleaved);
    upstream.back().draw();
    outputs.push_back(output.back().map), upstreams.push_back(upstream.back().map);
  }
  const std::vector<double> theta = thetas(views * images);
  cpu::WarpParams p{dtype,      interleaved,  images,         channels, views,
                    source.map, theta.data(), outputs.data(), {}};
  run(cpu::kernels().warp, p, cpu::warp_tasks(p));
  p.targets = upstreams.data(), p.gradient = gradient.gradient();
  run(cpu::kernels().warp_adjoint, p, cpu::warp_adjoint_tasks(p));
  Wide back(images, channels, height, width);
  for (int k = 0; k < views; ++k) {
    const int h = outputs[std::size_t(k)].height, w = outputs[std::size_t(k)].width;
    Wide expected(images, channels, h, w);
    for (int n = 0; n < images; ++n) {
      const core::PixelMap map(core::theta_of(theta.data(), images, k, n), w, h, width, height);
      for (int j = 0; j < h; ++j) {
        for (int i = 0; i < w; ++i) {
          taps(map, i, j, height, width, [&](int x, int y, double weight) {
            for (int c = 0; c < channels; ++c) {
              expected.at(n, c, j, i) += weight * source.value(n, c, y, x);
              back.at(n, c, y, x) += weight * upstream[std::size_t(k)].value(n, c, j, i);
            }
          });
        }
      }
    }
    check(apart(output[std::size_t(k)], expected), tolerance, "warp", type, seed);
  }
  check(apart(gradient, back), tolerance, "adjoint of warp", type, seed);
}

// By the sum itself, of filters that are transformed as equifast/reference.py does.
template <typename T>
void try_winograd(core::Dtype dtype, const char* type, double tolerance, int seed) {
  constexpr double side[6][3] = {{1.0 / 4, 0, 0},
                                 {-1.0 / 6, -1.0 / 6, -1.0 / 6},
                                 {-1.0 / 6, 1.0 / 6, -1.0 / 6},
                                 {1.0 / 24, 1.0 / 12, 1.0 / 6},
                                 {1.0 / 24, -1.0 / 12, 1.0 / 6},
                                 {0, 0, 1}};
  const int images = any_of(1, 3), channels = 16 * any_of(1, 5), outputs = 16 * any_of(1, 5);
  const int height = any_of(1, 24), width = any_of(1, 24), dilation = any_of(1, 3);
  const int least_y = height < 2 * dilation + 1 ? dilation : 0,
            least_x = width < 2 * dilation + 1 ? dilation : 0;
  const int top = any_of(least_y, 2 * dilation), left = any_of(least_x, 2 * dilation);
  const int high = height + 2 * (top - dilation), wide = width + 2 * (left - dilation);
  Tensor<T> x(images, channels, height, width, true), result(images, outputs, high, wide, true);
  Tensor<T> weight(outputs, channels, 3, 3, false), filters(outputs / 16, 36, channels, 16, false),
      bias(1, 1, 1, outputs, false);
  x.draw(), weight.draw(), bias.draw();
  filters.each([&](int group, int place, int c, int lane) {
    const int o = group * 16 + lane;
    double sum = 0;
    for (int i = 0; i < 9; ++i)
      sum += side[place / 6][i / 3] * side[place % 6][i % 3] * weight.value(o, c, i / 3, i % 3);
    filters.at(group, place, c, lane) = T(sum);
  });
  std::vector<int> rows, columns;
  for (auto* tiles : {&rows, &columns}) {
    const int size = tiles == &rows ? high : wide;
    for (int phase = 0; phase < dilation && phase < size; ++phase) {
      for (int first = phase; first < size; first += 4 * dilation) tiles->push_back(first);
    }
  }
  cpu::WinogradParams p{};
  p.dtype = dtype, p.images = images, p.channels = channels, p.outputs = outputs;
  p.height = height, p.width = width, p.out_height = high, p.out_width = wide;
  p.dilation = dilation, p.top = top, p.left = left;
  p.x = x.map.data, p.filters = filters.map.data, p.bias = any_of(0, 1) == 0 ? nullptr : bias.map.data;
  p.result = result.memory->data();
  p.rows = rows.data(), p.columns = columns.data();
  p.row_tiles = static_cast<int>(rows.size()), p.column_tiles = static_cast<int>(columns.size());
  p.group = 16 * any_of(1, 6);
  run(cpu::kernels().winograd, p, cpu::winograd_tasks(p));
  Wide expected(images, outputs, high, wide);
  result.each([&](int n, int o, int y, int x_) {
    double sum = p.bias == nullptr ? 0 : bias.value(0, 0, 0, o);
    for (int i = 0; i < 9; ++i) {
      const int from_y = y - top + i / 3 * dilation, from_x = x_ - left + i % 3 * dilation;
      if (from_y < 0 || from_y >= height || from_x < 0 || from_x >= width) continue;
      for (int c = 0; c < channels; ++c)
        sum += x.value(n, c, from_y, from_x) * weight.value(o, c, i / 3, i % 3);
    }
    expected.at(n, o, y, x_) = sum;
  });
  check(apart(result, expected), tolerance, "convolution", type, seed);
}

// By the sum itself: each number of x times the weights, to where they come from.
template <typename T>
void try_conv_transpose(core::Dtype dtype, const char* type, double tolerance, int seed) {
  const int images = any_of(1, 2), channels = any_of(1, 40),
            outputs = any_of(1, 3) == 1 ? any_of(1, 4) : any_of(5, 70);
  const int stride = any_of(1, 4), high = any_of(1, 5), wide = any_of(1, 5);
  const int top = any_of(0, 4), left = any_of(0, 4);
  const int height = any_of(1, 30) + high, width = any_of(1, 60) + wide;
  const int h = (height + 2 * top - high) / stride + 1, w = (width + 2 * left - wide) / stride + 1;
  const int block = any_of(0, 1) == 0 ? 1 : stride;
  const int kernel_height = (high + block - 1) / block, kernel_width = (wide + block - 1) / block;
  const int padded = (outputs * block * block + 15) / 16 * 16;
  Tensor<T> x(images, channels, h, w, true), result(images, outputs, height, width, true);
  Tensor<T> weight(channels, outputs, high, wide, false);
  Tensor<T> filters(padded / 16, kernel_height * kernel_width, channels, 16, false);
  x.draw(), weight.draw(), filters.draw();  // those beyond the channels too
  weight.each([&](int o, int c, int i, int j) {
    const int place = ((i % block) * block + j % block) * outputs + c;
    filters.at(place / 16, i / block * kernel_width + j / block, o, place % 16) = weight.at(o, c, i, j);
  });
  filters.each([&](int group, int tap, int o, int lane) {
    const int place = group * 16 + lane, a = place / outputs / block, b = place / outputs % block;
    const int i = tap / kernel_width * block + a, j = tap % kernel_width * block + b;
    if (a < block && (i >= high || j >= wide)) core::store(filters.at(group, tap, o, lane), T(0));
  });
  cpu::ConvTransposeParams p{};
  p.dtype = dtype, p.images = images, p.channels = channels, p.outputs = outputs, p.padded = padded;
  p.height = h, p.width = w, p.out_height = height, p.out_width = width;
  p.stride = stride / block, p.kernel_height = kernel_height, p.kernel_width = kernel_width;
  p.top = top, p.left = left, p.block = block;
  p.x = x.map.data, p.filters = filters.map.data, p.result = result.memory->data();
  p.rows = any_of(1, 9), p.group = 16 * any_of(1, 4);
  run(cpu::kernels().conv_transpose, p, cpu::conv_transpose_tasks(p));
  Wide expected(images, outputs, height, width);
  x.each([&](int n, int o, int i, int j) {
    const double value = x.value(n, o, i, j);
    for (int k = 0; k < high * wide; ++k) {
      const int y = i * stride - top + k / wide, x_ = j * stride - left + k % wide;
      if (y < 0 || y >= height || x_ < 0 || x_ >= width) continue;
      for (int c = 0; c < outputs; ++c)
        expected.at(n, c, y, x_) += value * weight.value(o, c, k / wide, k % wide);
    }
  });
  check(apart(result, expected), tolerance, "transposed convolution", type, seed);
}

// Arrays of scratch memory begin where cache lines do, of whatever size they are.
void try_scratch() {
  for (const std::int64_t count : {1, 3, 100, 5000, 300000}) {
    cpu::Scratch scratch(2 * cpu::Scratch::bytes<float>(count));
    for (int i = 0; i < 2; ++i) {
      const auto address = reinterpret_cast<std::uintptr_t>(scratch.take<float>(count));
      check(double(address % 64), 0, "place of scratch memory", "float32", i);
    }
  }
}

}  // namespace

int main() {
  constexpr int cases = 150;
  const char* wish = std::getenv("EQUIFAST_ISA");
  if (wish != nullptr && std::strcmp(wish, cpu::kernels().name) != 0) {
    std::printf("left out: this CPU has no %s\n", wish);
    return 77;  // as CMakeLists.txt knows
  }
  try_scratch();
  for (int i = 0; i < cases; ++i) {
    generator.seed(static_cast<unsigned>(i));
    try_similarity<float>(core::Dtype::float32, "float32", 2e-5, i);
    try_similarity<double>(core::Dtype::float64, "float64", 1e-11, i);
    try_similarity<core::Half>(core::Dtype::float16, "float16", 2e-3, i);
    try_similarity<core::BFloat16>(core::Dtype::bfloat16, "bfloat16", 2e-2, i);
    try_warp<float>(core::Dtype::float32, "float32", 2e-5, i);
    try_warp<double>(core::Dtype::float64, "float64", 1e-11, i);
    try_warp<core::Half>(core::Dtype::float16, "float16", 2e-3, i);
    try_warp<core::BFloat16>(core::Dtype::bfloat16, "bfloat16", 2e-2, i);
    try_winograd<float>(core::Dtype::float32, "float32", 2e-5, i);
    try_winograd<double>(core::Dtype::float64, "float64", 1e-12, i);
    try_conv_transpose<float>(core::Dtype::float32, "float32", 1e-5, i);
    try_conv_transpose<double>(core::Dtype::float64, "float64", 1e-13, i);
  }
  std::printf("%s: %d cases of each type, %d failures\n", cpu::kernels().name, cases, failures);
  return failures == 0 ? 0 : 1;
}
