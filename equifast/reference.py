"""The operators in plain PyTorch: the definition that every kernel is held to.

Any float dtype (but of the convolutions, which are float32 or float64) and device, differentiable twice (``warp`` with
respect to ``theta`` too). Geometry is computed in float64 whatever the dtype of the images, similarities are
accumulated in float32 or better.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from equifast import _checks, rng

__all__ = [
    "color_jitter",
    "conv_transpose",
    "conv_transpose_filters",
    "pair_similarity",
    "signed_step",
    "similarity",
    "turn_filters",
    "warp",
    "winograd",
    "winograd_filters",
]

_EDGE = 1 + 1e-6  # |q| up to this is inside the frame
_CHUNK = 4096
SMALL = 1e-6  # a vector of smaller norm counts as zero


def probabilities(logits: Tensor, dim: int = 1, dtype: torch.dtype | None = None) -> Tensor:
    """Softmax that gives an image the same bits in any batch.

    PyTorch's own, along another than the last dimension, rounds on the CPU by where its threads share the positions.
    """
    result = logits.dtype if dtype is None else dtype
    wide = torch.promote_types(result, torch.float32)  # in 16 bits logarithms would lose what their exponentials need
    return functional.log_softmax(logits, dim, dtype=wide).exp().to(result)


def row_sum(rows: Tensor) -> Tensor:
    """(N, M) -> (N,), where the sum of a row does not depend on N.

    PyTorch splits a large reduction to a single number over its threads, and one to several numbers not at all. Sums
    of chunks are several numbers also where N is 1. Its order is that of the memory, and the rows of one image may be
    a view of channels_last where those of several are a copy.
    """
    rows = rows.contiguous()
    whole = rows.shape[1] // _CHUNK * _CHUNK
    chunks = rows[:, :whole].unflatten(1, (-1, _CHUNK)).sum(2) if whole else rows[:, :0]
    return chunks.sum(1) + rows[:, whole:].sum(1)


def invert(theta: Tensor) -> Tensor:
    """The inverse affine maps, (..., 2, 3) float32 or float64 -> (..., 2, 3) float64; NaN where singular."""
    t = theta.to(torch.float64)
    a, b, c, d = t[..., 0, 0], t[..., 0, 1], t[..., 1, 0], t[..., 1, 1]
    # + 0.0 turns -0.0 into 0.0; the adjugate over the determinant is exact for identity and flips.
    linear = torch.stack((d, -b, -c, a), -1).unflatten(-1, (2, 2)) / (a * d - b * c)[..., None, None] + 0.0
    return torch.cat((linear, -(linear @ t[..., 2:]) + 0.0), -1)


def _positions(theta: Tensor, size: tuple[int, int], source: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Where output pixels of ``size`` read an input of size ``source``, in its pixels.

    (N, 2, 3) float64 -> ix, iy (N, h, w) float64, and (N, h, w) bool: inside the input frame.
    """
    (h, w), (height, width) = size, source
    i = torch.arange(w, dtype=torch.float64, device=theta.device) + 0.5
    j = torch.arange(h, dtype=torch.float64, device=theta.device)[:, None] + 0.5
    t = theta[..., None, None]
    ix = t[:, 0, 0] * (width / w) * i + t[:, 0, 1] * (width / h) * j
    ix = ix + width / 2 * (1 + t[:, 0, 2] - t[:, 0, 0] - t[:, 0, 1]) - 0.5
    iy = t[:, 1, 0] * (height / w) * i + t[:, 1, 1] * (height / h) * j
    iy = iy + height / 2 * (1 + t[:, 1, 2] - t[:, 1, 0] - t[:, 1, 1]) - 0.5
    inside = (((2 * ix + 1) / width - 1).abs() <= _EDGE) & (((2 * iy + 1) / height - 1).abs() <= _EDGE)
    # Outside, and where theta is NaN, the position is replaced: the value is 0 there whatever is read.
    return torch.where(inside, ix, 0.0), torch.where(inside, iy, 0.0), inside


