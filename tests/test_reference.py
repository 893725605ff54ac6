import cases
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from equifast import ops, reference
from equifast.objectives import pooled

SIZES = [(1, 1), (2, 5), (20, 28), (33, 17)]
HALF = {torch.float16: 2e-3, torch.bfloat16: 2e-2}  # absolute tolerance per dtype, values in [0, 1]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_identity_and_flip_are_exact(size: tuple[int, int], dtype: torch.dtype) -> None:
    x = random(2, 3, *size, dtype=dtype)
    for name, expected in (("identity", x), ("flip", x.flip(3))):
        for precision in (torch.float32, torch.float64):
            assert torch.equal(ops.warp(x, cases.theta(name, 2, precision), [size])[0], expected)


@pytest.mark.parametrize("source", SIZES)
@pytest.mark.parametrize("target", SIZES)
def test_resize_is_interpolate(source: tuple[int, int], target: tuple[int, int]) -> None:
    x = random(2, 3, *source, dtype=torch.float64)
    expected = functional.interpolate(x, target, mode="bilinear", align_corners=False)
    torch.testing.assert_close(reference.warp(x, cases.theta("identity", 2), [target])[0], expected)


@pytest.mark.parametrize("name", cases.THETAS)
@pytest.mark.parametrize("size", SIZES)
def test_warp_is_grid_sample_inside(name: str, size: tuple[int, int]) -> None:
    x, theta = random(1, 2, 13, 18, dtype=torch.float64), cases.theta(name)
    grid = functional.affine_grid(theta[0], [1, 2, *size], align_corners=False)
    expected = functional.grid_sample(x, grid, padding_mode="border", align_corners=False)
    inside = (grid.abs() <= 1 + 1e-6).all(-1)[:, None]
    torch.testing.assert_close(reference.warp(x, theta, [size])[0], torch.where(inside, expected, 0.0))


def test_round_trip_of_a_smooth_image() -> None:
    j, i = torch.meshgrid(torch.linspace(0, 3, 96), torch.linspace(0, 4, 128), indexing="ij")
    x = (0.5 + 0.4 * torch.sin(i) * torch.cos(j))[None, None]
    for name in ("rotation", "shift", "shear"):
        theta = cases.theta(name)
        there = reference.warp(x, theta, [(96, 128)])[0]
        back = reference.warp(there, reference.invert(theta), [(96, 128)])[0]
        seen = reference.warp(torch.ones_like(x), theta, [(96, 128)])[0]
        seen = reference.warp(seen, reference.invert(theta), [(96, 128)])[0] > 1 - 1e-6
        assert seen.float().mean() > 0.3
        assert ((back - x).abs() * seen).max() < 1e-2


@pytest.mark.parametrize("dtype", HALF)
def test_warp_in_half(dtype: torch.dtype) -> None:
    x, theta = random(2, 3, 12, 15), cases.theta("rotation", 2)
    expected = reference.warp(x, theta, [(9, 20)])[0]
    actual = reference.warp(x.to(dtype), theta, [(9, 20)])[0]
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.float(), expected, atol=HALF[dtype], rtol=0)


def test_layouts_agree() -> None:
    x, theta = random(2, 5, 12, 15), cases.theta("shear", 2)
    expected = reference.warp(x, theta, [(12, 15)])[0]
    strided = random(2, 5, 24, 15, seed=1)[:, :, ::2].copy_(x)
    for same in (x.to(memory_format=torch.channels_last), strided):
        assert torch.equal(reference.warp(same, theta, [(12, 15)])[0], expected)
        assert torch.equal(reference.similarity(same, [same], theta), reference.similarity(x, [x], theta))


def test_views_of_each_image_are_its_own() -> None:
    x = random(3, 2, 9, 11)
    theta = torch.cat([cases.theta(name) for name in ("flip", "shift", "rotation")], 1)
    whole = reference.warp(x, theta, [(9, 11)])[0]
    for n in range(3):
        assert torch.equal(whole[n : n + 1], reference.warp(x[n : n + 1], theta[:, n : n + 1], [(9, 11)])[0])


