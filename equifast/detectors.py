"""Detectors: how unlike the clean images of a model an image is, and from where on that is suspicious."""

import contextlib
import copy
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from equifast import _checks, ops, rng
from equifast._cheap import DTYPES, autocast, has_fast_bfloat16
from equifast._files import replacing
from equifast._fingerprint import describe, fingerprint, stamp, weights
from equifast._folded import Folded
from equifast.features import Features, evaluating, passed
from equifast.objectives import Objective, Scaled, batched, distances, pooled, rendered
from equifast.purifier import Purifier, at_once, chunks, put, together
from equifast.reference import probabilities, row_sum
from equifast.views import Flip, Sampled, View, as_set, positions, sample

__all__ = ["Combined", "Detector", "Deviation", "OutputVariance", "Similarity", "own_ids"]


Where = str | Callable[[Tensor], Any] | None


def _resolved(dtype: str, model: nn.Module) -> str:
    """What a setting ``dtype`` means for a model where it is: elsewhere scores may be others."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return dtype if dtype != "auto" else "auto: bfloat16" if has_fast_bfloat16(device) else "auto: float32"


class Detector:
    """The base: a subclass gives :meth:`settings` and :meth:`score`; and :meth:`_scores`, for attackers who evade it.

    Args:
        model: the model whose images they are.
    """

    most = 0.5
    """From where on a map is shown at its brightest (:func:`equifast.evaluate.plots.overlay`)."""

    _LEARNED: tuple[str, ...] = ()
    _stamp: object = None

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is a {type(model).__name__}; it must be a Module, whose weights can be told apart")
        self.model = model
        self._fitted: dict[str, Any] | None = None

    def settings(self) -> dict[str, Any]:
        """What decides the score beside the model's weights, as values that JSON can hold."""
        raise NotImplementedError

    def _state(self) -> object:
        """What changes, as a rule, when :meth:`_origin` does, and takes less time to tell."""
        return stamp(self.model)

    def _origin(self) -> dict[str, Any]:
        """Whose threshold it is."""
        return {"detector": type(self).__name__, "model": weights(self.model), "settings": self.settings()}

    def _described(self) -> dict[str, Any]:
        return self.description()

    def score(self, x: Tensor, ids: Tensor | None = None, draw: int = 0) -> Tensor:
        """How anomalous images are, higher for more; no graph.

        Args:
            x: (N, 3, H, W), floating point, in [0, 1].
            ids: (N,) int64: which random numbers each image gets; those of its own values (:func:`own_ids`) where None.
            draw: 0..65535, another realization of the views under the same seed.

        Returns:
            (N,). An image's score does not depend on the rest of the batch.
        """
        raise NotImplementedError

    def fit(self, loader: Iterable[Any], *, false_positive_rate: float = 0.05, confidence: float = 0.95) -> Self:
        """Find the threshold that few clean images exceed.

        Each image has random numbers of its own, at draw 0: at other draws views have other sizes, where they change
        these, and the rate may be another. Of n clean scores in ascending order the threshold is number
        ``ceil((n + 1) (1 - false_positive_rate))``: of new images like those the part above it is in the mean at most
        that rate (conformal prediction; Vovk et al. 2005), and lies in :attr:`interval` with the confidence given, by
        the distribution of order statistics.

        Args:
            loader: batches of clean images (N, 3, H, W) in [0, 1], or tuples that begin with one.
            false_positive_rate: above 0 and below 1.
            confidence: of the interval, above 0 and below 1.

        Raises:
            ValueError: if there are too few images for the rate, with the number that it needs, or a score is NaN.
        """
        parts, ids = [], []
        least = needed(false_positive_rate, confidence)  # refuses bad numbers before any work
        for item in loader:
            images = item[0] if isinstance(item, list | tuple) else item
            images = _checks.images("loader's images", images, channels=3)
            if len(images):
                parts.append(self._seen(images).double().cpu())
                ids.append(own_ids(images).cpu())
        n = sum(map(len, parts))
        if n < least:
            raise ValueError(
                f"loader has {n} images; for false_positive_rate {false_positive_rate} it must have at least {least}"
            )
        seen = torch.cat(parts)
        if seen.isnan().any():
            count = int(seen.flatten(1).isnan().any(1).sum()) if seen.dim() > 1 else int(seen.isnan().sum())
            raise ValueError(f"model gives {count} clean images a score of NaN; there must be none")
        self._keep(seen, false_positive_rate, confidence)
        self._note({"images": n, "digest": fingerprint([torch.cat(ids)])})
        return self

    def at(self, false_positive_rate: float, confidence: float = 0.95) -> Self:
        """The same detector with the threshold for another rate, of the clean scores that it has.

        Raises:
            ValueError: if there were too few images for the rate.
            RuntimeError: before :meth:`fit`.
        """
        found = copy.copy(self)
        found._fitted = {**self.description(), **_threshold(self.clean_scores, false_positive_rate, confidence)}
        return found

    def _note(self, fitted_on: dict[str, Any]) -> None:
        assert self._fitted is not None
        self._fitted["fitted_on"] = fitted_on

    def _seen(self, x: Tensor) -> Tensor:
        """What :meth:`fit` keeps of clean images, (N, ...)."""
        before, self._fitted = self._fitted, None  # of what it was fitted on before, nothing counts
        try:
            return self.score(x)
        finally:
            self._fitted = before

    def _learn(self, seen: Tensor) -> tuple[dict[str, Any], Tensor]:
        """What a detector learns of clean images beside the threshold, and their scores (n,)."""
        return {}, seen

    def _keep(self, seen: Tensor, rate: float, confidence: float) -> Tensor:
        """Fit on what was seen of clean images; their scores (n,), in the order of the images."""
        learned, scores = self._learn(seen)
        found = {**self._origin(), **_threshold(scores, rate, confidence), **learned}
        self._fitted, self._stamp = found, self._state()
        return scores

    def _known(self, key: str) -> Any:
        if self._fitted is None:
            raise RuntimeError(f"{type(self).__name__} has no threshold yet; call fit(loader) or load(path)")
        return self._fitted[key]

    def _check_weights(self) -> None:
        """ValueError where the model is not any more as it was when the threshold was found; none before that."""
        now = self._state()
        if self._fitted is not None and now != self._stamp:
            for key, value in json.loads(json.dumps(self._origin())).items():
                known = json.loads(json.dumps(self._fitted[key]))
                if value != known:
                    what = "weights" if key == "model" else key
                    raise ValueError(f"model has {what} {value!r}, the threshold is for {known!r}; call fit again")
            self._stamp = now

    @property
    def threshold(self) -> float:
        """Scores above it are suspicious; RuntimeError before :meth:`fit`."""
        return float(self._known("threshold"))

    @property
    def interval(self) -> tuple[float, float]:
        """In which the rate of false positives lies; RuntimeError before :meth:`fit`."""
        low, high = self._known("interval")
        return low, high

    @property
    def clean_scores(self) -> Tensor:
        """(n,) float64, ascending: the scores of the images that it was fitted on; RuntimeError before :meth:`fit`."""
        return torch.tensor(self._known("scores"), dtype=torch.float64)

    def predict(self, x: Tensor, ids: Tensor | None = None, draw: int = 0) -> Tensor:
        """(N,) bool: which images are suspicious; arguments as for :meth:`score`; RuntimeError before :meth:`fit`.

        An image whose score is NaN is.
        """
        threshold = self.threshold
        scores = self.score(x, ids, draw)
        self._check_weights()
        return ~(scores.double() <= threshold)

    def examine(self, x: Tensor, ids: Tensor | None = None, draw: int = 0) -> tuple[Tensor, Tensor | None]:
        """What :meth:`predict` gives, and the model's output on the images where it was computed for that; no graph.

        The output is that of the pass in which the detector looked at them, in the dtype of the images and the caller's
        to keep; None where there was none.
        """
        return self.predict(x, ids, draw), None

    @contextlib.contextmanager
    def objective(self, x: Tensor, ids: Tensor | None = None, draw: int = 0) -> Iterator[Objective]:
        """Minus what the score has above the threshold, in standard deviations of clean scores, for an ascent on ``x``.

        For attackers who want to be overlooked (Carlini and Wagner 2017): 0, and without a gradient, from a quarter of
        one below the threshold on; or from the median of the clean scores up to the threshold on, where that is
        higher, since of scores with a long tail nothing may lie so far below. A context, in which the model is in eval
        mode; RuntimeError before :meth:`fit`.
        """
        level, clean = self.threshold, self.clean_scores
        unit = max(float(clean.std(correction=0)), 1e-3 * abs(level), 1e-12)
        self._check_weights()
        with self._scores(x, ids, draw) as scores:
            yield _Unsuspicious(scores, max(level - unit / 4, float(clean[clean <= level].median())), unit)

    def _scores(self, x: Tensor, ids: Tensor | None, draw: int) -> contextlib.AbstractContextManager[Objective]:
        """The score as an objective; later steps of an ascent may see other draws of the views."""
        raise TypeError(f"{type(self).__name__} has no gradient; there is no attacker who evades it")

    def map(self, x: Tensor, ids: Tensor | None = None, draw: int = 0) -> Tensor:
        """(N, H, W): where in the images what they are suspected of lies, higher for more; arguments as for a score."""
        raise TypeError(f"{type(self).__name__} sees an image as a whole; it has no map")

    def description(self) -> dict[str, Any]:
        """What :meth:`save` writes; before :meth:`fit` without a threshold."""
        return dict(self._fitted or self._origin())

    def save(self, path: str | Path) -> None:
        """Write what was fitted as JSON: of which model and settings it is, and a digest of its images.

        RuntimeError before :meth:`fit`.
        """
        self._known("threshold")
        with replacing(Path(path)) as beside:
            beside.write_text(json.dumps(self._fitted, indent=1) + "\n")

    def load(self, path: str | Path) -> Self:
        """Read what :meth:`save` wrote.

        A model is known by its parameters and buffers: what it has as plain numbers, or as code, may differ unnoticed.

        Raises:
            ValueError: if the file is none of such, or of another detector, of other settings or of other weights.
        """
        try:
            found = json.loads(Path(path).read_text())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is no JSON: {error}") from None
        self._check_fitted(found, str(path))
        self._take(found, self._state())  # whose fingerprint is that of the file
        return self

    def _check_fitted(self, found: Any, where: str) -> None:
        """ValueError where what was read is not of this detector, or not whole."""
        own = json.loads(json.dumps(self._origin()))
        keys = {
            *own,
            "fitted_on",
            "threshold",
            "interval",
            "scores",
            "false_positive_rate",
            "confidence",
            *self._LEARNED,
        }
        if not isinstance(found, dict) or not own.keys() <= found.keys():
            raise ValueError(f"{where} is not of a detector; it must have {', '.join(sorted(keys))}")
        for key, value in own.items():
            if found[key] != value:
                what, was, now = _apart("weights" if key == "model" else key, found[key], value)
                raise ValueError(f"{where} is of a model or detector with {what} {was!r}; it must be {now!r}")
        if not keys <= found.keys():
            raise ValueError(f"{where} lacks {', '.join(sorted(keys - found.keys()))}")
        given = found["threshold"], found["interval"], found["scores"]
        right = (
            ("threshold", _are_numbers([given[0]]), "a number"),
            ("interval", _are_numbers(given[1], 2), "two numbers"),
            ("scores", _are_numbers(given[2]) and len(given[2]) > 0, "numbers, at least one"),
        )
        for key, good, must in itertools.chain(right, self._right(found, where)):  # the latter after the keys before
            if not good:
                raise ValueError(f"{where} has {key} {str(found[key])[:40]}; it must be {must}")

    def _right(self, found: dict[str, Any], where: str) -> Iterator[tuple[str, bool, str]]:
        """Of each key of what it learned, whether its value is as it must be, and how that is."""
        yield from ()

    def _take(self, fitted: dict[str, Any], state: object) -> None:
        self._fitted, self._stamp = fitted, state


