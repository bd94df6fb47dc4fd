"""Memory for large results on the CPU: in huge pages, where the system gives them to who asks."""

from __future__ import annotations

import ctypes
import sys

import torch
from torch import Tensor

# From this size on glibc takes a tensor's memory from the system each time and gives it back after: it is never memory
# that others go on using.
_SMALLEST_BYTES = 32 * 1024**2
_HUGE_PAGE_BYTES = 2 * 1024**2
_MADV_HUGEPAGE = 14
_LIBRARY = ctypes.CDLL(None) if sys.platform == "linux" else None


def empty_like(x: Tensor) -> Tensor:
    """As `torch.empty_like`; first writes to a large result on the CPU take a third of the time.

    A page fault for each 4 KiB takes longer than the kernels of a batch norm; with huge pages there is one in 512.
    What the system answers does not matter: where it refuses, or always gives huge pages, this changes nothing.
    """
    result = torch.empty_like(x)
    size = result.numel() * result.element_size()
    if _LIBRARY is not None and size >= _SMALLEST_BYTES and type(result) is Tensor and result.device.type == "cpu":
        address = result.data_ptr()
        start = -(-address // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES
        length = (address + size) // _HUGE_PAGE_BYTES * _HUGE_PAGE_BYTES - start
        _LIBRARY.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _MADV_HUGEPAGE)
    return result
