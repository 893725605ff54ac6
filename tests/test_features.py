import itertools
from typing import Any

import cases
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.nn import functional
from torch.overrides import _get_current_function_mode_stack

from equifast import features, ops
from equifast._folded import Folded
from equifast.features import Features, evaluating, suggest


def run(model: nn.Module, x: Tensor, lean: bool) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    with evaluating(x, model, lean=lean):
        out = model(leaf)
        return out.detach(), torch.autograd.grad(out.square().sum(), leaf)[0]


def normed(**settings: bool) -> nn.Module:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(6, **settings)
    if norm.affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), norm, nn.Tanh(), nn.Conv2d(6, 2, 1)).double()
    model(torch.rand(8, 3, 9, 9, dtype=torch.float64))  # so that the statistics are some
    return model


def test_lean_batch_norm_is_batch_norm() -> None:
    x = cases.images(3, 9, 9).double()
    for settings in ({}, {"affine": False}, {"track_running_stats": False}):
        model = normed(**settings)
        for lean, plain in zip(run(model, x, True), run(model, x, False), strict=True):
            torch.testing.assert_close(lean, plain)


def test_lean_batch_norm_keeps_less() -> None:
    x, model = cases.images(4, 64, 64), cases.dense()

    def kept(lean: bool) -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        alive = x.clone().requires_grad_()
        with evaluating(x, model, lean=lean), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = model(alive)
        assert out.requires_grad
        return sum(sizes.values())

    assert kept(True) < 0.8 * kept(False)


def test_a_lone_image_is_treated_as_one_of_several() -> None:
    """The convolutions where PyTorch would do otherwise; without the mode this fails."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1), nn.AdaptiveAvgPool2d(1))
    model.append(nn.Conv2d(64, 64, 1))
    x = torch.rand(5, 3, 12, 12)
    for lean in (False, True):
        out, gradient = run(model, x, lean)
        alone = [run(model, x[i : i + 1], lean) for i in range(5)]
        assert torch.equal(torch.cat([o for o, _ in alone]), out)
        assert torch.equal(torch.cat([g for _, g in alone]), gradient)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_hard_sigmoid_has_second_derivatives(inplace: bool) -> None:
    """As MobileNetV3 has it; PyTorch's own has none."""

    def second(run: Any) -> tuple[Tensor, Tensor, Tensor]:
        x = torch.linspace(-4, 4, 40, dtype=torch.float64, requires_grad=True)
        out = run(x * 1.5).pow(3)
        (gradient,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        return out.detach(), gradient.detach(), torch.autograd.grad(gradient.square().sum(), x)[0]

    model = nn.Hardsigmoid(inplace)
    with evaluating(torch.ones(1), model, frozen=True):
        found = second(model)
    for actual, expected in zip(found, second(lambda x: functional.relu6(x + 3) / 6), strict=True):
        torch.testing.assert_close(actual, expected)
    assert found[2].any()


class InPlace(nn.Module):
    """As torchvision's residual networks have it: what a convolution gives is changed in place."""

    def __init__(self, inplace: bool, stride: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 8, 3, stride, 1), nn.Conv2d(8, 8, 3, stride, 1)
        self.shortcut, self.inplace = nn.Conv2d(8, 8, 1, stride), inplace

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.first(x), self.inplace)
        y = self.second(x)
        if self.inplace:
            y += self.shortcut(x)
        else:
            y = y + self.shortcut(x)
        return functional.relu(y, self.inplace)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_what_a_convolution_gives_may_be_changed_in_place(count: int, stride: int, frozen: bool) -> None:
    """Also that of a lone small image, which is one of two."""
    given = torch.rand(count, 3, 20, 28)
    found = []
    for inplace in (False, True):
        model, x = InPlace(inplace, stride), given.clone().requires_grad_()
        with evaluating(x, model, frozen=frozen):
            out = model(x)
            (gradient,) = torch.autograd.grad(out.square().sum(), x)
        found.append((out.detach(), gradient))
    (out, gradient), (changed, other) = found
    assert torch.equal(out, changed)
    assert torch.equal(gradient, other)


