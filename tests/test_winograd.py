"""Convolutions by Winograd's minimal filtering: the reference, the kernel against it, and which of a model run so."""

from typing import Any

import cases
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from equifast import Purifier, features, ops, reference
from equifast._folded import Folded
from equifast.features import evaluating

Shape = tuple[int, int, int, int, int, int, tuple[int, int]]

SHAPES: dict[str, Shape] = {  # N, C, O, H, W, dilation, padding
    "plain": (3, 16, 16, 12, 20, 1, (1, 1)),
    "not whole tiles": (2, 32, 48, 13, 7, 1, (1, 1)),
    "one pixel": (1, 16, 16, 1, 1, 1, (1, 1)),
    "no padding": (2, 16, 80, 5, 9, 1, (0, 0)),
    "padding of its own": (2, 48, 16, 3, 11, 1, (2, 0)),
    "more padding than weights": (2, 16, 16, 2, 3, 1, (5, 3)),
    "dilated": (2, 64, 32, 11, 14, 2, (2, 2)),
    "dilated, not padded": (1, 16, 96, 17, 19, 3, (0, 1)),
    "dilated by more than there is": (2, 16, 16, 4, 5, 8, (8, 8)),
    "more than a task": (5, 16, 16, 41, 30, 1, (1, 1)),
    "many channels": (1, 80, 112, 8, 8, 1, (1, 1)),
    "channels that threads share": (1, 16, 256, 6, 6, 1, (1, 1)),
    "no images": (0, 16, 16, 6, 6, 1, (1, 1)),
}
native = pytest.mark.skipif(ops.backend() != "native", reason="runs on the native backend")
vectors = pytest.mark.skipif(not ops.has_vectors(), reason="this CPU, or EQUIFAST_ISA, has no AVX2")
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-13}  # of the largest output


