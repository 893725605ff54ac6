"""Training: one plain loop, in which what an image is compared with, and by what, are settings.

Ordinary, on augmented images, against attacks, and with the invariance-inducing regularizers of Yang et al. 2019
(*Invariance-inducing regularization using worst-case transformations suffices to boost accuracy and spatial
robustness*), which penalize by how much a prediction changes from an image to its transform.
"""

import dataclasses
import functools
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, RandomSampler

from equifast import _checks
from equifast._cheap import DTYPES, autocast
from equifast._files import replacing
from equifast.ascent import Progress
from equifast.attacks import Attack
from equifast.features import evaluating, output
from equifast.objectives import check_labels, divergence
from equifast.spatial import Grid, transform

__all__ = ["Recipe", "crop_and_flip", "rotate_and_shift", "train"]

Augment = Callable[[Tensor, torch.Generator], Tensor]
"""Images (N, C, H, W) and where random numbers come from -> images of the same shape."""

# what the published code multiplies the regularizers by
_WEIGHTS = {"kl": 8.0, "l2": 1.0}


def crop_and_flip(images: Tensor, generator: torch.Generator, *, pixels: int = 4) -> Tensor:
    """Each image shifted by up to some pixels in both directions, black where it enters, and half of them mirrored."""
    n, _, height, width = images.shape
    padded = functional.pad(images, (pixels, pixels, pixels, pixels))
    corners = torch.randint(0, 2 * pixels + 1, (n, 2), generator=generator).to(images.device)
    rows, columns = (corners[:, i, None] + torch.arange(s, device=images.device) for i, s in ((0, height), (1, width)))
    every = torch.arange(n, device=images.device)[:, None, None]
    crops = padded[every, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    flips = (torch.rand(n, generator=generator) < 0.5).to(images.device)
    return torch.where(flips.view(-1, 1, 1, 1), crops.flip(-1), crops).contiguous()


def rotate_and_shift(images: Tensor, generator: torch.Generator, *, grid: Grid | None = None) -> Tensor:
    """Each image rotated and shifted by chance, uniform in the bounds of a grid, black where it enters.

    The bounds are those of :class:`equifast.spatial.Grid` as it is, 30 degrees and 3 pixels, where none is given.
    """
    grid = Grid() if grid is None else grid
    drawn = 2 * torch.rand((len(images), 3), generator=generator, dtype=torch.float64) - 1
    parameters = drawn * torch.tensor(grid.bounds, dtype=torch.float64)
    return transform(images, parameters.to(images.device)).clamp(0, 1)


@dataclass(frozen=True)
class Recipe:
    """What a network learns from an image ``x`` with label ``y``, and from ``x~``, which is made of it.

    The loss is ``cross-entropy + weight * h(f(x), f(x~))``; the first is the mean over ``x``, over ``x~``, or over
    both. Nothing is made that does not count.

    Args:
        augment: what happens to every image first, such as :func:`crop_and_flip`; None for nothing. Labels stay, so
            that with dense ones this and ``transform`` must leave pixels where they are.
        transform: makes ``x~`` by chance, such as :func:`rotate_and_shift`.
        adversary: makes ``x~`` by an attack: a class of :mod:`equifast.attacks` with its settings
            (``functools.partial(attacks.Spatial, search="worst-of-k")``), which is given the model, in eval mode, and a
            fresh seed at every step. Without both there is no ``x~``.
        regularizer: h: ``"kl"``, the divergence of the probabilities for ``x~`` from those for ``x``, or ``"l2"``, a
            quarter of the squared distance of logits; None for none (Yang et al. 2019, section 3, and its released
            code, which gives the mean over images of both; gradients go through both predictions).
        weight: lambda; 8 for ``"kl"`` and 1 for ``"l2"`` where None, as published.
        on: what cross-entropy counts: ``"clean"``, ``"transformed"`` or ``"both"``; None: both with a regularizer, else
            what there is.
        ignore_index: the dense label that does not count.

    Raises:
        TypeError, ValueError: for any setting that cannot be, in one sentence that names it.
    """

    augment: Augment | None = None
    transform: Augment | None = None
    adversary: Callable[..., Attack] | None = None
    regularizer: str | None = None
    weight: float | None = None
    on: str | None = None
    ignore_index: int = field(default=255)

    def __post_init__(self) -> None:
        for name in ("augment", "transform", "adversary"):
            value = getattr(self, name)
            if value is not None and not callable(value):
                raise TypeError(f"{name} is a {type(value).__name__}; it must be callable or None")
        made: object = self.adversary
        if isinstance(made, Attack):
            kind = type(made).__name__
            raise TypeError(
                f"adversary is a {kind} of a model already; it must be its class, with settings by functools.partial"
            )
        if self.transform is not None and self.adversary is not None:
            raise ValueError("transform and adversary are both given; one of them makes x~")
        if self.regularizer is None:
            if self.weight is not None:
                raise ValueError(f"weight is {self.weight!r} without a regularizer; it must be None")
        else:
            _checks.choice("regularizer", self.regularizer, tuple(_WEIGHTS))
            if not self.compares:
                raise ValueError(f"regularizer is {self.regularizer!r} without a transform or an adversary")
        if self.weight is not None:
            _checks.number("weight", self.weight, above=0)
        if self.on is not None:
            _checks.choice("on", self.on, ("clean", "transformed", "both"))
            if self.on != "clean" and not self.compares:
                raise ValueError(f"on is {self.on!r} without a transform or an adversary")
            if self.on == "clean" and self.compares and self.regularizer is None:
                raise ValueError("on is 'clean' without a regularizer: what is made of images would not count")

    @property
    def compares(self) -> bool:
        """Whether there is an ``x~``."""
        return self.transform is not None or self.adversary is not None

    @property
    def counted(self) -> str:
        """What cross-entropy counts."""
        return self.on or ("both" if self.regularizer else "transformed" if self.compares else "clean")

    @property
    def factor(self) -> float:
        """What the regularizer is multiplied by; 0 without one."""
        return (self.weight or _WEIGHTS[self.regularizer]) if self.regularizer else 0.0


def _penalty(kind: str, clean: Tensor, moved: Tensor) -> Tensor:
    if kind == "l2":
        return (clean - moved).square().sum(1).mean() / 4
    return divergence(clean, moved).mean()


# The rate at each part of the training, of the largest.
_SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda part: 1.0,
    "cosine": lambda part: (1 + math.cos(math.pi * part)) / 2,
    "steps": lambda part: 0.1 ** ((part >= 0.5) + (part >= 0.75)),
    "one-cycle": lambda part: part / 0.2 if part < 0.2 else (1 - part) / 0.8,
}


