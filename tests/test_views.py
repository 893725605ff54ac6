import colorsys
import math
from collections.abc import Callable

import cases
import pytest
import torch
from torch import Tensor

from equifast import reference, rng, views


def draw(view: views.View, size: tuple[int, int], n: int = 2, seed: int = 0) -> views.Sampled:
    return views.sample([view], size, seed=seed, ids=torch.arange(n))[0]


@pytest.mark.parametrize("name", cases.VIEWS)
def test_every_view(name: str) -> None:
    """Numbers of its own for each image, whatever the batch; and what it shows of an image is where it says."""
    view, height, width = cases.VIEWS[name], 40, 56
    x = cases.images(3, height, width)
    drawn = draw(view, (height, width), n=3)
    assert drawn.theta.shape == (3, 2, 3)
    assert drawn.theta.dtype == torch.float64
    assert drawn.view is view
    colored = drawn.color(x)
    shown = reference.warp(colored, drawn.theta[None], [drawn.size])[0]
    assert shown.shape == (3, 3, *drawn.size)
    for n in range(3):
        alone = views.sample([view], (height, width), seed=0, ids=torch.tensor([n]))[0]
        assert torch.equal(alone.theta[0], drawn.theta[n])
        assert alone.size == drawn.size
        assert torch.equal(alone.color(x[n : n + 1])[0], colored[n])
    back = reference.invert(drawn.theta[None])
    returned, seen = (reference.warp(f, back, [(height, width)])[0] for f in (shown, torch.ones_like(shown)))
    inner = seen > 0.999
    inner[..., [0, 1, -2, -1], :] = inner[..., [0, 1, -2, -1]] = False  # edges are averaged with what is beside
    assert inner.float().mean() > 0.3
    assert (returned - colored)[inner].abs().mean() < 0.1  # of unrelated images it is about 0.3


@pytest.mark.parametrize(
    ("view", "expected"),
    [
        (views.Flip(), lambda x: x.flip(3)),
        (views.Flip(vertical=True), lambda x: x.flip(2)),
        *((views.Turn(k), lambda x, k=k: x.rot90(k, (2, 3))) for k in range(4)),
        (views.Compose(views.Turn(1), views.Flip()), lambda x: x.rot90(1, (2, 3)).flip(3)),
        (views.Compose(views.Flip(), views.Turn(1)), lambda x: x.flip(3).rot90(1, (2, 3))),
    ],
    ids=lambda given: repr(given) if isinstance(given, views.View) else "",
)
def test_views_that_only_move_pixels(view: views.View, expected: Callable[[Tensor], Tensor]) -> None:
    x = cases.images(2, 8, 14)
    drawn = draw(view, (8, 14))
    shown = reference.warp(x, drawn.theta[None], [drawn.size])[0]
    torch.testing.assert_close(shown, expected(x), atol=1e-6, rtol=0)


def test_a_composition_recolors_by_each_of_its_parts() -> None:
    x = cases.images(3, 8, 10)
    darker, grayer = views.ColorJitter(0.9, 0, 0, 0, 0), views.ColorJitter(0, 0, 0, 0.3, 0.5)
    both = views.Compose(darker, views.Rotation(5), grayer)
    u = torch.rand(3, 11, dtype=torch.float64)
    expected = grayer.color(darker.color(x, darker.parameters(u[:, :5])), grayer.parameters(u[:, 6:]))
    assert torch.equal(both.color(x, both.parameters(u)), expected)
    assert not torch.equal(expected, darker.color(x, darker.parameters(u[:, :5])))


def test_the_views_of_the_paper() -> None:
    shown = views.paper()
    scales = [view.scale for view in shown if isinstance(view, views.Resize)]
    assert scales == [(2.0, 2.0), (0.3, 0.3), (2.0, 2.0), (0.5, 0.5)]
    assert len(shown) == 8
    assert [view.enlarges for view in shown] == [True, False, True, False, False, False, False, False]
    for seed in range(20):
        sampled = views.sample(shown, (100, 200), seed=seed, ids=torch.arange(3))
        for view, height in zip(sampled, (200, 30, 200, 50, 100, 100, 100, 100), strict=True):
            assert view.size[0] == height
            assert (0.8 - 0.02) * height * 2 <= view.size[1] <= 1.2 * height * 2
            assert view.theta.shape == (3, 2, 3)
        assert sampled[6].size == sampled[7].size == (100, 200)
        assert not torch.equal(sampled[6].theta, sampled[7].theta)
        assert not torch.equal(sampled[6].theta[0], sampled[6].theta[1])  # an angle per image


