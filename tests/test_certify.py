"""CLEVER against models whose largest gradients are known, its samples, its fits, and bad input."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from equifast import attacks
from equifast.certify import _endpoint, _uniform, clever
from equifast.nn import StdCNN

DUAL = {"l1": math.inf, "l2": 2, "linf": 1}
ORDER = {"l1": 1, "l2": 2, "linf": math.inf}


def linear(classes: int = 5, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 6 * 6, classes))


class Quadratic(nn.Module):
    """The margin of class 0 over 1 is 1 - |x - center|^2."""

    def __init__(self, center: Tensor) -> None:
        super().__init__()
        self.center = nn.Parameter(center)

    def forward(self, x: Tensor) -> Tensor:
        margin = 1 - (x - self.center).square().flatten(1).sum(1)
        return torch.stack((margin, torch.zeros_like(margin)), 1)


@pytest.mark.parametrize("norm", DUAL)
def test_linear_is_exact(norm: str) -> None:
    """There the score is the distance to where the label changes."""
    model, x = linear(), torch.rand(4, 3, 6, 6)
    found = clever(model, x, norm=norm, radius=1e3, blocks=3, samples=4)
    logits = model(x).detach()
    weight = model[1].weight.detach()
    labels = logits.argmax(1)
    for row, label in enumerate(labels.tolist()):
        slopes = torch.linalg.vector_norm(weight[label] - weight, ord=DUAL[norm], dim=1)
        expected = ((logits[row, label] - logits[row]) / slopes).nan_to_num(math.inf)
        expected[label] = math.inf
        torch.testing.assert_close(found.targets[row], expected.double(), rtol=1e-4, atol=0)
    torch.testing.assert_close(found.scores, found.targets.amin(1))
    assert not found.fitted.any()
    targets = (labels + 1) % 5
    one = clever(model, x, norm=norm, radius=1e3, blocks=3, samples=4, targets=targets)
    torch.testing.assert_close(one.scores, found.targets.gather(1, targets[:, None])[:, 0])
    assert (one.targets.isfinite().sum(1) == 1).all()


@pytest.mark.parametrize("norm", DUAL)
def test_quadratic_within_a_tenth(norm: str) -> None:
    """The largest dual norm of ``2 (x - center)`` over the ball, in three dimensions, which samples fill."""
    center, radius = torch.full((1, 3, 1, 1), 0.5), 0.2
    x = torch.tensor([0.6, 0.7, 0.4]).view(1, 3, 1, 1)
    found = clever(Quadratic(center), x, norm=norm, radius=radius, blocks=100, samples=256)
    away = (x - center).flatten().abs()
    largest = {"l1": 2 * (away.amax() + radius), "l2": 2 * (away.norm() + radius), "linf": 2 * (away + radius).sum()}
    assert float(found.lipschitz[0, 1]) == pytest.approx(float(largest[norm]), rel=0.1)


@pytest.mark.parametrize("norm", DUAL)
@pytest.mark.parametrize("size", [1, 4, 200])
def test_samples_are_uniform_in_the_ball(norm: str, size: int) -> None:
    """The share inside a smaller ball is that of volumes; no direction is preferred."""
    numbers = torch.arange(4000)
    points = _uniform(norm, 2.0, torch.zeros(1, 1, size, dtype=torch.float64), 0, numbers, 0).flatten(1)
    lengths = torch.linalg.vector_norm(points, ord=ORDER[norm], dim=1) / 2
    assert lengths.max() <= 1 + 1e-9
    assert stats.kstest((lengths**size).numpy(), "uniform").pvalue > 1e-3
    assert points.mean(0).abs().max() < 5 * points.std() / math.sqrt(len(points))
    assert not torch.equal(points, _uniform(norm, 2.0, torch.zeros(1, 1, size).double(), 0, numbers, 1).flatten(1))


def test_an_image_alone_and_in_a_batch() -> None:
    torch.manual_seed(0)
    model, x = StdCNN(classes=4, size=16).eval(), torch.rand(3, 1, 16, 16)
    settings: dict[str, Any] = {"blocks": 4, "samples": 8}
    whole = clever(model, x, **settings)
    alone = clever(model, x[2:], ids=torch.tensor([2]), **settings)
    assert torch.equal(whole.largest[2:], alone.largest)
    assert torch.equal(whole.scores[2:], alone.scores)
    assert not torch.equal(alone.largest, clever(model, x[2:], **settings).largest)
    assert not torch.equal(whole.largest, clever(model, x, seed=1, **settings).largest)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    cheap = clever(model, x, dtype="bfloat16", **settings)
    torch.testing.assert_close(cheap.largest, whole.largest, rtol=0.25, atol=0)  # rectifiers that switch


def test_samples_stay_images() -> None:
    seen = []

    class Watched(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.detach())
            return x.flatten(1)[:, :3]

    clever(Watched(), torch.rand(1, 1, 4, 4), norm="linf", radius=0.5, blocks=2, samples=16)
    assert torch.cat(seen).min() >= 0
    assert torch.cat(seen).max() <= 1
    seen.clear()
    clever(Watched(), torch.rand(1, 1, 4, 4), norm="linf", radius=0.5, blocks=2, samples=16, clamp=False)
    assert torch.cat(seen).min() < 0


def test_wrong_already() -> None:
    model, x = linear(), torch.rand(4, 3, 6, 6)
    labels = model(x).argmax(1)
    labels[1] = (labels[1] + 1) % 5
    scores = clever(model, x, labels, blocks=2, samples=2).scores
    assert scores[1] == 0
    assert (scores[[0, 2, 3]] > 0).all()


def test_known_adversarial_images_are_held_against_it() -> None:
    model, x = linear(), torch.rand(4, 3, 6, 6)
    y = model(x).argmax(1)
    found = clever(model, x, norm="l2", radius=1e3, blocks=2, samples=2)
    near = attacks.CWL2(model)(x, y)
    distances = (near - x).flatten(1).norm(dim=1)
    distances[model(near).argmax(1) == y] = math.inf
    assert distances.isfinite().any()
    held = clever(model, x, norm="l2", radius=1e3, blocks=2, samples=2, distances=distances)
    assert not held.violations.any()  # a linear model's score is the distance, which no attack undercuts
    over = clever(model, x, norm="l2", radius=1e3, blocks=2, samples=2, distances=found.scores * 0.99)
    assert over.violations.all()
    assert "4 images have an adversarial image nearer" in over.warnings[-1]


def test_masked_gradients_are_said() -> None:
    """A model of rounded images has no gradients: the score is as large as can be, and worth nothing."""

    class Rounded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = linear()

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.inner((x * 4).round() / 4)
            return result

    found = clever(Rounded(), torch.rand(2, 3, 6, 6), radius=0.5, blocks=2, samples=2)
    assert (found.scores == 0.5).all()
    assert any("2 images have margins whose gradients are 0 everywhere" in warning for warning in found.warnings)
    assert "estimate" in found.warnings[0]


def test_fits() -> None:
    generator = np.random.default_rng(0)
    ended = 3 - 0.5 * generator.weibull(3.0, 400)
    end, p = _endpoint(ended)
    assert end == pytest.approx(3, rel=0.05)
    assert p > 0.05
    # what has no end, what does not vary, and what is two heaps
    assert _endpoint(np.exp(generator.normal(size=400)))[0] is None
    assert _endpoint(np.full(50, 2.0)) == pytest.approx((None, math.nan), nan_ok=True)
    heaps = np.concatenate((generator.normal(1, 1e-3, 200), generator.normal(2, 1e-3, 200)))
    end, p = _endpoint(heaps)
    assert end is None
    assert p < 0.05


@pytest.mark.parametrize("shape", [2.5, 5.0])
def test_few_maxima_have_no_fit_that_ends_at_the_largest(shape: float) -> None:
    """The likelihood of shapes below 1 has no bound; such a fit says nothing but the largest, and must not count."""
    generator = np.random.default_rng(1)
    for _ in range(20):
        maxima = 3 - 0.5 * generator.weibull(shape, 20)
        end, _ = _endpoint(maxima)
        assert end is None or end > maxima.max() * (1 + 1e-6)


def test_in_inference_mode() -> None:
    model, x = linear(), torch.rand(2, 3, 6, 6)
    expected = clever(model, x, radius=1e3, blocks=2, samples=2).scores
    with torch.inference_mode():
        found = clever(model, torch.rand(2, 3, 6, 6).copy_(x), model(x).argmax(1), radius=1e3, blocks=2, samples=2)
    torch.testing.assert_close(found.scores.clone(), expected)


def test_nothing_to_do() -> None:
    found = clever(linear(), torch.rand(0, 3, 6, 6))
    assert found.scores.shape == (0,)
    steps: list[tuple[int, int]] = []
    clever(linear(), torch.rand(2, 3, 6, 6), blocks=2, samples=2, progress=lambda *at: steps.append(at))
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"norm": "l3"}, "norm is 'l3'"),
        ({"radius": 0}, "radius is 0"),
        ({"blocks": 1}, "blocks is 1"),
        ({"samples": 0}, "samples is 0"),
        ({"dtype": "float16"}, "dtype is 'float16'"),
        ({"y": torch.ones(2)}, "y is torch.float32"),
        ({"targets": [0, 1]}, "targets is a list"),
        ({"model": lambda x: torch.ones(len(x), 3)}, "does not depend on the image"),
        ({"y": torch.tensor([0, 5])}, "y has values from 0 to 5"),
        ({"targets": torch.tensor([0, 7])}, "y has values from 0 to 7"),
        ({"distances": torch.ones(3)}, r"it must be \(2,\)"),
        ({"x": torch.rand(2, 3, 6, 6) + 1}, r"must lie in \[0, 1\]"),
        ({"model": nn.Conv2d(3, 2, 1)}, r"it must give logits \(N, classes\)"),
        ({"model": nn.Sequential(nn.Flatten(), nn.Linear(108, 1))}, "2 classes or more"),
    ],
)
def test_bad_input(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        clever(**{"model": linear(), "x": torch.rand(2, 3, 6, 6), **settings})


def test_own_label_is_no_target() -> None:
    model, x = linear(), torch.rand(2, 3, 6, 6)
    with pytest.raises(ValueError, match="targets has an image's own label"):
        clever(model, x, targets=model(x).argmax(1))
