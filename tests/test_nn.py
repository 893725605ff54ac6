"""Equivariant layers and networks: commuting, derivatives, filters that are kept, and bad input."""

import copy
import functools
import pickle
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from equifast import Purifier
from equifast._folded import Folded
from equifast.nn import (
    C8,
    GCNN,
    P4,
    P4M,
    VGG16,
    Group,
    GroupBatchNorm2d,
    GroupConv2d,
    GroupPool,
    Hybrid,
    ResNet18,
    ScaleConv2d,
    StdCNN,
    SteerableConv2d,
    as_convolutions,
    equivariance_error,
)

C4 = Group(4)
GROUPS = {"p4": P4, "p4m": P4M, "half turns": Group(2), "mirror": Group(1, mirrored=True)}
# class, group
LAYERS = [
    *((GroupConv2d, group) for group in GROUPS.values()),
    (SteerableConv2d, C4),
    (SteerableConv2d, P4M),
    (SteerableConv2d, C8),
]
# kernel, stride, padding, size, whether exact
SHAPES = [
    (3, 1, 1, 12, True),
    (3, 2, 1, 13, True),
    (3, 2, 1, 12, False),
    (2, 2, 0, 12, True),
    (5, 1, 0, 11, True),
    (1, 1, 0, 1, True),
    (4, 3, 1, 11, True),
    (4, 3, 1, 12, False),
]


def quarters(errors: Tensor, group: Group) -> Tensor:
    """Those of the elements that keep the pixels."""
    return errors[[g for g in range(group.order) if 4 * (g % group.rotations) % group.rotations == 0]]


@pytest.mark.parametrize("group", [*GROUPS.values(), C8, Group(3, mirrored=True)], ids=str)
def test_group_is_one(group: Group) -> None:
    every = range(group.order)
    for a, b, c in product(every, repeat=3):
        assert group.product(group.product(a, b), c) == group.product(a, group.product(b, c))
    for a in every:
        assert group.product(a, 0) == group.product(0, a) == a
        assert group.product(a, group.inverse(a)) == group.product(group.inverse(a), a) == 0


@pytest.mark.parametrize("group", GROUPS.values(), ids=str)
def test_group_acts(group: Group) -> None:
    """What product says, on images and on maps over the group."""
    image, maps = torch.rand(2, 5, 5), torch.rand(3, group.order, 4, 4)
    for a, b in product(range(group.order), repeat=2):
        ab = group.product(a, b)
        assert torch.equal(group.act(group.act(image, b), a), group.act(image, ab))
        assert torch.equal(
            group.act(group.act(maps, b, regular=True), a, regular=True), group.act(maps, ab, regular=True)
        )


def test_eighth_turns_are_rotations() -> None:
    """Two of 45 degrees are nearly one of 90, of what is smooth and stays in the frame."""
    along = torch.linspace(-1, 1, 41)
    blob = torch.exp(-((along[:, None] - 0.2) ** 2 + (along + 0.3) ** 2) / 0.05)[None, None]
    twice = C8.act(C8.act(blob, 1), 1)
    torch.testing.assert_close(twice, torch.rot90(blob, 1, (-2, -1)), atol=0.05, rtol=0)


@pytest.mark.parametrize(("kernel", "stride", "padding", "size", "exact"), SHAPES)
@pytest.mark.parametrize(("layer", "group"), LAYERS)
def test_layers_commute(
    layer: Any, group: Group, kernel: int, stride: int, padding: int, size: int, exact: bool
) -> None:
    torch.manual_seed(0)
    settings = {"group": group, "stride": stride, "padding": padding}
    lifting = layer(2, 3, kernel, lifting=True, **settings)
    regular = layer(3, 2, kernel, **settings)
    assert lifting.exact(size) == regular.exact(size) == exact
    errors = [
        equivariance_error(lifting, torch.rand(2, 2, size, size), group),
        equivariance_error(regular, torch.rand(2, 3 * group.order, size, size), group, regular_in=True),
    ]
    for each in errors:
        if exact:
            assert quarters(each, group).max() < 1e-5
        elif 4 % group.rotations == 0 and group.rotations == 4:
            assert each.max() > 1e-2  # so that `exact` says what is so


