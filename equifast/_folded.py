"""A cheaper copy of a model that computes the same: batch norm folded into the convolutions before it.

In eval mode batch norm is an affine map per channel, which a convolution can do on its way (Jacob et al. 2018,
section 3.2). What follows what is read off a symbolic trace; where a model cannot be traced, off those of its parts.
"""

import copy
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

    That is where the convolution's output goes there and nowhere else, both are called once, are PyTorch's own, share
    no parameter with others and keep running statistics. None in a model with hooks: they see what is between.
    """
    modules = dict(model.named_modules())
    if any(_hooks(module) for module in modules.values()):
        return []
    owners = Counter(id(p) for module in modules.values() for p in module.parameters(recurse=False))

    def plain(module: nn.Module, kind: type[nn.Module]) -> bool:
        return type(module) is kind and all(owners[id(p)] == 1 for p in module.parameters(recurse=False))

    found = []
    # a copy, since what traces a forward pass runs it, and it may keep what it saw
    for first, second in _adjacent(copy.deepcopy(model).eval(), ""):
        conv, norm = modules[first], modules[second]
        if plain(conv, nn.Conv2d) and plain(norm, nn.BatchNorm2d) and isinstance(norm.running_var, Tensor):
            dtype = norm.running_var.dtype
            if dtype in (torch.float32, torch.float64) and conv.weight.dtype == dtype:
                found.append((first, second))
    return found


def _hooks(module: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for kind in kinds)


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
    """The folded copy of a model, made at the first use and again when the model has changed.

    Changes of parameters, buffers, submodules and hooks are seen; of other attributes of modules they are not.

    Args:
        model: is never changed, and never run here.
        keep: the name of a submodule whose output is wanted as it is, or None.
    """

    def __init__(self, model: nn.Module, keep: str | None = None) -> None:
        self._model = model
        self._keep = keep
        self._version: str | None = None
        self._copy: nn.Module | None = None

    def __getstate__(self) -> dict[str, object]:
        """Without the copy, which is made again."""
        return {"_model": self._model, "_keep": self._keep, "_version": None, "_copy": None}

    def __call__(self, x: Tensor, run: Callable[[nn.Module, Tensor], Tensor]) -> nn.Module:
        """The copy, in eval mode and without gradients for its parameters; or the model, where nothing folds.

        Args:
            x: images, of which the shape, dtype and device count.
            run: what of a model's output counts, ``(model, x) -> tensor``.
        """
        if len(x) == 0:
            return self._model
        version = self._fingerprint()
        if version != self._version:
            self._copy, self._version = self._fold(x, run), version
        copied = self._copy
        return self._model if copied is None else copied

    def _fingerprint(self) -> str:
        modules = [(id(module), type(module), _hooks(module)) for module in self._model.modules()]
        tensors = list(chain(self._model.parameters(), self._model.buffers()))
        places = [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors]
        # fused optimizers and .data change values alone
        floats = [t.detach() for t in tensors if t.is_floating_point()]
        norms = [torch.linalg.vector_norm(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t in floats]
        values = torch.stack([norm.double() for norm in norms]).tolist() if norms else []
        return repr((modules, places, values))

    def _fold(self, x: Tensor, run: Callable[[nn.Module, Tensor], Tensor]) -> nn.Module | None:
        try:
            folding = [pair for pair in pairs(self._model) if not self._kept(*pair)]
            if not folding:
                return None
            # two images, since a reshape may go well with one
            generator = torch.Generator().manual_seed(0)
            images = torch.rand((2, *x.shape[1:]), generator=generator, dtype=torch.float64).to(x)
            with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
                expected = run(copy.deepcopy(self._model).eval(), images.clone())  # some work in place
        except Exception:  # not every module can be copied, and what is wrong with a model is said where it is run
            return None
        for layout in (torch.channels_last, torch.contiguous_format):  # the first is faster, where the model takes it
            try:
                copied: nn.Module = copy.deepcopy(self._model).eval().requires_grad_(False)
                for conv, norm in folding:
                    fused: nn.Module = fuse_conv_bn_eval(copied.get_submodule(conv), copied.get_submodule(norm))  # type: ignore[type-var, arg-type]
                    _replace(copied, conv, fused.requires_grad_(False))
                    _replace(copied, norm, nn.Identity())
                if layout == torch.channels_last:
                    convert_conv2d_weight_memory_format(copied, layout)
                trial = copy.deepcopy(copied)
                with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
                    actual = run(trial, images.clone())
            except Exception:  # such as a look at the batch norm that is no longer there
                continue
            # rounding, of TF32 at the coarsest; what is wrong is wrong by far more
            if bool((actual - expected).abs().max() <= 1e-2 * expected.abs().max()):
                return copied
        return None

    def _kept(self, conv: str, norm: str) -> bool:
        """Whether the output that is wanted lies between the two."""
        inside = f"{self._keep}."
        return self._keep is not None and (
            conv == self._keep or (conv.startswith(inside) and not norm.startswith(inside))
        )


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
