"""Steps of an ascent recorded once and replayed, so that the host need not start their operations one by one."""

import contextlib
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["Capture", "Graph", "Recorded"]

Value = Tensor | float
Function = Callable[..., tuple[Tensor, ...]]
"""Tensors to tensors. Whatever changes from one replay to the next must be among its arguments."""


class Recorded(Protocol):
    """A function that was recorded: replayed with other values of its arguments, of the same shapes."""

    def __call__(self, *arguments: Value) -> tuple[Tensor, ...]: ...


@contextlib.contextmanager
def _no_waits() -> Iterator[None]:
    """Raises RuntimeError, at its end, if this thread has waited for the device inside, as PyTorch sees it.

    Where a capture meets that, it leaves PyTorch's allocator and generators in a state of capturing. Other threads may
    wait: the mode that would make waiting an error is one for all of them.
    """
    here, waits = threading.get_ident(), []
    with warnings.catch_warnings():
        warnings.filterwarnings("always", "called a synchronizing CUDA operation")
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        show = warnings.showwarning

        def note(message: Warning | str, *rest: Any, **more: Any) -> None:
            if "called a synchronizing CUDA operation" not in str(message):
                show(message, *rest, **more)
            elif threading.get_ident() == here:
                waits.append(message)

        warnings.showwarning = note
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)
    if waits:
        raise RuntimeError("the model waits for a value that is computed on the device")


class Graph:
    """A function recorded as a CUDA graph.

    Arguments are copied to where it was recorded with; numbers are 0-d tensors there, int64 or float64.

    Args:
        function: runs on the current device, and waits for nothing that is computed there.
        arguments: examples, of which the values do not count.
        pool: the memory of graphs that never run at once; kept alive by each of them.
        aside: the stream on which all graphs of the pool are recorded.

    Raises:
        RuntimeError: if the function cannot be recorded.
    """

    _one_at_a_time = threading.RLock()  # in a process, asks PyTorch

    def __init__(self, function: Function, arguments: Sequence[Value], pool: Any, aside: torch.cuda.Stream) -> None:
        device = next(a.device for a in arguments if isinstance(a, Tensor))
        self._static = [_static(argument, device) for argument in arguments]
        with self._one_at_a_time, torch.cuda.device(device):
            current = torch.cuda.current_stream()
            aside.wait_stream(current)
            try:
                with torch.cuda.stream(aside):
                    function(*self._static)  # kernels are compiled, algorithms chosen and constants made here
                    # what goes back runs in this thread then, whose waits are seen
                    with _no_waits(), torch.autograd.set_multithreading_enabled(False):
                        function(*self._static)
                current.wait_stream(aside)
                self._graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self._graph, pool=pool, stream=aside, capture_error_mode="thread_local"):
                    self._results = function(*self._static)
            finally:
                torch.cuda.set_stream(current)  # which a capture that fails does not

    def __call__(self, *arguments: Value) -> tuple[Tensor, ...]:
        for static, given in zip(self._static, arguments, strict=True):
            if isinstance(given, Tensor):
                static.copy_(given, non_blocking=True)
            else:
                static.fill_(given)
        self._graph.replay()
        return tuple(result.clone() for result in self._results)


def _static(argument: Value, device: torch.device) -> Tensor:
    if isinstance(argument, Tensor):
        return argument.detach().clone()
    return torch.tensor(argument, device=device, dtype=torch.int64 if isinstance(argument, int) else torch.float64)


class Capture:
    """Records functions, by key, and replays them. Threads may share one: one of them is inside at a time.

    Args:
        record: ``(function, arguments) -> Recorded``; None for CUDA graphs.
        most: how many recordings are kept, the last ones used.
    """

    def __init__(self, record: Callable[[Function, Sequence[Value]], Recorded] | None = None, most: int = 64) -> None:
        self._record = record
        self._most = most
        self._forget()

    def _forget(self) -> None:
        self._recorded: OrderedDict[Hashable, Recorded] = OrderedDict()
        self._owner: object = None
        self._refused = False
        self._done: torch.cuda.Event | None = None
        self._lock = threading.Lock()
        self._release()

    def _release(self) -> None:
        """Lets go of all recordings; with them ends their memory, and the device may be another one afterwards."""
        self._wait()
        self._recorded.clear()
        self._pool: Any = None
        self._aside: torch.cuda.Stream | None = None
        self._done = None

    def _wait(self) -> None:
        """Until what was replayed last, on whatever stream, has ended: its memory goes with the recording."""
        if self._done is not None:
            self._done.synchronize()

    def __getstate__(self) -> dict[str, object]:
        """Without the recordings, which are made again."""
        return {"_record": self._record, "_most": self._most}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def __len__(self) -> int:
        """How many recordings there are."""
        return len(self._recorded)

    @property
    def refused(self) -> bool:
        """Whether something could not be recorded: nothing is any more."""
        return self._refused

    def __call__(
        self, owner: object, key: Hashable, function: Function, arguments: Sequence[Value]
    ) -> tuple[Tensor, ...]:
        """``function(*arguments)``, replayed where it was recorded under the key.

        What cannot be recorded is run as it is, after one warning.

        Args:
            owner: what recordings hold, a model for instance; with one that is not equal to it all are made again.
            key: by which two functions are the same.
            function, arguments: as for :class:`Graph`.
        """
        with self._lock:
            if self._owner != owner:
                self._release()
                self._owner = owner
            if not self._refused:
                found = self._find(key, function, arguments)
                if found is not None:
                    return self._replay(found, arguments)
        return function(*arguments)

    def _find(self, key: Hashable, function: Function, arguments: Sequence[Value]) -> Recorded | None:
        if key not in self._recorded:
            try:
                self._recorded[key] = self._make(function, arguments)
            except RuntimeError as error:
                self._refused = True
                self._release()
                reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                warnings.warn(
                    f"steps cannot be captured as CUDA graphs and run one operation after the other: {reason}",
                    RuntimeWarning,
                    stacklevel=2,
                )
                return None
            if len(self._recorded) > self._most:
                self._wait()
                self._recorded.popitem(last=False)
        self._recorded.move_to_end(key)
        return self._recorded[key]

    def _make(self, function: Function, arguments: Sequence[Value]) -> Recorded:
        if self._record is not None:
            return self._record(function, arguments)
        devices = [argument.device for argument in arguments if isinstance(argument, Tensor)]
        if any(device.type != "cuda" for device in devices):
            raise RuntimeError("the images are not on a CUDA device")
        if self._aside is None:
            self._pool, self._aside = torch.cuda.graph_pool_handle(), torch.cuda.Stream(devices[0])
        return Graph(function, arguments, self._pool, self._aside)

    def _replay(self, recorded: Recorded, arguments: Sequence[Value]) -> tuple[Tensor, ...]:
        if self._record is not None:
            return recorded(*arguments)
        # graphs share memory: one on another stream must have ended
        stream = torch.cuda.current_stream(next(a.device for a in arguments if isinstance(a, Tensor)))
        if self._done is None:
            self._done = torch.cuda.Event()
        else:
            stream.wait_event(self._done)
        results = recorded(*arguments)
        self._done.record(stream)
        return results
