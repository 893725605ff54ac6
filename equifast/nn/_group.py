"""Rotations by equal angles, with or without mirror images, and what they do to images and to maps over the group."""

from dataclasses import dataclass

import torch
from torch import Tensor

from equifast import _checks
from equifast.spatial import transform

__all__ = ["C8", "P4", "P4M", "Group"]


@dataclass(frozen=True)
class Group:
    """The rotations by multiples of a part of the full turn, and their mirror images.

    Element ``mirror * rotations + turn`` mirrors left and right where ``mirror`` is 1, then rotates counterclockwise by
    ``turn`` parts; element 0 changes nothing.

    Args:
        rotations: how many, 1 and up.
        mirrored: whether there are mirror images too.
    """

    rotations: int
    mirrored: bool = False

    def __post_init__(self) -> None:
        _checks.integer("rotations", self.rotations, 1, 360)
        _checks.boolean("mirrored", self.mirrored)

    @property
    def order(self) -> int:
        """How many elements there are."""
        return self.rotations * (1 + self.mirrored)

    @property
    def on_grid(self) -> bool:
        """Whether every element maps a square of pixels to itself."""
        return 4 % self.rotations == 0

    def product(self, a: int, b: int) -> int:
        """The element that does what ``b`` does, then what ``a`` does."""
        (mirror, turn), (other, more) = divmod(a, self.rotations), divmod(b, self.rotations)
        turned = (turn - more if mirror else turn + more) % self.rotations
        return (mirror ^ other) * self.rotations + turned

    def inverse(self, element: int) -> int:
        """The element that undoes another."""
        mirror, turn = divmod(element, self.rotations)
        return element if mirror else -turn % self.rotations

    def sources(self) -> Tensor:
        """(order, order) int64: where in a map over the group each element finds what it puts at each place."""
        every = range(self.order)
        return torch.tensor([[self.product(self.inverse(g), h) for h in every] for g in every])

    def act(self, x: Tensor, element: int, *, regular: bool = False) -> Tensor:
        """What an element does to images, or to maps over the group.

        Args:
            x: (..., H, W) images; (..., order, H, W) with ``regular``. Quarter turns and mirror images want any dtype
                and, to be what they are, squares; other angles resample bilinearly, zeros outside.
            element: which.
            regular: whether the axis before the last two is the group, which is then permuted too.

        Returns:
            A tensor shaped as ``x``; height and width changed places where a quarter turn was asked of no square.
        """
        mirror, turn = divmod(element, self.rotations)
        if mirror:
            x = x.flip(-1)
        quarters, rest = divmod(4 * turn, self.rotations)
        if quarters:
            x = torch.rot90(x, quarters, (-2, -1))
        if rest:
            images = x.reshape(-1, 1, *x.shape[-2:])
            parameters = images.new_zeros((len(images), 3))
            parameters[:, 0] = 90 * rest / self.rotations
            x = transform(images, parameters).view(x.shape)
        return x.index_select(-3, self.sources()[element].to(x.device)) if regular else x


P4 = Group(4)
P4M = Group(4, mirrored=True)
C8 = Group(8)
