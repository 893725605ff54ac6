"""Purification on a CUDA device: the presets beside the published algorithm, captured as graphs and not.

    python bench/bench_gpu.py --output bench/results/gpu.json

One image of the CamVid study's size with its network, and one of 680x340 with a network of the size of a DRN-D-22 (20
million parameters), of which the weights are random: they do not matter to the time. All take turns in one process,
after untimed calls of their own; figures are medians. A row that fails is named and left out, and so is one that says
"captured" and was not. Of the published algorithm two of its twenty steps are timed and
counted ten times. "Captured" draws sizes from a palette of four sets, and so does what stands beside it.
"""

import copy
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from _models import SegmentationNet
from _published import Published
from _write import write_json
from rich.console import Console
from rich.table import Table
from torch import Tensor

import equifast
from equifast.models import first_line

CASES = {"CamVid, 240x176": (11, (32, 48, 64, 96), 176, 240), "680x340": (19, (64, 128, 256, 512), 340, 680)}
EPS = 6 / 255
PALETTE = 4


def rows(model: torch.nn.Module) -> dict[str, Callable[[Tensor], object]]:
    """What is timed, by name."""
    trained = copy.deepcopy(model).requires_grad_(True)  # the published code gives parameters gradients
    made: dict[str, Callable[[Tensor], object]] = {"published, two of 20 steps": Published(trained, EPS, 0, steps=2)}
    for preset in ("paper", "fast", "strong"):
        for capture in (False, True):
            name = f"{preset}, captured" if capture else preset
            made[name] = equifast.Purifier(model, preset=preset, eps=EPS, palette=PALETTE, capture=capture)
    made["fast, compiled"] = equifast.Purifier(model, eps=EPS, palette=PALETTE, compile=True)
    return made


def seconds(task: Callable[[Tensor], object], x: Tensor) -> float:
    """Of one call, with what it started on the device."""
    if x.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    task(x)
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def warmed(tasks: dict[str, Callable[[Tensor], object]], x: Tensor) -> dict[str, Callable[[Tensor], object]]:
    """Those that can be timed, after a call of each: all calls have the same draw, and so the same graphs."""
    found = {}
    for row, task in tasks.items():
        try:
            seconds(task, x)
            capture = getattr(task, "_capture", None)
            if capture is not None and (capture.refused or not len(capture)):
                raise RuntimeError("nothing was captured")
        except Exception as error:  # memory, a compiler: the others do not depend on it
            print(f"LEFT OUT: {row}: {type(error).__name__}: {first_line(error)}", flush=True)
        else:
            found[row] = task
    return found


def main(
    rounds: Annotated[int, typer.Option(help="Calls of each.")] = 7,
    device: Annotated[str, typer.Option(help="Where.")] = "cuda",
    output: Annotated[Path | None, typer.Option(help="Where the JSON goes.")] = None,
) -> None:
    """Print a table for each network and write it."""
    where, document, complete = torch.device(device), {}, True
    for name, (classes, widths, height, width) in CASES.items():
        torch.manual_seed(0)
        model = SegmentationNet(classes, widths).eval().requires_grad_(False).to(where)
        every, x = rows(model), torch.rand(1, 3, height, width, device=where)
        tasks = warmed(every, x)
        complete = complete and len(tasks) == len(every)
        turns = [{row: seconds(task, x) for row, task in tasks.items()} for _ in range(rounds)]
        medians = {row: statistics.median(turn[row] for turn in turns) for row in tasks}
        if (published := medians.get("published, two of 20 steps")) is not None:
            medians["published, 20 steps"] = 10 * published
        table = Table(title=f"{name}, one image, {where}")
        for heading in ("", "ms", "times published", "times uncaptured"):
            table.add_column(heading, justify="right" if heading else "left")
        for row, value in medians.items():
            plain = medians.get(row.removesuffix(", captured").removesuffix(", compiled"), value)
            ratios = f"{medians.get('published, 20 steps', math.nan) / value:.1f}", f"{plain / value:.2f}"
            table.add_row(row, f"{1e3 * value:.2f}", *ratios)
        Console().print(table)
        document[name] = medians
        if output is not None:  # after each network: the larger one may not fit
            card = torch.cuda.get_device_name(where) if where.type == "cuda" else "cpu"
            write_json(output, {"seconds": document, "device": card})
    if not complete:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
