"""Where a model's features come from, and the state in which a model is run."""

import contextlib
import difflib
import functools
import math
import threading
import types
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from operator import index
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from equifast import _checks, ops
from equifast.objectives import MOST_ROWS
from equifast.reference import probabilities

__all__ = ["Features", "LogProbabilities", "evaluating", "output", "passed", "suggest"]

Model = Callable[[Tensor], Any]


def output(result: Any) -> Tensor:
    """A model's output as one tensor: a dict with ``"out"`` (torchvision's segmentation models) is understood."""
    if isinstance(result, Mapping):
        if "out" not in result:
            raise TypeError(f"model returned a dict with keys {sorted(map(str, result))}; it must have 'out'")
        result = result["out"]
    if not isinstance(result, Tensor):
        raise TypeError(f"model returned a {type(result).__name__}; it must be a tensor, or a dict with 'out'")
    return result


class _Reached(Exception):
    """Ends a forward pass at the submodule whose output is wanted."""


class Features:
    """The map F: images (N, 3, H, W) -> features (N, C, h, w).

    Args:
        model: takes images in [0, 1].
        where: ``None``, the model's own dense output; a dotted submodule name, whose output at its first call is
            taken (what the model computes after it is not run); or a callable ``x -> (N, C, h, w)``.

    Raises:
        ValueError: if the submodule is unknown (with the nearest names).
        TypeError: if ``model`` is not callable, or a name is given for one that is not an ``nn.Module``.
    """

    def __init__(self, model: Model, where: str | Model | None = None) -> None:
        if not callable(model):
            raise TypeError(f"model is a {type(model).__name__}; it must be callable")
        if where is not None and not isinstance(where, str) and not callable(where):
            raise TypeError(f"features is {where!r}; it must be None, the name of a submodule or a callable")
        self.model = model
        self.where = where
        if isinstance(where, str):
            if not isinstance(model, nn.Module):
                raise TypeError(f"features is {where!r}, but model is a {type(model).__name__}; it must be a Module")
            modules = dict(model.named_modules())
            if where not in modules or not where:
                names = [name for name in modules if name]
                near = difflib.get_close_matches(where, names, n=3, cutoff=0.4) or names[:3]
                hint = f"; the nearest names are {', '.join(map(repr, near))}" if near else ""
                raise ValueError(f"features is {where!r}, which is no submodule of the model{hint}")

    @property
    def _module(self) -> nn.Module | None:
        """The submodule of that name, as it is now."""
        if not isinstance(self.where, str) or not isinstance(self.model, nn.Module):
            return None
        return self.model.get_submodule(self.where)

    def __call__(self, x: Tensor) -> Tensor:
        module = self._module
        if module is not None:
            features = self._until(module, x)
        elif callable(self.where):
            features = output(self.where(x))
        else:
            features = output(self.model(x))
        if features.dim() != 4:
            raise ValueError(
                f"features have shape {_checks.shape(features)}; they must be (N, C, h, w): "
                "choose a submodule with features= (equifast.features.suggest names one)"
            )
        _check_count(features, len(x))
        if 0 in features.shape[1:]:
            raise ValueError(f"features have shape {_checks.shape(features)}; there must be a position and a channel")
        return features

    @property
    def place(self) -> str | None:
        """The name of the submodule that ``where`` is, or is a method of: "" for the model itself, None for another."""
        if self.where is None or isinstance(self.where, str):
            return self.where or ""
        owner = getattr(self.where, "__self__", self.where)
        if not isinstance(self.model, nn.Module) or not isinstance(owner, nn.Module):
            return None
        return next((name for name, module in self.model.named_modules() if module is owner), None)

    def on(self, model: nn.Module) -> "Features":
        """The same features of a copy of the model: what belongs to the model goes with it."""
        where = self.where
        if where is not None and not isinstance(where, str) and self.place is not None:
            module = model.get_submodule(self.place)
            where = types.MethodType(where.__func__, module) if hasattr(where, "__func__") else module
        return Features(model, where)

    def modules(self) -> tuple[nn.Module, ...]:
        """The Modules that a callable ``features`` is, or is a bound method of."""
        owner = getattr(self.where, "__self__", self.where)
        return (owner,) if isinstance(owner, nn.Module) else ()

    def _until(self, module: nn.Module, x: Tensor) -> Tensor:
        caught: list[Any] = []
        thread = threading.get_ident()

        def catch(_module: nn.Module, _inputs: Any, result: Any) -> None:
            if threading.get_ident() == thread:  # others may run the same model
                caught.append(result)
                raise _Reached

        handle = module.register_forward_hook(catch)
        try:
            self.model(x)
        except _Reached:
            pass
        finally:
            handle.remove()
        if not caught:
            raise ValueError(f"features is {self.where!r}, a submodule that the model's forward pass does not call")
        return output(caught[0])


