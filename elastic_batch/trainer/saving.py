"""The whole state of a run: collected for checkpoints, put back from them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol

from torch import nn

from elastic_batch.checkpoint import (
    Checkpoint,
    CheckpointInfo,
    CheckpointStore,
    CheckpointWriter,
    Manifest,
    WriterEvents,
    check_state,
    open_checkpoint,
)
from elastic_batch.errors import InvalidSetting

logger = logging.getLogger(__name__)

_NOISE = "noise"
"""The one part that a run may get later: it does not alter the trajectory."""
_TURN_SECONDS, _BLIND_TURN_SECONDS = 0.05, 3.0
"""Between two workers that may save the same; longer where neither sees that the other has begun."""
_OTHERS_SECONDS = 15.0
"""How long another worker's writing is waited for: whoever sent the signal will not wait for ever."""


class Stateful(Protocol):
    """Anything with a state that belongs into checkpoints."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


class SavedState:
    """The objects whose state makes up a run, by name.

    Args:
        model: The model, unwrapped.
        parts: Everything else that training itself needs: optimizer, scaler, estimator.
    """

    def __init__(self, model: nn.Module, parts: Mapping[str, Stateful]) -> None:
        self._parts: dict[str, Stateful] = {"model": model, **parts}
        self._attached: dict[str, Stateful] = {}
        self._waiting: dict[str, dict[str, Any]] = {}

    def attach(self, name: str, part: Stateful) -> None:
        """Add a user's object; if a checkpoint was loaded already, the object gets its state from it.

        Raises:
            InvalidSetting: The name is taken, or the object has no state.
            UnsavableState: The state is not one that checkpoints can hold.
        """
        if name in self._attached:
            raise InvalidSetting("attach", name, "must be a name that is not attached yet")
        if not (hasattr(part, "state_dict") and hasattr(part, "load_state_dict")):
            raise InvalidSetting(
                f"attach({name}=...)", type(part).__name__, "must have state_dict() and load_state_dict(state)"
            )
        check_state({name: part.state_dict()})
        self._attached[name] = part
        if name in self._waiting:
            part.load_state_dict(self._waiting.pop(name))

    @property
    def attached(self) -> list[Stateful]:
        return list(self._attached.values())

    def collect(self) -> dict[str, Any]:
        """Everything, nested; tensors are those that training uses."""
        return {
            **{name: part.state_dict() for name, part in self._parts.items()},
            # What an earlier script attached stays with the run, though this one has no object for it.
            "attached": {**self._waiting, **{name: part.state_dict() for name, part in self._attached.items()}},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Put a collected state back. Objects that are not attached yet get theirs when they are."""
        for name, part in self._parts.items():
            if name == _NOISE and name not in state:
                logger.info("the measured noise scale starts anew: it was not measured before")
            else:
                part.load_state_dict(state[name])
        self._waiting = dict(state["attached"])
        for name, part in self._attached.items():
            if name in self._waiting:
                part.load_state_dict(self._waiting.pop(name))


def find_checkpoint(resume: str, location: str | None) -> Checkpoint | None:
    """The checkpoint that `resume` asks for; None starts fresh.

    Args:
        resume: `never`, `auto`, or what names a checkpoint (a run directory, a directory of checkpoints, one of them).
        location: Where this run's own checkpoints lie; None: nowhere.

    Raises:
        InvalidSetting: `auto` without a place where checkpoints could be.
        CheckpointMissing: There is no checkpoint at the place, or all are damaged.
    """
    if resume == "never":
        return None
    if resume != "auto":
        return open_checkpoint(resume)
    if location is None:
        raise InvalidSetting("resume", "auto", "needs a place for checkpoints", "Give run_dir or checkpoint_location")
    return CheckpointStore(location).load_newest()


def save_unless_saved(
    store: CheckpointStore, collect: Callable[[], dict[str, Any]], info: CheckpointInfo, *, turn: int
) -> Manifest | None:
    """Save a state that several workers may be about to save at the same time, if none of the others does.

    Args:
        store: Where to, as a writer of the world in which the state was made.
        collect: Gives the state.
        info: What the manifest is to say of it.
        turn: This worker's among them, from 0.

    Returns:
        None if a checkpoint is there that is as good.

    Raises:
        ElasticBatchError: A newer world writes there now.
        OSError: The disk is full or fails.
    """
    seconds = _TURN_SECONDS if store.is_being_saved() is not None else _BLIND_TURN_SECONDS
    time.sleep(min(turn * seconds, _OTHERS_SECONDS))
    patience = time.monotonic() + _OTHERS_SECONDS
    while store.is_being_saved() and time.monotonic() < patience:
        time.sleep(_TURN_SECONDS)
    if any((each.generation, each.position) >= (store.generation, info.position) for each in store.manifests()):
        return None
    return store.save(collect(), info, clean=False)


class Saver:
    """The lead worker's checkpoints: when they are due, and their writing in the background.

    Args:
        store: Where they go.
        interval: Samples between checkpoints; None: only the last one.
        events: Who else is told what happens.

    Attributes:
        newest: The newest checkpoint that was written.
        error: Why the state that was submitted last is not saved; None: it is, or is on its way.
    """

    def __init__(self, store: CheckpointStore, interval: int | None, events: WriterEvents) -> None:
        self.newest: Manifest | None = None
        self.error: Exception | None = None
        self._interval = interval
        self._submitted: int | None = None

        def on_saved(manifest: Manifest, seconds: float) -> None:
            self.newest = manifest
            logger.info("saved checkpoint %s, %d bytes, in %.2f s", manifest.name, manifest.num_bytes, seconds)
            events.saved(manifest, seconds)

        def on_failed(error: Exception, info: CheckpointInfo) -> None:
            if info.position == self._submitted:
                self.error = error
            events.failed(error, info)

        self._writer = CheckpointWriter(store, replace(events, saved=on_saved, failed=on_failed))

    @property
    def generation(self) -> int:
        """That of the world that checkpoints belong to."""
        return self._writer.store.generation

    def enter(self, generation: int) -> None:
        """From here on, checkpoints belong to a newer world."""
        self._writer.store.generation = generation

    def is_due(self, before: int, after: int) -> bool:
        """Whether an update from position `before` to `after` crossed a multiple of the interval."""
        return self._interval is not None and after // self._interval > before // self._interval

    def save(self, collect: Callable[[], dict[str, Any]], info: CheckpointInfo) -> bool:
        """Copy the state that `collect` gives, to be written while training goes on.

        Returns:
            False, and nothing is copied, if this position was submitted already and has not failed.
        """
        if info.position == self._submitted and self.error is None:
            return False
        self.error, self._submitted = None, info.position
        self._writer.copy_and_submit(collect(), info)
        return True

    def wait(self) -> None:
        """Wait until everything that was submitted is saved, or has failed."""
        self._writer.wait()

    def close(self) -> None:
        """Finish what was submitted and end the writing thread."""
        self._writer.close()
