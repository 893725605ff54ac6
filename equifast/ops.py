"""The operators as the rest of the package uses them: names and signatures of :mod:`equifast.reference`.

Two backends compute: the native one, compiled from ``csrc/``, and the reference. :func:`choose` decides.
"""

import contextlib
import ctypes
import functools
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from equifast import _C, _checks, reference

__all__ = [
    "Backend",
    "backend",
    "choose",
    "color_jitter",
    "conv_transpose",
    "conv_transpose_filters",
    "pair_similarity",
    "signed_step",
    "similarity",
    "turn_filters",
    "use",
    "warp",
    "winograd",
    "winograd_filters",
]

BACKENDS = ("native", "reference")
_ISAS = ("baseline", "avx2", "avx512")  # of which the widest is taken that the machine has

_override: ContextVar[str | None] = ContextVar("equifast backend", default=None)


class Backend(str):
    """The name of a backend, and in ``reason`` why it is the one."""

    reason: str

    def __new__(cls, name: str, reason: str) -> "Backend":
        made = super().__new__(cls, name)
        made.reason = reason
        return made


@functools.cache
def _load() -> str:
    """Load the operator library, once; returns why it cannot be used, or an empty string."""
    if asked := os.environ.get("EQUIFAST_ISA"):
        _checks.choice("EQUIFAST_ISA", asked, _ISAS)
    if "_ops" not in _C.operator_libraries:
        return "this build has no native operators (torch was not in the environment that built it)"
    problem = _load_library("_ops")
    if not problem:
        _register()
    return problem


@functools.cache
def _load_cuda() -> str:
    """Load the CUDA kernels too, once; returns why they cannot be used, or an empty string."""
    if problem := _load():
        return problem
    if "_ops_cuda" not in _C.operator_libraries:
        return "this build has no CUDA kernels (no nvcc, or no torch with CUDA, was in the environment that built it)"
    return _load_library("_ops_cuda")


def _load_library(stem: str) -> str:
    try:
        torch.ops.load_library(Path(__file__).with_name(f"{stem}.so"))
    except (OSError, RuntimeError, ImportError) as error:
        return f"the operator library {stem} does not load: {str(error).splitlines()[0]}"
    return ""


def _problem(device: torch.device) -> str:
    """Why the native backend cannot compute for tensors of a device, or an empty string."""
    if device.type == "cpu":
        return _load()
    if device.type != "cuda":
        return f"there are no native kernels for {device.type}"
    if not torch.cuda.is_available():
        return "there is no CUDA device here"
    return _load_cuda() or _too_old(*torch.cuda.get_device_capability(device))


def _too_old(major: int, minor: int) -> str:
    """Why no kernel of this build runs on a GPU, or an empty string."""
    built = [int(name) for name in _C.cuda_architectures if name.isdecimal()]
    if not built or 10 * major + minor >= min(built):
        return ""
    return f"this build has kernels for sm_{min(built)} and later, and this GPU is sm_{major}{minor}"


def instruction_set() -> str | None:
    """The instruction set whose kernels the native backend runs on this CPU, or None where it is not usable."""
    if _load():
        return None
    function = ctypes.CDLL(str(Path(__file__).with_name("_ops.so"))).equifast_instruction_set
    function.restype = ctypes.c_char_p
    return str(function().decode())


@functools.cache
def has_vectors() -> bool:
    """Whether the native backend has kernels for the wide registers of this CPU."""
    return instruction_set() in ("avx2", "avx512")


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _asked() -> tuple[str | None, str]:
    """The backend that was asked for, if any, and by what."""
    asked, by = _override.get(), "equifast.ops.use"
    if asked is None:
        asked, by = os.environ.get("EQUIFAST_BACKEND") or None, "EQUIFAST_BACKEND"
    return (None if asked is None else _checks.choice(by, asked, BACKENDS)), by


def choose(device: torch.device) -> Backend:
    """Who computes for tensors of a device: ``"native"`` where it is built for it, else ``"reference"``.

    ``EQUIFAST_BACKEND`` in the environment, and over it :func:`use`, ask for one of them.

    Raises:
        ValueError: if the backend asked for has another name.
        RuntimeError: if ``"native"`` is asked for and cannot be used.
    """
    asked, by = _asked()
    if asked == "reference":
        return Backend("reference", f"{by} asks for it")
    problem = _problem(device)
    if not problem:
        return Backend("native", f"{by} asks for it" if asked else "it is built and loads")
    if asked == "native":
        raise RuntimeError(f"{by} asks for the native backend, but {problem}")
    return Backend("reference", problem)