def _are_numbers(value: Any, count: int | None = None) -> bool:
    """Whether it is a list of numbers, so many where that is given, and none of them NaN."""
    return (
        isinstance(value, list)
        and count in (None, len(value))
        and all(isinstance(n, int | float) and not isinstance(n, bool) and not math.isnan(n) for n in value)
    )


def _apart(name: str, was: Any, now: Any) -> tuple[str, Any, Any]:
    """Where two values of one name first differ: of dictionaries of the same keys, in which key."""
    while isinstance(was, dict) and isinstance(now, dict) and was.keys() == now.keys():
        key = next(key for key in now if was[key] != now[key])
        name, was, now = f"{name}, {key}", was[key], now[key]
    return name, was, now


def own_ids(x: Tensor) -> Tensor:
    """(N, ...) -> (N,) int64: ids that are functions of the images' values, and of nothing else."""
    bits = x.detach().to(torch.float32).flatten(1).contiguous().view(torch.int32)
    return bits.sum(1, dtype=torch.int64) if bits.shape[1] else torch.zeros(len(x), dtype=torch.int64, device=x.device)


def needed(false_positive_rate: float, confidence: float = 0.95) -> int:
    """How many clean images a rate takes."""
    for name, value in (("false_positive_rate", false_positive_rate), ("confidence", confidence)):
        if _checks.number(name, value, above=0) >= 1:
            raise ValueError(f"{name} is {value}; it must be below 1")
    return math.ceil(1 / false_positive_rate - 1 - 1e-9)


