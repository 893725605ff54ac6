"""Purification: the image near an image on which the model agrees with itself, and a model that predicts from it."""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from equifast import _checks, rng
from equifast._capture import Capture
from equifast._cheap import DTYPES, Cheap, autocast
from equifast._fingerprint import FRAMEWORK, alike, weights
from equifast._folded import Folded
from equifast._memory import pass_bytes
from equifast.ascent import Advance, Ascent, Progress
from equifast.balls import STARTS, Step, make
from equifast.features import Features, LogProbabilities, evaluating, output, uncast
from equifast.objectives import (
    MOST_ROWS,
    PAIRINGS,
    Agreement,
    Equivariance,
    Objective,
    average_predictions,
    column_sum,
    number_of_pairs,
)
from equifast.views import Flip, View, as_set, fast, paper, positions, sample

__all__ = ["PRESETS", "Defended", "DefendedModel", "Preset", "Purifier", "Purify", "Suspects", "purify"]

Purify = Callable[..., Tensor]
"""What :class:`Defended` takes: ``(x, ids=None, draw=0) -> x``, images to images."""


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Named settings of a :class:`Purifier`; each but ``relative_step`` is also a keyword of it.

    Args:
        steps: T.
        relative_step: step size over the radius of the ball; of a Purifier ``step_size``, in units of image values.
        start: ``"origin"``, ``"uniform"`` or ``"corner"``.
        noise: the noise schedule of the paper's Algorithm 1.
        views: the set of views.
        views_per_step: how many of them a step uses, drawn without replacement; None for all.
        momentum: as in :class:`equifast.ascent.Ascent`.
        average: views over which :class:`Defended` averages its predictions beside the image; none where empty.
        pairing: ``"anchor"`` or ``"all"``.
        view_gradient: the weight of the gradient through views, 0 to 1.
        followed: through how many of a step's views it goes; None for all.
    """

    steps: int
    relative_step: float
    start: str
    noise: bool
    views: tuple[View, ...]
    views_per_step: int | None
    momentum: float | None = None
    average: tuple[View, ...] = ()
    pairing: str = "anchor"
    view_gradient: float = 1.0
    followed: int | None = None


PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "paper": Preset(
            steps=20,
            relative_step=2.0,
            start="uniform",
            noise=True,
            views=paper(),
            views_per_step=None,
            pairing="all",
        ),
        "fast": Preset(
            steps=3,
            relative_step=0.4,
            start="corner",
            noise=False,
            views=fast(),
            views_per_step=3,
            momentum=0.5,
            average=(Flip(),),
            view_gradient=0.2,
            followed=1,
        ),
        "strong": Preset(
            steps=8,
            relative_step=0.25,
            start="origin",
            noise=False,
            views=paper(),
            views_per_step=1,
            average=(Flip(),),
        ),
    }
)


# Positions that run at once on a CPU, of images whose pass keeps a graph, and in all where none does: fewer take longer
# each, and more take memory, and cache, and no less time.
_CHUNK, _AHEAD = 2**19, 2**20
# Pixels of the image and of views that run as one batch where a budget of memory does not say: small maps take less
# time together, large ones on a CPU do not.
_TOGETHER = {"cpu": 2**17, "cuda": 2**21}


def together(x: Tensor) -> int:
    """How many positions of images as ``x`` and of views of one size run as one batch."""
    return _TOGETHER.get(x.device.type, 0)


def at_once(x: Tensor, ahead: int = 0) -> int:
    """How many images as ``x`` run at once: on a CPU a few large ones, on CUDA all.

    Args:
        x: (N, 3, H, W).
        ahead: of a pass that keeps no graph, how many positions of an image and its views it holds at once; else 0.
    """
    if x.device.type != "cpu":
        return max(1, len(x))
    most = _CHUNK // max(1, x.shape[2] * x.shape[3])
    most -= most % 2  # derivatives of some convolutions take two at a time
    return min(MOST_ROWS - 2, max(2, most, _AHEAD // ahead if ahead else 0))  # one more may join them (chunks)


def chunks(x: Tensor, most: int | None = None) -> list[slice]:
    """The images that run at once: at most so many, or :func:`at_once`."""
    n, most = len(x), at_once(x) if most is None else most
    bounds = [*range(0, n, most), n]
    if most > 1 and n > most and n % most == 1:
        del bounds[-2]  # none alone, which large convolutions round otherwise
    return [slice(first, last) for first, last in itertools.pairwise(bounds) if first < last]


# Sets of sizes where steps are captured or the model is compiled, and no palette is given.
_PALETTE = 16


class Purifier:
    """Moves images inside a small ball to where the model's features agree across views (Mao et al. 2023).

    Args:
        model: takes images (N, 3, H, W) in [0, 1]; keeps its own normalization inside.
        features: where its features end: ``None``, its dense output (a dict with ``"out"`` is understood); a dotted
            submodule name; or a callable ``x -> (N, C, h, w)``.
        preset: ``"fast"``, ``"strong"`` or ``"paper"``; the settings below replace those of the preset.
        eps: radius of the ball, in units of image values.
        seed: 0..2**32-1, or None: a fresh one per call, from torch's global generator. Who knows it knows the
            very ascent, and leaves less of it than any other attacker (docs/evaluation.md): None where that matters,
            and ``torch.seed()`` once where something has called ``torch.manual_seed``, after which none is secret.
        dtype: ``"auto"`` (bfloat16 autocast for float32 images where that is faster, else none), ``"float32"``
            (no autocast), ``"bfloat16"`` or ``"float16"`` (autocast; in the latter gradients are scaled).
        norm: ``"linf"`` or ``"l2"``; that of the whole image, in which the default radius is next to nothing.
        views: the set of views (:mod:`equifast.views`).
        views_per_step: how many of them a step uses, or ``"all"``; None for what the preset says, where ``views`` is
            given all of them.
        steps, step_size, start, noise, momentum, restarts, keep: as in :class:`equifast.ascent.Ascent`; None for what
            the preset says (``momentum=0`` for none where it has one).
        pairing: which features are compared: ``"anchor"``, those of each view with the image's (paper: Eq. 2);
            ``"all"``, every pair, as the published code does. None for what the preset says.
        view_gradient: the weight of the part of the gradient that reaches the image through its views, 0 to 1. With 1
            the gradient is that of the objective. With less the image moves to what its views say more than they to
            what it says; with 0 views are targets, constants to the gradient, and cost a forward pass alone. None for
            what the preset says.
        followed: through how many of a step's views that part goes, drawn anew at every step, or ``"all"``; the others
            cost a forward pass alone, and the weight of these grows so that its mean stays. None for what the preset
            says, all where ``views`` or ``views_per_step`` is given. Not with ``pairing="all"``.
        temperature: compare log-probabilities, ``log_softmax(f / temperature)`` over the channels of the features f;
            None for f itself. More is repaired under plain attacks, and less under those who know (docs/corner.md).
        reduction: ``"image"`` or ``"pixel"`` (not with ``pairing="all"``).
        stop: a mean similarity over a step's views, in [-1, 1]: an image that has reached it stays as it is, and the
            rest of its batch goes on without it; None for none.
        average: views over which, beside the image, :class:`Defended` averages its predictions, warped back; True for
            the set of views, False for none, None for what the preset says.
        fold: whether a copy of the model is run in which batch norm is folded into the convolutions before it, where
            that changes nothing but rounding. The copy follows changes of the model's parameters, buffers, submodules
            and hooks, not of other attributes. A model with hooks, and ``features`` that are a function of your own,
            are run as they are.
        max_batch: at most about so many images run at once, and each view apart, which bounds memory and leaves the
            results as they are (but for 1, where large images round otherwise than in a batch); None for as many as
            pay, on the CPU a few large ones, on CUDA all.
        max_memory: bytes that a step's passes may take, about: as many images run at once, and as many views of one
            size in one batch, as fit, but at least one image and one view. What a pass takes is found out by one at the
            first call. None for batches of small maps, on CUDA of larger ones too.
        palette: choice and sizes of views are one of so many fixed sets; None for a new one at every step, or for 16
            sets with ``capture`` or ``compile``.
        capture: whether steps on CUDA are captured as graphs, one for each set of sizes and shape of ``x``, and
            replayed, which pays where images are small and few. What cannot be captured, such as a model that decides
            by values, runs as it is after one warning. For purifiers that keep their last iterate and have no ``stop``.
        compile: whether the model runs through ``torch.compile``. For ``features=None``; on the CPU results may then
            depend on the batch in their last bits.

    Raises:
        TypeError, ValueError: for any setting that cannot be, in one sentence that names it.
    """

    def __init__(
        self,
        model: Callable[[Tensor], Any],
        features: str | Callable[[Tensor], Any] | None = None,
        preset: str = "fast",
        eps: float = 6 / 255,
        seed: int | None = 0,
        dtype: str = "auto",
        *,
        norm: str = "linf",
        views: Sequence[View] | None = None,
        views_per_step: int | Literal["all"] | None = None,
        steps: int | None = None,
        step_size: float | None = None,
        start: str | None = None,
        noise: bool | None = None,
        momentum: float | None = None,
        restarts: int = 1,
        keep: str = "last",
        pairing: str | None = None,
        view_gradient: float | None = None,
        followed: int | Literal["all"] | None = None,
        temperature: float | None = None,
        reduction: str = "image",
        stop: float | None = None,
        average: bool | Sequence[View] | None = None,
        fold: bool = True,
        max_batch: int | None = None,
        max_memory: int | None = None,
        palette: int | None = None,
        capture: bool = False,
        compile: bool = False,
    ) -> None:
        self._features = Features(model, features)
        base = PRESETS[_checks.choice("preset", preset, tuple(PRESETS))]
        ball = make(norm, eps)
        _checks.seed(seed)
        _checks.choice("dtype", dtype, (*DTYPES, "float16"))
        pairing = base.pairing if pairing is None else _checks.choice("pairing", pairing, PAIRINGS)
        _checks.choice("reduction", reduction, ("image", "pixel"))
        if pairing == "all" and reduction == "pixel":
            raise ValueError("reduction is 'pixel' with pairing 'all'; it must be 'image'")
        self.views = as_set(views) if views is not None else base.views
        count = base.views_per_step if views_per_step is None and views is None else None
        if views_per_step is not None and views_per_step != "all":
            count = _checks.integer("views_per_step", views_per_step, 1, len(self.views))
        self.model = model
        self.fold = _checks.boolean("fold", fold)
        place = self._features.place
        self._folded = (
            Folded(model, place or None) if fold and place is not None and isinstance(model, nn.Module) else None
        )
        self.max_batch = None if max_batch is None else _checks.integer("max_batch", max_batch, 1, 2**31)
        self.max_memory = None if max_memory is None else _checks.integer("max_memory", max_memory, 1, 2**63)
        # bytes per position: of a graph, and of what passes while it is made and followed
        self._held: dict[tuple[torch.device, torch.dtype], tuple[float, float]] = {}
        self._capture = Capture() if _checks.boolean("capture", capture) else None
        self.palette = _PALETTE if (capture or compile) and palette is None else palette
        if self.palette is not None:
            _checks.integer("palette", self.palette, 1, rng.MAX_STEP)
        self.compile = _checks.boolean("compile", compile)
        if compile and (features is not None or not isinstance(model, nn.Module)):
            raise ValueError("compile is True with features, or for no Module; it is for a Module's own output")
        self._compiled: tuple[object, Any] = (None, None)
        self.preset = preset
        self.seed = seed
        self.dtype = dtype
        self.views_per_step = count
        self.pairing = pairing
        self.view_gradient = (
            base.view_gradient
            if view_gradient is None
            else _checks.number("view_gradient", view_gradient, least=0, most=1)
        )
        self.followed = base.followed if followed is None and views is None and views_per_step is None else None
        if followed is not None and followed != "all":
            self.followed = _checks.integer("followed", followed, 1, len(self.views) if count is None else count)
        if pairing == "all":
            if followed not in (None, "all"):
                raise ValueError(f"followed is {followed} with pairing 'all'; it must be 'all'")
            self.followed = None
        self.temperature = None if temperature is None else _checks.number("temperature", temperature, above=0)
        self.reduction = reduction
        self.average = base.average
        if isinstance(average, bool):
            self.average = self.views if average else ()
        elif average is not None:
            self.average = as_set(average, "average")
        pairs = number_of_pairs(pairing, len(self.views) if count is None else count)
        self.ascent = Ascent(
            ball=ball,
            steps=base.steps if steps is None else steps,
            step_size=base.relative_step * eps if step_size is None else step_size,
            start=base.start if start is None else _checks.choice("start", start, STARTS),
            noise=base.noise if noise is None else noise,
            momentum=(base.momentum if momentum is None else momentum) or None,
            restarts=restarts,
            keep=keep,
            stop=None if stop is None else _checks.number("stop", stop, least=-1, most=1) * pairs,
        )
        self.stop = stop
        if capture and (stop is not None or keep == "best"):
            raise ValueError("capture is True with stop or keep='best'; it is for steps that depend on no value")

    def __getstate__(self) -> dict[str, object]:
        """Without the compiled model, which is made again."""
        return self.__dict__ | {"_compiled": (None, None)}

    @property
    def folded(self) -> bool:
        """Whether a folded copy of the model runs; known after the first call, before it False."""
        return self._folded is not None and self._folded.made

    def _described(self) -> dict[str, object]:
        """What :func:`equifast._fingerprint.describe` tells of it: settings, what it runs on, what subclasses add."""
        settings = self.settings()
        skip = {"ascent", "_features", "_folded", "_held", "_capture", "_compiled", *settings}
        added = {name: value for name, value in vars(self).items() if name not in skip}
        return {"class": type(self), "features": self._features.where, **added, **settings}

    def settings(self) -> dict[str, object]:
        """All settings, as values that JSON can hold."""
        ascent = self.ascent
        return {
            "preset": self.preset,
            "norm": type(ascent.ball).__name__.lower(),
            "eps": ascent.ball.eps,
            "steps": ascent.steps,
            "step_size": ascent.step_size,
            "start": ascent.start,
            "noise": ascent.noise,
            "momentum": ascent.momentum,
            "restarts": ascent.restarts,
            "keep": ascent.keep,
            "stop": self.stop,
            "views": [repr(view) for view in self.views],
            "views_per_step": self.views_per_step,
            "pairing": self.pairing,
            "view_gradient": self.view_gradient,
            "followed": self.followed,
            "temperature": self.temperature,
            "reduction": self.reduction,
            "average": [repr(view) for view in self.average],
            "fold": self.fold,
            "max_batch": self.max_batch,
            "max_memory": self.max_memory,
            "palette": self.palette,
            "capture": self._capture is not None,
            "compile": self.compile,
            "seed": self.seed,
            "dtype": self.dtype,
        }

    def __call__(self, x: Tensor, ids: Tensor | None = None, draw: int = 0, progress: Progress | None = None) -> Tensor:
        """Purify a batch.

        Args:
            x: (N, 3, H, W), floating point, in [0, 1].
            ids: (N,) int64: which random numbers each image gets; all 0 where None.
            draw: 0..65535, another realization under the same seed.
            progress: called as ``progress(done, total)`` after every step.

        Returns:
            (N, 3, H, W) of the dtype of ``x``, in the ball and in [0, 1], detached from ``x``. An image's result
            does not depend on the rest of the batch.

        Raises:
            TypeError: if ``x`` is not floating point or ``ids`` not int64.
            ValueError: if ``x`` has another shape, leaves [0, 1] by more than 1e-6 or is not finite; if the features
                are not (N, C, h, w) or do not depend on the image.
        """
        with self._objective(x, ids, draw, self.views_per_step) as (x, objective, seed, numbers):
            chunks, purified = self._chunks(x, objective.together), torch.empty_like(x)
            for number, rows in enumerate(chunks):

                def report(done: int, total: int, number: int = number) -> None:
                    if progress is not None:
                        progress(number * total + done, len(chunks) * total)

                part, some = objective.only(rows), numbers[rows]
                advance = None if self._capture is None else self._advance(self._capture, part)
                purified[rows] = self.ascent(
                    part, x[rows], seed=seed, ids=some, draw=draw, progress=report, advance=advance
                )
            return purified

    def _advance(self, capture: Capture, objective: Agreement) -> Advance:
        """Steps through recordings of :meth:`Ascent.move`: what a step draws is an argument of it."""
        owner = objective.owner()

        def advance(x: Tensor, momentum: Tensor, origin: Tensor, t: int, how: Step) -> tuple[Tensor, Tensor]:
            sampled, noisy = objective.step_views(x, t), self.ascent.noise
            widths = [view.view.image for view in sampled]
            theta, parameters = torch.stack([v.theta for v in sampled]), torch.cat([v.parameters for v in sampled], 1)
            drawn = (how["ids"], how["sigma"], how["seed"], how["draw"], how["t"]) if noisy else ()

            def move(
                x: Tensor, momentum: Tensor, origin: Tensor, theta: Tensor, parameters: Tensor, *drawn: Any
            ) -> tuple[Tensor, Tensor]:
                parts = zip(sampled, theta.unbind(0), parameters.split(widths, 1), strict=True)
                given = [dataclasses.replace(view, theta=matrix, parameters=own) for view, matrix, own in parts]
                place = how.copy()
                if drawn:
                    place["ids"], place["sigma"], place["seed"], place["draw"], place["t"] = drawn
                return self.ascent.move(objective.given(given), x, momentum, origin, 0, place)

            views = tuple((self.views.index(view.view), view.size, view.followed) for view in sampled)
            key = (self.ascent, x.shape, x.stride(), x.dtype, x.device, objective.lowered, views)
            x, momentum = capture(owner, key, move, (x, momentum, origin, theta, parameters, *drawn))
            return x, momentum

        return advance

    def unrolled(self, x: Tensor, last: int, ids: Tensor | None = None, draw: int = 0) -> Tensor:
        """Purify a batch with a derivative: for attackers who know.

        The images are those of a call. The derivative goes through the last steps of the ascent, of which each is run
        again for it; a sign has the derivative of a tanh there, and the steps before count as the identity. All images
        run at once, and the derivative of a step holds what all its views computed.

        Args:
            x: (N, 3, H, W), floating point, in [0, 1], perhaps with a graph.
            last: how many steps, 1 to the number of steps.
            ids, draw: as for a call.

        Returns:
            (N, 3, H, W) of the dtype of ``x``, with a graph where ``x`` has one.

        Raises:
            TypeError: if ``x`` is float16, in which second derivatives overflow, or no floating point.
            ValueError: if ``last`` is out of range, or the purifier keeps the best of several points.
        """
        self._check_last(last)
        if isinstance(x, Tensor) and not torch.is_grad_enabled():
            x = x.detach()
        if isinstance(x, Tensor) and x.dtype == torch.float16:
            raise TypeError("x is float16, in which unrolled gradients overflow; it must be a wider dtype")
        with self._objective(x, ids, draw, self.views_per_step) as (images, objective, seed, numbers):
            if len(x) == 0:
                return x.clone()

            def slope(at: Tensor, t: int) -> Tensor:
                with evaluating(at, self.model, *self._features.modules(), lean=True, frozen=True):
                    return objective.slope(at, t)

            # the clamp lets through what rounding put outside [0, 1]
            given = images + (x - x.detach())
            return self.ascent(objective, given, seed=seed, ids=numbers, draw=draw, slope=slope, last=last)

    @property
    def _all_graphs(self) -> bool:
        """Whether a step holds the graphs of all its views at once, and not of two batches."""
        return self.pairing == "all"

    def _together(self, x: Tensor, features: Features) -> int:
        """How many positions run as one batch: half of what memory allows, as two batches are held at once."""
        if self.max_memory is None or x.numel() == 0:
            return together(x) if self.max_batch is None else 0
        key = (x.device, x.dtype)
        if key not in self._held:
            lowered = autocast(self.dtype, x)

            def run(images: Tensor) -> Tensor:
                with torch.autocast(x.device.type, dtype=lowered, enabled=lowered is not None, cache_enabled=False):
                    return features(images.clone())

            model = features.model
            owned = [*model.parameters(), *model.buffers()] if isinstance(model, nn.Module) else []
            area = len(x[:2]) * x.shape[2] * x.shape[3]
            kept, passing = (part / area for part in pass_bytes(run, x[:2], owned))
            self._held[key] = kept, max(passing, 1.0)
        return max(1, int(self.max_memory / sum(self._held[key]) / 2))

    def _chunks(self, x: Tensor, together: int = 0, graph: bool = True) -> list[slice]:
        """The images that run at once."""
        image, *views = positions(self.views, (x.shape[2], x.shape[3]))
        largest = max(image, *views)
        # without a graph, the image's features and one batch of views
        most = at_once(x, 0 if graph else image + max(views)) if self.max_batch is None else self.max_batch
        if together and self.max_memory is not None:
            if self._all_graphs:
                kept, passing = self._held[x.device, x.dtype]
                every = image + sum(sorted(views)[-(self.views_per_step or len(views)) :])
                possible = int(self.max_memory / (kept * every + passing * largest))
            else:
                possible = together // largest
            most = min(most, max(1, possible))
        return chunks(x, most)

    def iterates(self, x: Tensor, ids: Tensor | None = None, draw: int = 0) -> list[Tensor]:
        """Purify a batch and return the images after every step, the last one the result; arguments as for a call.

        For a purifier with one run that keeps its last iterate and does not stop early. All images run at once.

        Raises:
            ValueError: as for a call, or where the purifier is another.
        """
        self._check_last(1)
        seen: list[Tensor] = []
        with self._objective(x, ids, draw, self.views_per_step) as (images, objective, seed, numbers):
            self.ascent(objective, images, seed=seed, ids=numbers, draw=draw, visit=seen.append)
        return seen or [images.clone()]

    @contextlib.contextmanager
    def objective(
        self, x: Tensor, ids: Tensor | None = None, draw: int = 0, *, scored: bool = False
    ) -> Iterator[Objective]:
        """The mean similarity over a step's views, with its whole gradient, as an objective for an ascent on ``x``.

        A context, in which the model is in eval mode: for attackers who keep an image equivariant. Where it is
        ``scored``, that of all views to the image, as in :meth:`score`, whatever the steps compare.
        """
        count = None if scored else self.views_per_step
        with self._objective(x, ids, draw, count) as (_, objective, _, _):
            every = len(self.views)
            if scored:
                yield objective.to_anchor().whole(1 / every, 1 / every)
            else:
                pairs = (number_of_pairs(self.pairing, number) for number in (count or every, every))
                yield objective.whole(*(1 / number for number in pairs))

    def _check_last(self, last: int) -> None:
        _checks.integer("last", last, 1, max(1, self.ascent.steps))
        ascent = self.ascent
        if ascent.steps == 0 or ascent.restarts > 1 or ascent.keep == "best" or ascent.stop is not None:
            raise ValueError(
                "purifier has no steps, several restarts, keep='best' or a stop; an unrolled gradient, iterates and a "
                "trajectory must be of one run that keeps its last iterate"
            )

    def similarities(self, x: Tensor, ids: Tensor | None = None, draw: int = 0) -> Tensor:
        """(N, K): the similarity of each of :attr:`views` to the image, at the first step's draw.

        In [-1, 1]; :class:`equifast.defenses.Rotation` and ``Contrastive`` have log-probabilities in its place.
        """
        with self._objective(x, ids, draw, None) as (x, objective, _, _):
            if len(x) == 0:
                return torch.zeros(0, len(self.views), device=x.device)
            chunks = self._chunks(x, objective.together, graph=self._all_graphs)
            return torch.cat([objective.only(rows).similarities(x[rows]) for rows in chunks])

    def score(self, x: Tensor, ids: Tensor | None = None, draw: int = 0) -> Tensor:
        """(N,): the mean of :meth:`similarities` over the views, no graph; arguments as for a call."""
        return column_sum(self.similarities(x, ids, draw)) / len(self.views)

    @contextlib.contextmanager
    def _objective(
        self,
        x: Tensor,
        ids: Tensor | None,
        draw: int,
        count: int | None,
        make: Callable[..., Agreement] | None = None,
    ) -> Iterator[tuple[Tensor, Agreement, int, Tensor]]:
        # outside inference mode, whose tensors autograd refuses, and without an autocast that the caller is in, which
        # would reach derivatives too
        with torch.inference_mode(False), uncast(x):
            x = _checks.images("x", x, channels=3).detach()
            x = x.clone() if x.is_inference() else x
            numbers = _checks.ids(ids, len(x), x.device)
            _checks.integer("draw", draw, 0, rng.MAX_DRAW)
            seed = rng.fresh_seed() if self.seed is None else self.seed
            with evaluating(x, self.model, *self._features.modules(), lean=True):
                features = self._features
                if self._folded is not None:
                    features = features.on(self._folded(x, lambda model, images: features.on(model)(images)))
                if self.compile:
                    features = features.on(self._compile(features.model))
                rest = {"count": count, "seed": seed, "ids": numbers, "draw": draw, "autocast": autocast(self.dtype, x)}
                rest |= {"palette": self.palette, "together": self._together(x, features), "followed": self.followed}
                yield x, (make or self._agreement)(features, **rest), seed, numbers

    def _compile(self, model: Any) -> Any:
        known, compiled = self._compiled
        if known is not model:
            compiled = torch.compile(model, dynamic=True)
            self._compiled = (model, compiled)
        return compiled

    def _agreement(self, features: Features, **rest: Any) -> Agreement:
        """What is climbed."""
        return Equivariance(
            features if self.temperature is None else LogProbabilities(features, self.temperature),
            self.views,
            pairing=self.pairing,
            view_gradient=self.view_gradient,
            reduction=self.reduction,
            **rest,
        )


def purify(model: Callable[[Tensor], Any], x: Tensor, **settings: Any) -> Tensor:
    """Purify a batch in one call: ``Purifier(model, **settings)(x)``.

    Args:
        model: takes images in [0, 1].
        x: (N, 3, H, W) in [0, 1].
        **settings: of :class:`Purifier`, and ``ids``, ``draw`` and ``progress`` of its call.

    Returns:
        (N, 3, H, W).
    """
    call = {name: settings.pop(name) for name in ("ids", "draw", "progress") if name in settings}
    return Purifier(model, **settings)(x, **call)


class Suspects(Protocol):
    """What tells which images are suspicious: a :class:`equifast.detectors.Detector` after ``fit``."""

    def predict(self, x: Tensor, ids: Tensor | None = None, draw: int = 0) -> Tensor:
        """(N, 3, H, W) -> (N,) bool."""
        ...


class DefendedModel(nn.Module):
    """The base of models with a defense inside: ``(x, ids=None, draw=0) -> logits``.

    An attacker who knows (:class:`equifast.attacks.BPDA`) follows their own gradient. A subclass takes the model's
    logits from :meth:`predict`, in whose place the ``dtype`` of an attack puts a ``predictor``.

    Args:
        model: images in [0, 1] to logits.
        dtype: ``"float32"``: the model predicts as it is. ``"auto"`` and ``"bfloat16"``: a copy of it does, with batch
            norm folded, under bfloat16 autocast (``"auto"``: where that is faster and images are float32).
    """

    predictor: Callable[[Tensor], Tensor] | None = None

    def __init__(self, model: nn.Module, dtype: str = "float32") -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is a {type(model).__name__}; it must be a Module")
        self.model = model
        # attack libraries put back the mode that they find, in the model too
        self.training = getattr(model, "training", False)
        self.dtype = _checks.choice("dtype", dtype, DTYPES)
        self._cheap: Cheap | None = None
        if next(model.parameters(), None) is None:
            # attack libraries find the device by looking at a parameter
            self.anchor = nn.Parameter(torch.zeros(()), requires_grad=False)

    def _described(self) -> dict[str, object]:
        """What :func:`equifast._fingerprint.describe` tells of it: counts are none of its settings."""
        skip = FRAMEWORK | {"predictor", "_cheap", "seen", "purified", "suspected"}
        parts = {name: value for name, value in vars(self).items() if name not in skip}
        own = [*self.parameters(recurse=False), *self.buffers(recurse=False)]
        return {"class": type(self), "own": own, **parts, **dict(self.named_children())}  # the model among them

    def predict(self, x: Tensor) -> Tensor:
        """The logits of the undefended model."""
        if self.predictor is not None:
            return self.predictor(x)
        return output(self.model(x)) if self.dtype == "float32" else self._cheaply(x)(x)

    def _cheaply(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        if self._cheap is None or self._cheap.model is not self.model:
            self._cheap = Cheap(self.model, self.dtype)
        return self._cheap.on(x)

    def _predictor(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """:meth:`predict` for several batches: one, as it looks at the weights each time."""
        own = type(self).predict is DefendedModel.predict and self.predictor is None
        return self._cheaply(x) if own and self.dtype != "float32" else self.predict


class Defended(DefendedModel):
    """A model that predicts from the purified image: ``predict(purifier(x))``.

    It takes images in [0, 1] and returns one logits tensor. Its gradient is straight-through, where the purification
    counts as the identity, as in BPDA (Athalye et al. 2018); or it goes through the end of the ascent. It works under
    ``no_grad`` and ``inference_mode``, always in eval mode, and gives the model's parameters no gradients.

    Args:
        model: the model that predicts.
        purifier: a :class:`Purifier` or any ``(x, ids=None, draw=0) -> x``. Where a Purifier averages, as ``"fast"``
            and ``"strong"`` do, the prediction is the mean over those views too, differentiated exactly.
        gradient: ``"straight-through"``, or ``"unrolled"`` (:meth:`Purifier.unrolled`; for a Purifier).
        last: how many steps an unrolled gradient goes through.
        detector: with :meth:`equifast.detectors.Detector.predict`: only images that it suspects are purified, and the
            others are left to the model alone; None to purify all. Attackers have the gradient of the branch taken. A
            detector with this model and this ``dtype`` gives the model's output too, which saves a pass
            (:meth:`equifast.detectors.Detector.examine`); one of the same model with other weights is refused.
        dtype: of the predictions, as in :class:`DefendedModel`; what the purifier computes in is its own setting.

    Attributes:
        seen, purified: how many images there have been, and how many of them were purified.
        suspected: (N,) bool, which of the last images were; None without a detector, or before the first.
    """

    def __init__(
        self,
        model: nn.Module,
        purifier: Purify,
        *,
        gradient: str = "straight-through",
        last: int = 1,
        detector: Suspects | None = None,
        dtype: str = "float32",
    ) -> None:
        super().__init__(model, dtype)
        if detector is not None and not callable(getattr(detector, "predict", None)):
            raise TypeError(f"detector is a {type(detector).__name__}; it must have predict(x, ids=None, draw=0)")
        of = getattr(detector, "model", None)
        if isinstance(of, nn.Module) and of is not model and alike(model, of) and weights(of) != weights(model):
            raise ValueError("detector is of the same model with other weights; it must be of the one that it guards")
        self.detector = detector
        self.seen = self.purified = 0
        self.suspected: Tensor | None = None
        _checks.choice("gradient", gradient, ("straight-through", "unrolled"))
        if gradient == "unrolled":
            if not isinstance(purifier, Purifier):
                raise TypeError(f"gradient is 'unrolled' for a {type(purifier).__name__}; it must be for a Purifier")
            purifier._check_last(last)
        self.gradient, self.last = gradient, last
        _checks.defense("purifier", purifier)
        self.purifier = purifier

    def trajectory(self, x: Tensor, ids: Tensor | None = None, draw: int = 0) -> Iterator[Tensor]:
        """Logits of the images after every step of the purification, one after the other; the last are the model's own.

        Each has the straight-through gradient to ``x``. For a :class:`Purifier` that keeps its last iterate.
        """
        if not isinstance(self.purifier, Purifier):
            raise TypeError(f"purifier is a {type(self.purifier).__name__}; a trajectory is that of a Purifier")
        if self.detector is not None:
            raise TypeError("detector is given; a trajectory is that of a model that purifies all images")
        for purified in self.purifier.iterates(x, ids, draw):
            yield self._predict(x, purified + (x - x.detach()), ids, draw)

    def forward(self, x: Tensor, ids: Tensor | None = None, draw: int = 0) -> Tensor:
        """(N, 3, H, W) -> logits, (N, C) or (N, C, h, w)."""
        if self.detector is None:
            logits, suspected = self._purified(x, ids, draw), len(x)
        else:
            _checks.tensor("x", x, 4, "(N, 3, H, W)")
            ids = None if ids is None else _checks.ids(ids, len(x), x.device)  # a detector has others than 0 of its own
            own, examine = None, getattr(self.detector, "examine", None)
            with torch.no_grad():
                if examine is None:
                    mask = self.detector.predict(x.detach(), ids=ids, draw=draw)
                else:
                    mask, own = examine(x.detach(), ids=ids, draw=draw)
            same = getattr(self.detector, "model", None) is self.model
            plain = type(self).predict is DefendedModel.predict and self.predictor is None
            if not (same and plain) or getattr(self.detector, "dtype", None) != self.dtype or self._followed(x):
                own = None  # not what this would predict, in other arithmetic, or without the graph that is wanted
            logits = self._by_branch(x, ids, draw, mask, own)
            self.suspected, suspected = mask, int(mask.sum())
        self.seen, self.purified = self.seen + len(x), self.purified + suspected
        return logits

    def _by_branch(self, x: Tensor, ids: Tensor | None, draw: int, mask: Tensor, own: Tensor | None) -> Tensor:
        """Logits of images that are purified where the mask says so; of others those that there are, or the model's."""
        known = isinstance(mask, Tensor)
        if not known or mask.dtype != torch.bool or mask.shape != (len(x),):
            got = f"{mask.dtype} of shape {_checks.shape(mask)}" if known else f"a {type(mask).__name__}"
            raise ValueError(f"detector predicts {got} for images {_checks.shape(x)}; it must be bool, one for each")
        if bool(mask.all()):
            return self._purified(x, ids, draw)
        if own is not None:
            if bool(mask.any()):
                own[mask] = self._purified(x[mask], None if ids is None else ids[mask], draw).to(own.dtype)
            return own
        with evaluating(x, self.model, lean=self.dtype != "float32"):
            alone = self.predict(x[~mask])
        if not bool(mask.any()):
            return alone
        chosen = self._purified(x[mask], None if ids is None else ids[mask], draw)
        order = torch.cat([(~mask).nonzero().flatten(), mask.nonzero().flatten()]).argsort()
        return torch.cat([alone, chosen.to(alone.dtype)])[order]

    @staticmethod
    def _followed(x: Tensor) -> bool:
        return torch.is_grad_enabled() and isinstance(x, Tensor) and x.requires_grad  # checked by the purifier

    def _purified(self, x: Tensor, ids: Tensor | None, draw: int) -> Tensor:
        followed = self._followed(x)
        if followed and self.gradient == "unrolled":
            assert isinstance(self.purifier, Purifier)
            return self._predict(x, self.purifier.unrolled(x, self.last, ids, draw), ids, draw)
        purified = self.purifier(x, ids=ids, draw=draw)
        if not isinstance(purified, Tensor) or purified.shape != x.shape:
            got = _checks.shape(purified) if isinstance(purified, Tensor) else type(purified).__name__
            raise ValueError(f"purifier returned {got} for images {_checks.shape(x)}; it must return their shape")
        if followed:
            purified = purified + (x - x.detach())  # the second term is 0, and carries the gradient
        return self._predict(x, purified, ids, draw)

    def _predict(self, x: Tensor, purified: Tensor, ids: Tensor | None, draw: int) -> Tensor:
        with evaluating(x, self.model, lean=self.dtype != "float32"):
            predict = self._predictor(purified)
            if isinstance(self.purifier, Purifier) and self.purifier.average:
                return average(predict, purified, self.purifier.average, self.purifier.seed, ids, draw)
            if len(x) == 0 or (torch.is_grad_enabled() and purified.requires_grad):
                return predict(purified)
            found = None
            for rows in chunks(purified, at_once(purified, purified.shape[2] * purified.shape[3])):
                # a model may work in place, and what a defense returns may be what it was given
                found = put(found, len(x), rows, predict(purified[rows].clone()))
            assert found is not None
            return found