def backend() -> Backend:
    """Who computes for tensors on the CPU."""
    return choose(torch.device("cpu"))


@contextlib.contextmanager
def use(name: str) -> Iterator[None]:
    """Inside, the operators run on one backend: ``"native"`` or ``"reference"``.

    Raises:
        ValueError: if there is no such backend.
    """
    token = _override.set(_checks.choice("backend", name, BACKENDS))
    try:
        yield
    finally:
        _override.reset(token)


def kept() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """What makes the backend of now that of later: on CUDA PyTorch goes back in threads that know of no :func:`use`."""
    asked = _override.get()
    return contextlib.nullcontext if asked is None else functools.partial(use, asked)


def _chosen(device: torch.device) -> bool:
    return choose(device) == "native"


# What torch.compile traces keeps the backend of that moment. torch.compiler.assume_constant_result sets this too, but
# imports the compiler for it, which takes as long as importing torch.
_chosen._dynamo_marked_constant = True  # type: ignore[attr-defined]


def native(tensor: Tensor) -> bool:
    """Whether the native backend computes for a tensor."""
    # a fake or a meta tensor of torch.compile says the device that it stands for
    return not _checks.transformed() and tensor.dtype in _DTYPES and _chosen(tensor.device)


_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def _constant(argument: str, value: Tensor, operator: str) -> Tensor:
    """An argument without derivative, as the native operators take it: float64 and contiguous."""
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{argument} requires a gradient; it must not, or use equifast.reference.{operator}")
    if value.dtype == torch.float64 and value.is_contiguous() and not value.requires_grad:
        return value
    return value.detach().to(torch.float64).contiguous()


