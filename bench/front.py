"""The speed-robustness front: every setting worth a look, each under attackers who know it, averaging beside it.

    python bench/front.py measure --data-set camvid --model standard --split val --output bench/results/front.json
    python bench/front.py seconds --output bench/results/front.json
    python bench/front.py plot bench/results/front.json docs/front.png

`measure` fills one part of the results, (data set, model, split), and keeps the others. It may be interrupted at any
time and goes on where it stopped. The attacks on each candidate: plain PGD on the model; the attack through averaging,
which anyone who fears averaging would run; the attack through averaging over the views that the candidate purifies
with, where these are others; BPDA through the candidate itself, with expectation over its draws; and with `--last K`
the same with a gradient through the last K steps of its ascent, which the published code, what purifies at half the
size and what has no ascent lack (it takes many times as long: `--last-steps` and `--last-eot` are its own). With
`--margin` all but the attack on the candidate's own views are there a second time, on the margin of the logits with
confidence 5 (CW) in place of the cross-entropy; with `--houdini STEPS` PGD, BPDA and the attacks through averaging and
through the ascent are there again with so many steps on the loss of Houdini, and with `--patient STEPS` all but that
through averaging with so many short steps on the margin, both as in the adaptive protocol. The worst case takes, image
by image, the attack that leaves fewest labels right, in the mean over the `--draws` of a defense that are judged.
Attacks take their gradients from a folded copy in bfloat16, where the hardware has it, which is as strong
(`bench/equivalence.py`); gradients through steps are in the purifier's dtype. Settings are chosen on `drives`, images
of three drives of CamVid's train split by a network that was trained on the others (or on `val`, which is one drive;
CIFAR-10: on images of its test set that no table uses), and reported on `test`.

`seconds` times all candidates in turns, in one process, each after an untimed call of its own; all predict as cheaply
as `--dtype` allows, averaging as what purifies, but the published code, which predicts in float32. Nothing else should
run beside it.
"""

import copy
import inspect
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import matplotlib.pyplot as plt
import numpy as np
import torch
import typer
from _data import DATA, load_camvid, load_cifar
from _published import Published
from _study import DEFENSE_SEED, HOUDINI, MARGIN, PATIENT, Cell, Data, Runner, Study, figure, paired
from _write import machine, versions, write_json
from camvid import judge as judge_dense
from camvid import network as camvid_network
from cifar import EPS, EPS_PURIFY
from cifar import judge as judge_classes
from cifar import network as cifar_network
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import equifast
from equifast import views
from equifast.defenses import Averaging, RandomNoise
from equifast.evaluate import accuracy, mean_iou
from equifast.features import Features
from equifast.purifier import DefendedModel

app = typer.Typer(add_completion=False, help=__doc__)

SIX = tuple(view for view in views.paper() if not view.enlarges)
FEWER = (*views.fast()[:2], views.fast()[4])
SMALLER_FIFTH = (*views.fast()[:4], views.Compose(views.fast()[4], views.Resize((0.3, 1.0), (0.8, 1.2), least=32)))
SETS: dict[str, tuple[views.View, ...]] = {
    "eight": views.paper(),
    "six": SIX,
    "same size": SIX[2:],
    "flip": (views.Flip(),),
    "flip and rotation": (views.Flip(), views.Rotation()),
    "enlarged": (views.Resize(2.0, (0.8, 1.2)),),
    "enlarged less": (views.Resize(1.5, (0.8, 1.2)),),
    "enlarged or shrunk": (views.Resize((1.3, 2.0), (0.8, 1.2)), views.Resize((0.3, 0.8), (0.8, 1.2))),
    "enlarged or turned": (views.Resize((1.3, 2.0), (0.8, 1.2)), views.Rotation()),
    "shifts": (views.Shift(0.1),) * 4,
    "jitter": (views.ColorJitter(),) * 4,
    "shrunk": SIX[:2],
    "shrunk and jitter": SIX[:3],
    "random sizes and jitter": (views.fast()[0], views.fast()[0], views.ColorJitter()),
    "flip and enlarged less": (views.Flip(), views.Resize(1.5, (0.8, 1.2))),
    "enlarged, mirrored": (views.Compose(views.Flip(), views.Resize(2.0, (0.8, 1.2))),),
    "pyramid": (
        views.Flip(),
        *(
            view
            for scale in (1.5, 2.0)
            for view in (views.Resize(scale, (0.8, 1.2)), views.Compose(views.Flip(), views.Resize(scale, (0.8, 1.2))))
        ),
    ),
}


class Draws(DefendedModel):
    """The mean prediction of a defended model over several of its draws."""

    def __init__(self, defended: nn.Module, count: int) -> None:
        super().__init__(defended)
        self.count = count

    def forward(self, x: Tensor, ids: Tensor | None = None, draw: int = 0) -> Tensor:
        parts = [self.model(x, ids=ids, draw=draw * self.count + i) for i in range(self.count)]
        return torch.stack(parts).mean(0)


