"""Rotations and translations: the transform against torch's own, and the searches of the spatial adversary."""

import cases
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from equifast import attacks, spatial
from equifast.objectives import cross_entropy
from equifast.spatial import Grid

SMALL = Grid(counts=(5, 3, 3))


def problem(n: int = 6) -> tuple[nn.Module, Tensor, Tensor]:
    """A model, images and its own predictions of them."""
    model, x = cases.classifier().eval(), cases.images(n)
    with torch.no_grad():
        return model, x, model(x).argmax(1)


@pytest.mark.parametrize("size", [(32, 32), (21, 34)])
@pytest.mark.parametrize("differentiable", [False, True])
def test_transform_is_grid_sample_with_zeros(size: tuple[int, int], differentiable: bool) -> None:
    x = torch.rand(4, 3, *size)
    parameters = torch.tensor([[0, 0, 0], [30, 3, -1.5], [-17, 0.25, 2], [90, -40, 5.0]], dtype=torch.float64)
    theta = spatial.matrices(size, *parameters.unbind(1)).float()
    expected = functional.grid_sample(
        x, functional.affine_grid(theta, list(x.shape), align_corners=False), align_corners=False
    )
    actual = spatial.transform(x, parameters.requires_grad_(differentiable))
    torch.testing.assert_close(actual.detach(), expected, atol=1e-5, rtol=0)


def test_transform_turns_counterclockwise_and_shifts_right_and_down() -> None:
    x = torch.rand(1, 3, 8, 8)
    quarter = spatial.transform(x, torch.tensor([[90.0, 0, 0]]))
    torch.testing.assert_close(quarter, x.rot90(1, (2, 3)), atol=1e-5, rtol=0)
    for two_pass in (False, True):
        moved = spatial.transform(x, torch.tensor([[0.0, 2, 1]]), two_pass=two_pass)
        torch.testing.assert_close(moved, functional.pad(x, (2, -2, 1, -1)), atol=1e-5, rtol=0)
    both = spatial.transform(x, torch.tensor([[90.0, 2, 1]]))  # the rotation comes first
    torch.testing.assert_close(both, functional.pad(x.rot90(1, (2, 3)), (2, -2, 1, -1)), atol=1e-5, rtol=0)


