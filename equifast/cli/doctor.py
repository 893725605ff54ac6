"""``equifast doctor``."""

import os
import platform
from importlib import metadata

import torch
from rich.table import Table

from equifast import _C, __version__, ops
from equifast._cheap import has_fast_bfloat16
from equifast.cli._common import app, stdout

__all__ = ["doctor"]


@app.command()
def doctor() -> None:
    """Show versions, backends built and usable, GPU, threads and instruction sets."""
    table = Table(show_header=False, box=None)
    table.add_column(style="bold")
    table.add_column()
    sets = _C.instruction_sets()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen, kernels = ops.backend(), ops.instruction_set()
    rows = {
        "equifast": __version__
        + ("" if _C.version == __version__ else f" (compiled part is {_C.version}: build again)"),
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})",
        **{name: _installed(name) for name in ("torchvision", "timm", "triton", "numpy")},
        "backend": f"{chosen}: {chosen.reason}" + (f" ({kernels} kernels)" if chosen == "native" else ""),
        **({"backend on CUDA": _on_cuda()} if torch.cuda.is_available() else {}),
        "operator libraries": ", ".join(_C.operator_libraries) or "none",
        "compiled by": f"{_C.compiler}, C++{_C.cxx_standard}; CUDA compiler: {_C.cuda_compiler or 'none found'}",
        "GPU": _gpu(),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} processors",
        "instruction sets": ", ".join(sets) or "none beyond the baseline",
        "dtype='auto'": f"{'bfloat16' if has_fast_bfloat16(device) else 'float32'} on {device.type}",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    stdout.print(table, highlight=False)


def _installed(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _on_cuda() -> str:
    chosen = ops.choose(torch.device("cuda"))
    architectures = ", ".join(f"sm_{architecture}" for architecture in _C.cuda_architectures)
    return f"{chosen}: {chosen.reason}" + (f" (kernels for {architectures})" if chosen == "native" else "")


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none usable"
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()} (sm_{major}{minor})"