def _threshold(scores: Tensor, rate: float, confidence: float) -> dict[str, Any]:
    """The threshold of clean scores (n,), and between which rates of false positives it lies."""
    scores, n = scores.sort().values, len(scores)
    if n < (least := needed(rate, confidence)):
        raise ValueError(
            f"false_positive_rate is {rate}, which takes {least} clean images; of {n} it must be at least "
            f"{1 / (n + 1):.3g}"
        )
    place = min(n, math.ceil((n + 1) * (1 - rate) - 1e-9))
    # the part of all images above the place-th smallest of n is Beta(n + 1 - place, place)
    from scipy.stats import beta  # here, since it takes its time

    low, high = (float(beta.ppf(q, n + 1 - place, place)) for q in ((1 - confidence) / 2, (1 + confidence) / 2))
    return {
        "false_positive_rate": float(rate),
        "confidence": float(confidence),
        "threshold": float(scores[place - 1]),
        "interval": [low, high],
        "scores": scores.tolist(),
    }


class Similarity(Detector):
    """One minus the mean agreement of a purifier's views with the image: 1 - :meth:`equifast.Purifier.score`.

    A forward pass for the image and for each view, and nothing else, once a folded copy of the model has been tried at
    the first call. With ``equifast.defenses.Invariance``,
    ``Rotation`` and ``Contrastive`` in the place of the purifier it is the detector of theirs.

    Args:
        purifier: whose views, features and agreement count; few views, ``views=[Flip()]``, take least time.
    """

    def __init__(self, purifier: Purifier) -> None:
        if not isinstance(purifier, Purifier):
            raise TypeError(f"purifier is a {type(purifier).__name__}; it must be a Purifier")
        if purifier.seed is None:
            raise ValueError("purifier has seed=None, with which scores change from call to call; it must have a seed")
        super().__init__(purifier.model)  # type: ignore[arg-type]
        self.purifier = purifier

    # of a purifier, what decides where an ascent goes and not what it climbs
    _UNUSED = (
        *("model", "preset", "norm", "eps", "steps", "step_size", "start", "noise", "momentum", "restarts", "keep"),
        *("stop", "views_per_step", "view_gradient", "followed", "average", "fold", "max_batch", "max_memory"),
        *("capture", "compile"),
    )

    def settings(self) -> dict[str, Any]:
        found = {key: value for key, value in self.purifier._described().items() if key not in self._UNUSED}
        found["dtype"] = _resolved(str(found["dtype"]), self.model)
        settings: dict[str, Any] = describe(found)
        return settings

    def _state(self) -> object:
        head, folded = getattr(self.purifier, "head", None), self.purifier._folded
        return super()._state(), folded and folded.version, stamp(head) if isinstance(head, nn.Module) else None

    def score(self, x: Tensor, ids: Tensor | None = None, draw: int = 0) -> Tensor:
        x = _checks.images("x", x, channels=3)
        found = 1 - self.purifier.score(x, own_ids(x) if ids is None else ids, draw)
        self._check_weights()
        return found

    @contextlib.contextmanager
    def _scores(self, x: Tensor, ids: Tensor | None, draw: int) -> Iterator[Objective]:
        x = _checks.images("x", x, channels=3)
        with self.purifier.objective(x, own_ids(x) if ids is None else ids, draw, scored=True) as similarity:
            yield Scaled(similarity, -1.0, offset=1.0)

    def map(self, x: Tensor, ids: Tensor | None = None, draw: int = 0) -> Tensor:
        """(N, H, W) in [0, 2]: one minus the cosine of features, in the mean over the views that see a position.

        TypeError where the purifier is another than that of equivariance, which compares no maps.
        """
        if type(self.purifier) is not Purifier:
            return super().map(x, ids, draw)
        x = _checks.images("x", x, channels=3)
        ids = own_ids(x) if ids is None else ids
        with self.purifier._objective(x, ids, draw, None) as (images, objective, _, _):
            if len(images) == 0:
                return x.new_zeros(0, *x.shape[2:])
            with torch.no_grad():
                apart = [
                    objective.only(rows).distances(images[rows])  # type: ignore[attr-defined, unused-ignore]
                    for rows in self.purifier._chunks(images, graph=False)
                ]
            return _enlarged(torch.cat(apart), images)


