"""The operators against the published formulation and against the eager reference, forward plus backward.

    python bench/bench_ops.py --output bench/results/ops.json     # the table, from one run
    pytest -n 0 bench/bench_ops.py                                # the same measurements as pytest-benchmark prints

`published` computes all pairs of the K+1 maps, as the published code does: the masks are materialized, each pair is
masked and normalized over its own overlap, quadratic in K. `eager` (equifast.reference) and `native` compute the K
pairs with the anchor. The floor is the time to read every tensor once and to write every result once, at the
bandwidth of a copy right before and after the line was measured, for on a shared machine a copy runs at 30 GB/s in one
minute and at 50 in the next: for the similarity anchor and views in, their gradients out. Freed memory is kept
(`equifast.keep_freed_memory`), for all lines alike: else fresh pages take part of the time.
"""

import functools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
import typer
from _published import published_similarity, published_step, published_warp
from _write import machine, write_json
from rich.console import Console
from rich.table import Table
from torch import Tensor

import equifast
from equifast import ops, views

equifast.keep_freed_memory()
DEVICE = os.environ.get("EQUIFAST_BENCH_DEVICE", "cpu")
DTYPE = getattr(torch, os.environ.get("EQUIFAST_BENCH_DTYPE", "float32"))
FEATURES = [(1, 11, 22, 30), (4, 19, 43, 85), (1, 256, 60, 60), (1, 21, 480, 480), (32, 64, 8, 8)]
LARGE = [(4, 256, 128, 256), (8, 21, 512, 1024)]  # on a GPU only
IMAGES = (4, 3, 340, 680)
PAIRS = [(4, 11, 176, 240)]
CONVOLUTIONS = [(4, 48, 44, 60, 1), (4, 96, 22, 30, 2), (4, 96, 44, 60, 4)]  # N, channels of both, H, W, dilation
STRIDED = [(4, 3, 32, 176, 240), (4, 32, 48, 88, 120)]  # N, channels, H, W; 3x3 by a stride of 2
COPIED = 2**26  # elements of the tensor that is copied: far beyond every cache
COPIES = 10  # before a line, and after it
LEAST_SECONDS = 1.5  # of measuring, per line
BENCHMARKS = ("published", "eager", "native")
float32_on_cpu = pytest.mark.skipif(DEVICE != "cpu" or DTYPE is not torch.float32, reason="for float32 on the CPU")


def rendered(shape: Sequence[int]) -> tuple[Tensor, list[tuple[int, int]]]:
    """theta (8, N, 2, 3) and the eight sizes of `views.paper()` for maps of a shape (N, C, H, W)."""
    ids = torch.arange(shape[0])
    sampled = views.sample(views.paper(), (shape[2], shape[3]), seed=0, ids=ids)
    return torch.stack([view.theta for view in sampled]).to(DEVICE), [view.size for view in sampled]


def values(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, DTYPE)


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def measure(benchmark: Any, task: Callable[[], object], touched: int) -> None:
    """Times a task often enough; `touched` is what the floor counts, in bytes."""

    def synchronized() -> None:
        task()
        synchronize()

    seconds = copies()
    try:
        synchronized()  # libraries choose their algorithms
    except torch.OutOfMemoryError:
        pytest.skip("more memory than this device has")
    start = time.perf_counter()
    synchronized()
    rounds = min(max(int(LEAST_SECONDS / (time.perf_counter() - start)), 5), 2000)
    benchmark.extra_info["bytes"] = touched
    benchmark.pedantic(synchronized, rounds=rounds, iterations=1, warmup_rounds=2)
    seconds += copies()
    benchmark.extra_info["copy bytes per second"] = 2 * COPIED * 4 / statistics.median(seconds)


@functools.cache
def _copied() -> tuple[Tensor, Tensor]:
    source = torch.zeros(COPIED, device=DEVICE)
    return torch.zeros_like(source), source


def copies() -> list[float]:
    """Seconds of some copies of a float32 tensor."""
    target, source = _copied()
    seconds = []
    for _ in range(COPIES + 1):
        start = time.perf_counter()
        target.copy_(source)
        synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def backends(name: str) -> Any:
    return ops.use({"eager": "reference", "native": "native"}[name])


