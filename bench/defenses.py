"""Defenses of the studies for the command line: `--defense bench/defenses.py:straight` and the like."""

import copy

from _published import Published
from torch import nn

import equifast
from equifast.features import Features

EPS_PURIFY = 6 / 255


def published(model: nn.Module) -> Published:
    """The last two of the published code's twenty steps, which equal all of them (docs/corner.md)."""
    return Published(Features(copy.deepcopy(model).requires_grad_(True), None), EPS_PURIFY, seed=0, steps=2)


def straight(model: nn.Module) -> equifast.Purifier:
    """`fast` from the image, with half of the gradient through views."""
    return equifast.Purifier(model, start="origin", view_gradient=0.5, eps=EPS_PURIFY)


def straight_in_six(model: nn.Module) -> equifast.Purifier:
    """The same in six steps of a quarter of the radius, with more of that gradient."""
    return equifast.Purifier(
        model, start="origin", view_gradient=0.7, steps=6, step_size=EPS_PURIFY / 4, eps=EPS_PURIFY
    )
