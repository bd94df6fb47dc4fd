"""Every error that the package raises on purpose: one base class, few subclasses, fields that programs can read.

A message says what was given, what is required and what to do. The command line prints it without a traceback.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path

_NOT_USERS = (str(Path(__file__).parent) + os.sep, f"-packages{os.sep}torch{os.sep}", "<frozen ")
"""In the names of files in which nobody looks for his own mistake."""


class ElasticBatchError(Exception):
    """Base class of the package's errors."""


def in_one_line(error: BaseException) -> str:
    """Type, text, and the last line of a user's own code that an error went through: "KeyError: 'x' (losses.py:12)".

    Of the package's own errors the text alone, which says it all.
    """
    text = " ".join(str(error).split())
    if isinstance(error, ElasticBatchError):
        return text
    frames = reversed(traceback.extract_tb(error.__traceback__))
    places = (f" ({each.filename}:{each.lineno})" for each in frames if not any(w in each.filename for w in _NOT_USERS))
    return f"{type(error).__name__}: {text}{next(places, '')}"


class InvalidSetting(ElasticBatchError, ValueError):
    """A setting is wrong: a field of a job file, a flag, an argument.

    Args:
        field: The setting's name, with dots for nesting (`schedule.milestones`).
        value: What was given.
        rule: What is required, as the end of a sentence ("must be ...").
        remedy: What to do, one sentence; empty where the rule says it all.
    """

    def __init__(self, field: str, value: object, rule: str, remedy: str = "") -> None:
        self.field, self.value, self.rule, self.remedy = field, value, rule, remedy
        super().__init__(f"{field} = {value!r}: {rule}{'. ' + remedy if remedy else ''}")

    def renamed(self, field: str) -> InvalidSetting:
        """The same of a setting that goes by another name where it was given."""
        return InvalidSetting(field, self.value, self.rule, self.remedy)


class UnknownName(InvalidSetting):
    """A name that is not in a catalogue; the message has the nearest known one, or all of them."""

    def __init__(self, field: str, value: str, known: Iterable[str]) -> None:
        self.known = sorted(known)
        nearest = get_close_matches(value, self.known, n=1, cutoff=0.5)
        if nearest:
            super().__init__(field, value, "is not known", f"Did you mean {nearest[0]!r}?")
        else:
            super().__init__(field, value, f"must be one of {', '.join(self.known)}")

    def renamed(self, field: str) -> UnknownName:
        """The same of a setting that goes by another name where it was given."""
        return UnknownName(field, str(self.value), self.known)


class DataMissing(ElasticBatchError):
    """A data set was not found; the message says where it was looked for and how to get it."""


class PackageMissing(ElasticBatchError):
    """An optional package is not installed.

    Args:
        what: What it is needed for.
        package: Its name.
        extra: The extra of this package that brings it.
    """

    def __init__(self, what: str, package: str, extra: str) -> None:
        self.package, self.extra = package, extra
        super().__init__(f"{what} needs {package}, which is not installed. Run: pip install 'elastic-batch[{extra}]'")


class MisusedTrainer(ElasticBatchError, RuntimeError):
    """User code did something that would break the trajectory (a direct `loss.backward()`, say)."""


class WorldBroken(ElasticBatchError):
    """A collective of this world failed or was aborted; no further one can succeed in its generation."""

    def __init__(self, reason: str, generation: int) -> None:
        self.reason, self.generation = reason, generation
        super().__init__(f"the world of generation {generation} is broken: {reason}")


class NoNextWorld(WorldBroken):
    """A world broke, and there is nobody who could form another one."""


class NoWorkers(ElasticBatchError):
    """No world could start in the time that was given for it."""

    def __init__(self, seconds: float, found: str) -> None:
        self.seconds = seconds
        super().__init__(
            f"no world started within {seconds:g} s: {found}. Start workers with elastic-batch worker --run-dir DIR, "
            "lower --min-workers, or give more time with --start-seconds"
        )


class NoCoordinator(ElasticBatchError):
    """A worker that has no world to train in waited for a coordinator for too long."""

    def __init__(self, condition: str, seconds: float) -> None:
        self.condition, self.seconds = condition, seconds
        super().__init__(
            f"the coordinator has been {condition} for {seconds:.0f} s, and this worker has no world to train in. "
            "Start the coordinator again, then this worker"
        )


class Refusal(ElasticBatchError):
    """The coordinator does not let this worker take part."""


class LeftWorld(SystemExit):
    """This worker left the world, or was never wanted, while the job goes on or is complete elsewhere.

    Raised out of the loop over the updates; it ends the process with `code`: 0 if the job is complete, else 75.
    """

    def __init__(self, reason: str, *, job_is_complete: bool) -> None:
        self.reason = reason
        super().__init__(0 if job_is_complete else 75)


class WorkerFailed(ElasticBatchError):
    """A failure of one worker that a repetition does not mend; every worker stops with that worker's error.

    Args:
        what: What failed ("update 12", "the evaluation").
        failures: rank -> one line.
    """

    def __init__(self, what: str, failures: dict[int, str]) -> None:
        self.what, self.failures = what, failures
        lines = "; ".join(f"worker {rank}: {text}" for rank, text in sorted(failures.items()))
        super().__init__(f"{what} failed: {lines}")


