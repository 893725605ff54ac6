"""Networks with symmetry built in, and the plain ones beside them, as published studies compare them.

All take images in [0, 1], and give logits (N, classes); the larger ones those of any size, down to one pixel.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from equifast import _checks
from equifast.nn._group import C8, P4, P4M, Group
from equifast.nn.layers import GroupBatchNorm2d, GroupConv2d, GroupPool, ScaleConv2d, SteerableConv2d

__all__ = ["GCNN", "VGG16", "Hybrid", "ResNet18", "StdCNN"]


def _conv(
    channels_in: int,
    channels: int,
    size: int,
    group: Group | None,
    *,
    lifting: bool = False,
    padding: int = 0,
    bias: bool = True,
) -> nn.Module:
    """Plain or over a group, with weights for what a rectifier follows."""
    if group is not None:
        return GroupConv2d(channels_in, channels, size, group=group, lifting=lifting, padding=padding, bias=bias)
    conv = nn.Conv2d(channels_in, channels, size, padding=padding, bias=bias)
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    return conv


def _norm(channels: int, group: Group | None) -> nn.Module:
    return nn.BatchNorm2d(channels) if group is None else GroupBatchNorm2d(channels, group=group)


class _Small(nn.Module):
    """Convolutions of 3x3 that lose the border, two and two, each pair before a 2x2 maximum; then two linear layers."""

    def __init__(
        self,
        group: Group | None,
        channels_in: int,
        classes: int,
        size: int,
        widths: tuple[int, int],
        hidden: int,
        invariant: bool = False,
    ) -> None:
        super().__init__()
        self.size = _checks.integer("size", size, 16, 2**15)
        self.channels_in, self.invariant = channels_in, invariant
        layers: list[nn.Module] = []
        previous = channels_in
        for number, width in enumerate((widths[0], widths[0], widths[1], widths[1])):
            layers += [_conv(previous, width, 3, group, lifting=number == 0), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if number % 2 else []
            previous = width
        self.features = nn.Sequential(*layers)
        order = 1 if group is None else group.order
        side = ((size - 4) // 2 - 4) // 2
        if invariant:
            self.pool: nn.Module = nn.Sequential(GroupPool(order), nn.AdaptiveAvgPool2d(1))
            flat = widths[1]
        else:
            self.pool = nn.Identity()
            flat = widths[1] * order * side**2
        self.classifier = nn.Sequential(nn.Flatten(), nn.Linear(flat, hidden), nn.ReLU(), nn.Linear(hidden, classes))

    def forward(self, x: Tensor) -> Tensor:
        wanted = (self.channels_in, self.size, self.size)
        if x.dim() != 4 or (x.shape[1:] != wanted and not self.invariant):
            raise ValueError(f"x has shape {_checks.shape(x)}; it must be (N, {', '.join(map(str, wanted))})")
        result: Tensor = self.classifier(self.pool(self.features(x)))
        return result


class StdCNN(_Small):
    """The plain network of Kamath et al. 2020, table 1.

    Args:
        channels_in: of the images.
        classes: how many.
        size: height and width of the images; 16 at least.
        widths: channels of the first two convolutions and of the last two.
        hidden: of the linear layer before the last.
    """

    def __init__(
        self,
        channels_in: int = 1,
        classes: int = 10,
        *,
        size: int = 28,
        widths: tuple[int, int] = (10, 20),
        hidden: int = 50,
    ) -> None:
        super().__init__(None, channels_in, classes, size, widths, hidden)


class GCNN(_Small):
    """The group network of Kamath et al. 2020, table 1: that of :class:`StdCNN`, over quarter turns.

    Maps commute with the quarter turns where both maxima divide, as at 28 pixels; the published classifier sees all
    that is left of the group and of positions, so that the network is not invariant.

    Args:
        channels_in, classes, size, widths, hidden: as of :class:`StdCNN`; of widths, a channel has ``group.order``
            values per pixel.
        group: of the convolutions.
        invariant: whether the largest over the group and the mean over all positions go to the classifier; then the
            network does not change by what the group does, at 28 pixels and other sizes where both maxima divide.
    """

    def __init__(
        self,
        channels_in: int = 1,
        classes: int = 10,
        *,
        size: int = 28,
        widths: tuple[int, int] = (10, 20),
        hidden: int = 50,
        group: Group = P4,
        invariant: bool = False,
    ) -> None:
        super().__init__(group, channels_in, classes, size, widths, hidden, invariant)


def _wide(channels: int, width: float, group: Group | None) -> int:
    """Channels over a group, about as many weights as the plain ones have."""
    return max(1, round(channels * width / math.sqrt(1 if group is None else group.order)))


class VGG16(nn.Module):
    """VGG16 with batch norm for small images, plain or over a group (Kamath et al. 2020).

    Over a group, channels are fewer by the square root of its order, so that there are about as many weights. The
    maps commute with the group where 32 divides the size; what is left after five maxima goes to one linear layer:
    invariant where ``invariant``.

    Args:
        channels_in: of the images.
        classes: how many.
        group: None for plain convolutions.
        width: channels are times this.
        invariant: whether the largest over the group and the mean over positions go to the classifier.
    """

    def __init__(
        self,
        channels_in: int = 3,
        classes: int = 10,
        *,
        group: Group | None = None,
        width: float = 1.0,
        invariant: bool = False,
    ) -> None:
        super().__init__()
        _checks.number("width", width, above=0)
        order = 1 if group is None else group.order
        layers: list[nn.Module] = []
        previous = channels_in
        for number, (channels, count) in enumerate(((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))):
            wide = _wide(channels, width, group)
            for repeat in range(count):
                lifting = number == 0 and repeat == 0
                layers += [_conv(previous, wide, 3, group, lifting=lifting, padding=1, bias=False)]
                layers += [_norm(wide, group), nn.ReLU()]
                previous = wide
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
        self.features = nn.Sequential(*layers)
        self.pool = nn.Sequential(GroupPool(order)) if invariant else nn.Sequential()
        self.classifier = nn.Linear(previous * (1 if invariant else order), classes)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.classifier(self.pool(self.features(x)).mean((2, 3)))
        return result


class _Block(nn.Module):
    """Two convolutions and a shortcut; where it halves the size, by means of 2x2, which commute with turns."""

    def __init__(self, channels_in: int, channels: int, group: Group | None, halve: bool) -> None:
        super().__init__()
        self.conv1 = _conv(channels_in, channels, 3, group, padding=1, bias=False)
        self.norm1 = _norm(channels, group)
        self.conv2 = _conv(channels, channels, 3, group, padding=1, bias=False)
        self.norm2 = _norm(channels, group)
        self.halve: nn.Module = nn.AvgPool2d(2, ceil_mode=True) if halve else nn.Identity()
        self.shortcut: nn.Module = nn.Identity()
        if channels_in != channels:
            self.shortcut = nn.Sequential(_conv(channels_in, channels, 1, group, bias=False), _norm(channels, group))

    def forward(self, x: Tensor) -> Tensor:
        y = self.halve(functional.relu(self.norm1(self.conv1(x))))
        return functional.relu(self.norm2(self.conv2(y)) + self.shortcut(self.halve(x)))


class ResNet18(nn.Module):
    """ResNet-18 for small images that downsamples by means of 2x2: over a group it commutes with it exactly.

    A convolution with stride 2 and padding 1 stands, at even sizes, at other places seen from another side (Romero et
    al. 2020, *Attentive Group Equivariant Convolutional Networks*); means do not, where 8 divides the size.

    Args:
        channels_in, classes, group, width: as of :class:`VGG16`.
        invariant: whether the mean over the group goes to the classifier beside the mean over positions.
    """

    def __init__(
        self,
        channels_in: int = 3,
        classes: int = 10,
        *,
        group: Group | None = P4M,
        width: float = 1.0,
        invariant: bool = True,
    ) -> None:
        super().__init__()
        _checks.number("width", width, above=0)
        order = 1 if group is None else group.order
        widths = [_wide(channels, width, group) for channels in (64, 128, 256, 512)]
        self.conv = _conv(channels_in, widths[0], 3, group, lifting=True, padding=1, bias=False)
        self.norm = _norm(widths[0], group)
        blocks: list[nn.Module] = []
        previous = widths[0]
        for number, wide in enumerate(widths):
            blocks += [_Block(previous, wide, group, number > 0), _Block(wide, wide, group, False)]
            previous = wide
        self.blocks = nn.Sequential(*blocks)
        self.pool: nn.Module = GroupPool(order, kind="mean") if invariant else nn.Identity()
        self.classifier = nn.Linear(previous * (1 if invariant else order), classes)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.blocks(functional.relu(self.norm(self.conv(x))))
        result: Tensor = self.classifier(self.pool(maps).mean((2, 3)))
        return result


class _Rotations(nn.Module):
    """A convolution over rotations by equal angles, all of them side by side."""

    def __init__(self, channels_in: int, channels: int, group: Group, lifting: bool = True) -> None:
        super().__init__()
        layer = GroupConv2d if group.on_grid else SteerableConv2d
        self.conv = layer(channels_in, channels, 3, group=group, lifting=lifting, padding=1, bias=False)
        self.norm = GroupBatchNorm2d(channels, group=group)
        self.width = channels * group.order

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.norm(self.conv(x)))


class _Scales(nn.Module):
    """Convolutions at three scales, each with weights of its own, all of them side by side."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.conv = ScaleConv2d(channels_in, channels, 3, shared=False, padding=1, bias=False)
        self.width = channels * len(self.conv.scales)
        self.norm = nn.BatchNorm2d(self.width)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.norm(self.conv(x)))