def test_smaller_than_the_kernel_is_not_exact() -> None:
    assert not GroupConv2d(1, 1, 5).exact(3)


def test_eighth_turns_are_better_than_no_turns() -> None:
    """The error of C8 at 45 degrees, of a smooth image, is sampling; filters that are not turned have a larger one."""
    torch.manual_seed(0)
    along = torch.linspace(-1, 1, 33)
    blob = torch.exp(-((along[:, None] - 0.1) ** 2 + 2 * (along + 0.2) ** 2) / 0.05)[None, None]
    layer = SteerableConv2d(1, 4, 5, group=C8, lifting=True, padding=2, bias=False)
    error = equivariance_error(layer, blob, C8)
    assert error[1::2].max() < 0.1
    plain = GroupConv2d(1, 4, 5, group=Group(1), lifting=True, padding=2, bias=False)
    assert equivariance_error(plain, blob, C8, regular_out=False)[1] > 3 * error[1]


@pytest.mark.parametrize(("layer", "group"), LAYERS)
def test_against_a_sum_over_the_group(layer: Any, group: Group) -> None:
    """Equation 10 of Cohen and Welling 2016, element by element, with filters that are turned one by one."""
    torch.manual_seed(0)
    conv = layer(2, 3, 3, group=group)
    x = torch.rand(1, 2 * group.order, 6, 6)
    own = conv.expand().view(3, group.order, 2, group.order, 3, 3)
    for g in range(group.order):
        if layer is SteerableConv2d and g % group.rotations and 4 * (g % group.rotations) % group.rotations:
            continue
        turned = group.act(own[:, 0], g, regular=True)
        expected = functional.conv2d(x, turned.flatten(1, 2), conv.bias)
        torch.testing.assert_close(conv(x)[:, g :: group.order], expected)


@pytest.mark.parametrize("lifting", [True, False])
@pytest.mark.parametrize(("layer", "group"), LAYERS)
def test_derivatives(layer: Any, group: Group, lifting: bool) -> None:
    torch.manual_seed(0)
    conv = layer(1, 2, 2 if layer is GroupConv2d else 3, group=group, lifting=lifting).double()
    x = torch.rand(1, 1 if lifting else group.order, 4, 4, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in conv.named_parameters()]

    def function(x: Tensor, *values: Tensor) -> Tensor:
        result: Tensor = torch.func.functional_call(conv, dict(zip(names, values, strict=True)), (x,))
        return result

    inputs = (x, *conv.parameters())
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_filters_are_kept_until_weights_change() -> None:
    conv = GroupConv2d(2, 3, 3, lifting=True).eval().requires_grad_(False)
    x = torch.rand(1, 2, 8, 8)
    before, kept = conv(x), conv.filters()
    assert conv.filters() is kept
    with torch.no_grad():
        conv.weight.mul_(2)
    assert conv.filters() is not kept
    conv.bias.zero_()
    torch.testing.assert_close(conv(x), 2 * before)
    conv.weight = nn.Parameter(torch.zeros_like(conv.weight), requires_grad=False)
    assert not conv(x).any()
    conv.load_state_dict(GroupConv2d(2, 3, 3, lifting=True).state_dict())
    assert conv(x).any()
    conv.filters()
    conv.weight.data.copy_(torch.ones_like(conv.weight))  # no version counts this
    assert (conv.filters() == 1).all()
    kept = conv.filters()
    conv.train().eval()
    assert conv.filters() is not kept
    assert conv.double().filters().dtype == torch.float64


def test_filters_are_not_kept_where_weights_learn() -> None:
    conv = GroupConv2d(1, 1, 3, lifting=True).eval()
    assert conv.filters() is not conv.filters()
    assert conv.filters().requires_grad
    with torch.no_grad():
        assert conv.filters() is conv.filters()
    conv.train()
    with torch.no_grad():
        assert conv.filters() is not conv.filters()


