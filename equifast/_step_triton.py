"""``signed_step`` as Triton kernels; :func:`equifast.reference.signed_step` is its definition.

Imports triton at the top, so whoever wants it imports this module at the last moment. It runs on CUDA tensors, and on
those in host memory where ``TRITON_INTERPRET=1`` was set before triton was first imported.
"""

# mypy: disallow-untyped-decorators=False

import torch
import triton
import triton.language as tl
from torch import Tensor

from equifast import _checks, rng

__all__ = ["signed_step"]

_NORM_BLOCK = 4096  # elements of one partial result; a constant, for the order of the sum follows from it
_COMBINE_BLOCK = 1024
_QUADS = 256  # groups of four elements that one program of the step handles; one Philox call serves each


@triton.jit
def _read(value: tl.tensor) -> tl.tensor:
    """A scalar argument: the number itself, or a pointer to it, so that a captured graph reads it at each replay."""
    scalar = tl.core.to_tensor(value)  # older versions have it there alone
    return tl.load(scalar) if scalar.dtype.is_ptr() else scalar


@triton.jit
def _radius(word: tl.tensor) -> tl.tensor:
    """sqrt(-2 log u), u = (word + 1/2) * 2^-32; uint32 -> float32.

    Above 1/2 float32 does not carry how far u is below 1, but 1 - u = (~word + 1/2) * 2^-32 it does, and
    -log(1 - v) = 2 atanh(v / (2 - v)) keeps the relative accuracy. The series, with s^2 <= 1/9, is good to 2e-8;
    Triton has no log1p that its interpreter runs.
    """
    upper = word > 0x7FFFFFFF
    tail = (tl.where(upper, word ^ 0xFFFFFFFF, word).to(tl.float32) + 0.5) * 2.3283064365386963e-10  # 2^-32
    s = tail / (2.0 - tail)
    z = s * s
    series = 1.0 / 13.0 + z * (1.0 / 15.0)
    series = 1.0 / 9.0 + z * (1.0 / 11.0 + z * series)
    series = 1.0 / 5.0 + z * (1.0 / 7.0 + z * series)
    series = 2.0 * (s + s * z * (1.0 / 3.0 + z * series))
    return tl.sqrt(2.0 * tl.where(upper, series, -tl.log(tail)))


@triton.jit
def _turn(word: tl.tensor) -> tl.tensor:
    """Cosine and sine of 2 pi u, u = (word + 1/2) * 2^-32; uint32 -> two float32.

    The quarter turn is taken off the integer, exactly, so that one pair of short polynomials on [-pi/4, pi/4] serves
    (Cephes, sinf.c; errors below 1e-7), without the code for huge arguments that tl.cos and tl.sin bring along.
    """
    quarter = ((word >> 29) + 1) >> 1  # the nearest: 0..4, where 4 is 0 again
    rest = (word << 2).to(tl.int32, bitcast=True) >> 2  # what is left, in units of 2^-32 turns
    angle = (rest.to(tl.float32) + 0.5) * 1.4629180792671596e-09  # pi * 2^-31
    z = angle * angle
    sine = 8.3321608736e-3 + z * -1.9515295891e-4
    sine = angle + angle * z * (-1.6666654611e-1 + z * sine)
    cosine = -1.388731625493765e-3 + z * 2.443315711809948e-5
    cosine = 1.0 - 0.5 * z + z * z * (4.166664568298827e-2 + z * cosine)
    odd = (quarter & 1) != 0
    x, y = tl.where(odd, sine, cosine), tl.where(odd, cosine, sine)
    return tl.where(((quarter + 1) & 2) != 0, -x, x), tl.where((quarter & 2) != 0, -y, y)


@triton.jit
def _box_muller(word0: tl.tensor, word1: tl.tensor) -> tl.tensor:
    radius = _radius(word0)
    cosine, sine = _turn(word1)
    return radius * cosine, radius * sine


@triton.jit
def _normal(
    quad: tl.tensor, id: tl.tensor, seed: tl.tensor, draw: tl.tensor, t: tl.tensor, STREAM: tl.constexpr
) -> tl.tensor:
    """The four normal numbers of each quad, (Q,) uint32 -> (Q, 4) float32: the stream of equifast/rng.py."""
    key = seed.to(tl.uint32).to(tl.uint64) + (STREAM << 32)
    zero = quad * 0
    moment = (draw.to(tl.uint32) << 16) + t.to(tl.uint32)
    low = (id & 0xFFFFFFFF).to(tl.uint32)
    high = ((id >> 32) & 0xFFFFFFFF).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(key, quad, zero + moment, zero + low, zero + high)
    first, second = _box_muller(w0, w1)
    third, fourth = _box_muller(w2, w3)
    # [q, i, j] is number 2 i + j of quad q
    pairs = tl.join(tl.join(first, third), tl.join(second, fourth))
    return tl.reshape(pairs, (quad.shape[0], 4))