def test_gradients_of_warp() -> None:
    x = random(2, 2, 5, 4, dtype=torch.float64).requires_grad_()
    theta = torch.cat([cases.theta(name, 2) for name in ("rotation", "shear")]).requires_grad_()
    sizes = [(4, 6), (3, 3)]
    assert torch.autograd.gradcheck(lambda a, b: reference.warp(a, b, sizes), (x, theta))
    assert torch.autograd.gradgradcheck(lambda a: reference.warp(a, theta.detach(), sizes), (x,))
    assert torch.autograd.gradgradcheck(lambda a, b: reference.warp(a, b, sizes), (x, theta))


@pytest.mark.parametrize("reduction", ["image", "pixel"])
def test_gradients_of_similarity(reduction: str) -> None:
    theta = torch.cat([cases.theta(name, 2) for name in ("flip", "rotation", "outside")])
    tensors = [
        random(2, 2, *size, seed=i, dtype=torch.float64) - 0.4
        for i, size in enumerate([(3, 4), (3, 4), (2, 5), (2, 2)])
    ]
    leaves = [tensor.requires_grad_() for tensor in tensors]

    def run(anchor: Tensor, *views: Tensor) -> Tensor:
        return reference.similarity(anchor, views, theta, reduction)

    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


@pytest.mark.parametrize("reduction", ["image", "pixel"])
@pytest.mark.parametrize("name", cases.THETAS)
def test_similarity_by_its_definition(name: str, reduction: str) -> None:
    """Position by position, with torch's own sampler."""
    theta = cases.theta(name)
    f0, fk = (
        random(1, 3, 6, 7, dtype=torch.float64) - 0.5,
        random(1, 3, 5, 9, seed=1, dtype=torch.float64) - 0.5,
    )
    a, b = [], []
    for j in range(6):
        for i in range(7):
            p = torch.tensor([(2 * i + 1) / 7 - 1, (2 * j + 1) / 6 - 1], dtype=torch.float64)
            q = torch.linalg.solve(theta[0, 0, :, :2], p - theta[0, 0, :, 2])
            if (q.abs() <= 1 + 1e-6).all():
                a.append(f0[0, :, j, i])
                sampled = functional.grid_sample(fk, q.view(1, 1, 1, 2), padding_mode="border", align_corners=False)
                b.append(sampled.flatten())
    expected = torch.zeros((), dtype=torch.float64)
    if a and reduction == "image":
        expected = functional.cosine_similarity(torch.cat(a), torch.cat(b), dim=0)
    elif a:
        expected = functional.cosine_similarity(torch.stack(a), torch.stack(b), dim=1).mean()
    actual = reference.similarity(f0, [fk], theta, reduction)
    torch.testing.assert_close(actual, expected.view(1, 1))


@pytest.mark.parametrize("reduction", ["image", "pixel"])
def test_degenerate_similarities_are_zero_with_zero_gradient(reduction: str) -> None:
    x = random(1, 2, 4, 4)
    pairs = [
        (x, x, "outside"),
        (torch.zeros_like(x), x, "identity"),
        (x, torch.zeros_like(x), "identity"),
        (x * 1e-9, x * 1e-9, "identity"),
    ]
    for anchor, view, name in pairs:
        leaves = [anchor.clone().requires_grad_(), view.clone().requires_grad_()]
        value = reference.similarity(leaves[0], [leaves[1]], cases.theta(name), reduction)
        assert value.item() == 0
        assert all(g.abs().max() == 0 for g in torch.autograd.grad(value.sum(), leaves))


def test_similarity_of_a_view_with_itself_is_one() -> None:
    x = random(2, 4, 8, 8)
    for reduction in ("image", "pixel"):
        flipped = reference.similarity(x, [x.flip(3)], cases.theta("flip", 2), reduction)
        torch.testing.assert_close(flipped, torch.ones(2, 1))


