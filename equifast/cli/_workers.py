"""Processes that share the images of an evaluation."""

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import typer

from equifast.cli._common import main, progress_bar
from equifast.evaluate import Part
from equifast.evaluate.records import Advance

__all__ = ["Work", "current", "share"]


@dataclass(frozen=True)
class Work:
    """What a worker does of an evaluation."""

    part: Part
    tell: Advance


_work: Work | None = None


def current() -> Work | None:
    """That of this process, where it is a worker."""
    return _work


def share(evaluate: Callable[..., None], arguments: Mapping[str, Any], workers: int) -> None:
    """Run a command in processes of their own, each a part; typer.Exit where one fails, once it has said why."""
    context = multiprocessing.get_context("spawn")  # a forked process cannot use OpenMP
    told: Any = context.SimpleQueue()
    threads = max(1, torch.get_num_threads() // workers)
    processes = [
        context.Process(target=_run, args=(evaluate, arguments, Part(number, workers), threads, told), daemon=True)
        for number in range(workers)
    ]
    seconds = [(0.0, 1.0)] * workers
    with progress_bar() as progress:
        task = progress.add_task("starting", total=1.0)
        try:
            for process in processes:
                process.start()
            while any(process.is_alive() for process in processes):
                multiprocessing.connection.wait([process.sentinel for process in processes if process.is_alive()], 0.5)
                while not told.empty():
                    number, what, done, total = told.get()
                    seconds[number] = (done, total)
                    done, total = (sum(column) for column in zip(*seconds, strict=True))
                    progress.update(task, description=what, completed=done, total=total)
                _look(processes)
            _look(processes)
        finally:
            for process in processes:
                if process.is_alive():
                    process.terminate()
                    process.join()


def _look(processes: Sequence[Any]) -> None:
    """Raises for processes that failed."""
    for process in processes:
        if process.exitcode is not None and process.exitcode < 0:
            raise RuntimeError(f"a worker was ended by signal {-process.exitcode}; what was done is kept, start again")
        if process.exitcode:
            raise typer.Exit(process.exitcode)


def _run(evaluate: Callable[..., None], arguments: Mapping[str, Any], part: Part, threads: int, told: Any) -> None:
    """What a worker's process runs. It ends when the process that started it does, however that ends."""

    def follow() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who started it is told too, and ends it
    main()
    torch.set_num_threads(threads)
    global _work
    _work = Work(part, lambda what, done, total: told.put((part.number, what, done, total)))
    try:
        evaluate(**arguments)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
