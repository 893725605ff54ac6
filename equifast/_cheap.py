"""A model's predictions as cheaply as a dtype allows."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from equifast import _C
from equifast._folded import Folded
from equifast.features import output

__all__ = ["DTYPES", "Cheap", "autocast", "has_fast_bfloat16"]

DTYPES = ("auto", "float32", "bfloat16")


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16 faster than float32.

    CUDA 8.0 and later; on the CPU AMX, or AVX-512 BF16 but of Intel's processors that have AMX, and hide it.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and _C.multiplies_bfloat16()


def autocast(dtype: str, x: Tensor) -> torch.dtype | None:
    """The dtype that autocast lowers to for a setting ``dtype`` and images; None for none.

    The setting is one of ``DTYPES``, or ``"float16"``, which asks whoever differentiates to scale.
    """
    if dtype == "auto":
        # a model of another dtype has been made cheaper, or exact, by its user
        return torch.bfloat16 if x.dtype == torch.float32 and has_fast_bfloat16(x.device) else None
    return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(dtype)


class Cheap:
    """A model that predicts from a copy with batch norm folded, under autocast.

    Args:
        model: images to logits.
        dtype: ``"auto"`` or ``"bfloat16"``, as in :class:`equifast.Purifier`.
    """

    def __init__(self, model: nn.Module, dtype: str) -> None:
        self.model = model
        self._dtype = dtype
        self._folded = Folded(model)

    def on(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """The model for images as ``x``: logits in their dtype. It stays the one of this moment."""
        model, lowered = self._folded(x, lambda folded, images: output(folded(images))), autocast(self._dtype, x)

        def predict(images: Tensor) -> Tensor:
            # disabled where it is None: the result must not depend on an autocast that the caller is in
            with torch.autocast(images.device.type, dtype=lowered, enabled=lowered is not None, cache_enabled=False):
                return output(model(images)).to(images.dtype)

        return predict