def warp(images: Tensor, theta: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Resample images under K affine views; see :func:`equifast.reference.warp`.

    All views in one call. Differentiable, twice and more, with respect to ``images``; a ``theta`` that requires a
    gradient is refused by the native backend.
    """
    return warp_sampled(images, theta, _checks.warp(images, theta, sizes))


def warp_sampled(images: Tensor, theta: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """:func:`warp` of matrices that :func:`equifast.views.sample` gave, which has checked them."""
    if images.shape[0] != theta.shape[1]:
        raise ValueError(
            f"images has {images.shape[0]} images, theta matrices of {theta.shape[1]}; they must be as many"
        )
    if not native(images):
        return reference.warp(images, theta, sizes)
    heights, widths = [h for h, _ in sizes], [w for _, w in sizes]
    arguments = (images, _constant("theta", theta, "warp"), heights, widths)
    return list(_Warp.apply(*arguments) if _eager(images) else torch.ops.equifast.warp(*arguments))


def in_frame(maps: Tensor, theta: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Maps of a view (N, C, h, w), made by ``theta`` (N, 2, 3), in the frame of its image, and where it is seen.

    Returns:
        (N, C, H, W) and (N, 1, H, W) bool, of ``size``.
    """
    inverse = reference.invert(theta)[None]
    ones = torch.ones_like(maps[:, :1].detach())
    return warp(maps, inverse, [size])[0], warp(ones, inverse, [size])[0] > 0.5


def similarity(anchor: Tensor, views: Sequence[Tensor], theta: Tensor, reduction: str = "image") -> Tensor:
    """Cosine similarity of features and of those of views warped back; see :func:`equifast.reference.similarity`.

    The native backend materializes neither warped features nor masks, but for a second derivative. It is differentiable
    twice with respect to ``anchor`` and ``views``, and refuses a ``theta`` that requires a gradient.
    """
    _checks.similarity(anchor, views, theta, reduction)
    if not native(anchor):
        return reference.similarity(anchor, views, theta, reduction)
    matrices, pixel = _constant("theta", theta, "similarity"), reduction == "pixel"
    result: Tensor
    if _eager(anchor, *views):
        result = _Similarity.apply(anchor, matrices, pixel, *views)
    else:
        result = torch.ops.equifast.similarity(anchor, list(views), matrices, pixel)[0]
    return result


def similarity_gradient(
    anchor: Tensor,
    view: Tensor,
    theta: Tensor,
    total: Tensor,
    reduction: str = "image",
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Similarity of a single view and its gradients, in one call and with no graph: what a step of an ascent wants.

    Args:
        anchor: (N, C, H, W).
        view: (N, C, h, w).
        theta: (1, N, 2, 3), as :func:`equifast.views.sample` gives it: its values are not checked again.
        total: in the shape and dtype of ``anchor``; the gradient with respect to ``anchor`` is added to it.
        reduction: as in :func:`similarity`.
        scale: (N,), what the gradients of each image are multiplied by, lest they vanish in float16.

    Returns:
        The similarity (N, 1), and its gradient with respect to ``view``, (N, C, h, w).

    Raises:
        ValueError, TypeError: if ``view`` or ``total`` is not as ``anchor``.
    """
    _checks.tensor("anchor", anchor, 4, "(N, C, H, W)")
    _checks.features(anchor, [view])
    _checks.total(total, anchor)
    anchor, view = anchor.detach(), view.detach()
    if anchor.numel() == 0 or view.numel() == 0:
        return anchor.new_zeros((len(anchor), 1), dtype=_accumulator(anchor)), torch.zeros_like(view)
    alone = all(total.untyped_storage().data_ptr() != f.untyped_storage().data_ptr() for f in (anchor, view))
    if alone and scale is None and _native_gradient(anchor, reduction) and _alike(total, anchor):
        matrices = _constant("theta", theta, "similarity")
        added: tuple[Tensor, Tensor] = torch.ops.equifast.similarity_gradient(total, anchor, view, matrices)
        torch.autograd.graph.increment_version(total)
        return added
    with torch.enable_grad():
        leaves = [anchor.requires_grad_(), view.requires_grad_()]
        s = similarity(anchor, [view], theta, reduction)
        for_anchor, for_view = torch.autograd.grad(s, leaves, _upstream(s, scale))
    total += for_anchor
    return s.detach(), for_view


def similarity_target(
    anchor: Tensor, views: Sequence[Tensor], theta: Tensor, reduction: str = "image", scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Similarity and its gradient with respect to the anchor alone, to which views are targets; no graph.

    Args:
        anchor: (N, C, H, W).
        views: K tensors (N, C, h, w).
        theta: (K, N, 2, 3), as :func:`equifast.views.sample` gives it: its values are not checked again.
        reduction: as in :func:`similarity`.
        scale: as in :func:`similarity_gradient`.

    Returns:
        The similarities (N, K), and the gradient of their sum over the views with respect to ``anchor``, in its shape.

    Raises:
        ValueError, TypeError: if ``views`` are not as ``anchor``, or there is none.
    """
    _checks.tensor("anchor", anchor, 4, "(N, C, H, W)")
    if not views:
        raise ValueError("views is empty; there must be at least one")
    _checks.features(anchor, views)
    anchor, views = anchor.detach(), [view.detach() for view in views]
    if anchor.numel() == 0 or any(view.numel() == 0 for view in views):
        return anchor.new_zeros((len(anchor), len(views)), dtype=_accumulator(anchor)), torch.zeros_like(anchor)
    if scale is None and _native_gradient(anchor, reduction):
        found: tuple[Tensor, Tensor] = torch.ops.equifast.similarity_target(
            anchor, views, _constant("theta", theta, "similarity")
        )
        return found
    with torch.enable_grad():
        s = similarity(anchor.requires_grad_(), views, theta, reduction)
        (for_anchor,) = torch.autograd.grad(s, [anchor], _upstream(s, scale))
    return s.detach(), for_anchor


def _upstream(s: Tensor, scale: Tensor | None) -> Tensor:
    return torch.ones_like(s) if scale is None else scale.to(s.dtype)[:, None].expand_as(s)


def _native_gradient(anchor: Tensor, reduction: str) -> bool:
    """Whether there is an operator for a value with its gradients."""
    return anchor.device.type == "cpu" and reduction == "image" and native(anchor)


def pair_similarity(maps: Sequence[Tensor]) -> Tensor:
    """The sum of the cosines of all pairs of maps; see :func:`equifast.reference.pair_similarity`.

    On the CPU the native backend reads the maps three times and writes little but their gradients. It is differentiable
    twice. On CUDA it is the reference.
    """
    _checks.maps(maps)
    if maps[0].device.type == "cuda" or not native(maps[0]):
        return reference.pair_similarity(maps)
    result: Tensor
    result = _PairSimilarity.apply(*maps) if _eager(*maps) else torch.ops.equifast.pair_similarity(list(maps))[0]
    return result


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
    """One noisy sign step of an L-infinity ascent and its projection; see :func:`equifast.reference.signed_step`.

    On CUDA it is a Triton kernel where triton is installed, unless the reference is asked for.
    """
    ids = _checks.signed_step(x, gradient, origin, eps, ids)
    if x.device.type == "cuda" and _asked()[0] != "reference" and _has_triton():
        from equifast import _step_triton

        return _step_triton.signed_step(x, gradient, origin, eps, step, sigma, seed, ids, draw, t)
    if x.device.type == "cuda" or not native(x):  # native on CUDA is Triton's alone
        return reference.signed_step(x, gradient, origin, eps, step, sigma, seed, ids, draw, t)
    tensors = (x.detach(), gradient.detach(), origin.detach())
    moved: Tensor = torch.ops.equifast.signed_step(
        *tensors, float(eps), float(step), float(sigma), int(seed), ids, int(draw), int(t)
    )
    return moved


def color_jitter(images: Tensor, parameters: Tensor) -> Tensor:
    """Change brightness, contrast, saturation and hue of images; see :func:`equifast.reference.color_jitter`.

    On the CPU the native backend makes one pass for the mean of each image and one for the rest, computes in float32,
    or float64 where the images are, and keeps nothing but its arguments for its derivative. It is differentiable twice
    with respect to ``images``, and refuses ``parameters`` that require a gradient. On CUDA it is the reference.
    """
    _checks.color_jitter(images, parameters)
    if images.device.type == "cuda" or not native(images):
        return reference.color_jitter(images, parameters)
    arguments = (images, _constant("parameters", parameters, "color_jitter"))
    result: Tensor
    result = _ColorJitter.apply(*arguments) if _eager(images) else torch.ops.equifast.color_jitter(*arguments)[0]
    return result


def turn_filters(filters: Tensor, order: Tensor) -> Tensor:
    """Filters with their weights in each of several orders; see :func:`equifast.reference.turn_filters`.

    Differentiable any number of times, where each order is a permutation; sums of derivatives go over the group in its
    order, on every device.
    """
    _checks.turn_filters(filters, order)
    order = order.contiguous()
    result: Tensor
    if _checks.transformed():
        result = reference.turn_filters(filters, order)
    elif not torch.compiler.is_compiling():
        result = _TurnFilters.apply(filters, order)
    elif _on_cpu(filters):
        result = torch.ops.equifast.turn_filters(filters, order)
    else:
        result = reference.turn_filters(filters, order)
    return result


winograd_filters = reference.winograd_filters
WINOGRAD_CHANNELS = 16
"""The native convolution takes multiples of so many, of its input and its output."""


def winograd(
    x: Tensor, filters: Tensor, bias: Tensor | None = None, dilation: int = 1, padding: tuple[int, int] = (0, 0)
) -> Tensor:
    """A convolution of 3x3 filters in a quarter of the products; see :func:`equifast.reference.winograd`.

    Native on the CPU where no gradient is wanted and the numbers of channels are multiples of 16; the result is
    channels_last there, and that of an image has the same bits in any batch.
    """
    _checks.winograd(x, filters, bias, dilation, padding)
    whole = len(filters) > 0 and x.shape[1] % WINOGRAD_CHANNELS == 0
    short = max(*x.shape[2:], *padding, dilation) < MOST_PIXELS
    if not (whole and short) or not _constant_on_cpu(x, filters, *([] if bias is None else [bias])):
        return reference.winograd(x, filters, bias, dilation, padding)
    result: Tensor = torch.ops.equifast.winograd(x, filters, bias, dilation, padding)
    return result


conv_transpose_filters, in_blocks = reference.conv_transpose_filters, reference.in_blocks
MOST_PIXELS, MOST_STRIDE = 2**20, 1024
"""Longer sides, kernels, paddings and strides the native convolutions do not take."""


def conv_transpose(
    x: Tensor,
    filters: Tensor,
    channels: int,
    size: tuple[int, int],
    stride: int,
    padding: tuple[int, int],
    blocks: bool = False,
) -> Tensor:
    """The gradient of a strided convolution; see :func:`equifast.reference.conv_transpose`.

    Native on the CPU where no gradient is wanted; the result is channels_last there, and that of an image has the same
    bits in any batch.
    """
    _checks.conv_transpose(x, filters, channels, size, stride, padding, blocks)
    short = max(*x.shape[2:], *filters.shape[1:3], *size, *padding) < MOST_PIXELS and stride < MOST_STRIDE
    if not short or not _constant_on_cpu(x, filters):
        return reference.conv_transpose(x, filters, channels, size, stride, padding, blocks)
    result: Tensor = torch.ops.equifast.conv_transpose(x, filters, channels, size, stride, padding, blocks)
    return result


def _constant_on_cpu(x: Tensor, *others: Tensor) -> bool:
    """Whether the native kernels for the CPU compute, which have no derivative."""
    wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *others))
    return x.device.type == "cpu" and not wanted and native(x)


