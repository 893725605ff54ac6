"""Attack libraries that know nothing of equifast attack its models unmodified."""

import cases
import pytest
import torch
from torch import Tensor

from equifast import Defended, Purifier, attacks

MODEL = cases.classifier().eval()
X = cases.images(4, 16, 16)
with torch.no_grad():
    Y = MODEL(X).argmax(1)


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
        ("Square", {"n_queries": 40}),
    ],
)
def test_torchattacks(model: torch.nn.Module, name: str, settings: dict[str, float]) -> None:
    torchattacks = pytest.importorskip("torchattacks", exc_type=ImportError)
    adversarial = getattr(torchattacks, name)(model, eps=8 / 255, **settings)(X, Y)
    assert (adversarial - X).abs().max() <= 8 / 255 + 1e-6
    if name != "Square":  # which finds nothing in so few queries
        assert drop(model, adversarial) > 0


@pytest.mark.parametrize("model", [MODEL, Defended(MODEL, Purifier(MODEL, "features", steps=2))])
@pytest.mark.filterwarnings("ignore")
def test_foolbox(model: torch.nn.Module) -> None:
    foolbox = pytest.importorskip("foolbox")
    wrapped = foolbox.PyTorchModel(model.eval(), bounds=(0, 1))
    _, adversarial, _ = foolbox.attacks.LinfPGD(steps=5)(wrapped, X, Y, epsilons=8 / 255)
    assert (adversarial - X).abs().max() <= 8 / 255 + 1e-6
    assert drop(model, adversarial) > 0


@pytest.mark.filterwarnings("ignore")
def test_our_pgd_is_as_strong_as_theirs() -> None:
    torchattacks = pytest.importorskip("torchattacks", exc_type=ImportError)
    torch.manual_seed(0)
    theirs = torchattacks.PGD(MODEL, eps=8 / 255, alpha=2 / 255, steps=20)(X, Y)
    ours = attacks.PGD(MODEL, eps=8 / 255, step_size=2 / 255, steps=20)(X, Y)
    assert drop(MODEL, ours) > 0.98 * drop(MODEL, theirs)
