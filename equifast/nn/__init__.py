"""Equivariant layers and networks: what commutes with rotations and mirror images by construction."""

from collections.abc import Callable

import torch
from torch import Tensor

from equifast.nn._group import C8, P4, P4M, Group
from equifast.nn.layers import (
    GroupBatchNorm2d,
    GroupConv2d,
    GroupPool,
    ScaleConv2d,
    SteerableConv2d,
    as_convolutions,
)
from equifast.nn.networks import GCNN, VGG16, Hybrid, ResNet18, StdCNN

__all__ = [
    "C8",
    "GCNN",
    "P4",
    "P4M",
    "VGG16",
    "Group",
    "GroupBatchNorm2d",
    "GroupConv2d",
    "GroupPool",
    "Hybrid",
    "ResNet18",
    "ScaleConv2d",
    "StdCNN",
    "SteerableConv2d",
    "as_convolutions",
    "equivariance_error",
]


def equivariance_error(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    group: Group,
    *,
    regular_in: bool = False,
    regular_out: bool = True,
) -> Tensor:
    """How far a function is from commuting with a group: ``|f(g x) - g f(x)| / |f(x)|``, Euclidean, over the batch.

    Args:
        function: what takes ``x`` and gives (N, C, h, w) or, where nothing may change at all, (N, C).
        x: (N, C, H, W).
        group: of which every element is tried; where it has other angles than quarter turns, the error of bilinear
            resampling is in the figure, and what leaves the frame.
        regular_in, regular_out: whether ``x`` and the output are maps over the group, (N, C * order, H, W).

    Returns:
        (order,), one number per element; the first is 0 for what is deterministic.

    Raises:
        TypeError: if ``group`` is none.
    """

    if not isinstance(group, Group):
        raise TypeError(f"group is a {type(group).__name__}; it must be a Group, such as equifast.nn.P4")

    def act(maps: Tensor, element: int, regular: bool) -> Tensor:
        if maps.dim() == 2:
            return maps
        if not regular:
            return group.act(maps, element)
        over: Tensor = maps.unflatten(1, (-1, group.order))
        return group.act(over, element, regular=True).flatten(1, 2)

    with torch.no_grad():
        plain = function(x)
        errors = [function(act(x, g, regular_in)) - act(plain, g, regular_out) for g in range(group.order)]
        norms: list[Tensor] = [each.norm() for each in (plain, *errors)]
        return torch.stack(norms[1:]) / norms[0]
