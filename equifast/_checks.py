"""Checks of arguments: one sentence that names the argument, what it was and what it must be."""

import inspect
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from equifast import _C

TOLERANCE = 1e-6  # by how much an image may leave [0, 1] through rounding; it is clamped


def shape(tensor: Tensor) -> str:
    """The shape of a tensor as text."""
    return str(tuple(tensor.shape))


def tensor(name: str, value: object, rank: int, layout: str) -> Tensor:
    """A floating-point tensor of the given rank."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; it must be a tensor {layout}")
    if value.dim() != rank:
        raise ValueError(f"{name} has shape {shape(value)}; it must be {layout}")
    if not value.is_floating_point():
        raise TypeError(f"{name} has dtype {value.dtype}; it must be floating point")
    return value


def images(name: str, value: object, channels: int | None = None) -> Tensor:
    """Images in [0, 1]: checked, and clamped where rounding took them out by up to 1e-6."""
    wanted = "C" if channels is None else str(channels)
    x = tensor(name, value, 4, f"(N, {wanted}, H, W)")
    if channels is not None and x.shape[1] != channels:
        raise ValueError(f"{name} has shape {shape(x)}; it must be (N, {channels}, H, W)")
    if x.is_meta:
        raise ValueError(f"{name} is on meta, which holds no values; it must be on a real device")
    if 0 in x.shape[1:]:
        raise ValueError(f"{name} has shape {shape(x)}; an image must have at least one pixel and channel")
    if x.numel() == 0:
        return x
    low, high = (float(bound) for bound in torch.aminmax(x.detach()))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"{name} has values that are NaN or infinite; they must lie in [0, 1]")
    if low < -TOLERANCE or high > 1 + TOLERANCE:
        raise ValueError(f"{name} has values from {low:g} to {high:g}; they must lie in [0, 1]")
    return x.clamp(0, 1) if low < 0 or high > 1 else x


def same_device(name: str, value: Tensor, other: str, reference: Tensor) -> None:
    """Two tensors on one device."""
    if value.device != reference.device:
        raise ValueError(f"{name} is on {value.device}, {other} on {reference.device}; they must be on one device")


def number(
    name: str,
    value: object,
    *,
    above: float | None = None,
    least: float | None = None,
    most: float | None = None,
) -> float:
    """A finite number within bounds."""
    wanted = "a finite number"
    wanted += "" if above is None else f" above {above:g}"
    wanted += "" if least is None else f" of at least {least:g}"
    wanted += "" if most is None else f" and at most {most:g}" if least is not None else f" of at most {most:g}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} is {value!r}; it must be {wanted}")
    if (
        not math.isfinite(value)
        or (above is not None and value <= above)
        or (least is not None and value < least)
        or (most is not None and value > most)
    ):
        raise ValueError(f"{name} is {value!r}; it must be {wanted}")
    return float(value)


def integer(name: str, value: object, least: int, most: int) -> int:
    """An integer within bounds."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r}; it must be an integer from {least} to {most}")
    if not least <= value <= most:
        raise ValueError(f"{name} is {value}; it must be an integer from {least} to {most}")
    return value