# Fakes and derivatives, registered when the library has been loaded.


def _interleaved(t: Tensor) -> bool:
    """Whether the kernels take it as channels_last (csrc/tensors.h decides alike)."""
    _, channels, height, width = t.stride()
    if width == 1 or t.shape[3] == 1:
        return False
    return channels == 1 and width == t.shape[1] and (t.shape[2] == 1 or height >= t.shape[1] * t.shape[3])


def _layout(maps: Tensor) -> torch.memory_format:
    """In which order maps (N, C, H, W) are in memory."""
    return torch.channels_last if _interleaved(maps) else torch.contiguous_format


def _accumulator(features: Tensor) -> torch.dtype:
    return torch.float64 if features.dtype == torch.float64 else torch.float32


def _alike(total: Tensor, anchor: Tensor) -> bool:
    """Whether the kernels can add to ``total`` as they read ``anchor``."""
    return total.is_contiguous(memory_format=_layout(anchor))


def _map(like: Tensor, height: int, width: int, interleaved: bool, dtype: torch.dtype) -> Tensor:
    layout = torch.channels_last if interleaved else torch.contiguous_format
    return torch.empty(
        (like.shape[0], like.shape[1], height, width), dtype=dtype, device=like.device, memory_format=layout
    )


def _fake_warp(images: Tensor, theta: Tensor, heights: Sequence[int], widths: Sequence[int]) -> list[Tensor]:
    layout = _interleaved(images)
    return [_map(images, h, w, layout, images.dtype) for h, w in zip(heights, widths, strict=True)]


