"""Views: what an image is transformed by, as a photometric map followed by an affine resampling.

All geometry is ``(theta, size)``: a matrix that maps an output position to the input position it is read from, in
normalized coordinates, and an output size. A view is a frozen dataclass that turns uniform random numbers into
these; it holds no random state of its own. To add one, write one class with the methods of :class:`View` that differ.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from equifast import _checks, ops, rng

__all__ = [
    "ColorJitter",
    "Compose",
    "Flip",
    "Resize",
    "Rotation",
    "Sampled",
    "Shift",
    "Turn",
    "View",
    "fast",
    "guard",
    "paper",
    "sample",
]

Size = tuple[int, int]
Number = TypeVar("Number", float, Tensor)


def _interval(name: str, value: tuple[float, float], least: float | None = None) -> None:
    if not isinstance(value, tuple) or len(value) != 2:
        raise ValueError(f"{name} is {value!r}; it must be a pair (low, high)")
    low, high = (_checks.number(name, side, least=least) for side in value)
    if low > high:
        raise ValueError(f"{name} is {value!r}; its low end must not be above its high end")


def _between(low: float, high: float, u: Number) -> Number:
    return low + (high - low) * u


class View:
    """One transformation. The base class is the identity.

    ``shared`` uniform numbers are drawn per step for all images, since images of one batch must have one size;
    ``image`` uniform numbers are drawn per image for what leaves the size alone.
    """

    shared: int = 0
    image: int = 0

    def __repr__(self) -> str:
        """By which results are told apart: the class and its settings, and no address."""
        return f"{type(self).__qualname__}({', '.join(f'{k}={v!r}' for k, v in sorted(vars(self).items()))})"

    def geometry(self, size: Size, shared: Tensor, u: Tensor) -> tuple[Tensor, Size]:
        """Where to read from and how large the output is.

        Args:
            size: (H, W) of the input.
            shared: (shared,) float64 uniform numbers, those of all images.
            u: (N, image) float64 uniform numbers of each.

        Returns:
            theta (N, 2, 3) float64, and the output size (h, w).
        """
        return torch.eye(2, 3, dtype=torch.float64, device=u.device).expand(u.shape[0], 2, 3).clone(), size

    def parameters(self, u: Tensor) -> Tensor:
        """What :meth:`color` takes, (N, image) float64, of as many uniform numbers: these themselves, or others."""
        return u

    def color(self, images: Tensor, parameters: Tensor) -> Tensor:
        """The photometric map, (N, C, H, W) -> (N, C, H, W), differentiable.

        ``parameters`` is (N, image) on the device of the images; to be captured in a graph, do not look at its values.
        """
        return images

    @property
    def enlarges(self) -> bool:
        """Whether the view makes images larger on average, and so its passes dearer."""
        middle = torch.full((1, max(self.shared, self.image)), 0.5, dtype=torch.float64, device="cpu")
        _, (height, width) = self.geometry((1000, 1000), middle[0, : self.shared], middle[:, : self.image])
        return height * width > 1000 * 1000


@dataclass(frozen=True)
class Flip(View):
    """Mirror left to right, or top to bottom."""

    vertical: bool = False

    def geometry(self, size: Size, shared: Tensor, u: Tensor) -> tuple[Tensor, Size]:
        theta, size = super().geometry(size, shared, u)
        axis = 1 if self.vertical else 0
        theta[:, axis, axis] = -1
        return theta, size


@dataclass(frozen=True)
class Resize(View):
    """Scale height and width by a common factor, and the width by a further one.

    Args:
        scale: a factor, or (low, high) of a uniform one.
        ratio: (low, high) of the further factor of the width.
        least: pixels of the shorter side below which the low end of ``scale`` does not take it: small images are shrunk
            less, lest nothing be left to recognize.

    Sizes round down and are at least 1.
    """

    scale: float | tuple[float, float] = 1.0
    ratio: tuple[float, float] = (1.0, 1.0)
    least: int = 1
    shared = 2

    def __post_init__(self) -> None:
        if not isinstance(self.scale, tuple):
            _checks.number("scale", self.scale, above=0)
            object.__setattr__(self, "scale", (self.scale, self.scale))
        _interval("scale", self._scale, least=1e-6)
        _interval("ratio", self.ratio, least=1e-6)
        _checks.integer("least", self.least, 1, 2**31)

    @property
    def _scale(self) -> tuple[float, float]:
        assert isinstance(self.scale, tuple)
        return self.scale

    def geometry(self, size: Size, shared: Tensor, u: Tensor) -> tuple[Tensor, Size]:
        theta, (height, width) = super().geometry(size, shared, u)
        first, second = shared.tolist()
        low, high = self._scale
        low = min(high, max(low, (self.least + 1e-6) / min(height, width)))  # more, lest rounding take it below
        scale, ratio = _between(low, high, first), _between(*self.ratio, second)
        return theta, (max(1, math.floor(height * scale)), max(1, math.floor(width * scale * ratio)))


@dataclass(frozen=True)
class Rotation(View):
    """Rotate about the center by an angle uniform in +-``degrees``, true in pixels whatever the aspect ratio."""

    degrees: float = 15.0
    image = 1

    def __post_init__(self) -> None:
        _checks.number("degrees", self.degrees, least=0)

    def geometry(self, size: Size, shared: Tensor, u: Tensor) -> tuple[Tensor, Size]:
        angle = math.radians(self.degrees) * (2 * u[:, 0] - 1)
        aspect = size[0] / size[1]
        cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
        return torch.stack((cos, -sin * aspect, zero, sin / aspect, cos, zero), 1).view(-1, 2, 3), size


@dataclass(frozen=True)
class Turn(View):
    """Turn by quarters, counterclockwise, pixel by pixel: as ``torch.rot90``; height and width change places."""

    quarters: int = 1

    def __post_init__(self) -> None:
        _checks.integer("quarters", self.quarters, 0, 3)

    def geometry(self, size: Size, shared: Tensor, u: Tensor) -> tuple[Tensor, Size]:
        theta, (height, width) = super().geometry(size, shared, u)
        cos, sin = ((1, 0), (0, 1), (-1, 0), (0, -1))[self.quarters]
        theta[:, :, :2] = theta.new_tensor([[cos, -sin], [sin, cos]])
        return theta, (width, height) if self.quarters % 2 else (height, width)


@dataclass(frozen=True)
class Shift(View):
    """Shift by up to ``fraction`` of the height and of the width, uniform; what comes in is 0."""

    fraction: float = 0.1
    image = 2

    def __post_init__(self) -> None:
        _checks.number("fraction", self.fraction, least=0)

    def geometry(self, size: Size, shared: Tensor, u: Tensor) -> tuple[Tensor, Size]:
        theta, size = super().geometry(size, shared, u)
        theta[:, :, 2] = 2 * self.fraction * (2 * u - 1)  # the frame is 2 wide
        return theta, size


@dataclass(frozen=True)
class ColorJitter(View):
    """Jitter brightness, contrast, saturation and hue, in this order, then perhaps drop the color.

    Args:
        brightness, contrast, saturation: factors are uniform in [max(0, 1 - value), 1 + value].
        hue: the shift of the hue is uniform in +-``hue`` turns; at most 0.5.
        grayscale: the probability that an image becomes gray.

    The adjustments are those of torchvision's transform of the same name; its order is random, here it is fixed.
    """

    brightness: float = 0.8
    contrast: float = 0.8
    saturation: float = 0.8
    hue: float = 0.2
    grayscale: float = 0.2
    image = 5

    def __post_init__(self) -> None:
        for name in ("brightness", "contrast", "saturation"):
            _checks.number(name, getattr(self, name), least=0)
        _checks.number("hue", self.hue, least=0, most=0.5)
        _checks.number("grayscale", self.grayscale, least=0, most=1)

    def parameters(self, u: Tensor) -> Tensor:
        widths = (self.brightness, self.contrast, self.saturation)
        rows = [
            [
                *(_between(max(0.0, 1 - width), 1 + width, v) for width, v in zip(widths, factors, strict=True)),
                self.hue * (2 * turn - 1),
                float(chance < self.grayscale),
            ]
            for *factors, turn, chance in u.tolist()
        ]
        return torch.tensor(rows, dtype=torch.float64, device=u.device).view(-1, 5)

    def color(self, images: Tensor, parameters: Tensor) -> Tensor:
        return ops.color_jitter(images, parameters)


def _product(theta: Tensor, following: Tensor) -> Tensor:
    """One affine map (N, 2, 3) after the other: a matrix reads from the output of the one before it."""
    both = theta[:, :, :2].bmm(following)
    both[:, :, 2].add_(theta[:, :, 2])
    return both


# Of views that have one of these every matrix is the identity.
_STILL = (View.geometry, Resize.geometry)


@dataclass(frozen=True)
class Compose(View):
    """Several views, one after the other: their color maps first, then one resampling by the product of matrices."""

    views: tuple[View, ...]

    def __init__(self, *views: View) -> None:
        if not views:
            raise ValueError("views is empty; there must be at least one View")
        for view in views:
            if not isinstance(view, View):
                raise TypeError(f"views has a {type(view).__name__}; every one must be a View")
        object.__setattr__(self, "views", views)
        object.__setattr__(self, "shared", sum(view.shared for view in views))
        object.__setattr__(self, "image", sum(view.image for view in views))

    def geometry(self, size: Size, shared: Tensor, u: Tensor) -> tuple[Tensor, Size]:
        theta = None
        parts = zip(
            self.views,
            shared.split([view.shared for view in self.views]),
            u.split([view.image for view in self.views], 1),
            strict=True,
        )
        for view, common, own in parts:
            following, size = view.geometry(size, common, own)
            if type(view).geometry not in _STILL:
                theta = following if theta is None else _product(theta, following)
        return (super().geometry(size, shared, u)[0] if theta is None else theta), size

    def parameters(self, u: Tensor) -> Tensor:
        parts = u.split([view.image for view in self.views], 1)
        return torch.cat([view.parameters(part) for view, part in zip(self.views, parts, strict=True)], 1)

    def color(self, images: Tensor, parameters: Tensor) -> Tensor:
        for view, part in zip(self.views, parameters.split([v.image for v in self.views], 1), strict=True):
            images = view.color(images, part)
        return images


def as_set(chosen: Sequence[View], name: str = "views") -> tuple[View, ...]:
    """A set of views, checked."""
    if not isinstance(chosen, Sequence) or not chosen:
        raise ValueError(f"{name} is {chosen!r}; it must be a sequence of at least one View")
    for view in chosen:
        if not isinstance(view, View):
            raise TypeError(f"{name} has a {type(view).__name__}; every one must be a View")
    return tuple(chosen)


def paper() -> tuple[View, ...]:
    """The eight views of Mao et al. 2023: resizes 2, 0.3, 2, 0.5; color jitter; flip; two rotations in +-15 degrees.

    Resizes, jitter and flip also scale the width by a factor uniform in (0.8, 1.2).
    """
    ratio = (0.8, 1.2)
    width = Resize(1.0, ratio)
    return (
        *(Resize(scale, ratio) for scale in (2.0, 0.3, 2.0, 0.5)),
        Compose(ColorJitter(), width),
        Compose(Flip(), width),
        Rotation(15.0),
        Rotation(15.0),
    )


def fast() -> tuple[View, ...]:
    """The five views of the preset ``fast``: two smaller, two smaller and mirrored; one mirrored, turned and recolored.

    Chosen by measurement, on held-out images (docs/corner.md). Sizes are 0.3 to 0.9 of the image's, and such that small
    images keep 16 pixels; their width varies as in :func:`paper`.
    """
    smaller = Resize((0.3, 0.9), (0.8, 1.2), least=16)
    mirrored = Compose(Flip(), smaller)
    return (smaller, mirrored, smaller, mirrored, Compose(ColorJitter(), Flip(), Rotation(15.0)))


def guard() -> tuple[View, ...]:
    """The view by which a detector looks at images before they are purified: mirrored, at 0.7 of their size.

    An attack through views of an image makes those of its own size agree; a smaller one it does not see, and a pass for
    it takes half the time. Chosen by measurement, on held-out images (docs/detection.md), for
    :class:`equifast.detectors.OutputVariance`.
    """
    return (Compose(Flip(), Resize(0.7)),)


@dataclass(frozen=True)
class Sampled:
    """One realization of a view for a batch.

    ``theta`` is (N, 2, 3) float64 on the images' device, ``size`` the output size, ``parameters`` what ``view.color``
    takes; ``followed`` whether a gradient reaches the image through it.
    """

    view: View
    theta: Tensor
    size: Size
    parameters: Tensor
    followed: bool = True

    def color(self, images: Tensor) -> Tensor:
        """The photometric part, (N, C, H, W) -> (N, C, H, W)."""
        return self.view.color(images, self.parameters)


def _sent(values: Tensor, device: torch.device) -> Tensor:
    """The values on a device; to a GPU without a wait for what runs there."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def positions(views: Sequence[View], size: Size) -> list[int]:
    """Those of an image of that size, and of views of it as large as they come."""
    sizes = [size]
    for view in views:
        most = torch.ones(1, max(view.shared, view.image), dtype=torch.float64, device="cpu")
        sizes.append(view.geometry(size, most[0, : view.shared], most[:, : view.image])[1])
    return [max(1, height * width) for height, width in sizes]