class NonFinite(ElasticBatchError):
    """A loss, its weight or a gradient was infinite or not a number."""

    def __init__(self, what: str, update: int, checkpoint: str | None) -> None:
        self.what, self.update, self.checkpoint = what, update, checkpoint
        last = f"the last good checkpoint is {checkpoint}" if checkpoint else "this worker knows of no checkpoint"
        cause = "Look at what is given as weight" if what == "the weight" else "Lower the learning rate, clip gradients"
        super().__init__(
            f"{what} of update {update} is not finite; {last}. Nothing of this update was applied. "
            f"{cause}, or pass on_non_finite='skip' to drop such updates"
        )


class WorkersDiverged(ElasticBatchError):
    """The workers' parameters are no longer the same."""

    def __init__(self, update: int, ranks: list[int]) -> None:
        self.update, self.ranks = update, ranks
        names = ", ".join(str(rank) for rank in ranks)
        super().__init__(
            f"after update {update} the parameters of worker {names} differ from the others'. Look for code that "
            "changes the model on some workers only, or for faulty hardware; resume from a checkpoint before this "
            "update"
        )


class CheckpointDamaged(ElasticBatchError):
    """A checkpoint cannot be used: truncated, altered, or of an unknown version."""

    _finding = "is damaged"

    def __init__(self, name: str, reason: str) -> None:
        self.name, self.reason = name, reason
        super().__init__(f"checkpoint {name} {self._finding}: {reason}")


class CheckpointUnreadable(CheckpointDamaged):
    """A checkpoint's files are there and cannot be read: by a disk, mount or network that may only fail for now."""

    _finding = "cannot be read"


class CheckpointNotSaved(ElasticBatchError):
    """The state that training ended with is not on the disk.

    Args:
        update: How many updates it has.
        where: Where it was to be saved.
        error: What went wrong.
        checkpoint: The newest good checkpoint, if there is one.
    """

    def __init__(self, update: int, where: str, error: Exception | None, checkpoint: str | None) -> None:
        self.update, self.where, self.checkpoint = update, where, checkpoint
        last = f"the last good checkpoint is {checkpoint}" if checkpoint else "there is no checkpoint"
        super().__init__(
            f"the state after update {update} could not be saved in {where}: {error}; {last}. Mend what is wrong "
            "there, and resume: the updates since are done again"
        )


class CheckpointMissing(ElasticBatchError):
    """No usable checkpoint where one was asked for."""


class JobDiffers(ElasticBatchError):
    """A run is resumed with a job whose trajectory would differ.

    Args:
        differences: field name -> (value in the run, value given now).
    """

    def __init__(self, where: str, differences: dict[str, tuple[object, object]]) -> None:
        self.where, self.differences = where, differences
        lines = "; ".join(f"{name}: {old!r} there, {new!r} now" for name, (old, new) in sorted(differences.items()))
        super().__init__(
            f"{where} belongs to another job ({lines}). Use the same settings to resume it, or another run directory"
        )


class RunDirectoryUsed(ElasticBatchError):
    """A fresh run was asked for in a directory that holds one."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        super().__init__(
            f"run directory {directory} already holds a run. Resume it (resume='auto', --resume auto) or name another "
            "directory"
        )


class RunDirectoryBusy(ElasticBatchError):
    """Another process trains in the run directory, or coordinates those that do."""

    def __init__(self, directory: str, holder: str) -> None:
        self.directory = directory
        super().__init__(
            f"run directory {directory} is in use by {holder or 'another process'}. One process at a time writes "
            "to it: wait for that one, end it, or name another directory"
        )


class UnsavableState(ElasticBatchError, TypeError):
    """A state holds something that could not be read back without running code.

    Args:
        path: Where it is in the nested state, as in `state['optimizer']['rule']`.
        found: What is there.
    """

    def __init__(self, path: str, found: str) -> None:
        self.path, self.found = path, found
        super().__init__(
            f"{path} is {found}: a checkpoint holds tensors, numbers, strings, None, and dicts, lists, tuples and sets "
            "of these. Let the object's state_dict() return such values"
        )


class StaleGeneration(ElasticBatchError):
    """A durable effect of an older world was refused, because a newer one has taken over."""

    def __init__(self, where: str, generation: int, newest: int) -> None:
        self.where, self.generation, self.newest = where, generation, newest
        super().__init__(
            f"{where} belongs to generation {newest} now; generation {generation} may not write there any more. "
            "Join the running world, or start this run in another directory"
        )


class RunDirectoryMissing(ElasticBatchError):
    """There is no run where one was asked for."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        super().__init__(
            f"there is no run in {directory}. Name a directory that a run has written to (it holds run.json); if "
            "another worker wrote it, this worker does not see the same file system"
        )


class DataError(ElasticBatchError):
    """Samples could not be had: the data set, a function that makes batches, or a data worker failed.

    Args:
        position: First position of the micro-batch.
        sample_indices: The samples asked for; only the one that failed, where that is known.
        error: Type and text of the original error.
        traceback_text: Where it was raised, possibly in another process.
    """

    _what = "data for the micro-batch"

    def __init__(self, position: int, sample_indices: Sequence[int], error: str, traceback_text: str = "") -> None:
        self.position, self.sample_indices, self.error = position, tuple(sample_indices), error
        self.traceback_text = traceback_text
        shown = ", ".join(map(str, self.sample_indices[:8])) + (", ..." if len(self.sample_indices) > 8 else "")
        super().__init__(f"no {self._what} at position {position} (samples {shown}): {error}")

    def __reduce__(self) -> tuple[type[DataError], tuple[object, ...]]:
        return type(self), (self.position, self.sample_indices, self.error, self.traceback_text)


class CannotFuse(DataError):
    """The micro-batches of a pass cannot be one batch; the same positions in passes of one micro-batch are fine."""

    _what = "pass of several micro-batches"
