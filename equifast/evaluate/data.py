"""Labeled images from files: what an evaluation runs on."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

__all__ = ["SUFFIXES", "Arrays", "ClassFolders", "Images", "LabelFolders", "first_line", "open_data", "open_images"]

SUFFIXES = (".jpeg", ".jpg", ".png", ".webp")

Item = tuple[Tensor, Tensor]
"""An image (3, H, W) float32 in [0, 1], and its label: a number, or (H, W), int64."""


def _pick(total: int, count: int | None, what: str) -> list[int]:
    """Indices evenly over a data set, so that a few images are of all of it."""
    if total == 0:
        raise ValueError(f"{what} has no images")
    if count is None:
        return list(range(total))
    if not 1 <= count <= total:
        raise ValueError(f"images is {count}; {what} has {total}")
    return [int(i) for i in np.linspace(0, total - 1, count).round()]


def first_line(error: BaseException) -> str:
    """What an exception says, and where it was, in one line."""
    said = (str(error).strip() or type(error).__name__).splitlines()[0]
    said = f"{type(error).__name__}: {said}" if isinstance(error, LookupError) else said  # of which that is a key
    return "; ".join([said, *(note.splitlines()[0] for note in getattr(error, "__notes__", []) if note)])


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """What goes wrong with a file names it, and is a ValueError or an OSError."""
    try:
        yield
    except Exception as error:  # Pillow, NumPy and zipfile raise many kinds for broken files
        if isinstance(error, OSError) and error.filename is not None:
            raise
        raise ValueError(f"{path} cannot be read: {first_line(error)}") from error


def upright(file: Image.Image) -> Image.Image:
    """An image of 8 bits per channel in RGB, turned as its file says it is seen; transparency is dropped.

    Raises:
        ValueError: if it has more bits.
    """
    if file.mode.startswith(("I", "F")):
        raise ValueError(f"it has pixels of mode {file.mode}; it must have 8 bits per channel")
    return ImageOps.exif_transpose(file).convert("RGB")


class Arrays(Dataset[Item]):
    """An ``.npz`` file with ``images``, uint8 (N, H, W, 3), and ``labels``, integers (N,) or (N, H, W).

    Args:
        path: the file.
        images: how many, evenly over all of them; None for all.
    """

    def __init__(self, path: Path, images: int | None = None) -> None:
        with _reading(path), path.open("rb") as file, np.load(file) as arrays:
            found = {name: arrays[name] for name in arrays.files if name in ("images", "labels")}
            names = ", ".join(arrays.files) or "nothing"
        if len(found) < 2:
            raise ValueError(f"{path} has {names}; it must have images and labels")
        pixels, labels = found["images"], found["labels"]
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3 or len(pixels) != len(labels):
            raise ValueError(
                f"{path} has images {pixels.shape} of {pixels.dtype} and {len(labels)} labels; "
                "it must have as many, uint8 (N, H, W, 3)"
            )
        if labels.dtype.kind not in "iu" or labels.ndim not in (1, 3):
            raise ValueError(
                f"{path} has labels {labels.shape} of {labels.dtype}; they must be integers, (N,) or (N, H, W)"
            )
        rows = _pick(len(labels), images, str(path))
        self._pixels, self._labels = pixels[rows], labels[rows].astype(np.int64)

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Item:
        pixels = torch.from_numpy(self._pixels[index]).permute(2, 0, 1)
        return pixels.float().div(255).contiguous(), torch.as_tensor(self._labels[index])


class _Files(Dataset[Item]):
    """Image files, resized where a size is given."""

    def __init__(self, paths: list[Path], folder: Path, images: int | None, size: tuple[int, int] | None) -> None:
        self._paths = [paths[i] for i in _pick(len(paths), images, str(folder))]
        self._size = size

    def __len__(self) -> int:
        return len(self._paths)

    def _image(self, path: Path) -> Tensor:
        with _reading(path), Image.open(path) as file:
            image = upright(file)
        if self._size is not None:  # PIL's bilinear resize is antialiased
            image = image.resize(self._size[::-1], Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div(255).contiguous()


def _images_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)


def _folders_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith((".", "__")))


class Images(_Files):
    """The image files of a folder, without labels: each has 0.

    Args:
        folder, images, size: as for :class:`LabelFolders`.
    """

    def __init__(self, folder: Path, images: int | None = None, size: tuple[int, int] | None = None) -> None:
        super().__init__(_images_in(folder), folder, images, size)

    def __getitem__(self, index: int) -> Item:
        return self._image(self._paths[index]), torch.tensor(0)


class LabelFolders(_Files):
    """A folder with ``images`` and ``labels``: PNG files of the same names, a pixel's class its gray value, 255 none.

    Args:
        folder: that folder.
        images: how many, evenly over all of them by name; None for all.
        size: (height, width) to which both are resized; None for none.
    """

    def __init__(self, folder: Path, images: int | None = None, size: tuple[int, int] | None = None) -> None:
        super().__init__(_images_in(folder / "images"), folder / "images", images, size)
        self._labels = [folder / "labels" / f"{path.stem}.png" for path in self._paths]
        for path in self._labels:
            if not path.is_file():
                raise ValueError(f"{path} is not there; every image must have a file of labels")

    def __getitem__(self, index: int) -> Item:
        path = self._labels[index]
        with _reading(path), Image.open(path) as file:
            mode = file.mode
            label = np.array(file if self._size is None else file.resize(self._size[::-1], Image.Resampling.NEAREST))
        if mode not in ("L", "P"):
            raise ValueError(f"{path} has mode {mode}; it must be gray or indexed")
        y = torch.from_numpy(label).long()
        x = self._image(self._paths[index])
        if x.shape[1:] != y.shape:
            raise ValueError(f"{path} has size {tuple(y.shape)}; its image has {tuple(x.shape[1:])}")
        return x, y


class ClassFolders(_Files):
    """A folder with a folder of images for each class; classes are numbered in the order of their names.

    Folders whose names begin with a dot or two underscores are none.

    Args:
        folder, images, size: as for :class:`LabelFolders`.
    """

    def __init__(self, folder: Path, images: int | None = None, size: tuple[int, int] | None = None) -> None:
        names = _folders_in(folder)
        found = {name: _images_in(folder / name) for name in names}
        for name, paths in found.items():
            if not paths:
                raise ValueError(f"{folder / name} has no images; every folder there is a class")
        super().__init__([path for paths in found.values() for path in paths], folder, images, size)
        self._classes = {name: number for number, name in enumerate(names)}

    def __getitem__(self, index: int) -> Item:
        path = self._paths[index]
        return self._image(path), torch.tensor(self._classes[path.parent.name])


def open_data(
    path: str | Path, images: int | None = None, size: tuple[int, int] | None = None
) -> Arrays | LabelFolders | ClassFolders:
    """The labeled images that a path holds.

    Args:
        path: an ``.npz`` file (:class:`Arrays`), a folder with ``images`` and ``labels`` (:class:`LabelFolders`), or
            one with a folder for each class (:class:`ClassFolders`).
        images: how many, evenly over all of them; None for all.
        size: (height, width) to which files are resized; None for none.

    Raises:
        ValueError: if it holds none, in one sentence.
        OSError: if it cannot be read.
    """
    path = Path(path)
    if path.suffix == ".npz":
        if size is not None:
            raise ValueError(f"size is given for {path}; arrays are taken as they are")
        return Arrays(path, images)
    if not path.is_dir():
        raise ValueError(f"{path} is neither a folder nor an .npz file")
    if (path / "images").is_dir() and (path / "labels").is_dir():
        return LabelFolders(path, images, size)
    return ClassFolders(path, images, size)


def open_images(
    path: str | Path, images: int | None = None, size: tuple[int, int] | None = None
) -> Arrays | Images | LabelFolders | ClassFolders:
    """Images whose labels do not count: a folder of image files alone (:class:`Images`), or as :func:`open_data`."""
    path = Path(path)
    plain = path.is_dir() and bool(_images_in(path)) and not _folders_in(path)
    return Images(path, images, size) if plain else open_data(path, images, size)