class Halved:
    """Purifies at half the size, and adds what that changed, enlarged."""

    def __init__(self, purifier: equifast.Purifier) -> None:
        self.purifier = purifier

    def __call__(self, x: Tensor, ids: Tensor | None = None, draw: int = 0) -> Tensor:
        x = x.detach()
        small = F.interpolate(x, scale_factor=0.5, mode="bilinear", align_corners=False).clamp(0, 1)
        change = self.purifier(small, ids, draw) - small
        return (x + F.interpolate(change, x.shape[2:], mode="bilinear", align_corners=False)).clamp(0, 1)


# What candidates are made by: a study and settings to a defended model.


def nothing(study: Study) -> nn.Module:
    return equifast.Defended(study.model, lambda x, ids=None, draw=0: x.detach(), dtype=study.prediction_dtype)


def noise(study: Study, draws: int) -> nn.Module:
    """Predictions on noisy images, averaged."""
    noisy = RandomNoise(study.eps_purify, seed=DEFENSE_SEED)
    return Draws(equifast.Defended(study.model, noisy, dtype=study.prediction_dtype), draws)


def averaging(study: Study, sets: str, times: int = 1) -> nn.Module:
    return Averaging(study.model, SETS[sets] * times, seed=DEFENSE_SEED, dtype=study.prediction_dtype)


def published(study: Study, steps: int) -> nn.Module:
    """The yardstick; with fewer steps its last ones, which equal it (docs/corner.md)."""
    features = Features(copy.deepcopy(study.model).requires_grad_(True), study.features)
    return equifast.Defended(study.model, Published(features, study.eps_purify, DEFENSE_SEED, steps))


def purify(
    study: Study, radius: float = 1.0, sets: str | None = None, draws: int = 1, half: bool = False, **changed: Any
) -> nn.Module:
    """`fast` with settings changed; `radius` is relative to the study's ball, `relative_step` to that."""
    eps = study.eps_purify * radius
    settings: dict[str, Any] = {"features": study.features, **changed}
    if "relative_step" in settings:
        settings["step_size"] = settings.pop("relative_step") * eps
    if sets is not None:
        settings.setdefault("views_per_step", "all")
        settings["views"] = SETS[sets]
    purifier = equifast.Purifier(study.model, eps=eps, seed=DEFENSE_SEED, **settings)
    whole = Halved(purifier) if half else purifier
    defended = equifast.Defended(study.model, whole, dtype=study.prediction_dtype)
    return Draws(defended, draws) if draws > 1 else defended


# Images and mirror images, and the same at three quarters of the size.
TWO_SIZES = (views.Flip(), views.Resize(0.75), views.Compose(views.Flip(), views.Resize(0.75)))

Candidate = tuple[Callable[..., nn.Module], dict[str, Any]]


def steps(count: int = 4, of: float = 0.5, **settings: Any) -> Candidate:
    """Steps of some part of the radius, from a random corner, without momentum, over the six views."""
    plain = {"momentum": 0, "sets": "six", "average": False, "view_gradient": 1, "followed": "all"}
    return purify, {"steps": count, "relative_step": of, **plain, **settings}


def two(**settings: Any) -> Candidate:
    """Two steps of half the radius, from a random corner, over all five views of `fast`."""
    plain = {
        "steps": 2,
        "relative_step": 0.5,
        "momentum": 1.0,
        "views_per_step": "all",
        "followed": "all",
        "view_gradient": 0.15,
    }
    return purify, plain | settings


def smaller(**settings: Any) -> Candidate:
    """`strong` over the views of `fast`."""
    return purify, {"preset": "strong", "views": views.fast(), "views_per_step": 1, **settings}


def six_steps(**settings: Any) -> Candidate:
    """`fast` from the image, in six steps, with more of the gradient through views."""
    return purify, {"start": "origin", "view_gradient": 0.5, "steps": 6, "relative_step": 0.25, **settings}


