"""The studies of the paper, on any model and data: defenses that differ in one setting."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from equifast import _checks, views
from equifast.defenses import Averaging, RandomNoise
from equifast.features import Features
from equifast.objectives import Agreement, Equivariance
from equifast.purifier import Defended, DefendedModel, Purifier
from equifast.reference import _cosine, _sample, invert, row_sum
from equifast.rng import Stream, uniform
from equifast.views import Sampled

__all__ = ["STUDIES", "Constrained", "Make", "Sweep", "nothing"]


@dataclass(frozen=True)
class Sweep:
    """Defenses that differ in one setting.

    Args:
        title: what is asked.
        defenses: the rows of the table, by name.
        label: what the numbers of ``places`` are.
        places: of each defense, where it stands on the axis of a plot; None where they are kinds and no numbers.
        score: whose similarity of the image that the model predicts from is recorded; None for none.
    """

    title: str
    defenses: Mapping[str, DefendedModel]
    label: str = ""
    places: Mapping[str, float] | None = None
    score: Purifier | None = None


class _Subset(Equivariance):
    """Equivariance at some positions of the image's features alone."""

    positions: int

    def columns(self, x: Tensor, sampled: Sequence[Sampled]) -> Tensor:
        anchor = self.anchor(x)
        anchor = anchor.to(torch.promote_types(anchor.dtype, torch.float32))
        size = (anchor.shape[2], anchor.shape[3])
        kept = self._kept(anchor)
        theta = torch.stack([view.theta for view in sampled])
        columns = []
        for image, inverse in zip(self.render(x, sampled), invert(theta), strict=True):
            back, overlap = _sample(self.features(image.clone()).to(anchor), inverse, size)
            a, b = (torch.where(kept & overlap, f, 0.0).flatten(1) for f in (anchor, back))
            columns.append(_cosine(row_sum(a * b), row_sum(a.square()), row_sum(b.square())))
        return torch.stack(columns, 1)

    def _kept(self, anchor: Tensor) -> Tensor:
        """(1, 1, H, W): the same positions for all images and steps."""
        area = anchor.shape[2] * anchor.shape[3]
        order = uniform(self._seed, Stream.DEFENSE, torch.zeros(1, dtype=torch.int64), 0, 0, area)[0].argsort()
        kept = torch.zeros(area, dtype=torch.bool)
        kept[order[: self.positions]] = True
        return kept.view(1, 1, *anchor.shape[2:]).to(anchor.device)

    def similarities(self, x: Tensor, t: int = 0, count: int | None = None) -> Tensor:
        return Agreement.similarities(self, x, t, count)

    def gradient(self, x: Tensor, t: int) -> tuple[Tensor, Tensor]:
        return Agreement.gradient(self, x, t)

    def slope(self, x: Tensor, t: int) -> Tensor:
        return Agreement.slope(self, x, t)


class Constrained(Purifier):
    """A purifier whose views must agree at some positions of the features alone (paper: Figure 3).

    Each position is a constraint on the image: with fewer of them an attacker has more room.

    Args:
        model, features, preset, eps, seed, settings: as for :class:`equifast.Purifier`, but for ``pairing``,
            ``view_gradient``, ``followed``, ``reduction`` and ``temperature``: the gradient is the whole one.
        positions: how many, drawn once for all images; at most all there are.
    """

    def __init__(self, *arguments: Any, positions: int, **settings: Any) -> None:
        super().__init__(*arguments, pairing="anchor", view_gradient=1.0, followed="all", reduction="image", **settings)
        self.positions = _checks.integer("positions", positions, 1, 2**31)

    def settings(self) -> dict[str, object]:
        return {**super().settings(), "positions": self.positions}

    def _agreement(self, features: Features, **rest: Any) -> Agreement:
        made = _Subset(features, self.views, pairing="anchor", view_gradient=1.0, reduction="image", **rest)
        made.positions = self.positions
        return made