def test_sizes_round_down_and_are_at_least_one() -> None:
    assert draw(views.Resize(0.3), (7, 9)).size == (2, 2)
    assert draw(views.Resize(0.3), (1, 3)).size == (1, 1)
    least = views.Resize((0.3, 0.9), least=16)
    for (height, width), low, high in (((32, 40), 16, 28), ((20, 90), 16, 17), ((9, 9), 8, 8), ((100, 200), 30, 89)):
        found = [draw(least, (height, width), seed=seed).size for seed in range(100)]
        assert min(h for h, _ in found) in (low, low + 1)
        assert max(h for h, _ in found) in (high, high - 1)
        assert all(abs(w - width * h / height) <= 1 + width / height for h, w in found)
    sizes = {draw(views.Resize((0.5, 1.5)), (100, 100), seed=seed).size[0] for seed in range(50)}
    assert min(sizes) < 65
    assert max(sizes) > 135


def test_rotation_is_true_in_pixels() -> None:
    """A quarter turn of a non-square image equals rot90 where both have pixels."""
    view = views.Rotation(90)
    theta, _ = view.geometry((8, 14), torch.zeros(0), torch.tensor([[1.0], [0.0]], dtype=torch.float64))  # +-90
    x = cases.images(2, 8, 14)
    turned = reference.warp(x, theta[None], [(8, 14)])[0]
    for n, k in ((0, 1), (1, -1)):
        expected = x[n].rot90(k, (1, 2))[:, 3:11]  # (3, 14, 8) cut to 8 rows
        torch.testing.assert_close(turned[n, :, :, 3:11], expected, atol=1e-5, rtol=0)
        assert turned[n, :, :, :3].abs().max() == 0


def test_shift_moves_by_pixels() -> None:
    u = torch.tensor([[1.0, 0.5]], dtype=torch.float64)  # 3 px to the left
    theta, _ = views.Shift(0.25).geometry((8, 12), torch.zeros(0), u)
    x = cases.images(1, 8, 12)
    shifted = reference.warp(x, theta[None], [(8, 12)])[0]
    torch.testing.assert_close(shifted[..., :9], x[..., 3:])
    assert shifted[..., 9:].abs().max() == 0


def test_composition_is_one_after_the_other() -> None:
    parts = [views.Resize(0.701), views.Flip(), views.Rotation(30), views.Shift(0.1)]
    composed = draw(views.Compose(*parts), (40, 60))
    u = composed.parameters.split([part.image for part in parts], 1)
    grid = torch.randn(2, 3, 5, dtype=torch.float64)
    grid[:, 2] = 1
    size, points = (40, 60), grid
    thetas = []
    for part, numbers in zip(parts, u, strict=True):
        theta, size = part.geometry(size, torch.zeros(part.shared), numbers)
        thetas.append(theta)
    for theta in reversed(thetas):  # from the output of the last back to the input of the first
        points = torch.cat((theta @ points, torch.ones(2, 1, 5, dtype=torch.float64)), 1)
    torch.testing.assert_close(composed.theta @ grid, points[:, :2])
    assert composed.size == size == (28, 42)


def jittered(x: Tensor, jitter: views.ColorJitter, u: list[float]) -> Tensor:
    return jitter.color(x, jitter.parameters(torch.tensor([u], dtype=torch.float64)))


def test_color_jitter_against_colorsys() -> None:
    x = cases.images(1, 5, 6)
    jitter = views.ColorJitter(0, 0, 0, hue=0.2, grayscale=0)
    actual = jittered(x, jitter, [0.5, 0.5, 0.5, 0.9, 0.5])
    for j in range(5):
        for i in range(6):
            hue, saturation, value = colorsys.rgb_to_hsv(*x[0, :, j, i].tolist())
            expected = colorsys.hsv_to_rgb((hue + 0.16) % 1, saturation, value)
            assert actual[0, :, j, i].tolist() == pytest.approx(expected, abs=1e-5)