def _fake_warp_adjoint(gradients: Sequence[Tensor], theta: Tensor, height: int, width: int) -> Tensor:
    return _map(gradients[0], height, width, _interleaved(gradients[0]), gradients[0].dtype)


def _fake_similarity(anchor: Tensor, views: Sequence[Tensor], theta: Tensor, pixel: bool) -> tuple[Tensor, Tensor]:
    n, k = anchor.shape[0], len(views)
    return anchor.new_empty((n, k), dtype=_accumulator(anchor)), anchor.new_empty((n, k, 3), dtype=torch.float64)


def _fake_similarity_backward(
    upstream: Tensor, sums: Tensor, anchor: Tensor, views: Sequence[Tensor], theta: Tensor, pixel: bool
) -> list[Tensor]:
    layout = _interleaved(anchor)
    return [_map(f, f.shape[2], f.shape[3], layout, anchor.dtype) for f in (anchor, *views)]


def _fake_similarity_gradient(total: Tensor, anchor: Tensor, view: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    return anchor.new_empty((anchor.shape[0], 1), dtype=_accumulator(anchor)), _map(
        view, view.shape[2], view.shape[3], _interleaved(anchor), anchor.dtype
    )


def _fake_similarity_target(anchor: Tensor, views: Sequence[Tensor], theta: Tensor) -> tuple[Tensor, Tensor]:
    n, layout = anchor.shape[0], _interleaved(anchor)
    gradient = _map(anchor, anchor.shape[2], anchor.shape[3], layout, anchor.dtype)
    return anchor.new_empty((n, len(views)), dtype=_accumulator(anchor)), gradient


def _fake_pair_similarity(maps: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    n, total = maps[0].shape[0], _fake_like(maps[0]).to(_accumulator(maps[0]))
    return total.new_empty(n), total, total.new_empty((n, len(maps), 2), dtype=torch.float64)


def _fake_pair_similarity_backward(
    upstream: Tensor, total: Tensor, sums: Tensor, maps: Sequence[Tensor]
) -> list[Tensor]:
    first = maps[0]
    return [_map(first, first.shape[2], first.shape[3], _interleaved(first), first.dtype) for _ in maps]


def _fake_signed_step(x: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_color_jitter(images: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
    return _fake_like(images), images.new_empty(images.shape[0], dtype=torch.float64)


def _fake_color_jitter_backward(upstream: Tensor, mean: Tensor, images: Tensor, parameters: Tensor) -> Tensor:
    return _fake_like(images)


def _fake_turn_filters(filters: Tensor, order: Tensor) -> Tensor:
    return filters.new_empty((filters.shape[0], order.shape[0], *filters.shape[1:]))


def _fake_turn_filters_adjoint(turned: Tensor, order: Tensor) -> Tensor:
    return turned.new_empty((turned.shape[0], *turned.shape[2:]))


def _fake_winograd(x: Tensor, filters: Tensor, bias: Tensor | None, dilation: int, padding: Sequence[int]) -> Tensor:
    height, width = (x.shape[side] + 2 * (padding[side - 2] - dilation) for side in (2, 3))
    shape = (x.shape[0], filters.shape[0] * 16, height, width)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _fake_conv_transpose(
    x: Tensor, filters: Tensor, channels: int, size: Sequence[int], stride: int, padding: Sequence[int], blocks: bool
) -> Tensor:
    shape = (x.shape[0], channels, *size)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _fake_like(images: Tensor) -> Tensor:
    return _map(images, images.shape[2], images.shape[3], _interleaved(images), images.dtype)


def _warp_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    images, theta, ctx.heights, ctx.widths = inputs
    ctx.save_for_backward(theta)
    ctx.like, ctx.size = images.new_empty(0), images.shape


def _warp_backward(ctx: Any, gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, None, None, None]:
    (theta,) = ctx.saved_tensors
    n, channels, height, width = ctx.size
    if all(g is None for g in gradients):
        return None, None, None, None
    given = [
        ctx.like.new_zeros(n, channels, h, w) if g is None else g
        for g, h, w in zip(gradients, ctx.heights, ctx.widths, strict=True)
    ]
    return torch.ops.equifast.warp_adjoint(given, theta, height, width), None, None, None


def _adjoint_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    gradients, theta, _, _ = inputs
    ctx.save_for_backward(theta)
    ctx.sizes = [g.shape[2:] for g in gradients]


def _adjoint_backward(ctx: Any, upstream: Tensor) -> tuple[list[Tensor], None, None, None]:
    heights, widths = [size[0] for size in ctx.sizes], [size[1] for size in ctx.sizes]
    return torch.ops.equifast.warp(upstream, ctx.saved_tensors[0], heights, widths), None, None, None


def _similarity_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    anchor, views, theta, ctx.pixel = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], anchor, theta, *views)


def _similarity_backward(
    ctx: Any, upstream: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, list[Tensor | None], None, None]:
    sums, anchor, theta, *views = ctx.saved_tensors
    if upstream is None:
        return None, [None] * len(views), None, None
    first, *rest = torch.ops.equifast.similarity_backward(upstream, sums, anchor, views, theta, ctx.pixel)
    return first, rest, None, None


def _pair_similarity_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:], *inputs[0])


