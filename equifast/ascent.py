"""The one projected-gradient ascent: the purifier and every attack are this loop with another objective."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from equifast import _checks, ops, rng
from equifast.balls import STARTS, Ball, Step
from equifast.features import uncast
from equifast.objectives import Objective
from equifast.reference import row_sum

__all__ = ["Advance", "Ascent", "Progress", "Watch"]

Progress = Callable[[int, int], object]
"""Called as ``progress(done, total)`` after every step."""
Watch = Callable[[int, Tensor, Tensor], object]
"""Called as ``watch(t, value, gradient)`` at every step: (N,) and (N, C, H, W), at the point from which it goes."""

Advance = Callable[[Tensor, Tensor, Tensor, int, Step], tuple[Tensor, Tensor]]
"""A step by other means than :meth:`Ascent.move`: ``(x, momentum, origin, t, how) -> (x, momentum)``."""


@dataclass(frozen=True, kw_only=True)
class Ascent:
    """``x <- P(x + step_size * direction(gradient / |gradient|_2 + sigma_t * xi))``, for each image on its own.

    Args:
        ball: the set that is searched, and its steps and projection.
        steps: T, the number of steps of one run.
        step_size: length of a step, in units of image values.
        start: ``"origin"``, ``"uniform"`` in the ball or on a random ``"corner"`` of it.
        noise: with True, ``sigma_t = (T - 1 - t) / T`` (paper: Algorithm 1), else 0.
        momentum: decay of the accumulated gradient, each term over its mean magnitude (Dong et al. 2018, Eq. 6);
            None for none.
        restarts: runs from starts of their own; every one needs a random start.
        keep: ``"last"`` iterate, or the ``"best"`` of all, by the objective (with restarts, ``"last"`` keeps the
            best of the last iterates). Where the objective is random this costs another value per iterate: all are
            compared at one realization.
        adaptive_steps: whether they are those of Auto-PGD (Croce and Hein 2020, Algorithm 1): each goes three quarters
            of its way and a quarter of the last one's again, and an image's step size, ``step_size`` at first, halves
            where progress stalls, which takes it back to its best iterate. For ``keep="best"`` without noise and
            momentum.
        stop: an image whose value at a step is at least this stays as it is and leaves the batch; None for no such
            level. For one run that keeps its last iterate.
    """

    ball: Ball
    steps: int
    step_size: float
    start: str = "origin"
    noise: bool = False
    momentum: float | None = None
    restarts: int = 1
    keep: str = "last"
    adaptive_steps: bool = False
    stop: float | None = None

    def __post_init__(self) -> None:
        _checks.integer("steps", self.steps, 0, rng.MAX_STEP)
        _checks.number("step_size", self.step_size, above=0)
        _checks.choice("start", self.start, STARTS)
        _checks.boolean("noise", self.noise)
        if self.momentum is not None:
            _checks.number("momentum", self.momentum, least=0)
        _checks.integer("restarts", self.restarts, 1, rng.MAX_STEP)
        _checks.choice("keep", self.keep, ("last", "best"))
        if self.restarts > 1 and self.start == "origin":
            raise ValueError(
                "start is 'origin' with several restarts; it must be 'uniform' or 'corner', or they are equal"
            )
        _checks.boolean("adaptive_steps", self.adaptive_steps)
        if self.adaptive_steps and self.keep != "best":
            raise ValueError(f"keep is {self.keep!r} with adaptive steps; it must be 'best'")
        if self.adaptive_steps and (self.noise or self.momentum is not None):
            raise ValueError("adaptive_steps is True with noise or momentum; it must be without")
        if self.stop is not None and (self.restarts > 1 or self.keep == "best"):
            raise ValueError("stop is given with several restarts or keep='best'; it is for one run's last iterate")
        if self.steps * self.restarts > rng.MAX_STEP:
            raise ValueError(f"steps times restarts is {self.steps * self.restarts}; it must be at most {rng.MAX_STEP}")

    def accumulated(self, gradient: Tensor, momentum: Tensor) -> tuple[Tensor, Tensor]:
        """What a step follows, and the accumulated gradient after it."""
        if self.momentum is None:
            return gradient, momentum
        momentum = self.momentum * momentum + _mean_normalized(gradient)
        most = torch.finfo(gradient.dtype).max  # a single element may be as many times the mean as there are elements
        return momentum.clamp(-most, most).to(gradient.dtype), momentum

    def move(
        self, objective: Objective, x: Tensor, momentum: Tensor, origin: Tensor, t: int, how: Step
    ) -> tuple[Tensor, Tensor]:
        """One step that does not adapt, (N, C, H, W) -> the next point and the accumulated gradient after it.

        No number is taken of a tensor's values where the ball and the objective take none.
        """
        gradient, momentum = self.accumulated(objective.gradient(x, t)[1], momentum)
        return self.ball.step(x, gradient, origin, **how), momentum

    def __call__(
        self,
        objective: Objective,
        x: Tensor,
        *,
        seed: int,
        ids: Tensor,
        draw: int = 0,
        party: int = 0,
        progress: Progress | None = None,
        slope: Callable[[Tensor, int], Tensor] | None = None,
        last: int = 0,
        visit: Callable[[Tensor], object] | None = None,
        watch: Watch | None = None,
        advance: Advance | None = None,
    ) -> Tensor:
        """Climb ``objective`` from ``x``.

        Args:
            objective: gives values and gradients; step ``t`` of restart ``r`` asks it for ``r * steps + t``.
            x: (N, C, H, W) in [0, 1].
            seed, ids, draw: the realization, as in :mod:`equifast.rng`.
            party: who climbs; the random starts of one party are independent of another's under the same seed.
            progress: called after every step.
            slope: the objective's gradient with a graph, ``(x, t) -> (N, C, H, W)``.
            last: how many steps at the end have a derivative, through ``slope``; up to them the ascent counts as the
                identity. Each is run again for its derivative, so that one at a time takes memory. For one run that
                keeps its last iterate.
            visit: called with the images after every step, without a graph.
            watch: told of values and gradients, of the images that have not stopped, at every step but the ``last``.
            advance: takes the steps, in place of :meth:`move`. For one that keeps its last iterate, with no stop,
                ``watch`` and ``slope``.

        Returns:
            (N, C, H, W), in the ball and in [0, 1]; no graph where ``last`` is 0.
        """
        given, origin = x, x.detach()
        if origin.numel() == 0:
            return origin.clone()
        compare = self.restarts > 1 or self.keep == "best"
        best, best_value = origin.clone(), torch.full((len(origin),), -torch.inf, device=origin.device)

        def offer(candidate: Tensor, value: Tensor) -> None:
            better = value > best_value
            best[better], best_value[better] = candidate[better], value[better].to(best_value.dtype)

        def place(first: int, t: int) -> Step:
            sigma = (self.steps - 1 - t) / self.steps if self.noise else 0.0
            return {"size": self.step_size, "sigma": sigma, "seed": seed, "ids": ids, "draw": draw, "t": first + t}

        staying, finished = torch.arange(len(origin), device=origin.device), origin.clone()  # where it stops
        total = self.steps * self.restarts
        for restart in range(self.restarts):
            first = restart * self.steps
            stream = rng.Stream.START.of(party)
            x = self.ball.start(origin, self.start, seed=seed, stream=stream, ids=ids, draw=draw, step=restart)
            momentum = torch.zeros_like(origin, dtype=torch.promote_types(origin.dtype, torch.float32))
            schedule = _Schedule(self, origin) if self.adaptive_steps else None
            for t in range(self.steps):
                if slope is not None and t >= self.steps - last:
                    if t == self.steps - last:
                        x = x + (given - origin)
                    x, momentum = _unrolled(x, momentum, given, self, objective, slope, t, place(0, t))
                elif advance is not None:
                    x, momentum = advance(x, momentum, origin, first + t, place(first, t))
                else:
                    value, gradient = objective.gradient(x, first + t)
                    if watch is not None:
                        watch(first + t, value, gradient)
                    if self.stop is not None and bool((done := value >= self.stop).any()):
                        finished[staying[done]] = x[done]
                        on = ~done
                        objective, staying, ids = objective.only(on), staying[on], ids[on]
                        x, origin, gradient, momentum = x[on], origin[on], gradient[on], momentum[on]
                        if len(x) == 0:
                            if progress is not None:
                                progress(total, total)
                            return finished
                    if self.keep == "best":
                        offer(x, value if objective.fixed else objective.value(x))
                    if schedule is not None:
                        x = schedule.step(x, value, gradient, t)
                    else:
                        gradient, momentum = self.accumulated(gradient, momentum)
                        x = self.ball.step(x, gradient, origin, **place(first, t))
                if visit is not None:
                    visit(x.detach())
                if progress is not None:
                    progress(first + t + 1, total)
            if compare:
                offer(x, objective.value(x))
        if len(staying) < len(finished):
            finished[staying] = x
            return finished
        return best if compare else x


class _Schedule:
    """The steps of Auto-PGD in one run: the step size of each image, and what decides when it halves."""

    _BLEND, _PROGRESS = 0.75, 0.75  # alpha and rho of the paper
    _FIRST, _SHORTER, _SHORTEST = 0.22, 0.03, 0.06  # between checkpoints, of the number of steps

    def __init__(self, ascent: Ascent, origin: Tensor) -> None:
        self._ball, self._origin = ascent.ball, origin
        self._size = origin.new_full((len(origin), 1, 1, 1), ascent.step_size)
        self._checkpoints = _checkpoints(ascent.steps, self._FIRST, self._SHORTER, self._SHORTEST)
        self._before: Tensor | None = None
        self._last = torch.full((len(origin),), torch.inf, device=origin.device)  # the first is no progress
        self._best = -self._last
        self._best_x, self._best_gradient = origin, origin
        self._rises = torch.zeros_like(self._last)
        self._since = 0  # the last checkpoint
        self._best_then, self._halved = self._best, torch.zeros_like(self._last, dtype=torch.bool)

    def step(self, x: Tensor, value: Tensor, gradient: Tensor, t: int) -> Tensor:
        """From ``x``, of which the value (N,) and the gradient are given, to the next point."""
        self._rises += value > self._last
        better = value > self._best
        self._best = torch.where(better, value, self._best)
        self._best_x, self._best_gradient = (
            _where(better, x, self._best_x),
            _where(better, gradient, self._best_gradient),
        )
        self._last = value
        if t in self._checkpoints:
            stalls = self._rises < self._PROGRESS * (t - self._since)
            stuck = ~self._halved & (self._best <= self._best_then)
            self._halved = stalls | stuck
            self._size = torch.where(self._halved.view(-1, 1, 1, 1), self._size / 2, self._size)
            x, gradient = _where(self._halved, self._best_x, x), _where(self._halved, self._best_gradient, gradient)
            self._last = torch.where(self._halved, self._best, self._last)
            self._rises = torch.zeros_like(self._rises)
            self._since, self._best_then = t, self._best
        moved = self._ball.project(x + self._size * self._ball.direction(gradient), self._origin)
        if self._before is not None:
            ahead = x + self._BLEND * (moved - x) + (1 - self._BLEND) * (x - self._before)
            moved = self._ball.project(ahead, self._origin)
        self._before = x
        return moved


def _where(rows: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(rows.view(-1, 1, 1, 1), a, b)


def _checkpoints(steps: int, first: float, shorter: float, shortest: float) -> frozenset[int]:
    """Before which steps step sizes may halve: the paper's fractions of the number of steps, rounded up."""
    places, previous, place = [], 0.0, first
    while place < 1:
        places.append(math.ceil(place * steps - 1e-9))
        previous, place = place, place + max(place - previous - shorter, shortest)
    return frozenset(places) - {0}


