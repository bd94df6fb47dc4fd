"""The checkpoint store, in a directory and in object stores."""

from __future__ import annotations

import errno
import json
import logging
import os
import posixpath
import secrets
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from elastic_batch import durable
from elastic_batch.checkpoint import CheckpointInfo, CheckpointStore
from elastic_batch.checkpoint.storage import DirectoryStorage
from elastic_batch.durable import PendingFile
from elastic_batch.errors import (
    CheckpointDamaged,
    CheckpointMissing,
    CheckpointUnreadable,
    InvalidSetting,
    StaleGeneration,
    UnsavableState,
)

Save = tuple[dict[str, Any], CheckpointInfo]
MakeSave = Callable[[int], Save]


class Place:
    """A location of checkpoints, with the raw files in it."""

    def __init__(self, location: str) -> None:
        self.location = location
        self._files, self._root = fsspec.core.url_to_fs(location)

    def names(self) -> list[str]:
        return sorted(posixpath.basename(path) for path in self._files.ls(self._root, detail=False))

    def read(self, name: str) -> bytes:
        return bytes(self._files.cat_file(posixpath.join(self._root, name)))

    def write(self, name: str, content: bytes) -> None:
        self._files.makedirs(self._root, exist_ok=True)
        self._files.pipe_file(posixpath.join(self._root, name), content)

    def remove(self, name: str) -> None:
        self._files.rm_file(posixpath.join(self._root, name))


@pytest.fixture(params=["directory", "file://", "local://", "memory://"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    directory = f"{tmp_path}/checkpoints"
    if request.param == "directory":
        return Place(directory)
    if request.param == "memory://":
        return Place(f"memory://{secrets.token_hex(8)}/checkpoints")
    return Place(request.param + directory)


def equal(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right) and left.dtype == right.dtype
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(equal, left, right))
    return type(left) is type(right) and left == right


def test_a_saved_state_comes_back_as_it_was(place: Place, make_save: MakeSave) -> None:
    store = CheckpointStore(place.location, clock=lambda: 1.5)
    state, info = make_save(96)
    manifest = store.save(state, info)
    checkpoint = store.load(manifest.name)
    assert equal(checkpoint.state, state)
    assert checkpoint.manifest == manifest
    assert (manifest.position, manifest.update, manifest.generation, manifest.created_seconds) == (96, 3, 0, 1.5)
    assert manifest.fingerprint == {"seed": 1, "end": 5000}
    assert manifest.num_bytes == len(place.read(f"{manifest.name}.pt"))
    assert store.verify(manifest.name) == manifest


def test_a_payload_is_a_file_that_torch_loads_without_running_code(tmp_path: Path, make_save: MakeSave) -> None:
    state, info = make_save(32)
    manifest = CheckpointStore(tmp_path).save(state, info)
    assert equal(torch.load(tmp_path / f"{manifest.name}.pt", weights_only=True), state)


def test_nothing_is_there_and_nothing_is_made_before_the_first_save(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "runs" / "a")
    assert store.load_newest() is None
    assert store.manifests() == []
    assert list(tmp_path.iterdir()) == []


def test_the_newest_come_first_and_as_many_as_asked_for_stay(place: Place, make_save: MakeSave) -> None:
    store = CheckpointStore(place.location, keep=2)
    for position in (32, 64, 96, 128):
        store.save(*make_save(position))
    assert [manifest.position for manifest in store.manifests()] == [128, 96]
    assert len(place.names()) == 5  # two pairs and the fence
    newest = store.load_newest()
    assert newest is not None
    assert newest.state["position"] == 128


def test_a_name_that_is_not_there_is_missing(place: Place, make_save: MakeSave) -> None:
    store = CheckpointStore(place.location)
    store.save(*make_save(32))
    for use in (store.load, store.verify):
        with pytest.raises(CheckpointMissing, match="there is no checkpoint 000000000064-g0-0123456789ab in"):
            use("000000000064-g0-0123456789ab")


def _flip_bit(place: Place, name: str) -> None:
    content = bytearray(place.read(f"{name}.pt"))
    content[len(content) // 2] ^= 8
    place.write(f"{name}.pt", bytes(content))


def _truncate_payload(place: Place, name: str) -> None:
    place.write(f"{name}.pt", place.read(f"{name}.pt")[:-10])


def _truncate_manifest(place: Place, name: str) -> None:
    place.write(f"{name}.json", place.read(f"{name}.json")[:40])


def _empty_manifest(place: Place, name: str) -> None:
    place.write(f"{name}.json", b"")


def _garble_manifest(place: Place, name: str) -> None:
    place.write(f"{name}.json", b"\xff\x00\xfe[1, 2")


def _other_json(place: Place, name: str) -> None:
    place.write(f"{name}.json", b"[1, 2]")


def _remove_payload(place: Place, name: str) -> None:
    place.remove(f"{name}.pt")


def _newer_version(place: Place, name: str) -> None:
    fields = json.loads(place.read(f"{name}.json"))
    place.write(f"{name}.json", json.dumps(fields | {"version": 2, "shards": 4}).encode())


def _flip_bit_of_manifest(place: Place, name: str) -> None:
    content = place.read(f"{name}.json")
    place.write(f"{name}.json", content.replace(b'"position": 64', b'"position": 65'))


def _swap_manifest(place: Place, name: str) -> None:
    other = next(file for file in place.names() if file.endswith(".json") and name not in file)
    place.write(f"{name}.json", place.read(other))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_flip_bit, "its payload has the digest"),
        (_truncate_payload, r"its payload has \d+ bytes instead of \d+"),
        (_truncate_manifest, "its manifest is garbled"),
        (_empty_manifest, "its manifest is garbled"),
        (_garble_manifest, "its manifest is garbled"),
        (_other_json, "its manifest is garbled"),
        (_remove_payload, "its payload is missing"),
        (_newer_version, "its format has version 2, this release reads 1"),
        (_flip_bit_of_manifest, "its manifest was altered"),
        (_swap_manifest, r"its manifest is that of '\d+-g0-[0-9a-f]+'"),
    ],
    ids=lambda value: getattr(value, "__name__", "").strip("_"),
)
def test_each_kind_of_damage_is_named_and_the_checkpoint_before_it_is_used(
    place: Place, make_save: MakeSave, damage: Callable[[Place, str], None], reason: str
) -> None:
    store = CheckpointStore(place.location)
    store.save(*make_save(32))
    damaged = store.save(*make_save(64)).name
    damage(place, damaged)
    named: list[CheckpointDamaged] = []
    newest = store.load_newest(named.append)
    assert newest is not None
    assert newest.manifest.position == 32
    assert [error.name for error in named] == [damaged]
    with pytest.raises(CheckpointDamaged, match=reason) as refused:
        store.load(damaged)
    assert str(refused.value).startswith(f"checkpoint {damaged} is damaged: ")
    with pytest.raises(CheckpointDamaged, match=reason):
        store.verify(damaged)
    store.save(*make_save(96))
    after = store.load_newest(named.append)
    assert after is not None
    assert after.manifest.position == 96