def _pair_similarity_backward(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> tuple[list[Tensor] | list[None]]:
    total, sums, *maps = ctx.saved_tensors
    if upstream is None:
        return ([None] * len(maps),)
    return (torch.ops.equifast.pair_similarity_backward(upstream, total, sums, maps),)


def _color_jitter_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], *inputs)


def _color_jitter_backward(ctx: Any, upstream: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, None]:
    if upstream is None:
        return None, None
    return torch.ops.equifast.color_jitter_backward(upstream, *ctx.saved_tensors), None


def _order_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[1])


def _turn_filters_backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
    return torch.ops.equifast.turn_filters_adjoint(upstream, *ctx.saved_tensors), None


def _turn_filters_adjoint_backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
    return torch.ops.equifast.turn_filters(upstream, *ctx.saved_tensors), None


# The same derivatives for eager mode. Those that torch.library registers serve whoever traces, and callers of
# torch.ops; their way through Python takes several times as long, which is most of a call on small maps.


def _eager(*tensors: Tensor) -> bool:
    """Whether a derivative will be wanted, and nobody but autograd looks on."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors) and not torch.compiler.is_compiling()


class _Warp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, theta: Tensor, heights: list[int], widths: list[int]) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        _warp_context(ctx, (images, theta, heights, widths), None)
        return tuple(torch.ops.equifast.warp(images, theta, heights, widths))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        return _warp_backward(ctx, gradients)


class _Similarity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, theta: Tensor, pixel: bool, *views: Tensor) -> Tensor:
        result, sums = torch.ops.equifast.similarity(anchor, views, theta, pixel)
        ctx.pixel = pixel
        ctx.save_for_backward(sums, anchor, theta, *views)
        found: Tensor = result
        return found

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # with a graph of its own
            _, anchor, theta, *views = ctx.saved_tensors
            derivative = _pixel_derivative if ctx.pixel else _image_derivative
            if any(f.numel() == 0 for f in (anchor, *views)):
                derivative = _no_derivative
            first, *rest = derivative(upstream, anchor, views, theta)
            return first, None, None, *rest
        for_anchor, for_views, *_ = _similarity_backward(ctx, upstream, None)
        return for_anchor, None, None, *for_views


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """The inner products (N,) of maps (N, C, H, W) of one layout, summed in the order in which they are in memory."""
    product = a * b
    if _layout(product) == torch.channels_last:
        product = product.movedim(1, 3)
    return reference.row_sum(product.flatten(1))


def _combined(*terms: tuple[Tensor, Tensor]) -> Tensor:
    """The sum of maps (N, C, H, W) times a number each, (N,)."""
    (number, maps), *rest = terms
    total = number.view(-1, 1, 1, 1) * maps
    for number, maps in rest:
        total.addcmul_(number.view(-1, 1, 1, 1), maps)
    return total


class _CosineDerivative(torch.autograd.Function):
    """A weight (N,) times the derivatives of the cosine of maps a and b (N, C, H, W) by both; differentiable once.

    With ``o = weight / (|a| |b|)`` and ``p = <a, b>`` they are ``o (b - a p / |a|^2)`` and ``o (a - b p / |b|^2)``.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        inner, of_a, of_b = _inner(a, b), _inner(a, a), _inner(b, b)
        small = (of_a < reference.SMALL**2) | (of_b < reference.SMALL**2)  # and not NaN
        of_a, of_b = (torch.where(small, 1.0, square) for square in (of_a, of_b))
        share = torch.where(small, 0.0, of_a.rsqrt() * of_b.rsqrt())
        over, to_a, to_b = weight * share, inner / of_a, inner / of_b
        ctx.save_for_backward(share, over, to_a, to_b, of_a, of_b, a, b)
        return _combined((over, b), (-over * to_a, a)), _combined((over, a), (-over * to_b, b))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        share, over, to_a, to_b, of_a, of_b, a, b = ctx.saved_tensors
        u, v = (upstream.contiguous(memory_format=_layout(a)) for upstream in (u, v))
        along_a, along_b = _inner(u, a) / of_a, _inner(v, b) / of_b
        value = _inner(u, b) + _inner(v, a) - to_a * along_a * of_a - to_b * along_b * of_b
        across = -over * (along_a + along_b)
        by_a = over * (2 * to_a * along_a - value / of_a)
        by_b = over * (2 * to_b * along_b - value / of_b)
        return (
            share * value,
            _combined((over, v), (-over * to_a, u), (across, b), (by_a, a)),
            _combined((over, u), (-over * to_b, v), (across, a), (by_b, b)),
        )


