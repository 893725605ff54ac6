// Which instruction set's kernels run here.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

#ifndef EQUIFAST_X86
#define EQUIFAST_X86 0
#endif

#define EQUIFAST_DECLARE(isa)                                                            \
  namespace isa {                                                                        \
  void warp(const WarpParams& p, int64_t begin, int64_t end);                            \
  void warp_adjoint(const WarpParams& p, int64_t begin, int64_t end);                    \
  void similarity(const SimilarityParams& p, int64_t begin, int64_t end);                \
  void similarity_backward(const SimilarityParams& p, int64_t begin, int64_t end);       \
  void similarity_backward_level(const SimilarityParams& p, int64_t begin, int64_t end); \
  void similarity_pixel(const SimilarityParams& p, int64_t begin, int64_t end);          \
  void similarity_pixel_backward(const SimilarityParams& p, int64_t begin, int64_t end); \
  void pairs_squares(const PairsParams& p, int64_t begin, int64_t end);                  \
  void pairs_total(const PairsParams& p, int64_t begin, int64_t end);                    \
  void pairs_gradient(const PairsParams& p, int64_t begin, int64_t end);                 \
  void step_largest(const StepParams& p, int64_t begin, int64_t end);                    \
  void step_squares(const StepParams& p, int64_t begin, int64_t end);                    \
  void step_move(const StepParams& p, int64_t begin, int64_t end);                       \
  void color_jitter_gray(const ColorJitterParams& p, int64_t begin, int64_t end);        \
  void color_jitter(const ColorJitterParams& p, int64_t begin, int64_t end);             \
  void color_jitter_backward(const ColorJitterParams& p, int64_t begin, int64_t end);    \
  void color_jitter_add_mean(const ColorJitterParams& p, int64_t begin, int64_t end);    \
  void turn_filters(const FiltersParams& p, int64_t begin, int64_t end);                 \
  void turn_filters_adjoint(const FiltersParams& p, int64_t begin, int64_t end);         \
  void winograd(const WinogradParams& p, int64_t begin, int64_t end);                    \
  void conv_transpose(const ConvTransposeParams& p, int64_t begin, int64_t end);         \
  constexpr Kernels table{#isa,                                                          \
                          warp,                                                          \
                          warp_adjoint,                                                  \
                          similarity,                                                    \
                          similarity_backward,                                           \
                          similarity_backward_level,                                     \
                          similarity_pixel,                                              \
                          similarity_pixel_backward,                                     \
                          pairs_squares,                                                 \
                          pairs_total,                                                   \
                          pairs_gradient,                                                \
                          step_largest,                                                  \
                          step_squares,                                                  \
                          step_move,                                                     \
                          color_jitter_gray,                                             \
                          color_jitter,                                                  \
                          color_jitter_backward,                                         \
                          color_jitter_add_mean,                                         \
                          turn_filters,                                                  \
                          turn_filters_adjoint,                                          \
                          winograd,                                                      \
                          conv_transpose};                                               \
  }

namespace equifast::cpu {

EQUIFAST_DECLARE(baseline)
#if EQUIFAST_X86
EQUIFAST_DECLARE(avx2)
EQUIFAST_DECLARE(avx512)
#endif

const Kernels& kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
    const char* wish = std::getenv("EQUIFAST_ISA");
    const bool any = wish == nullptr || *wish == '\0';
#if EQUIFAST_X86
    __builtin_cpu_init();
    const bool can_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool can_avx512 = can_avx2 && __builtin_cpu_supports("avx512f") &&
                            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq");
    if (can_avx512 && (any || std::strcmp(wish, "avx512") == 0)) return avx512::table;
    if (can_avx2 && (any || std::strcmp(wish, "baseline") != 0)) return avx2::table;
#endif
    (void)any;
    return baseline::table;
  }();
  return chosen;
}

}  // namespace equifast::cpu