@pytest.mark.parametrize("stride", [2, [2], (2,), (2, 2), np.int64(2)])
@pytest.mark.parametrize("count", [1, 3])
def test_settings_of_a_convolution_may_be_written_in_every_way(count: int, stride: Any) -> None:
    """That PyTorch takes."""
    given, weight = torch.rand(count, 3, 20, 28), torch.rand(4, 3, 3, 3)
    found = []
    for model in (lambda x: torch.conv2d(x, weight, None, stride, 1), lambda x: torch.conv2d(x, weight, None, 2, 1)):
        x = given.clone().requires_grad_()
        with evaluating(x, model):
            out = model(x)
            found.append((out.detach(), torch.autograd.grad(out.square().sum(), x)[0]))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(20, 28), (88, 120)])
def test_a_strided_convolution_does_not_see_the_batch(size: tuple[int, int], dtype: torch.dtype) -> None:
    """Its gradient is the one that oneDNN computes otherwise for three images than for eight, with two threads."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1), nn.Conv2d(32, 64, 3, stride=2, padding=1))
    x = torch.rand(8, 3, *size)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        out, gradient = run(model, x, True)
        for count in (1, 2, 3, 5):
            parts = [run(model, part, True) for part in x.split(count)]
            assert torch.equal(torch.cat([o for o, _ in parts]), out)
            assert torch.equal(torch.cat([g for _, g in parts]), gradient)


STRIDED: dict[str, dict[str, Any]] = {
    "three": {"kernel_size": 3, "stride": 2, "padding": 1},
    "three, no padding": {"kernel_size": 3, "stride": 2},
    "even": {"kernel_size": 4, "stride": 2, "padding": (0, 3)},
    "one": {"kernel_size": 1, "stride": 2},
    "one of nine": {"kernel_size": 1, "stride": 3},
    "seven": {"kernel_size": 7, "stride": 2, "padding": 3},
    "patches": {"kernel_size": 4, "stride": 4},
    "apart": {"kernel_size": 2, "stride": 3, "padding": 1},
    "not square": {"kernel_size": (3, 5), "stride": 2, "padding": (1, 2)},
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(13, 18), (196, 231)])
@pytest.mark.parametrize("name", STRIDED)
def test_the_gradient_of_a_strided_convolution(name: str, size: tuple[int, int], layout: torch.memory_format) -> None:
    """It is PyTorch's, and that of an image alone, also of large maps, is that in a batch."""
    torch.manual_seed(0)
    model = nn.Conv2d(8, 6, **STRIDED[name]).to(memory_format=layout)
    x = torch.randn(3, 8, *size)
    assert size[0] < 100 or x[0].numel() > features._HEAVY
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            out, gradient = run(model, x, True)
            for i in range(3):
                part, part_gradient = run(model, x[i : i + 1], True)
                assert torch.equal(part, out[i : i + 1])
                assert torch.equal(part_gradient, gradient[i : i + 1])
    finally:
        torch.set_num_threads(threads)
    leaf = x.clone().requires_grad_()
    expected = model(leaf)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)
    expected_gradient = torch.autograd.grad(expected.square().sum(), leaf)[0]
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-5, rtol=1e-4)


