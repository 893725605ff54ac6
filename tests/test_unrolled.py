"""Gradients through the end of the ascent: exact where the step is smooth, relaxed where it is a sign."""

import threading
from typing import Any

import cases
import pytest
import torch
from torch import Tensor, nn

from equifast import Defended, Purifier, attacks, ops, rng
from equifast.ascent import Ascent
from equifast.balls import Linf
from equifast.evaluate.studies import Constrained


class Smooth(nn.Module):
    """Smooth, so that differences of values show its second derivatives."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(torch.tanh(2 * self.conv1(x)))


def derivative(purifier: Purifier, x: Tensor, weights: Tensor, last: int) -> Tensor:
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad((purifier.unrolled(leaf, last) * weights).sum(), leaf)[0]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"momentum": 0.7},
        {"noise": True},
        {"pairing": "all"},
        {"view_gradient": 1},
        {"view_gradient": 0},
        {"followed": 2},
        {"reduction": "pixel"},
        {"positions": 3},
    ],
    ids=str,
)
def test_against_differences_of_values(settings: dict[str, Any]) -> None:
    """Steps in an L2 ball are smooth: all of them, from the image on, have the derivative of the values."""
    model = Smooth().double()
    settings = {"noise": False, "momentum": 0, **settings}
    kind: type[Purifier] = Constrained if "positions" in settings else Purifier
    purifier = kind(model, norm="l2", eps=0.3, steps=3, step_size=0.15, start="origin", **settings)
    generator = torch.Generator().manual_seed(1)
    x = 0.3 + 0.4 * torch.rand(1, 3, 6, 7, generator=generator, dtype=torch.float64)
    weights, direction = (torch.randn(x.shape, generator=generator, dtype=torch.float64) for _ in range(2))
    slope = float((derivative(purifier, x, weights, 3) * direction).sum())
    h = 1e-6
    values = [float((purifier(x + sign * h * direction) * weights).sum()) for sign in (1, -1)]
    expected = (values[0] - values[1]) / (2 * h)
    assert abs(expected - float((weights * direction).sum())) > 0.01  # not the identity's
    assert slope == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("preset", ["fast", "paper", "strong"])
def test_the_images_are_those_of_a_call(preset: str) -> None:
    x = cases.images()
    purifier = Purifier(cases.dense(), preset=preset, steps=3)
    leaf = x.clone().requires_grad_()
    assert torch.equal(purifier.unrolled(leaf, 2, draw=3).detach(), purifier(x, draw=3))
    straight, unrolled = (Defended(cases.dense(), purifier, gradient=g) for g in ("straight-through", "unrolled"))
    assert torch.equal(straight(leaf), unrolled(leaf))
    assert torch.equal(straight(x), unrolled(x))


def test_a_sign_step_by_hand() -> None:
    model = Smooth()
    purifier = Purifier(
        model, eps=0.1, steps=1, step_size=0.05, start="origin", momentum=0, dtype="float32", fold=False
    )
    x, weights = 0.3 + 0.4 * cases.images(1), torch.randn(1, 3, 20, 28, generator=torch.Generator().manual_seed(0))
    found = derivative(purifier, x, weights, 1)
    leaf = x.clone().requires_grad_()
    with purifier._objective(x, None, 0, purifier.views_per_step) as (_, objective, _, _):
        gradient = objective.slope(leaf, 0)
    direction = gradient / gradient.norm()
    soft = (direction / direction.detach().abs().mean()).tanh()
    expected = torch.autograd.grad(((leaf + 0.05 * soft) * weights).sum(), leaf)[0]
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, weights, atol=1e-2)


def test_a_noisy_sign_step_by_hand() -> None:
    purifier = Purifier(
        Smooth(), eps=0.2, steps=2, step_size=0.05, start="origin", momentum=0, noise=True, dtype="float32", fold=False
    )
    x, weights = 0.3 + 0.4 * cases.images(1), torch.randn(1, 3, 20, 28, generator=torch.Generator().manual_seed(0))
    found = derivative(purifier, x, weights, 2)
    leaf = x.clone().requires_grad_()
    with purifier._objective(x, None, 0, purifier.views_per_step) as (_, objective, seed, ids):
        at = leaf
        for t, sigma in ((0, 0.5), (1, 0.0)):
            slope = objective.slope(at, t)
            noise = rng.normal(seed, rng.Stream.NOISE, ids, 0, t, x[0].numel()).view(x.shape).float()
            direction = slope / slope.norm() + sigma * noise
            soft = (direction / direction.detach().abs().mean()).tanh()
            at = (at + 0.05 * (soft + (direction.sign() - soft).detach())).clamp(leaf - 0.2, leaf + 0.2)
    torch.testing.assert_close(at.detach(), purifier(x))
    expected = torch.autograd.grad((at * weights).sum(), leaf)[0]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("start", ["origin", "corner"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"momentum": 0}, {"noise": True}, {"norm": "l2", "eps": 1.0}, {"preset": "paper"}, {"view_gradient": 0}],
    ids=str,
)
def test_an_image_without_a_gradient(settings: dict[str, Any], start: str) -> None:
    """Its purification is the identity, or a constant; the others of its batch go on."""

    class Dead(Smooth):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (x.detach().amax((1, 2, 3), keepdim=True) < 0.9)

    x = 0.3 + 0.2 * cases.images(2)
    x[1, 0, 0, 0] = 1
    purifier = Purifier(Dead(), steps=2, start=start, dtype="float32", **{"eps": 0.05, **settings})
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    found = derivative(purifier, x, weights, 2)
    assert found.isfinite().all()
    assert found[0].any()
    torch.testing.assert_close(found[:1], derivative(purifier, x[:1], weights[:1], 2))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("pairing", ["anchor", "all"])
def test_what_is_lowered_points_the_same_way(pairing: str, dtype: str) -> None:
    model, x = Smooth(), 0.3 + 0.4 * cases.images()
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    ran: list[torch.dtype] = []
    model.conv2.register_forward_hook(lambda module, inputs, result: ran.append(result.dtype))
    found = {}
    for each in (dtype, "float32"):
        # one step: after it the points are others
        rest = {"steps": 1, "noise": False, "fold": False, "start": "origin", "pairing": pairing}
        ran.clear()
        found[each] = derivative(Purifier(model, eps=0.1, dtype=each, **rest), x, weights, 1) - weights
        # the step again for its derivative: float16 would overflow in it
        assert ran[-1] == (torch.bfloat16 if each == "bfloat16" else torch.float32)
    cosine = torch.nn.functional.cosine_similarity(found[dtype].flatten(1), found["float32"].flatten(1))
    assert cosine.min() > 0.95


def test_half_precision_is_refused() -> None:
    with pytest.raises(TypeError, match="x is float16"):
        Purifier(Smooth().half()).unrolled(cases.images().half(), 1)


def test_more_steps_give_another_gradient_and_independent_of_the_batch() -> None:
    x = cases.images(2)
    purifier = Purifier(Smooth(), eps=0.05, steps=4, dtype="float32")
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    found = [derivative(purifier, x, weights, last) for last in (1, 2, 4)]
    assert not torch.allclose(found[0], found[1])
    assert not torch.allclose(found[1], found[2])
    for i in range(2):
        torch.testing.assert_close(derivative(purifier, x[i : i + 1], weights[i : i + 1], 2), found[1][i : i + 1])


def test_an_attack_uses_it() -> None:
    model, x = cases.dense(), cases.images()
    y = model.eval()(x).argmax(1)
    purifier = Purifier(model, steps=2, eps=0.05)
    attack = attacks.PGD(model, steps=3, eps=0.05, step_size=0.02)
    through = attacks.BPDA(attack, Defended(model, purifier, gradient="unrolled", last=2), eot=2)(x, y)
    assert (through - x).abs().max() <= 0.05 + 1e-6
    assert not torch.equal(through, attacks.BPDA(attack, purifier, eot=2)(x, y))
    assert all(p.requires_grad for p in model.parameters())


def test_nothing_to_purify() -> None:
    purifier = Purifier(Smooth())
    assert purifier.unrolled(torch.rand(0, 3, 8, 8), 1).shape == (0, 3, 8, 8)


@pytest.mark.parametrize(
    ("settings", "last", "error"),
    [({"steps": 2}, 3, "last is 3"), ({"steps": 2}, 0, "last is 0"), ({"keep": "best"}, 1, "keep='best' or a stop")],
)
def test_what_cannot_be_unrolled(settings: dict[str, Any], last: int, error: str) -> None:
    purifier = Purifier(Smooth(), **settings)
    with pytest.raises(ValueError, match=error):
        Defended(Smooth(), purifier, gradient="unrolled", last=last)
    with pytest.raises(ValueError, match=error):
        purifier.unrolled(cases.images(), last)


def test_only_a_purifier_is_unrolled() -> None:
    with pytest.raises(TypeError, match="must be for a Purifier"):
        Defended(Smooth(), lambda x, ids=None, draw=0: x, gradient="unrolled")


def test_it_goes_back_on_the_backend_that_it_came_by() -> None:
    """Also in a thread of its own, as PyTorch's on CUDA, which knows of no context of this one."""
    seen: list[str] = []

    class Telling(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(str(ops.backend()))
            return torch.cat((x, x.square()), 1)

    x = cases.images().requires_grad_()
    other = "reference" if ops.backend() == "native" else "native"
    if other == "native" and ops._load():
        pytest.skip("this build has one backend")
    with ops.use(other):
        result = Purifier(Telling(), steps=2).unrolled(x, 2)
    forward = len(seen)
    back = threading.Thread(target=result.sum().backward)
    back.start()
    back.join()
    assert x.grad is not None
    assert len(seen) > forward
    assert set(seen) == {other}


def test_without_gradients_there_is_no_graph() -> None:
    model = cases.dense()
    x = cases.images().requires_grad_()
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            assert not Purifier(model).unrolled(x, 1).requires_grad
    assert Purifier(model).unrolled(x, 1).requires_grad


def test_every_step_is_told_of() -> None:
    """Those with a derivative too, of their images without a graph."""

    class Line:
        fixed = True

        def gradient(self, x: Tensor, t: int) -> tuple[Tensor, Tensor]:
            return x.sum((1, 2, 3)), torch.ones_like(x)

        def slope(self, x: Tensor, t: int) -> Tensor:
            return torch.ones_like(x) * x.sum()

    line, seen, done = Line(), list[Tensor](), list[tuple[int, int]]()
    x = cases.images(2).requires_grad_()
    Ascent(ball=Linf(0.1), steps=3, step_size=0.01, momentum=1.0)(
        line,  # type: ignore[arg-type]
        x,
        seed=0,
        ids=torch.arange(2),
        slope=line.slope,
        last=2,
        visit=seen.append,
        progress=lambda *each: done.append(each),
    )
    assert done == [(1, 3), (2, 3), (3, 3)]
    assert len(seen) == 3
    assert not any(each.requires_grad for each in seen)
