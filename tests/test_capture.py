"""Captured steps, with a tracer in the place of CUDA graphs: what was not an argument is a constant in both."""

import copy
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import cases
import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from equifast import Purifier, ops, views
from equifast._capture import Capture, _no_waits


class Traced:
    """A function recorded operation by operation; where it looks at a value of a tensor it fails."""

    def __init__(self, function: Callable[..., Any], arguments: Sequence[Any]) -> None:
        self._tensors = [a if isinstance(a, Tensor) else torch.tensor(a) for a in arguments]
        self._graph = make_fx(function, tracing_mode="real")(*(torch.empty_like(a).copy_(a) for a in self._tensors))

    def __call__(self, *arguments: Any) -> tuple[Tensor, ...]:
        given = zip(arguments, self._tensors, strict=True)
        return tuple(self._graph(*(a if isinstance(a, Tensor) else torch.tensor(a, dtype=s.dtype) for a, s in given)))


def captured(model: nn.Module, **settings: Any) -> tuple[Purifier, Purifier]:
    """A purifier whose steps are traced, and the same one operation after the other."""
    replayed = Purifier(model, capture=True, **settings)
    replayed._capture = Capture(Traced)
    return replayed, Purifier(model, **settings | {"palette": replayed.palette})


CASES: list[tuple[str, dict[str, Any]]] = [
    ("native", {}),
    ("native", {"view_gradient": 0, "temperature": 2.0}),
    ("native", {"preset": "strong", "steps": 3}),
    ("native", {"preset": "paper", "steps": 2, "noise": False, "dtype": "bfloat16"}),
    (
        "reference",
        {"preset": "paper", "steps": 2, "views": [views.Rotation(), views.ColorJitter()]},
    ),  # the native step of the CPU takes its numbers on the host
    ("native", {"norm": "l2", "steps": 2}),
    ("reference", {"norm": "l2", "steps": 2, "noise": True, "views": [views.Rotation(), views.ColorJitter()]}),
]


@pytest.mark.parametrize(("backend", "settings"), CASES, ids=str)
def test_replays_equal_steps_one_by_one(backend: str, settings: dict[str, Any]) -> None:
    palette = 2 if backend == "native" else 1  # tracing the reference takes seconds
    with ops.use(backend):
        replayed, plain = captured(cases.dense(), palette=palette, **settings)
        for number in range(3):
            x = torch.rand(2, 3, 20, 28, generator=torch.Generator().manual_seed(number))
            ids = torch.tensor([number, 7 * number])
            assert torch.equal(replayed(x, ids, draw=number), plain(x, ids, draw=number))
    assert replayed._capture is not None
    assert not replayed._capture.refused
    assert 0 < len(replayed._capture) <= palette


def test_a_recording_ends_with_what_it_holds() -> None:
    model, x = cases.dense(), cases.images()
    replayed, plain = captured(model, palette=1)
    before = replayed(x)
    with torch.no_grad():
        model.head.weight.neg_()
        model.stem[0].weight.mul_(0.5)
    assert torch.equal(replayed(x), plain(x))
    assert not torch.equal(replayed(x), before)
    model.head = copy.deepcopy(model.head)
    model.head.weight.data = model.head.weight.data.flip(0)
    assert torch.equal(replayed(x), plain(x))
    assert torch.equal(copy.deepcopy(replayed)(x), plain(x))  # without the recordings


def test_other_shapes_are_other_recordings() -> None:
    replayed, plain = captured(cases.dense(), palette=1)
    for shape in ((1, 3, 20, 28), (2, 3, 20, 28), (2, 3, 16, 24)):
        x = torch.rand(shape, generator=torch.Generator().manual_seed(0))
        for layout in (torch.contiguous_format, torch.channels_last):
            assert torch.equal(replayed(x.to(memory_format=layout)), plain(x))
    assert replayed._capture is not None
    assert 3 <= len(replayed._capture) <= 6