def test_filters_kept_in_inference_mode_have_gradients_later() -> None:
    conv = GroupConv2d(1, 1, 3, lifting=True).eval().requires_grad_(False)
    with torch.inference_mode():
        conv(torch.rand(1, 1, 5, 5))
    x = torch.rand(1, 1, 5, 5, requires_grad=True)
    conv(x).sum().backward()
    assert x.grad is not None


def test_copies_and_files_are_without_kept_filters() -> None:
    conv = GroupConv2d(1, 4, 3, lifting=True).eval().requires_grad_(False)
    plain = len(pickle.dumps(conv))
    conv.filters()
    assert len(pickle.dumps(conv)) == plain
    assert set(conv.state_dict()) == {"weight", "bias"}
    other = copy.deepcopy(conv)
    other.weight.zero_()
    assert conv.filters().any()
    assert not other.filters().any()


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm(training: bool) -> None:
    torch.manual_seed(0)
    norm = GroupBatchNorm2d(3, group=P4).train(training)
    with torch.no_grad():
        norm.weight.uniform_()
        norm.running_var.uniform_(0.5, 2)
    reference = nn.BatchNorm3d(3).train(training)
    reference.load_state_dict(norm.state_dict())
    x = torch.rand(2, 12, 5, 4)
    for layout in (torch.contiguous_format, torch.channels_last):
        norm_of, reference_of = copy.deepcopy(norm), copy.deepcopy(reference)
        result = norm_of(x.to(memory_format=layout))
        torch.testing.assert_close(result, reference_of(x.unflatten(1, (3, 4))).flatten(1, 2))
        torch.testing.assert_close(norm_of.state_dict(), reference_of.state_dict())


def test_pools() -> None:
    x = torch.tensor([1.0, 5.0, 2.0, 0.0]).view(1, 4, 1, 1)
    assert GroupPool(4)(x).item() == 5
    assert GroupPool(2)(x).flatten().tolist() == [5, 2]
    assert GroupPool(4, kind="mean")(x).item() == 2


def test_scales() -> None:
    """A branch of scale 1 is the convolution; another is it on the resized image, resized back."""
    torch.manual_seed(0)
    conv = ScaleConv2d(2, 3, 3, scales=(0.5, 1.0, 2.0), padding=1)
    x = torch.rand(2, 2, 16, 16)
    maps = conv(x).unflatten(1, (3, 3))
    inner = conv.convs[0]
    torch.testing.assert_close(maps[:, :, 1], inner(x))
    half = functional.interpolate(x, (8, 8), mode="bilinear", antialias=True)
    torch.testing.assert_close(maps[:, :, 0], functional.interpolate(inner(half), (16, 16), mode="bilinear"))
    assert len(list(conv.parameters())) == 2
    assert len(list(ScaleConv2d(2, 3, 3, shared=False).parameters())) == 6
    assert ScaleConv2d(1, 2, 3, stride=2, padding=1)(torch.rand(1, 1, 9, 7)).shape == (1, 6, 5, 4)


@pytest.mark.parametrize("layer", [
    ScaleConv2d(2, 3, 3, padding=1),
    GroupConv2d(2, 3, 3, lifting=True),
    nn.Sequential(SteerableConv2d(2, 3, 3, group=C8, lifting=True), GroupBatchNorm2d(3, group=C8), GroupPool(8)),
])  # fmt: skip
def test_under_autocast(layer: nn.Module) -> None:
    x = torch.rand(2, 2, 12, 12)
    for training in (True, False):
        layer.train(training)
        expected = layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            actual = layer(x)
        torch.testing.assert_close(actual.float(), expected, atol=0.05, rtol=0.05)
        actual.float().sum().backward()
        assert torch.isfinite(torch.cat([p.grad.flatten() for p in layer.parameters() if p.grad is not None])).all()


