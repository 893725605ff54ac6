"""The folded copy: where batch norm goes into the convolution before it, where it must not, and when it is remade."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import equifast
from equifast._folded import pairs


def norm(channels: int) -> nn.BatchNorm2d:
    module = nn.BatchNorm2d(channels)
    with torch.no_grad():
        for tensor in (module.running_mean, module.bias):
            assert tensor is not None
            tensor.normal_()
        for tensor in (module.running_var, module.weight):
            assert tensor is not None
            tensor.uniform_(0.5, 2)
    return module


class Net(nn.Module):
    """Two convolutions with batch norm, and a head; `forward` is what the cases change."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, padding=1, bias=False), norm(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, padding=1, stride=2), norm(6)
        self.head = nn.Conv2d(6, 4, 1)

    def features(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())).relu()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


BOTH = [("conv1", "bn1"), ("conv2", "bn2")]


class Twice(Net):
    """The second convolution's output is also used without its batch norm."""

    def features(self, x: Tensor) -> Tensor:
        y = self.conv2(self.bn1(self.conv1(x)).relu())
        return self.bn2(y) + y


class Again(Net):
    """The first convolution is called a second time."""

    def features(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x)).relu()
        return self.bn2(self.conv2(y)).relu() + self.conv1(x).mean()


class Branching(nn.Module):
    """Decides by the values of its input, which cannot be traced; its part can."""

    def __init__(self) -> None:
        super().__init__()
        self.part = Net()

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x) if x.mean() > -1 else x


class Around(Branching):
    """Also calls a convolution of its part behind the part's back."""

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x) + self.part.conv1(x).mean() if x.mean() > -1 else x


def hooked() -> nn.Module:
    model = Net()
    model.conv1.register_forward_hook(lambda module, inputs, result: None)
    return model


def shared() -> nn.Module:
    model = Net()
    model.other = nn.Conv2d(3, 6, 3, bias=False)
    model.other.weight = model.conv1.weight
    return model


def without_statistics() -> nn.Module:
    model = Net()
    model.bn2 = nn.BatchNorm2d(6, track_running_stats=False)
    return model


CASES: dict[str, tuple[Callable[[], nn.Module], list[tuple[str, str]]]] = {
    "plain": (Net, BOTH),
    "used twice": (Twice, BOTH[:1]),
    "called twice": (Again, BOTH[1:]),
    "not traceable": (Branching, [(f"part.{conv}", f"part.{bn}") for conv, bn in BOTH]),
    "hook": (hooked, BOTH[1:]),
    "shared weight": (shared, BOTH[1:]),
    "no statistics": (without_statistics, BOTH[:1]),
    "half precision": (lambda: Net().bfloat16(), []),
}


def gradient(purifier: equifast.Purifier, x: Tensor) -> Tensor:
    with purifier._objective(x, None, 0, None) as (y, objective, _, _):
        return objective.gradient(y, 0)[1]


@pytest.mark.parametrize("name", CASES)
def test_what_folds(name: str) -> None:
    make, expected = CASES[name]
    assert pairs(make().eval()) == expected


@pytest.mark.parametrize("name", [name for name in CASES if name != "half precision"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_same_gradient(name: str, dtype: torch.dtype) -> None:
    model, x = CASES[name][0]().to(dtype).eval(), torch.rand(2, 3, 12, 14, dtype=dtype)
    folded, plain = (gradient(equifast.Purifier(model, dtype="float32", fold=fold), x) for fold in (True, False))
    scale = float(plain.abs().max())
    assert scale > 0
    torch.testing.assert_close(folded, plain, rtol=0, atol=scale * (1e-4 if dtype == torch.float32 else 1e-11))


@pytest.mark.parametrize("features", [None, "head", "bn2", "conv2", "method", "module", "function"])
def test_features_are_those_of_the_model(features: str | None) -> None:
    model, x = Net().double(), torch.rand(2, 3, 12, 14, dtype=torch.float64)
    where = {"method": model.features, "module": model.head, "function": lambda x: model.features(x)}
    if features == "module":
        where["module"] = nn.Sequential(model.conv1, model.bn1)
    chosen = where.get(features or "", features)
    folded, plain = (gradient(equifast.Purifier(model, chosen, fold=fold), x) for fold in (True, False))
    torch.testing.assert_close(folded, plain)


def test_the_model_is_left_alone() -> None:
    model, x = Net().train(), torch.rand(1, 3, 12, 14)
    before, modules = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    equifast.Purifier(model)(x)
    assert modules == [type(m) for m in model.modules()]
    assert all(module.training for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_remade_when_weights_change() -> None:
    model, x = Net().double().eval(), torch.rand(1, 3, 12, 14, dtype=torch.float64)
    purifier = equifast.Purifier(model)
    changes: list[Callable[[], object]] = [
        lambda: nn.init.normal_(model.conv1.weight),
        lambda: model.bn1.running_mean.add_(1),
        lambda: setattr(model, "conv2", nn.Conv2d(6, 6, 3, padding=1, stride=2).double()),
        lambda: model.load_state_dict(Net().double().state_dict()),
    ]
    for number, change in enumerate(changes):
        first = purifier._folded(x, lambda net, images: net(images))
        assert first is not model
        assert purifier._folded(x, lambda net, images: net(images)) is first
        change()
        second = purifier._folded(x, lambda net, images: net(images))
        assert second is not first, number
        torch.testing.assert_close(second(x), model.eval()(x))


def test_run_as_it_is_where_folding_changes_it() -> None:
    model, x = Around().eval(), torch.rand(1, 3, 12, 14)
    with pytest.warns(UserWarning, match="does not compute the same"):
        folded = gradient(equifast.Purifier(model, dtype="float32"), x)
    assert torch.equal(folded, gradient(equifast.Purifier(model, dtype="float32", fold=False), x))


def test_a_model_that_cannot_be_copied() -> None:
    model = Net()
    model.generator = (number for number in range(3))
    x = torch.rand(1, 3, 12, 14)
    assert equifast.purify(model, x).shape == x.shape