CANDIDATES: dict[str, Candidate] = {
    "none": (nothing, {}),
    "noise, 8 draws": (noise, {"draws": 8}),
    "averaging, flip": (averaging, {"sets": "flip"}),
    "averaging, same size": (averaging, {"sets": "same size"}),
    "averaging, enlarged": (averaging, {"sets": "enlarged"}),
    "averaging, 4 x enlarged": (averaging, {"sets": "enlarged", "times": 4}),
    "averaging, six": (averaging, {"sets": "six"}),
    "averaging, eight": (averaging, {"sets": "eight"}),
    "averaging, 3 x six": (averaging, {"sets": "six", "times": 3}),
    "averaging, 2 x eight": (averaging, {"sets": "eight", "times": 2}),
    "averaging, 4 x eight": (averaging, {"sets": "eight", "times": 4}),
    "published, last two steps": (published, {"steps": 2}),
    "paper, last step": (purify, {"preset": "paper", "steps": 1, "start": "corner", "noise": False}),
    "paper, last step, anchor": (
        purify,
        {"preset": "paper", "steps": 1, "start": "corner", "noise": False, "pairing": "anchor"},
    ),
    "fast": (purify, {}),
    "strong": (purify, {"preset": "strong"}),
    "averaging, flip and enlarged less": (averaging, {"sets": "flip and enlarged less"}),
    "averaging, enlarged, mirrored": (averaging, {"sets": "enlarged, mirrored"}),
    "averaging, pyramid": (averaging, {"sets": "pyramid"}),
    "strong, from a corner": (purify, {"preset": "strong", "start": "corner"}),
    "strong, views of fast": smaller(),
    "strong, views of fast, 4 steps of 1/2": smaller(steps=4, relative_step=0.5),
    "strong, views of fast, 2 per step": smaller(views_per_step=2),
    "fast, from the image": (purify, {"start": "origin"}),
    "fast, from the image, view gradient 0.5": (purify, {"start": "origin", "view_gradient": 0.5}),
    "six steps from the image": six_steps(),
    "six steps from the image, view gradient 0.7": six_steps(view_gradient=0.7),
    "six steps from the image, no momentum": six_steps(momentum=0),
    "six steps from the image, 2 of eight": six_steps(sets="eight", views_per_step=2, followed=1),
    "six steps from the image, 2 of eight, no momentum": six_steps(
        sets="eight", views_per_step=2, followed=1, momentum=0
    ),
    "strong, then flip and enlarged less": (purify, {"preset": "strong", "average": SETS["flip and enlarged less"]}),
    "strong, then eight": (purify, {"preset": "strong", "average": SETS["eight"]}),
    "fast, five views": (purify, {"views_per_step": "all", "followed": 1}),
    "3 steps of 0.4, five views, one followed": two(steps=3, relative_step=0.4, followed=1, view_gradient=0.3),
    "2 steps of 1/2, five views, one followed": two(followed=1, view_gradient=0.3),
    "fast, all followed": (purify, {"followed": "all"}),
    "fast, momentum 1, view gradient 0.3": (purify, {"momentum": 1.0, "view_gradient": 0.3}),  # was `fast` before
    "fast, no momentum": (purify, {"momentum": 0}),
    "fast, momentum 0.3": (purify, {"momentum": 0.3}),
    "fast, momentum 0.7": (purify, {"momentum": 0.7}),
    "fast, view gradient 0.25": (purify, {"view_gradient": 0.25}),
    "fast, view gradient 0.3": (purify, {"view_gradient": 0.3}),
    "fast, 5 steps of 0.24, momentum 0.8": (purify, {"steps": 5, "relative_step": 0.24, "momentum": 0.8}),
    "fast, 6 steps of 0.2": (purify, {"steps": 6, "relative_step": 0.2}),
    "fast, steps of 0.3": (purify, {"relative_step": 0.3}),
    "fast, one prediction": (purify, {"average": False}),
    "fast, radius x 5/6": (purify, {"radius": 5 / 6}),
    "fast, averaging at 3/4 too": (purify, {"average": TWO_SIZES}),
    "fast, averaging at 3/4 too, radius x 5/6": (purify, {"average": TWO_SIZES, "radius": 5 / 6}),
    "six steps from the image, view gradient 0.7, averaging at 3/4 too": six_steps(
        view_gradient=0.7, average=TWO_SIZES
    ),
    "fast, then flip and enlarged less": (purify, {"average": (views.Flip(), *SETS["enlarged less"])}),
    "fast, palette 8": (purify, {"palette": 8}),
    "fast, view gradient 0.5": (purify, {"view_gradient": 0.5}),
    "two steps": two(),  # was `fast` before
    "two steps, one prediction": two(average=False),
    "two steps, steps of 0.35": two(relative_step=0.35),
    "two steps, steps of 0.65": two(relative_step=0.65),
    "two steps, steps of 0.75, radius x 2/3": two(relative_step=0.75, radius=2 / 3),
    "two steps, 1 step of 1": two(steps=1, relative_step=1.0),
    "two steps, 3 steps of 0.4": two(steps=3, relative_step=0.4),
    "two steps, no momentum": two(momentum=0),
    "two steps, from the image": two(start="origin"),
    "two steps, temperature 1": two(temperature=1.0),
    "two steps, temperature 2": two(temperature=2.0),
    "two steps, targets": two(view_gradient=0),
    "two steps, view gradient 0.1": two(view_gradient=0.1),
    "two steps, view gradient 0.3": two(view_gradient=0.3),
    "two steps, view gradient 0.5": two(view_gradient=0.5),
    "two steps, view gradient 1": two(view_gradient=1),
    "two steps, all pairs": two(pairing="all", view_gradient=1),
    "two steps, fifth view smaller": two(views=SMALLER_FIFTH),
    "two steps, fifth view smaller, temperature 2": two(views=SMALLER_FIFTH, temperature=2.0),
    "two steps, three views": two(views=FEWER),
    "two steps, three views, steps of 0.75": two(views=FEWER, relative_step=0.75),
    "two steps, three views, steps of 0.75, view gradient 1": two(
        views=FEWER, relative_step=0.75, view_gradient=1
    ),  # was `fast` before that
    "4 steps, momentum 1": steps(momentum=1.0),  # was `fast` at first
    "4 steps, 1 of eight, momentum 1": steps(sets="eight", views_per_step=1, momentum=1.0),
    "2 steps of 0.75, momentum 1": steps(2, 0.75, momentum=1.0),
    "2 steps of 0.75, shrunk, momentum 1": steps(2, 0.75, sets="shrunk", momentum=1.0),
    "2 steps of 0.75, shrunk and jitter, momentum 1": steps(2, 0.75, sets="shrunk and jitter", momentum=1.0),
    "2 steps of 0.75, random sizes and jitter, momentum 1": steps(
        2, 0.75, sets="random sizes and jitter", momentum=1.0
    ),
    "4 steps, shrunk": steps(sets="shrunk"),
    "1 step": steps(1, 2.0),
    "2 steps": steps(2, 0.75),
    "4 steps": steps(),
    "5 steps of 0.4": steps(5, 0.4),
    "8 steps": steps(8, 0.25),
    "8 steps, 2 of six": steps(8, 0.25, views_per_step=2),
    "8 steps, 2 of eight": steps(8, 0.25, sets="eight", views_per_step=2),
    "8 steps, 1 of eight": steps(8, 0.25, sets="eight", views_per_step=1),
    "8 steps, 1 of six": steps(8, 0.25, views_per_step=1),
    "8 steps, 1 of the same size": steps(8, 0.25, sets="same size", views_per_step=1),
    "8 steps, 1 of eight, from the image": steps(8, 0.25, sets="eight", views_per_step=1, start="origin"),
    "8 steps, 1 of eight, from the image, radius x 4/3": steps(
        8, 0.25, sets="eight", views_per_step=1, start="origin", radius=4 / 3
    ),
    "8 steps, enlarged, from the image": steps(8, 0.25, sets="enlarged", start="origin"),
    "8 steps, enlarged less, from the image": steps(8, 0.25, sets="enlarged less", start="origin"),
    "16 steps of 1/8, 1 of eight, from the image": steps(16, 0.125, sets="eight", views_per_step=1, start="origin"),
    "8 steps, 1 of eight, from the image, averaging": steps(
        8, 0.25, sets="eight", views_per_step=1, start="origin", average=True
    ),
    "8 steps, 1 of eight, from the image, radius x 4/3, then flip": steps(
        8, 0.25, sets="eight", views_per_step=1, start="origin", radius=4 / 3, average=(views.Flip(),)
    ),
    "4 steps, 1 of eight, from the image, then flip": steps(
        sets="eight", views_per_step=1, start="origin", average=(views.Flip(),)
    ),
    "4 steps, flip, from the image": steps(sets="flip", start="origin"),
    "4 steps, flip, from the image, then flip": steps(sets="flip", start="origin", average=(views.Flip(),)),
    "4 steps, 1 of six": steps(views_per_step=1),
    "4 steps, 2 of six": steps(views_per_step=2),
    "4 steps, 2 of six, momentum 1": steps(views_per_step=2, momentum=1.0),
    "8 steps, 1 of six, momentum 1": steps(8, 0.25, views_per_step=1, momentum=1.0),
    "8 steps, 1 of eight, momentum 0.5": steps(8, 0.25, sets="eight", views_per_step=1, momentum=0.5),
    "8 steps, 1 of eight, radius x 2/3": steps(8, 0.25, sets="eight", views_per_step=1, radius=2 / 3),
    "8 steps, 1 of eight, radius x 4/3": steps(8, 0.25, sets="eight", views_per_step=1, radius=4 / 3),
    "8 steps of 1/8, 1 of eight": steps(8, 0.125, sets="eight", views_per_step=1),
    "4 steps, 1 of eight": steps(sets="eight", views_per_step=1),
    "8 steps, enlarged": steps(8, 0.25, sets="enlarged"),
    "4 steps, enlarged": steps(sets="enlarged"),
    "8 steps, enlarged less": steps(8, 0.25, sets="enlarged less"),
    "8 steps, enlarged or shrunk": steps(8, 0.25, sets="enlarged or shrunk", views_per_step=1),
    "8 steps, enlarged or turned": steps(8, 0.25, sets="enlarged or turned", views_per_step=1),
    "4 steps, enlarged, radius x 4/3": steps(sets="enlarged", radius=4 / 3),
    "8 steps, enlarged, radius x 4/3": steps(8, 0.25, sets="enlarged", radius=4 / 3),
    "8 steps, 1 of eight, averaging": steps(8, 0.25, sets="eight", views_per_step=1, average=True),
    "8 steps, 2 of eight, radius x 4/3": steps(8, 0.25, sets="eight", views_per_step=2, radius=4 / 3),
    "16 steps of 1/8, 2 of eight": steps(16, 0.125, sets="eight", views_per_step=2),
    "16 steps of 1/8, 1 of eight": steps(16, 0.125, sets="eight", views_per_step=1),
    "8 steps, 2 of eight, averaging": steps(8, 0.25, sets="eight", views_per_step=2, average=True),
    "8 steps, 2 of eight, momentum 0.5": steps(8, 0.25, sets="eight", views_per_step=2, momentum=0.5),
    "4 steps, momentum 0.5": steps(momentum=0.5),
    "4 steps, from the image": steps(start="origin"),
    "4 steps, uniform start": steps(start="uniform"),
    "4 steps, noise": steps(noise=True),
    "4 steps, all pairs": steps(pairing="all"),
    "4 steps, each position": steps(reduction="pixel"),
    "4 steps, radius x 2/3": steps(radius=2 / 3),
    "4 steps, radius x 4/3": steps(radius=4 / 3),
    "4 steps, radius x 2": steps(radius=2),
    "4 steps, same size": steps(sets="same size"),
    "4 steps, flip": steps(sets="flip"),
    "4 steps, flip and rotation": steps(sets="flip and rotation"),
    "4 steps, shifts": steps(sets="shifts"),
    "4 steps, jitter": steps(sets="jitter"),
    "4 steps, half size": steps(half=True),
    "4 steps, 4 draws": steps(draws=4),
    "1 step, averaging": steps(1, 2.0, average=True),
    "4 steps, averaging": steps(average=True),
    "4 steps, averaging over eight": steps(average=True, sets="eight"),
    "4 steps, radius x 2/3, averaging": steps(radius=2 / 3, average=True),
    "4 steps, radius x 2, averaging": steps(radius=2, average=True),
}
FEATURES = {"camvid": ("head", "backbone.layer4"), "cifar": ("layer2", "layer1")}
YARDSTICK = "published, last two steps"
RIVAL = "averaging, eight"  # its own adaptive attack is tried on everyone
CHEAPEST = "averaging, flip"
ONCE = "one prediction in float32"  # of which the published code makes one


