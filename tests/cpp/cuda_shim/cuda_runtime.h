// Stands in for CUDA's header of this name, so that a host compiler compiles the very same kernel source and
// the kernels run without a GPU. The threads of a block are fibers of one host thread: one runs until it
// waits at a barrier or for its warp. Which thread and which block runs first is for a test to vary, with
// equifast_shim::shuffle: a missing barrier, or shared memory that is read before it is written, then changes
// results. A barrier that not all threads reach ends the program.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <utility>
#include <vector>

// AddressSanitizer wants to be told when the stack changes.
#ifdef __SANITIZE_ADDRESS__
#define EQUIFAST_SHIM_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define EQUIFAST_SHIM_ASAN 1
#endif
#endif
#ifdef EQUIFAST_SHIM_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
inline void __sanitizer_start_switch_fiber(void**, const void*, std::size_t) {}
inline void __sanitizer_finish_switch_fiber(void*, const void**, std::size_t*) {}
inline void __asan_unpoison_memory_region(const volatile void*, std::size_t) {}
#endif

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static  // one block runs at a time

struct uint3 {
  unsigned x, y, z;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
};

// Of the thread that runs.
inline uint3 threadIdx, blockIdx;

namespace equifast_shim {

// Of a stack, of which AddressSanitizer clears all that it knows at every switch: more takes longer. Below it
// lies memory that nobody may touch.
constexpr std::size_t stack_bytes = 64 * 1024, guard_bytes = 64 * 1024;
constexpr int warp_size = 32;

struct Fiber {
  ucontext_t context;
  char* stack;
  void* fake_stack;    // AddressSanitizer's
  const int* barrier;  // what it waits for: this to pass ...
  int generation;      // ... this
  bool finished;
};

// Lanes of a warp hand values to each other; two buffers, since no lane is more than one exchange ahead.
struct Warp {
  int arrived, generation;
  std::uint64_t value[2][warp_size];
};

struct Machine {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<unsigned> order;
  std::function<void()> kernel;
  ucontext_t scheduler;
  void* fake_stack;
  const void* stack;  // the scheduler's
  std::size_t stack_size;
  unsigned current;
  int arrived, generation;  // at the block's barrier
  std::mt19937 random;
};

inline Machine machine;

[[noreturn]] inline void stop(const char* why) {
  std::fprintf(stderr, "cuda_shim: %s\n", why);
  std::abort();
}

// Another order of blocks and threads for the launches to come.
inline void shuffle(unsigned seed) { machine.random.seed(seed); }

inline void enter() {
  Machine& m = machine;
  __sanitizer_finish_switch_fiber(nullptr, &m.stack, &m.stack_size);
  m.kernel();
  Fiber& self = m.fibers[m.current];
  self.finished = true;
  __sanitizer_start_switch_fiber(nullptr, m.stack, m.stack_size);  // this stack is not used again
  swapcontext(&self.context, &m.scheduler);
}

// Until the barrier's generation is no longer the one given.
inline void wait(const int& barrier, int generation) {
  Machine& m = machine;
  Fiber& self = m.fibers[m.current];
  self.barrier = &barrier, self.generation = generation;
  __sanitizer_start_switch_fiber(&self.fake_stack, m.stack, m.stack_size);
  swapcontext(&self.context, &m.scheduler);
  __sanitizer_finish_switch_fiber(self.fake_stack, &m.stack, &m.stack_size);
}

inline void resume(unsigned thread) {
  Machine& m = machine;
  Fiber& fiber = m.fibers[thread];
  m.current = thread;
  threadIdx.x = thread;
  fiber.barrier = nullptr;
  __sanitizer_start_switch_fiber(&m.fake_stack, fiber.stack, stack_bytes);
  swapcontext(&m.scheduler, &fiber.context);
  __sanitizer_finish_switch_fiber(m.fake_stack, nullptr, nullptr);
}

inline void run_block() {
  Machine& m = machine;
  const auto threads = static_cast<unsigned>(m.fibers.size());
  m.arrived = 0;
  for (Warp& warp : m.warps) warp.arrived = 0;
  for (Fiber& fiber : m.fibers) {
    fiber.finished = false, fiber.barrier = nullptr;
    __asan_unpoison_memory_region(fiber.stack, stack_bytes);  // what the thread before has left
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack;
    fiber.context.uc_stack.ss_size = stack_bytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
  }
  for (unsigned finished = 0; finished < threads;) {
    bool moved = false;
    for (unsigned i = 0; i < threads; ++i) {
      Fiber& fiber = m.fibers[m.order[i]];
      if (fiber.finished || (fiber.barrier != nullptr && *fiber.barrier == fiber.generation)) continue;
      resume(m.order[i]);
      moved = true;
      if (fiber.finished) ++finished;
    }
    if (!moved) stop("threads wait at a barrier that others have left out");
  }
  if (m.arrived != 0) stop("threads left a block while others waited at a barrier");
}

template <typename T>
std::vector<T> shuffled(std::size_t count) {
  std::vector<T> order(count);
  for (std::size_t i = 0; i < count; ++i) order[i] = static_cast<T>(i);
  for (std::size_t i = count; i > 1; --i) std::swap(order[i - 1], order[machine.random() % i]);
  return order;
}

inline void run_grid(unsigned blocks, unsigned threads, std::function<void()> kernel) {
  Machine& m = machine;
  while (m.fibers.size() < threads) {
    Fiber fiber{};
    void* memory = mmap(nullptr, guard_bytes + stack_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) stop("no memory for the stack of a thread");
    fiber.stack = static_cast<char*>(memory) + guard_bytes;
    if (mprotect(fiber.stack, stack_bytes, PROT_READ | PROT_WRITE) != 0)
      stop("no memory for the stack of a thread");
    m.fibers.push_back(fiber);
  }
  m.fibers.resize(threads);
  m.warps.resize(threads / warp_size);
  m.kernel = std::move(kernel);
  m.order = shuffled<unsigned>(threads);
  for (const unsigned block : shuffled<unsigned>(blocks)) {
    blockIdx.x = block;
    run_block();
  }
}

// Every lane of a warp gives a value; `lane` is whose it gets.
inline std::uint64_t exchange(std::uint64_t value, int lane) {
  Machine& m = machine;
  Warp& warp = m.warps[m.current / warp_size];
  const int generation = warp.generation;
  std::uint64_t* values = warp.value[generation & 1];
  values[m.current % warp_size] = value;
  if (++warp.arrived == warp_size) {
    warp.arrived = 0;
    ++warp.generation;
  } else {
    wait(warp.generation, generation);
  }
  return values[lane];
}

inline int lane() { return static_cast<int>(machine.current) % warp_size; }

}  // namespace equifast_shim

