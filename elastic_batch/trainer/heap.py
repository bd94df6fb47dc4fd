"""The C library's heap, as training on the CPU needs it."""

from __future__ import annotations

import ctypes
import os
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_NEVER = -1  # as a size it is the largest
_LARGEST_MMAP_THRESHOLD = 32 * 2**20
_USERS_CHOICE = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Have glibc keep what training frees, for the whole process: the next update needs it again.

    By default the end of the heap goes back to the kernel as soon as some MB of it are free: with each backward pass,
    or never, by the chance of where a long-lived tensor lies. The next forward pass then meets a page fault for each
    4 KiB. Nothing changes where the environment already chooses, or where memory comes from another allocator.

    Returns:
        Whether glibc took it.
    """
    if sys.platform != "linux" or any(name in os.environ for name in _USERS_CHOICE):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is None:
        return False
    return bool(mallopt(_TRIM_THRESHOLD, _NEVER) and mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD))
