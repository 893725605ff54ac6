"""The balls that an ascent stays in: where it starts, how it steps, how it is projected."""

import math
from dataclasses import dataclass
from typing import TypedDict, Unpack

import torch
from torch import Tensor

from equifast import _checks, ops, rng
from equifast.reference import noisy, row_sum, unit

__all__ = ["L2", "STARTS", "Ball", "Linf", "Step", "make"]

STARTS = ("origin", "uniform", "corner")


class Step(TypedDict):
    """Which step: its length, the noise on its direction, and the random numbers of that (:mod:`equifast.rng`).

    In an L-infinity ball, 0-d tensors where the images are will do for all numbers.
    """

    size: float
    sigma: float | Tensor
    seed: int | Tensor
    ids: Tensor
    draw: int | Tensor
    t: int | Tensor


@dataclass(frozen=True)
class Ball:
    """All images in [0, 1] within ``eps`` of an image, in the norm that the subclass names."""

    eps: float

    def __post_init__(self) -> None:
        _checks.number("eps", self.eps, above=0)

    def start(
        self, origin: Tensor, kind: str, *, seed: int, ids: Tensor, draw: int, step: int, stream: int = rng.Stream.START
    ) -> Tensor:
        """A first point, (N, C, H, W): the origin, uniform in the ball, or uniform on its corners (L2: its surface)."""
        if kind == "origin" or origin.numel() == 0:
            return origin.clone()
        offset = self._offset(origin, kind, (seed, stream, ids, draw, step))
        return self.project(origin + offset.to(torch.promote_types(origin.dtype, torch.float32)), origin).to(
            origin.dtype
        )

    def _offset(self, origin: Tensor, kind: str, place: tuple[int, int, Tensor, int, int]) -> Tensor:
        raise NotImplementedError

    def step(self, x: Tensor, gradient: Tensor, origin: Tensor, **how: Unpack[Step]) -> Tensor:
        """One step of steepest ascent, and its projection."""
        raise NotImplementedError

    def direction(self, gradient: Tensor) -> Tensor:
        """The direction of steepest ascent, (N, C, H, W) -> a step of size 1."""
        raise NotImplementedError

    def relaxed_step(self, x: Tensor, gradient: Tensor, origin: Tensor, **how: Unpack[Step]) -> Tensor:
        """The same point as :meth:`step`, with a derivative by all three tensors, where that has none a relaxed one."""
        return self.step(x, gradient, origin, **how)

    def project(self, x: Tensor, origin: Tensor) -> Tensor:
        """The projection on the ball and on [0, 1]."""
        raise NotImplementedError


@dataclass(frozen=True)
class Linf(Ball):
    """Every value within ``eps``, at most 1; steps are sign steps (:func:`equifast.ops.signed_step`)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eps > 1:
            raise ValueError(f"eps is {self.eps!r}; it must be at most 1, as images lie in [0, 1]: 6/255 rather than 6")

    def _offset(self, origin: Tensor, kind: str, place: tuple[int, int, Tensor, int, int]) -> Tensor:
        u = rng.uniform(*place, origin[0].numel()).view(origin.shape)
        return self.eps * (torch.where(u < 0.5, -1.0, 1.0) if kind == "corner" else 2 * u - 1)

    def step(self, x: Tensor, gradient: Tensor, origin: Tensor, **how: Unpack[Step]) -> Tensor:
        noise = how["sigma"], how["seed"], how["ids"], how["draw"], how["t"]
        return ops.signed_step(x, gradient, origin, self.eps, how["size"], *noise)

    def direction(self, gradient: Tensor) -> Tensor:
        return gradient.sign()

    def relaxed_step(self, x: Tensor, gradient: Tensor, origin: Tensor, **how: Unpack[Step]) -> Tensor:
        """The derivative of the sign is that of a tanh, of values over their mean magnitude in the image."""
        direction = noisy(gradient, how["sigma"], how["seed"], how["ids"], how["draw"], how["t"])
        mean = row_sum(direction.detach().flatten(1).abs()) / direction[0].numel()
        soft = (direction / torch.where(mean == 0, 1.0, mean).view(-1, 1, 1, 1)).tanh()
        return self.project(x + how["size"] * (soft + (direction.sign() - soft).detach()), origin)

    def project(self, x: Tensor, origin: Tensor) -> Tensor:
        return x.clamp(origin - self.eps, origin + self.eps).clamp(0, 1)


@dataclass(frozen=True)
class L2(Ball):
    """Euclidean distance within ``eps``; steps are along the gradient at unit length."""

    def _offset(self, origin: Tensor, kind: str, place: tuple[int, int, Tensor, int, int]) -> Tensor:
        count = origin[0].numel()
        normal = rng.normal(*place, count + 1)
        direction = unit(normal[:, :count]).view(origin.shape)
        radius = torch.ones(len(origin), 1, 1, 1, dtype=torch.float64, device=origin.device)
        if kind == "uniform":
            # the normal left over, through its distribution function, is one more uniform number
            u = 0.5 * (1 + torch.erf(normal[:, count] / math.sqrt(2)))
            radius = (u ** (1 / count)).view(-1, 1, 1, 1)
        return self.eps * radius * direction

    def step(self, x: Tensor, gradient: Tensor, origin: Tensor, **how: Unpack[Step]) -> Tensor:
        if x.numel() == 0:
            return x.clone()
        direction, sigma = self.direction(gradient), how["sigma"]
        if isinstance(sigma, Tensor) or sigma > 0:  # a tensor while steps are captured, which look at no values
            noise = rng.normal(how["seed"], rng.Stream.NOISE, how["ids"], how["draw"], how["t"], x[0].numel())
            noisy = unit(direction + sigma * unit(noise).view(x.shape).to(direction.dtype))
            direction = torch.where(sigma > 0, noisy, direction) if isinstance(sigma, Tensor) else noisy
        return self.project(x.to(direction.dtype) + how["size"] * direction, origin)

    def direction(self, gradient: Tensor) -> Tensor:
        return unit(gradient.to(_wide(gradient)))  # squares and their sums leave half precision

    def project(self, x: Tensor, origin: Tensor) -> Tensor:
        center = origin.to(_wide(origin))
        delta = x.to(center.dtype) - center
        squares = row_sum(delta.flatten(1).square()).view(-1, 1, 1, 1)
        # the square root of 0 has no derivative
        norm = torch.where(squares == 0, 0.0, torch.where(squares == 0, 1.0, squares).sqrt())
        # clamping to [0, 1], a convex set that holds the origin, brings no point farther from it
        return (center + delta * (self.eps / norm.clamp(min=self.eps))).clamp(0, 1).to(origin.dtype)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def make(norm: str, eps: float) -> Ball:
    """The ball of a norm, ``"linf"`` or ``"l2"``."""
    return {"linf": Linf, "l2": L2}[_checks.choice("norm", norm, ("linf", "l2"))](eps)
