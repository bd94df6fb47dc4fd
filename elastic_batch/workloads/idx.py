"""Reading of IDX files, the format of MNIST and its kin, compressed by gzip or not."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from elastic_batch.errors import DataMissing

_UNSIGNED_BYTE = 0x08
_GZIP_MAGIC = b"\x1f\x8b"


def read_idx(path: Path) -> npt.NDArray[np.uint8]:
    """Read an IDX file of unsigned bytes: two zero bytes, type, number of axes, big-endian sizes, values.

    Args:
        path: The file; gzip is recognised by its content.

    Returns:
        An array with the sizes that the header gives.

    Raises:
        DataMissing: The file is not such a file, or holds less or more than its header says.
    """
    content = path.read_bytes()
    if content.startswith(_GZIP_MAGIC):
        try:
            content = gzip.decompress(content)
        except (EOFError, OSError, zlib.error) as error:
            raise DataMissing(f"{path} cannot be unpacked ({error}); fetch it again") from error
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] != _UNSIGNED_BYTE:
        raise DataMissing(f"{path} is not an IDX file of unsigned bytes; fetch it again")
    header = 4 + 4 * content[3]
    if len(content) < header:
        raise DataMissing(f"{path} ends within its header; fetch it again")
    sizes = np.frombuffer(content[4:header], dtype=">u4").astype(np.int64)
    values = np.frombuffer(content[header:], dtype=np.uint8)
    if len(values) != int(sizes.prod()):
        raise DataMissing(f"{path} holds {len(values)} values where its header says {sizes.tolist()}; fetch it again")
    return values.reshape(sizes)


def find_idx(stem: str, folders: Sequence[Path]) -> Path | None:
    """Find `stem` or `stem.gz` in the first of the folders that has it; None if none has."""
    for folder in folders:
        for name in (stem, f"{stem}.gz"):
            if (folder / name).is_file():
                return folder / name
    return None