def boolean(name: str, value: object) -> bool:
    """True or False, and nothing that only counts as one."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}; it must be True or False")
    return value


def choice(name: str, value: object, options: Sequence[str]) -> str:
    """One of some words."""
    if not isinstance(value, str) or value not in options:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, options))}")
    return value


def defense(name: str, value: object) -> None:
    """What is called as defenses are: purifiers, and models with one inside."""
    like = "(x, ids=None, draw=0)"
    if not callable(value):
        raise TypeError(f"{name} is a {type(value).__name__}; it must be callable as {like}")
    try:  # what calls a Module takes everything
        inspect.signature(value.forward if isinstance(value, nn.Module) else value).bind(None, ids=None, draw=0)
    except TypeError as error:
        raise TypeError(f"{name} is called as {like}, which it does not take: {error}") from None
    except ValueError:  # a builtin, which does not tell
        pass


def seed(value: object) -> None:
    """A seed: 0..2**32-1 or None."""
    if value is not None:
        integer("seed", value, 0, 2**32 - 1)


def ids(value: object, n: int, device: torch.device) -> Tensor:
    """Image ids (N,) int64; None means 0 for every image."""
    if value is None:
        return torch.zeros(n, dtype=torch.int64, device=device)
    if not isinstance(value, Tensor):
        raise TypeError(f"ids is a {type(value).__name__}; it must be an int64 tensor (N,)")
    if value.dtype != torch.int64:
        raise TypeError(f"ids has dtype {value.dtype}; it must be int64")
    if value.shape != (n,):
        raise ValueError(f"ids has shape {shape(value)}; it must be ({n},), one id per image")
    return value.to(device)


def transformed() -> bool:
    """Whether derivatives go forward, or torch.func transforms what runs: not through functions with their own."""
    return bool(torch._C._are_functorch_transforms_active()) or forward_ad._current_level >= 0


def _has_values(value: Tensor) -> bool:
    """Whether values can be looked at: in host memory, of a plain tensor, and by nobody who traces or transforms."""
    watched = torch.compiler.is_compiling() or transformed() or type(value) not in (Tensor, nn.Parameter)
    return value.device.type == "cpu" and not watched and bool(value.numel())


def theta(value: object, n: int | None = None, k: int | None = None) -> Tensor:
    """Matrices (K, N, 2, 3), float32 or float64; finite and invertible where they lie in host memory."""
    matrices = tensor("theta", value, 4, "(K, N, 2, 3)")
    if matrices.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"theta has dtype {matrices.dtype}; it must be float32 or float64")
    if (
        matrices.shape[2:] != (2, 3)
        or (n is not None and matrices.shape[1] != n)
        or (k is not None and matrices.shape[0] != k)
    ):
        wanted = f"({'K' if k is None else k}, {'N' if n is None else n}, 2, 3)"
        raise ValueError(f"theta has shape {shape(matrices)}; it must be {wanted}")
    if matrices.shape[0] == 0:
        raise ValueError("theta has shape " + shape(matrices) + "; there must be at least one view")
    if _has_values(matrices):
        problem = _C.matrices_problem(matrices.detach().numpy())
        if problem == "nonfinite":
            raise ValueError("theta has values that are NaN or infinite; they must be finite")
        if problem == "singular":
            raise ValueError("theta has a singular matrix; every matrix must be invertible")
    return matrices


def size(name: str, value: object) -> tuple[int, int]:
    """A size (h, w) of positive integers."""
    if (
        not isinstance(value, Sequence)
        or len(value) != 2
        or not all(isinstance(side, int) and side >= 1 for side in value)
    ):
        raise ValueError(f"{name} is {value!r}; it must be a pair (h, w) of positive integers")
    return value[0], value[1]


def warp(images: object, theta_given: object, sizes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The arguments of ``warp``, on every backend; returns the sizes."""
    x = tensor("images", images, 4, "(N, C, H, W)")
    matrices = theta(theta_given, n=x.shape[0])
    same_device("theta", matrices, "images", x)
    if len(sizes) != matrices.shape[0]:
        raise ValueError(f"sizes has {len(sizes)} entries; it must have {matrices.shape[0]}, one per view of theta")
    return [size("sizes", pair) for pair in sizes]


def similarity(anchor: object, views: Sequence[Tensor], theta_given: object, reduction: object) -> None:
    """The arguments of ``similarity``, on every backend."""
    f0 = tensor("anchor", anchor, 4, "(N, C, H, W)")
    choice("reduction", reduction, ("image", "pixel"))
    matrices = theta(theta_given, n=f0.shape[0], k=len(views))
    same_device("theta", matrices, "anchor", f0)
    features(f0, views)