@pytest.mark.parametrize(
    "layer", [GroupConv2d(2, 3, 3, lifting=True), SteerableConv2d(2, 3, 3, group=C8, lifting=True)]
)
def test_kept_filters_are_not_those_of_autocast_or_of_other_weights(layer: nn.Module) -> None:
    layer.eval().requires_grad_(False)
    x = torch.rand(1, 2, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x)
    expected = layer(x)
    assert expected.dtype == torch.float32
    for _ in range(5):
        given = {"weight": torch.randn_like(layer.weight)}
        other = copy.deepcopy(layer)
        other.weight.copy_(given["weight"])
        assert torch.equal(torch.func.functional_call(layer, given, (x,)), other(x))
    assert torch.equal(layer(x), expected)
    layer.weight.data.copy_(layer.weight.flip(0))
    assert not torch.equal(layer(x), expected)


def test_a_model_with_a_group_layer_folds() -> None:
    model, x = Hybrid("parallel", width=0.25).eval().requires_grad_(False), torch.rand(2, 3, 32, 32)
    folded = Folded(model)
    result = folded(x, lambda model, images: model(images))(x)
    assert folded.made
    torch.testing.assert_close(result, model(x), atol=1e-3, rtol=1e-3)


def test_plain_copies_of_what_is_shared_and_has_no_statistics() -> None:
    conv = GroupConv2d(2, 2, 3, padding=1)
    norm = GroupBatchNorm2d(2, track_running_stats=False)
    model = nn.Sequential(GroupConv2d(3, 2, 3, lifting=True), conv, nn.ReLU(), conv, norm).eval()
    plain, x = as_convolutions(model), torch.rand(2, 3, 9, 9)
    assert plain[1] is plain[3]
    assert type(plain[3]) is nn.Conv2d
    torch.testing.assert_close(plain(x), model(x))


# network, group, size, channels, whether its output shall not change
NETWORKS = [
    (lambda: GCNN(invariant=True), P4, 28, 1, True),
    (lambda: GCNN(), P4, 28, 1, False),
    (lambda: StdCNN(), P4, 28, 1, False),
    (lambda: VGG16(group=P4, width=0.125, invariant=True), P4, 32, 3, True),
    (lambda: VGG16(group=P4, width=0.125), P4, 32, 3, False),
    (lambda: VGG16(width=0.125), P4, 32, 3, False),
    (lambda: ResNet18(width=0.125), P4M, 32, 3, True),
    (lambda: ResNet18(width=0.125, invariant=False), P4M, 32, 3, False),
    (lambda: ResNet18(group=None, width=0.125), P4M, 32, 3, False),
    *(
        ((lambda first=first, released=released: Hybrid(first, width=0.25, released=released)), P4, 32, 3, False)
        for released in (False, True)
        for first in ("baseline", "parallel", "rotation-and-scale", "weighted", "cascaded")
    ),
]


@pytest.mark.parametrize(("build", "group", "size", "channels", "invariant"), NETWORKS)
def test_networks(build: Any, group: Group, size: int, channels: int, invariant: bool) -> None:
    torch.manual_seed(0)
    model = build()
    x = torch.rand(4, channels, size, size)
    model.train()(x).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    assert model(x).shape == (4, 10)
    error = equivariance_error(model, x, group).max()
    assert error < 1e-5 if invariant else error > 1e-3
    plain = as_convolutions(model)
    assert not any(isinstance(m, GroupConv2d | GroupBatchNorm2d) for m in plain.modules())
    torch.testing.assert_close(plain(x), model(x))


@pytest.mark.parametrize("build", [lambda: ResNet18(width=0.125), lambda: Hybrid("rotation-and-scale", width=0.25)])
def test_channels_last(build: Any) -> None:
    torch.manual_seed(0)
    model, x = build().eval(), torch.rand(2, 3, 32, 32)
    expected = model(x)
    model = model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x.contiguous(memory_format=torch.channels_last)), expected, atol=1e-4, rtol=1e-4)
    model.train()(x).sum().backward()


