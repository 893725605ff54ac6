"""What `equifast demo` runs on: a small segmentation network and sixteen scenes that it never saw."""

import io
from importlib.resources import files

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load
from torch import Tensor, nn

from equifast.demo.network import SceneNet

__all__ = ["CLASSES", "PALETTE", "SceneNet", "load_model", "load_scenes"]

CLASSES: tuple[str, ...] = (*"0123456789", "background")

PALETTE: tuple[tuple[int, int, int], ...] = (
    (230, 60, 60),
    (245, 150, 40),
    (250, 220, 70),
    (130, 200, 60),
    (30, 140, 80),
    (80, 210, 210),
    (50, 120, 220),
    (120, 80, 200),
    (225, 110, 215),
    (160, 105, 65),
    (40, 44, 52),
)

_ASSETS = files("equifast.demo") / "assets"
_SCENES = 16


def load_model() -> nn.Module:
    """The trained network in eval mode, on the CPU: images (N, 3, H, W) in [0, 1] -> logits (N, 11, H, W).

    ``stem`` and ``stage1`` to ``stage4`` are its submodules to compare features at. Trained on clean scenes,
    by ``bench/train_demo.py``; it resists no attack by itself.
    """
    model = SceneNet(len(CLASSES))
    model.load_state_dict(load((_ASSETS / "demo.safetensors").read_bytes()))
    return model.eval()


def load_scenes() -> tuple[Tensor, Tensor]:
    """The bundled scenes, made of digits that the network was not trained on.

    Returns:
        Images (16, 3, 96, 128) float32 in [0, 1], and labels (16, 96, 128) int64: indices into ``CLASSES``,
        or 255, which does not count (the rim of a digit).
    """
    images = np.stack([_read(f"scene_{index:02}.png") for index in range(_SCENES)])
    labels = np.stack([_read(f"scene_{index:02}_label.png") for index in range(_SCENES)])
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255, torch.from_numpy(labels).long()


def _read(name: str) -> np.ndarray:
    with Image.open(io.BytesIO((_ASSETS / name).read_bytes())) as image:
        return np.array(image)