class _Plain(nn.Module):
    def __init__(self, channels_in: int, channels: int, kernel_size: int = 3) -> None:
        super().__init__()
        self.conv = _conv(channels_in, channels, kernel_size, None, padding=kernel_size // 2, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.width = channels

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.norm(self.conv(x)))


class _Weighted(nn.Module):
    """The sum of branches, by weights that are learned and sum to 1."""

    def __init__(self, branches: list[nn.Module]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.logits = nn.Parameter(torch.zeros(len(branches)))

    def forward(self, x: Tensor) -> Tensor:
        shares = self.logits.softmax(0)
        return torch.stack([share * branch(x) for share, branch in zip(shares, self.branches, strict=True)]).sum(0)


class _Beside(nn.Module):
    """Branches side by side."""

    def __init__(self, branches: list[Any]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.width = sum(branch.width for branch in branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


# Of each network of Wang et al. as released: channels after the first, and after which convolutions 2x2 maxima follow.
_RELEASED: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "baseline": ((32, 32, 64, 64, 128, 128, 256, 256, 256), (1, 2, 4, 6, 8)),
    "parallel": ((32, 32, 64, 64, 128, 128, 256, 256, 512), (1, 4, 6)),
    "rotation-and-scale": ((32, 32, 64, 128, 128, 256, 256, 512), (1, 3)),
    "weighted": ((32, 32, 64, 128, 256, 256, 512, 512), (1,)),
    "cascaded": ((64, 128, 128, 256, 256, 512, 512), (1, 3, 5)),
}


class Hybrid(nn.Module):
    """The networks of Wang et al. 2025: ten convolutions, of which the first is replaced by one that knows symmetries.

    What follows the first is plain, so that the network as a whole commutes with nothing. By default it is the same in
    all: 32-32-64-64-128-128-256-256-256 channels, 2x2 maxima after convolutions 1, 2, 4, 6 and 8, then the largest over
    positions and one linear layer, as in the baseline that was released. There the others have widths, depths and
    places of the maxima of their own (``released=True``), and the weighted one takes 30 times as long; so compared,
    networks differ in more than symmetry. Here batch norm and a rectifier follow every convolution; the released
    branches over rotations have no batch norm, and some no rectifier.

    Args:
        first: ``"baseline"``: 16 plain channels; ``"parallel"``: these beside 16 over the quarter turns, four values
            each; ``"rotation-and-scale"``: plain ones, 16 over the eighth turns, and 16 at each of three scales, side
            by side, brought to 32 by a 1x1 convolution; ``"weighted"``: 16 plain ones, and 16 over the quarter turns
            brought to 16 by a 1x1 convolution, summed with weights that are learned; ``"cascaded"``: 64 plain ones,
            taken for 16 over the quarter turns by a second convolution.
        channels_in: of the images.
        classes: how many.
        width: all channels are times this.
        released: whether what follows is as the released code has it for this network.

    Raises:
        ValueError: for another name, or a width that is not above 0.
    """

    def __init__(
        self, first: str, channels_in: int = 3, classes: int = 10, *, width: float = 1.0, released: bool = False
    ) -> None:
        super().__init__()
        _checks.choice("first", first, tuple(_RELEASED))
        _checks.number("width", width, above=0)
        channels, pools = _RELEASED[first if _checks.boolean("released", released) else "baseline"]
        c = _wide(16, width, None)
        stem: nn.Module
        if first == "baseline":
            stem, previous = _Plain(channels_in, c), c
        elif first == "parallel":
            beside = _Beside([_Plain(channels_in, c), _Rotations(channels_in, c, P4)])
            stem, previous = beside, beside.width
        elif first == "rotation-and-scale":
            beside = _Beside([_Plain(channels_in, c), _Rotations(channels_in, c, C8), _Scales(channels_in, c)])
            stem, previous = nn.Sequential(beside, _Plain(beside.width, 2 * c, 1)), 2 * c
        elif first == "weighted":
            turned = nn.Sequential(_Rotations(channels_in, c, P4), _Plain(c * P4.order, c, 1))
            stem, previous = _Weighted([_Plain(channels_in, c), turned]), c
        else:
            taken = _Rotations(c, c, P4, lifting=False)
            stem, previous = nn.Sequential(_Plain(channels_in, taken.width), taken), taken.width
        layers: list[nn.Module] = []
        for number, wide in enumerate((None, *(_wide(each, width, None) for each in channels)), 1):
            if wide is not None:
                layers.append(_Plain(previous, wide))
                previous = wide
            layers += [nn.MaxPool2d(2, ceil_mode=True)] if number in pools else []
        self.first = stem
        self.rest = nn.Sequential(*layers)
        self.classifier = nn.Linear(previous, classes)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.classifier(self.rest(self.first(x)).amax((2, 3)))
        return result
