// Scratch memory of CPU kernels. Included by those that are compiled once per instruction set, hence the
// unnamed namespace.
#pragma once

#include <cstdint>
#include <cstdlib>

namespace equifast::cpu {
namespace {

// Scratch of one thread, cut into arrays.
class Scratch {
 public:
  explicit Scratch(int64_t size)
      : base_(static_cast<char*>(std::aligned_alloc(line, static_cast<std::size_t>(bytes<char>(size))))),
        size_(size) {
    if (base_ == nullptr) std::abort();
  }
  ~Scratch() { std::free(base_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  // Everything that was taken is given back.
  Scratch& clear() {
    used_ = 0;
    return *this;
  }
  template <typename T>
  T* take(int64_t count) {
    T* array = reinterpret_cast<T*>(base_ + used_);
    used_ += bytes<T>(count);
    if (used_ > size_) std::abort();  // whoever asked for it counted wrong
    return array;
  }
  template <typename T>
  static constexpr int64_t bytes(int64_t count) {
    return (count * static_cast<int64_t>(sizeof(T)) + line - 1) / line * line;
  }

 private:
  // What memory is cached by. Vectors that lie across two lines take twice as long.
  static constexpr int64_t line = 64;
  char* base_;
  int64_t size_, used_ = 0;
};

}  // namespace
}  // namespace equifast::cpu
