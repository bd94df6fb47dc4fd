"""Reading of IDX files, whole and damaged."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from elastic_batch.errors import DataMissing
from elastic_batch.workloads.idx import find_idx, read_idx

VALUES = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
CONTENT = b"\0\0\x08\x03" + struct.pack(">3I", 2, 3, 4) + VALUES.tobytes()
COMPRESSED = gzip.compress(CONTENT, mtime=0)  # without the time: processes that share the tests collect the same


@pytest.mark.parametrize("content", [CONTENT, COMPRESSED], ids=["plain", "compressed"])
def test_a_file_reads_the_same_compressed_or_not(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    assert np.array_equal(read_idx(tmp_path / "file"), VALUES)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (CONTENT[:-1], "23 values"),
        (CONTENT + b"\0", "25 values"),
        (CONTENT[:6], "ends within its header"),
        (b"", "not an IDX file"),
        (b"\0\0\x0d\x01" + CONTENT[4:], "not an IDX file of unsigned bytes"),
        (COMPRESSED[:-9], "cannot be unpacked"),
        (b"\x1f\x8bnonsense", "cannot be unpacked"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "broken").write_bytes(content)
    with pytest.raises(DataMissing, match=f"broken.*{words}"):
        read_idx(tmp_path / "broken")


def test_the_first_folder_that_has_a_file_wins(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b", tmp_path / "c"]
    for folder in folders[1:]:
        folder.mkdir()
        (folder / "labels.gz").touch()
    assert find_idx("labels", folders) == tmp_path / "b" / "labels.gz"
    assert find_idx("images", folders) is None
