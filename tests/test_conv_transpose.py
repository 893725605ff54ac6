"""Gradients of strided convolutions: the reference, and the kernel against it."""

from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from equifast import ops, reference

Shape = tuple[int, int, int, tuple[int, int], int, tuple[int, int], tuple[int, int]]

SHAPES: dict[str, Shape] = {  # N, C, O, kernel, stride, padding, size of the input
    "plain": (2, 16, 8, (3, 3), 2, (1, 1), (20, 28)),
    "blocks": (2, 3, 32, (3, 3), 2, (1, 1), (21, 27)),
    "blocks, stem": (1, 3, 16, (7, 7), 2, (3, 3), (33, 40)),
    "patches": (2, 3, 48, (4, 4), 4, (0, 0), (17, 22)),
    "large patches": (1, 3, 20, (8, 8), 8, (0, 0), (16, 31)),
    "one position": (1, 40, 5, (1, 1), 3, (0, 0), (13, 10)),
    "apart": (2, 20, 7, (2, 2), 5, (1, 0), (19, 23)),
    "not square": (1, 33, 9, (3, 5), 2, (0, 2), (9, 50)),
    "padding": (1, 17, 4, (3, 3), 2, (4, 5), (6, 3)),
    "padded blocks": (2, 2, 4, (3, 3), 2, (3, 4), (5, 4)),
    "one pixel": (1, 16, 16, (1, 1), 2, (0, 0), (1, 1)),
    "stride 1": (1, 16, 16, (3, 3), 1, (1, 1), (8, 9)),
    "many": (3, 100, 70, (3, 3), 2, (1, 1), (30, 34)),
    "blocks, no images": (0, 3, 8, (3, 3), 2, (1, 1), (8, 8)),
}
native = pytest.mark.skipif(ops.backend() != "native", reason="runs on the native backend")
TOLERANCE = {torch.float32: 5e-6, torch.float64: 1e-13}  # of the largest output