@triton.jit
def _norm_kernel(
    gradient: tl.tensor,  # (N, elements)
    partial: tl.tensor,  # (N, chunks, 2): the largest magnitude of a chunk; the squares over its square, summed
    elements: tl.tensor,
    chunks: tl.tensor,
    TINY: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    accumulate = partial.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    first = (program % chunks) * BLOCK
    lane = tl.arange(0, BLOCK)
    here = gradient + (program // chunks) * elements + first
    g = tl.load(here + lane, mask=lane < elements - first, other=0).to(accumulate)
    largest = tl.maximum(tl.max(tl.abs(g), 0), TINY)
    # A NaN may not come through the maximum; through the sum it does, and so does infinity over infinity.
    scaled = g / largest
    where = partial + 2 * program
    tl.store(where, largest)
    tl.store(where + 1, tl.sum(scaled * scaled, 0))


@triton.jit
def _combine_kernel(
    partial: tl.tensor,  # (N, chunks, 2), of _norm_kernel
    scale: tl.tensor,  # (N, 2): the largest magnitude of an image; the norm of its gradient over that
    chunks: tl.tensor,
    TINY: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    accumulate = scale.dtype.element_ty
    image = tl.program_id(0).to(tl.int64)
    here = partial + 2 * image * chunks
    lane = tl.arange(0, BLOCK)
    most = tl.full((BLOCK,), TINY, accumulate)
    sums = tl.zeros((BLOCK,), accumulate)
    start = 0
    while start < chunks:  # range() over an argument fails in the interpreter of Triton 3.2 with a recent numpy
        chunk = start + lane
        mask = chunk < chunks
        largest = tl.load(here + 2 * chunk, mask=mask, other=0)
        square = tl.load(here + 2 * chunk + 1, mask=mask, other=0)
        before, most = most, tl.maximum(most, largest)
        down, ratio = before / most, largest / most
        sums = sums * down * down + square * ratio * ratio
        start += BLOCK
    total = tl.max(most, 0)
    ratio = most / total
    norm = tl.sqrt(tl.sum(sums * ratio * ratio, 0))
    tl.store(scale + 2 * image, total)
    tl.store(scale + 2 * image + 1, tl.where(norm < 1e-12, 1e-12, norm))  # NaN stays


# Not specialized: a seed or step that happens to be 1, or a multiple of 16, would be compiled for itself.
@triton.jit(do_not_specialize=["seed", "draw", "t"])
def _step_kernel(
    x: tl.tensor,  # (N, elements)
    gradient: tl.tensor,  # (N, elements)
    origin: tl.tensor,  # (N, elements)
    scale: tl.tensor,  # (N, 2), of _combine_kernel
    ids: tl.tensor,  # (N,) int64
    following: tl.tensor,  # (N, elements)
    eps: tl.tensor,  # this and the next five: a number, or ()
    step: tl.tensor,
    sigma: tl.tensor,
    seed: tl.tensor,
    draw: tl.tensor,
    t: tl.tensor,
    elements: tl.tensor,
    chunks: tl.tensor,
    NOISE: tl.constexpr,
    STREAM: tl.constexpr,
    QUADS: tl.constexpr,
) -> None:
    accumulate = scale.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    image, chunk = program // chunks, program % chunks
    first = chunk * (4 * QUADS)
    quad = tl.arange(0, QUADS)
    lane = 4 * quad[:, None] + tl.arange(0, 4)[None, :]
    mask = lane < elements - first
    start = image * elements + first

    g = tl.load(gradient + start + lane, mask=mask, other=0).to(accumulate)
    direction = g / tl.load(scale + 2 * image) / tl.load(scale + 2 * image + 1)
    if NOISE:
        number = (chunk * QUADS).to(tl.uint32) + quad.to(tl.uint32)
        noise = _normal(number, tl.load(ids + image), _read(seed), _read(draw), _read(t), STREAM)
        direction += _read(sigma).to(accumulate) * noise.to(accumulate)
    # The sign of NaN is 0, as that of torch.sign.
    sign = tl.where(direction > 0, 1.0, 0.0) - tl.where(direction < 0, 1.0, 0.0)
    moved = tl.load(x + start + lane, mask=mask, other=0).to(accumulate)
    moved += _read(step).to(accumulate) * sign.to(accumulate)

    # Comparisons, not tl.clamp: a NaN in x or origin must come out as one.
    center = tl.load(origin + start + lane, mask=mask, other=0).to(accumulate)
    radius = _read(eps).to(accumulate)
    low, high = center - radius, center + radius
    moved = tl.where(moved < low, low, moved)
    moved = tl.where(moved > high, high, moved)
    moved = tl.where(center == center, moved, center)
    moved = tl.where(moved < 0, 0.0, moved)
    moved = tl.where(moved > 1, 1.0, moved)
    tl.store(following + start + lane, moved.to(following.dtype.element_ty), mask=mask)


def _scalar(name: str, value: float | Tensor, x: Tensor) -> float | Tensor:
    """A number, or a 0-d tensor where ``x`` is."""
    if not isinstance(value, Tensor):
        return value
    if value.dim() != 0:
        raise ValueError(f"{name} has shape {_checks.shape(value)}; it must be a number or a 0-d tensor")
    if value.device.type == "cpu" and x.device.type != "cpu":
        return value.item()  # it lies in host memory: nobody waits
    _checks.same_device(name, value, "x", x)
    return value.detach()


def _real(name: str, value: float | Tensor, x: Tensor) -> float | Tensor:
    number = _scalar(name, value, x)
    if isinstance(number, Tensor):
        return number
    if x.dtype == torch.float64:  # Triton passes a Python number as float32
        return torch.full((), number, dtype=torch.float64, device=x.device)
    return float(number)


def _word(name: str, value: int | Tensor, x: Tensor) -> int | Tensor:
    word = _scalar(name, value, x)
    if isinstance(word, Tensor):
        return word
    # The signed number of the same 32 bits: one type in the kernel's signature whatever the value.
    return (int(word) + 2**31) % 2**32 - 2**31


def _memory(tensor: Tensor) -> Tensor:
    """Contiguous and on a 16-byte boundary.

    Triton vectorizes by the alignment that it is told, and a sum's order follows: it must not depend on where in a
    batch an image lies.
    """
    tensor = tensor.detach().contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def signed_step(
    x: Tensor,
    gradient: Tensor,
    origin: Tensor,
    eps: float,
    step: float | Tensor,
    sigma: float | Tensor,
    seed: int | Tensor,
    ids: Tensor,
    draw: int | Tensor,
    t: int | Tensor,
) -> Tensor:
    """One noisy sign step and its projection: arguments, result and errors of :func:`equifast.reference.signed_step`.

    ``step``, ``sigma``, ``seed``, ``draw`` and ``t`` may be 0-d tensors on the device of ``x``: the kernels read them
    there, so that a captured graph can be replayed with others. The noise agrees with the reference's to 1e-5.
    """
    ids = _checks.signed_step(x, gradient, origin, eps, ids)
    if x.numel() == 0:
        return x.detach().clone()
    sigma = _scalar("sigma", sigma, x)
    noise = isinstance(sigma, Tensor) or sigma != 0
    result = torch.empty_like(x, requires_grad=False)  # in the order of x's strides, as the reference's
    tensors = [x, gradient, origin]
    following = result
    if not noise and all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in tensors):
        # Without noise no element has a number: the order in memory serves as well as that of (C, H, W).
        tensors = [tensor.permute(0, 2, 3, 1) for tensor in tensors]
    elif not result.is_contiguous():
        following = torch.empty_like(x, memory_format=torch.contiguous_format, requires_grad=False)
    x_, gradient_, origin_ = (_memory(tensor) for tensor in tensors)

    n, elements = x.shape[0], x[0].numel()
    accumulate = torch.float64 if x.dtype == torch.float64 else torch.float32
    tiny = torch.finfo(accumulate).tiny
    reals = [_real(name, value, x) for name, value in (("eps", eps), ("step", step), ("sigma", sigma))]
    words = [_word(name, value, x) for name, value in (("seed", seed), ("draw", draw), ("t", t))]
    norm_chunks, chunks = triton.cdiv(elements, _NORM_BLOCK), triton.cdiv(elements, 4 * _QUADS)
    partial = torch.empty(n, norm_chunks, 2, dtype=accumulate, device=x.device)
    scale = torch.empty(n, 2, dtype=accumulate, device=x.device)
    with torch.cuda.device_of(x):
        _norm_kernel[(n * norm_chunks,)](
            gradient_, partial, elements, norm_chunks, TINY=tiny, BLOCK=_NORM_BLOCK, num_warps=8, enable_fp_fusion=True
        )
        _combine_kernel[(n,)](partial, scale, norm_chunks, TINY=tiny, BLOCK=_COMBINE_BLOCK, enable_fp_fusion=True)
        _step_kernel[(n * chunks,)](
            x_,
            gradient_,
            origin_,
            scale,
            ids.contiguous(),
            following,
            *reals,
            *words,
            elements,
            chunks,
            NOISE=noise,
            STREAM=int(rng.Stream.NOISE),
            QUADS=_QUADS,
            enable_fp_fusion=True,
        )
    return result if following is result else result.copy_(following)
