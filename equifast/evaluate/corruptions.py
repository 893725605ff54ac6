"""The fifteen common corruptions of Hendrycks and Dietterich (2019), by the package ``imagecorruptions-imaug``.

But for elastic transforms, which are another thing there: no affine part, and strengths that go with the image's size.
"""

import contextlib
import sys
import threading
from collections.abc import Iterator
from importlib import metadata
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from equifast import _checks

__all__ = ["CORRUPTIONS", "SEVERITIES", "corrupt", "version"]

CORRUPTIONS = (
    *("gaussian_noise", "shot_noise", "impulse_noise"),
    *("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    *("snow", "frost", "fog", "brightness"),
    *("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
)
"""Noise, blur, weather and digital, in the order of the paper's tables."""

SEVERITIES = (1, 2, 3, 4, 5)

_LEAST = 32
_LOCK = threading.Lock()


def _library() -> ModuleType:
    path = list(sys.path)
    try:
        import imagecorruptions
    except ModuleNotFoundError as error:
        raise RuntimeError(
            f"corruptions need imagecorruptions-imaug, which cannot be imported ({error}); "
            "pip install it, or equifast with the extra 'corruptions'"
        ) from None
    except ImportError as error:
        sys.path[:] = path  # OpenCV leaves a folder of its own there, whose "typing" hides Python's
        raise RuntimeError(
            f"corruptions need OpenCV, which does not load here ({error}); its build without windows needs no such "
            "library: pip install --force-reinstall --no-deps opencv-python-headless"
        ) from None
    module: ModuleType = imagecorruptions
    return module


def version() -> str:
    """Of the package, or that it is not there."""
    try:
        return metadata.version("imagecorruptions-imaug")
    except metadata.PackageNotFoundError:
        return "not installed"


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """NumPy's global state, and generators that are asked for without a seed, as the library uses both."""
    made = np.random.default_rng

    def default_rng(given: Any = None) -> np.random.Generator:
        return made(seed if given is None else given)

    with _LOCK:
        before = np.random.get_state()  # noqa: NPY002
        np.random.seed(seed)  # noqa: NPY002
        try:
            with mock.patch.object(np.random, "default_rng", default_rng):
                yield
        finally:
            np.random.set_state(before)  # noqa: NPY002


# Of elastic transforms, by severity, in pixels: how far displacements may go before they are smoothed, the standard
# deviation of the Gaussian that smooths them, and how far the corners of the affine part may go. Those of ImageNet-C
# (make_imagenet_c.py), whatever the size of an image.
_ELASTIC = ((488.0, 170.8, 24.4), (488.0, 19.52, 48.8), (12.2, 2.44, 4.88), (17.08, 2.44, 4.88), (29.28, 2.44, 4.88))


def _deformation(
    height: int, width: int, severity: int, generator: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float64]]:
    """Three corners of a square, (3, 2) as x and y, where they go, and displacements (2, H, W) as y and x."""
    from scipy.ndimage import gaussian_filter

    far, smooth, corners = _ELASTIC[severity - 1]
    side = min(height, width) // 3
    before = np.array([width // 2, height // 2], np.float32) + side * np.array([[1, 1], [1, -1], [-1, -1]], np.float32)
    after = before + generator.uniform(-corners, corners, before.shape).astype(np.float32)
    raw = generator.uniform(-1, 1, (2, height, width))
    moved = [far * gaussian_filter(part, smooth, mode="reflect", truncate=3) for part in raw]
    return before, after, np.stack(moved)


def _elastic(image: NDArray[np.uint8], severity: int, generator: np.random.Generator) -> NDArray[np.uint8]:
    """An affine map that moves three corners, and then a smooth displacement of every pixel."""
    import cv2
    from scipy.ndimage import map_coordinates

    height, width = image.shape[:2]
    before, after, moved = _deformation(height, width, severity, generator)
    matrix = cv2.getAffineTransform(before, after)
    turned = cv2.warpAffine(image.astype(np.float32), matrix, (width, height), borderMode=cv2.BORDER_REFLECT_101)
    places = np.mgrid[:height, :width] + moved
    found = [map_coordinates(turned[:, :, channel], places, order=1, mode="reflect") for channel in range(3)]
    return np.stack(found, 2).clip(0, 255).astype(np.uint8)


def corrupt(x: Tensor, name: str, severity: int, ids: Tensor | None = None, seed: int = 0) -> Tensor:
    """Corrupt a batch, as uint8 images, with the strengths of ImageNet-C.

    Those of CIFAR-10-C, which is published as images, are less, so that figures on such small images do not compare.

    Args:
        x: (N, 3, H, W), floating point, in [0, 1], sides of at least 32.
        name: one of :data:`CORRUPTIONS`.
        severity: 1 to 5.
        ids: (N,) int64: which random numbers each image gets; all 0 where None.
        seed: 0..2**32-1.

    Returns:
        (N, 3, H, W) in the dtype of ``x``, multiples of 1/255. An image's result does not depend on the rest of the
        batch, nor on NumPy's global state, which stays as it was.

    Raises:
        ValueError: for a name or severity that there is none of, or images that are too small.
        RuntimeError: if the package is not there, or OpenCV, which it uses, does not load.
    """
    _checks.choice("name", name, CORRUPTIONS)
    _checks.integer("severity", severity, 1, 5)
    _checks.integer("seed", seed, 0, 2**32 - 1)
    x = _checks.images("x", x, channels=3)
    numbers = _checks.ids(ids, len(x), x.device)
    if len(x) and min(x.shape[2:]) < _LEAST:
        raise ValueError(f"x has shape {_checks.shape(x)}; corruptions take sides of at least {_LEAST}")
    library = _library()
    pixels = (255 * x.detach().float()).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy(force=True)
    place = CORRUPTIONS.index(name)
    parts = []
    for image, number in zip(pixels, numbers.tolist(), strict=True):
        entropy = np.random.SeedSequence([seed, number % 2**64, place, severity])
        if name == "elastic_transform":
            parts.append(_elastic(image, severity, np.random.default_rng(entropy)))
            continue
        with _seeded(int(entropy.generate_state(1)[0])):
            parts.append(library.corrupt(image, corruption_name=name, severity=severity))
    if not parts:
        return x.detach().clone()
    found = torch.from_numpy(np.stack(parts)).to(x.device, x.dtype)
    return (found / 255).permute(0, 3, 1, 2).contiguous()