_cosine_derivative: Callable[..., tuple[Tensor, Tensor]] = _CosineDerivative.apply


def _image_derivative(upstream: Tensor, anchor: Tensor, views: Sequence[Tensor], theta: Tensor) -> list[Tensor]:
    """The derivatives of the similarities by anchor and views, of operations that have one themselves."""
    layout = _layout(anchor)
    wide = anchor.to(_accumulator(anchor)).contiguous(memory_format=layout)
    total, found = torch.zeros_like(wide), []
    for view, own_theta, weight in zip(views, theta, upstream.unbind(1), strict=True):
        with use("native"):  # as whoever asks for this
            back, seen = in_frame(view.to(wide.dtype), own_theta, (anchor.shape[2], anchor.shape[3]))
        own = torch.where(seen, wide, 0.0).contiguous(memory_format=layout)
        for_anchor, gradient = _cosine_derivative(weight, own, back.contiguous(memory_format=layout))
        total = total + for_anchor
        # what lies outside is 0 in it, as it is in maps
        inverse = reference.invert(own_theta)[None]
        found.append(torch.ops.equifast.warp_adjoint([gradient], inverse, *view.shape[2:]).to(view.dtype))
    return [total.to(anchor.dtype), *found]


def _pixel_derivative(upstream: Tensor, anchor: Tensor, views: Sequence[Tensor], theta: Tensor) -> list[Tensor]:
    """The same of the mean over positions."""

    def value(anchor: Tensor, *views: Tensor) -> Tensor:
        return reference.similarity(anchor, views, theta, "pixel")

    return _derivatives(value, (anchor, *views), upstream)


def _no_derivative(upstream: Tensor, anchor: Tensor, views: Sequence[Tensor], theta: Tensor) -> list[Tensor]:
    """The same where there are no positions."""
    return [torch.zeros_like(f) for f in (anchor, *views)]


