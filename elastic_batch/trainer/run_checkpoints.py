"""A run's own checkpoints: where they lie, who wrote there, and what each says of the run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from elastic_batch.checkpoint import CheckpointInfo, CheckpointStore, Manifest, check_fingerprint
from elastic_batch.errors import RunDirectoryUsed
from elastic_batch.schedule import Duration, Schedule
from elastic_batch.trainer.options import TrainerOptions


class RunCheckpoints:
    """The place of a run's checkpoints.

    Args:
        options: Where, how often.
        schedule: The run's.
        fingerprint: What alters the trajectory.

    Attributes:
        location: The directory or address; None: there is none.
        fingerprint: What alters the trajectory.
    """

    def __init__(self, options: TrainerOptions, schedule: Schedule, fingerprint: Mapping[str, Any]) -> None:
        self._options = options
        self._schedule = schedule
        self.fingerprint = fingerprint
        self.location: str | None = None
        if options.checkpoint_location is not None:
            self.location = os.fspath(options.checkpoint_location)
        elif options.run_dir is not None:
            self.location = os.path.join(options.run_dir, "checkpoints")

    @property
    def interval(self) -> int | None:
        """Samples between two checkpoints; None: only the last state is saved."""
        every = self._options.checkpoint_every
        if every is None:
            return None
        return Duration.parse(every, "checkpoint_every").samples(
            num_samples=self._schedule.num_samples,
            tokens_per_sample=self._options.tokens_per_sample,
            total=self._schedule.end,
            field="checkpoint_every",
        )

    def newest_writer(self) -> int:
        """The newest generation that has written here; -1: none.

        Raises:
            OSError: It cannot be read.
        """
        return -1 if self.location is None else CheckpointStore(self.location).newest_generation()

    def require_unused(self) -> None:
        """See that a fresh run would not write over another one's checkpoints.

        Raises:
            RunDirectoryUsed: There are some.
            OSError: It cannot be read.
        """
        if self.location is None:
            return
        if self.newest_writer() >= 0 or CheckpointStore(self.location).manifests():
            raise RunDirectoryUsed(
                os.fspath(self._options.checkpoint_location or self._options.run_dir or self.location)
            )

    def require_own(self, manifest: Manifest, where: str) -> None:
        """See that a checkpoint is one of this job, and that no other job's run is in the place.

        Args:
            manifest: The checkpoint's.
            where: Its own place, for the message.

        Raises:
            JobDiffers: It is another job's; with every difference. Or that is what the place holds.
            InvalidSetting: The job now ends before the checkpoint's position.
            OSError: The place cannot be read.
        """
        self._require_same_job(manifest, where)
        present = [] if self.location is None else CheckpointStore(self.location).manifests()
        if present and manifest not in present:
            self._require_same_job(present[0], str(self.location))

    def _require_same_job(self, manifest: Manifest, where: str) -> None:
        position = manifest.position
        check_fingerprint(manifest.fingerprint, self._fingerprint_at(position), where=where, position=position)

    def open(self, generation: int) -> CheckpointStore | None:
        """The place, for a writer of a generation; None: there is none."""
        if self.location is None:
            return None
        return CheckpointStore(self.location, keep=self._options.keep, generation=generation)

    def describe(self, position: int, num_updates: int) -> CheckpointInfo:
        """What a checkpoint of the state after so many samples and updates is to say."""
        return CheckpointInfo(position=position, update=num_updates, fingerprint=self._fingerprint_at(position))

    def _fingerprint_at(self, position: int) -> dict[str, Any]:
        """What alters the trajectory before a position: a run may be prolonged, and what comes later with it."""
        position = min(position, self._schedule.end)
        schedule = {**self.fingerprint["schedule"], "so_far": self._schedule.digest(position)}
        return {**self.fingerprint, "schedule": schedule}
