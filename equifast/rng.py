"""Counter-based random numbers (Philox-4x32-10; Salmon et al. 2011), the same on every backend.

Every number is a function of ``(seed, stream, image id, draw, step, element)`` and of nothing else: not of the
batch that an image is in, not of its place there, not of any global random state. The layout of the counter:

* key ``(seed, stream)``, counter ``(element // 4, draw * 2**16 + step, id low word, id high word)``;
* a word ``w`` becomes ``u = (w + 1/2) * 2**-32``, in the open interval (0, 1);
* normal numbers are Box-Muller pairs of the words (0, 1) and (2, 3), cosine then sine.
"""

import enum
import math
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["MAX_DRAW", "MAX_STEP", "Stream", "fresh_seed", "normal", "philox", "uniform"]

MAX_DRAW = 2**16 - 1
MAX_STEP = 2**16 - 1

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)

Words = TypeVar("Words", Tensor, NDArray[np.int64])


class Stream(enum.IntEnum):
    """Who draws: numbers of different streams are independent under one seed."""

    START = 0  # where an ascent starts in its ball; of(0) is a purifier's, of(1) an attack's
    NOISE = 1  # the noise of signed_step
    CHOICE = 2  # which views a step uses
    SHARED = 3  # what a view draws once for all images (sizes)
    IMAGE = 4  # what a view draws per image (angle, shift, jitter)
    DEFENSE = 5  # the noise of defenses.RandomNoise

    def of(self, index: int) -> int:
        """The stream's number for the ``index``-th of several equals: views of a set, purifier and attack."""
        return int(self) + len(Stream) * index


def philox(counter: list[Words], key: list[Words]) -> list[Words]:
    """Ten rounds of Philox-4x32, in torch or in numpy.

    Args:
        counter: four int64 tensors or arrays that broadcast, each element a 32-bit word.
        key: two more that broadcast against them.

    Returns:
        Four int64 tensors or arrays of 32-bit words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # int64 products wrap modulo 2**64: their lower halves, and after masking the upper ones, are those of the
        # unsigned product. What is not multiplied next may carry more than its 32 bits.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) ^ c1 ^ k0) & _WORD, p1, ((p0 >> 32) ^ c3 ^ k1) & _WORD, p0
        k0, k1 = k0 + _WEYL[0], k1 + _WEYL[1]
    return [c0, c1 & _WORD, c2, c3 & _WORD]


def _unit(
    seed: int | Tensor,
    stream: int | Sequence[int],
    ids: Tensor,
    draw: int | Tensor,
    step: int | Tensor,
    count: int,
) -> Tensor:
    """Uniform numbers (N, blocks, 4), or (S, N, blocks, 4) of several streams."""
    ids, blocks = ids.to(torch.int64), -(-count // 4)
    if ids.device.type == "cpu" and not any(isinstance(number, Tensor) for number in (seed, draw, step)):
        # numpy: on small arrays torch's many operations would take several times as long
        key = [np.asarray(seed, np.int64), np.asarray(stream, np.int64)]
        place = [np.asarray(draw, np.int64), np.asarray(step, np.int64)]
        words = np.stack(_words(key, place, ids.numpy(), np.arange(blocks)), -1)
        return torch.from_numpy((words + 0.5) * 2.0**-32)
    zero = torch.zeros((), dtype=torch.int64, device=ids.device)  # keeps sums in int64 and on the device
    streams = zero + stream if isinstance(stream, int) else torch.tensor(stream, device=ids.device)
    elements = torch.arange(blocks, device=ids.device)
    drawn = torch.stack(_words([zero + seed, streams], [zero + draw, zero + step], ids, elements), -1)
    return (drawn.to(torch.float64) + 0.5) * 2.0**-32


def _words(key: list[Words], place: list[Words], ids: Words, blocks: Words) -> list[Words]:
    (seed, stream), (draw, step) = key, place
    column = ids.reshape(-1, 1)
    counter = [blocks, draw * 2**16 + step, column & _WORD, column >> 32 & _WORD]
    return philox(counter, [seed, stream[..., None, None]])


def uniform(
    seed: int | Tensor,
    stream: int | Sequence[int],
    ids: Tensor,
    draw: int | Tensor,
    step: int | Tensor,
    count: int,
) -> Tensor:
    """Uniform numbers in (0, 1).

    Args:
        seed: 0..2**32-1, a number or a 0-d int64 tensor.
        stream: a :class:`Stream` or the number that :meth:`Stream.of` gives; or S of them.
        ids: (N,) int64 image ids.
        draw: 0..65535, the realization.
        step: 0..65535, the step of the ascent.
        count: numbers per image.

    Returns:
        (N, count) float64 on the device of ``ids``; (S, N, count) for several streams.
    """
    return _unit(seed, stream, ids, draw, step, count).flatten(-2)[..., :count]


def normal(
    seed: int | Tensor,
    stream: int | Sequence[int],
    ids: Tensor,
    draw: int | Tensor,
    step: int | Tensor,
    count: int,
) -> Tensor:
    """Standard normal numbers by Box-Muller; arguments and result as those of :func:`uniform`."""
    u = _unit(seed, stream, ids, draw, step, count)
    radius, angle = (-2 * u[..., 0::2].log()).sqrt(), 2 * math.pi * u[..., 1::2]
    pairs = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1)  # (..., N, blocks, 2, 2)
    return pairs.flatten(-3)[..., :count]


def fresh_seed() -> int:
    """A seed from torch's global generator: the one place where global random state is read."""
    return int(torch.randint(2**32, ()).item())
