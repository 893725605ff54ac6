// equifast._C: build information, what the machine it runs on can execute, and a check that every call of an
// operator makes. No torch in here, so that `equifast doctor` can report even where an operator library does
// not load.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <sstream>
#include <string>
#include <vector>

#include "core/affine.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define EQUIFAST_X86 1
#include <cpuid.h>
#else
#define EQUIFAST_X86 0
#endif

namespace {

// Splits a list that CMake joined by spaces; "" gives ().
pybind11::tuple words(const std::string& joined) {
  std::istringstream stream(joined);
  std::vector<std::string> found;
  for (std::string word; stream >> word;) found.push_back(word);
  return pybind11::tuple(pybind11::cast(found));
}

#if EQUIFAST_X86

struct Registers {
  std::uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

// Zeros where the processor does not know the leaf or its sub-leaf.
Registers cpuid(std::uint32_t leaf, std::uint32_t subleaf) {
  Registers r;
  if (__get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx) == 0) return {};
  return r;
}

// XCR0: which register files the operating system saves. Only callable where cpuid reports OSXSAVE.
std::uint64_t saved_registers() {
  std::uint32_t low = 0, high = 0;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (std::uint64_t{high} << 32) | low;
}

constexpr bool bit(std::uint32_t word, int position) { return ((word >> position) & 1u) != 0; }

#endif

// cpuid and XCR0 by hand, since __builtin_cpu_supports knows AMX and AVX-512 BF16 only in newer compilers.
std::vector<std::string> instruction_sets() {
  std::vector<std::string> found;
#if EQUIFAST_X86
  const Registers leaf1 = cpuid(1, 0);
  const bool osxsave = bit(leaf1.ecx, 27);
  if (!osxsave) return found;
  const std::uint64_t saved = saved_registers();
  const auto saves = [saved](std::uint64_t mask) { return (saved & mask) == mask; };
  const bool ymm = saves(0x6);        // SSE and AVX state
  const bool zmm = saves(0xe6);       // and opmask, upper ZMM, high ZMM
  const bool tiles = saves(0x60000);  // TILECFG and TILEDATA
  const Registers leaf7 = cpuid(7, 0);
  const Registers leaf7_1 = leaf7.eax >= 1 ? cpuid(7, 1) : Registers{};
  if (ymm && bit(leaf7.ebx, 5)) found.emplace_back("avx2");
  if (ymm && bit(leaf1.ecx, 12)) found.emplace_back("fma");
  if (ymm && bit(leaf1.ecx, 29)) found.emplace_back("f16c");
  if (zmm && bit(leaf7.ebx, 16)) found.emplace_back("avx512f");
  if (zmm && bit(leaf7_1.eax, 5)) found.emplace_back("avx512_bf16");
  if (tiles && bit(leaf7.edx, 22) && bit(leaf7.edx, 24)) found.emplace_back("amx_bf16");
#endif
  return found;
}

// Whether bfloat16 is multiplied faster than float32: by AMX, or by AVX-512 BF16 where its products are as
// many per cycle as the name says. Intel's processors with AMX (those with AVX-512 FP16) have the latter at a
// quarter of that, half of what float32 gets: where a hypervisor hides AMX, float32 is faster.
bool multiplies_bfloat16() {
  const std::vector<std::string> sets = instruction_sets();
  const auto has = [&sets](const char* name) {
    return std::find(sets.begin(), sets.end(), name) != sets.end();
  };
  if (has("amx_bf16") || !has("avx512_bf16")) return has("amx_bf16");
#if EQUIFAST_X86
  const Registers vendor = cpuid(0, 0);
  const bool intel = vendor.ebx == signature_INTEL_ebx && vendor.ecx == signature_INTEL_ecx;
  return !(intel && bit(cpuid(7, 0).edx, 23));
#else
  return true;
#endif
}

// What is wrong with matrices (..., 2, 3), or nothing. In C++, for in numpy it takes a tenth of a millisecond
// when caches are cold, as they are after every kernel.
std::string matrices_problem(const pybind11::array_t<double, pybind11::array::c_style>& matrices) {
  const double *theta = matrices.data(), *end = theta + matrices.size();
  if (!std::all_of(theta, end, [](double value) { return std::isfinite(value); })) return "nonfinite";
  for (int n = 0, count = static_cast<int>(matrices.size() / 6); n < count; ++n) {
    if (!equifast::core::is_invertible(equifast::core::theta_of(theta, count, 0, n))) return "singular";
  }
  return "";
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  namespace py = pybind11;
  const std::string cuda_compiler = EQUIFAST_CUDA_COMPILER;
  m.doc() = "Build information: what this build of equifast was compiled from, by and for.";
  m.attr("version") = EQUIFAST_VERSION;
  m.attr("compiler") = EQUIFAST_COMPILER;
  m.attr("cxx_standard") = EQUIFAST_CXX_STANDARD;
  m.attr("cuda_compiler") =
      cuda_compiler.empty() ? py::object(py::none()) : py::object(py::str(cuda_compiler));
  m.attr("cuda_architectures") = words(EQUIFAST_CUDA_ARCHITECTURES);
  m.attr("operator_libraries") = words(EQUIFAST_OPERATOR_LIBRARIES);
  m.def(
      "instruction_sets", [] { return py::tuple(py::cast(instruction_sets())); },
      "Which of avx2, fma, f16c, avx512f, avx512_bf16, amx_bf16 this machine can run, now.");
  m.def("multiplies_bfloat16", &multiplies_bfloat16,
        "Whether this machine multiplies bfloat16 faster than float32, now.");
  m.def("matrices_problem", &matrices_problem,
        "'nonfinite' or 'singular' where one of the matrices (..., 2, 3) is, else ''.");
}
