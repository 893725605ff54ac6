"""What runs at once: views of one size in one batch, and as many images and views as a budget of memory allows."""

from collections.abc import Callable
from typing import Any

import cases
import pytest
import torch
from torch import Tensor, nn

from equifast import Purifier, views
from equifast._memory import pass_bytes
from equifast.defenses import Rotation
from equifast.evaluate.cost import peak_memory
from equifast.objectives import Equivariance

MEBIBYTE = 2**20


class Counted(nn.Module):
    """A model that notes the batches that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = cases.dense()
        self.seen: list[tuple[int, ...]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(tuple(x.shape))
        features: Tensor = self.inner(x)
        return features


def objective(
    model: Callable[[Tensor], Tensor], together: int, dtype: torch.dtype | None = None, **settings: Any
) -> Equivariance:
    chosen = (views.Flip(), views.Resize(0.5), views.Rotation(), views.Resize(0.5), views.ColorJitter())
    rest: dict[str, Any] = {"pairing": "anchor", "view_gradient": 0.7, "reduction": "image"}
    ids = torch.tensor([3, 5])
    place = {"count": None, "seed": 0, "ids": ids, "draw": 0, "autocast": dtype, "together": together}
    return Equivariance(model, chosen, **rest | place | settings)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize(
    "settings", [{}, {"view_gradient": 0}, {"followed": 2}, {"pairing": "all"}, {"reduction": "pixel"}], ids=str
)
def test_views_in_batches_have_the_gradient_that_they_have_alone(
    settings: dict[str, Any], dtype: torch.dtype | None
) -> None:
    x, model = cases.images(), cases.dense().eval().requires_grad_(False)
    both = (objective(model, most, dtype, **settings).gradient(x, 0) for most in (0, 10**6))
    (alone, first), (together, other) = both
    tolerance = {"rtol": 1e-5, "atol": 1e-7} if dtype is None else {"rtol": 2e-2, "atol": 5e-4}
    torch.testing.assert_close(alone, together, **tolerance)
    torch.testing.assert_close(first / first.norm(), other / other.norm(), **tolerance)


@pytest.mark.parametrize("kind", ["all", "rotation", "anchor"])
def test_the_graphs_that_are_held_fit_the_budget(kind: str) -> None:
    """Where all views' are at once, those of fewer images are."""
    x, budget = cases.images(64, 16, 16), (4 if kind == "all" else 2) * MEBIBYTE
    settings: dict[str, Any] = {"max_memory": budget, "dtype": "float32"}
    if kind == "rotation":
        purifier: Purifier = Rotation(cases.dense(), **settings)
    else:
        purifier = Purifier(cases.dense(), pairing=kind, views=[views.Flip()] * 8, **settings)
    together = purifier._together(x, purifier._features)
    ((kept, passing),) = purifier._held.values()
    images = max(rows.stop - rows.start for rows in purifier._chunks(x, together))
    assert 1 < images < 64
    held = 2 * (kept + passing) if kind == "anchor" else (1 + len(purifier.views)) * kept + passing
    assert 0.5 * budget < images * 16 * 16 * held <= budget


def test_which_views_run_together() -> None:
    def batches(together: int, **settings: Any) -> list[tuple[int, ...]]:
        model = Counted().eval().requires_grad_(False)
        objective(model, together, **settings).gradient(cases.images(), 0)
        return sorted((n, h) for n, _, h, _ in model.seen)

    area = 20 * 28
    assert batches(0) == [(2, 10), (2, 10), *[(2, 20)] * 4]
    assert batches(2 * area) == [*[(2, 20)] * 4, (4, 10)]  # four small images make one large one
    assert batches(8 * area) == [(4, 10), (8, 20)]
    assert batches(6 * area) == [(2, 20), (4, 10), (6, 20)]
    assert batches(8 * area, followed=5) == batches(8 * area)
    assert sum(n for n, _ in batches(8 * area, followed=2)) == 12
    assert batches(8 * area, view_gradient=0) == [(2, 20), (4, 10), (6, 20)]  # targets have no graph, the image has


def test_scores_of_views_in_batches() -> None:
    x, model = cases.images(), Counted().eval().requires_grad_(False)
    alone, together = (objective(model, most).similarities(x) for most in (0, 10**6))
    torch.testing.assert_close(alone, together)
    assert len(model.seen) == 6 + 3


def test_an_image_of_a_batch_of_views_has_no_say_in_the_others() -> None:
    x = cases.images(3, 20, 28)
    purifier = Purifier(cases.dense(), max_memory=10**9, views=[views.Flip(), views.Flip(), views.Resize(0.5)])
    ids = torch.arange(3)
    whole = purifier(x, ids)
    for n in range(3):
        assert torch.equal(purifier(x[n : n + 1], ids[n : n + 1]), whole[n : n + 1])


def test_the_bytes_of_a_pass() -> None:
    weight = torch.rand(7, 7, requires_grad=True)
    x = torch.rand(3, 7)

    def run(images: Tensor) -> Tensor:
        return (images @ weight).relu().square()

    # of the product its argument, of relu its result, which the square keeps too
    assert pass_bytes(run, x, [weight]) == (2 * 3 * 7 * 4, 3 * 3 * 7 * 4)
    assert pass_bytes(lambda images: images * 2, x) == (0, 0)


@pytest.mark.parametrize("preset", ["fast", "paper"])
@pytest.mark.parametrize("megabytes", [4, 16])
def test_memory_stays_within_the_budget(preset: str, megabytes: int) -> None:
    model = wide()
    settings = {"steps": 1, "dtype": "float32"}
    plain = Purifier(model, preset=preset, **settings)
    bounded = Purifier(model, preset=preset, max_memory=megabytes * MEBIBYTE, **settings)
    x = torch.rand(24, 3, 44, 60, generator=torch.Generator().manual_seed(0))
    bounded(x[:2])
    peak = peak_memory(lambda: bounded(x), x.device)
    least = peak_memory(lambda: bounded(x[:1]), x.device)
    images = 6 * x.numel() * 4  # those that come, go, and are kept of a step
    assert peak <= max(least, megabytes * MEBIBYTE) + images
    if megabytes == 16:
        more = Purifier(model, preset=preset, max_memory=64 * MEBIBYTE, **settings)
        assert peak_memory(lambda: more(x), x.device) > 1.5 * peak  # it takes what it is given
    if preset == "fast":
        assert torch.equal(bounded(x), plain(x))


def wide() -> nn.Module:
    """Wide enough that its graph is most of what there is."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 32, 3, padding=1), *[nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1)] * 3]
    return nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(32, 4, 1)).eval()


def test_a_budget_that_is_none() -> None:
    for wrong, error in ((0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError)):
        with pytest.raises(error, match="max_memory is"):
            Purifier(cases.dense(), max_memory=wrong)