class ByKeyword(nn.Module):
    """A convolution whose arguments are all named."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        given = {"input": x, "weight": self.conv.weight, "bias": self.conv.bias, "stride": self.conv.stride}
        return functional.conv2d(**given, padding=self.conv.padding)  # type: ignore[arg-type]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kept", [False, True])
def test_a_convolution_may_be_called_by_keyword(kept: bool, stride: int) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(16, 16, 3, stride, 1).to(memory_format=torch.channels_last).requires_grad_(False)
    if kept:
        features.keep_made(conv.weight)
    x = torch.rand(2, 16, 16, 20)
    for lean in (False, True):
        for actual, expected in zip(run(ByKeyword(conv), x, lean), run(conv, x, False), strict=True):
            torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)


def test_nothing_of_a_tracer_is_kept() -> None:
    """A fake image gives fake results, and the next, of real ones, are real."""
    conv = nn.Sequential(nn.Conv2d(16, 16, 3, 1, 1), nn.Conv2d(16, 16, 3, 2, 1)).to(memory_format=torch.channels_last)
    for module in conv.requires_grad_(False):
        features.keep_made(module.weight)  # type: ignore[arg-type]
    x = torch.rand(2, 16, 16, 20)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        out, gradient = run(conv, mode.from_tensor(x), True)
        assert out.shape == (2, 16, 8, 10)
        assert gradient.shape == x.shape
    assert all(type(t) is Tensor for t in run(conv, x, True))


@pytest.mark.parametrize("size", [(3, 2**20), (4, 2000)])
def test_what_kernels_do_not_take_is_left_to_pytorch(size: tuple[int, int]) -> None:
    """Sides of a million pixels, and strides of a thousand."""
    height, width = size
    stride = 2 if width > 10**6 else 1024
    conv = nn.Conv2d(1, 1, (1, stride), stride).requires_grad_(False)
    x = torch.rand(1, 1, height, width)
    for actual, expected in zip(run(conv, x, True), run(conv, x, False), strict=True):
        torch.testing.assert_close(actual, expected)
    assert not features._tiles_well(3, 2**20, (1, 1), 1)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kernel", [1, 3])
def test_the_gradient_of_a_strided_convolution_lies_as_its_input(kernel: int, layout: torch.memory_format) -> None:
    """A weight of one position is of both layouts."""
    conv = nn.Conv2d(16, 32, kernel, 2, kernel // 2).to(memory_format=layout).requires_grad_(False)
    x = torch.rand(2, 16, 12, 14).contiguous(memory_format=layout).requires_grad_()
    with evaluating(x, conv, lean=True):
        hidden = x * 2
        (gradient,) = torch.autograd.grad(conv(hidden).sum(), hidden)
    assert gradient.stride() == hidden.stride()


@pytest.mark.skipif(ops.backend() != "native", reason="needs the native backend")
@pytest.mark.parametrize("channels", [(16, 32, 150, 120), (128, 256, 50, 52)])
def test_a_lone_image_of_large_maps_has_the_gradient_of_one_in_a_batch(channels: tuple[int, ...]) -> None:
    """Where oneDNN's own, of AVX2 and three threads, is another than that of two images."""
    into, out, *size = channels
    torch.manual_seed(0)
    model = nn.Conv2d(into, out, 3, 2, 1).to(memory_format=torch.channels_last)
    x = torch.randn(5, into, *size)
    assert x[0].numel() > features._HEAVY
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        _, gradient = run(model, x, True)
        for i in range(5):
            assert torch.equal(run(model, x[i : i + 1], True)[1], gradient[i : i + 1])
    finally:
        torch.set_num_threads(threads)


def test_kernels_of_weights_that_never_change_are_made_once() -> None:
    conv = nn.Conv2d(3, 4, 3, 2).requires_grad_(False)
    features.keep_made(conv.weight)
    x = torch.rand(2, 3, 9, 9)
    kept = getattr(conv.weight, features._KEPT)
    run(conv, x, True)
    first = dict(kept)
    run(conv, x, True)
    assert set(first) == (set() if ops.backend() == "reference" else {("transpose", 2)})
    assert all(kept[key] is first[key] for key in first)


POSITIONS = {
    "plain": lambda: nn.Conv2d(8, 6, 1),
    "groups": lambda: nn.Conv2d(8, 6, 1, groups=2, padding="same", bias=False),
    "padded": lambda: nn.Conv2d(8, 6, 1, padding=(0, 1)),
    "strided": lambda: nn.Conv2d(8, 6, 1, stride=(2, 1)),
    "transposed": lambda: nn.ConvTranspose2d(8, 6, 1),
    "one dimension": lambda: nn.Conv1d(8, 6, 1),
    "one dimension, transposed": lambda: nn.ConvTranspose1d(8, 6, 1),
    "three dimensions": lambda: nn.Conv3d(8, 6, 1),
    "three dimensions, dilated": lambda: nn.Conv3d(8, 6, (3, 1, 1), dilation=(2, 1, 1), padding=(1, 0, 0)),
}