@pytest.mark.parametrize("build", [VGG16, ResNet18, functools.partial(Hybrid, "rotation-and-scale")])
def test_smaller_images(build: Any) -> None:
    """As smaller views of an image are."""
    model = build(width=0.125).eval()
    for size in ((9, 7), (5, 33), (1, 1)):
        assert model(torch.rand(1, 3, *size)).shape == (1, 10)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_compiled_exported_and_transformed() -> None:
    torch.manual_seed(0)
    layers = [GroupConv2d(2, 3, 3, lifting=True), GroupBatchNorm2d(3), SteerableConv2d(3, 2, 3, group=P4), GroupPool(4)]
    model, x = nn.Sequential(*layers), torch.rand(2, 2, 8, 8)
    for training in (True, False):
        model.train(training)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        expected = torch.autograd.grad(model(x).sum(), list(model.parameters()))
        torch.testing.assert_close(torch.autograd.grad(compiled(x).sum(), list(model.parameters())), expected)
    with torch.no_grad():
        torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))
    values = dict(model.named_parameters())
    gradient = torch.func.grad(lambda given: torch.func.functional_call(model, given, (x,)).sum())(values)
    torch.testing.assert_close([gradient[name] for name in values], list(expected))
    assert torch.func.vmap(model)(torch.rand(3, 2, 2, 8, 8)).shape == (3, 2, 2, 4, 4)


def test_features_of_a_group_network_commute() -> None:
    torch.manual_seed(0)
    model = GCNN().eval()
    assert equivariance_error(model.features, torch.rand(2, 1, 28, 28), P4).max() < 1e-5


def test_purified() -> None:
    """A group network is a model as any other; its plain copy folds, and purifies alike."""
    torch.manual_seed(0)
    model = VGG16(group=P4, width=0.125).eval()
    x = torch.rand(2, 3, 32, 32)
    features, settings = "features.42", {"steps": 2, "dtype": "float32"}
    result = Purifier(model, features, **settings)(x)
    assert result.shape == x.shape
    alike = (Purifier(as_convolutions(model), features, **settings)(x) - result).abs()
    assert (alike > 1e-4).float().mean() < 0.02  # signs of gradients that are all but zero


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GroupConv2d(1, 1, 3, group=C8), "group has 8 rotations"),
        (lambda: GroupConv2d(1, 1, 3, group=4), "group is a int"),
        (lambda: GroupConv2d(0, 1, 3), "channels_in is 0"),
        (lambda: GroupConv2d(1, 1, 3, stride=0), "stride is 0"),
        (lambda: GroupConv2d(3, 1, 3)(torch.rand(1, 3, 8, 8)), r"must be \(N, 12, H, W\)"),
        (lambda: GroupConv2d(3, 1, 3, lifting=True)(torch.rand(3, 8, 8)), r"must be \(N, 3, H, W\)"),
        (lambda: GroupBatchNorm2d(3)(torch.rand(1, 3, 8, 8)), r"must be \(N, 12, H, W\)"),
        (lambda: GroupPool(4)(torch.rand(1, 6, 8, 8)), r"must be \(N, C \* 4, H, W\)"),
        (lambda: GroupPool(kind="median"), "kind is 'median'"),
        (lambda: Group(0), "rotations is 0"),
        (lambda: ScaleConv2d(1, 1, 3, scales=()), "scales is empty"),
        (lambda: ScaleConv2d(1, 1, 3, scales=(0,)), "scales is 0"),
        (lambda: ScaleConv2d(1, 1, 3)(torch.rand(1, 1, 5, 5)), "sides must be at least 3"),
        (lambda: ScaleConv2d(1, 1, 3)(torch.rand(1, 2, 9, 9)), r"must be \(N, 1, H, W\)"),
        (lambda: GroupBatchNorm2d(3, group=4), "group is a int"),
        (lambda: equivariance_error(abs, torch.rand(1, 1, 4, 4), 4), "group is a int"),
        (lambda: GCNN()(torch.rand(1, 1, 32, 32)), r"must be \(N, 1, 28, 28\)"),
        (lambda: StdCNN(size=8), "size is 8"),
        (lambda: VGG16(width=0), "width is 0"),
        (lambda: Hybrid("serial"), "first is 'serial'"),
    ],
)
def test_bad_input(build: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        build()