def average(
    predict: Callable[[Tensor], Tensor],
    x: Tensor,
    chosen: Sequence[View],
    seed: int | None,
    ids: Tensor | None,
    draw: int,
) -> Tensor:
    """The mean of predictions over an image and views drawn for it (see ``average_predictions``)."""
    numbers = _checks.ids(ids, len(x), x.device)
    drawn = rng.fresh_seed() if seed is None else seed

    def of(rows: slice) -> Tensor:
        # the last step's number: the ascent before it drew its views from the first ones
        place: dict[str, Any] = {"seed": drawn, "ids": numbers[rows], "draw": draw, "step": rng.MAX_STEP}
        return average_predictions(predict, x[rows], sample(chosen, (x.shape[2], x.shape[3]), **place), together(x))

    if len(x) == 0 or (torch.is_grad_enabled() and x.requires_grad):  # a graph holds all of them anyway
        return of(slice(None))
    most = at_once(x, sum(positions(chosen, (x.shape[2], x.shape[3]))))
    found = None
    for rows in chunks(x, most):
        found = put(found, len(x), rows, of(rows))
    assert found is not None
    return found


def put(found: Tensor | None, n: int, rows: slice, part: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Results of ``n`` images with a part written where it belongs; made at the first, in its layout and dtype.

    To hold all parts and join them in the end takes twice the memory, whose pages the system has to clear first.
    """
    if found is None:
        last = part.dim() == 4 and part.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if last else torch.contiguous_format
        found = torch.empty((n, *part.shape[1:]), dtype=dtype or part.dtype, device=part.device, memory_format=layout)
    found[rows] = part
    return found
