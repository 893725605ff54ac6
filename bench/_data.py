"""CamVid and CIFAR-10 as tensors."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
CAMVID_CLASSES = 11
VOID = 255
CAMVID_SIZE = (176, 240)  # height, width


def _existing(path: Path) -> Path:
    if not path.exists():
        raise SystemExit(f"data: {path} is absent; --data must name the folder of camvid/ and cifar10/")
    return path


def spread(total: int, count: int) -> list[int]:
    """`count` indices evenly over range(total), so that a few images come from every drive or class."""
    if not 0 < count <= total:
        raise SystemExit(f"--images is {count}; it must be from 1 to {total}")
    return np.linspace(0, total - 1, count).round().astype(int).tolist()


def load_camvid(
    data: Path = DATA, split: str = "test", images: int | None = None, size: tuple[int, int] = CAMVID_SIZE
) -> tuple[Tensor, Tensor]:
    """Images (N,3,H,W) float32 in [0,1] and labels (N,H,W) int64, 11 classes and 255 void, by file name."""
    folder = _existing(Path(data) / "camvid" / split)
    paths = sorted((folder / "images").glob("*.jpg"))
    if not paths:
        raise SystemExit(f"data: {folder / 'images'} holds no JPEG files")
    if images is not None:
        paths = [paths[i] for i in spread(len(paths), images)]
    pixels, labels = [], []
    for path in paths:
        with Image.open(path) as image:  # PIL's bilinear resize is antialiased
            resized = image.convert("RGB").resize(size[::-1], Image.Resampling.BILINEAR)
            pixels.append(torch.from_numpy(np.array(resized)))
        with Image.open(_existing(folder / "labels" / f"{path.stem}.png")) as image:
            labels.append(torch.from_numpy(np.array(image.resize(size[::-1], Image.Resampling.NEAREST))))
    return torch.stack(pixels).permute(0, 3, 1, 2).float().div_(255).contiguous(), torch.stack(labels).long()


def load_cifar(data: Path = DATA, split: str = "test", images: int | None = None) -> tuple[Tensor, Tensor]:
    """Images (N,3,32,32) float32 in [0,1] and labels (N,) int64."""
    with np.load(_existing(Path(data) / "cifar10" / f"{split}.npz")) as arrays:
        pixels, labels = torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["labels"])
    if images is not None:
        chosen = spread(len(labels), images)
        pixels, labels = pixels[chosen], labels[chosen]
    return pixels.permute(0, 3, 1, 2).float().div_(255).contiguous(), labels