@pytest.mark.parametrize("dtype", HALF)
def test_similarity_in_half_accumulates_in_float(dtype: torch.dtype) -> None:
    x, y = random(2, 64, 32, 32).to(dtype), random(2, 64, 16, 16, seed=1).to(dtype)
    theta = cases.theta("rotation", 2)
    actual = reference.similarity(x, [y], theta)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, reference.similarity(x.float(), [y.float()], theta))


def test_bad_theta_on_a_device_is_an_empty_overlap() -> None:
    """Where values cannot be checked, a NaN or singular theta gives zeros and reads nothing out of bounds."""
    x = random(1, 2, 4, 4)
    for bad in (torch.full((1, 2, 3), torch.nan), torch.zeros(1, 2, 3), torch.full((1, 2, 3), torch.inf)):
        value, inside = reference._sample(x, reference.invert(bad), (4, 4))
        assert not inside.any()
        assert value.abs().max() == 0


def test_row_sums_do_not_depend_on_the_batch() -> None:
    rows = random(8, 200_000)
    whole = reference.row_sum(rows)
    for n in (1, 2, 3, 5):
        assert torch.equal(reference.row_sum(rows[:n]), whole[:n])
    # one image's maps in channels_last are a view as rows, several images' are copied: that order would be another
    maps = torch.rand(6, 12, 20, 28).to(memory_format=torch.channels_last) - 0.3
    of_all = pooled(maps)
    for n in range(6):
        assert torch.equal(pooled(maps[n : n + 1]), of_all[n : n + 1])


def step(
    x: Tensor, gradient: Tensor, *, sigma: float = 0.0, eps: float = 0.1, size: float = 0.05, **more: int
) -> Tensor:
    ids = torch.arange(len(x))
    origin = torch.full_like(x, 0.5)
    return reference.signed_step(
        x, gradient, origin, eps, size, sigma, more.get("seed", 0), ids, more.get("draw", 0), more.get("t", 0)
    )


def test_signed_step() -> None:
    x, gradient = torch.full((2, 3, 4, 5), 0.5), random(2, 3, 4, 5) - 0.5
    gradient[0, 0, 0, 0] = 0
    torch.testing.assert_close(step(x, gradient), x + 0.05 * gradient.sign())
    torch.testing.assert_close(step(x, gradient, size=0.3), x + 0.1 * gradient.sign())  # the ball
    edge = torch.full_like(x, 0.02)
    moved = reference.signed_step(edge, -gradient.abs(), edge, 0.1, 0.05, 0.0, 0, torch.arange(2), 0, 0)
    assert moved.min() == 0  # [0, 1]


def test_scale_of_the_gradient_does_not_matter() -> None:
    x, gradient = torch.full((2, 3, 4, 5), 0.5), random(2, 3, 4, 5) - 0.5
    for scale in (1e-30, 1e30):
        assert torch.equal(step(x, gradient * scale, sigma=0.01), step(x, gradient, sigma=0.01))
    assert torch.equal(step(x, gradient * 0, sigma=0.0), x)


def test_noise_of_the_step() -> None:
    x, gradient = torch.full((2, 3, 40, 50), 0.5), random(2, 3, 40, 50) - 0.5
    plain, noisy = step(x, gradient), step(x, gradient, sigma=1.0)
    assert 0.4 < (plain == noisy).float().mean() < 0.6  # at unit norm the noise decides
    assert not torch.equal(noisy[0] - x[0], noisy[1] - x[1])
    for change in ({"seed": 1}, {"draw": 1}, {"t": 1}):
        assert not torch.equal(step(x, gradient, sigma=1.0, **change), noisy)
    tensors = [torch.tensor(value) for value in (0.05, 1.0, 0, 0)]
    ids = torch.arange(2)
    again = reference.signed_step(x, gradient, x, 0.1, tensors[0], tensors[1], tensors[2], ids, 0, tensors[3])
    assert torch.equal(again, noisy)