@pytest.mark.parametrize("name", POSITIONS)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_kernel_of_one_position_does_not_see_the_batch(name: str, threads: int) -> None:
    """On one thread PyTorch runs less than sixteen images otherwise than more."""
    torch.manual_seed(0)
    model = POSITIONS[name]()
    x = torch.randn(18, 8, *(6, 10, 14)[5 - model.weight.dim() :])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        out, gradient = run(model, x, True)
        for rows in (slice(0, 1), slice(3, 5), slice(2, 17)):
            part, part_gradient = run(model, x[rows], True)
            assert torch.equal(part, out[rows])
            assert torch.equal(part_gradient, gradient[rows])
    finally:
        torch.set_num_threads(before)
    leaf = x.clone().requires_grad_()
    expected = model(leaf)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.square().sum(), leaf)[0])


def test_suggestions() -> None:
    x = cases.images()
    assert suggest(cases.dense(), x) == "head"
    assert suggest(nn.Sequential(nn.Flatten(), nn.Linear(3 * 20 * 28, 4)), x) is None


def test_features_follow_the_model_they_are_of() -> None:
    model, x = cases.classifier().eval(), cases.images()
    features = Features(model, "features.1")
    assert torch.equal(features(x), model.features[:2](x))
    assert not model.features[1]._forward_hooks


CONVOLUTIONS = {
    "plain": {"kernel_size": 3, "padding": 1},
    "strided": {"kernel_size": 3, "stride": 2, "padding": 1},
    "strided, small": {"kernel_size": 1, "stride": (2, 1), "bias": False},
    "strided, dilated, groups": {"kernel_size": 3, "stride": (1, 2), "dilation": 2, "groups": 2},
    "strided, padding named": {"kernel_size": 2, "stride": 2, "padding": "valid"},
}


