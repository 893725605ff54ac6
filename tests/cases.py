"""Tables of cases that tests and benchmarks share. A new view, attack or defense is one row here."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from equifast import attacks, defenses, views
from equifast.detectors import OutputVariance
from equifast.purifier import Defended, Purifier

VIEWS: dict[str, views.View] = {
    "identity": views.View(),
    "flip": views.Flip(),
    "flip-vertical": views.Flip(vertical=True),
    "enlarge": views.Resize(2.0),
    "shrink": views.Resize(0.3, (0.8, 1.2)),
    "resize-range": views.Resize((0.5, 1.5), (0.8, 1.2)),
    "rotation": views.Rotation(15),
    "rotation-90": views.Rotation(90),
    "turn": views.Turn(1),
    "shift": views.Shift(0.2),
    "jitter": views.ColorJitter(),
    "composed": views.Compose(
        views.ColorJitter(), views.Resize(0.7), views.Flip(), views.Rotation(30), views.Shift(0.1)
    ),
}

# theta as rows; each applies to a whole batch
THETAS: dict[str, list[list[float]]] = {
    "identity": [[1, 0, 0], [0, 1, 0]],
    "flip": [[-1, 0, 0], [0, 1, 0]],
    "rotation": [[math.cos(0.3), -math.sin(0.3), 0], [math.sin(0.3), math.cos(0.3), 0]],
    "shift": [[1, 0, 0.37], [0, 1, -0.21]],
    "zoom-out": [[2, 0, 0], [0, 2, 0]],
    "shear": [[1, 0.4, 0], [0, 1, 0.1]],
    "outside": [[1, 0, 5], [0, 1, 0]],
    "huge": [[1e9, 0, 0], [0, 1e9, 3e8]],
}


def theta(name: str, n: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    """(1, N, 2, 3)"""
    return torch.tensor(THETAS[name], dtype=dtype).repeat(1, n, 1, 1)


def _dense_part(model: nn.Module) -> str | None:
    return "features" if isinstance(model, Classifier) else None


def _watchful(model: nn.Module) -> OutputVariance:
    """A detector for images of any size, which flags about every second one."""
    return OutputVariance(model, dtype="float32").fit([images(6, seed=3)], false_positive_rate=0.5)


# attacks: every one must raise the loss, stay in its ball, and be independent of the batch
ATTACKS: dict[str, Callable[[Any], attacks.Attack]] = {
    "fgsm": lambda model: attacks.FGSM(model),
    "pgd": lambda model: attacks.PGD(model, steps=5),
    "pgd-l2": lambda model: attacks.PGD(model, steps=5, norm="l2", eps=0.5, step_size=0.15),
    "pgd-restarts": lambda model: attacks.PGD(model, steps=3, restarts=2, keep="best"),
    "mim": lambda model: attacks.MIM(model, steps=5),
    "ifgsm": lambda model: attacks.IFGSM(model),
    "cw": lambda model: attacks.CW(model, steps=5, confidence=1.0),
    "cw-restarts": lambda model: attacks.CW(model, steps=3, restarts=2, keep="best", start="corner"),
    "houdini": lambda model: attacks.Houdini(model, steps=5),
    "houdini-l2": lambda model: attacks.Houdini(model, steps=5, norm="l2", eps=0.5, step_size=0.15),
    "segpgd": lambda model: attacks.SegPGD(model, steps=5),
    "cospgd": lambda model: attacks.CosPGD(model, steps=5, restarts=2),
    "apgd": lambda model: attacks.APGD(model, steps=8),
    "apgd-l2": lambda model: attacks.APGD(model, steps=8, norm="l2", eps=0.5, objective="dlr"),
    "apgd-targeted": lambda model: attacks.APGD(model, steps=5, objective="targeted-dlr", restarts=2),
    "adaptive": lambda model: attacks.Adaptive(model, Purifier(model, _dense_part(model)), steps=4, weight=(0, 0.3)),
    "evading": lambda model: attacks.Evading(model, _watchful(model), steps=6, step_size=1 / 255),
    "square": lambda model: attacks.Square(model, steps=40),
}


def fitted(purifier: Any) -> Any:
    """A defense with a head, after a short training."""
    return purifier.fit([images(12, seed=1), images(4, seed=2)], epochs=5)


# defenses: image to image
PURIFIERS: dict[str, Callable[[nn.Module], Any]] = {
    "fast": lambda model: Purifier(model, preset="fast"),
    "paper": lambda model: Purifier(model, preset="paper", steps=3),
    "strong": lambda model: Purifier(model, preset="strong"),
    "all-pairs": lambda model: Purifier(model, steps=2, pairing="all"),
    "anchor": lambda model: Purifier(model, steps=2, view_gradient=1),
    "pixel": lambda model: Purifier(model, steps=2, reduction="pixel"),
    "log-probabilities": lambda model: Purifier(model, steps=2, temperature=2.0),
    "anchor-pixel": lambda model: Purifier(model, steps=2, view_gradient=1, reduction="pixel"),
    "l2": lambda model: Purifier(model, steps=2, norm="l2", eps=1.0, noise=True, start="uniform"),
    "restarts": lambda model: Purifier(model, steps=2, restarts=2, keep="best", momentum=0.9),
    "stopping": lambda model: Purifier(model, steps=3, stop=0.9),
    "invariance": lambda model: defenses.Invariance(model, steps=2),
    "rotation": lambda model: fitted(defenses.Rotation(model, steps=2)),
    "contrastive": lambda model: fitted(defenses.Contrastive(model, steps=2)),
    "random": lambda model: defenses.RandomNoise(),
    "random-normal": lambda model: defenses.RandomNoise(0.05, "normal"),
}

# defended models: image to logits
DEFENDED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "averaging": lambda model: defenses.Averaging(model),
    "purified": lambda model: Defended(model, Purifier(model, steps=2)),
    "purified-averaged": lambda model: Defended(model, Purifier(model, preset="strong", steps=2)),
    "unrolled": lambda model: Defended(model, Purifier(model, steps=2), gradient="unrolled", last=2),
    "random": lambda model: Defended(model, defenses.RandomNoise()),
}


class DenseNet(nn.Module):
    """A small dense model with batch norm and odd strides, with a dict output if asked."""

    def __init__(self, classes: int = 5, as_dict: bool = False) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 2, dilation=2), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Conv2d(8, classes, 1)
        self.as_dict = as_dict

    def forward(self, x: Tensor) -> Any:
        logits = self.head(self.body(self.stem(x)))
        logits = nn.functional.interpolate(logits, x.shape[2:], mode="bilinear", align_corners=False)
        return {"out": logits, "aux": logits} if self.as_dict else logits


class InPlace(DenseNet):
    """Its first operation works in place, on what it is given."""

    def forward(self, x: Tensor) -> Any:
        x -= 0.25
        return super().forward(x)


class Classifier(nn.Module):
    """A small classifier; its dense features end at ``features``."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        pooled: Tensor = self.pool(self.features(x))
        logits: Tensor = self.head(pooled.flatten(1))
        return logits


def dense(seed: int = 0, **settings: Any) -> DenseNet:
    torch.manual_seed(seed)
    return _spread(DenseNet(**settings))


def classifier(seed: int = 0) -> Classifier:
    torch.manual_seed(seed)
    return _spread(Classifier())


def _spread(model: Any) -> Any:
    # default weights are so small that a random network hardly reacts to its input
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2)
    return model


def images(n: int = 2, height: int = 20, width: int = 28, seed: int = 0) -> Tensor:
    """(N, 3, H, W) smooth images in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, max(1, height // 4), max(1, width // 4), generator=generator)
    return nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
