"""Experiment trackers behind one small protocol, whose failures never end training."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from elastic_batch.errors import ElasticBatchError, InvalidSetting, UnknownName
from elastic_batch.telemetry.trackers import MlflowLogger, TensorBoardLogger, WandbLogger

logger = logging.getLogger(__name__)


class Logger(Protocol):
    """Takes in records as they go to metrics.jsonl: updates and evaluations."""

    def log(self, record: Mapping[str, Any]) -> None:
        """Take in one record; returns soon, whatever the network does."""

    def close(self) -> None:
        """Bring everything out and end."""


class GuardedLogger:
    """Another logger whose failures never end training: they are logged, once a minute.

    Args:
        name: What the log calls it.
        inner: The logger.
        clock: Monotonic seconds.
    """

    def __init__(self, name: str, inner: Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._name, self._inner, self._clock = name, inner, clock
        self._complained_at = -math.inf

    def log(self, record: Mapping[str, Any]) -> None:
        """Pass the record on."""
        self._guard(lambda: self._inner.log(record))

    def close(self) -> None:
        """Close the other logger."""
        self._guard(self._inner.close)

    def _guard(self, action: Callable[[], None]) -> None:
        # A tracker's client raises what it likes, its network libraries' errors included.
        try:
            action()
        except Exception:
            if self._clock() - self._complained_at >= 60:
                self._complained_at = self._clock()
                logger.exception("logging to %s failed; training goes on", self._name)


class LateLogger:
    """Loggers that are opened with the first record, for a worker that may never have one to log.

    Args:
        open_all: Opens them.
    """

    def __init__(self, open_all: Callable[[], Sequence[Logger]]) -> None:
        self._open_all = open_all
        self._opened: Sequence[Logger] | None = None

    def log(self, record: Mapping[str, Any]) -> None:
        """Pass the record on."""
        if self._opened is None:
            self._opened = ()  # not again, should it fail
            self._opened = self._open_all()
        for each in self._opened:
            each.log(record)

    def close(self) -> None:
        """Close those that were opened."""
        for each in self._opened or ():
            each.close()


LOGGERS: dict[str, Callable[[Path, str, Mapping[str, Any]], Logger]] = {
    "tensorboard": TensorBoardLogger,
    "wandb": WandbLogger,
    "mlflow": MlflowLogger,
}


def open_loggers(names: Sequence[str], run_dir: str | Path, *, name: str, job: Mapping[str, Any]) -> list[Logger]:
    """Open experiment trackers.

    Args:
        names: Which: `tensorboard`, `wandb`, `mlflow`.
        run_dir: The run directory; made if it is not there.
        name: The run's name.
        job: The job as resolved.

    Raises:
        UnknownName: One is none of these.
        InvalidSetting: Its package is not installed (the message has the command that installs it), or it did not open.
    """
    for given in names:
        if given not in LOGGERS:
            raise UnknownName("loggers", given, LOGGERS)
    if names:
        Path(run_dir).mkdir(parents=True, exist_ok=True)
    return [GuardedLogger(given, _open(given, Path(run_dir), name, job)) for given in dict.fromkeys(names)]


def _open(given: str, run_dir: Path, name: str, job: Mapping[str, Any]) -> Logger:
    try:
        return LOGGERS[given](run_dir, name, job)
    except ElasticBatchError:
        raise
    except Exception as error:
        # A tracker's client raises what it likes: no login, no server, a bad address.
        raise InvalidSetting("loggers", given, f"must be reachable and set up, but did not open: {error}") from error