class Looks(nn.Module):
    """A model that decides by a value."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = cases.dense()

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.inner(x)
        return features * 2 if float(features.detach().sum()) > 0 else features


def test_what_cannot_be_captured_runs_after_one_warning() -> None:
    x = cases.images()
    purifier = Purifier(cases.dense(), capture=True)  # on the CPU
    with pytest.warns(RuntimeWarning, match="cannot be captured as CUDA graphs.*not on a CUDA device"):
        first = purifier(x)
    plain = Purifier(cases.dense(), palette=16)
    assert torch.equal(first, plain(x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(purifier(x, draw=1), plain(x, draw=1))
    replayed, plain = captured(Looks())
    with pytest.warns(RuntimeWarning, match="cannot be captured"):
        assert torch.equal(replayed(x), plain(x))


def test_a_wait_for_the_device_is_seen_before_anything_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[Any] = [0]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])

    def set_mode(mode: Any) -> None:
        warnings.warn("Synchronization debug mode is a prototype feature (as PyTorch says)", UserWarning, stacklevel=1)
        modes.append(mode)

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)

    def wait() -> None:
        assert modes[-1] == "warn"
        warnings.warn("called a synchronizing CUDA operation (as PyTorch says it)", UserWarning, stacklevel=1)

    with pytest.raises(RuntimeError, match="waits for a value that is computed on the device"), _no_waits():
        wait()
    with _no_waits():
        other = threading.Thread(target=wait)
        other.start()
        other.join()
    with pytest.warns(UserWarning, match="something else") as told, _no_waits():
        warnings.warn("something else", UserWarning, stacklevel=1)
    assert len(told) == 1
    with pytest.raises(ZeroDivisionError), _no_waits():
        raise ZeroDivisionError
    assert modes == [0] + ["warn", 0] * 4


def test_the_last_used_recordings_are_kept() -> None:
    made: list[int] = []

    def record(function: Callable[..., Any], arguments: Sequence[Any]) -> Callable[..., Any]:
        made.append(int(arguments[0]))
        return function

    capture = Capture(record, most=2)
    for key in (0, 1, 0, 2, 0, 1):
        (result,) = capture("owner", key, lambda x: (x + 1,), [torch.tensor(key)])
        assert int(result) == key + 1
    assert made == [0, 1, 2, 1]
    capture("another", 0, lambda x: (x,), [torch.tensor(0)])
    assert made == [0, 1, 2, 1, 0]
    assert len(capture) == 1


def test_a_recording_is_let_go_when_its_last_replay_has_ended() -> None:
    ended: list[int] = []

    class Event:
        def synchronize(self) -> None:
            ended.append(len(capture))

    capture = Capture(lambda function, arguments: function, most=1)
    capture("owner", 0, lambda x: (x,), [torch.zeros(())])
    capture._done = Event()  # type: ignore[assignment]
    capture("owner", 1, lambda x: (x,), [torch.zeros(())])
    assert ended == [2]  # the new one was there already
    capture("another", 1, lambda x: (x,), [torch.zeros(())])
    assert ended == [2, 1]
    assert capture._done is None


def test_a_palette_has_few_sets_of_sizes_whatever_the_seed() -> None:
    ids = torch.arange(3)

    def drawn(seed: int, step: int, palette: int | None) -> tuple[tuple[int, int], ...]:
        sampled = views.sample(views.fast(), (90, 120), seed=seed, ids=ids, step=step, palette=palette)
        return tuple(view.size for view in sampled)

    assert len({drawn(seed, step, 4) for seed in range(5) for step in range(20)}) == 4
    assert len({drawn(0, step, None) for step in range(20)}) > 15
    some, other = (views.sample(views.fast(), (90, 120), seed=0, ids=ids, palette=p)[4] for p in (4, None))
    assert torch.equal(some.theta, other.theta)  # what each image draws stays


def test_settings_that_capture_has_not() -> None:
    for settings in ({"stop": 0.9}, {"keep": "best"}):
        with pytest.raises(ValueError, match="capture is True with stop or keep='best'"):
            Purifier(cases.dense(), capture=True, **settings)
    with pytest.raises(ValueError, match="palette is 0"):
        Purifier(cases.dense(), palette=0)
    with pytest.raises(ValueError, match="compile is True with features"):
        Purifier(cases.dense(), "stem", compile=True)