class _Unsuspicious:
    """Minus what scores have above ``level``, in units of ``unit``."""

    def __init__(self, scores: Objective, level: float, unit: float) -> None:
        self._scores, self._level, self._unit = scores, level, unit

    @property
    def fixed(self) -> bool:
        return self._scores.fixed

    def value(self, x: Tensor) -> Tensor:
        return -(self._scores.value(x) - self._level).clamp(min=0) / self._unit

    def gradient(self, x: Tensor, t: int) -> tuple[Tensor, Tensor]:
        value, gradient = self._scores.gradient(x, t)
        above = (value > self._level).view(-1, *[1] * (gradient.dim() - 1))
        return -(value - self._level).clamp(min=0) / self._unit, -torch.where(above, gradient, 0.0) / self._unit

    def only(self, rows: Tensor | slice) -> "_Unsuspicious":
        return _Unsuspicious(self._scores.only(rows), self._level, self._unit)


class _Graph:
    """Scores that autograd differentiates: ``(x, ids, step) -> (N,)``."""

    fixed = False

    def __init__(self, function: Callable[[Tensor, Tensor, int], Tensor], ids: Tensor) -> None:
        self._function, self._ids = function, ids

    def value(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self._function(x, self._ids, 0)

    def gradient(self, x: Tensor, t: int) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            value = self._function(leaf, self._ids, t)
            return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]

    def only(self, rows: Tensor | slice) -> "_Graph":
        return _Graph(self._function, self._ids[rows])


