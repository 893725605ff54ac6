"""Peak memory of purification relative to one forward and backward of the model.

    python bench/memory.py --output bench/results/memory.json

Each figure comes from a process of its own, in two ways: the peak of the tensors allocated, from the profiler's
record of every allocation (exact, the figure to quote), and the growth of the peak resident set after a warm-up on a
small image (which includes the scratch space of libraries). One forward and backward is that of the frozen model down
to the image, in float32 as the purifier here. The images given are not counted, those returned are.
"""

import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from _models import SegmentationNet
from _write import write_json
from rich.console import Console
from rich.table import Table
from torch import Tensor

import equifast
from equifast.evaluate.cost import peak_memory

MEBIBYTE = 2**20
WARM_UP = (44, 60)


def _task(name: str, model: torch.nn.Module) -> Callable[[Tensor], object]:
    if name == "model":

        def once(x: Tensor) -> None:
            model(x.clone().requires_grad_()).mean().backward()

        return once
    return equifast.Purifier(model, preset=name, dtype="float32")


def _allocated(task: Callable[[Tensor], object], x: Tensor) -> float:
    """Peak of the tensors allocated during the task, in MiB, from the profiler."""
    return peak_memory(lambda: task(x), x.device) / MEBIBYTE


def _resident(task: Callable[[Tensor], object], x: Tensor) -> float:
    """Growth of the peak resident set during the task, in MiB."""
    unit = 1 if sys.platform == "darwin" else 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    task(x)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit / MEBIBYTE


def _measure(name: str, method: str, images: int, height: int, width: int) -> float:
    code = "import sys, memory; memory.child(*sys.argv[1:])"
    arguments = [sys.executable, "-c", code, name, method, str(images), str(height), str(width)]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return float(done.stdout.split()[-1])  # the profiler may print lines of its own


def child(name: str, method: str, images: str, height: str, width: str) -> None:
    """What runs in a process of its own."""
    torch.manual_seed(0)
    model = SegmentationNet(11).eval().requires_grad_(False).to(memory_format=torch.channels_last)
    task = _task(name, model)
    task(torch.rand(1, 3, *WARM_UP))
    x = torch.rand(int(images), 3, int(height), int(width))
    print({"allocated": _allocated, "resident": _resident}[method](task, x))


def main(
    images: Annotated[int, typer.Option(help="Images in the last row.")] = 64,
    height: Annotated[int, typer.Option(help="Height of the image.")] = 360,
    width: Annotated[int, typer.Option(help="Width of the image.")] = 480,
    output: Annotated[Path | None, typer.Option(help="Where the JSON goes.")] = None,
) -> None:
    """Rows: one forward and backward, `fast`, `paper`; peak in MiB and relative to the first row."""
    methods = ("allocated", "resident")
    rows = {"model": ("model", 1), "fast": ("fast", 1), "paper": ("paper", 1)}
    rows |= {f"fast, {many} images": ("fast", many) for many in (2, images)}
    peaks = {row: {m: _measure(name, m, many, height, width) for m in methods} for row, (name, many) in rows.items()}
    returned = images * 3 * height * width * 4 / MEBIBYTE
    table = Table(title=f"peak memory in MiB, {width}x{height} images (times one forward and backward)")
    for heading in ("", "tensors allocated", "resident set"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, peak in peaks.items():
        table.add_row(name, *(f"{peak[m]:.1f} ({peak[m] / peaks['model'][m]:.2f})" for m in methods))
    Console().print(table)
    Console().print(f"{images} images alone: {returned:.1f} MiB")
    if output is not None:
        settings = {"images": images, "height": height, "width": width}
        document = {
            "peak_mib": peaks,
            "images_mib": returned,
            "settings": settings,
        }
        write_json(output, document)


if __name__ == "__main__":
    typer.run(main)