def train(
    model: nn.Module,
    data: Dataset[Any],
    recipe: Recipe | None = None,
    *,
    epochs: int,
    batch: int = 128,
    rate: float = 0.1,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    schedule: str = "one-cycle",
    clip: float | None = 5.0,
    dtype: str = "auto",
    seed: int = 0,
    folder: str | os.PathLike[str] | None = None,
    validate: Callable[[nn.Module], Mapping[str, float]] | None = None,
    progress: Progress | None = None,
) -> list[dict[str, float]]:
    """Train a model by stochastic gradient descent with Nesterov momentum.

    With a folder, training goes on where it was stopped, as if it had not been: random numbers are a function of the
    seed and the epoch. Another recipe is known by the names of its functions and what ``functools.partial`` gives them:
    of two lambdas it sees no difference. It keeps ``checkpoint.pt`` (replaced after each epoch) and ``log.json``.

    Args:
        model: images (N, C, H, W) in [0, 1] -> logits (N, classes) or (N, classes, H, W); trained in place, and left in
            eval mode.
        data: of images (C, H, W), float in [0, 1], and labels, int64, all of one size.
        recipe: what is learned from them; ordinary training where None.
        epochs: how often each image is seen.
        batch: images per step; the last ones of an epoch, fewer than that, are left to other epochs, but for data that
            are fewer than a batch.
        rate: the largest learning rate.
        momentum, weight_decay: of the descent.
        schedule: ``"one-cycle"`` (up to a fifth, then down to 0, linear), ``"cosine"``, ``"steps"`` (a tenth from the
            half on, a hundredth from three quarters on) or ``"constant"``.
        clip: the largest norm of a step's gradient; None for no bound.
        dtype: ``"auto"``, ``"float32"`` or ``"bfloat16"``: what the model runs in, under autocast; weights are float32.
        seed: of the order, of augmentation and of attacks, 0..2**32-1. Of what the model draws itself, such as
            dropout, too; torch's global generator is left as it was.
        folder: where checkpoint and log go; None for nowhere.
        validate: given the model in eval mode after each epoch; its numbers go into the log.
        progress: told, after each step, how many are done, and of how many.

    Returns:
        The log, one row per epoch: ``epoch``, ``loss``, ``cross-entropy``, ``penalty`` (before it is weighted),
        ``accuracy`` on what cross-entropy counts, ``seconds``, and what ``validate`` gave.

    Raises:
        TypeError, ValueError: for settings and data that cannot be; if the folder holds a training with other settings.
        FloatingPointError: if the loss is no longer finite; the last checkpoint stays.
    """
    recipe = Recipe() if recipe is None else recipe
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; it must be a Module")
    if not isinstance(recipe, Recipe):
        raise TypeError(f"recipe is a {type(recipe).__name__}; it must be a Recipe")
    _checks.integer("epochs", epochs, 1, 2**20)
    _checks.integer("batch", batch, 1, 2**20)
    _checks.number("rate", rate, above=0)
    _checks.number("momentum", momentum, least=0, most=1)
    _checks.number("weight_decay", weight_decay, least=0)
    _checks.choice("schedule", schedule, tuple(_SCHEDULES))
    _checks.choice("dtype", dtype, DTYPES)
    _checks.integer("seed", seed, 0, 2**32 - 1)
    if clip is not None:
        _checks.number("clip", clip, above=0)
    count = len(data)  # type: ignore[arg-type]
    if count == 0:
        raise ValueError("data has no images")
    rest: dict[str, Any] = {
        "epochs": epochs,
        "batch": batch,
        "rate": rate,
        "momentum": momentum,
        "weight_decay": weight_decay,
    }
    rest |= {"schedule": schedule, "clip": clip, "dtype": dtype, "seed": seed, "images": count}
    rest |= {"model": _architecture(model), **_described(recipe)}
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum, weight_decay=weight_decay, nesterov=momentum > 0)
    run = _Run(model, recipe, optimizer, dtype, clip)
    if folder is not None and not isinstance(folder, str | os.PathLike):
        raise TypeError(f"folder is a {type(folder).__name__}; it must be a path or None")
    where = None if folder is None else Path(folder)
    log = [] if where is None else _resumed(where, run, rest)
    if where is not None:
        where.mkdir(parents=True, exist_ok=True)  # what cannot be written is known before the first epoch
    batch = min(batch, count)
    steps = count // batch
    for epoch in range(len(log), epochs):
        start = time.perf_counter()
        totals = torch.zeros(4, dtype=torch.float64)
        generator = torch.Generator().manual_seed(_mixed(seed, epoch))
        loader = DataLoader(data, batch, sampler=RandomSampler(data, generator=generator), drop_last=True)  # type: ignore[arg-type]
        # what the model draws itself comes from the global generator, which is left as it was
        on_cuda = run.device.type == "cuda"
        with torch.random.fork_rng([run.device] if on_cuda else []):
            torch.default_generator.manual_seed(_mixed(seed, epoch) ^ 1)  # torch.manual_seed is of all devices
            if on_cuda:
                with torch.cuda.device(run.device):
                    torch.cuda.manual_seed(_mixed(seed, epoch) ^ 1)
            model.train()
            try:
                for step, (x, y) in enumerate(loader):
                    done = epoch * steps + step
                    for group in optimizer.param_groups:
                        group["lr"] = rate * _SCHEDULES[schedule]((done + 0.5) / (epochs * steps))
                    totals += run.step(x, y, generator)
                    if not math.isfinite(float(totals[0])):
                        raise FloatingPointError(f"the loss is not finite at step {step + 1} of epoch {epoch + 1}")
                    if progress is not None:
                        progress(done + 1, epochs * steps)
            finally:
                model.eval()
        names = ("loss", "cross-entropy", "penalty", "accuracy")
        row = {"epoch": epoch + 1, **dict(zip(names, (totals / steps).tolist(), strict=True))}
        row["seconds"] = time.perf_counter() - start
        row |= {} if validate is None else {name: float(value) for name, value in validate(model).items()}
        log.append(row)
        if where is not None:
            _keep(where, run, rest, log)
    model.eval()
    return log


