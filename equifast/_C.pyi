"""Build information: what this build of equifast was compiled from, by and for."""

from typing import Any

from numpy.typing import NDArray

version: str
"""Version of the sources that were compiled; equals `equifast.__version__` unless the build is stale."""

compiler: str
"""Name and version of the C++ compiler, such as `"GNU 12.2.0"`."""

cxx_standard: int
"""C++ standard, such as `17`."""

cuda_compiler: str | None
"""Name and version of the CUDA compiler, or `None` where none was usable at build time."""

cuda_architectures: tuple[str, ...]
"""Architectures that CUDA kernels were compiled for, such as `("80", "90")`; empty without kernels."""

operator_libraries: tuple[str, ...]
"""Operator libraries built beside this module, by stem: a subset of `("_ops", "_ops_cuda")`."""

def instruction_sets() -> tuple[str, ...]:
    """Which of avx2, fma, f16c, avx512f, avx512_bf16, amx_bf16 this machine can run, now.

    Counts an extension only where the processor has it and the operating system saves its registers.
    """

def multiplies_bfloat16() -> bool:
    """Whether this machine multiplies bfloat16 faster than float32, now.

    By AMX, or by AVX-512 BF16; not where Intel's processors with AMX have the latter alone, as under a hypervisor that
    hides AMX: there it is half as fast as float32.
    """

def matrices_problem(matrices: NDArray[Any]) -> str:
    """'nonfinite' or 'singular' where one of the matrices (..., 2, 3) is, else ''."""