def candidates(data_set: str) -> dict[str, Candidate]:
    """Candidates by name; those for the places of a data set's network among them."""
    return CANDIDATES | {f"4 steps, features {where}": steps(features=where) for where in FEATURES[data_set]}


def _chosen(known: Mapping[str, Candidate], only: Sequence[str] | None, *always: str) -> dict[str, Candidate]:
    for name in only or ():
        if name not in known:
            raise SystemExit(f"--only is {name!r}; it must be one of {', '.join(known)}")
    return {name: known[name] for name in (*always, *(only or known))}


def build(study: Study, candidate: Candidate) -> nn.Module:
    maker, settings = candidate
    return maker(study, **settings)


UNROLLED, AVERAGED = " (unrolled)", " (averaged)"
ATTACKS = ("PGD", "averaging", "own views", "BPDA", "unrolled")


def unrolled(study: Study, candidate: Candidate, last: int) -> nn.Module | None:
    """The candidate with a gradient through the last steps of its ascent, where it has one that we can take."""
    defended = build(study, candidate)
    if isinstance(defended, Draws):
        inner = _through(study, defended.model, last)
        return None if inner is None else Draws(inner, defended.count)
    return _through(study, defended, last)


def _through(study: Study, defended: nn.Module, last: int) -> nn.Module | None:
    purifier = getattr(defended, "purifier", None)
    if not isinstance(purifier, equifast.Purifier) or purifier.ascent.steps == 0:
        return None
    return equifast.Defended(study.model, purifier, gradient="unrolled", last=min(last, purifier.ascent.steps))