inline void __syncthreads() {
  auto& m = equifast_shim::machine;
  const int generation = m.generation;
  if (++m.arrived == static_cast<int>(m.fibers.size())) {
    m.arrived = 0;
    ++m.generation;
  } else {
    equifast_shim::wait(m.generation, generation);
  }
}

// The whole warp takes part: `mask` is that of all lanes.
template <typename T>
T __shfl_down_sync(unsigned mask, T value, int distance) {
  if (mask != 0xffffffffu) equifast_shim::stop("only whole warps exchange values");
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  const int from = equifast_shim::lane() + distance;
  bits = equifast_shim::exchange(bits, from < equifast_shim::warp_size ? from : equifast_shim::lane());
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

inline int __any_sync(unsigned mask, int predicate) {
  int any = predicate != 0;
  for (int distance = 1; distance < equifast_shim::warp_size; distance *= 2) {
    // a ring, so that every lane hears of all
    if (mask != 0xffffffffu) equifast_shim::stop("only whole warps exchange values");
    any |= equifast_shim::exchange(static_cast<std::uint64_t>(any),
                                   (equifast_shim::lane() + distance) % equifast_shim::warp_size) != 0;
  }
  return any;
}

template <typename T>
T __ldg(const T* from) {
  return *from;
}

template <typename Params>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params),
                               const Params& params) {
  equifast_shim::run_grid(config->gridDim.x, config->blockDim.x, [&] { kernel(params); });
  return cudaSuccess;
}
