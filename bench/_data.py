"""CamVid and CIFAR-10 as tensors."""

import itertools
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
CAMVID_CLASSES = 11
VOID = 255
CAMVID_SIZE = (176, 240)  # height, width
UNSEEN = "0006R0"  # a drive of the train split


def _existing(path: Path) -> Path:
    if not path.exists():
        raise SystemExit(f"data: {path} is absent; --data must name the folder of camvid/ and cifar10/")
    return path


def spread(total: int, count: int) -> list[int]:
    """`count` indices evenly over range(total), so that a few images come from every drive or class."""
    if not 0 < count <= total:
        raise SystemExit(f"--images is {count}; it must be from 1 to {total}")
    return np.linspace(0, total - 1, count).round().astype(int).tolist()


def _held_out(paths: list[Path]) -> set[Path]:
    """Of the train split: all of one drive and the last quarter of each other, as the test split is to it."""
    drives = [list(group) for _, group in itertools.groupby(paths, key=lambda path: path.stem.partition("_")[0])]
    kept = (0 if drive[0].stem.startswith(UNSEEN) else len(drive) - len(drive) // 4 for drive in drives)
    return {path for drive, first in zip(drives, kept, strict=True) for path in drive[first:]}


def load_camvid(
    data: Path = DATA, split: str = "test", images: int | None = None, size: tuple[int, int] = CAMVID_SIZE
) -> tuple[Tensor, Tensor]:
    """Images (N,3,H,W) float32 in [0,1] and labels (N,H,W) int64, 11 classes and 255 void, by file name.

    Beside the folders of CamVid the split is "drives", images of three drives held out of "train", on which choices can
    be made with a network that was trained on the others, "rest".
    """
    parts = {"drives": True, "rest": False}
    folder = _existing(Path(data) / "camvid" / ("train" if split in parts else split))
    paths = sorted((folder / "images").glob("*.jpg"))
    if not paths:
        raise SystemExit(f"data: {folder / 'images'} holds no JPEG files")
    if split in parts:
        held_out = _held_out(paths)
        paths = [path for path in paths if (path in held_out) == parts[split]]
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
