"""Rotations and translations as spatial attacks use them: what leaves the frame is lost, what enters is black.

The views of :mod:`equifast.views` tell the frame from what is outside it; here zeros stand outside, as in the spatial
attacks of Engstrom et al. 2019 and Yang et al. 2019, and blend with the image at its border.
"""

import math
from dataclasses import dataclass
from typing import Unpack

import torch
from torch import Tensor
from torch.nn import functional

from equifast import _checks, ops, reference
from equifast.balls import Linf, Step

__all__ = ["Box", "Grid", "matrices", "transform"]


def matrices(size: tuple[int, int], degrees: Tensor, right: Tensor, down: Tensor) -> Tensor:
    """The affine maps of rotations about the center, then translations.

    Args:
        size: (height, width) of the images, in pixels.
        degrees: (N,), counterclockwise.
        right, down: (N,), in pixels.

    Returns:
        (N, 2, 3) in the dtype of ``degrees``, as :func:`equifast.ops.warp` takes them; differentiable.
    """
    height, width = size
    angle = degrees * (math.pi / 180)
    cos, sin = angle.cos(), angle.sin()
    u, v = right * (2 / width), down * (2 / height)
    aspect = height / width
    across = torch.stack((cos, -aspect * sin, aspect * sin * v - cos * u), 1)
    upright = torch.stack((sin / aspect, cos, -sin / aspect * u - cos * v), 1)
    return torch.stack((across, upright), 1)


def transform(images: Tensor, parameters: Tensor, *, two_pass: bool = False) -> Tensor:
    """Rotate images about their centers, then translate them; bilinear, zeros outside.

    Equal to ``grid_sample(padding_mode="zeros", align_corners=False)``: the image gets a border of zeros one pixel
    wide, and outside of that a warp is zero.

    Args:
        images: (N, C, H, W), any float dtype.
        parameters: (N, 3), float32 or float64: degrees counterclockwise, and pixels to the right and down.
            Differentiable where they require a gradient (:func:`equifast.reference.warp`, slower than the native one).
        two_pass: whether the rotated image is resampled once more for the translation, as published code does, which
            blurs; else both are one resampling.

    Returns:
        (N, C, H, W).

    Raises:
        TypeError, ValueError: if dtypes or shapes are others.
    """
    if not isinstance(images, Tensor) or not images.is_floating_point() or images.dim() != 4:
        got = f"{_checks.shape(images)} of {images.dtype}" if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"images is {got}; it must be (N, C, H, W), floating point")
    if not isinstance(parameters, Tensor) or parameters.dtype not in (torch.float32, torch.float64):
        got = str(parameters.dtype) if isinstance(parameters, Tensor) else type(parameters).__name__
        raise TypeError(f"parameters is {got}; it must be a float32 or float64 tensor")
    if parameters.shape != (len(images), 3):
        raise ValueError(
            f"parameters has shape {_checks.shape(parameters)}; it must be ({len(images)}, 3): degrees, right and down"
        )
    _checks.same_device("parameters", parameters, "images", images)
    degrees, right, down = parameters.unbind(1)
    none = torch.zeros_like(degrees)
    passes = [(degrees, none, none), (none, right, down)] if two_pass else [(degrees, right, down)]
    warp = reference.warp if parameters.requires_grad and torch.is_grad_enabled() else ops.warp
    height, width = images.shape[2:]
    scale = [width / (width + 2), height / (height + 2)]
    border = torch.tensor(scale, dtype=parameters.dtype, device=parameters.device).view(2, 1)
    for each in passes:
        theta = matrices((height, width), *each) * border
        images = warp(functional.pad(images, (1, 1, 1, 1)), theta[None], [(height, width)])[0]
    return images


@dataclass(frozen=True)
class Grid:
    """The rotations and translations that a spatial adversary tries, evenly spaced.

    The default has the 775 points of Yang et al. 2019: rotations of -30 to 30 degrees in steps of 2, translations of -3
    to 3 pixels in steps of 1.5 in both directions.

    Args:
        degrees: the largest rotation, to either side.
        pixels: the largest translation, in each of the four directions.
        counts: how many rotations, translations across, and translations up and down; where it is 1, none but 0.
    """

    degrees: float = 30.0
    pixels: float = 3.0
    counts: tuple[int, int, int] = (31, 5, 5)

    def __post_init__(self) -> None:
        _checks.number("degrees", self.degrees, least=0, most=180)
        _checks.number("pixels", self.pixels, least=0)
        if not isinstance(self.counts, tuple) or len(self.counts) != 3:
            raise TypeError(f"counts is {self.counts!r}; it must be a tuple of three numbers")
        for count in self.counts:
            if not isinstance(count, int) or isinstance(count, bool) or count < 1:
                raise ValueError(f"counts is {self.counts!r}; every one must be at least 1, or the grid is empty")

    @property
    def bounds(self) -> tuple[float, float, float]:
        """The largest degrees, pixels to the right and pixels down."""
        return self.degrees, self.pixels, self.pixels

    def points(self) -> Tensor:
        """(P, 3) float64: degrees, right and down, those farthest from none at all first.

        Far is by parts of what is largest, of equals the first rotation, from left to right and from top to bottom.
        """
        axes = [
            torch.linspace(-most, most, count, dtype=torch.float64, device="cpu")
            if count > 1
            else torch.zeros(1, dtype=torch.float64, device="cpu")
            for most, count in zip(self.bounds, self.counts, strict=True)
        ]
        found = torch.cartesian_prod(*axes).view(-1, 3)
        largest = torch.tensor([most or 1.0 for most in self.bounds], dtype=torch.float64, device="cpu")
        far = (found / largest).square().sum(1)
        # rounded, so that points of one distance are equals
        return found[(far * 1e6).round().argsort(descending=True, stable=True)]


@dataclass(frozen=True)
class Box(Linf):
    """The unit cube of the numbers by which transforms are given, (N, 3, 1, 1), as the ball of an ascent.

    Args:
        eps: half of its side: 1/2.
        sizes: of a step of size 1 along each of the three.
    """

    sizes: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def step(self, x: Tensor, gradient: Tensor, origin: Tensor, **how: Unpack[Step]) -> Tensor:
        return self.project(x + how["size"] * self.direction(gradient), origin)

    def direction(self, gradient: Tensor) -> Tensor:
        return gradient.sign() * gradient.new_tensor(self.sizes).view(1, 3, 1, 1)