def averaged(study: Study, candidate: Candidate) -> nn.Module | None:
    """Averaging over the views that a candidate purifies with, where it does and these are not those of `RIVAL`."""
    defended = build(study, candidate)
    chosen = _views(defended)
    return None if chosen in ((), SETS["eight"]) else Averaging(study.model, chosen, seed=DEFENSE_SEED)


def _views(defended: nn.Module) -> tuple[views.View, ...]:
    purifier = getattr(defended.model if isinstance(defended, Draws) else defended, "purifier", None)
    purifier = purifier.purifier if isinstance(purifier, Halved) else purifier
    return purifier.views if isinstance(purifier, equifast.Purifier) else ()


def _defense(study: Study, known: Mapping[str, Candidate], name: str, last: int) -> nn.Module:
    if name.endswith(AVERAGED):
        defended = averaged(study, known[name.removesuffix(AVERAGED)])
        assert defended is not None
        return defended
    if not name.endswith(UNROLLED):
        return build(study, known[name])
    defended = unrolled(study, known[name.removesuffix(UNROLLED)], last)
    assert defended is not None
    return defended


def _identity(study: Study, known: Mapping[str, Candidate], name: str, followed: tuple[int, int, int]) -> str:
    if name.endswith(AVERAGED):
        return repr(("averaged", _views(build(study, known[name.removesuffix(AVERAGED)]))))
    maker, settings = known[name.removesuffix(UNROLLED)]
    sets = SETS.get(str(settings.get("sets")))  # those of presets are in the fingerprint, with the package
    sources = [inspect.getsource(part) for part in (maker, Draws, Halved)]  # not of what only prints and plots
    return repr((maker.__name__, settings, sets, sources, followed if name.endswith(UNROLLED) else 0))


