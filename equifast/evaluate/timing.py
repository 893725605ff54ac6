"""Where the time of a purification step goes."""

import copy
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from equifast import _checks
from equifast.objectives import Equivariance
from equifast.purifier import Purifier
from equifast.views import Sampled

__all__ = ["PARTS", "Profile", "profile_step"]

PARTS = ("views", "forward", "backward", "similarity", "step", "other")


@dataclass(frozen=True)
class Profile:
    """A step of a purifier on a batch.

    Args:
        seconds: of each of ``PARTS``, medians over rounds. ``views`` is drawing and rendering them, and the way back;
            ``forward`` and ``backward`` are the network, and the log-probabilities of its output where a purifier
            compares these; ``step`` is momentum, the step and the projection; ``other`` is what lies between.
        passes: how many forward and backward passes of the image, by area, a step makes of each image; forward passes
            alone count half.
        folded: whether a folded copy of the model runs.
    """

    seconds: dict[str, float]
    passes: float
    folded: bool

    @property
    def total(self) -> float:
        """Seconds of the whole step."""
        return sum(self.seconds.values())

    @property
    def overhead(self) -> float:
        """The share of the step that is not the network."""
        return 1 - (self.seconds["forward"] + self.seconds["backward"]) / self.total


# What an interval between two events is; others are "other".
_INTERVALS = {
    ("sample", "sampled"): "views",
    ("render", "rendered"): "views",
    ("run", "ran"): "forward",
    ("ran", "features back"): "similarity",
    ("features back", "image back"): "backward",
    ("image back", "views back"): "views",
    ("step", "stepped"): "step",
}


class _Clock:
    def __init__(self, device: torch.device) -> None:
        self.events: list[tuple[str, float]] = []
        self._device = device

    def note(self, event: str) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.events.append((event, time.perf_counter()))

    def parts(self) -> dict[str, float]:
        seconds = dict.fromkeys(PARTS, 0.0)
        for (before, begun), (after, ended) in zip(self.events, self.events[1:], strict=False):
            seconds[_INTERVALS.get((before, after), "other")] += ended - begun
        return seconds


class _Timed(Equivariance):
    """An objective that notes where it is."""

    clock: _Clock
    area: float

    def _mark(self, x: Tensor, event: str) -> Tensor:
        """Notes when the backward pass arrives at a tensor."""
        if x.requires_grad:
            x.register_hook(lambda _: self.clock.note(event))
        return x

    def sample(self, x: Tensor, t: int, count: int | None) -> list[Sampled]:
        self.clock.note("sample")
        sampled = super().sample(x, t, count)
        self.clock.note("sampled")
        return sampled

    def render(self, x: Tensor, sampled: Sequence[Sampled]) -> list[Tensor]:
        self.clock.note("render")
        rendered = super().render(self._mark(x, "views back"), sampled)
        self.clock.note("rendered")
        return rendered

    def features(self, x: Tensor) -> Tensor:
        self.area += x.shape[0] * x.shape[2] * x.shape[3] * (1.0 if torch.is_grad_enabled() else 0.5)
        self.clock.note("run")
        features = self._mark(super().features(self._mark(x, "image back")), "features back")
        self.clock.note("ran")
        return features


def profile_step(purifier: Purifier, x: Tensor, rounds: int = 5) -> Profile:
    """Time the parts of a purifier's first step on a batch, which runs at once.

    Args:
        purifier: as it would be called.
        x: (N, 3, H, W) in [0, 1], N at least 1.
        rounds: how often, after one to warm up.

    Raises:
        ValueError: as a call of the purifier does; if ``x`` is empty, or the purifier makes no step.
        TypeError: if it climbs another objective than equivariance.
    """
    _checks.integer("rounds", rounds, 1, 10**6)
    _checks.images("x", x, channels=3)
    if len(x) == 0 or purifier.ascent.steps == 0:
        raise ValueError("x is empty or the purifier has no steps; there must be a step to profile")
    found: list[dict[str, float]] = []
    with purifier._objective(x, None, 0, purifier.views_per_step) as (images, objective, seed, ids):
        if type(objective) is not Equivariance:
            raise TypeError(f"purifier is a {type(purifier).__name__}; a profile is of one that climbs equivariance")
        timed = copy.copy(objective)
        timed.__class__ = _Timed
        assert isinstance(timed, _Timed)
        ascent = purifier.ascent
        sigma = (ascent.steps - 1) / ascent.steps if ascent.noise else 0.0
        momentum = torch.zeros_like(images, dtype=torch.promote_types(images.dtype, torch.float32))
        for _ in range(rounds + 1):
            timed.clock, timed.area = _Clock(x.device), 0
            timed.clock.note("begin")
            gradient = timed.gradient(images, 0)[1]
            timed.clock.note("step")
            gradient, momentum = ascent.accumulated(gradient, momentum)
            size = ascent.step_size
            ascent.ball.step(images, gradient, images, size=size, sigma=sigma, seed=seed, ids=ids, draw=0, t=0)
            timed.clock.note("stepped")
            found.append(timed.clock.parts())
        passes = timed.area / (x.shape[0] * x.shape[2] * x.shape[3])
    seconds = {part: statistics.median(parts[part] for parts in found[1:]) for part in PARTS}
    return Profile(seconds, passes, purifier.folded)