def _check_count(features: Tensor, n: int) -> None:
    if features.shape[:1] != (n,):
        raise ValueError(f"features have shape {_checks.shape(features)} for {n} images; the first sizes must agree")


def passed(features: Sequence[Features], x: Tensor) -> tuple[list[Tensor], Tensor]:
    """The features of several places of one model, and its output, from one forward pass.

    A function that gives features runs beside it.
    """
    caught: dict[int, Tensor] = {}
    thread, handles = threading.get_ident(), []
    try:
        for number, each in enumerate(features):
            module = each._module
            if module is not None:

                def catch(_module: nn.Module, _inputs: Any, result: Any, number: int = number) -> None:
                    if threading.get_ident() == thread and number not in caught:
                        # what the model does in place to it later is not of it
                        caught[number] = output(result).clone()

                handles.append(module.register_forward_hook(catch))
        result = output(features[0].model(x.clone()))
    finally:
        for handle in handles:
            handle.remove()
    found = []
    for number, each in enumerate(features):
        if each._module is None:
            found.append(each(x) if callable(each.where) else result)
        elif number in caught:
            _check_count(caught[number], len(x))
            found.append(caught[number])
        else:
            raise ValueError(f"features is {each.where!r}, a submodule that the model's forward pass does not call")
    return found, result


class LogProbabilities:
    """``log_softmax(f / temperature)`` over the channels of features f, in their dtype.

    What is impossible weighs more in it than in logits, and what is certain less.
    """

    def __init__(self, features: Callable[[Tensor], Tensor], temperature: float) -> None:
        self.features = features
        self.temperature = temperature

    def __call__(self, x: Tensor) -> Tensor:
        f = self.features(x)
        with torch.autocast(x.device.type, enabled=False):  # which would take it to float32; sums are in it anyway
            return functional.log_softmax(f / self.temperature, 1)


def suggest(model: nn.Module, x: Tensor) -> str | None:
    """The last submodule whose output on ``x`` is (N, C, h, w) with more than one position, or None.

    For a classifier this is where its dense features end: a good first choice for ``features``. Containers count,
    so that the outermost name is given (``"layer4"``, not ``"layer4.1.relu"``).
    """
    found: list[str] = []
    handles = []
    for name, module in model.named_modules():
        if name:

            def note(_module: nn.Module, _inputs: Any, result: Any, name: str = name) -> None:
                if isinstance(result, Tensor) and result.dim() == 4 and result.shape[2] * result.shape[3] > 1:
                    found.append(name)

            handles.append(module.register_forward_hook(note))
    try:
        with evaluating(x, model), torch.no_grad():
            model(x.clone())  # models may work in place
    finally:
        for handle in handles:
            handle.remove()
    return found[-1] if found else None


# Functions of the module, since torch.compile traces through modes and knows no static methods of theirs.
def _batched(*args: Any) -> bool:
    """Whether the first arguments of a convolution have a batch."""
    x, weight = (*args, None, None)[:2]
    return isinstance(x, Tensor) and isinstance(weight, Tensor) and x.dim() == weight.dim()


def _is_batch(x: Any = None, *_: Any) -> bool:
    """Whether the first argument of a linear layer is several images on the CPU."""
    if not isinstance(x, Tensor) or x.dim() < 2 or x.device.type != "cpu" or not x.is_floating_point():
        return False
    return 1 < len(x) <= MOST_ROWS and not _untouchable()