def test_color_jitter_of_each_kind() -> None:
    x = 0.2 + 0.5 * cases.images(1, 5, 6)
    middle = [0.5] * 5
    assert torch.allclose(jittered(x, views.ColorJitter(0, 0, 0, 0, 0), middle), x, atol=1e-6)
    torch.testing.assert_close(jittered(x, views.ColorJitter(0.4, 0, 0, 0, 0), [1, *middle[1:]]), (1.4 * x).clamp(0, 1))
    gray = (x * torch.tensor([0.2989, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)
    flat = jittered(x, views.ColorJitter(0, 1, 0, 0, 0), [0.5, 0, 0.5, 0.5, 0.5])
    torch.testing.assert_close(flat, gray.mean().expand_as(x))
    dull = jittered(x, views.ColorJitter(0, 0, 1, 0, 0), [0.5, 0.5, 0, 0.5, 0.5])
    torch.testing.assert_close(dull, gray.expand_as(x))
    torch.testing.assert_close(jittered(x, views.ColorJitter(0, 0, 0, 0, 1), middle), gray.expand_as(x))


def test_grayscale_has_its_probability() -> None:
    x = cases.images(1, 4, 4).expand(400, 3, 4, 4)
    out = draw(views.ColorJitter(), (4, 4), n=400).color(x)
    gray = ((out[:, 0] - out[:, 1]).abs().amax((1, 2)) < 1e-6).float().mean()
    assert 0.12 < gray < 0.28


def test_jitter_is_differentiable_and_stays_in_range() -> None:
    x = cases.images(4, 6, 6).requires_grad_()
    out = draw(views.ColorJitter(), (6, 6), n=4).color(x)
    assert out.min() >= 0
    assert out.max() <= 1
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 0
    flat = torch.full((1, 3, 2, 2), 0.5, requires_grad=True)  # no hue
    jitter = views.ColorJitter()
    out = jitter.color(flat, jitter.parameters(torch.rand(1, 5, dtype=torch.float64)))
    assert torch.autograd.grad(out.sum(), flat)[0].isfinite().all()


def test_jitter_does_not_depend_on_the_batch() -> None:
    x = cases.images(8, 64, 64)
    ids = torch.arange(8)
    whole = views.sample([views.ColorJitter()], (64, 64), seed=0, ids=ids)[0].color(x)
    for n in range(8):
        one = views.sample([views.ColorJitter()], (64, 64), seed=0, ids=ids[n : n + 1])[0].color(x[n : n + 1])
        assert torch.equal(one[0], whole[n])


def test_choice_without_replacement_is_fair() -> None:
    counts = dict.fromkeys(range(8), 0)
    kinds = views.paper()
    for step in range(800):
        chosen = views.sample(kinds, (10, 10), seed=0, ids=torch.zeros(1, dtype=torch.int64), step=step, count=2)
        indices = {id(view.view) for view in chosen}
        assert len(indices) == 2
        for k in range(8):
            counts[k] += id(kinds[k]) in indices
    assert all(150 < count < 250 for count in counts.values())


def test_a_view_keeps_its_numbers_whichever_are_chosen() -> None:
    kinds, ids = views.paper(), torch.arange(2)
    everything = views.sample(kinds, (50, 60), seed=3, ids=ids, step=5)
    for view in views.sample(kinds, (50, 60), seed=3, ids=ids, step=5, count=3):
        match = everything[[id(k) for k in kinds].index(id(view.view))]
        assert torch.equal(match.theta, view.theta)
        assert match.size == view.size


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: views.Resize(0), "scale is 0; it must be a finite number above 0"),
        (lambda: views.Resize(0.5, least=0), "least is 0; it must be an integer from 1 to 2147483648"),
        (lambda: views.Resize((2, 1)), "scale is (2, 1); its low end must not be above its high end"),
        (lambda: views.Resize(1, (0.8, math.nan)), "ratio is nan; it must be a finite number"),
        (lambda: views.Rotation(-1), "degrees is -1; it must be a finite number of at least 0"),
        (lambda: views.Shift(math.inf), "fraction is inf; it must be a finite number"),
        (
            lambda: views.ColorJitter(hue=0.7),
            "hue is 0.7; it must be a finite number of at least 0 and at most 0.5",
        ),
        (lambda: views.Compose(views.Flip(), 3), "views has a int; every one must be a View"),  # type: ignore[arg-type]
    ],
)
def test_bad_views(build: object, sentence: str) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        build()  # type: ignore[operator]
    assert sentence in str(caught.value)


def test_streams_of_views_are_apart() -> None:
    a, b = (rng.Stream.IMAGE.of(k) for k in (0, 1))
    ids = torch.zeros(1, dtype=torch.int64)
    assert not torch.equal(rng.uniform(0, a, ids, 0, 0, 4), rng.uniform(0, b, ids, 0, 0, 4))


@pytest.mark.parametrize(
    ("theta", "size", "message"),
    [
        (
            torch.eye(2, 3)[None].double(),
            (4, 4),
            r"Bad.geometry gives a theta of shape \(1, 2, 3\); it must be \(2, 2, 3\)",
        ),
        (torch.zeros(2, 2, 3), (4, 4), "theta has a singular matrix"),
        (torch.full((2, 2, 3), torch.nan), (4, 4), "theta has values that are NaN or infinite"),
        (torch.eye(2, 3).repeat(2, 1, 1), (0, 4), r"the size that Bad.geometry gives is \(0, 4\)"),
    ],
)
def test_a_view_of_ones_own_that_is_wrong_is_refused(theta: torch.Tensor, size: tuple[int, int], message: str) -> None:
    class Bad(views.View):
        def geometry(self, *_: object) -> tuple[torch.Tensor, tuple[int, int]]:
            return theta, size

    with pytest.raises(ValueError, match=message):
        views.sample([Bad()], (4, 4), seed=0, ids=torch.arange(2))


class Tilted(views.View):
    def __init__(self, degrees: float) -> None:
        self.degrees = degrees


def test_views_of_ones_own_are_named_by_their_settings() -> None:
    assert repr(views.View()) == "View()"
    assert repr(Tilted(3.0)) == "Tilted(degrees=3.0)"
    assert repr(views.Flip()) == "Flip(vertical=False)"


def test_compositions_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="views is empty; there must be at least one View"):
        views.Compose()
