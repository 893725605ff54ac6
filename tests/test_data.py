"""On real images, where the data for measuring is at hand; the package's promises must hold there too."""

import sys
from pathlib import Path

import pytest
import torch

from equifast import Defended, Purifier, attacks

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))


def test_cifar_resnet(data: Path) -> None:
    """A trained ResNet-20: nothing withstands undefended, `fast` gives most of it back, batch-independently."""
    from _data import load_cifar
    from _models import CifarResNet, load_weights

    model = load_weights(CifarResNet(20), data / "cifar10" / "resnet20.safetensors").eval()
    x, y = load_cifar(data, "test", 64)
    adversarial = attacks.PGD(model, eps=2 / 255, step_size=0.5 / 255, steps=20)(x, y)
    purifier = Purifier(model, "layer3", eps=4 / 255)
    with torch.no_grad():
        accuracy = [
            float((network(images).argmax(1) == y).float().mean())
            for network, images in ((model, x), (model, adversarial), (Defended(model, purifier), adversarial))
        ]
    assert accuracy[0] > 0.7
    assert accuracy[1] < 0.1
    assert accuracy[2] > 0.35
    purified = purifier(adversarial[:4])
    assert torch.equal(torch.cat([purifier(adversarial[i : i + 1]) for i in range(4)]), purified)


def test_camvid_is_split_by_drives(tmp_path: Path) -> None:
    """What choices are made on: one drive that the network on the rest has not seen, and the ends of the others."""
    import numpy as np
    from _data import load_camvid
    from PIL import Image

    folder, shade = tmp_path / "camvid" / "train", 0
    for part in ("images", "labels"):
        (folder / part).mkdir(parents=True)
    for drive, count in (("0001TP", 9), ("0006R0", 3), ("0016E5", 4), ("Seq05VD", 3)):
        for i in range(count):
            name, shade = f"{drive}_{i:05d}", shade + 10
            Image.new("RGB", (8, 6), (shade,) * 3).save(folder / "images" / f"{name}.jpg", quality=100)
            Image.fromarray(np.zeros((6, 8), np.uint8)).save(folder / "labels" / f"{name}.png")
    shades = {}
    for split in ("train", "rest", "drives"):
        x, _ = load_camvid(tmp_path, split, size=(6, 8))
        shades[split] = (255 * x[:, 0, 0, 0] / 10).round().int().tolist()
    assert shades["drives"] == [8, 9, 10, 11, 12, 16]
    assert sorted(shades["drives"] + shades["rest"]) == shades["train"] == list(range(1, 20))
    assert len(load_camvid(tmp_path, "drives", 2, size=(6, 8))[0]) == 2


def test_camvid_loads(data: Path) -> None:
    from _data import load_camvid

    x, y = load_camvid(data, "test", 2)
    assert x.shape == (2, 3, 176, 240)
    assert set(y.unique().tolist()) <= {*range(11), 255}
    with pytest.raises(SystemExit, match="must name the folder"):
        load_camvid(data / "nowhere", "test", 2)
