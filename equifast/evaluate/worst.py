"""The worst of several attacks, image by image."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from equifast.evaluate.metrics import _iou

__all__ = ["worst_accuracy", "worst_iou"]

Array = NDArray[Any]


def worst_accuracy(results: Array) -> NDArray[np.int64]:
    """Which attack leaves each image fewest labels right.

    Args:
        results: (A, N) bool, right or wrong; or (A, N, C, C), confusion matrices; of A attacks on N images.

    Returns:
        (N,) the index of the attack, the first of equals.
    """
    right = np.trace(results, axis1=-2, axis2=-1) if results.ndim == 4 else results
    chosen: NDArray[np.int64] = right.argmin(0)
    return chosen


def worst_iou(confusions: Array, rounds: int = 20) -> NDArray[np.int64]:
    """Which attack on each image makes the mean IoU of all of them least, greedily (SEA: Croce et al. 2024).

    Begins with the attack that leaves fewest pixels right, and goes through the images, each time taking the attack
    with which the totals have the least mean IoU, until nothing changes.

    Args:
        confusions: (A, N, C, C).
        rounds: at most so often through all images.

    Returns:
        (N,) the index of the attack. The mean IoU with it is at most that of any single attack.
    """
    attacks, n = confusions.shape[:2]
    single = [_iou(confusions[a].sum(0)) for a in range(attacks)]
    starts = [worst_accuracy(confusions), np.full(n, int(np.argmin(single)))]
    chosen = min(starts, key=lambda c: float(_iou(confusions[c, np.arange(n)].sum(0))))
    total = confusions[chosen, np.arange(n)].sum(0)
    for _ in range(rounds):
        changed = False
        for i in range(n):
            candidates = total - confusions[chosen[i], i] + confusions[:, i]
            values = _iou(candidates)
            best = int(values.argmin())
            if values[best] < values[chosen[i]]:
                chosen[i], total, changed = best, candidates[best], True
        if not changed:
            break
    return chosen
