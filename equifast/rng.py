"""Counter-based random numbers (Philox-4x32-10; Salmon et al. 2011), the same on every backend.

Every number is a function of ``(seed, stream, image id, draw, step, element)`` and of nothing else: not of the
batch that an image is in, not of its place there, not of any global random state. The layout of the counter:

* key ``(seed, stream)``, counter ``(element // 4, draw * 2**16 + step, id low word, id high word)``;
* a word ``w`` becomes ``u = (w + 1/2) * 2**-32``, in the open interval (0, 1);
* normal numbers are Box-Muller pairs of the words (0, 1) and (2, 3), cosine then sine.
"""

import enum
import math

import torch
from torch import Tensor

__all__ = ["MAX_DRAW", "MAX_STEP", "Stream", "fresh_seed", "normal", "philox", "uniform"]

MAX_DRAW = 2**16 - 1
MAX_STEP = 2**16 - 1

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


class Stream(enum.IntEnum):
    """Who draws: numbers of different streams are independent under one seed."""

    START = 0  # where an ascent starts in its ball
    NOISE = 1  # the noise of signed_step
    CHOICE = 2  # which views a step uses
    SHARED = 3  # what a view draws once for all images (sizes)
    IMAGE = 4  # what a view draws per image (angle, shift, jitter)
    DEFENSE = 5  # the noise of defenses.RandomNoise

    def of(self, index: int) -> int:
        """The stream's number for the ``index``-th of several equal parties (the views of a set)."""
        return int(self) + len(Stream) * index


def philox(counter: list[Tensor], key: list[Tensor]) -> list[Tensor]:
    """Ten rounds of Philox-4x32.

    Args:
        counter: four int64 tensors of one shape, each element a 32-bit word.
        key: two int64 tensors that broadcast against them.

    Returns:
        Four int64 tensors of 32-bit words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # int64 products wrap modulo 2**64, so after masking both halves are those of the unsigned product.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (p1 >> 32) & _WORD ^ c1 ^ k0,
            p1 & _WORD,
            (p0 >> 32) & _WORD ^ c3 ^ k1,
            p0 & _WORD,
        )
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return [c0, c1, c2, c3]


def _words(
    seed: int | Tensor,
    stream: int,
    ids: Tensor,
    draw: int | Tensor,
    step: int | Tensor,
    count: int,
) -> Tensor:
    blocks = -(-count // 4)
    zero = torch.zeros(ids.numel(), blocks, dtype=torch.int64, device=ids.device)
    column = ids.to(torch.int64).reshape(-1, 1)
    counter = [
        zero + torch.arange(blocks, device=ids.device),
        (zero + draw) * 2**16 + step,  # in int64, also where draw is a tensor of a narrower type
        zero + (column & _WORD),
        zero + (column >> 32 & _WORD),
    ]
    scalar = torch.zeros((), dtype=torch.int64, device=ids.device)
    return torch.stack(philox(counter, [scalar + seed, scalar + stream]), dim=-1)  # (N, blocks, 4)


def _unit(words: Tensor) -> Tensor:
    return (words.to(torch.float64) + 0.5) * 2.0**-32


def uniform(
    seed: int | Tensor,
    stream: int,
    ids: Tensor,
    draw: int | Tensor,
    step: int | Tensor,
    count: int,
) -> Tensor:
    """Uniform numbers in (0, 1).

    Args:
        seed: 0..2**32-1, a number or a 0-d int64 tensor.
        stream: a :class:`Stream` or the number that :meth:`Stream.of` gives.
        ids: (N,) int64 image ids.
        draw: 0..65535, the realization.
        step: 0..65535, the step of the ascent.
        count: numbers per image.

    Returns:
        (N, count) float64 on the device of ``ids``.
    """
    return _unit(_words(seed, stream, ids, draw, step, count)).flatten(1)[:, :count]


def normal(
    seed: int | Tensor,
    stream: int,
    ids: Tensor,
    draw: int | Tensor,
    step: int | Tensor,
    count: int,
) -> Tensor:
    """Standard normal numbers by Box-Muller; arguments and result as those of :func:`uniform`."""
    u = _unit(_words(seed, stream, ids, draw, step, count))
    radius, angle = (-2 * u[..., 0::2].log()).sqrt(), 2 * math.pi * u[..., 1::2]
    pairs = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1)  # (N, blocks, 2, 2)
    return pairs.flatten(1)[:, :count]


def fresh_seed() -> int:
    """A seed from torch's global generator: the one place where global random state is read."""
    return int(torch.randint(2**32, ()).item())
