"""Layers that commute with rotations and mirror images of their input, by construction.

A map over a group has one value per pixel and element: (N, C * order, H, W), the elements of a channel side by side.
An image has one per pixel. What turns the input turns the output, and moves it along the group
(:meth:`equifast.nn.Group.act`). Cohen and Welling 2016, *Group Equivariant Convolutional Networks*, sections 4 and 6;
Weiler and Cesa 2019, *General E(2)-Equivariant Steerable CNNs*, section 2.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from equifast import _checks, ops
from equifast.nn._group import P4, Group

__all__ = ["GroupBatchNorm2d", "GroupConv2d", "GroupPool", "ScaleConv2d", "SteerableConv2d", "as_convolutions"]


@dataclass(frozen=True)
class _Kept:
    """Expanded filters, and of which weight they are: held, so that no other takes its place in memory."""

    filters: Tensor
    weight: Tensor
    version: int
    probe: Tensor | None
    checksum: float

    @classmethod
    def of(cls, weight: Tensor, filters: Tensor) -> "_Kept":
        probe = None
        if weight.device.type == "cpu":
            probe = (torch.arange(1, weight.numel() + 1, dtype=torch.float64, device="cpu") * 2.39996).sin().float()
        return cls(filters, weight, weight._version, probe, cls._sum(weight, probe))

    @staticmethod
    def _sum(weight: Tensor, probe: Tensor | None) -> float:
        """Another number, as a rule, for other weights, signs and orders; on the CPU, elsewhere it would be waited for.

        Averages of weights are put in place by ``.data``, which no version counts.
        """
        if probe is None:
            return 0.0
        # a model that looks at values is not folded, and this is not the model
        with torch._C.DisableTorchFunction():
            return float(weight.flatten().float() @ probe)

    def fits(self, weight: Tensor) -> bool:
        same = self.weight.data_ptr() == weight.data_ptr() and self.weight.dtype == weight.dtype
        same = same and self.weight.device == weight.device and self.version == weight._version
        return same and self.checksum == self._sum(weight, self.probe)


class _Expanded(nn.Module):
    """A convolution whose filters are made of fewer weights: one ``conv2d`` over what :meth:`expand` gives.

    In eval mode, where no gradient of the weights is wanted, expanded filters are kept until the weights change. On
    CUDA a change through ``weight.data`` alone is not seen; :meth:`train` and :meth:`eval` forget what is kept.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        channels_in: int,
        channels: int,
        kernel_size: int,
        *,
        group: Group = P4,
        lifting: bool = False,
        stride: int = 1,
        padding: int = 0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.channels_in = _checks.integer("channels_in", channels_in, 1, 2**31 - 1)
        self.channels = _checks.integer("channels", channels, 1, 2**31 - 1)
        self.kernel_size = _checks.integer("kernel_size", kernel_size, 1, 2**15)
        if not isinstance(group, Group):
            raise TypeError(f"group is a {type(group).__name__}; it must be a Group, such as equifast.nn.P4")
        self.group = group
        self.lifting = _checks.boolean("lifting", lifting)
        self.stride = _checks.integer("stride", stride, 1, 2**15)
        self.padding = _checks.integer("padding", padding, 0, 2**15)
        self.bias = nn.Parameter(torch.zeros(channels)) if _checks.boolean("bias", bias) else None
        self._kept: _Kept | None = None
        self._build()

    def _build(self) -> None:
        """Registers the weights and what they are expanded by."""
        raise NotImplementedError

    @property
    def order_in(self) -> int:
        """How many values per pixel a channel of the input has: 1 of an image."""
        return 1 if self.lifting else self.group.order

    def exact(self, size: int) -> bool:
        """Whether the layer commutes with the quarter turns and mirror images of its group on squares of this size.

        It does so up to rounding where the stride divides what the kernel leaves of the input: then the kernel stands
        at the same places seen from every side.
        """
        left = size + 2 * self.padding - self.kernel_size
        return left >= 0 and left % self.stride == 0

    def expand(self) -> Tensor:
        """(channels * order, channels_in * order_in, k, k): the filters, differentiable."""
        raise NotImplementedError

    def expanded_bias(self) -> Tensor | None:
        """(channels * order,), the same along the group."""
        return None if self.bias is None else self.bias.repeat_interleave(self.group.order)

    def filters(self) -> Tensor:
        """What :meth:`expand` gives, kept where that is safe."""
        weight = self.weight
        differentiated = torch.is_grad_enabled() and weight.requires_grad
        if self.training or differentiated or weight.is_inference() or _checks.transformed():
            self._kept = None
            return self.expand()
        if torch.compiler.is_compiling():
            return self.expand()
        kept = self._kept
        if kept is None or not kept.fits(weight.detach()):
            # filters made in inference mode would have no gradients with respect to images later
            with torch.inference_mode(False), torch.no_grad():
                self._kept = kept = _Kept.of(weight.detach(), self.expand())
        return kept.filters

    def train(self, mode: bool = True) -> Self:
        """As of every module; forgets the filters that are kept."""
        self._kept = None
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels_in * order_in, H, W) -> (N, channels * order, h, w)."""
        wanted = self.channels_in * self.order_in
        if x.dim() != 4 or x.shape[1] != wanted:
            raise ValueError(
                f"x has shape {_checks.shape(x)}; it must be (N, {wanted}, H, W): "
                f"{self.channels_in} channels, {self.order_in} values in each"
            )
        return functional.conv2d(x, self.filters(), self.expanded_bias(), self.stride, self.padding)

    def extra_repr(self) -> str:
        return (
            f"{self.channels_in}, {self.channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, group={self.group}, lifting={self.lifting}"
        )

    def __getstate__(self) -> dict[str, Any]:
        """Without the filters that are kept."""
        return {**self.__dict__, "_kept": None}


class GroupConv2d(_Expanded):
    """A convolution over a group of quarter turns: exact where :meth:`exact` says so (Cohen and Welling 2016, eq. 10f).

    Args:
        channels_in: of the input, without the group: an image with 3 channels has 3, a map over the group with 3 * 4
            values per pixel too.
        channels: of the output, without the group.
        kernel_size: height and width of the filters, in pixels.
        group: :data:`equifast.nn.P4`, :data:`equifast.nn.P4M`, or another whose elements keep the pixels.
        lifting: whether the input is an image, and no map over the group.
        stride, padding: in pixels, as of ``Conv2d``; padding is with zeros.
        bias: whether each channel gets a number added.

    Raises:
        TypeError, ValueError: for settings that cannot be; in ``forward``, for another number of channels.
    """

    def _build(self) -> None:
        if not self.group.on_grid:
            raise ValueError(
                f"group has {self.group.rotations} rotations; it must have 1, 2 or 4, which keep the pixels: "
                "SteerableConv2d takes others"
            )
        # of four dimensions, as those of Conv2d, so that they can be channels_last
        size = self.kernel_size
        self.weight = nn.Parameter(torch.empty(self.channels, self.channels_in * self.order_in, size, size))
        nn.init.kaiming_normal_(self.weight, nonlinearity="relu")
        shape = (self.order_in, size, size)
        places, regular = torch.arange(math.prod(shape)).view(shape), not self.lifting
        index = torch.stack([self.group.act(places, g, regular=regular).flatten() for g in range(self.group.order)])
        self.register_buffer("index", index, persistent=False)

    def expand(self) -> Tensor:
        order, kernel = self.group.order, self.kernel_size
        filters = self.weight.reshape(self.channels, self.channels_in, -1)
        turned = ops.turn_filters(filters, self.get_buffer("index"))
        return turned.reshape(self.channels * order, self.channels_in * self.order_in, kernel, kernel)


def _harmonics(group: Group, kernel_size: int) -> Tensor:
    """(order, B, k, k) float64: circular harmonics on rings, as each element of the group turns them; norm 1.

    Ring r, of Gaussian profile, has frequencies up to 2r: higher ones the pixels cannot tell apart.
    """
    center = (kernel_size - 1) / 2
    along = torch.arange(kernel_size, dtype=torch.float64) - center
    up, right = torch.meshgrid(-along, along, indexing="ij")
    found = []
    for element in range(group.order):
        mirror, turn = divmod(element, group.rotations)
        angle = 2 * math.pi * turn / group.rotations
        # seen by a filter that was mirrored and then turned
        x, y = math.cos(angle) * right + math.sin(angle) * up, math.cos(angle) * up - math.sin(angle) * right
        x = -x if mirror else x
        radius, direction = (x.square() + y.square()).sqrt(), torch.atan2(y, x)
        basis = []
        for ring in range(math.floor(center) + 1):
            # even kernels have no pixel at the center
            distance = ring + (center - math.floor(center))
            profile = torch.exp(-((radius - distance) ** 2) / (2 * 0.6**2))
            for frequency in range(math.floor(2 * distance) + 1):
                waves = [torch.cos(frequency * direction)]
                waves += [torch.sin(frequency * direction)] if frequency else []
                # of no direction at the center
                inner = (radius > 1e-9) if frequency else torch.ones_like(radius)
                basis += [profile * wave * inner for wave in waves]
        found.append(torch.stack(basis))
    every = torch.stack(found)
    norms = every[0].flatten(1).norm(dim=1)
    assert bool((norms > 1e-6).all())
    normalized: Tensor = every / norms.view(-1, 1, 1)
    return normalized


class SteerableConv2d(_Expanded):
    """A convolution over a group of rotations by any equal angles, with band-limited filters.

    Filters are sums of circular harmonics, which can be turned by any angle before they are sampled (Weiler and Cesa
    2019, section 2; regular representations). Exact for quarter turns where :meth:`exact` says so; between them as good
    as sampling is, which :func:`equifast.nn.equivariance_error` measures.

    Args:
        channels_in, channels, kernel_size, lifting, stride, padding, bias: as of :class:`GroupConv2d`.
        group: such as :data:`equifast.nn.C8`.

    Raises:
        TypeError, ValueError: for settings that cannot be; in ``forward``, for another number of channels.
    """

    def _build(self) -> None:
        basis = _harmonics(self.group, self.kernel_size)
        shape = (self.channels, self.channels_in, self.order_in, basis.shape[1])
        self.weight = nn.Parameter(torch.randn(shape) * math.sqrt(2 / math.prod(shape[1:])))
        self.register_buffer("basis", basis.to(self.weight.dtype), persistent=False)
        sources = torch.zeros((self.group.order, 1), dtype=torch.int64) if self.lifting else self.group.sources()
        self.register_buffer("sources", sources, persistent=False)

    def expand(self) -> Tensor:
        order, kernel = self.group.order, self.kernel_size
        basis, sources = self.get_buffer("basis"), self.get_buffer("sources")
        moved = self.weight.index_select(2, sources.flatten())
        moved = moved.view(self.channels, self.channels_in, *sources.shape, -1)
        # what is kept must not be as coarse as an autocast that it was made under
        with torch.autocast(moved.device.type, enabled=False):
            filters: Tensor = torch.einsum("oighb,gbyx->ogihyx", moved, basis.to(moved.dtype))
        return filters.reshape(self.channels * order, self.channels_in * self.order_in, kernel, kernel)


class GroupBatchNorm2d(nn.BatchNorm2d):
    """Batch norm of maps over a group, one mean and variance per channel, of all pixels and elements; always exact.

    Args:
        channels: without the group.
        group: of the maps.
        settings: of ``torch.nn.BatchNorm2d``.
    """

    def __init__(self, channels: int, *, group: Group = P4, **settings: Any) -> None:
        if not isinstance(group, Group):
            raise TypeError(f"group is a {type(group).__name__}; it must be a Group, such as equifast.nn.P4")
        super().__init__(channels, **settings)
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels * order, H, W) -> the same."""
        order = self.group.order
        if x.dim() != 4 or x.shape[1] != self.num_features * order:
            raise ValueError(
                f"x has shape {_checks.shape(x)}; it must be (N, {self.num_features * order}, H, W): "
                f"{self.num_features} channels, {order} values in each"
            )
        if self.training or self.running_mean is None or self.running_var is None:
            n, _, height, width = x.shape
            return super().forward(x.reshape(n, self.num_features, order * height, width)).reshape(x.shape)
        each = (self.running_mean, self.running_var, self.weight, self.bias)
        mean, var, weight, bias = (None if t is None else t.repeat_interleave(order) for t in each)
        return functional.batch_norm(x, mean, var, weight, bias, eps=self.eps)


