import copy
import dataclasses
import itertools
import os
import platform
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import pytest
import torch
from torch import Tensor, nn

import equifast
from equifast import Defended, Purifier, views
from equifast.ascent import Ascent
from equifast.attacks import BPDA, PGD, Spatial
from equifast.balls import Linf
from equifast.defenses import Averaging, Invariance
from equifast.evaluate import PARTS, nothing, profile_step
from equifast.features import evaluating, suggest
from equifast.nn import GCNN
from equifast.objectives import MOST_ROWS, Equivariance, number_of_pairs, pairwise
from equifast.purifier import PRESETS
from equifast.spatial import Grid
from equifast.views import Flip


@pytest.fixture(params=["dense", "small"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    return cases.dense() if request.param == "dense" else cases.classifier().features


IDS = torch.tensor([7, 2**40, 0, 3, 3, 5, 6, 1])


@pytest.mark.parametrize(
    ("name", "size"),
    [
        *itertools.product(cases.PURIFIERS, [(1, 1), (32, 32)]),
        *itertools.product(("fast", "paper", "strong", "pixel"), [(20, 28)]),
    ],
)
def test_result_is_that_of_the_image_alone(name: str, size: tuple[int, int]) -> None:
    """Bit for bit, at batch sizes 1, 3 and 8 and in another order (CPU)."""
    purifier = cases.PURIFIERS[name](cases.dense())
    x = cases.images(8, *size)
    whole = purifier(x, ids=IDS, draw=2)
    for count in (1, 3):
        parts = [purifier(x[i : i + count], ids=IDS[i : i + count], draw=2) for i in range(0, 8, count)]
        assert torch.equal(torch.cat(parts), whole)
    order = torch.tensor([3, 1, 7, 5, 0, 2, 6, 4])
    assert torch.equal(purifier(x[order], ids=IDS[order], draw=2), whole[order])
    starts_at_it = isinstance(purifier, Purifier) and purifier.ascent.start == "origin"
    if size != (1, 1) or not starts_at_it:  # the signs of three numbers may be those of another draw
        assert not torch.equal(purifier(x, ids=IDS, draw=3), whole)
        assert not torch.equal(purifier(x, ids=IDS + 1, draw=2), whole)


@pytest.mark.parametrize(
    ("name", "size"), [("fast", (1, 1)), ("all-pairs", (1, 1)), ("strong", (1, 1)), ("strong", (20, 28))]
)
def test_result_is_that_of_the_image_alone_on_one_thread(name: str, size: tuple[int, int]) -> None:
    """Where PyTorch has another algorithm for small batches; without what is done about it each of these fails."""
    purifier, threads = cases.PURIFIERS[name](cases.dense()), torch.get_num_threads()
    x = cases.images(8, *size)  # with views of one size sixteen or more
    try:
        torch.set_num_threads(1)
        whole = purifier(x, ids=IDS, draw=2)
        for i in range(8):
            assert torch.equal(purifier(x[i : i + 1], ids=IDS[i : i + 1], draw=2), whole[i : i + 1])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("size", [(1, 1), (20, 28), (32, 32)])
def test_score_is_that_of_the_image_alone(size: tuple[int, int]) -> None:
    purifier, x = Purifier(cases.dense()), cases.images(8, *size)
    whole = purifier.score(x, ids=IDS)
    assert torch.equal(torch.cat([purifier.score(x[i : i + 1], ids=IDS[i : i + 1]) for i in range(8)]), whole)
    assert not whole.requires_grad
    assert whole.abs().max() <= 1 + 1e-6


def test_seeds_and_global_random_state() -> None:
    x, model = cases.images(), cases.dense()
    state = torch.get_rng_state()
    first = Purifier(model, seed=1)(x)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    assert torch.equal(Purifier(model, seed=1)(x), first)
    assert not torch.equal(Purifier(model, seed=2)(x), first)
    torch.manual_seed(0)
    fresh = [Purifier(model, seed=None)(x) for _ in range(2)]
    assert not torch.equal(fresh[0], fresh[1])
    torch.manual_seed(0)
    assert torch.equal(Purifier(model, seed=None)(x), fresh[0])


@pytest.mark.parametrize("preset", ["fast", "paper", "strong"])
def test_purification_raises_similarity_inside_the_ball(model: nn.Module, preset: str) -> None:
    x = cases.images(4)
    purifier = Purifier(model, preset=preset, eps=8 / 255)
    purified = purifier(x)
    assert purified.dtype == x.dtype
    assert not purified.requires_grad
    assert (purified - x).abs().max() <= 8 / 255 + 1e-6
    assert purified.min() >= 0
    assert purified.max() <= 1
    if preset != "paper":  # nineteen steps of noise and one climb do not always gain on an untrained network
        assert (purifier.score(purified) > purifier.score(x)).all()


@pytest.mark.parametrize("weight", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("pairing", ["anchor", "all"])
def test_gradient_of_the_objective_is_autograds(pairing: str, weight: float) -> None:
    """View by view, as memory wants it, equals one graph of everything; what comes through views is weighted."""
    model = cases.dense().double().eval()
    x = cases.images(2).double()
    objective = Equivariance(
        lambda images: model(images), views.paper(), count=None, pairing=pairing, view_gradient=weight,
        reduction="image", seed=0, ids=torch.arange(2), draw=0, autocast=None,
    )  # fmt: skip
    value, gradient = objective.gradient(x, 3)
    leaf = x.clone().requires_grad_()
    sampled = objective.sample(leaf, 3, None)
    source = x + weight * (leaf - x)  # the image, with so much of its derivative
    features = [model(*objective.render(source, [view])) for view in sampled]
    theta = torch.stack([view.theta for view in sampled])
    if pairing == "all":
        expected = pairwise(model(leaf), features, theta)
    else:
        expected = equifast.reference.similarity(model(leaf), features, theta).sum(1)
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), leaf)[0])
    torch.testing.assert_close(objective.value(x), objective.gradient(x, 0)[0])
    torch.testing.assert_close(objective.slope(x.clone().requires_grad_(), 3).detach(), gradient)


