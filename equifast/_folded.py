"""A cheaper copy of a model that computes the same: batch norm folded into the convolutions before it.

In eval mode batch norm is an affine map per channel, which a convolution can do on its way (Jacob et al. 2018,
section 3.2). What follows what is seen in one run of a copy, operation by operation.
"""

import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.nn.utils.memory_format import convert_conv2d_weight_memory_format
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from equifast._fingerprint import copy_of, hooks
from equifast.features import keep_made

__all__ = ["Folded", "pairs"]

Run = Callable[[nn.Module, Tensor], Tensor]
"""What of a model's output counts, ``(model, x) -> tensor``."""


class _Conv:
    """A call of a convolution: its weight, and how often what it gave was taken."""

    def __init__(self, weight: int) -> None:
        self.weight = weight
        self.taken = 0


class _Recorder(TorchFunctionMode):
    """Notes which batch norm gets what a convolution gives, and whether anything else does.

    Only the calling thread's operations are seen.
    """

    # What makes Python numbers of a tensor's values: by these a model may decide, and decide otherwise next time.
    _LOOKS = (
        *("__array__", "__bool__", "__contains__", "__float__", "__index__", "__int__"),
        *("allclose", "equal", "is_nonzero", "item", "numpy", "tolist"),
    )

    def __init__(self) -> None:
        super().__init__()
        self.followed: list[tuple[_Conv, int]] = []  # and the running mean of the batch norm
        self.used: Counter[int] = Counter()  # tensors, by id, by how many calls
        self.looked = self.reshaped = False
        self._living: dict[int, _Conv] = {}  # by the id of its output

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        self.looked |= name in self._LOOKS
        self.reshaped |= func in (Tensor.view, Tensor.view_as)
        if result is None or any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):  # not sizes and the like
            self.take((args, kwargs))
        if func is torch.conv2d:
            conv = _Conv(id(args[1] if len(args) > 1 else kwargs.get("weight")))
            key = id(result)
            self._living[key] = conv
            weakref.finalize(result, self._living.pop, key, None)
        elif func is functional.batch_norm and len(args) > 1 and id(args[0]) in self._living:
            self.followed.append((self._living[id(args[0])], id(args[1])))
        return result

    def take(self, values: Any) -> None:
        """Counts the tensors in some values as taken."""
        for leaf in tree_leaves(values):
            if isinstance(leaf, Tensor):
                self.used[id(leaf)] += 1
                if id(leaf) in self._living:
                    self._living[id(leaf)].taken += 1


def pairs(model: nn.Module, x: Tensor, run: Run) -> tuple[list[tuple[nn.Conv2d, nn.BatchNorm2d]], bool]:
    """Convolutions and the batch norm after each, where folding is exact, and whether ``Tensor.view`` was called.

    Exact is where the convolution's output goes there and nowhere else, both are called once, are PyTorch's own, share
    nothing with others and keep running statistics. None in a model that has hooks, which see what is between; that
    looks at values of tensors, and may decide by them; or that has compiled parts, which do not show what they do.

    Args:
        model: in eval mode; run once.
        x: images.
        run: how it is run.
    """
    modules = list(model.modules())
    if any(hooks(module) or isinstance(module, torch.jit.ScriptModule) for module in modules):
        return [], False
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False), _Recorder() as seen:
        result = run(model, x)
    seen.take(result)
    if seen.looked:
        return [], seen.reshaped
    own = [(*m.parameters(recurse=False), *m.buffers(recurse=False)) for m in modules]
    owners = Counter(id(tensor) for tensors in own for tensor in tensors)
    convs = {id(m.weight): m for m in modules if type(m) is nn.Conv2d}
    norms = {id(m.running_mean): m for m in modules if type(m) is nn.BatchNorm2d and m.running_mean is not None}
    found = []
    for call, mean in seen.followed:
        conv, norm = convs.get(call.weight), norms.get(mean)
        if conv is None or norm is None or call.taken > 1 or not isinstance(norm.running_var, Tensor):
            continue
        tensors = (*conv.parameters(recurse=False), *norm.parameters(recurse=False), norm.running_mean)
        if any(seen.used[id(t)] != 1 or owners[id(t)] != 1 for t in tensors):
            continue
        if norm.running_var.dtype in (torch.float32, torch.float64) and conv.weight.dtype == norm.running_var.dtype:
            found.append((conv, norm))
    return found, seen.reshaped


