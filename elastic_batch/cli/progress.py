"""How training shows itself: a bar in a terminal, one line a minute elsewhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol, Self

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 60.0


class Display(Protocol):
    """Shows a run while it trains; a context manager that is entered before the first update."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    def update(self, position: int, record: Mapping[str, Any]) -> None:
        """Show the newest update.

        Args:
            position: Samples committed.
            record: Its line of the metrics log.
        """

    def evaluation(self, metrics: Mapping[str, float]) -> None:
        """Show the newest evaluation."""


def open_display(rank: int, total: int, num_samples: int, console: Console | None = None) -> Display:
    """Choose how to show a run; the package's log goes the same way while the display is open.

    Args:
        rank: Only worker 0 shows anything; others print warnings.
        total: Length of the job in samples.
        num_samples: N, to tell epochs.
        console: Where to; None: standard error.
    """
    if rank != 0:
        return Silence(_plain_handler(f"worker {rank}: %(message)s"), logging.WARNING)
    console = console or Console(stderr=True)
    if console.is_terminal:
        return Bar(console, total, num_samples)
    return Lines(total, num_samples, write=lambda line: console.print(line, soft_wrap=True, highlight=False))


def _plain_handler(form: str = "%(message)s") -> logging.Handler:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(form))
    return handler


class Silence:
    """Shows nothing but the package's log.

    Args:
        handler: What takes the log while this is open.
        level: From which level on.
    """

    def __init__(self, handler: logging.Handler, level: int) -> None:
        self._handler = handler
        self._level = level
        self._logger = logging.getLogger("elastic_batch")

    def __enter__(self) -> Self:
        self._logger.addHandler(self._handler)
        self._logger.setLevel(self._level)
        return self

    def __exit__(self, *_: object) -> None:
        self._logger.removeHandler(self._handler)
        self._logger.setLevel(logging.NOTSET)

    def update(self, position: int, record: Mapping[str, Any]) -> None:
        pass

    def evaluation(self, metrics: Mapping[str, float]) -> None:
        pass


class Bar(Silence):
    """A progress bar; its length is the job's in samples."""

    def __init__(self, console: Console, total: int, num_samples: int) -> None:
        handler = RichHandler(console=console, show_path=False, show_level=False, markup=False)
        super().__init__(handler, logging.INFO)
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), TimeRemainingColumn(compact=True))
        self._progress = Progress(*columns, console=console)
        self._task: TaskID | None = None
        self._total = total
        self._words = Words(total, num_samples)

    def __enter__(self) -> Self:
        self._progress.start()
        return super().__enter__()

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self._progress.stop()

    def update(self, position: int, record: Mapping[str, Any]) -> None:
        words = self._words.of(position, record)
        if self._task is None:  # only now is it known where a resumed run begins
            self._task = self._progress.add_task(words, total=self._total, completed=position)
        self._progress.update(self._task, completed=position, description=words)

    def evaluation(self, metrics: Mapping[str, float]) -> None:
        self._words.metrics = metrics


class Lines(Silence):
    """One line a minute.

    Args:
        total: Length of the job in samples.
        num_samples: N.
        write: Takes a line.
        clock: Seconds, never going back.
    """

    def __init__(
        self,
        total: int,
        num_samples: int,
        *,
        write: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(_plain_handler(), logging.INFO)
        self._total = total
        self._start: int | None = None
        self._write, self._clock = write, clock
        self._words = Words(total, num_samples)
        self._began = self._last_line = clock()

    def update(self, position: int, record: Mapping[str, Any]) -> None:
        now = self._clock()
        if self._start is None:  # only now is it known where a resumed run begins
            self._start, self._began = position, now
        if now - self._last_line < _SECONDS_BETWEEN_LINES:
            return
        self._last_line = now
        seconds_per_sample = (now - self._began) / max(1, position - self._start)
        left = (self._total - position) * seconds_per_sample
        self._write(f"{self._words.of(position, record)}, {left / 60:.0f} min left")

    def evaluation(self, metrics: Mapping[str, float]) -> None:
        self._words.metrics = metrics


class Words:
    """The newest update and evaluation in words."""

    def __init__(self, total: int, num_samples: int) -> None:
        self._epochs = total / num_samples
        self._num_samples = num_samples
        self.metrics: Mapping[str, float] = {}

    def of(self, position: int, record: Mapping[str, Any]) -> str:
        """Describe an update.

        Args:
            position: Samples committed.
            record: Its line of the metrics log.
        """
        measured = record.get("measured_noise_scale")
        parts = [
            f"epoch {position / self._num_samples:.2f}/{self._epochs:.4g}",
            f"phase {record['phase']}",
            f"batch {record['global_batch_size']}",
            f"lr {record['learning_rate']:.4g}",
            f"loss {record['loss']:.4f}",
            f"g {record['noise_scale']:.4g}",
            f"measured {measured:.4g}" if measured is not None else "",
            f"{record['samples_per_second']:.0f} samples/s",
            *(f"test {name} {value:.4f}" for name, value in self.metrics.items()),
        ]
        return ", ".join(part for part in parts if part)
