import math

import numpy as np
import pytest
import torch

from equifast.evaluate import Estimate, accuracy, confusion, difference, mean_iou


def test_confusion_and_iou_by_hand() -> None:
    labels = torch.tensor([[[0, 0, 1, 255]], [[1, 1, 2, 2]]])
    prediction = torch.tensor([[[0, 1, 1, 0]], [[1, 1, 2, 0]]])
    matrices = confusion(prediction, labels, 4)
    assert matrices.shape == (2, 4, 4)
    assert matrices[0].tolist() == [[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    # totals: class 0 hit 1 of union 3, class 1 hit 3 of 4, class 2 hit 1 of 2; class 3 does not occur
    assert mean_iou(matrices).value == pytest.approx(100 * (1 / 3 + 3 / 4 + 1 / 2) / 3)


def test_standard_errors() -> None:
    rng = np.random.default_rng(0)
    correct = rng.random(400) < 0.3
    estimate = accuracy(correct)
    p = correct.mean()
    assert estimate.standard_error == pytest.approx(100 * math.sqrt(p * (1 - p) / 400), rel=0.15)
    assert math.isnan(accuracy(correct[:1]).standard_error)
    assert str(Estimate(12.34, 0.56)) == "12.3 ± 0.6"


def test_differences_are_paired() -> None:
    rng = np.random.default_rng(0)
    hard = rng.random(300) < 0.5
    better = hard.copy()
    better[:30] = True
    gain = difference(better, hard)
    assert gain.value == pytest.approx(100 * (better.mean() - hard.mean()))
    assert gain.standard_error < accuracy(hard).standard_error / 2
    matrices = rng.integers(0, 9, (20, 3, 3))
    same = difference(matrices, matrices)
    assert (same.value, same.standard_error) == (0, 0)


def test_labels_that_are_no_class_are_refused() -> None:
    labels = torch.zeros(2, 2, 2, dtype=torch.int64)
    for wrong in (3, -1):
        labels[0, 0, 0] = wrong
        with pytest.raises(ValueError, match=f"labels has values from .*{wrong}.*; they must be 0 to 2"):
            confusion(torch.zeros_like(labels), labels, 3)
    with pytest.raises(ValueError, match="predictions has values from 0 to 3"):
        confusion(labels.clamp(min=0) + torch.eye(2, dtype=torch.int64) * 3, labels.clamp(min=0), 3)
    many = torch.zeros(70, 2, 2, dtype=torch.int64)
    prediction = many.clone()
    prediction[0, 0, 0] = 255  # is no class, whatever labels do not count
    with pytest.raises(ValueError, match="predictions has values from 0 to 255; they must be 0 to 1"):
        confusion(prediction, many, 2)
    many[0, 0, 0] = 255
    assert confusion(prediction, many, 2).sum() == 70 * 4 - 1
    with pytest.raises(ValueError, match=r"prediction has shape .3, 2, 2. for labels .70, 2, 2."):
        confusion(prediction[:3], many, 2)
