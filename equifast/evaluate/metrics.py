"""Accuracy and mean IoU with standard errors by bootstrap over images.

Every metric is a function of one array per image, kept, so that differences between two methods are paired.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from equifast.objectives import confusions

__all__ = ["Estimate", "accuracy", "average", "confusion", "difference", "mean_iou"]

Array = NDArray[Any]


@dataclass(frozen=True)
class Estimate:
    """A figure in percent, and its standard error by bootstrap over images (NaN for a single image)."""

    value: float
    standard_error: float

    def __str__(self) -> str:
        return f"{self.value:.1f} ± {self.standard_error:.1f}"


def confusion(prediction: Tensor, labels: Tensor, classes: int, ignore_index: int = 255) -> Array:
    """Confusion matrices of each image.

    Args:
        prediction: (N, H, W) int64 classes.
        labels: (N, H, W) int64 classes, ``ignore_index`` where a pixel does not count.
        classes: number of classes.

    Returns:
        (N, classes, classes) int64: pixels by true class (rows) and predicted class (columns).
    """
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
    return _estimate(lambda index: _iou(confusions[index].sum(-3)), len(confusions), resamples)


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
        return _estimate(lambda i: _iou(a[i].sum(-3)) - _iou(b[i].sum(-3)), len(a), resamples)
    return _estimate(lambda i: a[i].mean(-1) - b[i].mean(-1), len(a), resamples)