def drawn(shape: Shape, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    n, c, o, h, w, *_ = shape
    generator = torch.Generator().manual_seed(n + c + o + h)
    sizes = ((n, c, h, w), (o, c, 3, 3), (o,))
    x, weight, bias = (torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes)
    return x, weight, bias


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert actual.shape == expected.shape
    assert actual.dtype == dtype
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=TOLERANCE[dtype] * largest)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", SHAPES)
def test_the_reference_is_a_convolution(name: str, dtype: torch.dtype) -> None:
    x, weight, bias = drawn(SHAPES[name], dtype)
    *_, dilation, padding = SHAPES[name]
    for shift in (bias, None):
        given = None if shift is None else shift.double()
        expected = functional.conv2d(x.double(), weight.double(), given, 1, padding, dilation)
        filters = reference.winograd_filters(weight)
        assert filters.shape == (len(weight) // 16, 36, weight.shape[1], 16)
        close(reference.winograd(x, filters, shift, dilation, padding), expected, dtype)


def test_gradcheck_of_the_reference() -> None:
    for h, w, dilation, padding in ((6, 5, 1, (1, 1)), (9, 6, 2, (0, 1))):  # more than a tile, and no whole ones
        x, weight, bias = (t.requires_grad_() for t in drawn((1, 2, 16, h, w, dilation, padding), torch.float64))

        def convolve(x: Tensor, weight: Tensor, bias: Tensor, d: int = dilation, p: Any = padding) -> Tensor:
            return reference.winograd(x, reference.winograd_filters(weight), bias, d, p)

        assert torch.autograd.gradcheck(convolve, (x, weight, bias))
        assert torch.autograd.gradcheck(lambda x, w=weight, b=bias: ops.winograd(x, ops.winograd_filters(w), b), x)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", SHAPES)
def test_the_kernel_is_the_reference(name: str, dtype: torch.dtype) -> None:
    x, weight, bias = drawn(SHAPES[name], dtype)
    *_, dilation, padding = SHAPES[name]
    filters = ops.winograd_filters(weight)
    across = filters.transpose(1, 3).contiguous().transpose(1, 3)  # lies otherwise in memory
    layouts = (x, x.contiguous(memory_format=torch.channels_last), functional.pad(x, (1, 2))[..., 1:-2])
    for shift in (bias, None):
        expected = reference.winograd(
            x.double(), filters.double(), None if shift is None else shift.double(), dilation, padding
        )
        found = [ops.winograd(given, filters, shift, dilation, padding) for given in layouts]
        found.append(ops.winograd(x, across, shift, dilation, padding))
        for actual in found:
            close(actual, expected, dtype)
            assert torch.equal(actual, found[0])
            assert not ops.native(x) or actual.is_contiguous(memory_format=torch.channels_last)


@native
@pytest.mark.parametrize("name", SHAPES)
def test_neither_threads_nor_the_batch_change_a_bit(name: str, threads: None) -> None:
    x, weight, bias = drawn((5, *SHAPES[name][1:]), torch.float32)
    *_, dilation, padding = SHAPES[name]
    filters = ops.winograd_filters(weight)
    expected = ops.winograd(x, filters, bias, dilation, padding)
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        for n in (1, 2, 5):
            parts = [ops.winograd(part, filters, bias, dilation, padding) for part in x.split(n)]
            assert torch.equal(torch.cat(parts), expected)


def test_what_is_not_finite_stays_in_its_tiles() -> None:
    """And does not reach other images."""
    x, weight, _ = drawn((2, 16, 16, 16, 16, 1, (1, 1)), torch.float32)
    x[0, 3, 5, 5], x[0, 4, 10, 10] = torch.nan, torch.inf
    found = ops.winograd(x, ops.winograd_filters(weight), None, 1, (1, 1))
    assert not found[0, :, 4:8, 4:8].isfinite().any()
    assert found[0, :, :4, :4].isfinite().all()
    assert found[1].isfinite().all()
    huge = ops.winograd(x[1:] * 1e30, ops.winograd_filters(weight), None, 1, (1, 1))
    torch.testing.assert_close(huge / 1e30, found[1:], rtol=1e-4, atol=1e-4)


def test_autocast_has_no_say() -> None:
    x, weight, bias = drawn(SHAPES["plain"], torch.float32)
    filters = ops.winograd_filters(weight)
    expected = ops.winograd(x, filters, bias, 1, (1, 1))
    with torch.autocast("cpu", torch.bfloat16):
        for given in (x, x.clone().requires_grad_()):
            close(ops.winograd(given, filters, bias, 1, (1, 1)).detach(), expected.double(), torch.float32)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_opcheck(dtype: torch.dtype) -> None:
    x, weight, bias = drawn(SHAPES["dilated"], dtype)
    filters = ops.winograd_filters(weight)
    for shift in (bias, None):
        torch.library.opcheck(torch.ops.equifast.winograd.default, (x, filters, shift, 2, [2, 1]))


def test_what_does_not_fit_is_refused() -> None:
    x, weight, bias = drawn(SHAPES["plain"], torch.float32)
    filters = ops.winograd_filters(weight)
    none = x.new_zeros(0, 36, 16, 16)
    assert ops.winograd(x, none, None, 1, (1, 1)).shape == reference.winograd(x, none, None, 1, (1, 1)).shape
    for module in (ops, reference):
        with pytest.raises(ValueError, match=r"weight has shape \(16, 16, 5, 3\); it must be \(O, C, 3, 3\), O a"):
            module.winograd_filters(torch.zeros(16, 16, 5, 3))
        with pytest.raises(ValueError, match=r"weight has shape \(8, 16, 3, 3\); it must be .*, O a multiple of 16"):
            module.winograd_filters(weight[:8])
        with pytest.raises(TypeError, match=r"weight has dtype torch.float16; it must be float32 or float64"):
            module.winograd_filters(weight.half())
        with pytest.raises(TypeError, match=r"x has dtype torch.bfloat16; it must be float32 or float64"):
            module.winograd(x.bfloat16(), filters.bfloat16())
        with pytest.raises(TypeError, match=r"filters has dtype torch.float64, x torch.float32; they must be of one"):
            module.winograd(x, filters.double())
        with pytest.raises(ValueError, match=r"filters has shape \(1, 36, 16, 16\); it must be \(O / 16, 36, 8, 16\)"):
            module.winograd(x[:, :8], filters)
        with pytest.raises(ValueError, match=r"bias has shape \(15,\); it must be \(16,\)"):
            module.winograd(x, filters, bias[1:])
        with pytest.raises(ValueError, match=r"dilation is 0; it must be an integer from 1 to"):
            module.winograd(x, filters, None, 0)
        with pytest.raises(TypeError, match=r"dilation is '2'; it must be an integer from 1 to"):
            module.winograd(x, filters, None, "2")
        with pytest.raises(TypeError, match=r"padding is 1; it must be two integers of at least 0"):
            module.winograd(x, filters, None, 1, 1)
        with pytest.raises(ValueError, match=r"padding is \(0, -1\); it must be two integers of at least 0"):
            module.winograd(x, filters, None, 1, (0, -1))
        with pytest.raises(ValueError, match=r"x has shape .*; it must be 13 pixels high and wide with its padding"):
            module.winograd(x, filters, None, 6, (0, 0))
    library = torch.ops.equifast.winograd
    for call in (
        lambda: library(x[0], filters, None, 1, [1, 1]),
        lambda: library(x.half(), filters.half(), None, 1, [1, 1]),
        lambda: library(x, filters.double(), None, 1, [1, 1]),
        lambda: library(x, filters[:, :35], None, 1, [1, 1]),
        lambda: library(x[:, :8], filters[:, :, :8], None, 1, [1, 1]),
        lambda: library(x, filters[..., :8], None, 1, [1, 1]),
        lambda: library(x, filters[:0], None, 1, [1, 1]),
        lambda: library(x, filters, bias[1:], 1, [1, 1]),
        lambda: library(x, filters, bias.double(), 1, [1, 1]),
        lambda: library(x, filters, None, 0, [1, 1]),
        lambda: library(x, filters, None, 2**40, [1, 1]),
        lambda: library(x, filters, None, 1, [1]),
        lambda: library(x, filters, None, 1, [-1, 1]),
        lambda: library(x, filters, None, 1, [2**40, 1]),
        lambda: library(x, filters, None, 6, [0, 0]),
    ):
        with pytest.raises(RuntimeError):
            call()


class Wide(nn.Module):
    """A dense model with batch norm whose convolutions are wide enough, and one that is not."""

    def __init__(self, dilation: int = 1) -> None:
        super().__init__()
        around: dict[str, Any] = {"padding": dilation, "dilation": dilation}
        layers = [nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU()]
        layers += [nn.Conv2d(16, 32, 3, bias=False, **around), nn.BatchNorm2d(32), nn.ReLU()]
        layers += [nn.Conv2d(32, 32, 3, **around), nn.BatchNorm2d(32), nn.ReLU(inplace=True)]
        self.body, self.head = nn.Sequential(*layers), nn.Conv2d(32, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = functional.interpolate(self.head(self.body(x)), x.shape[2:], mode="bilinear")
        return logits


def wide(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    model = Wide(**settings)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval().requires_grad_(False)


def folded(model: nn.Module, x: Tensor) -> nn.Module:
    copied = Folded(model)(x, lambda m, images: m(images))
    assert copied is not model
    return copied


def counted(run: Any) -> int:
    """How many convolutions it runs so."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        run()
    return sum(event.name == "equifast::winograd" for event in profile.events())


@native
@vectors
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_folded_copy_is_run_so(frozen: bool, dilation: int) -> None:
    """Its outputs, gradients and second derivatives are those of the model."""
    model, x = wide(dilation=dilation), cases.images(2, 40, 52)
    copied = folded(model, x)

    def run(what: nn.Module, lean: bool) -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        with evaluating(leaf, what, lean=lean, frozen=frozen):
            out = what(leaf)
            (gradient,) = torch.autograd.grad(out.sin().sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad(gradient.square().sum(), leaf)
        return [out.detach(), gradient.detach(), second]

    assert counted(lambda: run(copied, True)) >= 4  # two convolutions and their gradients
    assert frozen or counted(lambda: run(copied, False)) == 0
    assert counted(lambda: run(model, True)) == 0  # of the model's own weights there is nothing to keep
    found = run(copied, True)
    for actual, expected in zip(found, run(model, False), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))
    with evaluating(x, copied, lean=True), torch.no_grad():
        assert torch.equal(copied(x), found[0])
        assert counted(lambda: copied(x)) == 2
        with ops.use("reference"):
            assert counted(lambda: copied(x)) == 0
    with evaluating(x, copied, lean=True), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert counted(lambda: copied(x)) == 0


@native
@vectors
def test_filters_are_transformed_once_and_other_weights_never() -> None:
    model, x = wide(), cases.images(2, 40, 52)
    copied = folded(model, x)
    convolutions = [m for m in copied.modules() if isinstance(m, nn.Conv2d)]

    def kept() -> list[dict[Any, Tensor]]:
        return [dict(getattr(conv.weight, features._KEPT)) for conv in convolutions]

    with evaluating(x, copied, lean=True), torch.no_grad():
        copied(x)
        first = kept()
        copied(x)
    made = [key for each in first for key in each if "winograd" in key]
    assert made == [("winograd", False)] * 2
    assert all(a[key] is b[key] for a, b in zip(first, kept(), strict=True) for key in a)
    for change in ("dtype", "trained", "layout"):
        other = folded(model, x)
        conv = other.get_submodule("body.6")
        assert isinstance(conv, nn.Conv2d)
        if change == "trained":
            conv.weight.requires_grad_()
        given = x
        if change == "dtype":
            other, given = other.double(), x.double()
        if change == "layout":
            conv.weight.data = conv.weight.data.contiguous()
        with evaluating(x, nn.Identity(), lean=True):
            assert counted(lambda m=other, g=given: m(g)) == (0 if change == "dtype" else 1)


def test_small_maps_far_apart_are_left_to_pytorch() -> None:
    """Tiles would be empty for the most part."""
    assert features._tiles_well(44, 60, (1, 1), 1)
    assert features._tiles_well(22, 30, (8, 8), 8)
    assert not features._tiles_well(9, 7, (8, 8), 8)
    assert not features._tiles_well(2, 2, (1, 1), 1)
    assert not features._tiles_well(2, 2, (0, 0), 1)  # nothing is left


@native
@vectors
@pytest.mark.parametrize("size", [(32, 32), (40, 52)])
def test_purified_pixels_have_the_same_bits_in_any_batch(size: tuple[int, int]) -> None:
    model, x = wide(), cases.images(5, *size)
    purifier = Purifier(model, dtype="float32", steps=2)
    together = purifier(x)
    assert counted(lambda: purifier(x)) > 0
    for n in (1, 2, 3):
        parts = [purifier(part) for part in x.split(n)]
        assert torch.equal(torch.cat(parts), together)


@native
@vectors
def test_a_step_is_that_of_the_model_itself() -> None:
    """One step's gradient, with and without the folded copy that is run so."""
    model, x = wide(), cases.images(3, 40, 52)
    for preset in ("fast", "paper"):
        gradients = []
        for fold in (True, False):
            purifier = Purifier(model, preset=preset, dtype="float32", fold=fold)
            with purifier._objective(x, None, 0, purifier.views_per_step) as (images, objective, _, _):
                gradients.append(objective.gradient(images, 0)[1])
        actual, expected = gradients
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