class GroupPool(nn.Module):
    """The largest or the mean value over the group: what is left turns as an image does; always exact.

    Args:
        order: how many values each channel has: ``group.order``, or the number of scales.
        kind: ``"max"`` or ``"mean"``.
    """

    def __init__(self, order: int = P4.order, *, kind: str = "max") -> None:
        super().__init__()
        self.order = _checks.integer("order", order, 1, 2**31 - 1)
        self.kind = _checks.choice("kind", kind, ("max", "mean"))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C * order, H, W) -> (N, C, H, W)."""
        if x.dim() != 4 or x.shape[1] % self.order:
            raise ValueError(f"x has shape {_checks.shape(x)}; it must be (N, C * {self.order}, H, W)")
        each: Tensor = x.unflatten(1, (-1, self.order))
        return each.amax(2) if self.kind == "max" else each.mean(2)

    def extra_repr(self) -> str:
        return f"{self.order}, kind={self.kind!r}"


class ScaleConv2d(nn.Module):
    """A convolution of the image at several sizes, each resized back: (N, channels * scales, h, w).

    A channel's scales stand side by side, for :class:`GroupPool` over ``len(scales)``. Resizing commutes with it only
    approximately, and but for the scales at the ends; :func:`equifast.nn.equivariance_error` cannot hold here, and
    ``bench/bench_nn.py`` reports what is left. Quarter turns it commutes with no better than a plain convolution.

    Args:
        channels_in, channels, kernel_size, stride, padding, bias: of each convolution.
        scales: of the image that is convolved, by which its sides are multiplied.
        shared: whether all have the same weights; else each has its own.

    Raises:
        ValueError: for settings that cannot be, and in ``forward`` for images smaller than a kernel.
    """

    def __init__(
        self,
        channels_in: int,
        channels: int,
        kernel_size: int,
        *,
        scales: Sequence[float] = (0.5, 1.0, 2.0),
        shared: bool = True,
        stride: int = 1,
        padding: int = 0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if not scales:
            raise ValueError("scales is empty; there must be at least one")
        self.scales = tuple(_checks.number("scales", scale, above=0) for scale in scales)
        self.shared = _checks.boolean("shared", shared)
        self.convs = nn.ModuleList(
            nn.Conv2d(channels_in, channels, kernel_size, stride, padding, bias=bias)
            for _ in (self.scales[:1] if shared else self.scales)
        )
        for conv in self.convs:
            nn.init.kaiming_normal_(conv.get_parameter("weight"), nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels_in, H, W) -> (N, channels * scales, h, w), of the size that the convolution gives unscaled."""
        conv = self.convs[0]
        assert isinstance(conv, nn.Conv2d)
        kernel, stride, padding = conv.kernel_size[0], conv.stride[0], int(conv.padding[0])
        if x.dim() != 4 or x.shape[1] != conv.in_channels:
            raise ValueError(f"x has shape {_checks.shape(x)}; it must be (N, {conv.in_channels}, H, W)")
        least = min(max(1, round(side * scale)) for side in x.shape[2:] for scale in (1.0, *self.scales))
        if least + 2 * padding < kernel:
            raise ValueError(
                f"x has shape {_checks.shape(x)}; at every scale its sides must be at least {kernel - 2 * padding}"
            )
        size = [(side + 2 * padding - kernel) // stride + 1 for side in x.shape[2:]]
        found = []
        for number, scale in enumerate(self.scales):
            conv = self.convs[0 if self.shared else number]
            if scale == 1:
                found.append(conv(x))
                continue
            sides = [max(1, round(side * scale)) for side in x.shape[2:]]
            found.append(_resized(conv(_resized(x, sides)), size))
        return torch.stack(found, 2).flatten(1, 2)


def _resized(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear, antialiased where it shrinks; in float32, since PyTorch has that for no smaller type on the CPU."""
    shrinks = size[0] < x.shape[2] or size[1] < x.shape[3]
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return functional.interpolate(wide, list(size), mode="bilinear", antialias=shrinks).to(x.dtype)


def as_convolutions(model: nn.Module) -> nn.Module:
    """A copy of a model with plain ``Conv2d`` and ``BatchNorm2d`` for the layers over groups: the same function.

    It is for inference: weights that were one are then several. What folds, exports or compiles plain networks takes
    it, the engine of the purifier among them. Batch norm without running statistics stays as it is.

    Args:
        model: any; a layer itself too.
    """
    return _plain(copy.deepcopy(model), {})


def _plain(module: nn.Module, made: dict[int, nn.Module]) -> nn.Module:
    """Of a module; ``made`` has those of modules that several others share."""
    made[id(module)] = result = _replaced(module, made)
    return result


def _replaced(module: nn.Module, made: dict[int, nn.Module]) -> nn.Module:
    if isinstance(module, _Expanded):
        with torch.no_grad():
            filters, bias = module.expand(), module.expanded_bias()
            conv = nn.Conv2d(
                filters.shape[1],
                filters.shape[0],
                module.kernel_size,
                module.stride,
                module.padding,
                bias=bias is not None,
                device=filters.device,
                dtype=filters.dtype,
            )
            conv.weight.copy_(filters)
            if bias is not None and conv.bias is not None:
                conv.bias.copy_(bias)
        return conv.train(module.training)
    # one without running statistics takes those of the batch over the group, which no plain one does
    if isinstance(module, GroupBatchNorm2d) and module.running_mean is not None:
        order = module.group.order
        norm = nn.BatchNorm2d(
            module.num_features * order,
            module.eps,
            module.momentum,
            affine=module.affine,
            track_running_stats=module.track_running_stats,
        )
        state = {k: v.repeat_interleave(order) if v.dim() else v for k, v in module.state_dict().items()}
        norm.load_state_dict(state)
        for value in state.values():
            if value.is_floating_point():
                norm = norm.to(value.device, value.dtype)
                break
        return norm.train(module.training)
    for name, child in module._modules.items():
        if child is not None:
            module._modules[name] = made[id(child)] if id(child) in made else _plain(child, made)
    return module