def test_transform_has_the_right_derivative() -> None:
    x = torch.rand(2, 2, 6, 7, dtype=torch.float64)
    parameters = torch.tensor([[3.1, 0.3, 0.7], [-8.2, 0.6, -0.4]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p: spatial.transform(x, p), (parameters,))


def test_grid_has_the_published_points() -> None:
    points = Grid().points()
    assert points.shape == (775, 3)
    assert sorted(set(points[:, 0].tolist())) == pytest.approx(list(range(-30, 31, 2)))
    assert sorted(set(points[:, 1].tolist())) == [-3, -1.5, 0, 1.5, 3]
    assert points[-1].tolist() == [0, 0, 0]
    assert len(set(map(tuple, points.tolist()))) == 775


@pytest.mark.parametrize("two_pass", [False, True])
def test_grid_finds_the_first_failure_whatever_the_batch(two_pass: bool) -> None:
    model, x, y = problem()
    y[3] = (y[3] + 1) % 5  # one is wrong from the start
    settings = {"grid": SMALL, "batch": 16, "two_pass": two_pass}
    attack = attacks.Spatial(model, **settings)
    points = SMALL.points()
    with torch.no_grad():  # all of them, one after the other
        losses, failed = [], []
        for point in points:
            logits = model(spatial.transform(x, point.expand(len(x), 3), two_pass=two_pass))
            losses.append(cross_entropy(logits, y))
            failed.append(logits.argmax(1) != y)
    failures = torch.stack(failed, 1)
    assert failures.any()
    assert not failures.all(1).all()
    assert torch.equal(attack.failures(x, y), failures)
    first = torch.where(failures.any(1), failures.float().argmax(1), torch.stack(losses, 1).argmax(1))
    found = attack.find(x, y)
    assert torch.equal(found, points[first])
    assert torch.equal(torch.cat([attack.find(x[i : i + 1], y[i : i + 1]) for i in range(len(x))]), found)
    torch.testing.assert_close(attack(x, y), spatial.transform(x, found, two_pass=two_pass).clamp(0, 1))
    order = attacks.Spatial(model, **settings).learned_order(x, y)
    assert sorted(order) == list(range(45))
    assert failures[:, order[0]].sum() == failures.sum(0).max()
    learned = attacks.Spatial(model, order=order, **settings)
    wrong = [(model(images).argmax(1) != y)[failures.any(1)] for images in (attack(x, y), learned(x, y))]
    assert all(each.all() for each in wrong)


@pytest.mark.parametrize("objective", ["cross-entropy", "kl", "l2"])
def test_ascent_is_never_weaker_than_its_starts(objective: str) -> None:
    model, x, y = problem()
    ids = torch.tensor([5, 2, 9, 2**40, 0, 1])

    def far(images: Tensor) -> Tensor:
        with torch.no_grad():
            logits, clean = model(images), model(x)
        if objective == "cross-entropy":
            return cross_entropy(logits, y)
        if objective == "l2":
            return (logits - clean).square().sum(1)
        return functional.kl_div(logits.log_softmax(1), clean.softmax(1), reduction="none").sum(1)

    settings = {"grid": SMALL, "k": 3, "objective": objective}
    one, three = (attacks.Spatial(model, search="worst-of-k", **{**settings, "k": k})(x, y, ids) for k in (1, 3))
    climbing = attacks.Spatial(model, search="spgd", **settings)
    climbed = climbing(x, y, ids)
    assert (far(three) >= far(one) - 1e-5).all()
    assert (far(climbed) >= far(three) - 1e-5).all()
    assert (far(climbed) > far(three) + 1e-5).any()
    found = climbing.find(x, y, ids)
    assert (found.abs() <= torch.tensor(SMALL.bounds) + 1e-4).all()
    assert torch.equal(climbing.find(x[2:], y[2:], ids[2:]), found[2:])


def test_spatial_composes_with_other_attacks_and_defenses() -> None:
    model, x, y = problem()
    attack = attacks.Spatial(model, search="spgd", k=2)
    moved = attack(x, y)
    both = attacks.PGD(model, steps=5)(moved, y)
    with torch.no_grad():
        assert (cross_entropy(model(both), y) > cross_entropy(model(moved), y)).all()
    for search in ("grid", "spgd"):
        through = attacks.BPDA(
            attacks.Spatial(model, search=search, grid=SMALL, k=2), cases.DEFENDED["averaging"](model)
        )
        assert through(x, y).shape == x.shape
    assert attack(x[:0], y[:0]).shape == (0, *x.shape[1:])


BAD = {
    "grid is": ({"grid": 3}, TypeError),
    "search is": ({"search": "all"}, ValueError),
    "objective is 'kl' with search": ({"objective": "kl"}, ValueError),
    "objective is 'l2' with targeted": ({"objective": "l2", "search": "spgd", "targeted": True}, ValueError),
    "order has 2 indices": ({"order": [0, 1]}, ValueError),
    "order has 3 indices": ({"order": "all"}, ValueError),
    "step_degrees": ({"step_degrees": -1.0, "search": "spgd"}, ValueError),
    "batch": ({"batch": 0}, ValueError),
}


@pytest.mark.parametrize("sentence", BAD)
def test_bad_settings_are_refused(sentence: str) -> None:
    settings, kind = BAD[sentence]
    with pytest.raises(kind, match=sentence):
        attacks.Spatial(cases.classifier(), **settings)


def test_bad_grids_and_labels_are_refused() -> None:
    with pytest.raises(ValueError, match="or the grid is empty"):
        Grid(counts=(0, 5, 5))
    with pytest.raises(ValueError, match="degrees is"):
        Grid(degrees=200)
    with pytest.raises(ValueError, match="one label for each image"):
        attacks.Spatial(cases.dense())(cases.images(2), torch.zeros(2, *cases.images(2).shape[2:], dtype=torch.int64))
    with pytest.raises(ValueError, match="degrees, right and down"):
        spatial.transform(cases.images(2), torch.zeros(3, 3))