def _derivatives(function: Callable[..., Tensor], inputs: Sequence[Tensor], upstream: Tensor) -> list[Any]:
    """Of a function by each of its arguments, with a graph; None for those that are constants."""
    # other tensors of the same values: an argument may be made of another, whose way through it is not of this function
    apart = [given.view_as(given) for given in inputs]
    wanted = [given for given in apart if given.requires_grad]
    value = function(*apart)
    found = iter(torch.autograd.grad(value, wanted, upstream, create_graph=True, materialize_grads=True))
    return [next(found) if given.requires_grad else None for given in apart]


class _PairSimilarity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *maps: Tensor) -> Tensor:
        result, total, sums = torch.ops.equifast.pair_similarity(maps)
        ctx.save_for_backward(total, sums, *maps)
        found: Tensor = result
        return found

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            _, _, *maps = ctx.saved_tensors
            return tuple(_derivatives(lambda *maps: reference.pair_similarity(maps), maps, upstream[0]))
        return tuple(_pair_similarity_backward(ctx, *upstream)[0])


class _ColorJitter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, parameters: Tensor) -> Tensor:
        result, mean = torch.ops.equifast.color_jitter(images, parameters)
        ctx.save_for_backward(mean, images, parameters)
        jittered: Tensor = result
        return jittered

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, None]:
        if torch.is_grad_enabled():
            _, images, parameters = ctx.saved_tensors
            return _derivatives(lambda x: reference.color_jitter(x, parameters), [images], upstream)[0], None
        return _color_jitter_backward(ctx, upstream, None)


def _on_cpu(filters: Tensor) -> bool:
    return filters.device.type == "cpu" and native(filters)


class _TurnFilters(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, filters: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        turn = torch.ops.equifast.turn_filters if _on_cpu(filters) else reference.turn_filters
        turned: Tensor = turn(filters, order)
        return turned

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return _TurnFiltersAdjoint.apply(upstream, *ctx.saved_tensors), None


class _TurnFiltersAdjoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, turned: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        if _on_cpu(turned):
            total: Tensor = torch.ops.equifast.turn_filters_adjoint(turned, order)
            return total
        # reads in the other order: to add at the places of an index takes several times as long, in any order
        pairs = zip(turned.unbind(1), order.argsort(1), strict=True)
        total = turned.new_zeros(turned.shape[0], *turned.shape[2:])
        return functools.reduce(torch.add, (each.gather(2, places.expand(each.shape)) for each, places in pairs), total)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return _TurnFilters.apply(upstream, *ctx.saved_tensors), None


def _no_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


def _no_second_derivative(name: str) -> Callable[..., Any]:
    def refuse(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError(f"torch.ops.equifast.{name} is differentiable once; equifast.ops.{name} is twice")

    return refuse


def _register() -> None:
    fakes: tuple[Callable[..., Any], ...] = (
        _fake_warp,
        _fake_warp_adjoint,
        _fake_similarity,
        _fake_similarity_backward,
        _fake_similarity_gradient,
        _fake_similarity_target,
        _fake_pair_similarity,
        _fake_pair_similarity_backward,
        _fake_signed_step,
        _fake_color_jitter,
        _fake_color_jitter_backward,
        _fake_turn_filters,
        _fake_turn_filters_adjoint,
        _fake_winograd,
        _fake_conv_transpose,
    )
    for fake in fakes:
        torch.library.register_fake("equifast::" + fake.__name__.removeprefix("_fake_"))(fake)
    derivatives = (
        ("warp", _warp_backward, _warp_context),
        ("warp_adjoint", _adjoint_backward, _adjoint_context),
        ("similarity", _similarity_backward, _similarity_context),
        ("similarity_backward", _no_second_derivative("similarity"), _no_context),
        ("pair_similarity", _pair_similarity_backward, _pair_similarity_context),
        ("pair_similarity_backward", _no_second_derivative("pair_similarity"), _no_context),
        ("color_jitter", _color_jitter_backward, _color_jitter_context),
        ("color_jitter_backward", _no_second_derivative("color_jitter"), _no_context),
        ("turn_filters", _turn_filters_backward, _order_context),
        ("turn_filters_adjoint", _turn_filters_adjoint_backward, _order_context),
    )
    for name, backward, context in derivatives:
        torch.library.register_autograd(f"equifast::{name}", backward, setup_context=context)
