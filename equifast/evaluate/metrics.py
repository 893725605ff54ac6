"""Accuracy and mean IoU with standard errors by bootstrap over images.

Every metric is a function of one array per image, kept, so that differences between two methods are paired.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from equifast.objectives import confusions, outside

__all__ = [
    "Estimate",
    "Interval",
    "Separation",
    "accuracy",
    "average",
    "class_iou",
    "confusion",
    "difference",
    "mean_auroc",
    "mean_auroc_difference",
    "mean_iou",
    "over_draws",
    "separation",
]

Array = NDArray[Any]


@dataclass(frozen=True)
class Estimate:
    """A figure in percent, and its standard error by bootstrap over images (NaN for a single image)."""

    value: float
    standard_error: float

    def __str__(self) -> str:
        return f"{self.value:.1f} ± {self.standard_error:.1f}"


@dataclass(frozen=True)
class Interval:
    """A figure in percent, and where it lies with 95% confidence by bootstrap over images."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.1f} ({self.low:.1f}-{self.high:.1f})"


@dataclass(frozen=True)
class Separation:
    """How well scores tell anomalous images from clean ones, in percent.

    Args:
        auroc: area under the receiver operating characteristic: how often an anomalous image has the higher score.
        aupr: average precision, anomalous images being the positive ones.
        fpr95: the part of clean images above the threshold that 95% of the anomalous ones reach.
    """

    auroc: Interval
    aupr: Interval
    fpr95: Interval


def confusion(prediction: Tensor, labels: Tensor, classes: int, ignore_index: int = 255) -> Array:
    """Confusion matrices of each image.

    Args:
        prediction: (N, H, W) int64 classes.
        labels: (N, H, W) int64 classes, ``ignore_index`` where a pixel does not count.
        classes: number of classes.

    Returns:
        (N, classes, classes) int64: pixels by true class (rows) and predicted class (columns).

    Raises:
        ValueError: for other shapes, and for labels or predictions, where labels count, that are no such class.
    """
    if prediction.shape != labels.shape or labels.dim() != 3:
        raise ValueError(
            f"prediction has shape {tuple(prediction.shape)} for labels {tuple(labels.shape)}; both must be (N, H, W)"
        )
    counted = prediction[labels != ignore_index]  # (P,), of which no value is left out
    for name, given in (("labels", labels), ("predictions", counted)):
        if beyond := outside(given, classes, ignore_index):
            raise ValueError(f"{name} has values {beyond}; they must be 0 to {classes - 1}")
    # torchmetrics would do, but importing it imports torchvision, and fails where that does not fit torch
    matrices: Array = confusions(prediction, labels, classes, ignore_index).numpy(force=True)
    return matrices


def _iou(total: Array) -> Array:
    """(..., C, C) counts -> (...), the mean over the classes that occur."""
    hit = np.diagonal(total, axis1=-2, axis2=-1)
    union = total.sum(-1) + total.sum(-2) - hit
    present = union > 0
    iou = np.where(present, hit / np.maximum(union, 1), 0.0)
    mean: Array = iou.sum(-1) / np.maximum(present.sum(-1), 1)
    return mean


