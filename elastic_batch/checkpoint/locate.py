"""From what a user names — a run directory, a directory of checkpoints, one checkpoint, a URL — to the checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from elastic_batch.checkpoint.manifest import generation_of
from elastic_batch.checkpoint.store import Checkpoint, CheckpointStore
from elastic_batch.errors import CheckpointDamaged, CheckpointMissing

CHECKPOINTS = "checkpoints"


def locate(place: str) -> tuple[CheckpointStore, str | None]:
    """The store that `place` means, and the checkpoint in it if `place` names one.

    Args:
        place: A run directory, its `checkpoints`, a URL, or one of these with a checkpoint's name, bare or with suffix.

    Raises:
        CheckpointMissing: There is nothing of that name.
    """
    head, _, tail = place.rstrip("/").rpartition("/")
    name = tail.removesuffix(".pt").removesuffix(".json")
    if generation_of(name) is not None:
        return CheckpointStore(head or "."), name
    if "://" in place:
        return CheckpointStore(place), None
    path = Path(place)
    if not path.is_dir():
        raise CheckpointMissing(
            f"there is no run or checkpoint at {place}. Name a run directory, a directory of checkpoints, one of them, "
            "or a URL"
        )
    return CheckpointStore(path / CHECKPOINTS if (path / CHECKPOINTS).is_dir() else path), None


def open_checkpoint(place: str, on_damaged: Callable[[CheckpointDamaged], None] | None = None) -> Checkpoint:
    """Read the checkpoint that `place` names, or the newest good one there.

    Args:
        place: See `locate`.
        on_damaged: Is told of each damaged one that is passed over; by default it is logged.

    Raises:
        CheckpointMissing: There is none, or all are damaged.
        CheckpointDamaged: The one that was named is.
    """
    store, name = locate(place)
    if name is not None:
        return store.load(name)
    newest = store.load_newest(on_damaged)
    if newest is None:
        raise CheckpointMissing(f"there is no checkpoint in {store.location}")
    return newest
