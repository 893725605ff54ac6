"""Synthetic scenes with dense labels: handwritten digits over textured, colored, shaded backgrounds.

The digits are those of scikit-learn (UCI Optical Recognition of Handwritten Digits, 8x8). Every fourth is
held out: scenes for training and held-out scenes never share a digit. Making scenes needs scikit-learn; the
package itself only reads the bundle.
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

__all__ = ["BACKGROUND", "HEIGHT", "VOID", "WIDTH", "make_scenes", "read_digits"]

WIDTH, HEIGHT = 128, 96
BACKGROUND, VOID = 10, 255

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)
_SUPERSAMPLING = 3  # outlines are decided on a grid this much finer; what it leaves undecided is the rim
_CONTRAST = 0.25  # of a digit to what it covers, at least, in luma: eight times an attack of 8/255


def read_digits(*, held_out: bool) -> tuple[Floats, NDArray[np.int64]]:
    """The digits of one side of the split: (n, 8, 8) ink in [0, 1] and (n,) classes 0..9."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    chosen = (np.arange(len(digits.target)) % 4 == 3) == held_out
    return (digits.images[chosen] / 16).astype(np.float32), digits.target[chosen].astype(np.int64)


def _noise(rng: np.random.Generator, cells: int, channels: int) -> Floats:
    """Smooth noise, about standard normal, ``cells`` bumps across the width: (HEIGHT, WIDTH, channels)."""
    grid = rng.standard_normal((channels, cells * HEIGHT // WIDTH + 2, cells + 2)).astype(np.float32)
    planes = [Image.fromarray(plane).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC) for plane in grid]
    return np.stack([np.asarray(plane) for plane in planes], axis=-1)


def _blob(rng: np.random.Generator) -> Floats:
    """The coverage of one ellipse, soft or sharp: (HEIGHT, WIDTH, 1) in [0, 1]."""
    y, x = np.mgrid[:HEIGHT, :WIDTH].astype(np.float32)
    angle = rng.uniform(0, np.pi)
    x, y = x - rng.uniform(0, WIDTH), y - rng.uniform(0, HEIGHT)
    u = (x * np.cos(angle) + y * np.sin(angle)) / rng.uniform(8, 40)
    v = (y * np.cos(angle) - x * np.sin(angle)) / rng.uniform(8, 40)
    coverage = np.clip((1 - np.hypot(u, v)) * rng.uniform(1, 12) + 0.5, 0, 1)
    return np.asarray(coverage[..., None], dtype=np.float32)


def _background(rng: np.random.Generator) -> Floats:
    """A gradient of two colors, blobs, noise in octaves, uneven light: (HEIGHT, WIDTH, 3).

    In [0, 0.7], which leaves room for lighter digits.
    """
    y, x = np.mgrid[-1 : 1 : HEIGHT * 1j, -1 : 1 : WIDTH * 1j].astype(np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    ramp = 0.5 + 0.35 * (x * np.cos(angle) + y * np.sin(angle))[..., None]
    first, second = rng.uniform(0.05, 0.65, (2, 3))
    second = 0.5 * (first + second)  # related colors, as one surface has
    image = first + (second - first) * ramp
    for _ in range(rng.integers(1, 5)):
        image += _blob(rng) * rng.uniform(0.2, 0.8) * (rng.uniform(0.05, 0.65, 3) - image)
    roughness = rng.uniform(0.5, 0.8)
    strength = rng.uniform(0.03, 0.1)
    for octave in range(5):
        cells = 3 * 2**octave
        texture = _noise(rng, cells, 1) + 0.4 * _noise(rng, cells, 3)  # mostly light and dark, a little hue
        image += strength * roughness**octave * texture
    light = 1 + 0.15 * _noise(rng, 2, 1)
    clipped: Floats = np.clip(image * light, 0, 0.7).astype(np.float32)
    return clipped


def _coverage(rng: np.random.Generator, ink: Floats) -> Floats:
    """One digit enlarged, stretched, rotated and cropped: (h, w), the covered fraction of each pixel."""
    size = rng.uniform(32, 50)  # pixels for the 8 cells
    aspect = rng.uniform(0.85, 1.15)
    angle = np.deg2rad(rng.uniform(-20, 20))
    side = int(1.4 * size)
    fine = side * _SUPERSAMPLING
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = np.diag([8 / size, 8 / (size * aspect)]) @ rotation / _SUPERSAMPLING
    offset = np.full(2, 3.5) - matrix @ np.full(2, (fine - 1) / 2)
    smooth = ndimage.affine_transform(ink, matrix, offset, (fine, fine), order=3)
    solid = (smooth > 0.45).astype(np.float32)
    coverage: Floats = solid.reshape(side, _SUPERSAMPLING, side, _SUPERSAMPLING).mean((1, 3))
    rows, columns = np.flatnonzero(coverage.any(1)), np.flatnonzero(coverage.any(0))
    return coverage[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _color(rng: np.random.Generator, covered: Floats) -> Floats:
    """A color, (3,) in [0, 1], lighter than the (n, 3) pixels that it will cover."""
    color: Floats = rng.uniform(0.2, 1, 3).astype(np.float32)
    luma = float(color @ _LUMA)
    missing = float(covered.mean(0) @ _LUMA) + rng.uniform(_CONTRAST, 0.3) - luma
    if missing > 0:
        color += (1 - color) * np.float32(missing / (1 - luma))
    return color


def _find_place(
    rng: np.random.Generator, free: NDArray[np.bool_], touched: NDArray[np.bool_]
) -> tuple[slice, slice] | None:
    """A random place for a digit, all on free pixels, or None where twenty tries find none."""
    height, width = touched.shape
    if height > HEIGHT or width > WIDTH:
        return None
    for _ in range(20):
        top, left = int(rng.integers(HEIGHT - height + 1)), int(rng.integers(WIDTH - width + 1))
        place = np.s_[top : top + height, left : left + width]
        if free[place][touched].all():
            return place
    return None


def _scene(rng: np.random.Generator, digits: Floats, classes: NDArray[np.int64]) -> tuple[Bytes, Bytes]:
    image = _background(rng)
    labels = np.full((HEIGHT, WIDTH), BACKGROUND, dtype=np.uint8)
    free = np.ones((HEIGHT, WIDTH), dtype=bool)
    for _ in range(rng.integers(5, 10)):
        index = int(rng.integers(len(digits)))
        coverage = _coverage(rng, digits[index])
        place = _find_place(rng, free, coverage > 0)
        if place is None:
            continue
        touched = coverage > 0
        color = _color(rng, image[place][touched])
        ink = color + 0.03 * _noise(rng, 12, 1)[place]
        image[place] += coverage[..., None] * (ink - image[place])
        labels[place][touched] = VOID
        labels[place][coverage == 1] = classes[index]
        occupied = np.zeros_like(free)
        occupied[place] = touched
        free &= ~ndimage.binary_dilation(occupied, iterations=3)
    image += rng.normal(0, 0.008, image.shape)  # a camera's
    return np.round(np.clip(image, 0, 1) * 255).astype(np.uint8), labels


def make_scenes(count: int, seed: int, *, held_out: bool = False) -> tuple[Bytes, Bytes]:
    """Scenes and their dense labels, a function of the arguments alone.

    Args:
        count: number of scenes.
        seed: of the generator; each scene has a stream of its own, so that more scenes leave the first alike.
        held_out: whether to use the digits that are kept from training.

    Returns:
        Images (count, 96, 128, 3) uint8, and labels (count, 96, 128) uint8: 0..9 a digit, 10 background, 255
        void (the anti-aliased rim of a digit).

    Raises:
        ImportError: if scikit-learn, which holds the digits, is absent.
    """
    digits, classes = read_digits(held_out=held_out)
    images = np.empty((count, HEIGHT, WIDTH, 3), dtype=np.uint8)
    labels = np.empty((count, HEIGHT, WIDTH), dtype=np.uint8)
    for index in range(count):
        rng = np.random.default_rng([seed, int(held_out), index])
        images[index], labels[index] = _scene(rng, digits, classes)
    return images, labels