def _affine(
    x: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    """Batch norm, called like PyTorch's own, where it is an affine map without gradients; else None."""
    if training or mean is None or variance is None or x.dtype != variance.dtype:
        return None
    if any(p is not None and p.requires_grad for p in (weight, bias)):
        return None
    scale = (variance + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    shape = (1, -1, *[1] * (x.dim() - 2))
    return (x * scale.view(shape)).add_(shift.view(shape))


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """``functional.hardsigmoid``, called alike, with second derivatives, which PyTorch's own has not."""
    scaled = input.div_(6).add_(0.5) if inplace else input / 6 + 0.5
    return functional.hardtanh(scaled, 0.0, 1.0, inplace)


_KEPT = "_equifast_kept"


def keep_made(weight: Tensor) -> None:
    """Lets what is made of a weight be kept, such as it is in autocast's dtype.

    For weights that never change, as those of a folded copy; these are convolved by operators of our own too.
    """
    setattr(weight, _KEPT, {})


def _made(weight: Tensor, key: Hashable, make: Callable[[Tensor], Tensor]) -> Tensor:
    """What is made of a constant weight, kept where that is allowed."""
    kept: dict[Hashable, Tensor] | None = getattr(weight, _KEPT, None)
    if kept is None or weight.requires_grad or _untouchable():
        with torch.no_grad():
            return make(weight.detach())
    if key not in kept:
        with torch.inference_mode(False), torch.no_grad():
            made = make(weight.detach())
        if type(made) is not Tensor:  # of a tracer
            return made
        kept[key] = made
    return kept[key]


def _lowered(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight in another dtype."""
    return weight.to(dtype) if weight.requires_grad else _made(weight, dtype, lambda given: given.to(dtype))


def _untouchable() -> bool:
    """Whether somebody but autograd looks on, who wants the operations that the model asked for."""
    return torch.compiler.is_compiling() or _checks.transformed()


# Above so many channels PyTorch's own operator is as fast; the latter where those of a pixel are neighbors in memory.
_FEW, _FEW_INTERLEAVED = 24, 16


def _resized(
    x: Tensor,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Tensor | None:
    """``functional.interpolate``, called alike, of few channels on the CPU by the kernel that warps; else None.

    A resize without corners aligned is a warp by the identity, and so takes a fraction of the time.
    """
    if mode != "bilinear" or align_corners or antialias:
        return None
    if not isinstance(x, Tensor) or x.dim() != 4 or x.device.type != "cpu" or not 0 < x.shape[1] <= _FEW:
        return None
    interleaved = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    if interleaved and x.shape[1] > _FEW_INTERLEAVED:
        return None
    if _untouchable() or not ops.native(x) or x.numel() == 0:
        return None
    if (size is None) == (scale_factor is None) or (size is not None and recompute_scale_factor):
        return None
    given = scale_factor if size is None else size
    pair = tuple(given) if isinstance(given, list | tuple) else (given, given)
    kinds = (int, float) if size is None else (int,)
    if len(pair) != 2 or not all(type(each) in kinds and math.isfinite(each) for each in pair):
        return None
    if size is None:  # where it gives whole sizes, so that it is their ratio
        pair = tuple(side * factor for side, factor in zip(x.shape[2:], pair, strict=True))
    if any(side != int(side) or side < 1 for side in pair):
        return None
    theta = torch.eye(2, 3, dtype=torch.float64, device=x.device).expand(1, len(x), 2, 3).contiguous()
    resized = ops.warp_sampled(x if interleaved else x.contiguous(), theta, [(int(pair[0]), int(pair[1]))])[0]
    # models may rely on the layout that PyTorch's operator keeps; the kernel keeps it but of maps of one column
    return resized.contiguous(memory_format=torch.channels_last) if interleaved else resized


def _settings(stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1) -> tuple[Any, ...]:
    """Those of a convolution in two dimensions, a Python integer for each side; padding is no word."""
    sides = [tuple(side) if isinstance(side, tuple | list) else (side,) for side in (stride, padding, dilation)]
    return (*(tuple(map(index, side * 2 if len(side) == 1 else side)) for side in sides), index(groups))


_MOST_WEIGHTS = 2**16  # of one place of a filter: transformed they take eight times the memory, gradients included
_MOST_WASTE = 1.9  # positions of tiles for one of the result, above which PyTorch's own operator is faster


@functools.lru_cache(4096)
def _tiles_well(height: int, width: int, padding: tuple[int, int], dilation: int) -> bool:
    """Whether tiles of 4x4 that are `dilation` apart cover little more than the result, and than the gradient."""

    def tiled(size: int) -> int:
        return sum(-(-(size - phase) // (4 * dilation)) * 4 for phase in range(min(size, dilation)))

    high, wide = height + 2 * (padding[0] - dilation), width + 2 * (padding[1] - dilation)
    sizes = ((height, width), (high, wide))
    if not 1 <= min(high, wide) <= max(height, width, high, wide, *padding, dilation) < ops.MOST_PIXELS:
        return False
    return all(tiled(h) * tiled(w) <= _MOST_WASTE * h * w for h, w in sizes)


def _is_minimal(x: Tensor, weight: Tensor, settings: tuple[Any, ...]) -> bool:
    """Whether a convolution, and its gradient, is :func:`_minimal`; the number of images has no say."""
    if x.dtype != torch.float32 or not hasattr(weight, _KEPT) or weight.dtype != torch.float32 or x.dim() != 4:
        return False
    (outputs, channels, *sides), (stride, padding, (dilation, across), groups) = weight.shape, settings
    if sides != [3, 3] or stride != (1, 1) or dilation != across or groups != 1 or max(padding) > 2 * dilation:
        return False
    if outputs % ops.WINOGRAD_CHANNELS or channels % ops.WINOGRAD_CHANNELS or outputs * channels > _MOST_WEIGHTS:
        return False
    if weight.requires_grad or not weight.is_contiguous(memory_format=torch.channels_last):
        return False
    if not _tiles_well(x.shape[2], x.shape[3], padding, dilation):
        return False
    return x.device.type == "cpu" and ops.native(x) and ops.has_vectors()


def _minimal(x: Tensor, weight: Tensor, bias: Tensor | None, settings: tuple[Any, ...], gradient: bool) -> Tensor:
    """A convolution by ``winograd``, in a quarter of the products, or its gradient, x being upstream of it."""
    _, padding, (dilation, _), _ = settings

    def make(given: Tensor) -> Tensor:
        # what is upstream comes back through the filters mirrored
        return ops.winograd_filters(given.flip(2, 3).transpose(0, 1) if gradient else given)

    filters = _made(weight, ("winograd", gradient), make)
    around = [2 * dilation - side for side in padding] if gradient else padding
    convolved: Tensor = torch.ops.equifast.winograd(x, filters, bias, dilation, around)
    return convolved


def _is_transposed(x: Tensor, weight: Tensor, settings: tuple[Any, ...]) -> bool:
    """Whether the gradient of a convolution is ``conv_transpose``, whose bits know of no batch."""
    (stride, across), padding, dilation, groups = settings
    if x.dtype != torch.float32 or stride != across or stride == 1 or set(dilation) != {1} or groups != 1:
        return False
    largest = max(*x.shape[2:], *weight.shape[2:], *padding)
    return x.device.type == "cpu" and ops.native(x) and largest < ops.MOST_PIXELS and stride < ops.MOST_STRIDE


def _transposed(upstream: Tensor, x: Tensor, weight: Tensor, settings: tuple[Any, ...]) -> Tensor:
    (stride, _), padding, _, _ = settings
    filters = _made(weight, ("transpose", stride), lambda given: ops.conv_transpose_filters(given, stride))
    size, blocks = (x.shape[2], x.shape[3]), ops.in_blocks(weight.shape, stride)
    gradient = ops.conv_transpose(upstream, filters, weight.shape[1], size, stride, padding, blocks)
    interleaved = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return gradient if interleaved else gradient.contiguous()  # as what is before it is laid out


def _convolution_gradient(upstream: Tensor, x: Tensor, weight: Tensor, settings: tuple[Any, ...]) -> Tensor:
    """The gradient of a convolution by its input; on the CPU an image's has the same bits in any batch (_batchless)."""
    if _is_minimal(x, weight, settings):
        return _minimal(upstream, weight, None, settings, gradient=True)
    stride, padding, dilation, groups = settings
    rest = (None, stride, padding, dilation, False, (0, 0), groups, (True, False, False))
    pairs, alone = set(stride) != {1}, len(x) == 1 and x.numel() <= _LARGE and not _is_lowered(x)
    if x.device.type != "cpu" or not (pairs or alone):
        gradient: Tensor = torch.ops.aten.convolution_backward(upstream, x, weight, *rest)[0]
        return gradient
    if _is_transposed(x, weight, settings):
        return _transposed(upstream, x, weight, settings)
    found = []
    for given, images in zip(upstream.split(2), x.split(2), strict=True):
        if len(images) == 1:
            given, images = torch.cat((given, given)), torch.cat((images, images))
        found.append(torch.ops.aten.convolution_backward(given, images, weight, *rest)[0])
    return torch.cat(found)[: len(x)]


class _Frozen(torch.autograd.Function):
    """A convolution in two dimensions whose weight is a constant, of which derivatives of any order know."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, settings: tuple[Any, ...]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.settings = settings
        if x.device.type != "cpu":
            return torch.conv2d(x, weight, bias, *settings)
        if _is_minimal(x, weight, settings):
            return _minimal(x, weight, bias, settings, gradient=False)
        convolved: Tensor = _batchless(torch.conv2d, (x, weight, bias, *settings), {})
        # one of two is a view of both, and a view that a function of one's own gives must not be changed in place
        return convolved.clone() if convolved._is_view() else convolved

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None, None]:
        x, weight = ctx.saved_tensors
        gradient = _frozen_gradient if torch.is_grad_enabled() else _convolution_gradient
        with uncast(x):
            return gradient(upstream[0], x.detach(), weight, ctx.settings), None, None, None


class _FrozenGradient(torch.autograd.Function):
    """That gradient: linear, and its own derivative is the convolution."""

    @staticmethod
    def forward(ctx: Any, upstream: Tensor, x: Tensor, weight: Tensor, settings: tuple[Any, ...]) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.settings = settings
        return _convolution_gradient(upstream, x, weight, settings)

    @staticmethod
    def backward(ctx: Any, *second: Tensor) -> tuple[Tensor, None, None, None]:
        (weight,) = ctx.saved_tensors
        with uncast(second[0]):
            return _frozen_convolution(second[0], weight, None, ctx.settings), None, None, None


_frozen_convolution: Callable[..., Tensor] = _Frozen.apply
_frozen_gradient: Callable[..., Tensor] = _FrozenGradient.apply


def _frozen(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor | None:
    """``torch.conv2d``, called alike, as :class:`_Frozen`; None where it is not for it."""
    trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    if isinstance(padding, str) or trained or _untouchable():
        return None
    settings = _settings(stride, padding, dilation, groups)
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.is_floating_point() and x.dtype != torch.float64:
        # whatever autocast there will be on the way back
        lowered = torch.get_autocast_dtype(kind)
        x, weight = x.to(lowered), _lowered(weight, lowered)
        bias = None if bias is None else bias.to(lowered)
    return _frozen_convolution(x, weight, bias, settings)


def _is_lowered(x: Tensor) -> bool:
    """Whether a convolution of it on the CPU will be in 16 bits."""
    return x.dtype.itemsize == 2 or (x.dtype == torch.float32 and torch.is_autocast_enabled("cpu"))


# Positions of the input and of the stride are those of all six.
_CONVOLUTIONS = frozenset(
    (
        torch.conv1d,
        torch.conv2d,
        torch.conv3d,
        torch.conv_transpose1d,
        torch.conv_transpose2d,
        torch.conv_transpose3d,
    )
)
_TRANSPOSED = frozenset((torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d))
# Above this size PyTorch takes the algorithm of several maps (20480 in its source) for a lone one too.
_LARGE = 32768
_HEAVY = 2**18


def _is_strided(args: Any, kwargs: Any) -> bool:
    stride = args[3] if len(args) > 3 else kwargs.get("stride", 1)
    return any(side != 1 for side in (stride if isinstance(stride, tuple | list) else (stride,)))


def _as_on_several_threads(func: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The arguments of a convolution on the CPU, with which one thread takes the algorithm that several take.

    Where there is one thread, kernels of one position, without stride and dilation, are sent to another algorithm in a
    batch of less than sixteen images than in one of more. To such a kernel every dilation is the same, so that it gets
    one of two. The gradient follows.
    """
    x, weight = args[:2]
    if torch.compiler.is_compiling() or torch.get_num_threads() > 1 or x.dtype != torch.float32 or _is_lowered(x):
        return args, kwargs
    sides = weight.shape[2:]
    if _is_strided(args, kwargs) or any(side != 1 for side in sides[-2:]):
        return args, kwargs
    place = 7 if func in _TRANSPOSED else 5
    given = args[place] if len(args) > place else kwargs.get("dilation", 1)
    each = tuple(given) if isinstance(given, Sequence) else (given,)
    each = each * len(sides) if len(each) == 1 else each
    dilation = tuple(2 if side == 1 else old for side, old in zip(sides, each, strict=True))
    if len(args) > place:
        return (*args[:place], dilation, *args[place + 1 :]), kwargs
    return args, {**kwargs, "dilation": dilation}


def _batchless(func: Any, args: Any, kwargs: Any) -> Any:
    """A convolution, on the CPU, that gives an image the same bits whatever its batch.

    Three things depend on the number of images otherwise. One is that of :func:`_as_on_several_threads`, which has
    been called. PyTorch sends float32 convolutions of a single small map to another algorithm than those of several:
    here they run as one of two. And oneDNN cuts the gradient of a strided convolution into blocks by a rule that weighs
    images against threads: here that runs two images at a time (and the convolution too where it is transposed, not in
    two dimensions, trained, traced or transformed), or is done by an operator of our own (:func:`_transposed`). Where
    neither that is for it, nor a second copy for its memory, a lone image of large maps is left out: its last bits may
    be others than in a batch.
    """
    x, rest = args[0], args[1:]
    strided = _is_strided(args, kwargs)
    if strided and func is torch.conv2d and (len(x) > 1 or _is_transposed_alone(*args, **kwargs)):
        if not (torch.is_grad_enabled() and x.requires_grad):
            strided = False
        elif (convolved := _frozen(*args, **kwargs)) is not None:
            return convolved
    if strided and (len(x) > 1 or x.numel() <= _HEAVY):
        pairs = x.split(2)
        results = [func(pair if len(pair) == 2 else torch.cat((pair, pair)), *rest, **kwargs) for pair in pairs]
        return results[0][: len(x)] if len(pairs) == 1 else torch.cat(results)[: len(x)]
    if len(x) == 1 and x.numel() <= _LARGE and not _is_lowered(x):
        return func(torch.cat((x, x)), *rest, **kwargs)[:1]
    return func(*args, **kwargs)


def _is_transposed_alone(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, *rest: Any, **more: Any
) -> bool:
    """Whether a strided ``torch.conv2d``, called alike, of a lone image has a gradient of its own."""
    known = not isinstance(padding, str) and not _is_lowered(x) and not _untouchable()
    return known and _is_transposed(x, weight, _settings(stride, padding, *rest, **more))


def _rowwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer, on the CPU, that gives an image the same bits whatever its batch.

    The rounding of a product of matrices depends on the number of rows, so that each image has its own; and on some
    CPUs on where in memory they begin, so that each is a copy, and so is its gradient.
    """
    if torch.is_autocast_enabled("cpu") and x.dtype.itemsize <= 4:  # once, and not for every image
        lowered = torch.get_autocast_dtype("cpu")
        x, weight = x.to(lowered), _lowered(weight, lowered)
        bias = None if bias is None else bias.to(lowered)
    return torch.cat([_Copied.apply(functional.linear(_Copied.apply(image), weight, bias)) for image in x.split(1)])  # type: ignore[no-untyped-call, unused-ignore]


class _Copied(torch.autograd.Function):
    """The same in memory of its own, and its gradient too: where allocations begin, and no slice of a batch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone(memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Tensor:
        copied: Tensor = _Copied.apply(upstream[0])  # type: ignore[no-untyped-call, unused-ignore]
        return copied


def _with_kept_weight(args: Any) -> Any:
    """The arguments of a convolution; its weight as autocast would make it, where that may be kept."""
    if len(args) < 2 or not hasattr(args[1], _KEPT) or _untouchable():
        return args
    kind = args[0].device.type
    if not torch.is_autocast_enabled(kind) or args[0].dtype == torch.float64:
        return args
    return (args[0], _lowered(args[1], torch.get_autocast_dtype(kind)), *args[2:])


def _minimal_call(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    *rest: Any,
    **more: Any,
) -> Tensor | None:
    """``torch.conv2d``, called alike, where it is :func:`_minimal`; else None."""
    trained = bias is not None and bias.requires_grad
    if not hasattr(weight, _KEPT) or isinstance(padding, str) or trained or _is_lowered(input) or _untouchable():
        return None
    settings = _settings(stride, padding, *rest, **more)
    if not _is_minimal(input, weight, settings):
        return None
    if input.requires_grad and torch.is_grad_enabled():
        return _frozen_convolution(input, weight, bias, settings)
    return _minimal(input, weight, bias, settings, gradient=False)


class _Running(TorchFunctionMode):
    """How some of a model's operations are run. Every operation goes through it, so it is one.

    Args:
        batchless: see :func:`_batchless`.
        frozen: for second derivatives. Convolutions of constant weights are :class:`_Frozen`: no gradient of the
            weight is computed, as PyTorch's own do. A hard sigmoid, whose second derivative PyTorch lacks, has one.
        lean: for less, at the price of other last bits. Batch norm in eval mode is run as the affine map that it is:
            where neither its statistics nor its weights need a gradient, the backward pass wants only the scale;
            PyTorch's own operator keeps its whole input all the same, which is about half of what a network's graph
            holds. Few channels are resized by the kernel that warps. Of weights that :func:`keep_made` allows it for,
            what autocast makes is kept, and convolutions are :func:`_minimal` where that is for them (with ``frozen``
            too).
    """

    def __init__(self, batchless: bool, lean: bool, frozen: bool) -> None:
        super().__init__()
        self.batchless, self.lean, self.frozen = batchless, lean, frozen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.linear and self.batchless and _is_batch(*args):
            return _rowwise(*args, **kwargs)
        if func in _CONVOLUTIONS:
            batchless = self.batchless and _batched(*args) and args[0].device.type == "cpu"
            if batchless:
                args, kwargs = _as_on_several_threads(func, args, kwargs)
            if self.frozen and func is torch.conv2d and _followed(*args):
                convolved = _frozen(*args, **kwargs)
                if convolved is not None:
                    return convolved
            if self.lean and func is torch.conv2d:
                convolved = _minimal_call(*args, **kwargs)
                if convolved is not None:
                    return convolved
                args = _with_kept_weight(args)
            if batchless:
                return _batchless(func, args, kwargs)
        elif self.frozen and func is functional.hardsigmoid:
            return _hardsigmoid(*args, **kwargs)
        elif self.batchless and func in _SOFTMAX and _of_maps(*args, **kwargs):
            return probabilities(args[0], *args[1:2], **{k: v for k, v in kwargs.items() if k in ("dim", "dtype")})
        elif self.lean:
            found = None
            if func is functional.batch_norm and torch.is_grad_enabled():
                found = _affine(*args, **kwargs)
            elif func is functional.interpolate:
                found = _resized(*args, **kwargs)
            if found is not None:
                return found
        return func(*args, **kwargs)


_SOFTMAX = frozenset((torch.softmax, functional.softmax, torch.Tensor.softmax))


def _of_maps(x: Any = None, dim: Any = None, *rest: Any, **_: Any) -> bool:
    """Whether a softmax of these arguments is one of maps on the CPU, along another than the last dimension."""
    maps = isinstance(x, Tensor) and x.dim() > 2 and x.device.type == "cpu" and x.is_floating_point() and not rest
    return maps and type(dim) is int and dim not in (-1, x.dim() - 1)


def _followed(x: Any = None, *_: Any) -> bool:
    """Whether a gradient by the first argument of a convolution, a batch, is wanted."""
    return isinstance(x, Tensor) and x.dim() == 4 and x.requires_grad and torch.is_grad_enabled()


def _running(batchless: bool, lean: bool, frozen: bool) -> contextlib.AbstractContextManager[object]:
    """A mode for what no other does here: an attack runs a purifier.

    By PyTorch's own stack: a backward pass that was started inside a mode runs outside it.
    """
    for other in _get_current_function_mode_stack():
        if isinstance(other, _Running):
            batchless, lean = batchless and not other.batchless, lean and not other.lean
            frozen = frozen and not other.frozen
    return _Running(batchless, lean, frozen) if batchless or lean or frozen else contextlib.nullcontext()


_LOCK = threading.Lock()
# Flags of modules and parameters that are turned off, and by how many uses at once, of threads too: the last one turns
# them on again. By id: (id, name) -> [object, as it was, uses].
_HELD: dict[tuple[int, str], list[Any]] = {}


def _hold(thing: nn.Module | nn.Parameter, name: str, held: list[tuple[int, str]]) -> None:
    key = (id(thing), name)
    entry = _HELD.setdefault(key, [thing, getattr(thing, name), 0])
    entry[2] += 1
    held.append(key)
    if getattr(thing, name):
        setattr(thing, name, False)


def _release(key: tuple[int, str]) -> Exception | None:
    entry = _HELD[key]
    entry[2] -= 1
    if entry[2] == 0:
        thing, before, _ = _HELD.pop(key)
        try:
            if before:  # of what was made in inference mode, there
                with torch.inference_mode(isinstance(thing, Tensor) and thing.is_inference()):
                    setattr(thing, key[1], True)
        except RuntimeError as error:  # parameters made in inference mode
            return error
    return None


def uncast(x: object) -> contextlib.AbstractContextManager[Any]:
    """Without an autocast that the caller is in, of the device of a tensor."""
    kind = x.device.type if isinstance(x, Tensor) else ""
    if kind and torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return contextlib.nullcontext()


@contextlib.contextmanager
def evaluating(x: Tensor, *models: Model, lean: bool = False, frozen: bool = False) -> Iterator[None]:
    """Run models in eval mode, without gradients for their parameters, and leave them as they were found.

    Also when an exception passes through. Inside, an image on the CPU gets the same result alone as in a batch of up to
    ``MOST_ROWS``.
    With ``lean`` the graphs of float32 models with batch norm hold about half as much, and some operations take less
    time, but round otherwise than the model's own. With ``frozen`` second derivatives take less time. A function that
    is no Module is run as it is.

    Raises:
        ValueError: if a model is on another device than ``x``, or fails because it is of another dtype.
    """
    known = [model for model in models if isinstance(model, nn.Module)]
    for model in known:
        parameter = next(model.parameters(), None)
        if parameter is not None and parameter.device != x.device:
            raise ValueError(f"x is on {x.device}, the model on {parameter.device}; they must be on one device")
    held: list[tuple[int, str]] = []
    try:
        with _LOCK:
            for model in known:
                for module in model.modules():
                    if hasattr(module, "training"):  # frozen TorchScript has none
                        _hold(module, "training", held)
                for parameter in model.parameters():
                    _hold(parameter, "requires_grad", held)
        with _running(x.device.type == "cpu", lean, frozen):
            yield
    except RuntimeError as error:
        for model in known:
            own = next((p.dtype for p in model.parameters() if p.is_floating_point()), x.dtype)
            if own != x.dtype and "type" in str(error):  # as all of PyTorch's sentences on dtypes have it
                raise ValueError(
                    f"x is {x.dtype}, and the model, of {own}, does not take that; convert one of them: "
                    "a model runs in bfloat16 by dtype='auto', not by its weights"
                ) from error
        raise
    finally:
        with _LOCK:
            problems = [problem for key in held if (problem := _release(key)) is not None]
        if problems:
            raise problems[0]
