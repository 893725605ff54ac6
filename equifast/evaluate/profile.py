"""Profiles: how often a prediction stays what it is as images are turned further, or attacked harder.

Both are against the model's own prediction on the image itself, and not against a label (Kamath et al. 2020,
*Invariance vs. Robustness of Neural Networks*, section 2).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from equifast import _checks, rng
from equifast.ascent import Progress
from equifast.attacks import PGD, Attack
from equifast.evaluate.metrics import Estimate, average
from equifast.features import evaluating, output
from equifast.spatial import transform

__all__ = ["Rates", "invariance", "pgd", "robustness"]


@dataclass(frozen=True)
class Rates:
    """How often predictions stay, at several places.

    Args:
        what: ``"invariance"`` or ``"robustness"``.
        label: what the places are, with their unit.
        places: P of them, ascending.
        kept: (P, N) in [0, 1], how often that of each image stayed.
    """

    what: str
    label: str
    places: tuple[float, ...]
    kept: NDArray[np.float64]

    @property
    def estimates(self) -> list[Estimate]:
        """The rate at each place in percent, with its standard error by bootstrap over images."""
        return [average(row) for row in self.kept]


def _ascending(name: str, values: Sequence[float], most: float) -> tuple[float, ...]:
    if not isinstance(values, Sequence):
        raise TypeError(f"{name} is {values!r}; it must be a sequence of numbers, such as a tuple")
    if not values:
        raise ValueError(f"{name} is empty; it must have at least one number")
    for value in values:
        _checks.number(name, value, least=0, most=most)
    if list(values) != sorted(set(values)):
        raise ValueError(f"{name} is {tuple(values)}; its numbers must ascend")
    return tuple(map(float, values))


def _predicted(model: Callable[..., Any], images: Tensor, batch: int) -> Tensor:
    with torch.no_grad():
        found = torch.cat([output(model(part.clone())) for part in images.split(batch)])
    if found.dim() != 2:
        raise ValueError(f"model gave {_checks.shape(found)}; it must give logits (N, classes)")
    return found.argmax(1)


def invariance(
    model: Callable[..., Any],
    x: Tensor,
    *,
    degrees: Sequence[float] = (0, 15, 30, 45, 60, 75, 90, 105, 120, 135, 150, 165, 180),
    draws: int = 4,
    seed: int = 0,
    ids: Tensor | None = None,
    batch: int = 256,
    progress: Progress | None = None,
) -> Rates:
    """The rate of invariance over the range of random rotations.

    Args:
        model: images (N, C, H, W) in [0, 1] -> logits (N, classes).
        x: (N, C, H, W) in [0, 1], at least one image; what enters the frame as it turns is black.
        degrees: ranges: at each, angles are uniform from minus it to it; 180 at most, ascending. An image's random
            numbers are the same for every range.
        draws: rotations of each image at each range.
        seed: 0..2**32-1.
        ids: (N,) int64, by which images' random numbers differ; by their place where None.
        batch: how many images the model is given at once.
        progress: told how many ranges are done, and of how many.

    Raises:
        TypeError, ValueError: for arguments that cannot be.
    """
    x = _images(x)
    ranges = _ascending("degrees", degrees, 180)
    _checks.integer("draws", draws, 1, rng.MAX_DRAW)
    _checks.integer("batch", batch, 1, 2**20)
    _checks.integer("seed", seed, 0, 2**32 - 1)
    ids = torch.arange(len(x), device=x.device) if ids is None else _checks.ids(ids, len(x), x.device)
    kept = np.zeros((len(ranges), len(x)))
    with evaluating(x, model):
        own = _predicted(model, x, batch)
        for place, most in enumerate(ranges):
            for draw in range(draws):
                u = rng.uniform(seed, rng.Stream.START.of(3), ids, draw, 0, 1)
                parameters = torch.cat((most * (2 * u - 1), torch.zeros_like(u), torch.zeros_like(u)), 1)
                turned = transform(x, parameters).clamp(0, 1)
                kept[place] += (_predicted(model, turned, batch) == own).double().cpu().numpy() / draws
            if progress is not None:
                progress(place + 1, len(ranges))
    return Rates("invariance", "random rotations up to, degrees", ranges, kept)


def pgd(model: Callable[..., Any], eps: float) -> Attack:
    """PGD of 20 steps, each a tenth of the radius."""
    return PGD(model, eps=eps, step_size=eps / 10, steps=20)


def robustness(
    model: Callable[..., Any],
    x: Tensor,
    *,
    eps: Sequence[float],
    attack: Callable[[Callable[..., Any], float], Attack] = pgd,
    ids: Tensor | None = None,
    batch: int = 256,
    progress: Progress | None = None,
) -> Rates:
    """The rate of robustness over the radius of an attack: one minus the rate at which it fools.

    Args:
        model: images (N, C, H, W) in [0, 1] -> logits (N, classes).
        x: (N, C, H, W) in [0, 1], at least one image.
        eps: radii in units of image values, ascending; at 0 every prediction stays.
        attack: makes the attack of a model and a radius; what it shall change is the model's own prediction.
        ids: (N,) int64, by which images' random numbers differ; by their place where None.
        batch: how many images are attacked at once.
        progress: told how many radii are done, and of how many.

    Raises:
        TypeError, ValueError: for arguments that cannot be.
    """
    x = _images(x)
    radii = _ascending("eps", eps, 1)
    _checks.integer("batch", batch, 1, 2**20)
    if not callable(attack):
        raise TypeError(f"attack is a {type(attack).__name__}; it must make an attack of a model and a radius")
    ids = torch.arange(len(x), device=x.device) if ids is None else _checks.ids(ids, len(x), x.device)
    kept = np.ones((len(radii), len(x)))
    with evaluating(x, model):
        own = _predicted(model, x, batch)
    for place, radius in enumerate(radii):
        if radius:
            made = attack(model, radius)
            found = [made(*part) for part in zip(x.split(batch), own.split(batch), ids.split(batch), strict=True)]
            with evaluating(x, model):
                stays = _predicted(model, torch.cat(found), batch) == own
            kept[place] = stays.double().cpu().numpy()
        if progress is not None:
            progress(place + 1, len(radii))
    return Rates("robustness", "radius of the attack, in units of image values", radii, kept)


def _images(x: Tensor) -> Tensor:
    x = _checks.images("x", x)
    if len(x) == 0:
        raise ValueError("x has no images; a rate is of one at least")
    return x.detach()