def features(f0: Tensor, views: Sequence[Tensor]) -> None:
    """The features of views beside those of the image."""
    n, channels = f0.shape[:2]
    for k, view in enumerate(views):
        name = f"views[{k}]"
        tensor(name, view, 4, "(N, C, h, w)")
        same_device(name, view, "anchor", f0)
        if view.dtype != f0.dtype:
            raise TypeError(f"{name} has dtype {view.dtype}; it must have that of anchor, {f0.dtype}")
        if view.shape[:2] != f0.shape[:2]:
            raise ValueError(f"{name} has shape {shape(view)}; it must be ({n}, {channels}, h, w) as anchor")


def logits(value: Tensor, n: int) -> None:
    """What a model gives for ``n`` images."""
    if value.dim() < 2 or len(value) != n:
        raise ValueError(f"model gives {shape(value)} for {n} images; it must give logits (N, C) or (N, C, H, W)")


def as_another(name: str, value: object, like_name: str, like: Tensor) -> Tensor:
    """A tensor (N, C, H, W) of the shape, dtype and device of another."""
    given = tensor(name, value, 4, "(N, C, H, W)")
    same_device(name, given, like_name, like)
    if given.dtype != like.dtype:
        raise TypeError(f"{name} has dtype {given.dtype}; it must have that of {like_name}, {like.dtype}")
    if given.shape != like.shape:
        raise ValueError(f"{name} has shape {shape(given)}; it must be that of {like_name}, {shape(like)}")
    return given


def maps(given: Sequence[Tensor]) -> None:
    """The argument of ``pair_similarity``, on every backend."""
    if not isinstance(given, Sequence) or not given:
        raise ValueError("maps is empty or no sequence; it must have at least one tensor (N, C, H, W)")
    first = tensor("maps[0]", given[0], 4, "(N, C, H, W)")
    for i, other in enumerate(given):
        as_another(f"maps[{i}]", other, "maps[0]", first)


def total(value: object, anchor: Tensor) -> None:
    """What gradients are added to."""
    if as_another("total", value, "anchor", anchor).requires_grad:
        raise ValueError("total requires a gradient; it must not")


def color_jitter(images_given: object, parameters: object) -> None:
    """The arguments of ``color_jitter``, on every backend."""
    x = tensor("images", images_given, 4, "(N, 3, H, W)")
    if x.shape[1] != 3:
        raise ValueError(f"images has shape {shape(x)}; it must be (N, 3, H, W)")
    given = tensor("parameters", parameters, 2, "(N, 5)")
    if given.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"parameters has dtype {given.dtype}; it must be float32 or float64")
    if given.shape != (x.shape[0], 5):
        raise ValueError(f"parameters has shape {shape(given)}; it must be ({x.shape[0]}, 5), one row per image")
    same_device("parameters", given, "images", x)
    if _has_values(given):
        bounds = zip(*(side.tolist() for side in torch.aminmax(given.detach(), dim=0)), strict=True)
        for name, (low, high) in zip(("brightness", "contrast", "saturation", "hue", "gray"), bounds, strict=True):
            least, most = {"hue": (-0.5, 0.5), "gray": (0, 1)}.get(name, (0, math.inf))
            if not (math.isfinite(low) and math.isfinite(high)):
                raise ValueError(f"parameters has a {name} that is NaN or infinite; it must be finite")
            if low < least or high > most:
                wanted = f"at least {least}" if most == math.inf else f"from {least} to {most}"
                raise ValueError(f"parameters has a {name} of {low if low < least else high:g}; it must be {wanted}")


def turn_filters(filters: object, order: object) -> None:
    """The arguments of ``turn_filters``, on every backend."""
    given = tensor("filters", filters, 3, "(O, I, J)")
    if not isinstance(order, Tensor):
        raise TypeError(f"order is a {type(order).__name__}; it must be a tensor (G, J) of int64")
    if order.dtype != torch.int64:
        raise TypeError(f"order has dtype {order.dtype}; it must be int64")
    if order.dim() != 2 or order.shape[1] != given.shape[2]:
        raise ValueError(f"order has shape {shape(order)}; it must be (G, {given.shape[2]}): a place of each weight")
    same_device("order", order, "filters", given)


def conv_transpose_weight(weight: object, stride: object) -> None:
    """The arguments of ``conv_transpose_filters``."""
    tensor("weight", weight, 4, "(O, C, h, w)")
    integer("stride", stride, 1, _LONGEST)