@pytest.mark.parametrize("preset", ["fast", "strong", "paper"])
def test_the_objective_of_attackers_is_a_mean_at_steps_and_as_a_value(preset: str) -> None:
    """By the value points are compared, and by a step's it is climbed: both are means, of all views and of a step's."""
    model, x = cases.dense().eval(), cases.images()
    purifier = Purifier(model, preset=preset)
    with purifier.objective(x) as objective:
        values = [objective.value(x), *(objective.gradient(x, t)[0] for t in range(4))]
    assert all((value.abs() <= 1).all() for value in values)
    if preset != "paper":
        torch.testing.assert_close(values[0], purifier.score(x))


def test_a_view_whose_features_ignore_the_image_adds_no_gradient() -> None:
    """As of a model that answers images below some size with a constant."""
    model, x = cases.dense().double().eval(), cases.images(2).double()

    objective = Equivariance(
        lambda images: model(images) if images.shape[2] >= 20 else torch.ones(len(images), 5, 4, 4).double(),
        [views.Flip(), views.Resize(0.5)], count=None, pairing="anchor", view_gradient=1.0,
        reduction="image", seed=0, ids=torch.arange(2), draw=0, autocast=None,
    )  # fmt: skip
    leaf = x.clone().requires_grad_()
    sampled = objective.sample(leaf, 0, None)
    theta = torch.stack([view.theta for view in sampled])
    features = [objective.features(view) for view in objective.render(leaf, sampled)]
    expected = equifast.reference.similarity(model(leaf), features, theta).sum(1)
    value, gradient = objective.gradient(x, 0)
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), leaf)[0])


def test_all_pairs_against_the_quadratic_sum() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(6, 7), (6, 7), (4, 9), (12, 5)]
    maps = [torch.randn(2, 3, *shape, generator=generator, dtype=torch.float64) for shape in shapes]
    theta = torch.cat([cases.theta(name, 2) for name in ("flip", "rotation", "shift")])
    warped = [maps[0]]
    for view, inverse in zip(maps[1:], equifast.reference.invert(theta), strict=True):
        warped += equifast.reference.warp(view, inverse[None], [(6, 7)])
    unit = [w.flatten(1) / w.flatten(1).norm(dim=1, keepdim=True) for w in warped]
    expected = sum((unit[i] * unit[j]).sum(1) for i in range(4) for j in range(i))
    torch.testing.assert_close(pairwise(maps[0], maps[1:], theta), expected)