def _in_frame(output: Tensor, view: Sampled, like: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities that a model gives for a view, as dense as ``like`` in the frame of the image, and the overlap."""
    found = probabilities(output)
    if found.dim() != 4:
        return found, torch.ones_like(found[:, :1])
    back, overlap = ops.in_frame(found, view.theta, (like.shape[2], like.shape[3]))
    return back, overlap.to(back.dtype)


def _enlarged(maps: Tensor, x: Tensor) -> Tensor:
    """(N, h, w) at the resolution of the images, (N, H, W) in their dtype."""
    size = (x.shape[2], x.shape[3])
    return functional.interpolate(maps[:, None].to(x.dtype), size, mode="bilinear", align_corners=False)[:, 0]


class _OfViews(Detector):
    """The base of detectors that look at what a model says of an image and of views of it, in one pass each.

    Maps with a longer side than ``_SIDE`` are averaged over squares of positions first: more tell no more, and their
    softmax would take longer than the network. A subclass gives :meth:`_measure`.
    """

    _SIDE = 64

    def __init__(
        self,
        model: nn.Module,
        features: Where | Sequence[str | None],
        views: Sequence[View],
        seed: int,
        dtype: str,
    ) -> None:
        self.views = as_set(views)
        if seed is None:
            raise ValueError("seed is None, with which scores change from call to call; it must be a number")
        _checks.seed(seed)
        self.seed, self.dtype = seed, _checks.choice("dtype", dtype, DTYPES)
        super().__init__(model)
        several: Sequence[Where] = features if isinstance(features, list | tuple) else [features]  # type: ignore[list-item]
        if not several:
            raise ValueError("features is empty; there must be at least one")
        self._features = [Features(model, where) for where in several]
        places = [each.place for each in self._features]
        known = all(place is not None for place in places)
        self._folded = Folded(model, [place for place in places if place]) if known else None

    def settings(self) -> dict[str, Any]:
        named = describe([each.where for each in self._features])
        dtype = _resolved(self.dtype, self.model)
        return {"views": [repr(view) for view in self.views], "features": named, "seed": self.seed, "dtype": dtype}

    def _state(self) -> object:
        return super()._state(), self._folded and self._folded.version

    def _modules(self) -> list[nn.Module]:
        """The Modules that a function is, or is a method of."""
        return [self.model, *(module for each in self._features for module in each.modules())]

    def _measure(self, x: Tensor, run: "_Run", sampled: Sequence[Sampled]) -> Tensor:
        """(N, ...), differentiable: what decides the score."""
        raise NotImplementedError

    def _judge(self, measured: Tensor) -> Tensor:
        """(N, ...) -> scores (N,)."""
        return measured

    def _measured(
        self,
        x: Tensor,
        ids: Tensor,
        draw: int,
        step: int = 0,
        how: Callable[..., Tensor] | None = None,
        own: Callable[[slice, Tensor], None] | None = None,
    ) -> Tensor:
        """In a context in which the model is in eval mode; ``own`` is told the model's output, part by part."""
        features = self._features
        if self._folded is not None:

            def run_all(model: nn.Module, images: Tensor) -> Tensor:
                found, result = passed([each.on(model) for each in self._features], images)
                return torch.cat([part.flatten(1) for part in (*found, result)], 1)

            folded = self._folded(x, run_all)
            features = [each.on(folded) for each in features]
        side = self._SIDE if how is None else None
        run, size = _Run(features, autocast(self.dtype, x), side), (x.shape[2], x.shape[3])
        parts = []
        held = sum(positions(self.views, size)) if not torch.is_grad_enabled() else 0
        for rows in chunks(x, at_once(x, held)):
            sampled = sample(self.views, size, seed=self.seed, ids=ids[rows], draw=draw, step=step)
            parts.append((how or self._measure)(x[rows], run, sampled))
            if own is not None:
                own(rows, run.own)
        return torch.cat(parts)

    def _checked(self, x: Tensor, ids: Tensor | None, draw: int) -> tuple[Tensor, Tensor]:
        x = _checks.images("x", x, channels=3)
        _checks.integer("draw", draw, 0, rng.MAX_DRAW)
        return x, own_ids(x) if ids is None else _checks.ids(ids, len(x), x.device)

    def _seen(self, x: Tensor) -> Tensor:
        x, numbers = self._checked(x, None, 0)
        with torch.no_grad(), evaluating(x, *self._modules(), lean=True):
            return self._measured(x, numbers, 0)

    def score(self, x: Tensor, ids: Tensor | None = None, draw: int = 0) -> Tensor:
        x, numbers = self._checked(x, ids, draw)
        if len(x) == 0:
            return x.new_zeros(0)
        with torch.no_grad(), evaluating(x, *self._modules(), lean=True):
            found = self._judge(self._measured(x, numbers, draw))
        self._check_weights()
        return found

    def examine(self, x: Tensor, ids: Tensor | None = None, draw: int = 0) -> tuple[Tensor, Tensor | None]:
        x, numbers = self._checked(x, ids, draw)
        threshold, own = self.threshold, None
        if len(x) == 0:
            return self.predict(x), None

        def keep(rows: slice, output: Tensor) -> None:
            nonlocal own
            own = put(own, len(x), rows, output, x.dtype)

        with torch.no_grad(), evaluating(x, *self._modules(), lean=True):
            scores = self._judge(self._measured(x, numbers, draw, own=keep))
        self._check_weights()
        return ~(scores.double() <= threshold), own

    @contextlib.contextmanager
    def _scores(self, x: Tensor, ids: Tensor | None, draw: int) -> Iterator[Objective]:
        with torch.inference_mode(False):
            x, numbers = self._checked(x, ids, draw)
            with evaluating(x, *self._modules(), lean=True):
                yield _Graph(lambda x, ids, step: self._judge(self._measured(x, ids, draw, step)), numbers)


def _check_classes(logits: Tensor) -> None:
    if logits.shape[1] < 2:
        raise ValueError(f"model gives {logits.shape[1]} class; of two or more there must be probabilities that vary")


class _Run:
    """A model, under autocast where that is asked for: images -> features and output, in float32 or wider.

    Args:
        features: of the model, one or several, and the model.
        lowered: the dtype of autocast, or None.
        side: maps with a longer side than that are averaged over squares of positions until they have no longer one.

    Attributes:
        own: the whole output on the first of the images that ran last, as the model gives it.
    """

    own: Tensor

    def __init__(self, features: Sequence[Features], lowered: torch.dtype | None, side: int | None = None) -> None:
        self._features, self._lowered, self._side = features, lowered, side

    def of(self, images: Sequence[Tensor]) -> list[tuple[list[Tensor], Tensor]]:
        """Of several images (N, 3, h, w), or views, those of one size in one pass while they are few."""
        found: dict[int, tuple[list[Tensor], Tensor]] = {}
        for batch in batched(len(images[0]), [tuple(image.shape[2:]) for image in images], together(images[0])):
            features, output = self._pass(torch.cat([images[i] for i in batch]))
            if 0 in batch:
                self.own = output[: len(images[0])]  # the first of its batch
            less = self._less(output)
            maps = [less if each is output else self._less(each) for each in features]
            parts = zip(*(each.chunk(len(batch)) for each in (*maps, less)), strict=True)
            found.update({i: (list(part[:-1]), part[-1]) for i, part in zip(batch, parts, strict=True)})
        return [found[i] for i in range(len(images))]

    def _pass(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        enabled = self._lowered is not None
        with torch.autocast(images.device.type, dtype=self._lowered, enabled=enabled, cache_enabled=False):
            features, output = passed(self._features, images)
        _checks.logits(output, len(images))
        return features, output

    def _less(self, maps: Tensor) -> Tensor:
        if self._side is not None and maps.dim() == 4 and max(maps.shape[2:]) > self._side:
            times = -(-max(maps.shape[2:]) // self._side)
            maps = functional.adaptive_avg_pool2d(maps, (-(-maps.shape[2] // times), -(-maps.shape[3] // times)))
        return maps.to(torch.promote_types(maps.dtype, torch.float32))


class Deviation(_OfViews):
    """How far what views say of an image is from what they say of clean ones, to either side.

    Of each view three numbers, one minus the cosines of its features with the image's: as whole maps, position by
    position and pooled; the first of these of each further kind of features too; and the variance that it brings into
    the output. Their logarithms lie, on clean images, about a mean, with a covariance, both of which ``fit`` finds
    (Ledoit and Wolf 2004), and the score is the Mahalanobis distance from it. Views of an attacked image agree less
    than those of clean ones; those of an image that is blurred, or of something else, may agree more, or in another
    way.

    Large maps, with a side of more than 64, are averaged over squares of positions first. The threshold is that of
    clean images which the mean and covariance have not seen, by cross-validation over contiguous parts, since images
    that follow each other may be alike; so its rate and interval are about those of :meth:`fit`, and no promise.

    Args:
        model: images in [0, 1] to logits, (N, C) or dense.
        features: as in :class:`equifast.Purifier`, or a sequence of names, None for the model's own output: they come
            from the same pass. A second, early layer sees blur, weather and foreign images better.
        views: the set of views.
        seed: 0..2**32-1.
        dtype: as in :class:`equifast.Purifier`, but for float16.
    """

    _LEARNED = ("mean", "precision")
    _FOLDS = 10  # of images that follow each other: with few images more folds would be of one or two

    def __init__(
        self,
        model: nn.Module,
        features: Where | Sequence[str | None] = None,
        views: Sequence[View] = (Flip(),),
        *,
        seed: int = 0,
        dtype: str = "auto",
    ) -> None:
        super().__init__(model, features, views, seed, dtype)

    def _measure(self, x: Tensor, run: _Run, sampled: Sequence[Sampled]) -> Tensor:
        """(N, (F + 3) K): logarithms."""
        (anchors, first), *others = run.of([x, *rendered(x, sampled)])
        for anchor in anchors:
            if anchor.dim() != 4:
                raise ValueError(f"features have shape {_checks.shape(anchor)}; they must be (N, C, h, w)")
        _check_classes(first)
        first, columns = probabilities(first), []
        for (maps, output), view in zip(others, sampled, strict=True):
            for anchor, other in zip(anchors, maps, strict=True):
                columns.append(1 - ops.similarity(anchor, [other], view.theta[None], reduction="image")[:, 0])
            anchor, other = anchors[0], maps[0]
            columns.append(1 - ops.similarity(anchor, [other], view.theta[None], reduction="pixel")[:, 0])
            ours, its = (functional.normalize(pooled(each), eps=1e-6) for each in (anchor, other))
            columns.append(1 - row_sum(ours * its))
            prediction, overlap = _in_frame(output, view, first)
            apart = ((prediction - first).square().sum(1, keepdim=True) / 4 * overlap).flatten(1)
            columns.append(row_sum(apart) / row_sum(overlap.flatten(1)).clamp(min=1))
        # rounding may take a cosine past 1
        return torch.stack([column.clamp(min=0).add(1e-4).log() for column in columns], 1)

    def map(self, x: Tensor, ids: Tensor | None = None, draw: int = 0) -> Tensor:
        """(N, H, W) in [0, 2]: one minus the cosine of the first features, the mean over views that see a position.

        It tells where views disagree; that they agree more than those of clean images, it does not.
        """
        x, numbers = self._checked(x, ids, draw)
        if len(x) == 0:
            return x.new_zeros(0, *x.shape[2:])

        def apart(x: Tensor, run: _Run, sampled: Sequence[Sampled]) -> Tensor:
            (anchors, _), *others = run.of([x, *rendered(x, sampled)])
            return distances(anchors[0], [maps[0] for maps, _ in others], sampled)

        with torch.no_grad(), evaluating(x, *self._modules(), lean=True):
            return _enlarged(self._measured(x, numbers, draw, how=apart), x)

    def _right(self, found: dict[str, Any], where: str) -> Iterator[tuple[str, bool, str]]:
        mean, rows = found["mean"], found["precision"]
        yield "mean", _are_numbers(mean) and len(mean) > 0, "numbers, at least one"
        square = isinstance(rows, list) and len(rows) == len(mean) and all(_are_numbers(row, len(mean)) for row in rows)
        yield "precision", square, f"{len(mean)} rows of as many numbers"

    def _judge(self, measured: Tensor) -> Tensor:
        mean, precision = (
            torch.tensor(self._known(key), dtype=torch.float64, device=measured.device) for key in self._LEARNED
        )
        if len(mean) != measured.shape[1]:
            raise ValueError(
                f"fitted are {len(mean)} numbers of an image, here are {measured.shape[1]}; call fit again"
            )
        return _distance(measured.double(), mean, precision).to(measured.dtype)

    def _learn(self, seen: Tensor) -> tuple[dict[str, Any], Tensor]:
        least = seen.shape[1] + 2
        if len(seen) < least:
            raise ValueError(f"loader has {len(seen)} images; for a covariance it must have at least {least}")
        folds, scores = min(len(seen), self._FOLDS), torch.zeros(len(seen), dtype=torch.float64)
        place = torch.arange(len(seen)) * folds // len(seen)
        for fold in range(folds):
            out = place == fold
            scores[out] = _distance(seen[out], *_clean(seen[~out]))
        mean, precision = _clean(seen)
        return {"mean": mean.tolist(), "precision": precision.tolist()}, scores


def _clean(measured: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and the inverse (D, D) of a covariance, of measurements (n, D)."""
    from sklearn.covariance import LedoitWolf  # here, since it takes its time

    unit = measured.std(0, correction=0).clamp(min=1e-6)
    found = LedoitWolf().fit((measured / unit).numpy())
    mean, precision = (torch.from_numpy(part) for part in (found.location_, found.precision_))
    return mean * unit, precision / unit / unit[:, None]


def _distance(measured: Tensor, mean: Tensor, precision: Tensor) -> Tensor:
    """(N, D) -> (N,), the Mahalanobis distance; products and sums, whose rounding does not depend on N."""
    apart = measured - mean
    turned = (apart[:, None, :] * precision).sum(2)
    return (turned * apart).sum(1).clamp(min=1e-12).sqrt()


class OutputVariance(_OfViews):
    """How much the predicted probabilities vary over the image and its views, warped back.

    At each position the variance of each class's probability over the image and the views that see it, summed over the
    classes; of that the mean over positions. It needs no features, and is in [0, 1]. Logits of large maps, with a side
    of more than 64, are averaged over squares of positions before the softmax.

    The squared error of a prediction (Brier 1950), in the mean over the image and its views, is that of their mean
    prediction plus this variance (Krogh and Vedelsby 1995): it is a lower bound of the error, whatever is true. Where
    the mean prediction p is calibrated its own error is ``1 - |p|^2`` in expectation, and with that added the score
    estimates the error itself.

    Args:
        model: images in [0, 1] to logits, (N, C) or dense.
        views: the set of views; :func:`equifast.views.guard` before a purifier.
        error: whether the score is that estimate of the error instead, in [0, 2].
        seed: 0..2**32-1.
        dtype: as in :class:`equifast.Purifier`, but for float16.
    """

    def __init__(
        self,
        model: nn.Module,
        views: Sequence[View] = (Flip(),),
        *,
        error: bool = False,
        seed: int = 0,
        dtype: str = "auto",
    ) -> None:
        super().__init__(model, None, views, seed, dtype)
        self.error = _checks.boolean("error", error)
        self.most = 1.0 if error else 0.25

    def settings(self) -> dict[str, Any]:
        dtype = _resolved(self.dtype, self.model)
        settings = {"views": [repr(view) for view in self.views], "seed": self.seed, "dtype": dtype}
        return {**settings, "error": True} if self.error else settings

    def _measure(self, x: Tensor, run: _Run, sampled: Sequence[Sampled]) -> Tensor:
        variance = self._variance(x, run, sampled)
        return variance if variance.dim() == 1 else row_sum(variance.flatten(1)) / variance[0].numel()

    def _variance(self, x: Tensor, run: _Run, sampled: Sequence[Sampled]) -> Tensor:
        """(N,), or (N, h, w)."""
        (_, first), *others = run.of([x, *rendered(x, sampled)])
        _check_classes(first)
        first = probabilities(first)
        # about the first prediction, lest squares cancel
        count, total, squares = torch.ones_like(first[:, :1]), torch.zeros_like(first), torch.zeros_like(first)
        for (_, output), view in zip(others, sampled, strict=True):
            prediction, overlap = _in_frame(output, view, first)
            apart = (prediction - first) * overlap
            count, total, squares = count + overlap, total + apart, squares + apart.square()
        mean = total / count
        variance = (squares / count - mean.square()).clamp(min=0).sum(1)
        return variance + (1 - (first + mean).square().sum(1)).clamp(min=0) if self.error else variance

    def map(self, x: Tensor, ids: Tensor | None = None, draw: int = 0) -> Tensor:
        """(N, H, W): the score at each position; TypeError for a model without dense output."""
        x, numbers = self._checked(x, ids, draw)
        if len(x) == 0:
            return x.new_zeros(0, *x.shape[2:])
        with torch.no_grad(), evaluating(x, self.model, lean=True):
            variance = self._measured(x, numbers, draw, how=self._variance)
        if variance.dim() == 1:
            raise TypeError("model gives logits (N, C); for a map they must be dense, (N, C, h, w)")
        return _enlarged(variance, x)


class Combined(Detector):
    """The most anomalous that several detectors find an image: each sees something else.

    The largest of their scores' logarithms, each in standard deviations of those of clean images from their mean.

    Args:
        detectors: of one model, at least two; copies of them are fitted together, on the same images.
    """

    _LEARNED = ("parts", "centers", "units")

    def __init__(self, detectors: Sequence[Detector]) -> None:
        for detector in detectors:
            if not isinstance(detector, Detector):
                raise TypeError(f"detectors has a {type(detector).__name__}; they must be Detectors")
        if len(detectors) < 2:
            raise ValueError(f"detectors has {len(detectors)}; there must be at least two")
        if any(detector.model is not detectors[0].model for detector in detectors):
            raise ValueError("detectors are of several models; they must be of one")
        super().__init__(detectors[0].model)
        self.detectors = tuple(map(copy.copy, detectors))  # whose own thresholds stay
        self.most = self.detectors[0].most
        self._widths: list[int] = []  # of what each has seen of an image

    def __copy__(self) -> Self:
        """With parts of its own, which are fitted with it."""
        found = type(self).__new__(type(self))
        found.__dict__.update(self.__dict__, detectors=tuple(map(copy.copy, self.detectors)))
        return found

    def _state(self) -> object:
        return super()._state(), *(detector._state() for detector in self.detectors)

    def settings(self) -> dict[str, Any]:
        return {"parts": [[type(detector).__name__, detector.settings()] for detector in self.detectors]}

    def score(self, x: Tensor, ids: Tensor | None = None, draw: int = 0) -> Tensor:
        found = torch.stack([detector.score(x, ids, draw) for detector in self.detectors], 1)
        return _standard(found, *self._centers(found)).amax(1)

    def _centers(self, like: Tensor) -> tuple[Tensor, Tensor]:
        centers, units = (torch.tensor(self._known(key)).to(like) for key in ("centers", "units"))
        return centers, units

    def _seen(self, x: Tensor) -> Tensor:
        seen = [detector._seen(x).double().view(len(x), -1) for detector in self.detectors]
        self._widths = [part.shape[1] for part in seen]
        return torch.cat(seen, 1)

    def _keep(self, seen: Tensor, rate: float, confidence: float) -> Tensor:
        detectors, parts = tuple(map(copy.copy, self.detectors)), []  # all are fitted, or none
        for detector, part in zip(detectors, seen.split(self._widths, 1), strict=True):
            parts.append(detector._keep(part[:, 0] if part.shape[1] == 1 else part, rate, confidence))
        found = torch.stack(parts, 1)
        logs = found.clamp(min=_LEAST).log()
        centers, units = logs.mean(0), logs.std(0, correction=0).clamp(min=1e-6)
        scores = _standard(found, centers, units).amax(1)
        learned = {
            "parts": [detector.description() for detector in detectors],
            "centers": centers.tolist(),
            "units": units.tolist(),
        }
        fitted = {**self._origin(), **_threshold(scores, rate, confidence), **learned}
        self.detectors, self._fitted, self._stamp = detectors, fitted, self._state()
        return scores

    def _note(self, fitted_on: dict[str, Any]) -> None:
        super()._note(fitted_on)
        assert self._fitted is not None
        for detector in self.detectors:
            detector._note(fitted_on)
        self._fitted["parts"] = [detector.description() for detector in self.detectors]

    def _right(self, found: dict[str, Any], where: str) -> Iterator[tuple[str, bool, str]]:
        count = len(self.detectors)
        for key in ("centers", "units"):
            yield key, _are_numbers(found[key], count), f"{count} numbers"
        yield "parts", isinstance(found["parts"], list) and len(found["parts"]) == count, f"{count} detectors"
        for number, (detector, part) in enumerate(zip(self.detectors, found["parts"], strict=True), start=1):
            detector._check_fitted(part, f"{where}, part {number}")

    def _take(self, fitted: dict[str, Any], state: object) -> None:
        super()._take(fitted, state)
        for detector, part in zip(self.detectors, fitted["parts"], strict=True):
            detector._take(part, detector._state())

    @contextlib.contextmanager
    def _scores(self, x: Tensor, ids: Tensor | None, draw: int) -> Iterator[Objective]:
        with contextlib.ExitStack() as stack:
            parts = [stack.enter_context(detector._scores(x, ids, draw)) for detector in self.detectors]
            yield _Largest(parts, *self._centers(torch.zeros(0, device=x.device)))

    def map(self, x: Tensor, ids: Tensor | None = None, draw: int = 0) -> Tensor:
        """That of the first detector."""
        return self.detectors[0].map(x, ids, draw)


_LEAST = 1e-6


def _standard(scores: Tensor, centers: Tensor, units: Tensor) -> Tensor:
    """(N, D) scores -> how many standard deviations of clean ones their logarithms are above the mean of these."""
    return (scores.clamp(min=_LEAST).log() - centers) / units


class _Largest:
    """The largest of several scores, each as :func:`_standard`."""

    fixed = False

    def __init__(self, parts: Sequence[Objective], centers: Tensor, units: Tensor) -> None:
        self._parts, self._centers, self._units = parts, centers, units

    def value(self, x: Tensor) -> Tensor:
        found = torch.stack([part.value(x) for part in self._parts], 1)
        return _standard(found, self._centers.to(found), self._units.to(found)).amax(1)

    def gradient(self, x: Tensor, t: int) -> tuple[Tensor, Tensor]:
        values, gradients = zip(*(part.gradient(x, t) for part in self._parts), strict=True)
        found = torch.stack(list(values), 1)
        largest, place = _standard(found, self._centers.to(found), self._units.to(found)).max(1)
        slope = 1 / (found.clamp(min=_LEAST) * self._units.to(found)).gather(1, place[:, None])[:, 0]
        chosen = torch.stack(list(gradients))[place, torch.arange(len(x), device=x.device)]
        return largest, chosen * slope.to(chosen).view(-1, *[1] * (x.dim() - 1))

    def only(self, rows: Tensor | slice) -> "_Largest":
        return _Largest([part.only(rows) for part in self._parts], self._centers, self._units)