@dataclass(frozen=True)
class Make:
    """A model, and the settings that a study changes one by one."""

    model: nn.Module
    features: Any
    preset: str
    eps: float
    seed: int

    def purifier(self, kind: type[Purifier] = Purifier, **settings: Any) -> Purifier:
        """A purifier of the chosen preset with settings of its own."""
        chosen: dict[str, Any] = {"preset": self.preset, "eps": self.eps, "seed": self.seed, **settings}
        return kind(self.model, self.features, **chosen)

    def __call__(self, kind: type[Purifier] = Purifier, **settings: Any) -> DefendedModel:
        """The same before the model."""
        return Defended(self.model, self.purifier(kind, **settings))

    def nothing(self) -> DefendedModel:
        """The model alone."""
        return Defended(self.model, nothing)


def nothing(x: Tensor, ids: Tensor | None = None, draw: int = 0) -> Tensor:
    """No defense."""
    return x.detach()


def _equivariance(make: Make) -> Sweep:
    rows = {
        "none": make.nothing(),
        "random": Defended(make.model, RandomNoise(make.eps, seed=make.seed)),
        **{preset: make(preset=preset) for preset in ("fast", "strong", "paper")},
    }
    return Sweep("similarity of clean, attacked and restored images (paper: Table 5)", rows, score=make.purifier())


def _cost(make: Make) -> Sweep:
    rows = {
        "none": make.nothing(),
        "averaging, mirror": Averaging(make.model, [views.Flip()], make.seed),
        "averaging": Averaging(make.model, seed=make.seed),
        **{preset: make(preset=preset) for preset in ("fast", "strong", "paper")},
        **{f"fast, views: {k}": make(preset="fast", views=views.fast()[:k]) for k in (1, 2, 3, 4)},
        **{f"fast, steps: {steps}": make(preset="fast", steps=steps) for steps in (1, 4, 8)},
    }
    return Sweep("time and memory (paper: Tables 4, 8 and 13)", rows)


def _views(make: Make) -> Sweep:
    eight = views.paper()
    ratio = (0.8, 1.2)
    sets: dict[str, Sequence[views.View]] = {
        "larger": [views.Resize(2.0, ratio)],
        "smaller": [views.Resize(0.3, ratio), views.Resize(0.5, ratio)],
        "colors": [eight[4]],
        "mirror": [eight[5]],
        "rotations": eight[6:],
        "all eight of the paper": eight,
        "the five of fast": views.fast(),
    }
    return Sweep("which views help (paper: Table 6)", {name: make(views=chosen) for name, chosen in sets.items()})


def _bounds(make: Make) -> Sweep:
    levels = {f"{round(255 * make.eps * part, 1):g}/255": part for part in (1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2)}
    rows = {name: make(eps=make.eps * part) for name, part in levels.items()}
    places = {name: 255 * make.eps * part for name, part in levels.items()}
    return Sweep("radius of the purification (paper: Table 7)", rows, "radius in levels of 255", places)


def _noise(make: Make) -> Sweep:
    plain: dict[str, Any] = {"preset": "paper", "start": "uniform"}
    return Sweep(
        "steps with noise and without (paper: Table 12)",
        {
            "20 steps of 2 eps, noise": make(**plain),
            "20 steps of 2 eps": make(**plain, noise=False),
            "20 steps of eps / 4, noise": make(**plain, step_size=make.eps / 4),
            "20 steps of eps / 4": make(**plain, step_size=make.eps / 4, noise=False),
            "fast": make(preset="fast"),
            "fast, noise": make(preset="fast", noise=True),
        },
    )


def _constraints(make: Make) -> Sweep:
    counts = [4**k for k in range(9)]
    rows = {str(count): make(kind=Constrained, positions=count) for count in counts}
    places = {str(count): float(count) for count in counts}
    return Sweep("number of constraints (paper: Figure 3)", rows, "positions that must agree", places)


STUDIES: Mapping[str, Callable[[Make], Sweep]] = {
    "equivariance": _equivariance,
    "views": _views,
    "bounds": _bounds,
    "noise": _noise,
    "constraints": _constraints,
    "cost": _cost,
}