def test_all_pairs_of_maps_of_other_layouts() -> None:
    """A map that is one pixel wide comes back from its warp in another order of memory than the image's."""
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(2, 3, *shape, generator=generator, dtype=torch.float64) for shape in ((6, 7), (4, 1), (5, 4))]
    theta = torch.cat([cases.theta(name, 2) for name in ("flip", "rotation")])
    found = []
    for layouts in (
        (torch.contiguous_format,) * 3,
        (torch.channels_last, torch.contiguous_format, torch.channels_last),
    ):
        leaves = [m.to(memory_format=f).requires_grad_() for m, f in zip(maps, layouts, strict=True)]
        value = pairwise(leaves[0], leaves[1:], theta)
        found.append([value, *torch.autograd.grad(value.sum(), leaves)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_features_by_name_by_callable_and_by_dict() -> None:
    x, model = cases.images(), cases.dense().eval()
    named = Purifier(model, "body")(x)
    assert torch.equal(Purifier(model, lambda images: model.body(model.stem(images)))(x), named)
    assert not torch.equal(Purifier(model)(x), named)
    assert torch.equal(Purifier(cases.dense(as_dict=True))(x), Purifier(model)(x))
    assert suggest(cases.classifier(), x) == "features"
    assert Purifier(cases.classifier(), "features")(x).shape == x.shape


def test_features_by_name_stop_there() -> None:
    """What comes after the submodule is not computed."""
    model = cases.classifier()
    model.head.forward = lambda *_: pytest.fail("the head was run")  # type: ignore[method-assign]
    Purifier(model, "features", steps=1)(cases.images())


class Raises(cases.DenseNet):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 3:
            raise RuntimeError("out of luck")
        return self.head(self.body(self.stem(x)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("model", [cases.dense(), Raises()])
def test_the_model_comes_back_as_it_was_given(model: nn.Module) -> None:
    model.train()
    stem, head = model.get_submodule("stem"), model.get_submodule("head")
    stem.eval()
    next(head.parameters()).requires_grad_(False)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    hook = head.register_forward_hook(lambda *_: None)

    def state() -> list[object]:
        return [
            [module.training for module in model.modules()],
            [(p.requires_grad, p.grad.sum().item() if p.grad is not None else None) for p in model.parameters()],
            [list(module._forward_hooks) for module in model.modules()],
            [buffer.sum().item() for buffer in model.buffers()],
        ]

    before, raised = state(), 0
    for features in (None, "body"):
        try:
            Purifier(model, features)(cases.images())
        except RuntimeError as error:
            assert "out of luck" in str(error)  # noqa: PT017
            raised += 1
        assert state() == before
    assert (raised > 0) == isinstance(model, Raises)
    hook.remove()


def test_empty_and_tiny_images() -> None:
    for name, build in cases.PURIFIERS.items():
        purifier = build(cases.dense())
        assert purifier(torch.zeros(0, 3, 8, 8)).shape == (0, 3, 8, 8), name
        assert purifier(cases.images(1, 1, 1)).shape == (1, 3, 1, 1), name
    assert Purifier(cases.dense()).score(torch.zeros(0, 3, 8, 8)).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    x = cases.images().to(dtype)
    purified = Purifier(cases.dense().to(dtype), steps=2)(x)
    assert purified.dtype == dtype
    assert (purified.double() - x.double()).abs().max() <= 6 / 255 + 2 * torch.finfo(dtype).eps
    assert Purifier(cases.dense().to(dtype)).score(x).isfinite().all()


def test_bfloat16_autocast_on_request() -> None:
    x, model = cases.images(4), cases.dense()
    purified = Purifier(model, dtype="bfloat16")(x)
    assert purified.dtype == torch.float32
    assert not torch.equal(purified, Purifier(model, dtype="float32")(x))
    assert (Purifier(model).score(purified) > Purifier(model).score(x)).all()


@pytest.mark.parametrize(
    "settings", [{}, {"view_gradient": 0}, {"pairing": "all"}, {"reduction": "pixel"}, {"half": True}], ids=str
)
def test_float16_keeps_small_gradients(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Those by features are far below what float16 holds: they are scaled, image by image, and point the same way."""
    settings = dict(settings)
    half = settings.pop("half", False)  # of the model itself, instead of autocast
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 16, 3, padding=1))
    with torch.no_grad():
        model[2].weight.mul_(3000)  # features of some hundreds
    x = cases.images(2, 96, 120)
    x[1] *= 0.01

    def gradient(model: nn.Module, x: torch.Tensor, dtype: str) -> torch.Tensor:
        purifier = Purifier(model, dtype=dtype, **settings)
        with purifier._objective(x, torch.arange(2), 0, None) as (images, objective, _, _):
            return objective.gradient(images, 0)[1].flatten(1).double()

    narrow = (copy.deepcopy(model).half(), x.half(), "float32") if half else (model, x, "float16")
    expected, found = gradient(model, x, "float32"), gradient(*narrow)
    assert (nn.functional.cosine_similarity(found, expected) > 0.99).all()
    assert found.isfinite().all()
    monkeypatch.setattr("equifast.objectives._scale", lambda features: None)
    if settings.get("reduction") != "pixel":  # where each position has a cosine of its own gradients are larger
        assert (nn.functional.cosine_similarity(gradient(*narrow), expected) < 0.99).any()


def test_memory_layouts_agree() -> None:
    x, purifier = cases.images(), Purifier(cases.dense().double())
    x = x.double()
    wide = torch.rand(2, 3, 20, 56, dtype=torch.float64)[..., ::2].copy_(x)
    assert torch.allclose(purifier(wide), purifier(x))
    assert purifier(x.to(memory_format=torch.channels_last)).shape == x.shape


def test_slightly_outside_is_clamped() -> None:
    x = torch.full((1, 3, 8, 8), 1 + 5e-7)
    assert Purifier(cases.dense())(x).max() <= 1


def test_purify_in_one_call() -> None:
    x, model = cases.images(), cases.dense()
    assert torch.equal(
        equifast.purify(model, x, preset="paper", steps=2, draw=1),
        Purifier(model, preset="paper", steps=2)(x, draw=1),
    )


def test_progress() -> None:
    seen: list[tuple[int, int]] = []
    Purifier(cases.dense(), steps=3)(cases.images(), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("name", cases.DEFENDED)
def test_defended_is_a_model(name: str) -> None:
    defended, x = cases.DEFENDED[name](cases.dense()), cases.images()
    assert next(defended.parameters(), None) is not None
    leaf = x.clone().requires_grad_()
    logits = defended(leaf)
    assert logits.shape == (2, 5, 20, 28)
    (gradient,) = torch.autograd.grad(logits.sum(), leaf)
    assert gradient.abs().sum() > 0
    with torch.no_grad():
        torch.testing.assert_close(defended(x), logits)
    with torch.inference_mode():
        torch.testing.assert_close(defended(x.clone()), logits.detach())
    assert all(parameter.grad is None for parameter in defended.parameters())
    assert defended(torch.zeros(0, 3, 8, 8)).shape[0] == 0
    single = torch.cat([defended(x[i : i + 1]) for i in range(2)])
    assert torch.equal(single, logits)


def test_straight_through() -> None:
    """The gradient is that of the model at the purified image, and the output bit for bit that without a graph."""
    model, x = cases.dense().eval(), cases.images()
    purifier = Purifier(model, average=False)
    leaf, purified = x.clone().requires_grad_(), purifier(x).requires_grad_()
    logits = Defended(model, purifier)(leaf)
    assert torch.equal(logits, model(purified))
    weights = torch.randn_like(logits)
    gradient = torch.autograd.grad((logits * weights).sum(), leaf)[0]
    with evaluating(x, model):
        assert torch.equal(gradient, torch.autograd.grad((model(purified) * weights).sum(), purified)[0])
    expected = torch.autograd.grad((model(purified) * weights).sum(), purified)[0]  # with its own rounding
    torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-5)


def test_a_model_without_parameters_can_be_defended() -> None:
    class Plain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat((x, 1 - x), 1) ** 2

    defended = Defended(Plain(), Purifier(Plain()))
    assert next(defended.parameters()).device.type == "cpu"
    assert defended(cases.images()).shape == (2, 6, 20, 28)


class ByMatrix(nn.Module):
    """Whose derivative is a product of matrices, which autocast lowers on its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.linear = cases.dense(), nn.Linear(5, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.inner(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("pairing", ["anchor", "all"])
@pytest.mark.parametrize("make", [cases.dense, ByMatrix])
def test_an_enclosing_autocast_changes_nothing(make: Callable[[], nn.Module], pairing: str) -> None:
    x, purifier = cases.images(), Purifier(make(), dtype="float32", pairing=pairing)
    with torch.autocast("cpu", torch.bfloat16):
        inside = purifier(x)
    assert torch.equal(inside, purifier(x))


def test_an_autocast_around_a_backward_pass_changes_nothing() -> None:
    model, x = cases.dense(), cases.images(3)
    purifier = Purifier(model, steps=2, dtype="float32")
    for defended in (
        Defended(model, nothing),
        Defended(model, purifier),
        Defended(model, purifier, gradient="unrolled", last=2),
    ):
        found = []
        for inside in (False, True):
            leaf = x.clone().requires_grad_()
            loss = defended(leaf).square().sum()
            with torch.autocast("cpu", torch.bfloat16, enabled=inside):
                loss.backward()
            found.append(leaf.grad)
        assert torch.equal(*found)


def test_another_default_device_changes_nothing() -> None:
    x, model = cases.images(), cases.dense()
    for defended in (
        Defended(model, Purifier(model)),
        Defended(model, Purifier(model, "stem", "paper")),
        Averaging(model),
    ):
        with torch.no_grad(), torch.device("meta"):  # where nothing is
            inside = defended(x)
        with torch.no_grad():
            assert torch.equal(inside, defended(x))
    network = GCNN(3, 5, size=28, widths=(2, 4)).eval()
    images, y = cases.images(2, 28, 28), torch.arange(2)
    turned = Spatial(cases.classifier(), grid=Grid(counts=(3, 1, 1)))
    expected = network(images), turned(images, y)
    with torch.device("meta"):
        assert torch.equal(network(images), expected[0])
        assert torch.equal(turned(images, y), expected[1])


def test_models_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = cases.dense()
    x = cases.images()
    assert torch.equal(Purifier(model)(x), Purifier(cases.dense())(x))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_frozen_torchscript() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 5, 1)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer versions advise against it
        frozen = torch.jit.freeze(torch.jit.script(net))
    x = cases.images()
    purified = Purifier(frozen, dtype="float32")(x)
    assert (purified - x).abs().max() > 0.01


def test_what_a_recording_belongs_to() -> None:
    """Other modules and hooks make another."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 5, 1))
    purifier, x, seen = Purifier(model, fold=False), cases.images(), []
    for change in (
        lambda: None,
        lambda: model.__setitem__(1, nn.Tanh()),
        lambda: model[2].register_forward_hook(print),
    ):
        change()
        with purifier._objective(x, None, 0, None) as (_, objective, _, _):
            seen += [objective.owner(), objective.owner()]
    assert seen[0] == seen[1]
    assert seen[1] != seen[2] == seen[3] != seen[4] == seen[5]


def test_a_submodule_that_was_replaced_gives_the_features() -> None:
    model, x = cases.dense(), cases.images()
    purifier = Purifier(model, "stem", fold=False)
    model.stem = nn.Sequential(model.stem, nn.AvgPool2d(3, 1, 1))
    assert torch.equal(purifier(x), Purifier(model, "stem", fold=False)(x))


@pytest.mark.parametrize("settings", [{}, {"reduction": "pixel"}, {"dtype": "bfloat16"}], ids=str)
@pytest.mark.parametrize("pick", [1, 2])
def test_the_gradient_through_some_views_is_in_the_mean_that_through_all(settings: dict[str, Any], pick: int) -> None:
    purifier = Purifier(cases.dense(), **{"dtype": "float32", "view_gradient": 0.6, **settings})
    x, count = cases.images(), len(purifier.views)
    with purifier._objective(x, None, 0, None) as (_, objective, _, _):
        drawn = objective.sample(x, 0, None)
        whole = objective.given([dataclasses.replace(view, followed=True) for view in drawn]).gradient(x, 0)
        parts = []
        for some in itertools.combinations(range(count), pick):
            chosen = [dataclasses.replace(view, followed=k in some) for k, view in enumerate(drawn)]
            parts.append(objective.given(chosen).gradient(x, 0))
            if purifier.dtype == "float32":
                slope = objective.given(chosen).slope(x.clone().requires_grad_(), 0).detach()
                torch.testing.assert_close(slope, parts[-1][1], rtol=1e-3, atol=1e-5)
    values, gradients = (torch.stack(found) for found in zip(*parts, strict=True))
    tolerance = 0.02 if purifier.dtype == "bfloat16" else 1e-5  # of what one choice is apart by: about a quarter
    torch.testing.assert_close(values.mean(0), whole[0], rtol=tolerance, atol=0)
    assert (gradients.mean(0) - whole[1]).norm() < tolerance * whole[1].norm()
    assert (gradients[0] - whole[1]).norm() > 0.1 * whole[1].norm()


def test_which_views_are_followed_is_drawn() -> None:
    ids = torch.arange(2)
    seen: Counter[int] = Counter()
    for step in range(200):
        sampled = views.sample(views.paper(), (40, 60), seed=0, ids=ids, step=step, count=3, followed=2)
        plain = views.sample(views.paper(), (40, 60), seed=0, ids=ids, step=step, count=3)
        assert [view.followed for view in plain] == [True] * 3
        assert [view.size for view in plain] == [view.size for view in sampled]
        assert sum(view.followed for view in sampled) == 2
        seen.update(views.paper().index(view.view) for view in sampled if view.followed)
    assert set(seen) == {0, 1, 3, 4, 5, 6}  # the first and the third are equal, the last two as well


@pytest.mark.parametrize("most", [1, 2, 3, 4, 6, 7])
def test_how_many_run_at_once_changes_nothing(most: int) -> None:
    seen: list[int] = []

    class Watching(cases.DenseNet):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(len(x))
            return super().forward(x)  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model, x, ids = Watching(), cases.images(7), torch.arange(7)
    counts: list[tuple[int, int]] = []
    purifier = Purifier(model, steps=2, fold=False, max_batch=most)
    purified = purifier(x, ids, progress=lambda *done: counts.append(done))
    assert max(seen) <= most + 1
    assert most == 1 or 1 not in seen
    assert counts == [(i + 1, counts[-1][1]) for i in range(len(counts))]
    everything = Purifier(model, steps=2, fold=False, max_batch=7)
    assert torch.equal(purified, everything(x, ids))
    assert torch.equal(purifier.score(x, ids), everything.score(x, ids))


@pytest.mark.parametrize(
    "settings",
    [{}, {"preset": "paper"}, {"view_gradient": 0}, {"view_gradient": 1}, {"views_per_step": 2}, {"followed": 1}],
    ids=str,
)
def test_profile(settings: dict[str, Any]) -> None:
    """The parts are the step: they add up to the time that it takes, and each is there."""
    purifier, x = Purifier(cases.dense(), dtype="float32", **settings), cases.images(2, 88, 120)
    profile = profile_step(purifier, x, rounds=3)
    assert set(profile.seconds) == set(PARTS)
    assert all(seconds > 0 for seconds in profile.seconds.values())
    assert profile.folded
    assert 0 < profile.overhead < 1
    with purifier._objective(x, None, 0, purifier.views_per_step) as (_, objective, _, _):
        sampled = objective.sample(x, 0, purifier.views_per_step)
        both = [1 if view.followed and purifier.view_gradient > 0 else 0.5 for view in sampled]
        area = sum(share * view.size[0] * view.size[1] for share, view in zip(both, sampled, strict=True)) / (88 * 120)
        assert profile.passes == pytest.approx(1 + area)
        begun = time.perf_counter()
        objective.gradient(x, 0)
        elapsed = time.perf_counter() - begun
    assert profile.total < 20 * elapsed
    assert elapsed < 20 * profile.total


def test_profile_of_a_model_that_works_in_place() -> None:
    assert profile_step(Purifier(cases.InPlace()), cases.images(), rounds=1).seconds["backward"] > 0


def test_what_has_no_step_to_profile() -> None:
    for purifier, x in ((Purifier(cases.dense()), cases.images(0)), (Purifier(cases.dense(), steps=0), cases.images())):
        with pytest.raises(ValueError, match="there must be a step to profile"):
            profile_step(purifier, x)
    with pytest.raises(TypeError, match="purifier is a Invariance; a profile is of one that climbs equivariance"):
        profile_step(Invariance(cases.dense()), cases.images())


PAPER = (
    "Resize(scale=(2.0, 2.0), ratio=(0.8, 1.2), least=1)",
    "Resize(scale=(0.3, 0.3), ratio=(0.8, 1.2), least=1)",
    "Resize(scale=(2.0, 2.0), ratio=(0.8, 1.2), least=1)",
    "Resize(scale=(0.5, 0.5), ratio=(0.8, 1.2), least=1)",
    "Compose(views=(ColorJitter(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, grayscale=0.2), "
    "Resize(scale=(1.0, 1.0), ratio=(0.8, 1.2), least=1)))",
    "Compose(views=(Flip(vertical=False), Resize(scale=(1.0, 1.0), ratio=(0.8, 1.2), least=1)))",
    "Rotation(degrees=15.0)",
    "Rotation(degrees=15.0)",
)
SMALLER = "Resize(scale=(0.3, 0.9), ratio=(0.8, 1.2), least=16)"
DOCUMENTED: dict[str, dict[str, Any]] = {
    "paper": {
        "steps": 20,
        "step_size": 2.0,
        "start": "uniform",
        "noise": True,
        "momentum": None,
        "average": [],
        "views": list(PAPER),
        "views_per_step": None,
        "pairing": "all",
        "view_gradient": 1.0,
        "followed": None,
    },
    "fast": {
        "steps": 3,
        "step_size": 0.4,
        "start": "corner",
        "noise": False,
        "momentum": 0.5,
        "views": [
            SMALLER,
            f"Compose(views=(Flip(vertical=False), {SMALLER}))",
            SMALLER,
            f"Compose(views=(Flip(vertical=False), {SMALLER}))",
            "Compose(views=(ColorJitter(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, grayscale=0.2), "
            "Flip(vertical=False), Rotation(degrees=15.0)))",
        ],
        "views_per_step": 3,
        "pairing": "anchor",
        "view_gradient": 0.2,
        "followed": 1,
        "average": ["Flip(vertical=False)"],
    },
    "strong": {
        "steps": 8,
        "step_size": 0.25,
        "start": "origin",
        "noise": False,
        "momentum": None,
        "views": list(PAPER),
        "views_per_step": 1,
        "pairing": "anchor",
        "view_gradient": 1.0,
        "followed": None,
        "average": ["Flip(vertical=False)"],
    },
}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_those_that_figures_are_of(preset: str) -> None:
    """Whoever changes one has all tables to measure again."""
    settings = Purifier(cases.dense(), preset=preset, eps=0.02).settings()
    expected = DOCUMENTED[preset] | {"step_size": pytest.approx(0.02 * DOCUMENTED[preset]["step_size"])}
    assert {key: settings[key] for key in expected} == expected
    others = {"restarts": 1, "keep": "last", "stop": None, "temperature": None, "reduction": "image", "norm": "linf"}
    assert {key: settings[key] for key in others} == others


@pytest.mark.parametrize(("blocks", "numbers"), [(8, 2**20), (1, 2**24)])
def test_freed_memory_is_kept(blocks: int, numbers: int) -> None:
    """Pages that were given back once are not asked for again, also of blocks of 64 MiB."""
    code = f"""
import resource, torch, equifast
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        a = [torch.ones({numbers}) for _ in range({blocks})]
        del a
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults(), equifast.keep_freed_memory(), faults() and faults())
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    without, kept, within = done.stdout.split()
    assert kept == str(platform.libc_ver()[0] == "glibc")
    if kept == "True":
        assert int(within) <= int(without) / 5  # none at all where torch has an allocator of its own


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch has no oneDNN")
def test_kernels_are_kept() -> None:
    """More than oneDNN keeps by itself are made once, and what the environment says stands."""
    code = """
import torch, equifast
equifast.keep_kernels(2000)  # with those that reorder weights
weight = torch.ones(2, 2, 3, 3)
for turn in range(2):
    print("turn", turn, flush=True)
    for width in range(3, 703):
        torch.conv2d(torch.ones(2, 2, 3, width), weight)
"""

    def made(**environment: str) -> int:
        """Kernels, in the second turn."""
        told = {key: value for key, value in os.environ.items() if not key.startswith(("ONEDNN_", "DNNL_"))}
        told |= {"ONEDNN_VERBOSE": "2", **environment}
        done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, env=told)
        first, second = done.stdout.split("turn 1")
        assert first.count("cache_miss,cpu,convolution") >= 700
        return second.count("cache_miss,cpu,convolution")

    assert made() == 0
    assert made(ONEDNN_PRIMITIVE_CACHE_CAPACITY="1024") >= 700
    with pytest.raises(ValueError, match="count is 0; it must be an integer from 1"):
        equifast.keep_kernels(0)


def test_large_images_run_a_few_at_a_time() -> None:
    """Memory does not grow with the number of images."""
    most = [len(range(7)[rows]) for rows in Purifier(cases.dense())._chunks(torch.empty(7, 3, 360, 480))]
    assert most == [2, 2, 3]
    assert Purifier(cases.dense())._chunks(torch.empty(64, 3, 32, 32)) == [slice(0, 64)]


@pytest.mark.parametrize("training", [True, False])
def test_a_defended_model_is_in_the_mode_of_its_model(training: bool) -> None:
    """Attack libraries note the mode, and put it back in the end, for all that is inside."""
    model = cases.dense().train(training)
    for defended in (Defended(model, Purifier(model)), Averaging(model)):
        defended.train(defended.training)
        assert model.training is training


def test_passes_without_a_graph_run_more_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """By how much they hold; predictions of several batches are those of one, in its layout."""
    x = torch.empty(40, 3, 176, 240)
    for chosen, counts in (([views.Resize(0.3)], [22, 18]), (views.paper(), [12, 12, 12, 4])):
        purifier = Purifier(cases.dense(), views=chosen)
        assert [len(range(40)[rows]) for rows in purifier._chunks(x, graph=False)] == counts
        assert [len(range(40)[rows]) for rows in purifier._chunks(x)] == [12, 12, 12, 4]
    model, images = cases.dense().to(memory_format=torch.channels_last), cases.images(7)
    defended = [Defended(model, Purifier(model, steps=1)), Averaging(model)]
    with torch.no_grad():
        expected = [each(images) for each in defended]
        for name in ("_CHUNK", "_AHEAD"):
            monkeypatch.setattr(f"equifast.purifier.{name}", 0)
        for each, wanted in zip(defended, expected, strict=True):
            found = each(images)
            assert torch.equal(found, wanted)
            assert found.stride() == wanted.stride()


class OutOfPlace(cases.DenseNet):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - 0.25)  # type: ignore[no-any-return]


@pytest.mark.parametrize("fold", [True, False])
def test_a_model_that_works_in_place(fold: bool) -> None:
    torch.manual_seed(0)
    model = cases.InPlace()
    given = cases.images()
    assert suggest(model, given) is not None
    assert torch.equal(given, cases.images())
    other = OutOfPlace()
    other.load_state_dict(model.state_dict())
    x = cases.images()
    before = x.clone()
    for settings in (
        {"steps": 2},
        {"steps": 1, "keep": "best", "restarts": 2},
        {"steps": 1, "pairing": "all"},
        {"steps": 2, "view_gradient": 1},
        {"steps": 1, "view_gradient": 0, "reduction": "pixel"},
    ):
        in_place, plain = (Purifier(m, dtype="float32", fold=fold, **settings) for m in (model, other))
        assert torch.equal(in_place.score(x), plain.score(x))
        assert torch.equal(in_place(x), plain(x))
        assert torch.equal(x, before)
    defended, expected = (Defended(m, Purifier(m, steps=1, dtype="float32", fold=fold)) for m in (model, other))
    y = expected(x).argmax(1)
    attacked = [BPDA(PGD(m, steps=2), d)(x, y) for m, d in ((model, defended), (other, expected))]
    assert torch.equal(*attacked)
    with torch.no_grad():
        left = Defended(model, nothing)(x)  # which returns what it is given
    assert torch.equal(x, before)
    assert torch.equal(left, Defended(other, nothing)(x))


def test_more_images_than_run_at_once() -> None:
    """A product of matrices takes images one by one, but not any number of rows: these may be positions."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 10)).eval(), torch.rand(MOST_ROWS + 1, 3, 4, 4)
    for defended in (Defended(model, nothing), Averaging(model, [Flip()])):
        with torch.no_grad():
            whole = defended(x)
            assert torch.equal(whole, torch.cat([defended(part) for part in x.split(64)]))


def test_images_that_do_not_fold_once_may_do_later() -> None:
    class Wide(cases.DenseNet):
        def forward(self, x: Tensor) -> Any:
            if x.shape[3] < 10:
                raise ValueError("too narrow")
            return super().forward(x)

    purifier = Purifier(Wide().eval(), views=[Flip()], steps=1, dtype="float32")
    with pytest.raises(ValueError, match="too narrow"):
        purifier(cases.images(2, 20, 6))
    assert not purifier.folded
    purifier(cases.images())
    assert purifier.folded


def test_a_call_in_another_thread_leaves_the_copy_alone() -> None:
    """Features of a submodule are caught by a hook while a call lasts, which is no change of the model."""

    class Met(cases.DenseNet):
        met: Callable[[], None] | None = None

        def forward(self, x: Tensor) -> Any:
            met, self.met = self.met, None
            if met is not None:
                other = threading.Thread(target=met)
                other.start()
                other.join()
            return super().forward(x)

    model, x = Met().eval(), cases.images()
    folded = Purifier(model, "body", dtype="float32")
    expected, found = folded(x), []
    made = folded._folded and folded._folded._copy
    for purifier in (folded, Purifier(model, "body", dtype="float32")):  # whose copy is made right then
        model.met = lambda purifier=purifier: found.append(purifier(x))
        Purifier(model, "body", dtype="float32", fold=False)(x)
        assert purifier.folded
        assert torch.equal(found.pop(), expected)
    assert folded._folded is not None
    assert folded._folded._copy is made
    model.body.register_forward_hook(lambda *_: None)
    folded(x)
    assert not folded.folded


def test_a_defended_model_predicts_from_the_model_that_it_has() -> None:
    x = cases.images()
    for dtype in ("float32", "bfloat16"):
        defended = Defended(cases.dense(), nothing, dtype=dtype)
        before = defended(x)
        defended.model = cases.dense(1)
        assert torch.equal(defended(x), Defended(cases.dense(1), nothing, dtype=dtype)(x))
        assert not torch.equal(defended(x), before)


class Unbatched(cases.DenseNet):
    """Runs a convolution on each image without its batch."""

    def forward(self, x: Tensor) -> Tensor:
        first = self.stem[0]
        y = torch.stack([torch.nn.functional.conv2d(image, first.weight, first.bias, 2, 1) for image in x])
        y = self.body(self.stem[1:](y))
        return nn.functional.interpolate(self.head(y), x.shape[2:], mode="bilinear", align_corners=False)


def test_momentum_beyond_the_range_of_half_precision() -> None:
    ascent = Ascent(ball=Linf(0.1), steps=1, step_size=0.01, momentum=1.0)
    gradient = torch.full((1, 3, 360, 480), 1e-7, dtype=torch.float16)
    gradient[0, 0, 0, 0] = 10
    followed, _ = ascent.accumulated(gradient, torch.zeros(1, 3, 360, 480))
    assert followed.isfinite().all()
    assert (followed.sign() == gradient.sign()).all()


def test_a_convolution_without_a_batch() -> None:
    torch.manual_seed(0)
    model = Unbatched()
    plain = cases.DenseNet()
    plain.load_state_dict(model.state_dict())
    one, other = (Purifier(m, steps=1, dtype="float32", fold=False) for m in (model, plain))
    torch.testing.assert_close(one.score(cases.images()), other.score(cases.images()))


@pytest.mark.parametrize(
    "settings",
    [{}, {"pairing": "all"}, {"pairing": "anchor"}, {"views_per_step": 2}, {"norm": "l2", "eps": 1.0}],
    ids=str,
)
def test_stopping(settings: dict[str, Any]) -> None:
    model, x, ids = cases.dense(), cases.images(4), torch.tensor([5, 3, 8, 1])
    settings = {"steps": 4, **settings}
    iterates = [Purifier(model, **{**settings, "steps": t, "step_size": 0.01})(x, ids) for t in range(5)]
    settings["step_size"] = 0.01
    plain = Purifier(model, **settings)
    values: list[Tensor] = []
    for t in range(4):
        with plain._objective(iterates[t], ids, 0, plain.views_per_step) as (start, objective, _, _):
            values.append(objective.gradient(start, t)[0])
    # a level that some images reach, at different steps, and some never
    level = float(torch.stack(values).flatten().sort().values[-3]) - 1e-6
    pairs = number_of_pairs(plain.pairing, plain.views_per_step or len(plain.views))
    done: list[tuple[int, int]] = []
    purifier = Purifier(model, stop=level / pairs, **settings)
    stopped = purifier(x, ids, progress=lambda *counts: done.append(counts))
    left = set()
    for i in range(4):
        first = next((t for t in range(4) if float(values[t][i]) >= level), 4)
        left.add(first)
        assert torch.equal(stopped[i], iterates[first][i])
        assert torch.equal(purifier(x[i : i + 1], ids[i : i + 1])[0], stopped[i])
    assert len(left) > 1
    assert done[-1] == (4, 4)
    assert torch.equal(Purifier(model, stop=-1, **settings)(x, ids), iterates[0])
    assert torch.equal(Purifier(model, stop=1, **settings)(x, ids), iterates[4])


def test_momentum_of_half_precision() -> None:
    """The gradient of a large image in float16 is below that dtype's normal numbers."""
    ascent = Ascent(ball=Linf(0.1), steps=2, step_size=0.01, momentum=1.0)

    class Falling:
        fixed = True

        def gradient(self, x: Tensor, t: int) -> tuple[Tensor, Tensor]:
            # the second gradient is smaller and the other way: where both are of unit mean, the sum is 0
            return x.new_zeros(len(x)), torch.full_like(x, 2e-6 if t == 0 else -1e-6)

    x = torch.full((1, 1, 4, 4), 0.5, dtype=torch.float16)
    moved = ascent(Falling(), x, seed=0, ids=torch.zeros(1, dtype=torch.int64))
    torch.testing.assert_close(moved, x + torch.tensor(0.01, dtype=torch.float16))


def test_features_that_are_a_module_come_back_too() -> None:
    model = cases.dense()
    trunk = nn.Sequential(model.stem, model.body).train()
    Purifier(lambda x: model(x), trunk, steps=2)(cases.images())
    assert trunk.training
    assert int(model.stem[1].num_batches_tracked) == 0
    Purifier(lambda x: model(x), trunk.forward, steps=2)(cases.images())
    assert int(model.stem[1].num_batches_tracked) == 0


def test_defended_copies_saves_and_moves(tmp_path: Path) -> None:
    x, defended = cases.images(), Defended(cases.dense(), Purifier(cases.dense(), steps=2))
    expected = defended(x)
    twin = copy.deepcopy(defended)
    assert torch.equal(twin(x), expected)
    assert torch.equal(defended.train()(x), expected)  # always in eval mode
    torch.save(defended.state_dict(), tmp_path / "weights.pt")
    other = Defended(cases.dense(seed=1), defended.purifier)
    assert not torch.equal(other(x), expected)
    other.load_state_dict(torch.load(tmp_path / "weights.pt"))
    assert torch.equal(other(x), expected)
    model = cases.dense()
    assert Defended(model, Purifier(model, steps=2)).double()(x.double()).dtype == torch.float64


def test_strong_averages_over_the_mirror_image() -> None:
    x, model = cases.images(), cases.dense().eval()
    purifier = Purifier(model, preset="strong", steps=1)
    purified = purifier(x)
    expected = (model(purified) + model(purified.flip(3)).flip(3)) / 2
    torch.testing.assert_close(Defended(model, purifier)(x), expected)


def test_what_a_prediction_is_averaged_over() -> None:
    x, model = cases.images(), cases.dense().eval()
    flip, turn = views.Flip(), views.Rotation()
    for given, expected in (
        ({}, (flip,)),
        ({"preset": "paper"}, ()),
        ({"preset": "strong"}, (flip,)),
        ({"preset": "strong", "average": False}, ()),
        ({"average": [turn]}, (turn,)),
        ({"views": [turn, flip], "average": True}, (turn, flip)),
    ):
        purifier = Purifier(model, steps=1, **given)  # type: ignore[arg-type]
        assert purifier.average == expected
        assert purifier.settings()["average"] == [repr(view) for view in expected]
        same = torch.equal(Defended(model, purifier)(x), model(purifier(x)))
        assert same == (not expected)
    with pytest.raises(TypeError, match="average has a str; every one must be a View"):
        Purifier(model, average=["flip"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="average is 0; it must be a sequence of at least one View"):
        Purifier(model, average=0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="average is \\[\\]; it must be a sequence of at least one View"):
        Purifier(model, average=[])
