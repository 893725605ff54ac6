"""Rates of invariance and robustness, against models of which they are known."""

import functools
from pathlib import Path
from typing import Any

import cases
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from equifast import attacks
from equifast.evaluate import invariance, plots, robustness
from equifast.nn import GCNN
from equifast.spatial import transform


class Upright(nn.Module):
    """Class 1 where the left half is brighter than the right, by how much; else class 0."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=3)
        margin = (left.mean((1, 2, 3)) - right.mean((1, 2, 3))) * self.scale
        return torch.stack((-margin, margin), 1)


def halves(count: int = 6) -> Tensor:
    """Images that are bright on the left alone, by 0.1, 0.2, ..."""
    x = torch.full((count, 1, 16, 16), 0.3)
    x[..., :8] += 0.1 * torch.arange(1, count + 1).view(-1, 1, 1, 1)
    return x


def test_invariance_of_a_half() -> None:
    """Turned by up to a right angle the bright half stays on its side; by any angle it does so half the time."""
    found = invariance(Upright(), halves(64) / 8, degrees=(0, 45, 85, 180), draws=16)
    values = [estimate.value for estimate in found.estimates]
    assert values[0] == values[1] == values[2] == 100
    assert 40 < values[3] < 60
    assert found.kept.shape == (4, 64)


def test_an_image_alone_and_by_its_id() -> None:
    x, model = halves(5), Upright()

    def kept(images: Tensor, ids: list[int]) -> Any:
        return invariance(model, images, degrees=(120, 180), draws=16, seed=3, ids=torch.tensor(ids)).kept

    whole = kept(x, [0, 1, 2, 3, 4])
    assert np.array_equal(whole, invariance(model, x, degrees=(120, 180), draws=16, seed=3).kept)
    assert np.array_equal(whole, np.concatenate([kept(x[i : i + 1], [i]) for i in range(5)], 1))
    assert not np.array_equal(whole, kept(x, [5, 6, 7, 8, 9]))
    assert len(set(whole[1])) > 1


def test_images_are_left_alone() -> None:
    model = nn.Sequential(cases.InPlace(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    x = cases.images(4)
    invariance(model, x, degrees=(0, 90), draws=1)
    robustness(model, x, eps=(0.01,))
    assert torch.equal(x, cases.images(4))


def test_an_invariant_network_keeps_all_at_quarter_turns() -> None:
    torch.manual_seed(0)
    x, invariant = torch.rand(3, 1, 28, 28), GCNN(invariant=True).eval()
    for turns in (90.0, 180.0, 270.0):
        turned = transform(x, torch.tensor([[turns, 0, 0]]).repeat(3, 1))
        torch.testing.assert_close(invariant(turned), invariant(x), atol=1e-5, rtol=1e-4)


def test_robustness_of_a_margin() -> None:
    """A difference of 0.1 k is gone at half of it, and not before."""
    found = robustness(Upright(), halves(), eps=(0, 0.08, 0.12, 0.17, 0.32))
    for k, kept in enumerate(found.kept.T, 1):
        assert kept.tolist() == [1.0 if eps < 0.05 * k else 0.0 for eps in found.places]
    fgsm = robustness(Upright(), halves(), eps=(0.12,), attack=lambda model, eps: attacks.FGSM(model, eps=eps))
    assert fgsm.kept[0].tolist() == [0, 0, 1, 1, 1, 1]


def test_plot(tmp_path: Path) -> None:
    curve = invariance(Upright(), halves(), degrees=(0, 90), draws=2)
    for path in plots.save(plots.rates({"a": curve, "b": curve}, "a title; "), tmp_path / "profile"):
        assert path.stat().st_size > 1000
    with pytest.raises(ValueError, match="curves is empty"):
        plots.rates({})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (functools.partial(invariance, degrees=()), "degrees is empty"),
        (functools.partial(invariance, degrees=90), "degrees is 90; it must be a sequence"),
        (functools.partial(robustness, eps=0.1), "eps is 0.1; it must be a sequence"),
        (functools.partial(invariance, degrees=(0, 200)), "degrees is 200"),
        (functools.partial(invariance, degrees=(30, 10)), "must ascend"),
        (functools.partial(invariance, draws=0), "draws is 0"),
        (functools.partial(robustness, eps=(-0.1,)), "eps is -0.1"),
        (functools.partial(robustness, eps=(0.1,), attack=3), "attack is a int"),
        (functools.partial(invariance, batch=0), "batch is 0"),
    ],
)
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call(Upright(), halves())


def test_no_images_and_no_labels() -> None:
    with pytest.raises(ValueError, match="x has no images"):
        invariance(Upright(), halves()[:0])
    with pytest.raises(ValueError, match=r"must give logits \(N, classes\)"):
        invariance(nn.Conv2d(1, 2, 1), halves())