@pytest.mark.parametrize("implementation", BENCHMARKS)
@pytest.mark.parametrize("shape", FEATURES + (LARGE if DEVICE == "cuda" else []), ids=str)
def test_similarity(benchmark: Any, shape: tuple[int, int, int, int], implementation: str) -> None:
    theta, sizes = rendered(shape)
    anchor = values(*shape, seed=0).requires_grad_()
    maps = [values(*shape[:2], *size, seed=1 + k).requires_grad_() for k, size in enumerate(sizes)]
    inputs = [anchor, *maps]

    def once() -> object:
        if implementation == "published":
            return torch.autograd.grad(published_similarity(anchor, maps, theta).sum(), inputs)
        with backends(implementation):
            return torch.autograd.grad(ops.similarity(anchor, maps, theta).sum(), inputs)

    measure(benchmark, once, 2 * sum(f.nbytes for f in inputs))


@pytest.mark.parametrize("implementation", BENCHMARKS)
def test_warp(benchmark: Any, implementation: str) -> None:
    theta, sizes = rendered(IMAGES)
    images = values(*IMAGES, seed=0).requires_grad_()
    upstream = [values(*IMAGES[:2], *size, seed=1 + k) for k, size in enumerate(sizes)]

    def once() -> object:
        if implementation == "published":
            return torch.autograd.grad(published_warp(images, theta, sizes), images, upstream)
        with backends(implementation):
            return torch.autograd.grad(ops.warp(images, theta, sizes), images, upstream)

    measure(benchmark, once, 2 * (images.nbytes + sum(g.nbytes for g in upstream)))


@pytest.mark.parametrize("sigma", [0.0, 0.5], ids=["no noise", "noise"])
@pytest.mark.parametrize("implementation", BENCHMARKS)
def test_signed_step(benchmark: Any, implementation: str, sigma: float) -> None:
    origin, gradient = values(*IMAGES, seed=0).abs().clamp(0, 1), values(*IMAGES, seed=1)
    x = (origin + 0.01).clamp(0, 1)
    ids = torch.zeros(IMAGES[0], dtype=torch.int64, device=DEVICE)

    def once() -> object:
        if implementation == "published":
            return published_step(x, gradient, origin, 0.02, 0.01, sigma)
        with backends(implementation):
            return ops.signed_step(x, gradient, origin, 0.02, 0.01, sigma, 0, ids, 0, 0)

    measure(benchmark, once, 4 * origin.nbytes)


@pytest.mark.parametrize("implementation", ["eager", "native"])  # published it is a part of similarity
@pytest.mark.parametrize("shape", PAIRS, ids=str)
def test_pair_similarity(benchmark: Any, shape: tuple[int, int, int, int], implementation: str) -> None:
    maps = [values(*shape, seed=k).contiguous(memory_format=torch.channels_last).requires_grad_() for k in range(9)]

    def once() -> object:
        with backends(implementation):
            return torch.autograd.grad(ops.pair_similarity(maps).sum(), maps)

    measure(benchmark, once, 2 * sum(f.nbytes for f in maps))


@pytest.mark.parametrize("implementation", ["eager", "native"])  # the published code takes torchvision's
def test_color_jitter(benchmark: Any, implementation: str) -> None:
    images, upstream = values(*IMAGES, seed=0).abs().clamp(0, 1).requires_grad_(), values(*IMAGES, seed=1)
    parameters = torch.tensor([[1.2, 0.8, 1.1, 0.1, 0.0]] * IMAGES[0], dtype=torch.float64, device=DEVICE)

    def once() -> object:
        with backends(implementation):
            return torch.autograd.grad(ops.color_jitter(images, parameters), images, upstream)

    measure(benchmark, once, 4 * images.nbytes)


@float32_on_cpu
@pytest.mark.parametrize("implementation", BENCHMARKS)  # the published code takes PyTorch's
@pytest.mark.parametrize("shape", CONVOLUTIONS, ids=str)
def test_winograd(benchmark: Any, shape: tuple[int, int, int, int, int], implementation: str) -> None:
    n, channels, height, width, dilation = shape
    layout = torch.channels_last
    x, upstream = (values(n, channels, height, width, seed=k).contiguous(memory_format=layout) for k in range(2))
    weight = values(channels, channels, 3, 3, seed=2).contiguous(memory_format=layout)
    filters, back = (ops.winograd_filters(w) for w in (weight, weight.flip(2, 3).transpose(0, 1)))
    pair = (dilation, dilation)

    def once() -> object:
        if implementation == "published":
            wanted = ((1, 1), pair, pair, False, (0, 0), 1, (True, False, False))
            torch.conv2d(x, weight, None, 1, dilation, dilation)
            return torch.ops.aten.convolution_backward(upstream, x, weight, None, *wanted)
        with backends(implementation):
            ops.winograd(x, filters, None, dilation, pair)
            return ops.winograd(upstream, back, None, dilation, pair)

    measure(benchmark, once, 4 * x.nbytes + 2 * weight.nbytes)