class DataSet(StrEnum):
    camvid = "camvid"
    cifar = "cifar"


class Training(StrEnum):
    standard = "standard"
    robust = "robust"


class Split(StrEnum):
    val = "val"
    drives = "drives"
    test = "test"


def camvid(data: Path, training: str, split: str, images: int | None) -> dict[str, Any]:
    model = camvid_network(data, training == "robust", "rest" if split == "drives" else "train")
    x, y = load_camvid(data, split, images or 24)
    return {
        "figure": "mIoU in %",
        "model": model,
        "images": x,
        "labels": y,
        "judge": judge_dense,
        "estimate": mean_iou,
        "batch": 4,
        "eps": 4 / 255,
        "step_size": 1 / 255,
        "eps_purify": 6 / 255,
    }


def cifar(data: Path, training: str, split: str, images: int | None) -> dict[str, Any]:
    if split == "drives":
        raise SystemExit("--split is 'drives', which are CamVid's; of cifar it must be val or test")
    robust = training == "robust"
    model, eps = cifar_network(data, robust), EPS[robust]
    x, y = load_cifar(data, "test")
    chosen = np.linspace(0, len(y) - 1, 512).round().astype(int)  # those of bench/cifar.py
    pool = chosen if split == "test" else np.setdiff1d(np.arange(len(y)), chosen)
    pool = pool[np.linspace(0, len(pool) - 1, min(images or 256, len(pool))).round().astype(int)]
    return {
        "figure": "accuracy in %",
        "model": model,
        "images": x[pool],
        "labels": y[pool],
        "judge": judge_classes,
        "estimate": accuracy,
        "batch": 64,
        "features": "layer3",
        "eps": eps,
        "step_size": eps / 4,
        "eps_purify": EPS_PURIFY[robust],
    }


def study_of(data_set: str, data: Path, training: str, split: str, images: int | None, **attacks: int) -> Study:
    parts = {"camvid": camvid, "cifar": cifar}[data_set](data, training, split, images)
    name = f"front-{data_set}-{training}-{split}"
    return Study(name=name, slow_images=0, attack_dtype="auto", **parts, **attacks)


def worst(cells: Sequence[Cell]) -> Cell:
    """Of each image, the result under the attack that leaves fewest labels right."""
    results = np.stack([cell.results for cell in cells])
    right = np.trace(results, axis1=-2, axis2=-1) if results.ndim == 4 else results
    return Cell(results[right.argmin(0), np.arange(results.shape[1])], cells[0].indices, cells[0].seconds)