@pytest.mark.parametrize("lowered", [False, True])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_gives_an_image_the_same_bits_in_any_batch(name: str, lowered: bool) -> None:
    """Forward and backward; with three threads oneDNN cuts strided gradients by the number of images."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(32, 48, **CONVOLUTIONS[name]), nn.ReLU())  # type: ignore[arg-type]
    x = torch.randn(7, 32, 44, 60)

    def both(images: Tensor) -> tuple[Tensor, Tensor]:
        leaf = images.clone().requires_grad_()
        with evaluating(images, model), torch.autocast("cpu", torch.bfloat16, enabled=lowered):
            out = model(leaf)
            return out.detach(), torch.autograd.grad(out.float().square().sum(), leaf)[0]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        out, gradient = both(x)
        for rows in (slice(0, 2), slice(2, 5), slice(5, 7), slice(1, 6)):
            part, part_gradient = both(x[rows])
            assert torch.equal(part, out[rows])
            assert torch.equal(part_gradient, gradient[rows])
        with evaluating(x, model), torch.autocast("cpu", torch.bfloat16, enabled=lowered), torch.no_grad():
            assert torch.equal(model(x), out)
    finally:
        torch.set_num_threads(threads)
    leaf = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=lowered):
        expected = model(leaf)
    tolerance = {"atol": 0.1, "rtol": 0.1} if lowered else {"atol": 1e-4, "rtol": 1e-4}
    torch.testing.assert_close(out, expected.detach(), **tolerance)  # type: ignore[arg-type]
    expected_gradient = torch.autograd.grad(expected.float().square().sum(), leaf)[0]
    torch.testing.assert_close(gradient, expected_gradient, **tolerance)  # type: ignore[arg-type]


def test_second_derivatives_through_a_strided_convolution() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, 2, 1), nn.Tanh(), nn.Conv2d(4, 3, 2, 2, groups=1)).double()
    x = torch.randn(3, 2, 6, 5, dtype=torch.float64, requires_grad=True)
    with evaluating(x, model):
        assert torch.autograd.gradcheck(model, [x])
        assert torch.autograd.gradgradcheck(model, [x])


def test_weights_that_are_trained_get_their_gradient() -> None:
    """Those of a function are not frozen."""
    torch.manual_seed(0)
    conv, x = nn.Conv2d(2, 4, 3, 2, 1), torch.randn(3, 2, 6, 5, requires_grad=True)
    with evaluating(x, lambda images: conv(images)):
        gradients = torch.autograd.grad(conv(x).square().sum(), [x, conv.weight])
    expected = torch.autograd.grad(conv(x).square().sum(), [x, conv.weight])
    for actual, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(actual, wanted)


def test_evaluating_inside_evaluating() -> None:
    """Nothing runs twice; but a backward pass runs outside the modes it was started in, and wants its own."""
    model, x = cases.dense().eval(), cases.images(2)
    found: list[list[str]] = []

    def note() -> None:
        with evaluating(x, model, lean=True):
            found.append(sorted(type(mode).__name__ for mode in _get_current_function_mode_stack()))

    class Noting(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, images: Tensor) -> Tensor:
            return images.clone()

        @staticmethod
        def backward(ctx: object, *upstream: Tensor) -> Tensor:
            note()
            return upstream[0]

    note()
    with evaluating(x, model, lean=True):
        note()
        leaf = x.clone().requires_grad_()
        torch.autograd.grad(Noting.apply(leaf).sum(), leaf)
    assert found == [["_Running"]] * 3
    assert _get_current_function_mode_stack() == []


def test_evaluating_leanly_inside_evaluating() -> None:
    """Only what is missing comes on top."""
    model, x = cases.dense().eval(), cases.images(2)
    with evaluating(x, model), evaluating(x, model, lean=True), evaluating(x, model):
        modes = [mode for mode in _get_current_function_mode_stack() if isinstance(mode, features._Running)]
        flags = [(mode.batchless, mode.lean) for mode in modes]
    assert flags == [(True, False), (False, True)]


def test_torch_func_goes_through_a_strided_convolution() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.Tanh()), cases.images(3)
    with evaluating(x, model):
        actual = torch.func.grad(lambda images: model(images).sum())(x)
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(actual, torch.autograd.grad(model(leaf).sum(), leaf)[0])


RESIZES = [{"size": (24, 31)}, {"size": [5, 4]}, {"size": 20}, {"scale_factor": 2}, {"scale_factor": (2.0, 0.5)}]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("settings", RESIZES, ids=str)
def test_lean_resize_is_resize(settings: dict[str, Any], dtype: torch.dtype) -> None:
    for layout, width in itertools.product((torch.contiguous_format, torch.channels_last), (10, 1)):
        if width == 1 and "size" not in settings:
            continue
        x = torch.rand(3, 5, 8, width).to(dtype).contiguous(memory_format=layout).requires_grad_()
        expected = functional.interpolate(x, mode="bilinear", **settings)
        with ops.use("native"):
            actual = features._resized(x, mode="bilinear", **settings)
        assert actual is not None
        assert actual.stride() == expected.stride()
        torch.testing.assert_close(actual, expected)
        upstream = torch.rand_like(expected)
        ours, theirs = (torch.autograd.grad(y, x, upstream)[0] for y in (actual, expected))
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    "settings",
    [
        {"size": (9, 9), "align_corners": True},
        {"size": (3, 3), "antialias": True},
        {"scale_factor": 1.3},
        {"size": (9, 9), "mode": "bicubic"},
        {"size": (9, 9), "mode": "nearest"},
    ],
    ids=str,
)
def test_other_resizes_are_left_to_pytorch(settings: dict[str, Any]) -> None:
    x = cases.images(2, 8, 10)
    settings = {"mode": "bilinear", **settings}
    assert features._resized(x, **settings) is None
    expected = functional.interpolate(x, **settings)
    with evaluating(x, nn.Identity(), lean=True):
        assert torch.equal(functional.interpolate(x, **settings), expected)


def test_a_resize_that_cannot_be_is_refused_by_pytorch() -> None:
    x = cases.images(2, 8, 10)
    wrong: list[dict[str, Any]] = [
        *({"size": size} for size in ((0, 4), (4,), (4, 4, 4), (4.0, 4.0), torch.tensor([4, 4]))),
        *({"scale_factor": factor} for factor in ((2, 2, 2), float("nan"), float("inf"))),
        {"size": 4, "scale_factor": 2},
        {"size": 4, "recompute_scale_factor": True},
    ]
    for settings in wrong:
        with pytest.raises((ValueError, RuntimeError, TypeError)) as plain:
            functional.interpolate(x, mode="bilinear", **settings)
        with evaluating(x, nn.Identity(), lean=True), pytest.raises(type(plain.value)):
            functional.interpolate(x, mode="bilinear", **settings)


def test_weights_of_a_folded_copy_are_lowered_once() -> None:
    torch.manual_seed(0)
    model, x = normed().float().eval().requires_grad_(False), cases.images(3, 16, 16)
    copy = Folded(model)(x, lambda net, images: net(images))
    assert copy is not model
    weight = next(module for module in copy.modules() if isinstance(module, nn.Conv2d)).weight
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        expected = copy(x)
        assert getattr(weight, features._KEPT) == {}
        for _ in range(2):
            with evaluating(x, copy, lean=True), torch.inference_mode():
                actual = copy(x)
        (kept,) = getattr(weight, features._KEPT).values()
        with evaluating(x, copy, lean=True):
            leaf = x.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(copy(leaf).float().square().sum(), leaf)
    assert torch.equal(actual, expected)
    assert torch.equal(kept, weight.bfloat16())
    assert features._lowered(weight, torch.bfloat16) is kept
    assert gradient.isfinite().all()
    assert gradient.any()
    with evaluating(x, copy, lean=True):  # without autocast nothing is lowered
        assert copy(x).dtype == torch.float32


def test_kept_weights_and_torch_func() -> None:
    model, x = normed().float().eval().requires_grad_(False), cases.images(2, 12, 12)
    copy = Folded(model)(x, lambda net, images: net(images))
    assert copy is not model
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False), evaluating(x, copy, lean=True):
        gradient = torch.func.grad(lambda images: copy(images).float().sum())(x)
        kept = [getattr(m.weight, features._KEPT) for m in copy.modules() if isinstance(m, nn.Conv2d)]
        assert kept
        assert not any(kept)
        leaf = x.clone().requires_grad_()
        (expected,) = torch.autograd.grad(copy(leaf).float().sum(), leaf)
    assert all(kept)
    torch.testing.assert_close(gradient, expected, atol=0.02, rtol=0.02)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # forward mode's own
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_forward_mode_goes_through_a_lean_resize() -> None:
    x, tangent = cases.images(2, 8, 10), torch.rand(2, 3, 8, 10)
    with evaluating(x, nn.Identity(), lean=True), forward_ad.dual_level():
        resized = functional.interpolate(forward_ad.make_dual(x, tangent), size=(5, 7), mode="bilinear")
        found = forward_ad.unpack_dual(resized).tangent
    torch.testing.assert_close(found, functional.interpolate(tangent, size=(5, 7), mode="bilinear"))


@pytest.mark.parametrize("lowered", [False, True])
@pytest.mark.parametrize("shape", [(7, 37), (7, 5, 37)])
def test_a_linear_layer_gives_an_image_the_same_bits_in_any_batch(shape: tuple[int, ...], lowered: bool) -> None:
    """And those gradients, and however it is called."""

    class Keywords(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return functional.linear(input=x, weight=self.weight, bias=self.bias)

    generator = torch.Generator().manual_seed(0)
    x, upstream = (torch.randn((*shape[:-1], n), generator=generator) for n in (37, 19))
    layer = nn.Linear(37, 19)

    def both(rows: slice, module: nn.Module) -> tuple[Tensor, Tensor]:
        leaf = x[rows].clone().requires_grad_()
        with evaluating(leaf, module), torch.autocast("cpu", torch.bfloat16, enabled=lowered):
            y = module(leaf)
        return y.detach(), torch.autograd.grad(y, leaf, upstream[rows].to(y.dtype))[0]

    whole = both(slice(None), layer)
    for size in (1, 2, 3):
        parts = [both(slice(i, i + size), layer) for i in range(0, 7, size)]
        for found, expected in zip(map(torch.cat, zip(*parts, strict=True)), whole, strict=True):
            assert torch.equal(found, expected)
    other = Keywords(37, 19)
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(both(slice(None), other), whole, rtol=0.02, atol=0.02)


class Convolving(nn.Module):
    """Convolutions of several kinds one after the other, and something that bends."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=2)
        self.third = nn.Conv2d(4, 2, (1, 3), stride=(1, 2), padding=(0, 1), bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.first(x).tanh()).sin())