@float32_on_cpu
@pytest.mark.parametrize("implementation", BENCHMARKS)
@pytest.mark.parametrize("shape", STRIDED, ids=str)
def test_conv_transpose(benchmark: Any, shape: tuple[int, int, int, int, int], implementation: str) -> None:
    n, channels, outputs, height, width = shape
    layout = torch.channels_last
    x = values(n, channels, height, width, seed=0).contiguous(memory_format=layout)
    upstream = values(n, outputs, height // 2, width // 2, seed=1).contiguous(memory_format=layout)
    weight = values(outputs, channels, 3, 3, seed=2).contiguous(memory_format=layout)
    filters, blocks = ops.conv_transpose_filters(weight, 2), ops.in_blocks(weight.shape, 2)

    def once() -> object:
        if implementation == "published":
            wanted = ((2, 2), (1, 1), (1, 1), False, (0, 0), 1, (True, False, False))
            return torch.ops.aten.convolution_backward(upstream, x, weight, None, *wanted)
        with backends(implementation):
            return ops.conv_transpose(upstream, filters, channels, (height, width), 2, (1, 1), blocks)

    measure(benchmark, once, x.nbytes + upstream.nbytes + weight.nbytes)


# The table.


def _collect(report: dict[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """Per line of the table and implementation: median, spread and floor in seconds, and bytes per second of a copy."""
    rows: dict[str, dict[str, dict[str, float]]] = {}
    for line in report["benchmarks"]:
        chosen = dict(line["params"])
        implementation = chosen.pop("implementation")
        title = " ".join([line["name"].split("[")[0].removeprefix("test_"), *(str(v) for v in chosen.values())])
        data = line["stats"].get("data") or [line["stats"]["median"]]
        rows.setdefault(title, {})[implementation] = {
            "median": line["stats"]["median"],
            "quartiles": statistics.quantiles(data, n=4) if len(data) > 1 else data * 3,
            "floor": line["extra_info"]["bytes"] / line["extra_info"]["copy bytes per second"],
            "copy_bytes_per_second": line["extra_info"]["copy bytes per second"],
        }
    return rows


def _print(rows: dict[str, dict[str, dict[str, float]]]) -> None:
    table = Table(title=f"{DEVICE}, {DTYPE}: milliseconds, forward and backward, median; copy in GB/s")
    ratios = ("published / native", "eager / native")
    headings = ("operator", *BENCHMARKS, *ratios, "copy", "floor", "native / floor")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "operator" else "right")
    for name, row in rows.items():
        median = {key: row[key]["median"] for key in BENCHMARKS if key in row}
        cells = [f"{1e3 * median[key]:.3f}" if key in median else "" for key in BENCHMARKS]
        if "native" in median:
            native, floor, copy = median["native"], row["native"]["floor"], row["native"]["copy_bytes_per_second"]
            cells += [f"{median[key] / native:.1f}" if key in median else "" for key in BENCHMARKS[:2]]
            cells += [f"{copy / 1e9:.1f}", f"{1e3 * floor:.3f}", f"{native / floor:.2f}"]
        table.add_row(name, *cells)
    Console(width=150).print(table)


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    select: Annotated[str, typer.Option(help="What to measure, as in pytest -k.")] = "test",
    output: Annotated[Path | None, typer.Option(help="Where the JSON goes.")] = None,
) -> None:
    """Run the benchmarks, print the table, write it."""
    global DEVICE, DTYPE
    os.environ["EQUIFAST_BENCH_DEVICE"], os.environ["EQUIFAST_BENCH_DTYPE"] = device, dtype
    DEVICE, DTYPE = device, getattr(torch, dtype)
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "benchmarks.json"
        options = ["-q", "-n", "0", "-p", "no:cacheprovider", f"--benchmark-json={raw}", "-k"]
        status = pytest.main([__file__, *options, select])
        if not raw.exists() or not raw.stat().st_size:
            sys.exit(int(status) or 1)
        rows = _collect(json.loads(raw.read_text()))
    _print(rows)
    if output is not None:
        document = {
            "device": torch.cuda.get_device_name() if device == "cuda" else machine()["cpu"],
            "dtype": dtype,
            "seconds": rows,
        }
        write_json(output, document)
    if status:  # what could be measured is there
        sys.exit(int(status))


if __name__ == "__main__":
    typer.run(main)
