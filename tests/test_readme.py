"""The Python of README.md runs as it stands there, on small models and with fewer steps."""

import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import cases
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import TensorDataset

from equifast import Defended, Purifier

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
# What would take long, and how it is said to take less.
QUICK = {
    "attacks.PGD(model": "attacks.PGD(model, steps=1",
    "steps=100": "steps=1",
    "attacks.CosPGD(model": "attacks.CosPGD(model, steps=1",
    "Strength(eps=4 / 255": "Strength(eps=4 / 255, steps=1, eot=1, queries=1, last=1",
    "images=24, size=(176, 240)": "images=2, size=(12, 16)",
    "epochs=20": "epochs=1",
    "certify.clever(model, x": "certify.clever(model, x[:1], samples=2, blocks=4",
}


def quick(code: str) -> str:
    for there, instead in QUICK.items():
        code = code.replace(there, instead)
    return code


def classifier() -> nn.Module:
    torch.manual_seed(0)
    layers = {
        "layer4": nn.Conv2d(3, 4, 3, 2, 1),
        "relu": nn.ReLU(),
        "pool": nn.AdaptiveAvgPool2d(1),
        "flat": nn.Flatten(),
    }
    return nn.Sequential(OrderedDict(**layers, head=nn.Linear(4, 10))).eval()


def names(number: int, folder: Path) -> dict[str, Any]:
    """What the text says that a block is given."""
    if number == 3:
        model = cases.dense().eval()
        return {"model": model, "defended": Defended(model, Purifier(model, steps=1))}
    x = cases.images(4, 32, 32)
    y = torch.arange(4)
    model = classifier()
    dataset = TensorDataset(x, y)
    loader = [cases.images(20, 32, 32, seed=1)]
    return {"model": model, "x": x, "y": y, "loader": loader, "dataset": dataset, "network": model}


def test_all_blocks_are_here() -> None:
    assert len(BLOCKS) == 5
    assert all(any(there in code for code in BLOCKS) for there in QUICK)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_runs(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for kind in ("images", "labels"):
        (tmp_path / "camvid" / "test" / kind).mkdir(parents=True)
        for i, image in enumerate(cases.images(2, 12, 16)):
            pixels = (
                (image * 255).byte().permute(1, 2, 0).numpy() if kind == "images" else np.full((12, 16), i, np.uint8)
            )
            Image.fromarray(pixels).save(tmp_path / "camvid" / "test" / kind / f"{i}.png")
    known = names(number, tmp_path)
    if number == 1:  # goes on from the first
        exec(quick(BLOCKS[0]), known)
    exec(quick(BLOCKS[number]), known)
    if "build" in known:
        known["build"]()(cases.images(1, 32, 32))