def test_second_derivatives_of_frozen_convolutions() -> None:
    model = Convolving().double().requires_grad_(False)
    for n, size in ((1, (9, 7)), (3, (6, 5))):  # of every entry the numbers grow with the square of the images
        x = cases.images(n, *size).double().requires_grad_()

        def first(x: Tensor, frozen: bool) -> Tensor:
            with evaluating(x, model, frozen=frozen):
                return torch.autograd.grad(model(x).square().sum(), x, create_graph=True)[0]

        def second(x: Tensor, frozen: bool) -> tuple[Tensor, ...]:
            gradient = first(x, frozen)
            return gradient.detach(), torch.autograd.grad(gradient.square().sum(), x)[0]

        for actual, expected in zip(second(x, True), second(x, False), strict=True):
            torch.testing.assert_close(actual, expected)
        assert torch.autograd.gradgradcheck(lambda x: first(x, True), x)
    # PyTorch's own takes a gradient of the weight too
    for frozen in (True, False):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
            second(x, frozen)
        assert ("aten::_convolution_double_backward" in {event.name for event in profile.events()}) != frozen


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_second_derivatives_of_an_image_have_the_same_bits_in_any_batch(dtype: torch.dtype) -> None:
    model = Convolving().to(dtype).requires_grad_(False)
    x = cases.images(5, 33, 41).to(dtype)

    def second(x: Tensor) -> Tensor:
        leaf = x.clone().requires_grad_()
        with evaluating(leaf, model, lean=True, frozen=True):
            gradient = torch.autograd.grad(model(leaf).square().sum(), leaf, create_graph=True)[0]
        return torch.autograd.grad(gradient.square().sum(), leaf)[0]

    together = second(x)
    for n in (1, 2, 3):
        assert torch.equal(torch.cat([second(part) for part in x.split(n)]), together)


