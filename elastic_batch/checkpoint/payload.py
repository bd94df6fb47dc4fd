"""The payload: a state as `torch.save` writes it, proved readable before anything older is given up for it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import IO, Any, cast

import torch

from elastic_batch.checkpoint.manifest import Manifest
from elastic_batch.checkpoint.storage import Payload
from elastic_batch.errors import CheckpointDamaged, UnsavableState


def write_payload(state: Any, payload: Payload) -> None:
    """Write a state, wait until its bytes last, and prove that they can be read back without running code.

    Raises:
        UnsavableState: They cannot.
        OSError: The disk is full or fails.
    """
    save_to(state, payload)
    payload.sync()
    try:
        # Mapped, not read: only the structure is parsed.
        torch.load(payload.path, weights_only=True, map_location="cpu", mmap=True)
    except Exception as error:
        text = str(error)
        reason = (text.partition("WeightsUnpickler error: ")[2] or text).partition(". ")[0]
        raise UnsavableState("state", f"not readable by torch.load(weights_only=True) ({reason})") from error


def save_to(state: Any, payload: Payload) -> None:
    """Write a state by `torch.save`.

    Raises:
        OSError: The disk is full or fails.
    """
    try:
        # Of a file, torch.save asks for `write` and `flush` only.
        torch.save(state, cast(IO[bytes], payload))
    except Exception:
        # torch reports a write that failed as an error of its own; the disk's word says more.
        if payload.error is not None:
            raise payload.error from None
        raise


def check_payload(path: Path, manifest: Manifest) -> None:
    """Compare a payload with its manifest, reading it once.

    Raises:
        CheckpointDamaged: Its length or its digest differs.
    """
    num_bytes = path.stat().st_size
    if num_bytes != manifest.num_bytes:
        raise CheckpointDamaged(manifest.name, f"its payload has {num_bytes} bytes instead of {manifest.num_bytes}")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != manifest.digest:
        raise CheckpointDamaged(manifest.name, f"its payload has the digest {digest} instead of {manifest.digest}")


def read_payload(path: Path) -> Any:
    """Read a payload's state to the CPU, without running code that may be in it."""
    return torch.load(path, weights_only=True, map_location="cpu")
