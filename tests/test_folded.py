"""The folded copy: where batch norm goes into the convolution before it, where it must not, and when it is remade."""

import copy
import pickle
import threading
import types
import warnings
from collections.abc import Callable

import cases
import pytest
import torch
from torch import Tensor, nn

import equifast
from equifast._folded import Folded, pairs


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
    """Decides by the values of its input, and may take another way next time."""

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


def two_names() -> nn.Module:
    model = Net()
    model.again, model.bn = model.conv1, model.bn1
    return model


class Returning(Net):
    """Gives what its second convolution gives, beside the rest."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.bn1(self.conv1(x)).relu())
        return {"out": self.head(self.bn2(y)), "aux": y}


class Hidden(Branching):
    """Decides by a number."""

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x) if x.mean().item() > -1 else x


def compiled() -> nn.Module:
    model = Net()
    with warnings.catch_warnings(action="ignore"):  # that it is deprecated
        model.head = torch.jit.script(model.head)
    return model


def without_statistics() -> nn.Module:
    model = Net()
    model.bn2 = nn.BatchNorm2d(6, track_running_stats=False)
    return model


CASES: dict[str, tuple[Callable[[], nn.Module], list[tuple[str, str]]]] = {
    "plain": (Net, BOTH),
    "used twice": (Twice, BOTH[:1]),
    "called twice": (Again, BOTH[1:]),
    "looks at values": (Branching, []),
    "two names": (two_names, BOTH),
    "compiled part": (compiled, []),
    "returned": (Returning, BOTH[:1]),
    "hidden": (Hidden, []),
    "hook": (hooked, []),
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
    model = make().eval()
    names = {id(module): name for name, module in model.named_modules()}
    found, _ = pairs(model, torch.rand(2, 3, 12, 14).to(next(model.parameters()).dtype), lambda net, x: net(x))
    assert [(names[id(conv)], names[id(bn)]) for conv, bn in found] == expected


@pytest.mark.parametrize("name", [name for name in CASES if name != "half precision"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_same_gradient(name: str, dtype: torch.dtype) -> None:
    model, x = CASES[name][0]().to(dtype).eval(), torch.rand(2, 3, 12, 14, dtype=dtype)
    folded, plain = (gradient(equifast.Purifier(model, dtype="float32", fold=fold), x) for fold in (True, False))
    scale = float(plain.abs().max())
    assert scale > 0
    torch.testing.assert_close(folded, plain, rtol=0, atol=scale * (1e-4 if dtype == torch.float32 else 1e-11))


@pytest.mark.parametrize("features", [None, "head", "bn2", "conv2", "bound", "free", "module", "conv", "function"])
def test_features_are_those_of_the_model(features: str | None) -> None:
    model, x = Net().double(), torch.rand(2, 3, 12, 14, dtype=torch.float64)
    where: dict[str, object] = {
        "bound": model.features,
        "free": types.MethodType(lambda net, images: net.features(images), model),
        "module": nn.Sequential(model.conv1, model.bn1),
        "conv": model.conv1,
        "function": lambda images: model.features(images),
    }
    chosen = where.get(features or "", features)
    folded, plain = (gradient(equifast.Purifier(model, chosen, fold=fold), x) for fold in (True, False))
    torch.testing.assert_close(folded, plain)


class Odd(Net):
    """Does something between convolution and batch norm at odd sizes only."""

    def features(self, x: Tensor) -> Tensor:
        y = self.conv2(self.bn1(self.conv1(x)).relu())
        y = nn.functional.pad(y, (0, 1)) if y.shape[-1] % 2 else y
        return self.bn2(y).relu()


class Erasing(Net):
    """Sets a part of what its second convolution gives, where there is one."""

    def features(self, x: Tensor) -> Tensor:
        y = self.conv2(self.bn1(self.conv1(x)).relu())
        y[..., 4:] = 0
        return self.bn2(y).relu()


@pytest.mark.parametrize("kind", [Odd, Erasing])
@pytest.mark.parametrize("width", [8, 16, 17])
def test_what_depends_on_the_size(kind: type[nn.Module], width: int) -> None:
    model = kind().eval()
    folded, plain = (equifast.Purifier(model, dtype="float32", fold=fold) for fold in (True, False))
    folded.score(torch.rand(1, 3, 12, 12))
    x = torch.rand(1, 3, 12, width)
    torch.testing.assert_close(folded.score(x), plain.score(x), rtol=0, atol=1e-4)


# torch.compile looks at what it warns of
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("norm_too", [True, False])
def test_a_compiled_model(fold: bool, norm_too: bool) -> None:
    model = Net() if norm_too else Contained().body[:1]
    x = torch.rand(2, 3, 12, 14)
    compiled_model = torch.compile(model, backend="eager")
    one, other = (equifast.Purifier(m, steps=2, dtype="float32", fold=fold) for m in (compiled_model, model))
    torch.testing.assert_close(one.score(x), other.score(x))
    assert one(x).shape == x.shape


class Contained(nn.Module):
    """A container ends in a convolution whose batch norm is outside."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.bn = nn.Sequential(nn.Conv2d(3, 6, 3), norm(6), nn.ReLU(), nn.Conv2d(6, 6, 1)), norm(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.body(x))


def test_what_a_container_gives_is_kept() -> None:
    model, x = Contained().double(), torch.rand(2, 3, 24, 28, dtype=torch.float64)
    folded, plain = (gradient(equifast.Purifier(model, "body", fold=fold), x) for fold in (True, False))
    torch.testing.assert_close(folded, plain)


