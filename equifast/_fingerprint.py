"""What tells the weights of one model from those of another."""

import hashlib
from collections.abc import Iterable
from itertools import chain

import torch
from torch import Tensor, nn

__all__ = ["fingerprint", "stamp", "tensors_of"]


def tensors_of(module: nn.Module) -> list[Tensor]:
    """All parameters and buffers of a module, those too that its state dict leaves out."""
    return [*chain(module.parameters(), module.buffers())]


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """Sixteen hexadecimal digits of the values of tensors, in their order."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(repr((tuple(tensor.shape), tensor.dtype)).encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def stamp(module: nn.Module) -> tuple[tuple[int, int], ...]:
    """What changes when weights of a module are changed in place or replaced; it does not look at them."""
    return tuple((t.data_ptr(), -1 if t.is_inference() else t._version) for t in tensors_of(module))