def test_frozen_is_for_weights_that_are() -> None:
    model = Convolving()
    x = cases.images(2, 9, 7).float().requires_grad_()
    with evaluating(x, nn.Identity(), frozen=True):  # the model is not held, and trains
        model(x).sum().backward()
    assert model.first.weight.grad is not None


class Sure(nn.Module):
    """Probabilities of dense maps, by whatever name."""

    def __init__(self, how: Any) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.how(torch.cat((3 * x, x.square(), x.roll(1, 1)), 1))
        return found


@pytest.mark.parametrize(
    "how",
    [
        nn.Softmax(1),
        nn.Softmax2d(),
        lambda f: f.softmax(1),
        lambda f: torch.softmax(f, -3),
        lambda f: functional.softmax(f, dim=1, dtype=torch.float64),
        lambda f: f.permute(0, 2, 3, 1).softmax(-1),
        lambda f: f.bfloat16().softmax(1),
    ],
)
def test_a_softmax_has_the_same_bits_in_any_batch(how: Any) -> None:
    model = Sure(how)
    for height, width in ((20, 28), (7, 9), (33, 17)):
        x = cases.images(7, height, width)

        def both(x: Tensor) -> tuple[Tensor, Tensor]:
            leaf = x.clone().requires_grad_()
            with evaluating(leaf, model):
                found = model(leaf)
            return found.detach(), torch.autograd.grad(found.square().sum(), leaf)[0]

        with torch.no_grad():
            expected = model(x)
        whole = both(x)
        torch.testing.assert_close(whole[0], expected)
        for n in range(7):
            for alone, together in zip(both(x[n : n + 1]), whole, strict=True):
                assert torch.equal(alone[0], together[n])
