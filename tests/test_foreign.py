"""Attack libraries that know nothing of equifast attack its models unmodified."""

import importlib
import os
from typing import Any

import cases
import pytest
import torch
from torch import Tensor

from equifast import Defended, Purifier, attacks, views

MODEL = cases.classifier().eval()
X = cases.images(4, 16, 16)
with torch.no_grad():
    Y = MODEL(X).argmax(1)


def library(name: str) -> Any:
    """Of somebody else; absent, a test is left out, but not where all are installed."""
    return importlib.import_module(name) if os.environ.get("CI") else pytest.importorskip(name, exc_type=ImportError)


def drop(model: torch.nn.Module, adversarial: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.nn.functional.cross_entropy(model(adversarial), Y) - torch.nn.functional.cross_entropy(model(X), Y)


@pytest.mark.parametrize("model", [MODEL, Defended(MODEL, Purifier(MODEL, "features", steps=2))])
@pytest.mark.filterwarnings("ignore")  # theirs, not ours
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("PGD", {"alpha": 2 / 255, "steps": 5}),
        ("MIFGSM", {"alpha": 2 / 255, "steps": 5}),
        ("APGD", {"steps": 5}),
    ],
)
def test_torchattacks(model: torch.nn.Module, name: str, settings: dict[str, float]) -> None:
    torchattacks = library("torchattacks")
    adversarial = getattr(torchattacks, name)(model, eps=8 / 255, **settings)(X, Y)
    assert (adversarial - X).abs().max() <= 8 / 255 + 1e-6
    assert drop(model, adversarial) > 0


@pytest.mark.parametrize("model", [MODEL, Defended(MODEL, Purifier(MODEL, "features", steps=2))])
@pytest.mark.filterwarnings("ignore")
def test_foolbox(model: torch.nn.Module) -> None:
    foolbox = library("foolbox")
    wrapped = foolbox.PyTorchModel(model.eval(), bounds=(0, 1))
    _, adversarial, _ = foolbox.attacks.LinfPGD(steps=5)(wrapped, X, Y, epsilons=8 / 255)
    assert (adversarial - X).abs().max() <= 8 / 255 + 1e-6
    assert drop(model, adversarial) > 0


# what AutoAttack takes thousands of forward passes through
CHEAP = Purifier(MODEL, "features", steps=1, views=[views.Flip()], average=False)


@pytest.mark.parametrize("model", [MODEL, Defended(MODEL, CHEAP)])
@pytest.mark.filterwarnings("ignore")
def test_autoattack(model: torch.nn.Module) -> None:
    torchattacks = library("torchattacks")
    x, y = X[:2], Y[:2]
    adversarial = torchattacks.AutoAttack(model, eps=16 / 255, n_classes=5)(x, y)
    assert (adversarial - x).abs().max() <= 16 / 255 + 1e-6
    with torch.no_grad():
        turned = model(adversarial).argmax(1) != y
    assert bool(turned.any())


@pytest.mark.parametrize("model", [MODEL, Defended(MODEL, CHEAP)])
@pytest.mark.parametrize(("name", "settings"), [("FAB", {"steps": 3, "n_classes": 5}), ("Square", {"n_queries": 50})])
@pytest.mark.filterwarnings("ignore")
def test_what_autoattack_keeps_for_last(model: torch.nn.Module, name: str, settings: dict[str, Any]) -> None:
    """Its other two, which it does not come to where those before have turned every image."""
    torchattacks = library("torchattacks")
    adversarial = getattr(torchattacks, name)(model, eps=16 / 255, n_restarts=1, **settings)(X, Y)
    assert (adversarial - X).abs().max() <= 16 / 255 + 1e-6
    with torch.no_grad():
        assert bool((model(adversarial).argmax(1) != Y).any())


@pytest.mark.parametrize("model", [MODEL, Defended(MODEL, Purifier(MODEL, "features", steps=2))])
@pytest.mark.parametrize("name", ["ProjectedGradientDescentPyTorch", "AutoProjectedGradientDescent"])
@pytest.mark.filterwarnings("ignore")
def test_art(model: torch.nn.Module, name: str) -> None:
    evasion = library("art.attacks.evasion")
    estimators = library("art.estimators.classification")
    loss = torch.nn.CrossEntropyLoss()
    wrapped = estimators.PyTorchClassifier(model, loss, (3, 16, 16), 5, clip_values=(0, 1), device_type="cpu")
    settings = {"eps": 8 / 255, "eps_step": 2 / 255, "max_iter": 5, "verbose": False}
    found = getattr(evasion, name)(wrapped, **settings).generate(X.numpy(), Y.numpy())
    adversarial = torch.from_numpy(found)
    assert (adversarial - X).abs().max() <= 8 / 255 + 1e-6
    assert drop(model, adversarial) > 0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ((attacks.PGD, {"step_size": 1 / 255}), ("PGD", {"alpha": 1 / 255})),
        ((attacks.MIM, {}), ("MIFGSM", {"alpha": 1 / 255})),
        ((attacks.APGD, {}), ("APGD", {})),
        ((attacks.APGD, {"objective": "dlr"}), ("APGD", {"loss": "dlr"})),
        ((attacks.APGD, {"objective": "targeted-dlr", "restarts": 3}), ("APGDT", {"n_classes": 5})),
    ],
)
def test_ours_turn_as_many_as_theirs(ours: tuple[Any, dict[str, Any]], theirs: tuple[str, dict[str, Any]]) -> None:
    """Or one point less, of images of which a good part can be turned and a good part cannot."""
    torchattacks = library("torchattacks")
    x, settings = cases.images(200, 16, 16), {"eps": 4 / 255, "steps": 20}
    with torch.no_grad():
        y = MODEL(x).argmax(1)
        torch.manual_seed(0)
        with torch.enable_grad():
            found = (
                ours[0](MODEL, **settings, **ours[1])(x, y),
                getattr(torchattacks, theirs[0])(MODEL, **settings, **theirs[1])(x, y),
            )
        mine, other = (100 * float((MODEL(images).argmax(1) != y).float().mean()) for images in found)
    assert 40 < other < 90
    assert mine >= other - 1
