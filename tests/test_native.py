"""The native operators against the reference, over a table of cases."""

import functools
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cases
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import equifast
from equifast import _C, ops, reference, rng
from equifast._cheap import has_fast_bfloat16

# With EQUIFAST_BACKEND=native a library that is absent or does not load fails the suite.
pytestmark = pytest.mark.skipif(
    "_ops" not in _C.operator_libraries and os.environ.get("EQUIFAST_BACKEND") != "native",
    reason="this build has no native operators: torch was not in the environment that built it",
)

# Absolute tolerances per dtype for values near 1: rounding of the storage type; sums are in float32 or better.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}

# (N, C, H, W) and the sizes of its views
SHAPES = {
    "pixel": ((1, 1, 1, 1), [(1, 1), (3, 2)]),
    "odd": ((2, 3, 7, 5), [(7, 5), (14, 10), (3, 2)]),
    "even": ((3, 19, 8, 12), [(8, 12), (5, 3), (17, 11)]),
    "column": ((2, 4, 9, 1), [(9, 1), (4, 2)]),
    "row": ((2, 4, 1, 9), [(1, 9), (2, 4)]),
    "many": ((32, 2, 4, 4), [(4, 4), (6, 3)]),
    "deep": ((1, 2048, 3, 3), [(3, 3), (6, 5)]),
    "wide": ((1, 21, 40, 70), [(40, 70), (80, 122), (12, 23)]),
    "tiles": ((1, 18, 75, 66), [(75, 66), (210, 190), (9, 7)]),  # what is read outgrows a panel, both ways
}
LAYOUTS = ("contiguous", "channels_last", "strided", "mixed")


# Where there is a CUDA device its kernels go through the same tables, against the same reference on the CPU.
CUDA = torch.cuda.is_available() and (
    "_ops_cuda" in _C.operator_libraries or os.environ.get("EQUIFAST_BACKEND") == "native"
)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)] if CUDA else ["cpu"])
def device(request: pytest.FixtureRequest, _native_backend: None) -> torch.device:
    found = torch.device(request.param)
    assert ops.choose(found) == "native"
    return found


@pytest.fixture(autouse=True)
def _native_backend() -> Iterator[None]:
    with ops.use("native"):
        assert ops.backend() == "native"  # and the library is loaded, for those who call it directly
        yield


