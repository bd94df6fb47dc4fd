"""The checkpoint store: saves states durably, proves them whole when read, keeps the newest few.

A checkpoint is a payload, `NAME.pt` (`torch.save`; `torch.load(weights_only=True)` reads it), and a manifest,
`NAME.json`, with the payload's digest. The manifest is written last: once it has its name, the checkpoint exists.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from elastic_batch.checkpoint.manifest import CheckpointInfo, Manifest, checkpoint_name, generation_of
from elastic_batch.checkpoint.objects import ObjectStorage
from elastic_batch.checkpoint.payload import check_payload, read_payload, write_payload
from elastic_batch.checkpoint.state import compact
from elastic_batch.checkpoint.storage import DirectoryStorage, Payload, Storage
from elastic_batch.errors import (
    CheckpointDamaged,
    CheckpointMissing,
    CheckpointUnreadable,
    InvalidSetting,
    StaleGeneration,
)
from elastic_batch.version import VERSION

logger = logging.getLogger(__name__)

FENCE = "fence"
_PAYLOAD, _MANIFEST = ".pt", ".json"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint read back: its manifest and its state, on the CPU."""

    manifest: Manifest
    state: dict[str, Any]


class CheckpointStore:
    """The checkpoints of one run, in a directory or an object store. Nothing is created before the first save.

    Any number of processes may read. In each generation one process at a time writes; a process of an older generation
    is refused from the moment a newer one has raised the fence (or saved). A process that passed the last check of the
    fence just before that can still finish; its checkpoint then ranks behind every one of the newer generation.

    Args:
        location: A directory, or a URL that fsspec understands (`s3://bucket/run`); `file://` means a directory.
        keep: How many of the newest checkpoints stay, at least 1.
        generation: The world that this process belongs to, from 0.
        clock: Seconds since 1970, for the manifests.

    Raises:
        InvalidSetting: `keep` or `generation` is out of range, or the URL cannot be used.
    """

    def __init__(
        self,
        location: str | os.PathLike[str],
        *,
        keep: int = 3,
        generation: int = 0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if keep < 1:
            raise InvalidSetting("checkpoint.keep", keep, "must be at least 1")
        if generation < 0:
            raise InvalidSetting("generation", generation, "must be at least 0")
        self.keep, self.generation = keep, generation
        self._clock = clock
        self._storage = _open_storage(os.fspath(location))

    @property
    def location(self) -> str:
        """Where the checkpoints lie."""
        return self._storage.location

    def save(self, state: dict[str, Any], info: CheckpointInfo, *, clean: bool = True) -> Manifest:
        """Write a checkpoint; when this returns it survives the end of the process and of the machine.

        Older ones are pruned, and what interrupted writes of this and older generations left is removed.

        Args:
            state: Tensors, numbers, strings, None, in dicts, lists, tuples and sets.
            info: What the manifest is to say of it.
            clean: Whether to remove leftovers; not where another process of this generation may be writing too.

        Raises:
            UnsavableState: Something in the state could not be read back without running code.
            StaleGeneration: A newer generation writes here now.
            OSError: The disk is full or fails. Older checkpoints are as they were.
        """
        plain = compact(state)
        self.raise_fence()
        if clean:
            self._remove_leftovers()
        with self._storage.payload(self.generation) as payload:
            write_payload(plain, payload)
            manifest = self._describe(payload, info)
            self._refuse_if_stale()
            self._storage.publish(payload, manifest.name + _PAYLOAD)
            self._storage.write(manifest.name + _MANIFEST, manifest.to_bytes(), before_rename=self._refuse_if_stale)
        self._prune(manifest)
        return manifest

    def manifests(self, on_damaged: Callable[[CheckpointDamaged], None] | None = None) -> list[Manifest]:
        """All committed checkpoints, the newest first. Payloads are not looked at (see `verify`).

        Args:
            on_damaged: Is told of each manifest that cannot be used; by default it is logged.
        """
        found = []
        for file_name in self._storage.names():
            name = file_name.removesuffix(_MANIFEST)
            if name == file_name or generation_of(name) is None:
                continue
            try:
                found.append(self._manifest(name))
            except CheckpointMissing:
                # Pruned by its writer since the names were listed.
                continue
            except CheckpointDamaged as damage:
                (on_damaged or _log_damage)(damage)
        return sorted(found, key=lambda manifest: manifest.order, reverse=True)

    def verify(self, name: str) -> Manifest:
        """Read a checkpoint's payload and compare its digest.

        Raises:
            CheckpointMissing: There is none of this name.
            CheckpointDamaged: It is not as it was written.
        """
        manifest = self._manifest(name)
        self._with_payload(manifest, lambda path: None)
        return manifest

    def load(self, name: str) -> Checkpoint:
        """Verify and read one checkpoint, without running code that is in it.

        Raises:
            CheckpointMissing: There is none of this name.
            CheckpointDamaged: It is not as it was written.
        """
        manifest = self._manifest(name)
        return Checkpoint(manifest, self._with_payload(manifest, read_payload))

    def load_newest(self, on_damaged: Callable[[CheckpointDamaged], None] | None = None) -> Checkpoint | None:
        """Read the newest checkpoint that is whole; None if none was ever written.

        Args:
            on_damaged: Is told of each damaged one that is passed over; by default it is logged.

        Raises:
            CheckpointMissing: There are some, and all of them are damaged.
            CheckpointUnreadable: One cannot be read that may well be whole: to go on from an older one would lose
                training for what may pass.
            OSError: The place cannot be read.
        """
        damages: list[CheckpointDamaged] = []

        def note(damage: CheckpointDamaged) -> None:
            if isinstance(damage, CheckpointUnreadable):
                raise damage
            damages.append(damage)
            (on_damaged or _log_damage)(damage)

        for manifest in self.manifests(note):
            try:
                return self.load(manifest.name)
            except CheckpointMissing:
                continue
            except CheckpointDamaged as damage:
                note(damage)
        if damages:
            raise CheckpointMissing(
                f"every checkpoint in {self.location} is damaged ({'; '.join(map(str, damages))}). Bring one back from "
                "a copy, or start afresh in another directory"
            )
        return None

    def newest_generation(self) -> int:
        """The newest generation that wrote here; -1 before the first.

        Raises:
            OSError: It cannot be read.
        """
        try:
            return int(self._storage.read(FENCE))
        except FileNotFoundError:
            return -1
        except ValueError:
            logger.warning("the fence in %s is garbled and will be written anew", self.location)
            return -1

    def is_being_saved(self) -> bool | None:
        """Whether another process writes a checkpoint here at the moment; None where that cannot be known."""
        if isinstance(self._storage, ObjectStorage):
            return None
        unfinished = [name for name in self._storage.names() if self._storage.temporary_generation(name) is not None]
        found = {self._storage.is_being_written(name) for name in unfinished}
        return True in found or (None if None in found else False)

    def raise_fence(self) -> None:
        """Tell every older generation that it may not write here any more.

        Raises:
            StaleGeneration: A newer generation has done that already.
        """
        self._refuse_if_stale()
        if self.newest_generation() < self.generation:
            # A newer generation may be doing the same at this moment: its fence must not be lowered.
            self._storage.write(FENCE, f"{self.generation}\n".encode(), before_rename=self._refuse_if_stale)

    def _refuse_if_stale(self) -> None:
        newest = self.newest_generation()
        if newest > self.generation:
            raise StaleGeneration(self.location, self.generation, newest)

    def _describe(self, payload: Payload, info: CheckpointInfo) -> Manifest:
        return Manifest(
            name=checkpoint_name(info.position, self.generation, payload.digest),
            position=info.position,
            update=info.update,
            generation=self.generation,
            digest=payload.digest,
            num_bytes=payload.num_bytes,
            created_seconds=self._clock(),
            written_by=f"elastic_batch {VERSION}, torch {torch.__version__}",
            fingerprint=info.fingerprint,
            details=info.details,
        )

    def _manifest(self, name: str) -> Manifest:
        try:
            return Manifest.from_bytes(name, self._storage.read(name + _MANIFEST))
        except FileNotFoundError:
            raise CheckpointMissing(f"there is no checkpoint {name} in {self.location}") from None
        except OSError as error:
            raise _unreadable(name, "manifest", error) from error

    def _with_payload(self, manifest: Manifest, use: Callable[[Path], Any]) -> Any:
        """What `use` makes of the payload, after its digest was compared."""
        try:
            with self._storage.fetch(manifest.name + _PAYLOAD) as path:
                check_payload(path, manifest)
                return use(path)
        except CheckpointDamaged:
            raise
        except FileNotFoundError as error:
            # Its writer may have pruned it meanwhile; then this says that it is gone.
            self._manifest(manifest.name)
            raise CheckpointDamaged(manifest.name, "its payload is missing") from error
        except OSError as error:
            raise _unreadable(manifest.name, "payload", error) from error
        # A digest that agrees leaves causes outside the file: a torch too old for it.
        except (RuntimeError, ValueError, EOFError) as error:
            raise CheckpointDamaged(manifest.name, f"its payload cannot be read: {error}") from error

    def _remove_leftovers(self) -> None:
        """Remove what interrupted writes left: unfinished payloads, and payloads that never got a manifest.

        Newer generations see to their own. Older ones may not commit any more. What a living process writes stays, and
        of this generation what one may be writing.
        """
        names = self._storage.names()
        committed = {name.removesuffix(_MANIFEST) for name in names if name.endswith(_MANIFEST)}
        leftovers = []
        for name in names:
            generation = self._storage.temporary_generation(name)
            if generation is None and name.endswith(_PAYLOAD) and name.removesuffix(_PAYLOAD) not in committed:
                generation = generation_of(name.removesuffix(_PAYLOAD))
            if generation is None or generation > self.generation:
                continue
            is_alive = self._storage.is_being_written(name)
            if is_alive is False or (is_alive is None and generation < self.generation):
                leftovers.append(name)
        if leftovers:
            logger.info("removing leftovers of interrupted writes from %s: %s", self.location, ", ".join(leftovers))
        self._try_delete(leftovers)

    def _prune(self, saved: Manifest) -> None:
        """Remove all but the newest `keep`, and never the one just saved, which alone is known to be whole.

        It takes the place of what older worlds saved at its position: who repeats the end of a run keeps the rest.
        """
        found = self.manifests(lambda damage: None)
        replaced = [old for old in found if old.position == saved.position and old.generation < saved.generation]
        kept = [each for each in found if each not in replaced]
        surplus = [old.name for old in (*replaced, *kept[self.keep :]) if old.name != saved.name]
        # Manifests first: a payload without one is a leftover, a manifest without payload would look like damage.
        self._try_delete([name + _MANIFEST for name in surplus])
        self._try_delete([name + _PAYLOAD for name in surplus])

    def _try_delete(self, names: list[str]) -> None:
        try:
            self._storage.delete(names)
        except OSError as error:
            logger.warning("cannot remove old files from %s: %s", self.location, error)


def _open_storage(location: str) -> Storage:
    parts = urlsplit(location)
    if "://" in location and parts.scheme != "file":
        return ObjectStorage(location)
    directory = Path(parts.netloc + parts.path) if "://" in location else Path(location)
    if directory.exists() and not directory.is_dir():
        raise InvalidSetting("checkpoint.location", location, "must be a directory, or a name that is still free")
    return DirectoryStorage(directory)


def _unreadable(name: str, part: str, error: OSError) -> CheckpointUnreadable:
    remedy = "Try again when its place can be read, or name another checkpoint to go on from"
    return CheckpointUnreadable(name, f"its {part}: {error}. {remedy}")


def _log_damage(damage: CheckpointDamaged) -> None:
    logger.warning("%s; it is passed over", damage)
