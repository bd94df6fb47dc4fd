"""A disk that is full: named, survived, and used again when there is room."""

from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from elastic_batch.checkpoint import CheckpointInfo, CheckpointStore, CheckpointWriter, WriterEvents, export

Save = tuple[dict[str, Any], CheckpointInfo]
LIMIT_BYTES = 1 << 20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A directory that takes about a mebibyte in one file: a small file system where this user may make one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={LIMIT_BYTES}", "elastic-batch-test", str(disk)]
    if os.geteuid() == 0 and subprocess.run(mount, capture_output=True, timeout=10, check=False).returncode == 0:
        yield disk
        subprocess.run(["umount", "--lazy", str(disk)], timeout=10, check=True)
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT_BYTES, hard))
    yield disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_named_and_older_checkpoints_stay(small_disk: Path, make_save: Callable[[int], Save]) -> None:
    store = CheckpointStore(small_disk)
    store.save(*make_save(32))
    files = sorted(path.name for path in small_disk.iterdir())
    large = {"weight": torch.zeros(1_000_000)}
    with pytest.raises(OSError, match=r"No space left on device|File too large"):
        store.save(large, CheckpointInfo(position=64, update=2))
    assert sorted(path.name for path in small_disk.iterdir()) == files
    newest = store.load_newest()
    assert newest is not None
    assert newest.manifest.position == 32
    store.save(*make_save(96))
    assert store.manifests()[0].position == 96


def test_training_goes_on_and_the_failure_is_told_logged_and_kept(
    small_disk: Path, make_save: Callable[[int], Save], caplog: pytest.LogCaptureFixture
) -> None:
    told: list[tuple[Exception, int]] = []
    events = WriterEvents(failed=lambda error, info: told.append((error, info.position)))
    with CheckpointWriter(CheckpointStore(small_disk), events) as writer:
        failed = writer.submit({"weight": torch.zeros(1_000_000)}, CheckpointInfo(position=64, update=2))
        assert writer.wait(20)
        saved = writer.submit(*make_save(96))
        assert saved.result(20).position == 96
    assert isinstance(failed.exception(), OSError)
    assert told == [(failed.exception(), 64)]
    assert "the checkpoint of update 2 could not be written" in caplog.text


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_an_export_to_a_full_disk_names_it_and_keeps_what_was_there(
    small_disk: Path, tmp_path: Path, suffix: str, make_save: Callable[[int], Save]
) -> None:
    store = CheckpointStore(tmp_path / "checkpoints")
    store.save(*make_save(32))
    checkpoint = replace(store.load(store.manifests()[0].name), state={"model": {"weight": torch.zeros(1_000_000)}})
    output = small_disk / f"weights{suffix}"
    output.write_bytes(b"old")
    with pytest.raises(OSError, match=r"No space left on device|File too large"):
        export(checkpoint, output)
    assert [path.name for path in small_disk.iterdir()] == [output.name]
    assert output.read_bytes() == b"old"