def drawn(shape: Shape, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The gradient by the output, and the weight."""
    n, c, o, kernel, stride, padding, size = shape
    generator = torch.Generator().manual_seed(n + c + o)
    sides = zip(size, kernel, padding, strict=True)
    grid = [(side + 2 * around - width) // stride + 1 for side, width, around in sides]
    sizes = ((n, o, *grid), (o, c, *kernel))
    upstream, weight = (torch.randn(each, generator=generator, dtype=torch.float64).to(dtype) for each in sizes)
    return upstream, weight


def gradient(shape: Shape, upstream: Tensor, weight: Tensor) -> Tensor:
    """By autograd, in float64."""
    n, c, _, _, stride, padding, size = shape
    x = torch.zeros(n, c, *size, dtype=torch.float64, requires_grad=True)
    out = functional.conv2d(x, weight.double(), None, stride, padding)
    return torch.autograd.grad(out, x, upstream.double())[0]


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert actual.shape == expected.shape
    assert actual.dtype == dtype
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=TOLERANCE[dtype] * largest)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", SHAPES)
def test_both_backends_give_the_gradient(name: str, dtype: torch.dtype) -> None:
    shape = SHAPES[name]
    _, channels, _, kernel, stride, padding, size = shape
    upstream, weight = drawn(shape, dtype)
    expected = gradient(shape, upstream, weight)
    filters, blocks = reference.conv_transpose_filters(weight, stride), reference.in_blocks(weight.shape, stride)
    assert filters.shape[3:] == (weight.shape[0], 16)
    assert blocks == ("blocks" in name or "patches" in name)
    assert filters.shape[1:3] == (kernel if not blocks else tuple(-(-side // stride) for side in kernel))
    rest = (channels, size, stride, padding, blocks)
    close(reference.conv_transpose(upstream, filters, *rest), expected, dtype)
    padded = functional.pad(upstream, (2, 1))[..., 2:-1]
    for given in (upstream, upstream.contiguous(memory_format=torch.channels_last), padded):
        actual = ops.conv_transpose(given, filters, *rest)
        close(actual, expected, dtype)
        assert not ops.native(given) or actual.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("module", [reference, ops])
@pytest.mark.parametrize("name", ["padded blocks", "padding"])
def test_gradcheck(name: str, module: ModuleType) -> None:
    _, channels, _, _, stride, padding, size = SHAPES[name]

    def transpose(x: Tensor, weight: Tensor) -> Tensor:
        filters, blocks = module.conv_transpose_filters(weight, stride), module.in_blocks(weight.shape, stride)
        found: Tensor = module.conv_transpose(x, filters, channels, size, stride, padding, blocks)
        return found

    inputs = tuple(tensor.requires_grad_() for tensor in drawn(SHAPES[name], torch.float64))
    assert torch.autograd.gradcheck(transpose, inputs)


@native
@pytest.mark.parametrize("name", SHAPES)
def test_neither_threads_nor_the_batch_change_a_bit(name: str, threads: None) -> None:
    shape = (5, *SHAPES[name][1:])
    _, channels, _, _, stride, padding, size = shape
    upstream, weight = drawn(shape, torch.float32)
    filters, blocks = ops.conv_transpose_filters(weight, stride), ops.in_blocks(weight.shape, stride)
    rest = (channels, size, stride, padding, blocks)
    expected = ops.conv_transpose(upstream, filters, *rest)
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        for n in (1, 2, 5):
            assert torch.equal(torch.cat([ops.conv_transpose(p, filters, *rest) for p in upstream.split(n)]), expected)


@pytest.mark.parametrize("module", [reference, ops])
def test_what_a_convolution_would_not_give(module: ModuleType) -> None:
    """Nothing at all, images that lie in the padding, and strides that the kernel does not take."""
    filters = module.conv_transpose_filters(torch.ones(4, 16, 3, 3), 2)
    assert module.conv_transpose(torch.ones(2, 4, 0, 3), filters, 16, (1, 5), 2, (0, 0)).sum() == 0
    assert module.conv_transpose(torch.ones(2, 0, 2, 3), filters[:, :, :, :0], 16, (5, 7), 2, (0, 0)).sum() == 0
    assert module.conv_transpose(torch.ones(1, 4, 1, 1), filters, 16, (20, 20), 2, (5, 5)).sum() == 0
    weight = torch.rand(2, 1, 1, 3)
    wide = (
        module.conv_transpose_filters(weight, 2000),
        1,
        (1, 4100),
        2000,
        (0, 0),
        module.in_blocks(weight.shape, 2000),
    )
    found = module.conv_transpose(torch.ones(1, 2, 1, 3), *wide)
    torch.testing.assert_close(found[0, 0, 0, 2000:2003], weight.sum(0)[0, 0])
    assert found.count_nonzero() == 9


def test_autocast_has_no_say() -> None:
    upstream, weight = drawn(SHAPES["plain"], torch.float32)
    filters, rest = ops.conv_transpose_filters(weight, 2), (16, (20, 28), 2, (1, 1))
    expected = ops.conv_transpose(upstream, filters, *rest)
    with torch.autocast("cpu", torch.bfloat16):
        for given in (upstream, upstream.clone().requires_grad_()):
            close(ops.conv_transpose(given, filters, *rest).detach(), expected.double(), torch.float32)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", ["plain", "blocks"])
def test_opcheck(name: str, dtype: torch.dtype) -> None:
    _, channels, _, _, stride, padding, size = SHAPES[name]
    upstream, weight = drawn(SHAPES[name], dtype)
    filters, blocks = ops.conv_transpose_filters(weight, stride), ops.in_blocks(weight.shape, stride)
    arguments = (upstream, filters, channels, list(size), stride, list(padding), blocks)
    torch.library.opcheck(torch.ops.equifast.conv_transpose.default, arguments)


def test_what_does_not_fit_is_refused() -> None:
    upstream, weight = drawn(SHAPES["plain"], torch.float32)
    filters = ops.conv_transpose_filters(weight, 2)
    rest = (16, (20, 28), 2, (1, 1))
    for module in (ops, reference):
        with pytest.raises(ValueError, match=r"weight has shape \(8, 16, 9\); it must be \(O, C, h, w\)"):
            module.conv_transpose_filters(weight.flatten(2), 2)
        with pytest.raises(ValueError, match=r"stride is 0; it must be an integer from 1 to"):
            module.conv_transpose_filters(weight, 0)
        with pytest.raises(TypeError, match=r"x has dtype torch.float16; it must be float32 or float64"):
            module.conv_transpose(upstream.half(), filters.half(), *rest)
        with pytest.raises(TypeError, match=r"filters has dtype torch.float64, x torch.float32; they must be of one"):
            module.conv_transpose(upstream, filters.double(), *rest)
        with pytest.raises(ValueError, match=r"filters has shape \(1, 3, 3, 8, 16\); it must be \(C / 16, .*, 7, 16\)"):
            module.conv_transpose(upstream[:, :7], filters, *rest)
        with pytest.raises(ValueError, match=r"channels is 17; it must be an integer from 1 to 16"):
            module.conv_transpose(upstream, filters, 17, *rest[1:])
        with pytest.raises(ValueError, match=r"channels is 5; it must be an integer from 1 to 4"):
            module.conv_transpose(upstream, filters, 5, *rest[1:], True)
        with pytest.raises(ValueError, match=r"stride is 0; it must be an integer from 1 to"):
            module.conv_transpose(upstream, filters, 16, (20, 28), 0, (1, 1))
        with pytest.raises(ValueError, match=r"size is \(0, 28\); it must be two integers of at least 1"):
            module.conv_transpose(upstream, filters, 16, (0, 28), 2, (1, 1))
        with pytest.raises(ValueError, match=r"padding is \(1, -1\); it must be two integers of at least 0"):
            module.conv_transpose(upstream, filters, 16, (20, 28), 2, (1, -1))
    library = torch.ops.equifast.conv_transpose
    for call in (
        lambda: library(upstream[0], filters, 16, [20, 28], 2, [1, 1], False),
        lambda: library(upstream.half(), filters.half(), 16, [20, 28], 2, [1, 1], False),
        lambda: library(upstream, filters.double(), 16, [20, 28], 2, [1, 1], False),
        lambda: library(upstream, filters[0], 16, [20, 28], 2, [1, 1], False),
        lambda: library(upstream[:, :7], filters, 16, [20, 28], 2, [1, 1], False),
        lambda: library(upstream, filters[..., :8], 8, [20, 28], 2, [1, 1], False),
        lambda: library(upstream, filters, 17, [20, 28], 2, [1, 1], False),
        lambda: library(upstream, filters, 5, [20, 28], 2, [1, 1], True),
        lambda: library(upstream, filters, 0, [20, 28], 2, [1, 1], False),
        lambda: library(upstream, filters, 16, [20], 2, [1, 1], False),
        lambda: library(upstream, filters, 16, [20, 0], 2, [1, 1], False),
        lambda: library(upstream, filters, 16, [20, 2**40], 2, [1, 1], False),
        lambda: library(upstream, filters, 16, [20, 28], 2**20, [1, 1], False),
        lambda: library(upstream, filters, 16, [20, 28], 0, [1, 1], False),
        lambda: library(upstream, filters, 16, [20, 28], 2, [1, -1], False),
    ):
        with pytest.raises(RuntimeError):
            call()
    # whatever sizes say, nothing is read that is not there
    assert not library(upstream, filters, 16, [300, 400], 2, [1, 1], False)[:, :, 50:].any()
