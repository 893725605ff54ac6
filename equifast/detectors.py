"""Detectors: how unlike the clean images of a model an image is, and from where on that is suspicious."""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from scipy.stats import beta
from torch import Tensor, nn

from equifast import _checks, rng
from equifast._cheap import DTYPES, Cheap
from equifast._fingerprint import fingerprint
from equifast.features import evaluating
from equifast.objectives import rendered, warped_back
from equifast.purifier import Purifier
from equifast.reference import row_sum
from equifast.views import Flip, View, as_set, sample

__all__ = ["Detector", "OutputVariance", "Similarity"]


class Detector:
    """The base: a subclass gives :meth:`settings` and :meth:`score`.

    Args:
        model: the model whose images they are.
    """

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is a {type(model).__name__}; it must be a Module, whose weights can be told apart")
        self.model = model
        self._fitted: dict[str, Any] | None = None

    def settings(self) -> dict[str, Any]:
        """What decides the score beside the model's weights, as values that JSON can hold."""
        raise NotImplementedError

    def _origin(self) -> dict[str, Any]:
        """Whose threshold it is."""
        weights = fingerprint(self.model.state_dict().values())
        return {"detector": type(self).__name__, "model": weights, "settings": self.settings()}

    def score(self, x: Tensor, ids: Tensor | None = None, draw: int = 0) -> Tensor:
        """How anomalous images are, higher for more; no graph.

        Args:
            x: (N, 3, H, W), floating point, in [0, 1].
            ids: (N,) int64: which random numbers each image gets; all 0 where None.
            draw: 0..65535, another realization of the views under the same seed.

        Returns:
            (N,). An image's score does not depend on the rest of the batch.
        """
        raise NotImplementedError

    def fit(self, loader: Iterable[Any], *, false_positive_rate: float = 0.05, confidence: float = 0.95) -> Self:
        """Find the threshold that few clean images exceed.

        Of n clean scores in ascending order the threshold is number ``ceil((n + 1) (1 - false_positive_rate))``: of new
        images like those the part above it is in the mean at most that rate (conformal prediction; Vovk et al. 2005),
        and lies in :attr:`interval` with the confidence given, by the distribution of order statistics.

        Args:
            loader: batches of clean images (N, 3, H, W) in [0, 1], or tuples that begin with one.
            false_positive_rate: above 0 and below 1.
            confidence: of the interval, above 0 and below 1.

        Raises:
            ValueError: if there are too few images for the rate, with the number that it needs, or a score is NaN.
        """
        rate = _checks.number("false_positive_rate", false_positive_rate, above=0)
        sure = _checks.number("confidence", confidence, above=0)
        for name, value in (("false_positive_rate", rate), ("confidence", sure)):
            if value >= 1:
                raise ValueError(f"{name} is {value}; it must be below 1")
        parts = []
        for item in loader:
            images = item[0] if isinstance(item, list | tuple) else item
            images = _checks.images("loader's images", images, channels=3)
            if len(images):
                parts.append(self.score(images).double().cpu())
        scores = torch.cat(parts).sort().values if parts else torch.zeros(0, dtype=torch.float64)
        n, needed = len(scores), math.ceil(1 / rate - 1 - 1e-9)
        if n < needed:
            raise ValueError(f"loader has {n} images; for false_positive_rate {rate} it must have at least {needed}")
        if scores.isnan().any():
            raise ValueError(f"model gives {int(scores.isnan().sum())} clean images a score of NaN; there must be none")
        place = min(n, math.ceil((n + 1) * (1 - rate) - 1e-9))
        # the part of all images above the place-th smallest of n is Beta(n + 1 - place, place)
        low, high = (float(beta.ppf(q, n + 1 - place, place)) for q in ((1 - sure) / 2, (1 + sure) / 2))
        self._fitted = {
            **self._origin(),
            "false_positive_rate": rate,
            "confidence": sure,
            "threshold": float(scores[place - 1]),
            "interval": [low, high],
            "scores": scores.tolist(),
        }
        return self

    def _known(self, key: str) -> Any:
        if self._fitted is None:
            raise RuntimeError(f"{type(self).__name__} has no threshold yet; call fit(loader) or load(path)")
        return self._fitted[key]

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
        return ~(self.score(x, ids, draw).double() <= threshold)

    def description(self) -> dict[str, Any]:
        """What :meth:`save` writes; before :meth:`fit` without a threshold."""
        return dict(self._fitted or self._origin())

    def save(self, path: str | Path) -> None:
        """Write what was fitted as JSON, and of which model and settings it is; RuntimeError before :meth:`fit`."""
        self._known("threshold")
        path = Path(path)
        beside = path.with_name(path.name + ".partial")
        try:
            beside.write_text(json.dumps(self._fitted, indent=1) + "\n")
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)

    def load(self, path: str | Path) -> Self:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: if the file is none of such, or of another detector, of other settings or of other weights.
        """
        try:
            found = json.loads(Path(path).read_text())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is no JSON: {error}") from None
        own = json.loads(json.dumps(self._origin()))
        keys = {*own, "threshold", "interval", "scores", "false_positive_rate", "confidence"}
        if not isinstance(found, dict) or not keys <= found.keys():
            raise ValueError(f"{path} is not of a detector; it must have {', '.join(sorted(keys))}")
        for key, value in own.items():
            if found[key] != value:
                what = "weights" if key == "model" else key
                raise ValueError(f"{path} is of a model or detector with {what} {found[key]!r}; it must be {value!r}")
        self._fitted = found
        return self


class Similarity(Detector):
    """One minus the mean agreement of a purifier's views with the image (:meth:`equifast.Purifier.score`).

    A forward pass for the image and for each view, and nothing else. With ``equifast.defenses.Invariance``,
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

    def settings(self) -> dict[str, Any]:
        kept = ("views", "pairing", "temperature", "reduction", "palette", "seed", "dtype")
        settings = {key: value for key, value in self.purifier.settings().items() if key in kept}
        where, head = self.purifier._features.where, getattr(self.purifier, "head", None)
        settings["features"] = where if where is None or isinstance(where, str) else "a function"
        settings["purifier"] = type(self.purifier).__name__
        if head is not None:
            settings["head"] = fingerprint(head.state_dict().values())
        return settings

    def score(self, x: Tensor, ids: Tensor | None = None, draw: int = 0) -> Tensor:
        return 1 - self.purifier.score(x, ids, draw)