def _estimate(statistic: Callable[[Array], Array], n: int, resamples: int) -> Estimate:
    """``statistic``: indices (..., M) of images -> figures (...) in 0..1."""
    value = 100 * float(statistic(np.arange(n)))
    if n < 2:
        return Estimate(value, float("nan"))
    from scipy import stats  # here, since it takes its time

    result = stats.bootstrap(
        (np.arange(n),),
        lambda index, axis: statistic(index),
        n_resamples=resamples,
        batch=100,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    return Estimate(value, 100 * float(result.standard_error))


def mean_iou(confusions: Array, resamples: int = 1000) -> Estimate:
    """Mean IoU from the totals of a data set, over the classes that occur.

    Args:
        confusions: (N, C, C), of each image.
        resamples: bootstrap samples of the images.
    """
    return _estimate(lambda index: _iou(_totals(confusions, index)), len(confusions), resamples)


def _totals(confusions: Array, index: Array) -> Array:
    """(N, C, C) and indices (..., M) -> (..., C, C), the sums over the images chosen; never (..., M, C, C)."""
    n, classes = len(confusions), confusions.shape[-1]
    rows = index.reshape(-1, index.shape[-1])
    places = rows + n * np.arange(len(rows))[:, None]
    counts = np.bincount(places.ravel(), minlength=n * len(rows)).reshape(len(rows), n)
    totals: Array = counts.astype(np.float64) @ confusions.reshape(n, -1)  # of whole numbers, and so exact
    return totals.reshape(*index.shape[:-1], classes, classes)


def class_iou(confusions: Array, index: int, resamples: int = 1000) -> Estimate:
    """The IoU of one class from the totals of a data set; 0 where it occurs nowhere.

    Args:
        confusions: (N, C, C), of each image.
        index: the class.
        resamples: bootstrap samples of the images.
    """
    hit = confusions[:, index, index]
    union = confusions[:, index].sum(-1) + confusions[:, :, index].sum(-1) - hit

    def figure(chosen: Array) -> Array:
        return np.asarray(hit[chosen].sum(-1) / np.maximum(union[chosen].sum(-1), 1))

    return _estimate(figure, len(confusions), resamples)


def average(values: Array, resamples: int = 1000) -> Estimate:
    """The mean over images of (N,) numbers in 0..1, in percent."""
    return _estimate(lambda index: np.asarray(values[index].mean(-1)), len(values), resamples)


def accuracy(correct: Array, resamples: int = 1000) -> Estimate:
    """The fraction of images that are right; ``correct`` is (N,) bool."""
    return _estimate(lambda index: correct[index].mean(-1), len(correct), resamples)


def difference(a: Array, b: Array, resamples: int = 1000) -> Estimate:
    """The figure of ``a`` minus that of ``b`` on the same images, by paired bootstrap.

    Args:
        a, b: per-image results of two methods: (N, C, C) confusion matrices, or (N,) bool.

    Raises:
        ValueError: if the shapes differ.
    """
    if a.shape != b.shape:
        raise ValueError(f"a has shape {a.shape}, b {b.shape}; they must be results on the same images")
    if a.ndim == 3:
        return _estimate(lambda i: _iou(_totals(a, i)) - _iou(_totals(b, i)), len(a), resamples)
    return _estimate(lambda i: a[i].mean(-1) - b[i].mean(-1), len(a), resamples)


def over_draws(a: Array, b: Array | None = None, resamples: int = 1000) -> Estimate:
    """The figure of several draws of a defense together, or that of ``a`` minus that of ``b``.

    Images share what a draw is for all of them, such as the sizes of views, and a bootstrap over images does not see
    how much of a figure is due to that: the standard error is that of the images and that of the mean of the draws,
    whose figures are taken one by one, as independent ones.

    Args:
        a: (D, N, C, C) confusion matrices or (D, N) bool of D draws on the same images.
        b: of another method, of as many draws.
        resamples: bootstrap samples of the images.

    Raises:
        ValueError: if the shapes differ.
    """
    draws, n = a.shape[:2]
    if b is not None and b.shape != a.shape:
        raise ValueError(f"a has shape {a.shape}, b {b.shape}; they must be as many draws' results on the same images")

    def figure(results: Array, index: Array) -> Array:
        if results.ndim == 3:
            return _iou(_totals(results, index))
        return np.asarray(results[index].mean(-1))

    def apart(given: list[Array], index: Array) -> Array:
        return figure(given[0], index) - (figure(given[1], index) if len(given) > 1 else 0.0)

    both = [a] if b is None else [a, b]
    whole = _estimate(functools.partial(apart, [part.mean(0) for part in both]), n, resamples)
    if draws < 2:
        return whole
    each = [100 * float(apart([part[draw] for part in both], np.arange(n))) for draw in range(draws)]
    return Estimate(whole.value, float(np.hypot(whole.standard_error, np.std(each, ddof=1) / draws**0.5)))


def separation(clean: Array, anomalous: Array, resamples: int = 1000, paired: bool = False) -> Separation:
    """How well scores, higher for what is more anomalous, separate two sets of images.

    The figures are scikit-learn's; those of bootstrap samples, a thousand at once, are the same formulas.

    Args:
        clean: (N,) scores, N at least 1; one that is NaN counts as higher than all.
        anomalous: (M,), M at least 1.
        resamples: bootstrap samples, drawn from both apart.
        paired: whether the anomalous images were made of the clean ones, in the same order, and are drawn with them.

    Where all samples agree, as when nothing overlaps, an interval ends where the exact one of a proportion does
    (Clopper and Pearson 1934), of as many trials as the smaller set has images.
    """
    from sklearn import metrics  # here, since it takes its time

    found = np.concatenate([clean, anomalous]).astype(np.float64)
    ranks = np.unique(found, return_inverse=True, equal_nan=True)[1]  # NaN the last
    truth = np.arange(len(found)) >= len(clean)
    false, true, _ = metrics.roc_curve(truth, ranks, drop_intermediate=False)
    precision = float(metrics.average_precision_score(truth, ranks))
    values = [float(metrics.auc(false, true)), precision, float(false[np.argmax(true >= _REACHED)])]
    rng, n, m = np.random.default_rng(0), len(clean), len(anomalous)
    if paired and n != m:
        raise ValueError(f"clean has {n} scores, anomalous {m}; paired, they must be as many")
    drawn = rng.multinomial(n, np.full(n, 1 / n), size=resamples)
    others = drawn if paired else rng.multinomial(m, np.full(m, 1 / m), size=resamples)
    sampled = _separations(ranks, truth, np.concatenate([drawn, others], 1))
    return Separation(*(_interval(value, column, min(n, m)) for value, column in zip(values, sampled.T, strict=True)))


def _interval(value: float, sampled: Array, n: int) -> Interval:
    """95% of what bootstrap samples (R,) of at least n images give."""
    low, high = (float(part) for part in np.percentile(sampled, [2.5, 97.5]))
    beyond = 0.025 ** (1 / n)
    if low > 1 - 1e-9:
        low, high = beyond, 1.0
    elif high < 1e-9:
        low, high = 0.0, 1 - beyond
    return Interval(*(100 * part for part in (value, low, high)))


_REACHED = 0.95 - 1e-9


def _separations(ranks: Array, truth: Array, weights: Array) -> Array:
    """(R, 3): the three figures of samples in which each of the scores occurs (R, N + M) times."""
    order = np.argsort(-ranks, kind="stable")
    last = np.append(np.flatnonzero(np.diff(ranks[order])), len(order) - 1)  # of equal scores
    counts = [np.cumsum(weights[:, order] * chosen[order], 1)[:, last] for chosen in (truth, ~truth)]
    positive, negative = (np.concatenate([np.zeros((len(weights), 1)), count], 1) for count in counts)
    true, false = positive / positive[:, -1:], negative / negative[:, -1:]
    area = (np.diff(false) * (true[:, 1:] + true[:, :-1]) / 2).sum(1)
    precision = positive[:, 1:] / np.maximum(positive[:, 1:] + negative[:, 1:], 1)
    average = (np.diff(true) * precision).sum(1)
    reached = np.take_along_axis(false, np.argmax(true >= _REACHED, 1)[:, None], 1)[:, 0]
    figures: Array = np.stack([area, average, reached], 1)
    return figures


def mean_auroc(clean: Array, anomalous: Array, resamples: int = 1000) -> Interval:
    """The mean area under the characteristic of several kinds of anomalies made of the same images.

    Args:
        clean: (N,) scores.
        anomalous: (G, N) scores of what was made of these images, kind by kind.
        resamples: bootstrap samples of the images, which clean ones and all kinds share.
    """
    value, drawn = _mean_aurocs(clean, anomalous, resamples)
    return _interval(value, drawn, len(clean))


def mean_auroc_difference(a: tuple[Array, Array], b: tuple[Array, Array], resamples: int = 1000) -> Estimate:
    """The mean area of one detector minus that of another, in percent, paired over images.

    Args:
        a, b: of each detector the scores of :func:`mean_auroc`, clean ones and others, of the same images.
        resamples: bootstrap samples of the images, which both share.

    Raises:
        ValueError: if the shapes differ.
    """
    if a[1].shape != b[1].shape or a[0].shape != b[0].shape:
        raise ValueError(f"a has scores {a[1].shape}, b {b[1].shape}; they must be of the same images and kinds")
    (one, drawn), (other, others) = (_mean_aurocs(*scores, resamples) for scores in (a, b))
    spread = float("nan") if len(a[0]) < 2 else 100 * float((drawn - others).std(ddof=1))
    return Estimate(100 * (one - other), spread)


def _mean_aurocs(clean: Array, anomalous: Array, resamples: int) -> tuple[float, Array]:
    """The mean area, and that of bootstrap samples (R,)."""
    clean, anomalous = np.nan_to_num(clean, nan=np.inf), np.nan_to_num(anomalous, nan=np.inf)
    above = (anomalous[:, :, None] > clean).mean(0) + (anomalous[:, :, None] == clean).mean(0) / 2  # (N, N)
    n = len(clean)
    weights = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=resamples) / n
    return float(above.mean()), ((weights @ above) * weights).sum(1)
