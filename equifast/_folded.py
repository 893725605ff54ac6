"""A cheaper copy of a model that computes the same: batch norm folded into the convolutions before it.

In eval mode batch norm is an affine map per channel, which a convolution can do on its way (Jacob et al. 2018,
section 3.2). What follows what is read off a symbolic trace; where a model cannot be traced, off those of its parts.
"""

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.nn.utils.memory_format import convert_conv2d_weight_memory_format

__all__ = ["Folded", "pairs"]


def pairs(model: nn.Module) -> list[tuple[str, str]]:
    """Names of convolutions and of the batch norm after each, where folding is exact.

    That is where the convolution's output goes there and nowhere else, both are called once, are PyTorch's own, have
    no hooks, share no parameter with others and keep running statistics.
    """
    modules = dict(model.named_modules())
    owners = Counter(id(p) for module in modules.values() for p in module.parameters(recurse=False))

    def plain(module: nn.Module, kind: type[nn.Module]) -> bool:
        hooked = any(
            getattr(module, hooks)
            for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        )
        own = all(owners[id(p)] == 1 for p in module.parameters(recurse=False))
        return type(module) is kind and own and not hooked

    found = []
    for first, second in _adjacent(model, ""):
        conv, norm = modules[first], modules[second]
        if plain(conv, nn.Conv2d) and plain(norm, nn.BatchNorm2d) and isinstance(norm.running_var, Tensor):
            dtype = norm.running_var.dtype
            if dtype in (torch.float32, torch.float64) and conv.weight.dtype == dtype:
                found.append((first, second))
    return found


def _adjacent(module: nn.Module, prefix: str) -> Iterator[tuple[str, str]]:
    """Names of modules of which the second alone gets what the first gives, each called once."""
    try:
        nodes = list(fx.Tracer().trace(module).nodes)
    except Exception:  # whatever a forward pass does with something that is no tensor
        for name, child in module.named_children():
            yield from _adjacent(child, f"{prefix}{name}.")
        return
    calls = Counter(node.target for node in nodes if node.op == "call_module")
    for node in nodes:
        before = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) > 1:
            continue
        if calls[node.target] == calls[before.target] == 1:
            yield f"{prefix}{before.target}", f"{prefix}{node.target}"


class Folded:
    """The folded copy of a model, made at the first use and again when a parameter or buffer has changed.

    A change that goes around their version counters, by ``.data``, is not seen.

    Args:
        model: is never changed.
        keep: the name of a submodule whose output is wanted as it is, or None.
    """

    def __init__(self, model: nn.Module, keep: str | None = None) -> None:
        self._model = model
        self._keep = keep
        self._version: tuple[object, ...] | None = None
        self._copy: nn.Module | None = None

    def __call__(self, x: Tensor, run: Callable[[nn.Module, Tensor], Tensor]) -> nn.Module:
        """The copy, in eval mode and without gradients for its parameters; or the model, where nothing folds.

        Args:
            x: images; one of them is what the copy is compared with the model on.
            run: what of a model's output counts, ``(model, x) -> tensor``.
        """
        version = self._fingerprint()
        if version != self._version:
            self._copy = self._fold(x[:1], run) if len(x) else None
            self._version = version if len(x) else None
        return self._model if self._copy is None else self._copy

    def _fingerprint(self) -> tuple[object, ...]:
        tensors = chain(self._model.parameters(), self._model.buffers())
        return tuple((id(t), t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors)

    def _fold(self, x: Tensor, run: Callable[[nn.Module, Tensor], Tensor]) -> nn.Module | None:
        try:
            copied: nn.Module = copy.deepcopy(self._model)
        except Exception:  # not every module can be copied; then there is nothing to fold
            return None
        copied.eval().requires_grad_(False)
        folding = [(conv, norm) for conv, norm in pairs(copied) if conv != self._keep]
        if not folding:
            return None
        for conv, norm in folding:
            fused: nn.Module = fuse_conv_bn_eval(copied.get_submodule(conv), copied.get_submodule(norm))  # type: ignore[type-var, arg-type]
            _replace(copied, conv, fused.requires_grad_(False))
            _replace(copied, norm, nn.Identity())
        convert_conv2d_weight_memory_format(copied, torch.channels_last)
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            expected, actual = (run(model, x.clone()) for model in (self._model, copied))  # some work in place
        if expected.isfinite().all() and not (actual - expected).abs().max() <= 1e-3 * expected.abs().max():
            warnings.warn(
                "the model does not compute the same with batch norm folded; it is run as it is", stacklevel=2
            )
            return None
        return copied


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