class Folded:
    """The folded copy of a model, made at the first use and again when the model has changed.

    Changes of parameters, buffers, submodules and hooks are seen; of other attributes of modules they are not. What
    follows what is seen at the size of the first image, and tried there and at two others: a model that does something
    else at yet another size is not for folding. Threads may share one.

    Args:
        model: is never changed, and never run here.
        keep: the name of a submodule whose output is wanted as it is, or several, or None.
    """

    def __init__(self, model: nn.Module, keep: str | Sequence[str] | None = None) -> None:
        self._model = model
        self._keep = (keep,) if isinstance(keep, str) else tuple(keep or ())
        self._forget()

    _FEW, _MANY = 4096, 2**20  # numbers of a tensor

    def _forget(self) -> None:
        self._version: str | None = None
        self._copy: nn.Module | None = None
        self._failed: set[Any] | None = None  # of which images folding raised; None where it is decided
        self._probes: dict[torch.device, Tensor] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, object]:
        """Without the copy, which is made again."""
        return {"_model": self._model, "_keep": self._keep}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def __call__(self, x: Tensor, run: Run) -> nn.Module:
        """The copy, in eval mode and without gradients for its parameters; or the model, where nothing folds.

        Args:
            x: images, of which the shape, dtype and device count.
            run: what of a model's output counts, ``(model, x) -> tensor``.
        """
        if len(x) == 0:
            return self._model
        with self._lock:
            try:
                # this is not the model: modes would see every call, and a caller's autocast round
                with torch._C.DisableTorchFunction(), torch.autocast(x.device.type, enabled=False):
                    version = self._fingerprint()
            except Exception:  # tensors that have no values to look at, such as sparse ones
                return self._model
            if version != self._version:
                self._copy, self._version, self._failed = None, version, set()
            given, failed = (x.shape[1:], x.dtype, x.device), self._failed
            if failed is not None and given not in failed:
                try:
                    # a copy that is made in inference mode would have no gradients later
                    with torch.inference_mode(False):
                        self._copy, self._failed = self._fold(x, run), None
                # not every module can be copied, and what is wrong with a model is said where it is run
                except Exception:
                    failed.add(given)  # other images may go well
            return self._model if self._copy is None else self._copy

    @property
    def version(self) -> str | None:
        """What the model was like at the last use, its values included; None before."""
        return self._version

    @property
    def made(self) -> bool:
        """Whether there is a copy."""
        return self._copy is not None

    def _fingerprint(self) -> str:
        modules = [(id(module), type(module), hooks(module)) for module in self._model.modules()]
        tensors = list(chain(self._model.parameters(), self._model.buffers()))
        places = [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors]
        # fused optimizers and .data change values alone
        values = [t.detach() for t in tensors if t.is_floating_point()]
        few = [t for t in values if t.numel() <= self._FEW and t.device.type == "cpu"]  # less to read than to call
        several = [torch.cat([t.flatten() for t in group]) for group in _alike_in(few, lambda t: t.dtype)]
        read = [hash(flat.view(torch.uint8).numpy().tobytes()) for flat in several]
        many = [t for t in values if t.numel() > self._FEW or t.device.type != "cpu"]
        sums = [self._checksum(t) for t in many]
        found = [torch.stack(group).tolist() for group in _alike_in(sums, lambda t: t.device)]
        return repr((modules, places, read, found))

    def _checksum(self, values: Tensor) -> Tensor:
        """Another number, as a rule, for other values, signs and orders."""
        flat = values.flatten()
        flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
        probe = self._probes.get(flat.device)
        if probe is None or len(probe) < min(len(flat), self._MANY):
            angles = torch.arange(1, min(len(flat), self._MANY) + 1, dtype=torch.float64, device="cpu") * 2.39996
            self._probes[flat.device] = probe = angles.sin().to(flat.device, torch.float32)
        if len(flat) <= self._MANY:
            return (flat @ probe[: len(flat)].to(flat.dtype)).double()
        parts = [part @ probe[: len(part)].to(part.dtype) for part in flat.split(self._MANY)]
        # weighted, since parts may change places
        return torch.stack([place * part.double() for place, part in enumerate(parts, 1)]).sum()

    def _fold(self, x: Tensor, run: Run) -> nn.Module | None:
        # two images, since a reshape may go well with one
        generator = torch.Generator("cpu").manual_seed(0)
        images = torch.rand((2, *x.shape[1:]), generator=generator, dtype=torch.float64, device="cpu").to(x)
        # copies, since a model may keep what it saw; and images, since some work in place
        original: nn.Module = copy_of(self._model)
        found, reshaped = pairs(original, images.clone(), run)
        names = {id(module): name for name, module in original.named_modules()}
        folding = [(names[id(conv)], names[id(norm)]) for conv, norm in found]
        folding = [pair for pair in folding if not self._kept(*pair)]
        if not folding:
            return None
        expected = list(_tried(self._model, images, run))
        # The first is faster. Views want what they merge side by side in memory, at every size of an image.
        layouts = (torch.contiguous_format,) if reshaped else (torch.channels_last, torch.contiguous_format)
        for layout in layouts:
            try:
                copied: nn.Module = copy_of(self._model).requires_grad_(False)
                for first, second in folding:
                    conv, norm = copied.get_submodule(first), copied.get_submodule(second)
                    _replace(copied, conv, fuse_conv_bn_eval(conv, norm).requires_grad_(False))  # type: ignore[type-var, arg-type]
                    _replace(copied, norm, nn.Identity())
                if layout == torch.channels_last:
                    convert_conv2d_weight_memory_format(copied, layout)
                actual = list(_tried(copied, images, run))
            except Exception:  # such as a look at the batch norm that is no longer there
                continue
            # rounding; that of TF32 is coarser
            tolerance = 1e-3 if x.device.type == "cpu" else 1e-2
            if all(_alike(*both, tolerance) for both in zip(actual, expected, strict=True)):
                for module in copied.modules():
                    if type(module) is nn.Conv2d:
                        keep_made(module.weight)
                return copied
        return None

    def _kept(self, conv: str, norm: str) -> bool:
        """Whether an output that is wanted lies between the two."""
        return any(
            conv == name or (conv.startswith(f"{name}.") and not norm.startswith(f"{name}.")) for name in self._keep
        )


def _tried(model: nn.Module, images: Tensor, run: Run) -> Iterator[Tensor | None]:
    """What copies of a model give for images of three sizes; None for a size that it does not take."""
    height, width = images.shape[2:]
    for number, size in enumerate(
        ((height, width), (height + 1 | 1, width + 1 | 1), (height // 2 | 1, width // 2 | 1))
    ):
        tried: nn.Module = copy_of(model)
        resized = images if number == 0 else functional.interpolate(images, size)
        try:
            with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
                yield run(tried, resized.clone())
        except Exception:
            if number == 0:
                raise
            yield None


def _alike(actual: Tensor | None, expected: Tensor | None, tolerance: float) -> bool:
    if actual is None or expected is None:
        return actual is expected
    return actual.shape == expected.shape and bool((actual - expected).abs().max() <= tolerance * expected.abs().max())


def _alike_in(tensors: Iterable[Tensor], key: Callable[[Tensor], object]) -> Iterable[list[Tensor]]:
    groups: dict[object, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(key(tensor), []).append(tensor)
    return groups.values()


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Under every name that it has."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is old:
                setattr(parent, name, new)
