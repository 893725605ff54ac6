"""What a process keeps for its next steps on the CPU: freed memory, and kernels of convolutions."""

import ctypes
import os
import platform

from equifast import _checks

__all__ = ["keep_freed_memory", "keep_kernels"]

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of mallopt, in malloc.h


def keep_freed_memory() -> bool:
    """Ask glibc to keep memory that tensors on the CPU give back, for those that come next.

    Otherwise every step returns its activations to the system and asks for them again, page by page, which takes about
    a tenth of a step of purification with torch 2.13; 2.15, as it comes from PyPI, keeps them by itself. It holds for
    the whole process, until it ends: what was once taken stays with it, but for what is free above the last block in
    use where that is more than 2 GiB. Nothing that equifast does at import or in a call asks for it; its command line
    does.

    Returns:
        Whether it was done; not with other C libraries.
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # large blocks have mappings of their own else, which go when they are freed
    return bool(mallopt(_TRIM_THRESHOLD, 2**31 - 1)) and bool(mallopt(_MMAP_MAX, 0))


def keep_kernels(count: int = 4096) -> None:
    """Ask oneDNN to keep more of the kernels that it makes for convolutions on the CPU, one for each size of a batch.

    It keeps 1024. The views of a purification come in many sizes: in 20 steps of ``"paper"`` on one image of 240x176 a
    dilated ResNet of 18 convolutions asks for 1697 kernels, and where fewer are kept every call makes most of them
    anew. A kernel takes 20 kB and more. It holds for the whole process and those that it starts, where the environment
    says nothing else (``ONEDNN_PRIMITIVE_CACHE_CAPACITY``), and only before the first convolution, when oneDNN looks.
    Nothing that equifast does at import or in a call asks for it; its command line does.

    Args:
        count: how many, 1 or more.

    Raises:
        TypeError: if ``count`` is no integer.
        ValueError: if it is below 1, or 2^31 or more.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(_checks.integer("count", count, 1, 2**31 - 1)))