def winograd_weight(weight: object) -> None:
    """The argument of ``winograd_filters``."""
    given = tensor("weight", weight, 4, "(O, C, 3, 3)")
    if given.shape[2:] != (3, 3) or given.shape[0] % 16:
        raise ValueError(f"weight has shape {shape(given)}; it must be (O, C, 3, 3), O a multiple of 16")
    _wide("weight", given)


def _wide(name: str, given: Tensor) -> None:
    if given.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} has dtype {given.dtype}; it must be float32 or float64")


_LONGEST = 2**31 - 1  # pixels


def _pair(name: str, value: object, least: int) -> None:
    wanted = f"two integers of at least {least}"
    if not isinstance(value, Sequence) or not all(type(each) in (int, torch.SymInt) for each in value):
        raise TypeError(f"{name} is {value!r}; it must be {wanted}")
    if len(value) != 2 or min(value) < least:
        raise ValueError(f"{name} is {value!r}; it must be {wanted}")


def _beside(name: str, given: Tensor, x: Tensor) -> None:
    if given.dtype != x.dtype:
        raise TypeError(f"{name} has dtype {given.dtype}, x {x.dtype}; they must be of one dtype")
    same_device(name, given, "x", x)


def winograd(x: object, filters: object, bias: object, dilation: int, padding: Sequence[int]) -> tuple[int, int]:
    """The arguments of ``winograd``, on every backend; returns the height and width of what it gives."""
    image = tensor("x", x, 4, "(N, C, H, W)")
    _wide("x", image)
    given = tensor("filters", filters, 4, "(O / 16, 36, C, 16)")
    _beside("filters", given, image)
    if given.shape[1:] != (36, image.shape[1], 16):
        raise ValueError(f"filters has shape {shape(given)}; it must be (O / 16, 36, {image.shape[1]}, 16)")
    if bias is not None:
        shift = tensor("bias", bias, 1, "(O,)")
        _beside("bias", shift, image)
        if len(shift) != 16 * len(given):
            raise ValueError(f"bias has shape {shape(shift)}; it must be ({16 * len(given)},)")
    integer("dilation", dilation, 1, _LONGEST)
    _pair("padding", padding, 0)
    height, width = (image.shape[side] + 2 * (padding[side - 2] - dilation) for side in (2, 3))
    if height < 1 or width < 1:
        least = 2 * dilation + 1
        raise ValueError(f"x has shape {shape(image)}; it must be {least} pixels high and wide with its padding")
    return height, width


def conv_transpose(
    x: object, filters: object, channels: int, size: Sequence[int], stride: int, padding: Sequence[int], blocks: bool
) -> None:
    """The arguments of ``conv_transpose``, on every backend."""
    image = tensor("x", x, 4, "(N, O, h, w)")
    _wide("x", image)
    given = tensor("filters", filters, 5, "(C / 16, kernel height, kernel width, O, 16)")
    _beside("filters", given, image)
    if given.shape[3:] != (image.shape[1], 16) or 0 in given.shape[1:3]:
        wanted = f"(C / 16, kernel height, kernel width, {image.shape[1]}, 16)"
        raise ValueError(f"filters has shape {shape(given)}; it must be {wanted}")
    integer("stride", stride, 1, _LONGEST)
    most = 16 * len(given) // (stride**2 if blocks else 1)
    if most < 1:
        raise ValueError(f"filters has shape {shape(given)}; it must have channels for each pixel of a block")
    integer("channels", channels, 1, most)
    _pair("size", size, 1)
    _pair("padding", padding, 0)


def signed_step(x: object, gradient: object, origin: object, eps: object, ids_given: object) -> Tensor:
    """The arguments of ``signed_step``, on every backend; returns the ids."""
    start = tensor("x", x, 4, "(N, C, H, W)")
    as_another("gradient", gradient, "x", start)
    as_another("origin", origin, "x", start)
    number("eps", eps, above=0)
    return ids(ids_given, start.shape[0], start.device)
