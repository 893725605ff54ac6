"""What the C library does with memory that is freed."""

import ctypes
import platform

__all__ = ["keep_freed_memory"]

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt, in malloc.h
_MOST_MMAP = 32 * 2**20  # the most that glibc takes


def keep_freed_memory() -> bool:
    """Ask glibc to keep memory that tensors on the CPU give back, for those that come next.

    Otherwise every step returns its activations to the system and asks for them again, page by page, which takes about
    a tenth of a step of purification with torch 2.13; 2.15, as it comes from PyPI, keeps them by itself. It holds for
    the whole process, until it ends: what was once taken for blocks of up to 32 MiB stays with it. Nothing that
    equifast does at import or in a call asks for it; its command line does.

    Returns:
        Whether it was done; not with other C libraries.
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_TRIM_THRESHOLD, 2**31 - 1)) and bool(mallopt(_MMAP_THRESHOLD, _MOST_MMAP))