class _Unrolled(torch.autograd.Function):
    """One step: forward as always, backward through the same step with a relaxed derivative, run again."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        momentum: Tensor,
        origin: Tensor,
        ascent: Ascent,
        objective: Objective,
        slope: Callable[[Tensor, int], Tensor],
        t: int,
        place: Step,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, momentum, origin)
        ctx.rest = ascent, slope, t, place, ops.kept()
        moved, momentum = ascent.move(objective, x, momentum, origin, t, place)
        return moved, momentum.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor, momentum_upstream: Tensor) -> tuple[Tensor | None, ...]:
        ascent, slope, t, place, kept = ctx.rest
        with torch.enable_grad(), kept(), uncast(upstream):
            x, momentum, origin = (tensor.detach().requires_grad_() for tensor in ctx.saved_tensors)
            gradient, following = ascent.accumulated(slope(x, t), momentum)
            moved = ascent.ball.relaxed_step(x, gradient, origin, **place)
            outputs, given = [moved], [upstream]
            if following.grad_fn is not None:
                outputs, given = [moved, following], [upstream, momentum_upstream]
            gradients = torch.autograd.grad(outputs, (x, momentum, origin), given, allow_unused=True)
        return (*gradients, None, None, None, None, None)


def _unrolled(*arguments: Any) -> tuple[Tensor, Tensor]:
    x, momentum = _Unrolled.apply(*arguments)  # type: ignore[no-untyped-call, unused-ignore]
    return x, momentum


def _mean_normalized(gradient: Tensor) -> Tensor:
    gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    mean = row_sum(gradient.flatten(1).abs()) / gradient[0].numel()
    return gradient / torch.where(mean == 0, 1.0, mean).view(-1, 1, 1, 1)