def sample(
    views: Sequence[View],
    size: Size,
    *,
    seed: int,
    ids: Tensor,
    draw: int = 0,
    step: int = 0,
    count: int | None = None,
    palette: int | None = None,
    followed: int | None = None,
    device: torch.device | None = None,
) -> list[Sampled]:
    """Draw a realization of ``count`` of the views (all of them where None), without replacement.

    Args:
        views: the set; its order is part of the realization.
        size: (H, W) of the images.
        seed, draw, step: as in :mod:`equifast.rng`. Choice and sizes are those of all images, the rest of each.
        ids: (N,) int64 image ids. Those on a GPU are waited for, with all that was started there.
        palette: what all images share, sizes and choice of views, is one of so many fixed sets, the same under every
            seed; None for a new one at every step.
        followed: through how many of those drawn a gradient goes, drawn too; all of them where None.
        device: where the result is; that of ``ids`` where None.

    Raises:
        ValueError: if a view gives a theta that is not (N, 2, 3), not finite or singular, or no size.
    """
    # All numbers at once: the cost of drawing is in the number of operations, not in that of numbers.
    k = range(len(views))
    streams = [int(rng.Stream.CHOICE), *map(rng.Stream.SHARED.of, k), *map(rng.Stream.IMAGE.of, k)]
    most = max(len(views), *(max(view.shared, view.image) for view in views))
    rows = torch.tensor([0, *ids.tolist()], device="cpu")  # 0 is the id of what all images share
    numbers = rng.uniform(seed, streams, rows, draw, step, most + 1)
    choice, shared, image = numbers[0, 0], numbers[1 : 1 + len(views), 0], numbers[1 + len(views) :, 1:]
    if palette is not None:
        fixed = rng.uniform(0, streams[: 1 + len(views)], rows[:1], 0, int(choice[most] * palette), most)
        choice, shared = fixed[0, 0], fixed[1:, 0]
    order = choice[: len(views)].argsort()[:count].tolist()
    sampled = []
    for i in sorted(order):
        view, u = views[i], image[i, :, : views[i].image]
        theta, target = view.geometry(size, shared[i, : view.shared], u)
        name = type(view).__name__
        if theta.shape != (len(ids), 2, 3):
            shape = _checks.shape(theta)
            raise ValueError(f"{name}.geometry gives a theta of shape {shape}; it must be ({len(ids)}, 2, 3)")
        target = _checks.size(f"the size that {name}.geometry gives", target)
        parameters = view.parameters(u)
        if parameters.shape != u.shape:
            shape = _checks.shape(parameters)
            raise ValueError(f"{name}.parameters gives a tensor of shape {shape}; it must be {tuple(u.shape)}")
        follow = i in order[:followed]
        sampled.append(Sampled(view, theta.detach().to("cpu", torch.float64), target, parameters, follow))
    if not sampled:
        return []
    # here and for all of them at once; whoever renders them need not look again
    device = ids.device if device is None else device
    matrices = _sent(_checks.theta(torch.stack([view.theta for view in sampled])), device)
    parameters = _sent(torch.cat([view.parameters for view in sampled], 1), device)
    own = parameters.split([view.view.image for view in sampled], 1)
    return [
        Sampled(s.view, theta, s.size, part, s.followed)
        for s, theta, part in zip(sampled, matrices.unbind(0), own, strict=True)
    ]