def draw(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return _drawn(shape, seed).to(dtype, copy=True)


@functools.lru_cache(maxsize=64)  # the same for every dtype and layout
def _drawn(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 0.8


def lay(x: Tensor, layout: str, index: int = 0) -> Tensor:
    """The same in a layout; "mixed" alternates."""
    if layout == "channels_last" or (layout == "mixed" and index % 2):
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "strided":
        wide = x.new_full((*x.shape[:3], 2 * x.shape[3] + 1), torch.nan)
        wide[..., 1::2] = x
        return wide[..., 1::2]
    return x


def matrices(n: int, k: int, first: int) -> Tensor:
    names = list(cases.THETAS)
    return torch.cat([cases.theta(names[(first + i) % len(names)], n) for i in range(k)])


def problem(
    name: str, first: int, layout: str, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> tuple[Tensor, list[Tensor], Tensor]:
    (n, c, h, w), sizes = SHAPES[name]
    anchor = lay(draw(n, c, h, w, seed=1, dtype=dtype).to(device), layout)
    views = [lay(draw(n, c, *size, seed=2 + i, dtype=dtype).to(device), layout, i) for i, size in enumerate(sizes)]
    return anchor, views, matrices(n, len(sizes), first).to(device)


def plain(x: Tensor) -> Tensor:
    """The same for the reference: contiguous, on the CPU."""
    return x.detach().cpu().contiguous().requires_grad_()


def differentiate(outputs: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    weights = [draw(*o.shape, seed=7 + i, dtype=o.dtype).to(o.device) for i, o in enumerate(outputs)]
    total = sum((o.double() * u.double()).sum() for o, u in zip(outputs, weights, strict=True))
    assert isinstance(total, Tensor)
    return list(torch.autograd.grad(total, inputs))


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype, least: float = 1e-6) -> None:
    actual, expected = actual.detach().cpu(), expected.detach()
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    # gradients are of any size: relative to the largest; where all cancels, to what cancels
    scale = max(least, float(expected.double().abs().max())) if expected.numel() else least
    difference = float((actual.double() - expected.double()).abs().max()) if expected.numel() else 0.0
    smallest = torch.finfo(actual.dtype).tiny * torch.finfo(actual.dtype).eps
    assert difference <= max(TOLERANCE[dtype] * scale, smallest)  # what is no number is not


def is_differentiable_twice(
    function: Callable[..., Any], inputs: Tensor | Sequence[Tensor], every_entry: bool = True
) -> bool:
    """As gradgradcheck, or in random directions; on CUDA sums of PyTorch's own kernels are in an order that varies."""
    device = (inputs if isinstance(inputs, Tensor) else inputs[0]).device
    allowed = 1e-12 if device.type == "cuda" else 0.0
    return torch.autograd.gradgradcheck(function, inputs, nondet_tol=allowed, fast_mode=not every_entry)


@functools.lru_cache(maxsize=64)  # the same in every layout
def warped(name: str, first: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """The reference's views and gradient."""
    x, views, theta = problem(name, first, "contiguous", dtype)
    leaf = plain(x)
    found = reference.warp(leaf, theta, [(v.shape[2], v.shape[3]) for v in views])
    gradient = differentiate(found, [leaf])[0]
    return [f.detach() for f in found], gradient  # kept without what they were computed by


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", SHAPES)
def test_warp(name: str, layout: str, dtype: torch.dtype, device: torch.device) -> None:
    for first in range(0, len(cases.THETAS), 2):
        x, views, theta = problem(name, first, layout, dtype, device)
        leaf = x.detach().requires_grad_()
        actual = ops.warp(leaf, theta, [(v.shape[2], v.shape[3]) for v in views])
        expected, gradient = warped(name, first, dtype)
        for a, e in zip(actual, expected, strict=True):
            close(a, e, dtype)
        close(differentiate(actual, [leaf])[0], gradient, dtype)


# What the kernels treat apart: many readers of a pixel, few, windows too large for a panel, turned by any angle.
EXTREMES: dict[str, list[list[float]]] = {
    "enlarged": [[0.04, 0, 0.3], [0, 0.05, -0.2]],
    "flipped": [[-0.45, 0, 0], [0, -0.9, 0]],
    "shrunk": [[5, 0, 0.1], [0, -3, 0]],
    "flat": [[1, 0, 0], [0, 1e-9, 0.31]],
    "quarter": [[0, 1, 0], [-1, 0, 0]],
    "turned": [[0.3, -0.8, 0.1], [0.9, 0.2, 0]],
    "enlarged and turned": [[0.05, -0.02, 0.4], [0.02, 0.04, 0]],
    "shrunk and turned": [[4, -2, 0], [2, 5, 0.1]],
    "nearly level": [[1, 1e-13, 0], [1e-300, 1, 0]],
}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", EXTREMES)
def test_warp_of_extreme_views(name: str, layout: str, dtype: torch.dtype, device: torch.device) -> None:
    """Two views at once and each alone; into memory that held NaN; of a batch and of its last image alone."""
    sizes = [(70, 131), (37, 45)]
    theta = torch.tensor([EXTREMES[name]] * 2).repeat(2, 1, 1, 1).to(torch.float64)
    theta[1, 1] = cases.theta("rotation")[0, 0]
    for channels in (3, 21):
        x = lay(draw(2, channels, 67, 83, seed=1, dtype=dtype), layout).to(device)
        poison = [x.new_full((2, channels, *size), torch.nan) for size in ((67, 83), *sizes)]
        del poison
        leaves = [x.requires_grad_(), plain(x)]
        actual, expected = ops.warp(leaves[0], theta.to(device), sizes), reference.warp(leaves[1], theta, sizes)
        for a, e in zip(actual, expected, strict=True):
            close(a, e, dtype)
        gradient = differentiate(actual, leaves[:1])[0]
        close(gradient, differentiate(expected, leaves[1:])[0], dtype)
        alone = x.detach()[1:].requires_grad_()
        again = ops.warp(alone, theta[:, 1:].to(device), sizes)
        assert all(torch.equal(a[1:], b) for a, b in zip(actual, again, strict=True))
        weights = [draw(*o.shape, seed=7 + i, dtype=o.dtype).to(device)[1:] for i, o in enumerate(actual)]
        assert torch.equal(torch.autograd.grad(again, alone, weights)[0], gradient[1:])
        for k, size in enumerate(sizes):
            assert torch.equal(ops.warp(x, theta[k : k + 1].to(device), [size])[0], actual[k])


@functools.lru_cache(maxsize=64)  # the same in every layout
def compared(name: str, first: int, reduction: str, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """The reference's similarities and gradients."""
    anchor, views, theta = problem(name, first, "contiguous", dtype)
    leaves = [plain(f) for f in (anchor, *views)]
    found = reference.similarity(leaves[0], leaves[1:], theta, reduction)
    return found.detach(), differentiate([found], leaves)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reduction", ["image", "pixel"])
@pytest.mark.parametrize("name", SHAPES)
def test_similarity(name: str, reduction: str, layout: str, dtype: torch.dtype, device: torch.device) -> None:
    for first in range(0, len(cases.THETAS), 2):
        anchor, views, theta = problem(name, first, layout, dtype, device)
        leaves = [f.detach().requires_grad_() for f in (anchor, *views)]
        actual = ops.similarity(leaves[0], leaves[1:], theta, reduction)
        expected, gradients = compared(name, first, reduction, dtype)
        # accumulated in float32 also for half types
        close(actual, expected, torch.float64 if dtype == torch.float64 else torch.float32)
        # a vector of one number has a cosine of 1 or -1: its gradient is what is left of terms near 1
        least = 1.0 if name == "pixel" else 1e-6
        for a, e in zip(differentiate([actual], leaves), gradients, strict=True):
            close(a, e, dtype, least)


def agrees_with_the_reference(maps: list[Tensor], theta: Tensor, alone: Iterable[int]) -> None:
    """Similarity of an anchor and its views, into memory that held NaN; and that of some images alone, to the bit."""
    dtype, device, views = maps[0].dtype, maps[0].device, len(maps) - 1
    poison = [torch.full_like(f, torch.nan) for f in maps]
    del poison
    leaves, others = [f.requires_grad_() for f in maps], [plain(f) for f in maps]
    actual = ops.similarity(leaves[0], leaves[1:], theta.to(device))
    expected = reference.similarity(others[0], others[1:], theta)
    close(actual, expected, torch.float64 if dtype == torch.float64 else torch.float32, 1e-2)
    gradients = differentiate([actual], leaves)
    for a, e in zip(gradients, differentiate([expected], others), strict=True):
        close(a, e, dtype)
    upstream = draw(len(maps[0]), views, seed=7, dtype=actual.dtype).to(device)  # that of `differentiate`
    for n in alone:
        some = [f.detach()[n : n + 1].requires_grad_() for f in leaves]
        again = ops.similarity(some[0], some[1:], theta[:, n : n + 1].to(device))
        assert torch.equal(again, actual[n : n + 1])
        for a, b in zip(torch.autograd.grad(again, some, upstream[n : n + 1]), gradients, strict=True):
            assert torch.equal(a, b[n : n + 1])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", [*EXTREMES, *cases.THETAS])
def test_similarity_of_one_view(name: str, layout: str, dtype: torch.dtype, device: torch.device) -> None:
    """Which the kernels treat apart; into memory that held NaN; of a batch, and of its last image alone."""
    rows = EXTREMES.get(name) or cases.THETAS[name]
    theta = torch.tensor([rows, rows, rows]).to(torch.float64)[None]
    theta[0, 1] = cases.theta("outside")[0, 0]
    for channels, size in ((3, (37, 45)), (11, (67, 83)), (19, (130, 70)), (70, (9, 11))):
        f0 = lay(draw(3, channels, 67, 83, seed=1, dtype=dtype), layout).to(device)
        f1 = lay(draw(3, channels, *size, seed=2, dtype=dtype), layout).to(device)
        agrees_with_the_reference([f0, f1], theta, [2])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", [*EXTREMES, *cases.THETAS])
def test_similarity_gradient(name: str, layout: str, dtype: torch.dtype, device: torch.device) -> None:
    """One call for the value and both gradients: those of two, the anchor's added to what there was."""
    one = torch.tensor([EXTREMES[name]]).double() if name in EXTREMES else cases.theta(name, 2).double()
    theta = one.expand(1, 2, 2, 3).contiguous().to(device)
    for channels, reduction in ((3, "image"), (11, "image"), (19, "image"), (40, "image"), (5, "pixel")):
        anchor = lay(draw(2, channels, 35, 52, seed=1, dtype=dtype), layout).to(device)
        view = lay(draw(2, channels, 37, 45, seed=2, dtype=dtype), layout).to(device)
        leaves = [anchor.requires_grad_(), view.requires_grad_()]
        expected = ops.similarity(anchor, [view], theta, reduction)
        for_anchor, for_view = torch.autograd.grad(expected.sum(), leaves)
        before = torch.randn_like(anchor) * for_anchor.abs().amax()
        # where it lies as the anchor does, and where not
        for total in (before.clone(), before.flip(3).contiguous().flip(3), before[..., :1].expand_as(before).clone()):
            kept = total.clone()
            actual, gradient = ops.similarity_gradient(anchor, view, theta, total, reduction)
            assert torch.equal(actual, expected)
            assert torch.equal(gradient, for_view)
            assert not actual.requires_grad
            close(total.cpu(), (kept.double() + for_anchor.double()).cpu().to(dtype), dtype, 1e-12)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", [*EXTREMES, *cases.THETAS])
def test_similarity_target(name: str, layout: str, dtype: torch.dtype, device: torch.device) -> None:
    """One call for the values of views and the gradient of the anchor: one view, and several of other sizes."""
    one = torch.tensor([EXTREMES[name]]).double() if name in EXTREMES else cases.theta(name, 2).double()
    sizes = ((37, 45), (35, 52), (17, 26), (12, 60), (80, 31))
    for channels, reduction in ((3, "image"), (11, "image"), (19, "image"), (70, "image"), (5, "pixel")):
        anchor = lay(draw(2, channels, 35, 52, seed=1, dtype=dtype), layout).to(device)
        views = [
            lay(draw(2, channels, *size, seed=2 + k, dtype=dtype), layout).to(device) for k, size in enumerate(sizes)
        ]
        for number in (1, len(views)):
            theta = torch.stack(
                [one.expand(1, 2, 2, 3)[0], *([torch.eye(2, 3).double().expand(2, 2, 3)] * (number - 1))]
            )
            theta = theta.contiguous().to(device)
            leaf = anchor.clone().requires_grad_()
            expected = ops.similarity(leaf, views[:number], theta, reduction)
            (for_anchor,) = torch.autograd.grad(expected.sum(), leaf)
            poison = torch.full_like(anchor, torch.nan)
            del poison  # its memory may be what the gradient is written to
            actual, gradient = ops.similarity_target(anchor, views[:number], theta, reduction)
            assert not actual.requires_grad
            assert not gradient.requires_grad
            assert gradient.stride() == for_anchor.stride()
            close(actual.cpu(), expected.detach().cpu(), torch.float32 if dtype != torch.float64 else dtype)
            close(gradient.cpu(), for_anchor.cpu(), dtype, 1e-12)
            for n in range(2):  # bits do not depend on the batch
                alone = ops.similarity_target(
                    anchor[n : n + 1], [f[n : n + 1] for f in views[:number]], theta[:, n : n + 1], reduction
                )
                if device.type == "cpu":
                    assert torch.equal(alone[0], actual[n : n + 1])
                    assert torch.equal(alone[1], gradient[n : n + 1])


def test_similarity_target_of_nothing(device: torch.device) -> None:
    theta = torch.eye(2, 3).double().expand(1, 2, 2, 3).contiguous().to(device)
    f = torch.ones(2, 5, 4, 4, device=device)
    for anchor, view in ((f, f[:, :, :0]), (f[:, :, :0], f), (f[:0], f[:0])):
        n = len(anchor)
        value, gradient = ops.similarity_target(anchor, [view], theta[:, :n])
        assert torch.equal(value.cpu(), torch.zeros(n, 1))
        assert torch.equal(gradient, torch.zeros_like(anchor))
    with pytest.raises(ValueError, match="views is empty"):
        ops.similarity_target(f, [], theta[:0])
    with pytest.raises(ValueError, match=r"views\[0\] has shape"):
        ops.similarity_target(f, [f[:, :3]], theta)


def test_similarity_gradient_of_what_is_its_own_sum(device: torch.device) -> None:
    """A sum that lies where the features do, and one that autograd has kept for a derivative; nothing at all."""
    theta = torch.tensor([[[[0.9, -0.2, 0], [0.2, 0.9, 0]]]]).double().expand(1, 2, 2, 3).contiguous().to(device)
    f0, f1 = (draw(2, 5, 40, 40, seed=seed, dtype=torch.float32).to(device) for seed in (1, 2))
    expected = torch.zeros_like(f0)
    value, gradient = ops.similarity_gradient(f0, f1, theta, expected)
    for which in (0, 1):
        own = [f0.clone(), f1.clone()]
        total = own[which]
        before = total.clone()
        again = ops.similarity_gradient(own[0], own[1], theta, total)
        close(again[0].cpu(), value.cpu(), torch.float32)
        close(again[1].cpu(), gradient.cpu(), torch.float32)
        close((total - before).cpu(), expected.cpu(), torch.float32, 1.0)
    weight = torch.ones((), device=device, requires_grad=True)
    total = torch.zeros_like(f0)
    kept = (weight * total).sum()
    ops.similarity_gradient(f0, f1, theta, total)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()
    for shape in ((0, 5, 4, 4), (2, 0, 4, 4)):
        empty = torch.empty(shape, device=device).transpose(2, 3)
        value, gradient = ops.similarity_gradient(empty, empty, theta[:, : len(empty)], torch.zeros_like(empty))
        assert value.shape == (len(empty), 1)
        assert gradient.shape == empty.shape


def test_similarity_gradient_refuses(device: torch.device) -> None:
    anchor, theta = torch.rand(1, 2, 4, 5, device=device), cases.theta("identity").to(device).double()
    for total, message in (
        (torch.zeros(1, 2, 4, 6), r"total has shape \(1, 2, 4, 6\); it must be that of anchor, \(1, 2, 4, 5\)"),
        (torch.zeros(1, 2, 4, 5).double(), "total has dtype torch.float64; it must have that of anchor"),
        (torch.zeros(1, 2, 4, 5).requires_grad_(), "total requires a gradient; it must not"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            ops.similarity_gradient(anchor, anchor, theta, total.to(device))
    for view, message in (
        (torch.rand(1, 3, 4, 5), "must be .1, 2, h, w. as anchor"),
        (torch.rand(1, 2, 4, 5).double(), "it must have that of anchor, torch.float32"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            ops.similarity_gradient(anchor, view.to(device), theta, torch.zeros_like(anchor))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("channels", [3, 19])
def test_similarity_of_mixed_views(channels: int, dtype: torch.dtype, device: torch.device) -> None:
    """Some of an image's views turned, others level, or all of one kind: each goes another way through the kernels."""
    level, turned = ["identity", "flip", "shift", "flipped"], ["rotation", "turned", "shear", "quarter"]
    thetas = {**cases.THETAS, **EXTREMES}
    images = [[level[0], turned[0], level[3], turned[1]], level, turned, ["outside", *level[1:]]]
    theta = torch.tensor([[thetas[names[k]] for names in images] for k in range(4)], dtype=torch.float64)
    sizes = [(37, 45), (86, 170), (43, 85), (13, 26)]
    f0 = draw(4, channels, 43, 85, seed=1, dtype=dtype).to(device)
    views = [draw(4, channels, *size, seed=2 + k, dtype=dtype).to(device) for k, size in enumerate(sizes)]
    agrees_with_the_reference([f0, *views], theta, range(4))


@pytest.mark.parametrize("reduction", ["image", "pixel"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_small_vectors_count_as_zero(layout: str, reduction: str, device: torch.device) -> None:
    f, theta = lay(torch.full((1, 3, 4, 4), 1e-8, device=device), layout), cases.theta("identity").to(device)
    leaves = [f.clone().requires_grad_(), f.clone().requires_grad_()]
    s = ops.similarity(leaves[0], leaves[1:], theta, reduction)
    assert s.tolist() == [[0.0]]
    for gradient in torch.autograd.grad(s.sum(), leaves):
        assert not gradient.any()


@pytest.mark.parametrize("reduction", ["image", "pixel"])
def test_gradcheck(reduction: str, device: torch.device) -> None:
    anchor, views, theta = problem("odd", 0, "contiguous", torch.float64, device)
    leaves = [f.requires_grad_() for f in (anchor, *views)]
    assert torch.autograd.gradcheck(lambda a, *v: ops.similarity(a, v, theta, reduction), leaves)
    sizes = [(4, 6), (3, 3), (9, 4)]
    assert torch.autograd.gradcheck(lambda a: ops.warp(a, theta, sizes), anchor)
    assert is_differentiable_twice(lambda a: ops.warp(a, theta, sizes), anchor)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("reduction", ["image", "pixel"])
def test_similarity_is_differentiable_twice(reduction: str, layout: str, device: torch.device) -> None:
    anchor, views, theta = problem("odd", 0, layout, torch.float64, device)
    leaves = [f.requires_grad_() for f in (anchor, *views)]
    # of all views every entry takes half a minute; below they are held against those of the reference
    assert is_differentiable_twice(lambda a, *v: ops.similarity(a, v, theta, reduction), leaves, every_entry=False)
    # constants have none, and take none from the others
    assert is_differentiable_twice(lambda a: ops.similarity(a, [v.detach() for v in views], theta), anchor)
    assert is_differentiable_twice(lambda v: ops.similarity(anchor.detach(), [v], theta[:1]), views[0])


def test_second_derivatives_of_features_that_are_zero(device: torch.device) -> None:
    """Their similarity is a constant, and so is its first derivative."""
    anchor, views, theta = problem("odd", 0, "contiguous", torch.float64, device)
    anchor, view = torch.cat([anchor, 0 * anchor]).requires_grad_(), torch.cat([views[0], views[0]]).requires_grad_()
    value = ops.similarity(anchor, [view], torch.cat([theta[:1], theta[:1]], 1))
    first = torch.autograd.grad(value.sum(), (anchor, view), create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), (anchor, view))
    half = len(views[0])
    for g in (*first, *second):
        assert g.isfinite().all()
        assert g[:half].any()
        assert not g[half:].any()


def test_second_derivatives_of_maps_that_are_made_of_each_other(device: torch.device) -> None:
    """What is differentiated is the operator, and not what its arguments were made of."""
    anchor, _, theta = problem("odd", 0, "contiguous", torch.float64, device)
    anchor.requires_grad_()
    for reduction in ("image", "pixel"):
        for view in (lambda a: a, lambda a: a.square(), lambda a: a.flip(3)):
            both_derivatives(lambda a, v=view, r=reduction: ops.similarity(a, [v(a)], theta[:1], r), anchor)
    both_derivatives(lambda f: ops.pair_similarity([f, f, f.square()]), anchor)


def both_derivatives(function: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """The second is that of the first, and the first is the same whether it has a graph or not."""
    assert is_differentiable_twice(function, x)
    assert torch.autograd.gradcheck(function, x)
    plain, followed = (torch.autograd.grad(function(x).sum(), x, create_graph=graph)[0] for graph in (False, True))
    torch.testing.assert_close(followed, plain)


@pytest.mark.parametrize("reduction", ["image", "pixel"])
def test_second_derivative_of_nothing(reduction: str) -> None:
    theta = torch.eye(2, 3).expand(1, 2, 2, 3)
    for size, other in (((0, 4), (3, 3)), ((4, 4), (0, 3))):
        leaves = [torch.rand(2, 3, *side, requires_grad=True) for side in (size, other)]
        value = ops.similarity(leaves[0], leaves[1:], theta, reduction)
        for leaf, gradient in zip(leaves, torch.autograd.grad(value.sum(), leaves, create_graph=True), strict=True):
            assert torch.equal(gradient, torch.zeros_like(leaf))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4), (torch.bfloat16, 0.03)]
)
@pytest.mark.parametrize("reduction", ["image", "pixel"])
def test_second_derivative_is_that_of_the_reference(
    reduction: str, dtype: torch.dtype, tolerance: float, layout: str, device: torch.device
) -> None:
    anchor, views, theta = problem("odd", 0, layout, dtype, device)
    leaves = [f.requires_grad_() for f in (anchor, *views)]
    accumulated = torch.promote_types(dtype, torch.float32)

    def second(operators: Any) -> list[torch.Tensor]:
        first = torch.autograd.grad(
            operators.similarity(anchor, views, theta, reduction).sum(), leaves, create_graph=True
        )
        return list(torch.autograd.grad(sum(g.to(accumulated).square().sum() for g in first), leaves))

    for own, expected in zip(second(ops), second(reference), strict=True):
        assert own.dtype == dtype
        scale = float(expected.abs().max())
        torch.testing.assert_close(own, expected, rtol=0, atol=scale * tolerance)


@pytest.mark.parametrize(("scale", "shift"), [(0.0, 0.0), (1.0, 4.0)], ids=["zero", "beside"])
def test_second_derivative_where_there_is_no_cosine(scale: float, shift: float) -> None:
    anchor, view = torch.rand(1, 2, 4, 4, requires_grad=True), (scale * torch.rand(1, 2, 4, 4)).requires_grad_()
    theta = torch.tensor([[1.0, 0, shift], [0, 1, 0]]).expand(1, 1, 2, 3)
    (first,) = torch.autograd.grad(ops.similarity(anchor, [view], theta).sum(), anchor, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), anchor)
    assert torch.equal(first, torch.zeros_like(first))
    assert torch.equal(second, torch.zeros_like(second))


def test_color_jitter_is_differentiable_twice() -> None:
    x, parameters = colors("random", 1, 4, 5)
    x, power = x.double().requires_grad_(), 3
    assert is_differentiable_twice(lambda x: ops.color_jitter(x, parameters).pow(power), x)


def test_operators_of_the_library_are_differentiable_once() -> None:
    anchor, views, theta = problem("odd", 0, "contiguous", torch.float64)
    anchor.requires_grad_()
    value = torch.ops.equifast.similarity(anchor, views, theta.double(), False)[0]
    (first,) = torch.autograd.grad(value.sum(), anchor, create_graph=True)
    with pytest.raises(RuntimeError, match=r"equifast\.ops\.similarity is twice"):
        first.sum().backward()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # opcheck's own
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck(layout: str, dtype: torch.dtype, device: torch.device) -> None:
    anchor, views, theta = problem("odd", 0, layout, dtype, device)
    library = torch.ops.equifast
    leaves = [f.requires_grad_() for f in (anchor, *views)]
    sums = library.similarity(anchor, views, theta, False)[1].detach()
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    upstream = torch.ones(2, 3, dtype=accumulator, device=device)
    detached = [f.detach() for f in leaves]
    torch.library.opcheck(library.warp.default, (anchor, theta, [4, 9, 1], [6, 3, 2]))
    torch.library.opcheck(library.warp_adjoint.default, ([v.detach() for v in views], theta, 5, 8))
    for pixel in (False, True):
        torch.library.opcheck(library.similarity.default, (anchor, list(views), theta, pixel))
        arguments = (upstream, sums, detached[0], detached[1:], theta, pixel)
        torch.library.opcheck(library.similarity_backward.default, arguments)
    if device.type == "cpu":
        one = (torch.zeros_like(detached[0]), detached[0], detached[1], theta[:1].contiguous())
        torch.library.opcheck(library.similarity_gradient.default, one)
        torch.library.opcheck(library.similarity_target.default, (detached[0], detached[1:], theta))
        step = (detached[0], detached[0], detached[0], 0.1, 0.1, 0.5, 1, torch.arange(2), 0, 3)
        torch.library.opcheck(library.signed_step.default, step)


def turned(degrees: float, height: int, width: int, x: float = 0, y: float = 0) -> Tensor:
    angle = math.radians(degrees)
    cos, sin = math.cos(angle), math.sin(angle)
    return torch.tensor([[[[cos, -sin * height / width, x], [sin * width / height, cos, y]]]], dtype=torch.float64)


def test_similarity_of_rotations_reads_what_it_loaded(device: torch.device) -> None:
    """Windows of rotated tiles are loaded row by row, as far as they are read: many angles, to the last bits."""
    generator = torch.Generator().manual_seed(0)
    problems = [((60, 64), (64, side), torch.tensor([[[[0.0, 1, 0], [-1, 0, 0]]]]).double()) for side in (33, 36, 60)]
    for _ in range(150):
        degrees, x, y = ((torch.rand(3, generator=generator) * 2 - 1) * torch.tensor([90, 0.1, 0.1])).tolist()
        problems.append(((48, 64), (60, 80), turned(degrees, 48, 64, x, y)))
    for number, (size, view_size, theta) in enumerate(problems):
        channels = 16 if number % 10 == 0 else 3
        anchor, view = (
            torch.randn(1, channels, *s, generator=generator, dtype=torch.float64) for s in (size, view_size)
        )
        results = []
        for compute, where in ((reference.similarity, torch.device("cpu")), (ops.similarity, device)):
            leaves = [t.to(where).requires_grad_() for t in (anchor.clone(), view.clone())]
            value = compute(leaves[0], leaves[1:], theta.to(where))
            results.append([t.cpu() for t in (value.detach(), *torch.autograd.grad(value.sum(), leaves))])
        for expected, actual in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12 * float(expected.abs().max()))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # inductor's own
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_whole(compiler: str, device: torch.device) -> None:
    if compiler == "inductor" and (shutil.which("g++") or shutil.which("clang++")) is None:
        pytest.skip("inductor wants a C++ compiler, and there is none here")
    anchor, views, theta = problem("odd", 0, "contiguous", torch.float32, device)
    images = torch.rand(len(anchor), 3, 6, 7, device=device)
    parameters = torch.tensor([[1.1, 0.9, 0.8, 0.1, 0.0]] * len(anchor), dtype=torch.float64, device=device)

    def loss(f0: Tensor, x: Tensor, *rest: Tensor) -> Tensor:
        warped = ops.warp(ops.color_jitter(x, parameters), theta[:1], [(5, 8)])[0]
        return ops.similarity(f0.relu(), list(rest), theta).sum() + warped.square().sum()

    leaves = [anchor.clone().requires_grad_(), images.requires_grad_()]
    compiled = torch.compile(loss, fullgraph=True, backend=compiler)
    gradients = [torch.autograd.grad(f(*leaves, *views), leaves) for f in (loss, compiled)]
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_similarity_allocates_its_outputs_and_gradients(layout: str, dtype: torch.dtype) -> None:
    anchor, views, theta = problem("wide", 0, layout, dtype)
    leaves = [f.requires_grad_() for f in (anchor, *views)]
    upstream = torch.ones(1, 3)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as record:
        torch.autograd.grad(ops.similarity(leaves[0], leaves[1:], theta), leaves, upstream)
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    allocated = sum(e.nbytes() for e in events if e.nbytes() > 0)
    assert 0 < allocated <= sum(f.nbytes for f in leaves) + 2**16


def test_the_number_of_threads_changes_no_bit() -> None:
    threads = torch.get_num_threads()
    results: list[list[Tensor]] = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found = []
            for layout in ("contiguous", "channels_last"):
                anchor, views, theta = problem("wide", 0, layout, torch.float32)
                leaves = [f.requires_grad_() for f in (anchor, *views)]
                for reduction in ("image", "pixel"):
                    s = ops.similarity(leaves[0], leaves[1:], theta, reduction)
                    found += [s.detach(), *torch.autograd.grad(s.sum(), leaves)]
                warped = ops.warp(leaves[0], theta, [(40, 70), (33, 20), (80, 140)])
                found += [*(w.detach() for w in warped), *differentiate(warped, leaves[:1])]
            results.append(found)
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# Of values that are uniform in [0, 1), (N, 3, H, W). Real images have many of the pixels whose channels are tied or at
# an end of [0, 1].
COLORS: dict[str, Callable[[Tensor], Tensor]] = {
    "random": lambda u: u,
    "bytes": lambda u: (u * 255).round() / 255,
    "gray": lambda u: u[:, :1].expand_as(u),
    "two tied": lambda u: u[:, [0, 1, 0]],
    "saturated": lambda u: u.round(),
    "black": lambda u: u * 0,
    "white": lambda u: u * 0 + 1,
    "outside": lambda u: 2 * u - 0.5,
}

# Factors of brightness, contrast and saturation, hue in turns, gray
JITTERS: dict[str, list[float]] = {
    "strong": [1.313, 1.721, 1.537, 0.13173, 0],
    "dull": [0.431, 0.617, 0.373, -0.20719, 0],
    "bright": [1.793, 0.727, 1.817, 0.07193, 0],
    "half a turn": [0.913, 1.217, 0.819, 0.5, 0],
    "gray": [0.913, 1.131, 0.819, -0.5, 1],
    "nothing": [1, 1, 1, 0, 0],
    "no brightness": [0, 1.217, 0.819, 0.13173, 0],
    "no contrast": [1.313, 0, 0.819, 0.13173, 0],
    "no saturation": [1.313, 1.217, 0, 0.13173, 0],
}


def colors(
    kind: str, n: int, height: int, width: int, dtype: torch.dtype = torch.float32, layout: str = "contiguous"
) -> tuple[Tensor, Tensor]:
    """Images (N, 3, H, W), and parameters (N, 5) of the table's rows in turn."""
    u = torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = list(JITTERS.values())
    parameters = torch.tensor([rows[i % len(rows)] for i in range(n)], dtype=torch.float64).view(n, 5)
    return lay(COLORS[kind](u).contiguous().to(dtype), layout), parameters


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("kind", COLORS)
def test_color_jitter(kind: str, layout: str, dtype: torch.dtype) -> None:
    for shape in ((len(JITTERS), 1, 1), (len(JITTERS), 23, 37), (5, 9, 1), (2, 1, 9), (3, 75, 66), (0, 4, 5)):
        x, parameters = colors(kind, *shape, dtype, layout)
        x.requires_grad_()
        actual = ops.color_jitter(x, parameters)
        # The native one computes in float32 where the images are of fewer bits.
        wide = plain(x).detach().to(torch.promote_types(dtype, torch.float32)).requires_grad_()
        expected = reference.color_jitter(wide, parameters)
        close(actual, expected.to(dtype), dtype)
        for other in ("contiguous", "channels_last", "strided"):
            upstream = lay(draw(*x.shape, seed=7, dtype=dtype), other)
            (gradient,) = torch.autograd.grad(actual, x, upstream, retain_graph=True)
            (wanted,) = torch.autograd.grad(expected, wide, upstream.to(wide.dtype), retain_graph=True)
            close(gradient, wanted.to(dtype), dtype)


def test_gradcheck_of_color_jitter() -> None:
    x, parameters = colors("random", 3, 3, 4, torch.float64)
    parameters[:, :3] = 0.8 + 0.2 * parameters[:, :3]  # no value at an end of [0, 1]
    parameters[2, 4] = 1
    x = (0.3 + 0.3 * x).requires_grad_()
    assert torch.autograd.gradcheck(lambda a: ops.color_jitter(a, parameters), x)


def test_color_jitter_does_not_depend_on_batch_layout_or_threads() -> None:
    threads = torch.get_num_threads()
    x, parameters = colors("random", 5, 75, 66)
    results: list[tuple[Tensor, Tensor]] = []

    def record(images: Tensor, rows: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
        leaf = images.detach().requires_grad_()
        jittered = ops.color_jitter(leaf, rows)
        return jittered.detach(), torch.autograd.grad(jittered, leaf, upstream)[0]

    upstream = draw(*x.shape, seed=7, dtype=torch.float32)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results += [record(lay(x, layout), parameters, upstream) for layout in ("contiguous", "channels_last")]
            alone = [record(x[i : i + 1], parameters[i : i + 1], upstream[i : i + 1]) for i in range(5)]
            results.append((torch.cat([a for a, _ in alone]), torch.cat([b for _, b in alone])))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_color_jitter_of_pixels_that_are_no_numbers(value: float) -> None:
    x, parameters = colors("random", 2, 5, 6)
    expected = ops.color_jitter(x, parameters)[1]
    x[0, 1, 2, 3] = value
    x.requires_grad_()
    jittered = ops.color_jitter(x, parameters)
    (gradient,) = torch.autograd.grad(jittered.sum(), x)
    torch.testing.assert_close(jittered, reference.color_jitter(x, parameters), equal_nan=True)
    assert torch.equal(jittered[1], expected)
    assert gradient[1].isfinite().all()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # opcheck's own
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
def test_opcheck_of_color_jitter(layout: str, dtype: torch.dtype) -> None:
    library = torch.ops.equifast
    x, parameters = colors("random", 3, 7, 5, dtype, layout)
    mean = library.color_jitter(x, parameters)[1]
    torch.library.opcheck(library.color_jitter.default, (x.clone().requires_grad_(), parameters))
    torch.library.opcheck(library.color_jitter_backward.default, (torch.ones_like(x), mean, x, parameters))


PAIR_SHAPES = [(1, 1, 1, 1), (3, 2, 7, 5), (2, 11, 33, 41), (1, 3, 75, 90), (2, 4, 9, 1), (0, 2, 3, 3), (2, 0, 3, 3)]


def several(count: int, shape: tuple[int, ...], dtype: torch.dtype, layout: str = "contiguous") -> list[Tensor]:
    return [lay(draw(*shape, seed=i, dtype=dtype), layout, i).requires_grad_() for i in range(count)]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", PAIR_SHAPES)
def test_pair_similarity(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    for count in (1, 2, 9):
        maps = several(count, shape, dtype, layout)
        actual = ops.pair_similarity(maps)
        wide = [plain(f).detach().double().requires_grad_() for f in maps]
        expected = reference.pair_similarity(wide)
        assert actual.dtype == torch.promote_types(dtype, torch.float32)
        # of what is stored, all sums are taken in float32 or better
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
        upstream = draw(shape[0], seed=7, dtype=actual.dtype)
        gradients = torch.autograd.grad(actual, maps, upstream)
        wanted = torch.autograd.grad(expected, wide, upstream.double())
        for f, one, other in zip(maps, gradients, wanted, strict=True):
            assert one.dtype == dtype
            assert one.shape == f.shape
            # what cancels: the sum at unit length and what the map has along it, at a typical element
            lengths = f.detach().double().flatten(1).norm(dim=1)
            least = count / float(lengths.amin()) / f[0].numel() ** 0.5 if f.numel() else 1.0
            close(one, other.to(dtype), dtype, least)


def test_gradcheck_of_pair_similarity() -> None:
    maps = several(3, (2, 2, 3, 4), torch.float64)
    assert torch.autograd.gradcheck(lambda *given: ops.pair_similarity(given), maps)
    with ops.use("reference"):
        assert is_differentiable_twice(lambda *given: ops.pair_similarity(given), maps)


def test_pair_similarity_does_not_depend_on_batch_or_threads() -> None:
    threads = torch.get_num_threads()
    maps = several(5, (4, 3, 75, 90), torch.float32, "mixed")
    results: list[list[Tensor]] = []

    def record(given: list[Tensor]) -> list[Tensor]:
        value = ops.pair_similarity(given)
        return [value.detach(), *torch.autograd.grad(value.sum(), given)]

    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(record(maps))
            alone = [record([f[n : n + 1].detach().requires_grad_() for f in maps]) for n in range(4)]
            results.append([torch.cat(parts) for parts in zip(*alone, strict=True)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_pair_similarity_of_maps_of_zeros_and_of_no_numbers() -> None:
    maps = several(4, (3, 2, 5, 6), torch.float32)
    with torch.no_grad():
        maps[1][0] = 0
        maps[2][0] *= 1e-9  # of norm below 1e-6, and so another zero
        maps[3][1, 0, 2, 3] = math.nan
        expected = reference.pair_similarity([f[:1] for f in (maps[0], maps[3])])
    value = ops.pair_similarity(maps)
    gradients = torch.autograd.grad(value.sum(), maps)
    torch.testing.assert_close(value[:1], expected)
    assert not gradients[1][0].any()
    assert not gradients[2][0].any()
    assert value[1].isnan()
    assert value[2].isfinite()
    assert all(g[2].isfinite().all() for g in gradients)


def test_pair_similarity_compiles() -> None:
    maps = several(3, (2, 2, 5, 6), torch.float32)

    def squares(*given: Tensor) -> Tensor:
        return ops.pair_similarity(given).square().sum()

    compiled = torch.compile(squares, fullgraph=True, backend="aot_eager")
    actual = torch.autograd.grad(compiled(*maps), maps)
    for one, other in zip(actual, torch.autograd.grad(squares(*maps), maps), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # opcheck's own
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck_of_pair_similarity(layout: str, dtype: torch.dtype) -> None:
    library = torch.ops.equifast
    maps = several(3, (2, 3, 7, 5), dtype, layout)
    torch.library.opcheck(library.pair_similarity.default, (maps,))
    plain_maps = [f.detach() for f in maps]
    result, total, sums = library.pair_similarity(plain_maps)
    torch.library.opcheck(library.pair_similarity_backward.default, (torch.ones_like(result), total, sums, plain_maps))


def test_pair_similarity_is_differentiable_twice() -> None:
    leaves = [f.requires_grad_() for f in several(3, (2, 3, 4, 5), torch.float64)]
    assert is_differentiable_twice(lambda *maps: ops.pair_similarity(maps), leaves)
    plain, followed = (
        torch.autograd.grad(ops.pair_similarity(leaves).sum(), leaves, create_graph=graph) for graph in (False, True)
    )
    torch.testing.assert_close(followed, plain)


def test_pair_similarity_refuses_what_does_not_fit() -> None:
    library = torch.ops.equifast
    maps = [f.detach() for f in several(3, (2, 3, 7, 5), torch.float32)]
    first = maps[0]
    result, total, sums = library.pair_similarity(maps)
    for call in (
        lambda: library.pair_similarity([]),
        lambda: library.pair_similarity([first, first[:1]]),
        lambda: library.pair_similarity([first, first.double()]),
        lambda: library.pair_similarity([first[0]]),
        lambda: library.pair_similarity([first.int()]),
        lambda: library.pair_similarity_backward(result[:1], total, sums, maps),
        lambda: library.pair_similarity_backward(result, total[:, :1], sums, maps),
        lambda: library.pair_similarity_backward(result, total.double(), sums, maps),
        lambda: library.pair_similarity_backward(result, total, sums[:, :1], maps),
        lambda: library.pair_similarity_backward(result, total, sums.float(), maps),
    ):
        with pytest.raises(RuntimeError):
            call()


def turns(o: int, g: int, i: int, j: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(o + g)
    order = torch.stack([torch.randperm(j, generator=generator) for _ in range(g)])
    return torch.randn(o, i, j, generator=generator, dtype=torch.float64).to(dtype), order


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(5, 4, 3, 9), (1, 1, 1, 1), (64, 8, 70, 72), (0, 4, 3, 9), (3, 4, 0, 9)])
def test_turn_filters(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    filters, order = turns(*shape, dtype)
    for given in (filters, filters.transpose(0, 1).contiguous().transpose(0, 1)):
        given.requires_grad_()
        actual = ops.turn_filters(given, order)
        expected = reference.turn_filters(given, order)
        assert actual.shape == expected.shape
        assert torch.equal(actual, expected)
        upstream = draw(*actual.shape, seed=3, dtype=dtype)
        (gradient,) = torch.autograd.grad(actual, given, upstream)
        wide = given.detach().to(torch.promote_types(dtype, torch.float32)).requires_grad_()
        (wanted,) = torch.autograd.grad(reference.turn_filters(wide, order), wide, upstream.to(wide.dtype))
        close(gradient, wanted.to(dtype), dtype)


def test_gradcheck_of_turn_filters() -> None:
    filters, order = turns(3, 4, 2, 9, torch.float64)
    filters.requires_grad_()
    assert torch.autograd.gradcheck(lambda f: ops.turn_filters(f, order), filters)
    assert is_differentiable_twice(lambda f: ops.turn_filters(f, order).square(), filters)
    with ops.use("reference"):
        assert is_differentiable_twice(lambda f: ops.turn_filters(f, order).square(), filters)


def test_turn_filters_does_not_depend_on_threads() -> None:
    threads = torch.get_num_threads()
    filters, order = turns(33, 8, 20, 72)
    filters.requires_grad_()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            turned = ops.turn_filters(filters, order)
            upstream = draw(*turned.shape, seed=3, dtype=torch.float32)
            results.append(torch.autograd.grad(turned, filters, upstream)[0])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_turn_filters_compiles() -> None:
    filters, order = turns(3, 4, 2, 9)
    filters.requires_grad_()

    def squares(f: Tensor) -> Tensor:
        return ops.turn_filters(f, order).square().sum()

    compiled = torch.compile(squares, fullgraph=True, backend="aot_eager")
    (actual,) = torch.autograd.grad(compiled(filters), filters)
    assert torch.equal(actual, torch.autograd.grad(squares(filters), filters)[0])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # opcheck's own
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_opcheck_of_turn_filters(dtype: torch.dtype) -> None:
    library = torch.ops.equifast
    filters, order = turns(3, 4, 2, 9, dtype)
    turned = library.turn_filters(filters, order)
    torch.library.opcheck(library.turn_filters.default, (filters.requires_grad_(), order))
    torch.library.opcheck(library.turn_filters_adjoint.default, (turned.requires_grad_(), order))


def test_turn_filters_refuses_what_does_not_fit() -> None:
    filters, order = turns(3, 4, 2, 9)
    with pytest.raises(ValueError, match=r"order has shape \(4, 8\); it must be \(G, 9\)"):
        ops.turn_filters(filters, order[:, :8])
    with pytest.raises(TypeError, match=r"order has dtype torch\.int32; it must be int64"):
        ops.turn_filters(filters, order.int())
    for name in ("native", "reference"):  # no element, and an order that lies otherwise in memory
        with ops.use(name):
            leaf = filters.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(ops.turn_filters(leaf, order[:0]).sum(), leaf)
            assert not gradient.any()
            across = order.T.contiguous().T
            assert torch.equal(ops.turn_filters(filters, across), reference.turn_filters(filters, order))
    library = torch.ops.equifast
    turned = library.turn_filters(filters, order)
    for call in (
        lambda: library.turn_filters(filters[0], order),
        lambda: library.turn_filters(filters.int(), order),
        lambda: library.turn_filters(filters, order[:, :8]),
        lambda: library.turn_filters(filters, order + 1),
        lambda: library.turn_filters(filters, -order),
        lambda: library.turn_filters(filters, order.int()),
        lambda: library.turn_filters(filters, order.T.contiguous().T),
        lambda: library.turn_filters_adjoint(turned[:, :3], order),
        lambda: library.turn_filters_adjoint(turned[:, :, 0], order),
        lambda: library.turn_filters_adjoint(turned[..., :8], order),
    ):
        with pytest.raises(RuntimeError):
            call()


STEPS = [(0.0, 0.1), (0.5, 0.05), (0.95, 12 / 255)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 3, 5, 7), (2, 3, 90, 70)])
@pytest.mark.parametrize(("sigma", "step"), STEPS)
def test_signed_step(sigma: float, step: float, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, origin = (torch.rand(shape, generator=generator).to(dtype) for _ in range(2))
    gradient = torch.randn(shape, generator=generator, dtype=torch.float64)
    gradient[0].flatten()[0] = 0
    gradient = (gradient * 1e-6).to(dtype)
    ids = torch.tensor([2**40 + 5, -3, 7])[: shape[0]]
    arguments = (gradient, origin, 0.03, step, sigma, 2**32 - 1, ids, 65535, 65535)
    actual, expected = ops.signed_step(x, *arguments), reference.signed_step(x, *arguments)
    assert actual.dtype == dtype
    # where the direction is nearly 0, rounding decides its sign
    differ = (actual.double() - expected.double()).abs() > TOLERANCE[dtype]
    assert differ.double().mean() <= (0 if sigma == 0 else 1e-4)
    for i in range(shape[0]):
        alone = (gradient[i : i + 1], origin[i : i + 1], 0.03, step, sigma, 2**32 - 1, ids[i : i + 1], 65535, 65535)
        assert torch.equal(ops.signed_step(x[i : i + 1], *alone), actual[i : i + 1])


@pytest.mark.parametrize("shape", [(2, 3, 300, 301), (3, 1, 3, 7)])
def test_noise_of_the_step(shape: tuple[int, ...]) -> None:
    """It is that of rng.normal to 1e-5: a direction off its negative by so much takes the sign of the difference."""
    ids, settings = torch.tensor([2**40 + 5, -3, 7])[: shape[0]], (65535, 65534)
    noise = rng.normal(2**32 - 2, int(rng.Stream.NOISE), ids, *settings, shape[1] * shape[2] * shape[3])
    off = 1e-5 * (1 - 2 * (torch.arange(noise.shape[1]) % 2)).double()
    x = torch.full(shape, 0.5, dtype=torch.float64)
    for i in range(shape[0]):
        gradient = (off - noise[i]).view(shape[1:])[None]
        arguments = (0.3, 0.1, 1 / float(gradient.norm()), 2**32 - 2, ids[i : i + 1], *settings)
        moved = ops.signed_step(x[:1], gradient, x[:1], *arguments)
        torch.testing.assert_close((moved - x[:1]).flatten(), 0.1 * off.sign())


def test_signed_step_around_nan() -> None:
    origin = torch.tensor([0.5, float("nan")]).view(1, 1, 1, 2)
    arguments = (torch.ones_like(origin), origin, 0.1, 0.3, 0.0, 0, torch.zeros(1, dtype=torch.int64), 0, 0)
    x = torch.full_like(origin, 0.5)
    torch.testing.assert_close(
        ops.signed_step(x, *arguments), reference.signed_step(x, *arguments), equal_nan=True, atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("sizes", [((31, 87), (67, 52)), ((28, 73), (49, 7)), ((87, 31), (52, 67))], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1.03])
@pytest.mark.parametrize("flip", [1, -1])
def test_quarter_turns_by_sine_and_cosine(
    flip: int, scale: float, sizes: tuple[tuple[int, int], tuple[int, int]], device: torch.device
) -> None:
    """Positions fall on pixels, up to rounding."""
    c, s = scale * math.cos(math.pi / 2), scale * math.sin(math.pi / 2)
    theta = torch.tensor([[[[c, s, 0], [flip * s, -flip * c, 0]]]], dtype=torch.float64)
    f0, f1 = (draw(1, 5, *size, seed=1 + i, dtype=torch.float64) for i, size in enumerate(sizes))
    for views in (1, 2):
        leaves = [
            f0.clone().to(device).requires_grad_(),
            *(f1.clone().to(device).requires_grad_() for _ in range(views)),
        ]
        others, matrices = [plain(f) for f in leaves], theta.repeat(views, 1, 1, 1)
        actual = ops.similarity(leaves[0], leaves[1:], matrices.to(device))
        expected = reference.similarity(others[0], others[1:], matrices)
        close(actual, expected, torch.float64)
        for a, e in zip(differentiate([actual], leaves), differentiate([expected], others), strict=True):
            close(a, e, torch.float64)


@pytest.mark.parametrize("reduction", ["image", "pixel"])
def test_sums_do_not_depend_on_the_batch(reduction: str) -> None:
    generator = torch.Generator().manual_seed(0)
    anchor, view = (torch.randn(8, 5, 37, 21, generator=generator, dtype=torch.float64) for _ in range(2))
    theta = cases.theta("rotation", 8)
    together = ops.similarity(anchor, [view], theta, reduction)
    alone = [ops.similarity(anchor[i : i + 1], [view[i : i + 1]], theta[:, i : i + 1], reduction) for i in range(8)]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("value", [0.0, 1e-40, 1e-38, 1e30, float("nan"), float("inf")])
@pytest.mark.parametrize("sigma", [0.0, 0.5])
def test_signed_step_of_extreme_gradients(value: float, sigma: float) -> None:
    x, gradient = torch.full((2, 3, 4, 4), 0.5), torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    gradient[1] = value
    arguments = (gradient, x, 0.1, 0.05, sigma, 1, torch.tensor([1, 2]), 0, 3)
    torch.testing.assert_close(
        ops.signed_step(x, *arguments), reference.signed_step(x, *arguments), equal_nan=True, atol=1e-6, rtol=0
    )


def test_arguments_that_require_grad_and_get_none_are_refused() -> None:
    theta = cases.theta("rotation").requires_grad_()
    x = torch.rand(1, 2, 4, 4)
    with pytest.raises(ValueError, match=r"theta requires a gradient; it must not, or use equifast\.reference\.warp"):
        ops.warp(x, theta, [(4, 4)])
    with pytest.raises(ValueError, match=r"theta requires a gradient"):
        ops.similarity(x, [x], theta)
    images, parameters = colors("random", 1, 4, 4)
    with pytest.raises(ValueError, match=r"parameters requires a gradient; .*equifast\.reference\.color_jitter"):
        ops.color_jitter(images, parameters.requires_grad_())


def test_the_library_refuses_what_does_not_fit(device: torch.device) -> None:
    """Whoever calls torch.ops.equifast gets no memory that is not the tensors'."""
    library, x = torch.ops.equifast, torch.rand(2, 3, 4, 4, device=device)
    theta = cases.theta("identity", 2).to(device)
    for call in (
        lambda: library.warp(x[0], theta, [4], [4]),
        lambda: library.warp(x, theta, [4], [4, 4]),
        lambda: library.warp(x, theta[:, :1], [4], [4]),
        lambda: library.warp(x, theta.float(), [4], [4]),
        lambda: library.warp(x, theta, [0], [4]),
        lambda: library.warp(x.int(), theta, [4], [4]),
        lambda: library.warp_adjoint([], theta, 4, 4),
        lambda: library.similarity(x, [], theta, False),
        lambda: library.similarity(x, [x[:1]], theta, False),
        lambda: library.similarity(x, [x.double()], theta, False),
        lambda: library.signed_step(x, x[:1], x, 0.1, 0.1, 0.0, 0, torch.zeros(2, dtype=torch.int64), 0, 0),
        lambda: library.signed_step(x, x, x, 0.1, 0.1, 0.0, 0, torch.zeros(1, dtype=torch.int64), 0, 0),
    ):
        with pytest.raises(RuntimeError):
            call()


def test_the_library_refuses_colors_that_do_not_fit() -> None:
    library = torch.ops.equifast
    x, parameters = colors("random", 2, 4, 5)
    mean = torch.zeros(2, dtype=torch.float64)
    for call in (
        lambda: library.color_jitter(x[0], parameters),
        lambda: library.color_jitter(x[:, :2], parameters),
        lambda: library.color_jitter(x.int(), parameters),
        lambda: library.color_jitter(x, parameters[:1]),
        lambda: library.color_jitter(x, parameters[:, :4]),
        lambda: library.color_jitter(x, parameters.float()),
        lambda: library.color_jitter(x, parameters.repeat(1, 2)[:, ::2]),
        lambda: library.color_jitter_backward(x[:1], mean, x, parameters),
        lambda: library.color_jitter_backward(x.double(), mean, x, parameters),
        lambda: library.color_jitter_backward(x, mean[:1], x, parameters),
        lambda: library.color_jitter_backward(x, mean.float(), x, parameters),
    ):
        with pytest.raises(RuntimeError):
            call()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0, 1e300])
def test_any_theta_on_the_library_is_safe(bad: float, device: torch.device) -> None:
    """The public function refuses such a theta; the kernels must stay in bounds with it all the same."""
    theta = torch.full((1, 1, 2, 3), bad, dtype=torch.float64, device=device)
    x = torch.rand(1, 2, 5, 6, device=device)
    for layout in ("contiguous", "channels_last"):
        f = lay(x, layout)
        assert torch.ops.equifast.warp(f, theta, [9], [7])[0].shape == (1, 2, 9, 7)
        s, sums = torch.ops.equifast.similarity(f, [f], theta, False)
        assert s.item() == 0
        gradients = torch.ops.equifast.similarity_backward(torch.ones_like(s), sums, f, [f], theta, False)
        assert not any(g.any() for g in gradients)


def test_empty(device: torch.device) -> None:
    x, theta = torch.zeros(0, 3, 4, 5, device=device), torch.zeros(2, 0, 2, 3, device=device)
    assert [w.shape for w in ops.warp(x, theta, [(4, 5), (2, 2)])] == [(0, 3, 4, 5), (0, 3, 2, 2)]
    assert ops.similarity(x, [x, x], theta).shape == (0, 2)
    ids = torch.zeros(0, dtype=torch.int64, device=device)
    assert ops.signed_step(x, x, x, 0.1, 0.1, 0.0, 0, ids, 0, 0).shape == x.shape


def test_choice_of_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ops.backend() == "native"
    with ops.use("reference"):
        assert ops.backend() == "reference"
        assert ops.backend().reason == "equifast.ops.use asks for it"
        monkeypatch.setenv("EQUIFAST_BACKEND", "native")
        assert ops.backend() == "reference"
    with pytest.raises(ValueError, match="backend is 'cuda'; it must be one of 'native', 'reference'"), ops.use("cuda"):
        pass
    with pytest.raises(RuntimeError, match="asks for the native backend, but there are no native kernels for meta"):
        ops.choose(torch.device("meta"))
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="asks for the native backend, but there is no CUDA device here"):
            ops.choose(torch.device("cuda"))


def test_a_gpu_for_which_no_kernel_was_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(ops, "_load_cuda", lambda: "")
    monkeypatch.setattr(_C, "cuda_architectures", ("80", "90", "100"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: ((8, 6), (7, 5))[device.index])
    assert ops.choose(torch.device("cuda:0")) == "native"
    with pytest.raises(RuntimeError, match="this build has kernels for sm_80 and later, and this GPU is sm_75"):
        ops.choose(torch.device("cuda:1"))  # native is asked for here


@pytest.mark.parametrize("settings", [{}, {"view_gradient": 0}, {"preset": "paper"}, {"preset": "strong"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_step_has_the_gradient_of_the_reference(settings: dict[str, Any], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layers = (torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Tanh(), torch.nn.Conv2d(8, 5, 3, padding=1, stride=2))
    purifier = equifast.Purifier(torch.nn.Sequential(*layers).to(dtype), dtype="float32", **settings)
    x = draw(3, 3, 23, 30, seed=1, dtype=dtype).abs().clamp(0, 1)
    gradients = []
    for backend in ("native", "reference"):
        with ops.use(backend), purifier._objective(x, None, 0, None) as (images, objective, _, _):
            gradients.append(objective.gradient(images, 0)[1])
    scale = float(gradients[1].abs().max())
    assert scale > 0
    tolerance = 1e-4 if dtype == torch.float32 else 1e-11
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("reduction", ["image", "pixel"])
def test_features_of_nan_have_a_similarity_of_nan(reduction: str) -> None:
    """In every backend, with a graph and without, of the first or the second order."""
    f0, f1 = torch.randn(2, 3, 9, 12), torch.randn(2, 3, 9, 12)
    f0[0, 1, 4, 6] = torch.nan
    theta = torch.eye(2, 3).expand(1, 2, 2, 3)
    for name in ("native", "reference"):
        with ops.use(name):
            value = ops.similarity(f0, [f1], theta, reduction=reduction)
            assert value.isnan().flatten().tolist() == [True, False]
            for again in (False, True):
                leaf = f0.clone().requires_grad_()
                found = ops.similarity(leaf, [f1], theta, reduction=reduction)
                (slope,) = torch.autograd.grad(found.sum(), leaf, create_graph=again)
                assert slope[0].isnan().any()
                assert slope[1].isfinite().all()


def test_nan_outside_the_overlap_does_not_count() -> None:
    f0, f1 = torch.randn(1, 3, 9, 12), torch.randn(1, 3, 9, 12)
    theta = torch.eye(2, 3).expand(1, 1, 2, 3).clone()
    theta[..., 0, 2] = 1.0  # the view sees the right half
    expected = [reference.similarity(f0, [f1], theta, reduction=how) for how in ("image", "pixel")]
    f0[..., :5] = torch.nan
    for name in ("native", "reference"):
        with ops.use(name):
            for how, wanted in zip(("image", "pixel"), expected, strict=True):
                torch.testing.assert_close(ops.similarity(f0, [f1], theta, reduction=how), wanted)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own use of it
def test_forward_mode_is_that_of_the_reference() -> None:
    """Kernels know nothing of tangents, and would drop them."""
    x, theta = cases.images(2), cases.theta("rotation", 2)
    tangent, f1 = torch.randn_like(x), torch.randn(2, 3, 20, 28)
    parameters = torch.tensor([[1.1, 0.9, 1.2, 0.1, 0.0]] * 2)
    functions: list[Callable[[Tensor], Tensor]] = [
        lambda z: ops.warp(z, theta, [(9, 7)])[0],
        lambda z: ops.similarity(z, [f1], theta),
        lambda z: ops.pair_similarity([z, f1]),
        lambda z: ops.color_jitter(z, parameters),
    ]
    for function in functions:
        with ops.use("native"):
            value, found = torch.func.jvp(function, (x,), (tangent,))
            with forward_ad.dual_level():
                dual = forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent)))
            leaf = x.clone().requires_grad_()
            weights = torch.randn_like(value)
            (gradient,) = torch.autograd.grad((function(leaf) * weights).sum(), leaf)
        assert dual.tangent is not None
        torch.testing.assert_close(dual.tangent, found)
        torch.testing.assert_close((found * weights).sum(), (gradient * tangent).sum(), rtol=1e-3, atol=1e-3)


def test_fake_tensors_have_no_values_to_check() -> None:
    with FakeTensorMode():
        (warped,) = ops.warp(torch.rand(1, 3, 4, 4), torch.eye(2, 3).expand(1, 1, 2, 3), [(5, 6)])
        jittered = ops.color_jitter(torch.rand(1, 3, 4, 4), torch.ones(1, 5))
    assert (warped.shape, jittered.shape) == ((1, 3, 5, 6), (1, 3, 4, 4))


def test_half_subnormals_are_no_zeros_where_denormals_are() -> None:
    x = torch.full((1, 3, 4, 5), 0.5, dtype=torch.float16)
    gradient = torch.full_like(x, 1e-6)
    arguments = (gradient, x, 0.1, 0.05, 0.0, 0, torch.zeros(1, dtype=torch.int64), 0, 0)
    expected = reference.signed_step(x, *arguments)
    assert (expected > x).all()
    was = torch.set_flush_denormal(True)
    try:
        if was:
            torch.testing.assert_close(ops.signed_step(x, *arguments), expected, rtol=0, atol=0)
    finally:
        torch.set_flush_denormal(False)


def test_the_instruction_set_is_the_one_asked_for_or_the_widest() -> None:
    """.ci/run asks for the narrower ones, and would not be told that it has got another."""
    here = _C.instruction_sets()
    asked = os.environ.get("EQUIFAST_ISA") or None
    widest = "avx512" if "avx512f" in here else "avx2" if "avx2" in here else "baseline"
    assert ops.instruction_set() == (asked or widest)


def test_bfloat16_is_taken_where_it_is_multiplied_faster() -> None:
    """By what Linux says of the processor."""
    file = Path("/proc/cpuinfo")
    known = file.read_text() if file.exists() else ""
    if "\nflags" not in known:
        pytest.skip("this system does not say what its processor is")
    flags = set(known.split("\nflags", 1)[1].split("\n", 1)[0].split())
    slow = "GenuineIntel" in known and "avx512_fp16" in flags  # half as fast as float32: without AMX for compatibility
    expected = "amx_bf16" in flags or ("avx512_bf16" in flags and not slow)
    assert _C.multiplies_bfloat16() == expected
    assert has_fast_bfloat16(torch.device("cpu")) == expected
    assert not has_fast_bfloat16(torch.device("meta"))


def test_an_instruction_set_that_there_is_not_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EQUIFAST_ISA", "avx")
    with pytest.raises(ValueError, match="EQUIFAST_ISA is 'avx'; it must be one of 'baseline', 'avx2', 'avx512'"):
        ops._load.__wrapped__()


def test_functorch_transforms_the_reference() -> None:
    """`torch.func` cannot transform derivatives that torch.library registers."""
    x, theta = cases.images(2), cases.theta("rotation", 2)
    f0, f1 = torch.randn(2, 3, 20, 28), torch.randn(2, 3, 20, 28)
    with ops.use("native"):
        warped = torch.func.grad(lambda images: ops.warp(images, theta, [(9, 7)])[0].square().sum())(x)
        alike = torch.func.grad(lambda anchor: ops.similarity(anchor, [f1], theta).sum())(f0)
        paired = torch.func.grad(lambda anchor: ops.pair_similarity([anchor, f1]).sum())(f0)
    leaf = f0.clone().requires_grad_()
    (pairs,) = torch.autograd.grad(reference.pair_similarity([leaf, f1]).sum(), leaf)
    torch.testing.assert_close(paired, pairs, atol=1e-5, rtol=1e-4)
    leaves = x.clone().requires_grad_(), f0.clone().requires_grad_()
    expected = reference.warp(leaves[0], theta, [(9, 7)])[0].square().sum()
    expected = expected + reference.similarity(leaves[1], [f1], theta).sum()
    for actual, wanted in zip((warped, alike), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(actual, wanted, atol=1e-5, rtol=1e-4)
