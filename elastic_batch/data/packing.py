"""How batches come out of a data worker: small tensors by value, large ones in shared memory."""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import torch

_LARGEST_BY_VALUE = 256 * 1024
"""Bytes of a storage. Shared memory costs a handshake with the worker, whatever its size: a millisecond of the training
process, in which this much is copied several times."""


def pack(batches: Any) -> bytes:
    """Pickle what a worker has made. Where it has large tensors, it must be unpickled once, in another process."""
    return bytes(_Packer.dumps(batches))


class _Packer(ForkingPickler):
    """As torch's, but for small storages."""

    def reducer_override(self, value: Any) -> tuple[Callable[..., Any], tuple[Any, ...]] | Any:
        is_storage = isinstance(value, torch.UntypedStorage)
        if is_storage and value.device.type == "cpu" and value.nbytes() <= _LARGEST_BY_VALUE:
            return _storage, (torch.empty(0, dtype=torch.uint8).set_(value).numpy().tobytes(),)
        return NotImplemented


def _storage(content: bytes) -> torch.UntypedStorage:
    tensor = torch.empty(len(content), dtype=torch.uint8)
    tensor.numpy()[:] = np.frombuffer(content, np.uint8)
    return tensor.untyped_storage()