def _mixed(seed: int, epoch: int) -> int:
    """A seed of an epoch, of 32 bits: of more, generators on the CPU take no notice."""
    return int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0])


class _Run:
    """A model that is trained, and how."""

    def __init__(
        self, model: nn.Module, recipe: Recipe, optimizer: torch.optim.Optimizer, dtype: str, clip: float | None
    ) -> None:
        self.model, self.recipe, self.optimizer, self.dtype, self.clip = model, recipe, optimizer, dtype, clip
        parameter = next(model.parameters(), None)
        self.device = torch.device("cpu") if parameter is None else parameter.device

    def predict(self, x: Tensor) -> Tensor:
        lowered = autocast(self.dtype, x)
        with torch.autocast(x.device.type, dtype=lowered, enabled=lowered is not None):
            return output(self.model(x)).float()

    def made(self, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        """What the recipe makes of images."""
        if self.recipe.transform is not None:
            return self.recipe.transform(x, generator)
        assert self.recipe.adversary is not None
        seed = int(torch.randint(2**32, (), generator=generator))
        # an image is one by its place in the batch, so that each has its own random numbers
        ids = torch.arange(len(x), device=x.device)
        with evaluating(x, self.model):
            return self.recipe.adversary(self.predict, seed=seed)(x, y, ids)

    def step(self, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        """One step of descent; loss, cross-entropy, penalty and accuracy."""
        recipe = self.recipe
        x, y = _checks.images("data", x).to(self.device), y.to(self.device)
        if y.dtype != torch.int64:
            raise TypeError(f"labels have dtype {y.dtype}; they must be int64")
        moving = [_named(f) for f in (recipe.augment, recipe.transform) if _moves(f)] if y.dim() > 1 else []
        if moving:
            raise ValueError(
                f"{moving[0]} moves images and not their dense labels; it must leave pixels where they are"
            )
        if recipe.augment is not None:
            x = recipe.augment(x, generator)
        images = [x] if recipe.regularizer or recipe.counted != "transformed" else []
        images += [self.made(x, y, generator)] if recipe.compares else []
        logits = self.predict(torch.cat(images)).split(len(x))
        check_labels(logits[0], y, recipe.ignore_index)
        # of images with one label every class counts
        known = y != recipe.ignore_index if y.dim() > 1 else torch.ones_like(y, dtype=torch.bool)
        targets = torch.where(known, y, -100)
        counted = {"clean": logits[:1], "transformed": logits[-1:], "both": logits}[recipe.counted]
        sums = [functional.cross_entropy(each, targets, ignore_index=-100, reduction="sum") for each in counted]
        entropy = torch.stack(sums).mean() / known.sum().clamp(min=1)
        penalty = _penalty(recipe.regularizer, logits[0], logits[-1]) if recipe.regularizer else entropy.new_zeros(())
        loss = entropy + recipe.factor * penalty
        self.optimizer.zero_grad()
        loss.backward()
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        with torch.no_grad():
            right = torch.stack([((each.argmax(1) == y) & known).sum() for each in counted]).double().mean()
            accuracy = right / known.sum().clamp(min=1)
            return torch.stack([each.double().cpu() for each in (loss, entropy, penalty, accuracy)])


def _moves(function: Callable[..., Any] | None) -> bool:
    """Whether it is one of those here that move pixels."""
    return getattr(function, "func", function) in (crop_and_flip, rotate_and_shift)


def _architecture(model: nn.Module) -> str:
    """What tells one model from another before training: names and shapes of its tensors."""
    shapes = [f"{name} {tuple(value.shape)}" for name, value in model.state_dict().items()]
    return f"{type(model).__name__}: " + "; ".join(shapes)


def _described(recipe: Recipe) -> dict[str, Any]:
    """A recipe in words: of functions the names, and the settings that they are given by ``functools.partial``."""
    return {
        "augment": _named(recipe.augment),
        "transform": _named(recipe.transform),
        "adversary": _named(recipe.adversary),
        "regularizer": recipe.regularizer,
        "weight": recipe.factor,
        "on": recipe.counted,
        "ignore_index": recipe.ignore_index,
    }


def _named(function: Any) -> str | None:
    if function is None:
        return None
    if isinstance(function, functools.partial):
        given = [_worded(value) for value in function.args]
        settings = [*given, *(f"{k}={_worded(v)}" for k, v in sorted(function.keywords.items()))]
        return f"{_named(function.func)}({', '.join(settings)})"
    if dataclasses.is_dataclass(function) and not isinstance(function, type):
        return repr(function)
    return str(getattr(function, "__qualname__", type(function).__qualname__))


def _worded(value: Any) -> str:
    return str(_named(value)) if callable(value) else repr(value)


def _resumed(folder: Path, run: _Run, settings: Mapping[str, Any]) -> list[dict[str, float]]:
    """What was done in a folder, if anything: weights and momenta are put back, and the log is returned."""
    path = folder / "checkpoint.pt"
    if not path.exists():
        return []
    try:
        state = torch.load(path, map_location=run.device, weights_only=True)
        before = state["settings"]
    except Exception as error:  # torch and pickle raise many kinds for files that are none
        raise ValueError(f"{path} is no checkpoint of a training: {str(error).strip().splitlines()[0]}") from error
    changed = sorted(name for name in {*before, *settings} if before.get(name) != settings.get(name))
    if changed:
        what = ", ".join(
            name if name == "model" else f"{name} (was {before.get(name)!r}, is {settings.get(name)!r})"
            for name in changed
        )
        raise ValueError(f"{folder} holds a training with other settings: {what}")
    run.model.load_state_dict(state["model"])
    run.optimizer.load_state_dict(state["optimizer"])
    log: list[dict[str, float]] = state["log"]
    return log


def _keep(folder: Path, run: _Run, settings: Mapping[str, Any], log: list[dict[str, float]]) -> None:
    """Checkpoint and log, each written beside and renamed."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {"settings": dict(settings), "log": log}
    state |= {"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()}
    with replacing(folder / "checkpoint.pt") as beside:
        torch.save(state, beside)
    with replacing(folder / "log.json") as beside:
        beside.write_text(json.dumps(log, indent=2) + "\n")