def _taps(
    theta: Tensor, size: tuple[int, int], source: tuple[int, int], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """What each output pixel reads: (4, N, h*w) int64 positions, their weights, and (N, h, w) bool frame test."""
    height, width = source
    ix, iy, inside = _positions(theta.to(torch.float64), size, source)
    left, top = ix.detach().floor(), iy.detach().floor()
    fx, fy = (ix - left).to(dtype), (iy - top).to(dtype)
    # clamp before the index is an integer: a position may be huge
    x0, x1 = (side.clamp(0, width - 1).to(torch.int64) for side in (left, left + 1))
    y0, y1 = (side.clamp(0, height - 1).to(torch.int64) * width for side in (top, top + 1))
    index = torch.stack((y0 + x0, y0 + x1, y1 + x0, y1 + x1)).flatten(2)
    weight = torch.stack(((1 - fx) * (1 - fy), fx * (1 - fy), (1 - fx) * fy, fx * fy))
    return index, torch.where(inside, weight, 0.0).flatten(2), inside


class _Gather(torch.autograd.Function):
    """(N, C, H*W) -> (N, C, h*w): weighted sums of taps. Linear, and one buffer at a time; see _Scatter."""

    @staticmethod
    def forward(ctx: Any, flat: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(index, weight)
        ctx.source = flat.shape[2]
        total = flat.new_zeros(*flat.shape[:2], index.shape[2])
        for i, w in zip(index, weight, strict=True):
            total.addcmul_(flat.gather(2, i[:, None].expand_as(total)), w[:, None])
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        index, weight = ctx.saved_tensors
        return _scatter(upstream[0], index, weight, ctx.source), None, None


class _Scatter(torch.autograd.Function):
    """(N, C, h*w) -> (N, C, H*W): the adjoint of _Gather, and its derivative, as _Gather is the one of this."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, index: Tensor, weight: Tensor, source: int) -> Tensor:
        ctx.save_for_backward(index, weight)
        total = values.new_zeros(*values.shape[:2], source)
        for i, w in zip(index, weight, strict=True):
            total.scatter_add_(2, i[:, None].expand_as(values), values * w[:, None])
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None, None]:
        index, weight = ctx.saved_tensors
        return _gather(upstream[0], index, weight), None, None, None


_gather: Callable[..., Tensor] = _Gather.apply
_scatter: Callable[..., Tensor] = _Scatter.apply


def _sample(images: Tensor, theta: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Bilinear samples (N, C, h, w), 0 outside the frame, and the frame test (N, 1, h, w)."""
    index, weight, inside = _taps(theta, size, (images.shape[2], images.shape[3]), images.dtype)
    flat = images.flatten(2)
    if weight.requires_grad or _checks.transformed():
        taps = [flat.gather(2, i[:, None].expand(-1, flat.shape[1], -1)) for i in index]
        sampled = sum((tap * w[:, None] for tap, w in zip(taps, weight, strict=True)), torch.zeros_like(taps[0]))
    else:
        sampled = _gather(flat, index, weight)
    # the taps of a position outside weigh 0, but 0 times infinity is no 0
    return torch.where(inside[:, None], sampled.view(*images.shape[:2], *size), 0.0), inside[:, None]


def warp(images: Tensor, theta: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Resample images under K affine views, bilinearly (design: "Positions", "Sampling").

    Args:
        images: (N, C, H, W), any float dtype.
        theta: (K, N, 2, 3), float32 or float64; maps an output position to the input position that is read, both
            in normalized coordinates where the image spans [-1, 1] edge to edge (``align_corners=False``).
        sizes: K output sizes (h, w).

    Returns:
        K tensors (N, C, h, w): 0 outside the input frame; inside it taps clamp to the border pixels, so that the
        identity with another size is ``F.interpolate(mode="bilinear", align_corners=False)``.

    Raises:
        TypeError: if ``images`` or ``theta`` are not floating-point tensors.
        ValueError: if shapes or devices do not match, or ``theta`` (in host memory) is not finite or is singular.
    """
    sizes = _checks.warp(images, theta, sizes)
    if 0 in images.shape:
        return [images.new_zeros(*images.shape[:2], *size) for size in sizes]
    return [_sample(images, t, size)[0] for t, size in zip(theta, sizes, strict=True)]


def similarity(anchor: Tensor, views: Sequence[Tensor], theta: Tensor, reduction: str = "image") -> Tensor:
    """Cosine similarity of features and of those of each view warped back, over their overlap (paper: Eq. 2).

    Args:
        anchor: (N, C, H, W), the features of the images.
        views: K tensors (N, C, h, w), the features of their views, of any sizes, in the dtype of ``anchor``.
        theta: (K, N, 2, 3), float32 or float64, the matrices that made the views (as given to :func:`warp`).
        reduction: ``"image"``: one cosine per image and view over positions and channels; ``"pixel"``: the mean
            over positions of the cosines over channels.

    Returns:
        (N, K) in [-1, 1] but for rounding, float32, or float64 where the features are; 0, with zero gradient, where
        the overlap is empty or a norm is below 1e-6.

    Raises:
        TypeError: if tensors are not floating point, or differ in dtype.
        ValueError: if shapes or devices do not match, ``reduction`` is unknown, or ``theta`` (in host memory) is not
            finite or is singular.
    """
    _checks.similarity(anchor, views, theta, reduction)
    n, _, height, width = anchor.shape
    accumulate = torch.float64 if anchor.dtype == torch.float64 else torch.float32
    f0 = anchor.to(accumulate)
    if 0 in anchor.shape or any(0 in view.shape for view in views):
        return torch.zeros(n, len(views), dtype=accumulate, device=anchor.device)
    columns = []
    for view, inverse in zip(views, invert(theta), strict=True):
        fk, mask = _sample(view.to(accumulate), inverse, (height, width))  # fk is 0 outside the mask
        if reduction == "image":
            own = torch.where(mask, f0, 0.0)
            inner, *squares = (row_sum(product.flatten(1)) for product in (own * fk, own.square(), fk.square()))
            columns.append(_cosine(inner, *squares))
        else:
            cosine = _cosine((f0 * fk).sum(1), f0.square().sum(1), fk.square().sum(1))
            count = row_sum(mask.flatten(1).to(accumulate))
            columns.append(row_sum(torch.where(mask[:, 0], cosine, 0.0).flatten(1)) / count.clamp(min=1))
    return torch.stack(columns, 1)


def _cosine(inner: Tensor, square0: Tensor, square1: Tensor) -> Tensor:
    """Inner product over norms, from squared norms; 0 with zero gradient where a norm is below 1e-6, NaN of NaN."""
    small = (square0 < SMALL**2) | (square1 < SMALL**2)
    # The guarded operands keep the derivative of the square root finite where the result is discarded.
    norms = torch.where(small, 1.0, square0).sqrt() * torch.where(small, 1.0, square1).sqrt()
    return torch.where(small, 0.0, inner / norms)


def pair_similarity(maps: Sequence[Tensor]) -> Tensor:
    """The sum of the cosines of all pairs of maps: what the paper's code climbs in the place of its Eq. 2.

    With ``a_i = f_i / |f_i|``, all positions and channels of an image together, that is
    ``(|sum_i a_i|^2 - sum_i |a_i|^2) / 2``: linear in the number of maps. A map of norm below 1e-6 counts as zero.

    Args:
        maps: M tensors (N, C, H, W) of one shape, dtype and device, at least one; any float dtype.

    Returns:
        (N,), float32, or float64 where the maps are. Twice differentiable.

    Raises:
        TypeError: if the maps are not floating-point tensors of one dtype.
        ValueError: if there is none, or their shapes or devices differ.
    """
    _checks.maps(maps)
    wide = [f.to(torch.promote_types(f.dtype, torch.float32)) for f in maps]
    if _checks.transformed():
        return _pair_sum(*_unit_sum(wide))
    value: Tensor = _Pairs.apply(*wide)  # type: ignore[no-untyped-call, unused-ignore]
    return value


def _rows(f: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, C H W), in the order of memory where that is one of the two usual ones."""
    return (f.permute(0, 2, 3, 1) if f.is_contiguous(memory_format=torch.channels_last) else f).flatten(1)


def _unit_sum(maps: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The sum of maps (N, C, H, W) at unit length, and of each (N, 1, 1, 1) one over its length, or 0."""
    total, scales = torch.zeros_like(maps[0]), []
    for f in maps:
        square = row_sum(_rows(f).square())
        valid = square >= SMALL**2
        scale = torch.where(valid, torch.where(valid, square, 1.0).rsqrt(), 0.0).view(-1, 1, 1, 1)
        total = torch.addcmul(total, f, scale)
        scales.append(scale)
    return total, scales


def _pair_sum(total: Tensor, scales: Sequence[Tensor]) -> Tensor:
    """The value (N,), from what :func:`_unit_sum` gives."""
    count = torch.stack([(scale != 0).to(total.dtype).flatten() for scale in scales]).sum(0)
    return (row_sum(_rows(total).square()) - count) / 2


class _Pairs(torch.autograd.Function):
    """With few passes over memory, of which autograd would make several times as many; differentiable again."""

    @staticmethod
    def forward(ctx: Any, *maps: Tensor) -> Tensor:
        total, scales = _unit_sum(maps)
        ctx.save_for_backward(total, *scales, *maps)
        return _pair_sum(total, scales)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        total, *rest = ctx.saved_tensors
        scales, maps = rest[: len(rest) // 2], rest[len(rest) // 2 :]
        if torch.is_grad_enabled():  # with a graph of its own
            total, scales = _unit_sum(maps)
        weight = upstream[0].view(-1, 1, 1, 1)
        found: list[Tensor | None] = []
        for f, scale, needed in zip(maps, scales, ctx.needs_input_grad, strict=True):
            if not needed:
                found.append(None)
                continue
            along = row_sum(_rows(f * total)).view(-1, 1, 1, 1)  # what is along the map does not turn it
            found.append(torch.addcmul(total * (weight * scale), f, -weight * scale.pow(3) * along))
        return tuple(found)


def color_jitter(images: Tensor, parameters: Tensor) -> Tensor:
    """Change brightness, contrast, saturation and hue, in this order, then perhaps drop the color.

    The adjustments are those of torchvision's transform of the same name; after each of the first three, values are
    clamped to [0, 1]. Gray is ``0.2989 red + 0.587 green + 0.114 blue``, contrast is about the mean gray of the image.

    Args:
        images: (N, 3, H, W) in [0, 1], any float dtype.
        parameters: (N, 5), float32 or float64: the factors of brightness, contrast and saturation, at least 0, where 1
            changes nothing; the shift of the hue in turns, in [-0.5, 0.5]; and gray, 0 or 1.

    Returns:
        (N, 3, H, W) in [0, 1], in the dtype of ``images``.

    Raises:
        TypeError: if ``images`` or ``parameters`` are not floating-point tensors.
        ValueError: if shapes or devices do not match, or ``parameters`` (in host memory) leave their ranges.
    """
    _checks.color_jitter(images, parameters)

    if images.numel() == 0:
        return images.clone()
    # In float16 the gradient of the mean, a sum over all pixels, would overflow.
    wide = images.to(torch.promote_types(images.dtype, torch.float32))

    def factor(column: int) -> Tensor:
        return parameters[:, column].to(wide.dtype).view(-1, 1, 1, 1)

    x = _clamp_unit(wide * factor(0))
    gray = _gray(x)
    mean = (row_sum(gray.flatten(1)) / (x.shape[2] * x.shape[3])).view(-1, 1, 1, 1)
    x = _clamp_unit(mean + (x - mean) * factor(1))
    gray = _gray(x)
    x = _clamp_unit(gray + (x - gray) * factor(2))
    x = _shift_hue(x, factor(3)[:, 0])
    return torch.where((parameters[:, 4] != 0).view(-1, 1, 1, 1), _gray(x).expand_as(x), x).to(images.dtype)


def _clamp_unit(x: Tensor) -> Tensor:
    """To [0, 1]; its derivative is 1 at both ends, as torch's own is in some versions and in others not."""
    return torch.where(x < 0, 0.0, torch.where(x > 1, 1.0, x))


def _gray(x: Tensor) -> Tensor:
    red, green, blue = x.unbind(1)
    return (0.2989 * red + 0.587 * green + 0.114 * blue)[:, None]


def _shift_hue(x: Tensor, turns: Tensor) -> Tensor:
    """Turn the hue of (N, 3, H, W) in HSV space by (N, 1, 1) turns."""
    red, green, blue = x.unbind(1)
    value, low = x.amax(1), x.amin(1)
    chroma = value - low
    divisor = torch.where(chroma > 0, chroma, 1.0)
    hue = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    hue = hue + 6 * turns

    def channel(offset: float) -> Tensor:
        k = (hue + offset) % 6
        return value - chroma * _clamp_unit(torch.where(k < 4 - k, k, 4 - k))

    return torch.stack((channel(5), channel(3), channel(1)), 1)


def turn_filters(filters: Tensor, order: Tensor) -> Tensor:
    """Filters with their weights in each of several orders: what a group convolution is one ``conv2d`` over.

    Args:
        filters: (O, I, J), any float dtype: J weights for each of I channels of the input.
        order: (G, J) int64: which of the J weights comes at each place, a permutation for each element of the group.

    Returns:
        (O, G, I, J): ``filters[:, :, order]``, the elements of the group before the channels.

    Raises:
        TypeError, ValueError: if shapes, dtypes or devices do not fit.
    """
    _checks.turn_filters(filters, order)
    shape = (len(filters), len(order), *filters.shape[1:])
    return filters[:, None].expand(shape).gather(3, order[None, :, None].expand(shape))


def in_blocks(shape: Sequence[int], stride: int) -> bool:
    """Whether filters of a shape (O, C, h, w) are those of blocks of stride x stride pixels.

    That takes fewer products where channels are few, since the native kernel computes at least 16 at once.
    """
    _, channels, *sides = shape

    def products(kernel: Sequence[int], channels: int) -> int:
        return math.prod(kernel) * (channels + -channels % 16)

    return products([-(-side // stride) for side in sides], channels * stride**2) < products(sides, channels)


def conv_transpose_filters(weight: Tensor, stride: int) -> Tensor:
    """The filters of a strided convolution as :func:`conv_transpose` takes them.

    Args:
        weight: (O, C, h, w), any float dtype.
        stride: pixels, at least 1.

    Returns:
        (C / 16, h, w, O, 16), C / 16 rounded up, contiguous, zeros beyond what there is; where they are
        :func:`in_blocks` (stride^2 C / 16, h / stride, w / stride, O, 16), rounded up, the channels of one pixel of a
        block after the other's.

    Raises:
        TypeError, ValueError: if the weight is not that.
    """
    _checks.conv_transpose_weight(weight, stride)
    filters = weight.permute(2, 3, 0, 1)
    if in_blocks(weight.shape, stride):
        high, wide = (-side % stride for side in weight.shape[2:])
        filters = functional.pad(filters, (0, 0, 0, 0, 0, wide, 0, high))
        filters = filters.unflatten(1, (-1, stride)).unflatten(0, (-1, stride)).permute(0, 2, 4, 1, 3, 5).flatten(3)
    padded: Tensor = functional.pad(filters, (0, -filters.shape[3] % 16)).unflatten(3, (-1, 16))
    return padded.permute(3, 0, 1, 2, 4).contiguous()


def conv_transpose(
    x: Tensor,
    filters: Tensor,
    channels: int,
    size: tuple[int, int],
    stride: int,
    padding: tuple[int, int],
    blocks: bool = False,
) -> Tensor:
    """The gradient of a strided ``conv2d`` by its input, of square strides and without dilation and groups.

    What is not finite in x reaches whole blocks of pixels where filters are of these.

    Args:
        x: (N, O, h, w), float32 or float64: the gradient by the output.
        filters: (C' / 16, kernel height, kernel width, O, 16), of :func:`conv_transpose_filters`.
        channels: C, at least 1.
        size: (H, W) of the input, in pixels.
        stride: pixels, at least 1.
        padding: rows of zeros above and below the input, and columns at its sides, at least 0.
        blocks: whether the filters are :func:`in_blocks`.

    Returns:
        (N, C, H, W)

    Raises:
        TypeError, ValueError: if shapes, dtypes or devices do not fit.
    """
    _checks.conv_transpose(x, filters, channels, size, stride, padding, blocks)
    filters = filters.permute(1, 2, 3, 0, 4).flatten(3)
    if blocks:
        each = filters[..., : stride**2 * channels].unflatten(3, (stride, stride, channels))
        weight = each.permute(2, 5, 0, 3, 1, 4).flatten(4, 5).flatten(2, 3)
    else:
        weight = filters[..., :channels].permute(2, 3, 0, 1)
    (high, wide), (top, left) = size, padding
    if 0 in x.shape:
        return x.new_zeros((x.shape[0], channels, high, wide))
    with _as_given(x):
        whole = functional.conv_transpose2d(x, weight, None, stride)
    below, beside = (max(0, end - side) for end, side in ((top + high, whole.shape[2]), (left + wide, whole.shape[3])))
    return functional.pad(whole, (0, beside, 0, below))[..., top : top + high, left : left + wide]


def _as_given(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Without an autocast that the caller is in."""
    if torch.amp.is_autocast_available(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()


# Of Winograd's minimal filtering F(4x4, 3x3), by the points 0, 1, -1, 2, -2 and infinity (Lavin and Gray 2016, section
# 4.3): what inputs, filters and products are multiplied by along one side.
_INPUTS = (
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)
_FILTERS = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
_OUTPUTS = ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1))


def winograd_filters(weight: Tensor) -> Tensor:
    """The filters of a convolution as :func:`winograd` takes them, transformed in float64.

    Args:
        weight: (O, C, 3, 3), float32 or float64, O a multiple of 16.

    Returns:
        (O / 16, 36, C, 16), contiguous, in the dtype of the weight.

    Raises:
        TypeError, ValueError: if it is not.
    """
    _checks.winograd_weight(weight)
    side = torch.tensor(_FILTERS, dtype=torch.float64, device=weight.device)
    transformed = torch.einsum("ia,ocab,jb->oijc", side, weight.double(), side)
    filters: Tensor = transformed.unflatten(0, (-1, 16)).flatten(2, 3).permute(0, 2, 3, 1)
    return filters.to(weight.dtype).contiguous()


def winograd(
    x: Tensor, filters: Tensor, bias: Tensor | None = None, dilation: int = 1, padding: tuple[int, int] = (0, 0)
) -> Tensor:
    """``conv2d`` of 3x3 filters and stride 1 by Winograd's minimal filtering (Lavin and Gray 2016).

    A tile of 4x4 outputs takes 36 products where the sum itself takes 144. It rounds five to ten times as coarsely; and
    what is not finite in x reaches all of a tile's outputs.

    Args:
        x: (N, C, H, W), float32 or float64.
        filters: (O / 16, 36, C, 16), of :func:`winograd_filters`.
        bias: (O,), or None.
        dilation: pixels between the weights of a filter, at least 1.
        padding: rows of zeros above and below x, and columns at its sides, at least 0.

    Returns:
        (N, O, H + 2 padding[0] - 2 dilation, W + 2 padding[1] - 2 dilation)

    Raises:
        TypeError, ValueError: if shapes, dtypes or devices do not fit, or nothing is left of x.
    """
    height, width = _checks.winograd(x, filters, bias, dilation, padding)
    forward, back = (torch.tensor(side, dtype=x.dtype, device=x.device) for side in (_INPUTS, _OUTPUTS))
    rows, columns = (-(-side // (4 * dilation)) for side in (height, width))
    (top, left), (high, wide) = padding, ((4 * count + 2) * dilation for count in (rows, columns))
    padded = functional.pad(x, (left, wide - left - x.shape[3], top, high - top - x.shape[2]))
    # pixels that are `dilation` apart are neighbors to the filters
    phases = padded.unflatten(3, (-1, dilation)).unflatten(2, (-1, dilation)).permute(0, 3, 5, 1, 2, 4)
    tiles = phases.unfold(4, 6, 4).unfold(5, 6, 4)
    with _as_given(x):
        transformed = torch.einsum("ia,nxycrsab,jb->nxycrsij", forward, tiles, forward)
        weights = filters.permute(1, 2, 0, 3).flatten(2).unflatten(0, (6, 6))
        products = torch.einsum("nxycrsij,ijco->nxyorsij", transformed, weights)
        outputs = torch.einsum("ai,nxyorsij,bj->noraxsby", back, products, back)
    result = outputs.flatten(5, 7).flatten(2, 4)[:, :, :height, :width]
    return result if bias is None else result + bias.view(-1, 1, 1)


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
    """One noisy sign step of an L-infinity ascent and its projection (paper: Algorithm 1).

    ``P(x + step * sign(gradient / |gradient|_2 + sigma * xi))``, the norm per image, ``xi ~ N(0, I)`` of the stream
    ``rng.Stream.NOISE``, ``P`` the projection on the ball of radius ``eps`` around ``origin`` and on [0, 1].

    Args:
        x, gradient, origin: (N, C, H, W), one shape, dtype and device.
        eps: radius of the ball, above 0, in units of image values.
        step: step size in units of image values.
        sigma: standard deviation of the noise; the number 0 draws none.
        seed, draw, t: as in :mod:`equifast.rng`, ``t`` the step. ``seed``, ``t``, ``sigma`` and ``step`` may be 0-d
            tensors.
        ids: (N,) int64, the image ids.

    Returns:
        The next x, (N, C, H, W), no gradient.

    Raises:
        TypeError: if tensors are not floating point, or differ in dtype.
        ValueError: if shapes or devices do not match, or ``eps`` is not above 0.
    """
    ids = _checks.signed_step(x, gradient, origin, eps, ids)
    if x.numel() == 0:
        return x.detach().clone()
    with torch.no_grad():
        accumulate = torch.float64 if x.dtype == torch.float64 else torch.float32
        direction = noisy(gradient.to(accumulate), sigma, seed, ids, draw, t)
        moved = x.to(accumulate) + step * direction.sign()
        o = origin.to(accumulate)
        return moved.clamp(o - eps, o + eps).clamp(0, 1).to(x.dtype)


def noisy(
    gradient: Tensor, sigma: float | Tensor, seed: int | Tensor, ids: Tensor, draw: int | Tensor, t: int | Tensor
) -> Tensor:
    """What a sign step takes the sign of: the unit gradient and normal noise; differentiable by the gradient."""
    direction = unit(gradient)
    if isinstance(sigma, Tensor) or sigma != 0:
        noise = rng.normal(seed, int(rng.Stream.NOISE), ids, draw, t, gradient[0].numel()).view(gradient.shape)
        direction = direction + sigma * noise.to(gradient.dtype)
    return direction


def unit(gradient: Tensor) -> Tensor:
    """Each image's gradient over its L2 norm, (N, ...) -> (N, ...); a zero gradient stays zero."""
    # Scaled by the largest element first: the squares of tiny gradients would underflow.
    largest = gradient.detach().flatten(1).abs().amax(1)  # a factor that cancels
    largest = torch.where(largest == 0, 1.0, largest)
    scaled = gradient / largest.view(-1, *[1] * (gradient.dim() - 1))
    squares = row_sum(scaled.flatten(1).square())
    norm = torch.where(squares == 0, 1.0, squares).sqrt()  # that of 0 has no derivative
    return scaled / norm.view(-1, *[1] * (gradient.dim() - 1))