@app.command()
def measure(
    data: Data = DATA,
    data_set: Annotated[DataSet, typer.Option(help="What is attacked.")] = DataSet.camvid,
    model: Annotated[Training, typer.Option(help="How the network was trained.")] = Training.standard,
    split: Annotated[Split, typer.Option(help="On which images.")] = Split.val,
    images: Annotated[int | None, typer.Option(help="Number of images; 24, of CIFAR-10 256.")] = None,
    steps: Annotated[int, typer.Option(help="Steps of PGD.")] = 30,
    bpda_steps: Annotated[int, typer.Option(help="Steps of BPDA and through averaging; 0 for neither.")] = 10,
    eot: Annotated[int, typer.Option(help="Draws per step of BPDA.")] = 1,
    last: Annotated[int, typer.Option(help="Also attack through so many steps of the ascent.")] = 0,
    last_steps: Annotated[int, typer.Option(help="Steps of that attack; 0 for none.")] = 10,
    last_eot: Annotated[int, typer.Option(help="Draws per step of that attack.")] = 1,
    margin: Annotated[bool, typer.Option(help="Also attack on the margin.")] = False,
    houdini: Annotated[int, typer.Option(help="Also attack on Houdini's loss in so many steps; 0 for none.")] = 0,
    patient: Annotated[int, typer.Option(help="Also attack on the margin in so many short steps; 0 for none.")] = 0,
    draws: Annotated[int, typer.Option(help="Draws of each candidate that are judged.")] = 1,
    only: Annotated[list[str] | None, typer.Option(help="Candidates, by name; all where not given.")] = None,
    output: Annotated[Path | None, typer.Option(help="The JSON to which the results are added.")] = None,
) -> None:
    """Clean, under PGD, under the attack through averaging, under BPDA, and the worst case of each candidate."""
    equifast.keep_freed_memory()
    equifast.keep_kernels()
    study = study_of(
        data_set.value, data, model.value, split.value, images, steps=steps, bpda_steps=bpda_steps, eot=eot
    )
    known = candidates(data_set.value)
    chosen = list(_chosen(known, only, "none", RIVAL, CHEAPEST))
    key = f"{data_set.value}, {model.value}, {split.value}"
    console, found = Console(), {}
    cells: dict[str, dict[str, Cell]] = {}
    with Progress(console=Console(stderr=True), transient=True) as progress:
        runner = Runner(
            study,
            lambda name: _defense(study, known, name, last),
            progress,
            lambda name: _identity(study, known, name, (last, last_steps, last_eot)),
            lambda name: (last_steps, last_eot) if name.endswith(UNROLLED) else (bpda_steps, eot),
            houdini,
            patient,
            draws,
        )
        task = progress.add_task(key, total=len(chosen))
        for name in chosen:
            victims = {"clean": None, "PGD": "none"}
            follows = last > 0 and unrolled(study, known[name], last) is not None
            own = {"PGD": "none", "BPDA": name} | ({"unrolled": name + UNROLLED} if follows else {})
            if bpda_steps > 0:
                victims |= {"averaging": RIVAL, "BPDA": name}
            if follows and last_steps > 0:
                victims["unrolled"] = name + UNROLLED
            if bpda_steps > 0 and averaged(study, known[name]) is not None:
                victims["own views"] = name + AVERAGED
            if margin:
                victims |= {f"{c}, margin": v + MARGIN for c, v in victims.items() if v and c != "own views"}
            if houdini:
                victims |= {f"{c}, Houdini": v + HOUDINI for c, v in (own | {"averaging": RIVAL}).items()}
            if patient:
                victims |= {f"{c}, patient": v + PATIENT for c, v in own.items()}
            row = {column: runner.cell(name, victim) for column, victim in victims.items()}
            row["worst"] = worst(list(row.values()))  # the image itself lies in the ball too
            cells[name] = row
            found[name] = {column: figure(study, cell) for column, cell in row.items()}
            for other, reference in (
                ("none", "none"),
                ("averaging", RIVAL),
                (CHEAPEST, CHEAPEST),
                ("fast", "fast"),
                ("published", YARDSTICK),
            ):
                against = cells.get(reference, {})
                found[name][f"minus {other}"] = {
                    column: paired(cell, against[column]) for column, cell in row.items() if column in against
                }
            progress.update(task, advance=1)
            if output is not None:
                settings = study.settings() | {
                    "last": last,
                    "last_steps": last_steps,
                    "last_eot": last_eot,
                    "margin": margin,
                    "houdini": houdini,
                    "patient": patient,
                    "draws": draws,
                }
                _merge(output, key, {"candidates": found, "settings": settings})
            line = ", ".join(f"{column} {e['value']:.1f} ± {e['error']:.1f}" for column, e in _figures(found[name]))
            console.print(f"{name}: {line}")
            if apart := found[name]["minus published"]:
                line = ", ".join(f"{column} {e['value']:+.1f} ± {e['error']:.1f}" for column, e in apart.items())
                console.print(f"{name} minus published: {line}")
    table = Table(title=f"{key}: {study.figure}, {len(study.images)} images, ± standard error; differences are paired")
    columns = [
        c
        for c in ("clean", *(p + m for m in ("", ", margin", ", Houdini", ", patient") for p in ATTACKS), "worst")
        if any(c in r for r in cells.values())
    ]
    for heading in ("", *columns, "worst - none", "worst - averaging"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, entry in sorted(found.items(), key=lambda item: -item[1]["worst"]["value"]):
        apart = [entry.get(f"minus {other}", {}).get("worst") for other in ("none", "averaging")]
        figures = [*(entry.get(column) for column in columns), *apart]
        table.add_row(name, *("" if e is None else f"{e['value']:.1f} ± {e['error']:.1f}" for e in figures))
    console.print(table)


def _figures(entry: Mapping[str, Any]) -> list[tuple[str, Mapping[str, float]]]:
    return [(column, value) for column, value in entry.items() if not column.startswith("minus")]


def _merge(output: Path, key: str, part: Mapping[str, Any]) -> None:
    document = json.loads(output.read_text()) if output.exists() else {}
    # parts may be of several machines
    own = {**document.get(key, {}), **part, "versions": versions(), "machine": machine()}
    write_json(output, {**document, key: own})


@app.command()
def seconds(
    data: Data = DATA,
    data_set: Annotated[DataSet, typer.Option(help="What is purified.")] = DataSet.camvid,
    rounds: Annotated[int, typer.Option(help="How often each candidate is timed.")] = 5,
    dtype: Annotated[str, typer.Option(help="Of all predictions but those of the published code.")] = "auto",
    only: Annotated[list[str] | None, typer.Option(help="Candidates, by name; all where not given.")] = None,
    output: Annotated[Path | None, typer.Option(help="The JSON to which the results are added.")] = None,
) -> None:
    """Seconds per image and image passes (a forward and a backward pass are one, a forward pass a half)."""
    equifast.keep_freed_memory()
    exact = study_of(data_set.value, data, "standard", "val", None)
    study = replace(exact, prediction_dtype=dtype)
    x = study.images[: study.batch]
    defenses: dict[str, nn.Module] = {}
    passes: dict[str, float] = {}
    for name, candidate in _chosen(candidates(data_set.value), only, "none", YARDSTICK).items():
        passes[name] = _passes(exact, candidate, x)
        defenses[name] = build(study, candidate)
    defenses[ONCE] = nothing(exact)
    timed: dict[str, list[float]] = {name: [] for name in defenses}
    with torch.no_grad(), Progress(console=Console(stderr=True), transient=True) as progress:
        for _ in progress.track(range(rounds)):
            for name, defended in defenses.items():
                defended(x)  # lest it pay for the memory that the one before it gave back
                start = time.perf_counter()
                defended(x)
                timed[name].append(time.perf_counter() - start)
    # 20 equal steps, of which two are timed, and one prediction
    once, two = (statistics.median(timed.pop(name) if name == ONCE else timed[name]) for name in (ONCE, YARDSTICK))
    yardstick = 10 * (two - once) + once
    timed["published"] = [yardstick]
    passes["published"] = 10 * (passes[YARDSTICK] - passes["none"]) + passes["none"]
    found = {
        name: {
            "seconds": statistics.median(times) / len(x),
            "passes": passes[name],
            "speed": yardstick / statistics.median(times),
        }
        for name, times in timed.items()
    }
    table = Table(title=f"{data_set.value}, {len(x)} images, one process, medians of {rounds}")
    for heading in ("", "ms/image", "image passes", "times published"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, entry in sorted(found.items(), key=lambda item: item[1]["seconds"]):
        table.add_row(name, f"{1e3 * entry['seconds']:.0f}", f"{entry['passes']:.1f}", f"{entry['speed']:.1f}")
    Console().print(table)
    if output is not None:
        _merge(
            output,
            f"{data_set.value}, cost",
            {"candidates": found, "settings": {"images": len(x), "rounds": rounds, "prediction_dtype": dtype}},
        )


def _passes(study: Study, candidate: Candidate, x: Tensor) -> float:
    """Image passes of one prediction, per image."""
    total = 0.0

    def count(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal total
        both = torch.is_grad_enabled() and inputs[0].requires_grad
        total += inputs[0].numel() / x.numel() * (1 if both else 0.5)

    handle = study.model.register_forward_pre_hook(count)  # a model with hooks is not folded: the same passes
    try:
        with torch.no_grad():
            build(study, candidate)(x)
    finally:
        handle.remove()
    return total


def _family(name: str) -> str:
    if name.startswith(("averaging", "noise")):
        return "averaging"
    if name == "none":
        return "none"
    averaged = "averaging" in name or "then" in name or name.startswith(("strong", "fast", "two steps"))
    averaged = averaged and not name.endswith("one prediction")
    return "purified, averaged" if averaged else "purified"


@app.command()
def plot(
    results: Annotated[Path, typer.Argument(help="The JSON that the other commands wrote.")],
    picture: Annotated[Path, typer.Argument(help="Where the plot goes (.png, .svg, .pdf).")],
    split: Annotated[Split, typer.Option(help="On which images.")] = Split.val,
) -> None:
    """The worst case, and clean performance beside it, against seconds per image."""
    document = json.loads(results.read_text())
    panels = [
        (d.value, m.value) for d in DataSet for m in Training if f"{d.value}, {m.value}, {split.value}" in document
    ]
    if not panels:
        raise SystemExit(f"{results} has nothing of the split {split.value}")
    figures, rows = plt.subplots(len(panels), 2, figsize=(11, 3.6 * len(panels)), squeeze=False)
    colors = {"none": "black", "averaging": "tab:orange", "purified": "tab:blue", "purified, averaged": "tab:green"}
    for (data_set, training), axes in zip(panels, rows, strict=True):
        found = document[f"{data_set}, {training}, {split.value}"]["candidates"]
        cost = document[f"{data_set}, cost"]["candidates"]
        for column, axis in zip(("worst", "clean"), axes, strict=True):
            for family, color in colors.items():
                names = [name for name in found if _family(name) == family and name in cost]
                points = [(cost[name]["seconds"], found[name][column]) for name in names]
                axis.errorbar(
                    [1e3 * x for x, _ in points],
                    [y["value"] for _, y in points],
                    [y["error"] for _, y in points],
                    fmt="o",
                    color=color,
                    alpha=0.7,
                    label=family,
                )
                for name, (x, y) in zip(names, points, strict=True):
                    place = (1e3 * x, y["value"])
                    axis.annotate(name, place, fontsize=7, xytext=(4, 4), textcoords="offset points")
            figure = "mIoU" if data_set == "camvid" else "accuracy"
            where = f"{data_set}, {training} training, {split.value}"
            what = f"{figure} in %, {'worst case' if column == 'worst' else column}"
            axis.set(xscale="log", xlabel="ms/image", ylabel=what, title=where)
            axis.set_ylim(0, 1.15 * axis.get_ylim()[1])
            axis.margins(x=0.2)
            axis.grid(alpha=0.3)
        axes[0].legend()
    figures.tight_layout()
    beside = picture.with_name(f"{picture.stem}.partial{picture.suffix}")
    figures.savefig(beside, dpi=80)
    beside.replace(picture)


if __name__ == "__main__":
    app()