@pytest.mark.parametrize("part", ["manifest", "payload"])
def test_what_cannot_be_read_at_the_moment_is_not_passed_over(
    part: str, tmp_path: Path, make_save: MakeSave, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    store.save(*make_save(32))
    newest = store.save(*make_save(64)).name
    method, name = {"manifest": ("read", f"{newest}.json"), "payload": ("fetch", f"{newest}.pt")}[part]
    works = getattr(DirectoryStorage, method)

    def fail(storage: DirectoryStorage, file_name: str) -> Any:
        if file_name == name:
            raise OSError(errno.EIO, "Input/output error")
        return works(storage, file_name)

    with monkeypatch.context() as patch:
        patch.setattr(DirectoryStorage, method, fail)
        with pytest.raises(CheckpointUnreadable, match=f"{newest} cannot be read: its {part}: .*Input/output error"):
            store.load_newest()
        store.save(*make_save(96))  # training goes on
    assert [manifest.position for manifest in store.manifests()][:2] == [96, 64]


def test_errors_of_a_driver_become_the_disk_s(make_save: MakeSave, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(f"memory://{secrets.token_hex(8)}")
    name = store.save(*make_save(32)).name

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no credentials")

    def use_all() -> None:
        store._storage.names()
        store._storage.read(f"{name}.json")
        store._storage.write("fence", b"1")
        with store._storage.payload(0) as payload:
            store._storage.publish(payload, "x.pt")
        with store._storage.fetch("x.pt"):
            store._storage.delete(["x.pt"])

    for method in ("ls", "cat_file", "pipe_file", "put_file", "get_file", "rm_file"):
        with monkeypatch.context() as patch:
            patch.setattr(fsspec.get_filesystem_class("memory"), method, refuse)
            with pytest.raises(OSError, match=r"memory://\w+ cannot be used: RuntimeError: no credentials"):
                use_all()


def test_damage_is_logged_where_nobody_listens(
    tmp_path: Path, make_save: MakeSave, caplog: pytest.LogCaptureFixture
) -> None:
    store = CheckpointStore(tmp_path)
    store.save(*make_save(32))
    damaged = store.save(*make_save(64)).name
    _flip_bit(Place(str(tmp_path)), damaged)
    with caplog.at_level(logging.WARNING):
        store.load_newest()
    assert f"checkpoint {damaged} is damaged" in caplog.text
    assert "passed over" in caplog.text


def test_a_run_whose_checkpoints_are_all_damaged_is_not_taken_for_a_fresh_one(
    tmp_path: Path, make_save: MakeSave
) -> None:
    store = CheckpointStore(tmp_path)
    names = [store.save(*make_save(position)).name for position in (32, 64)]
    _flip_bit(Place(str(tmp_path)), names[0])
    _truncate_manifest(Place(str(tmp_path)), names[1])
    with pytest.raises(CheckpointMissing, match=r"every checkpoint in .* is damaged") as refused:
        store.load_newest(lambda damage: None)
    assert all(name in str(refused.value) for name in names)


def test_pruning_keeps_the_one_just_saved_though_damaged_ones_are_further(tmp_path: Path, make_save: MakeSave) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    far = store.save(*make_save(1000)).name
    _flip_bit(Place(str(tmp_path)), far)
    store.save(*make_save(64))
    newest = store.load_newest(lambda damage: None)
    assert newest is not None
    assert newest.manifest.position == 64


def test_who_repeats_the_end_of_a_run_keeps_what_came_before_it(tmp_path: Path, make_save: MakeSave) -> None:
    for position in (32, 64, 96):
        CheckpointStore(tmp_path, keep=3).save(*make_save(position))
    for generation in (1, 2, 3):
        CheckpointStore(tmp_path, keep=3, generation=generation).save(*make_save(96))
    found = CheckpointStore(tmp_path).manifests()
    assert sorted((each.position, each.generation) for each in found) == [(32, 0), (64, 0), (96, 3)]


def test_an_older_generation_may_not_save_once_a_newer_one_has_raised_the_fence(
    place: Place, make_save: MakeSave
) -> None:
    old, new = CheckpointStore(place.location, generation=3), CheckpointStore(place.location, generation=4)
    old.save(*make_save(32))
    new.raise_fence()
    files = place.names()
    with pytest.raises(StaleGeneration, match="generation 3 may not write there any more") as refused:
        old.save(*make_save(64))
    assert (refused.value.generation, refused.value.newest) == (3, 4)
    assert place.names() == files
    new.save(*make_save(64))
    assert [manifest.generation for manifest in old.manifests()] == [4, 3]
    with pytest.raises(StaleGeneration):
        old.raise_fence()


def test_the_fence_is_looked_at_right_before_the_rename(
    tmp_path: Path, make_save: MakeSave, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = CheckpointStore(tmp_path, generation=0), CheckpointStore(tmp_path, generation=1)
    old.save(*make_save(32))
    sync, syncs = PendingFile.sync, 0

    def sync_while_another_takes_over(pending: PendingFile) -> None:
        nonlocal syncs
        sync(pending)
        syncs += 1
        # Of one save: the payload is first, the manifest second. The fence's own comes in between.
        if syncs == 2:
            new.raise_fence()

    monkeypatch.setattr(PendingFile, "sync", sync_while_another_takes_over)
    with pytest.raises(StaleGeneration):
        old.save(*make_save(64))
    assert [manifest.position for manifest in new.manifests()] == [32]


def test_an_older_generation_does_not_lower_the_fence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = CheckpointStore(tmp_path, generation=0), CheckpointStore(tmp_path, generation=1)
    sync = PendingFile.sync

    def sync_while_another_takes_over(pending: PendingFile) -> None:
        monkeypatch.setattr(PendingFile, "sync", sync)
        sync(pending)
        new.raise_fence()

    monkeypatch.setattr(PendingFile, "sync", sync_while_another_takes_over)
    with pytest.raises(StaleGeneration):
        old.raise_fence()
    assert new.newest_generation() == 1


def test_a_late_checkpoint_of_an_older_generation_ranks_behind_newer_ones(tmp_path: Path, make_save: MakeSave) -> None:
    CheckpointStore(tmp_path, generation=2).save(*make_save(32))
    (tmp_path / "fence").unlink()
    CheckpointStore(tmp_path, generation=1).save(*make_save(640))
    newest = CheckpointStore(tmp_path, generation=2).load_newest()
    assert newest is not None
    assert newest.manifest.position == 32


def test_a_garbled_fence_does_not_end_the_run(
    tmp_path: Path, make_save: MakeSave, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "fence").write_bytes(b"\x00x")
    CheckpointStore(tmp_path, generation=5).save(*make_save(32))
    assert (tmp_path / "fence").read_text() == "5\n"
    assert "garbled" in caplog.text


def test_leftovers_of_interrupted_writes_go_at_the_next_save_and_nothing_else_does(
    tmp_path: Path, make_save: MakeSave
) -> None:
    ours = [
        ".payload-g2-0123abcd.tmp",
        ".payload-g1-0123abcd.tmp",
        "000000000032-g2-0123456789ab.pt",
        ".000000000032-g2-0123456789ab.json.0123abcd.tmp",
        ".fence.0123abcd.tmp",
    ]
    others = [
        ".payload-g3-0123abcd.tmp",
        "000000000032-g3-0123456789ab.pt",
        ".000000000032-g3-0123456789ab.json.0123abcd.tmp",
        "weights.pt",
        "notes.txt",
    ]
    store = CheckpointStore(tmp_path, generation=2)
    store.save(*make_save(16))
    for name in ours + others:
        (tmp_path / name).write_bytes(b"half")
    store.save(*make_save(64))
    names = {path.name for path in tmp_path.iterdir()}
    assert not names & set(ours)
    assert names >= set(others)


def test_what_may_be_being_written_is_a_leftover_only_of_an_older_generation(
    tmp_path: Path, make_save: MakeSave, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path, generation=2)
    store.save(*make_save(16))
    older, ours = tmp_path / ".payload-g1-0123abcd.tmp", tmp_path / ".payload-g2-0123abcd.tmp"
    for path in (older, ours):
        path.write_bytes(b"half")
    monkeypatch.setattr(DirectoryStorage, "is_being_written", lambda *_: None)
    assert store.is_being_saved() is None
    store.save(*make_save(64))
    assert (older.exists(), ours.exists()) == (False, True)


def test_what_a_living_process_writes_is_no_leftover(tmp_path: Path, make_save: MakeSave) -> None:
    store = CheckpointStore(tmp_path)
    store.save(*make_save(16))
    with PendingFile(tmp_path / ".payload-g0-0123abcd.tmp") as being_written:
        store.save(*make_save(64))
        assert being_written.path.exists()
    assert not being_written.path.exists()


def test_an_unpublished_payload_of_this_generation_goes_from_an_object_store(make_save: MakeSave) -> None:
    place = Place(f"memory://{secrets.token_hex(8)}")
    place.write("000000000032-g0-0123456789ab.pt", b"half")
    place.write("000000000032-g1-0123456789ab.pt", b"of a newer generation")
    CheckpointStore(place.location).save(*make_save(64))
    assert "000000000032-g0-0123456789ab.pt" not in place.names()
    assert "000000000032-g1-0123456789ab.pt" in place.names()


def test_names_and_bytes_are_on_the_disk_before_the_manifest_gets_its_name(
    tmp_path: Path, make_save: MakeSave, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path)
    store.save(*make_save(32))
    trace: list[str] = []

    class Tracing:
        def __getattr__(self, name: str) -> Any:
            return _traced(name, trace)

    monkeypatch.setattr(durable, "os", Tracing())
    store.save(*make_save(64))
    # Writes in a row count once.
    steps = [step for index, step in enumerate(trace) if step != "write" or trace[index - 1] != "write"]
    assert steps == ["write", "fsync", "replace .pt", "fsync", "write", "fsync", "replace .json", "fsync"]


def _traced(name: str, trace: list[str]) -> Any:
    real = getattr(os, name)
    if name not in {"write", "fsync", "replace", "unlink"}:
        return real

    def traced(*args: Any) -> Any:
        trace.append(f"replace {Path(args[1]).suffix}" if name == "replace" else name)
        return real(*args)

    return traced


class Unknown:
    """Not a plain value."""


@pytest.mark.parametrize("keep", [0, -1])
def test_at_least_one_checkpoint_must_stay(tmp_path: Path, keep: int) -> None:
    with pytest.raises(InvalidSetting, match="must be at least 1"):
        CheckpointStore(tmp_path, keep=keep)


def test_a_negative_generation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidSetting, match="must be at least 0"):
        CheckpointStore(tmp_path, generation=-1)


def test_a_location_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InvalidSetting, match="must be a directory"):
        CheckpointStore(tmp_path / "file")


def test_a_url_of_an_unknown_kind_is_refused() -> None:
    with pytest.raises(InvalidSetting, match="cannot be opened by fsspec"):
        CheckpointStore("nosuch://bucket/run")


def test_a_url_without_fsspec_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(InvalidSetting, match=r"pip install 'elastic-batch\[store\]'"):
        CheckpointStore("s3://bucket/run")


def test_a_state_that_only_code_could_restore_is_refused_and_leaves_nothing(
    tmp_path: Path, make_save: MakeSave
) -> None:
    store = CheckpointStore(tmp_path)
    store.save(*make_save(32))
    files = sorted(tmp_path.iterdir())
    with pytest.raises(UnsavableState, match=r"state\['attached'\]\['x'\]\[1\] is of type .*Unknown"):
        store.save({"attached": {"x": [1, Unknown()]}}, make_save(64)[1])
    # A number so large that torch's restricted reader does not know its encoding.
    with pytest.raises(UnsavableState, match="not readable by torch"):
        store.save({"big": 1 << 4096}, make_save(64)[1])
    assert sorted(tmp_path.iterdir()) == files