class OutputVariance(Detector):
    """How much the predicted probabilities vary over the image and its views, warped back.

    At each position the variance of each class's probability over the image and the views that see it, summed over the
    classes; of that the mean over positions. It needs no features, and is in [0, 1/2].

    Args:
        model: images in [0, 1] to logits, (N, C) or dense.
        views: the set of views.
        seed: 0..2**32-1.
        dtype: as in :class:`equifast.Purifier`, but for float16.
    """

    def __init__(
        self, model: nn.Module, views: Sequence[View] = (Flip(),), *, seed: int = 0, dtype: str = "auto"
    ) -> None:
        self.views = as_set(views)
        if seed is None:
            raise ValueError("seed is None, with which scores change from call to call; it must be a number")
        _checks.seed(seed)
        self.seed, self.dtype = seed, _checks.choice("dtype", dtype, DTYPES)
        super().__init__(model)
        self._cheap = Cheap(model, dtype)

    def settings(self) -> dict[str, Any]:
        return {"views": [repr(view) for view in self.views], "seed": self.seed, "dtype": self.dtype}

    def score(self, x: Tensor, ids: Tensor | None = None, draw: int = 0) -> Tensor:
        x = _checks.images("x", x, channels=3)
        numbers = _checks.ids(ids, len(x), x.device)
        _checks.integer("draw", draw, 0, rng.MAX_DRAW)
        if len(x) == 0:
            return x.new_zeros(0)
        size = (x.shape[2], x.shape[3])
        sampled = sample(self.views, size, seed=self.seed, ids=numbers, draw=draw)
        with torch.no_grad(), evaluating(x, self.model):
            model = self._cheap.on(x)

            def predict(images: Tensor) -> Tensor:
                return model(images).softmax(1)

            first = predict(x.clone())
            if first.dim() == 4:
                pairs = warped_back(predict, x, sampled, (first.shape[2], first.shape[3]))
            else:
                pairs = [(predict(view), torch.ones_like(first[:, :1])) for view in rendered(x, sampled)]
            # about the first prediction, lest squares cancel
            count, total, squares = torch.ones_like(first[:, :1]), torch.zeros_like(first), torch.zeros_like(first)
            for probabilities, overlap in pairs:
                apart = (probabilities - first) * overlap
                count, total, squares = count + overlap, total + apart, squares + apart.square()
            variance = (squares / count - (total / count).square()).clamp(min=0).sum(1)
            return variance if variance.dim() == 1 else row_sum(variance.flatten(1)) / variance[0].numel()
