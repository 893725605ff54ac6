"""What a defended model costs, in units of the model without a defense."""

import contextlib
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from equifast import _checks
from equifast.features import evaluating
from equifast.purifier import DefendedModel

__all__ = ["Cost", "cost", "peak_memory"]


@dataclass(frozen=True)
class Cost:
    """What predicting a batch with a defense takes.

    Args:
        seconds: medians over rounds.
        times: these over those of a forward pass of the model in its own dtype.
        passes: forward passes of the image, by area, that enter the model; a backward pass counts as two. What features
            that are a function of your own run beside the model is not seen.
        mebibytes: the most that tensors take at any moment, beside what was there before.
    """

    seconds: float
    times: float
    passes: float
    mebibytes: float


def cost(model: nn.Module, defended: DefendedModel, x: Tensor, rounds: int = 5) -> Cost:
    """Measure a defense, in turns with a forward pass of the model alone.

    Args:
        model: the one that it defends.
        defended: the defense, which holds this model.
        x: (N, 3, H, W) in [0, 1], N at least 1.
        rounds: how often, after one to warm up.

    Raises:
        ValueError: for ``x`` that is not such.
    """
    _checks.integer("rounds", rounds, 1, 10**6)
    _checks.images("x", x, channels=3)
    if len(x) == 0:
        raise ValueError("x is empty; there must be an image to measure")
    ids = torch.zeros(len(x), dtype=torch.int64, device=x.device)

    def once() -> None:
        defended(x, ids=ids, draw=0)

    times: tuple[list[float], list[float]] = [], []
    with evaluating(x, model), torch.no_grad():
        once()  # the first call may look at the model, and at what a pass takes
        passes = _passes(model, x, once)
        for _ in range(rounds + 1):
            for found, task in zip(times, (lambda: model(x.clone()), once), strict=True):
                found.append(_seconds(task, x.device))
        alone, seconds = (statistics.median(found[1:]) for found in times)
        return Cost(seconds, seconds / alone, passes, peak_memory(once, x.device) / 2**20)


def _seconds(task: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begun = time.perf_counter()
    task()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun


def _passes(model: nn.Module, x: Tensor, task: Callable[[], object]) -> float:
    """Forward passes of the image, by area, counted where images enter the model."""
    area = 0.0

    def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal area
        image = inputs[0]
        both = torch.is_grad_enabled() and image.requires_grad
        area += len(image) * image.shape[2] * image.shape[3] * (3.0 if both else 1.0)

    handle = model.register_forward_pre_hook(note)  # for its time the model is run as it is, not as a folded copy
    try:
        task()
    finally:
        handle.remove()
    return area / (len(x) * x.shape[2] * x.shape[3])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the profiler from writing to the terminal that it starts, stops and finds no GPU, and the allocator that
    something is freed which was there before. What else the process writes there comes at the end.
    """
    if sys.stderr is None:  # nowhere to write to
        yield
        return
    name = "KINETO_LOG_LEVEL"
    given = os.environ.get(name)
    os.environ.setdefault(name, "6")
    sys.stderr.flush()
    terminal = os.dup(2)
    with tempfile.TemporaryFile() as written:
        os.dup2(written.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(terminal, 2)
            written.seek(0)
            os.write(terminal, b"".join(line for line in written if b" CPUAllocator.cpp:" not in line))
            os.close(terminal)
            if given is None:
                del os.environ[name]


def peak_memory(task: Callable[[], object], device: torch.device) -> float:
    """The most bytes that tensors take at a moment during a task, beside those there before it.

    By the profiler's record of every allocation on the CPU, where scratch space of libraries does not count; by the
    caching allocator on CUDA.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        task()
        return float(torch.cuda.max_memory_allocated(device) - before)
    with warnings.catch_warnings(), _quiet():
        # torch 2.11 says that there is one cycle; to have it accumulate several is to have it parse all events, which
        # takes longer than the task
        warnings.filterwarnings("ignore", ".*Profiler clears events")
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            task()
    assert record.profiler is not None
    assert record.profiler.kineto_results is not None
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return float(peak)
