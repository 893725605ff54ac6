"""How much memory a pass through a model takes."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

__all__ = ["pass_bytes"]


def pass_bytes(run: Callable[[Tensor], Tensor], x: Tensor, owned: Iterable[Tensor] = ()) -> tuple[int, int]:
    """What ``run(x)`` and its derivative take, in bytes, about: what is kept for the derivative, and what passes.

    Kept is every piece of memory once and without that of ``owned``; three times the largest piece passes: what an
    operation gives, and the gradients by that and by its argument.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in owned}
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run(x.detach().requires_grad_())  # alive until all is counted, lest memory be used twice
    sizes = [size for place, size in held.items() if place not in known]
    del result
    return sum(sizes), 3 * max(sizes, default=0)
