"""Every error that the package raises on purpose: one base class, few subclasses, fields that programs can read.

A message says what was given, what is required and what to do. The command line prints it without a traceback.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class ElasticBatchError(Exception):
    """Base class of the package's errors."""


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


class UnknownName(InvalidSetting):
    """A name that is not in a catalogue; the message has the nearest known one."""

    def __init__(self, field: str, value: str, known: Iterable[str]) -> None:
        self.known = sorted(known)
        nearest = get_close_matches(value, self.known, n=1, cutoff=0.5)
        remedy = f"Did you mean {nearest[0]!r}?" if nearest else ""
        super().__init__(field, value, f"must be one of {', '.join(self.known)}", remedy)


class DataMissing(ElasticBatchError):
    """A data set was not found; the message says where it was looked for and how to get it."""


class MisusedTrainer(ElasticBatchError, RuntimeError):
    """User code did something that would break the trajectory (a direct `loss.backward()`, say)."""


class WorldBroken(ElasticBatchError):
    """A collective of this world failed or was aborted; no further one can succeed in its generation."""

    def __init__(self, reason: str, generation: int) -> None:
        self.reason, self.generation = reason, generation
        super().__init__(f"the world of generation {generation} is broken: {reason}")


class UpdateFailed(ElasticBatchError):
    """One worker failed twice at the same update; every worker stops with that worker's error."""

    def __init__(self, update: int, failures: dict[int, str]) -> None:
        self.update, self.failures = update, failures
        lines = "; ".join(f"worker {rank}: {text}" for rank, text in sorted(failures.items()))
        super().__init__(f"update {update} failed again after a repetition: {lines}")


class NonFinite(ElasticBatchError):
    """A loss or gradient was infinite or not a number."""

    def __init__(self, what: str, update: int, checkpoint: str | None) -> None:
        self.what, self.update, self.checkpoint = what, update, checkpoint
        last = f"the last good checkpoint is {checkpoint}" if checkpoint else "there is no checkpoint yet"
        super().__init__(
            f"{what} of update {update} is not finite; {last}. Nothing of this update was applied. "
            "Lower the learning rate, clip gradients, or pass on_non_finite='skip' to drop such updates"
        )


class WorkersDiverged(ElasticBatchError):
    """The workers' parameters are no longer the same."""

    def __init__(self, update: int, ranks: list[int]) -> None:
        self.update, self.ranks = update, ranks
        names = ", ".join(str(rank) for rank in ranks)
        super().__init__(
            f"after update {update} the parameters of worker {names} differ from the others'. Look for code that changes "
            "the model on some workers only, or for faulty hardware; resume from a checkpoint before this update"
        )


class CheckpointDamaged(ElasticBatchError):
    """A checkpoint cannot be used: truncated, altered, or of an unknown version."""

    def __init__(self, name: str, reason: str) -> None:
        self.name, self.reason = name, reason
        super().__init__(f"checkpoint {name} is damaged: {reason}")


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
            f"run directory {directory} already holds a run. Resume it (resume='auto', --resume auto) or name another directory"
        )