def test_gradients_of_color_jitter() -> None:
    x = (0.3 + 0.3 * random(2, 3, 3, 4, dtype=torch.float64)).requires_grad_()
    factors = torch.tensor([[1.1, 0.9, 1.2, 0.13], [0.9, 1.1, 0.8, -0.2]], dtype=torch.float64, requires_grad=True)
    for gray in (0.0, 1.0):

        def jitter(images: Tensor, given: Tensor, gray: float = gray) -> Tensor:
            return reference.color_jitter(images, torch.cat((given, torch.full((2, 1), gray)), 1))

        assert torch.autograd.gradcheck(jitter, (x, factors))
        assert torch.autograd.gradgradcheck(jitter, (x, factors))


@pytest.mark.parametrize("dtype", HALF)
def test_color_jitter_in_half(dtype: torch.dtype) -> None:
    """Computed in float32: a gradient of the mean sums over all pixels, which float16 may not hold."""
    x, parameters = random(2, 3, 96, 120), torch.tensor([[1.31, 0.71, 1.53, 0.13, 0], [0.7, 1.2, 0.4, -0.3, 1]])
    narrow = x.to(dtype).requires_grad_()
    wide = narrow.detach().float().requires_grad_()
    actual, expected = reference.color_jitter(narrow, parameters), reference.color_jitter(wide, parameters)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.float(), expected, atol=HALF[dtype], rtol=0)
    (found,) = torch.autograd.grad(actual, [narrow], torch.full_like(actual, 1000))
    (right,) = torch.autograd.grad(expected, [wide], torch.full_like(expected, 1000))
    torch.testing.assert_close(found.float(), right, atol=0, rtol=2 * HALF[dtype])


def test_empty_and_tiny() -> None:
    empty, theta = torch.zeros(0, 3, 4, 5), cases.theta("flip", 0)
    assert reference.warp(empty, theta, [(2, 2)])[0].shape == (0, 3, 2, 2)
    assert reference.similarity(empty, [empty], theta).shape == (0, 1)
    assert step(empty, empty).shape == empty.shape
    assert reference.color_jitter(empty, torch.zeros(0, 5)).shape == empty.shape
    pixel = random(1, 3, 1, 1)
    torch.testing.assert_close(reference.warp(pixel, cases.theta("identity"), [(3, 3)])[0], pixel.expand(1, 3, 3, 3))


def test_turn_filters() -> None:
    filters = torch.arange(12.0).view(2, 2, 3).requires_grad_()
    order = torch.tensor([[0, 1, 2], [2, 0, 1]])
    turned = reference.turn_filters(filters, order)
    assert turned.shape == (2, 2, 2, 3)
    assert turned[1].tolist() == [[[6, 7, 8], [9, 10, 11]], [[8, 6, 7], [11, 9, 10]]]
    (gradient,) = torch.autograd.grad(turned, filters, torch.tensor([1.0, 10, 100]).expand(2, 2, 2, 3))
    assert gradient[0, 0].tolist() == [11, 110, 101]


def test_pair_similarity() -> None:
    maps = [random(2, 3, 4, 5) + i for i in range(4)]
    maps[3][1] = 0  # which agrees with nothing
    value = reference.pair_similarity(maps)
    cosine = torch.nn.functional.cosine_similarity
    expected = sum(cosine(maps[i].flatten(1), maps[j].flatten(1)) for i in range(4) for j in range(i))
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(reference.pair_similarity(maps[:1]), value.new_zeros(2), atol=1e-6, rtol=0)
    halves = [f.half() for f in maps]
    assert reference.pair_similarity(halves).dtype == torch.float32
    torch.testing.assert_close(reference.pair_similarity(halves).to(value.dtype), value, atol=1e-2, rtol=1e-2)
    leaves = [f[:1].double().requires_grad_() for f in maps]
    assert torch.autograd.gradcheck(lambda *given: reference.pair_similarity(given), leaves)
    assert torch.autograd.gradgradcheck(lambda *given: reference.pair_similarity(given), leaves)