class Caching(Net):
    """Keeps what it saw first."""

    cache: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if self.cache is None:
            self.cache = y.detach().new_ones(())
        return y * self.cache


class Merging(Net):
    """Reshapes what a convolution gives, which wants its channels apart in memory."""

    def features(self, x: Tensor) -> Tensor:
        y = super().features(x)
        return y.view(y.shape[0] * y.shape[1], 1, *y.shape[2:]).view(y.shape)


class Looking(Net):
    """Looks at its batch norm."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.bn1.weight.mean()


@pytest.mark.parametrize("kind", [Caching, Merging, Looking, Around])
def test_models_that_do_more_than_convolve(kind: type[nn.Module]) -> None:
    model, x = kind().eval(), torch.rand(3, 3, 12, 14)
    folded, plain = (gradient(equifast.Purifier(model, dtype="float32", fold=fold), x) for fold in (True, False))
    torch.testing.assert_close(folded, plain, rtol=0, atol=1e-4 * float(plain.abs().max()))
    assert getattr(model, "cache", None) is None or isinstance(model.cache, Tensor)


def test_a_used_purifier_is_pickled_without_its_copy() -> None:
    model, x = Net().eval(), torch.rand(1, 3, 12, 14)
    purifier = equifast.Purifier(model)
    before = len(pickle.dumps(purifier))
    expected = purifier(x)
    assert len(pickle.dumps(purifier)) == before
    assert torch.equal(pickle.loads(pickle.dumps(purifier))(x), expected)


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
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)

    def step() -> None:
        model(x).sum().backward()
        optimizer.step()

    changes: list[Callable[[], object]] = [
        lambda: nn.init.normal_(model.conv1.weight),
        lambda: model.bn1.running_mean.add_(1),
        lambda: model.conv1.weight.data.mul_(2),
        lambda: model.conv1.weight.data.neg_(),
        lambda: model.conv1.weight.data.copy_(model.conv1.weight.data.flip(0)),
        step,
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


class Grouping(Net):
    """Merges channels and rows, which in the layout of folded copies is possible at some sizes only."""

    def features(self, x: Tensor) -> Tensor:
        y = super().features(x)
        return y.view(len(y), 2, -1).view(y.shape)


def test_a_layout_that_suits_every_size() -> None:
    model = Grouping().eval()
    purifier = equifast.Purifier(model, steps=1)
    for size in (2, 16):
        assert purifier(torch.rand(1, 3, size, size)).shape == (1, 3, size, size)


@pytest.mark.parametrize("buffer", [torch.eye(3).to_sparse(), torch.ones(3).to(torch.float8_e4m3fn)])
def test_buffers_of_any_kind(buffer: Tensor) -> None:
    model, x = Net().eval(), torch.rand(1, 3, 12, 14)
    model.register_buffer("extra", buffer)
    assert equifast.purify(model, x, steps=1).shape == x.shape


def in_threads(task: Callable[[], object], count: int = 4) -> None:
    """Runs a task several times at once, and raises what any of them raised."""
    errors: list[BaseException] = []
    barrier = threading.Barrier(count)

    def run() -> None:
        try:
            barrier.wait()
            task()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("features", [None, "conv2"])
@pytest.mark.parametrize("fold", [True, False])
def test_threads(features: str | None, fold: bool) -> None:
    model, x = Net().train(), torch.rand(2, 3, 12, 14)
    expected = equifast.Purifier(model, features, steps=2, fold=fold)(x)
    state = copy.deepcopy(model.state_dict())
    purifier = equifast.Purifier(model, features, steps=2, fold=fold)

    def purify() -> None:
        for _ in range(4):
            assert torch.equal(purifier(x), expected)
            assert torch.equal(equifast.Purifier(model, features, steps=2, fold=fold)(x), expected)

    in_threads(purify)
    assert all(module.training for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])


def test_large_tensors_are_told_apart_by_few_numbers() -> None:
    folded, many = Folded(cases.dense()), Folded._MANY
    values = torch.randn(2 * many + 5)
    found = [folded._checksum(values)]
    for place in (0, many + 3, 2 * many + 4):
        values[place] += 1
        found.append(folded._checksum(values))
    found.append(folded._checksum(torch.cat([values[many : 2 * many], values[:many], values[2 * many :]])))
    assert len({float(value) for value in found}) == 5
    assert all(len(probe) == many for probe in folded._probes.values())


def test_a_model_that_cannot_be_copied() -> None:
    model = Net()
    model.generator = (number for number in range(3))
    x = torch.rand(1, 3, 12, 14)
    assert equifast.purify(model, x).shape == x.shape


@pytest.mark.parametrize("value", [float("nan"), -float("inf"), 1e5])
def test_a_buffer_that_drowns_sums_hides_no_change(value: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)).eval().requires_grad_(False)
    model.register_buffer("mask", torch.full((8, 8), value))
    folded, x = Folded(model), cases.images(2)

    def run(net: nn.Module, images: Tensor) -> Tensor:
        return net(images)

    assert folded(x, run) is not model
    for change in (
        lambda: model[2].bias.data.add_(1e-3),
        lambda: model[1].weight.data.mul_(-3),
        lambda: model[0].weight.data.mul_(1.01),
    ):
        change()
        torch.testing.assert_close(folded(x, run)(x), model(x), atol=1e-5, rtol=1e-5)
