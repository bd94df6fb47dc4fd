"""The experiment trackers: TensorBoard, Weights & Biases, MLflow. Each is an extra, imported when asked for.

All values are drawn over the position, the run's only clock, so runs with different batches lie on one axis.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from elastic_batch.errors import InvalidSetting

_NOT_VALUES = {"kind", "time", "update", "position", "generation"}


class TensorBoardLogger:
    """Event files in `tensorboard/` of the run directory; a resumed run replaces what lies beyond its position.

    Args:
        run_dir: The run directory.
        name: Not used: TensorBoard calls a run by its directory.
        job: Shown as text.
    """

    def __init__(self, run_dir: Path, name: str, job: Mapping[str, Any]) -> None:
        _require("tensorboard", "tensorboard")
        self._directory, self._job = run_dir / "tensorboard", job
        self._writer: Any = None

    def log(self, record: Mapping[str, Any]) -> None:
        """Add the record's values at its position."""
        if self._writer is None:
            self._writer = self._open(record["position"])
        for name, value in scalars(record).items():
            self._writer.add_scalar(name, value, record["position"], walltime=record.get("time"))

    def close(self) -> None:
        """Write the event file's end."""
        if self._writer is not None:
            self._writer.close()

    def _open(self, position: int) -> Any:
        from torch.utils.tensorboard import SummaryWriter  # loads TensorBoard

        writer = SummaryWriter(str(self._directory), purge_step=position)
        writer.add_text(
            "job", "\n".join(f"    {name}: {value}" for name, value in flatten(self._job).items()), position
        )
        return writer


class WandbLogger:
    """A Weights & Biases run; a resumed training goes on in the same one.

    Args:
        run_dir: The run directory; its files go there.
        name: The run's name.
        job: The run's configuration.
    """

    def __init__(self, run_dir: Path, name: str, job: Mapping[str, Any]) -> None:
        wandb = _require("wandb", "wandb")
        identifier = _remembered(run_dir / "wandb-run-id", lambda: secrets.token_hex(4))
        self._run = wandb.init(name=name, id=identifier, resume="allow", dir=str(run_dir), config=dict(job))
        # Its own step may never go back, as a resumed run's position does.
        self._run.define_metric("position")
        self._run.define_metric("*", step_metric="position")

    def log(self, record: Mapping[str, Any]) -> None:
        """Add the record's values at its position; sent in the background."""
        self._run.log({"position": record["position"], **scalars(record)})

    def close(self) -> None:
        """Send the rest."""
        self._run.finish()


class MlflowLogger:
    """An MLflow run; a resumed training goes on in the same one. Values are sent in batches, at most once a second.

    Args:
        run_dir: The run directory, which keeps the MLflow run's name.
        name: The run's name.
        job: The run's parameters.
        clock: Monotonic seconds.
    """

    def __init__(
        self, run_dir: Path, name: str, job: Mapping[str, Any], clock: Callable[[], float] = time.monotonic
    ) -> None:
        mlflow = _require("mlflow", "mlflow")
        self._entities = import_module("mlflow.entities")
        self._client, self._clock = mlflow.MlflowClient(), clock
        self._identifier = _remembered(run_dir / "mlflow-run-id", lambda: self._create(mlflow, name, job))
        self._waiting: list[Any] = []
        self._sent_at = -math.inf

    def log(self, record: Mapping[str, Any]) -> None:
        """Add the record's values at its position."""
        stamp = int(1000 * record.get("time", time.time()))
        position = record["position"]
        self._waiting += [
            self._entities.Metric(name, value, stamp, position) for name, value in scalars(record).items()
        ]
        if self._clock() - self._sent_at >= 1:
            self._send(synchronous=False)

    def close(self) -> None:
        """Send the rest and end the run."""
        self._send(synchronous=True)
        self._client.set_terminated(self._identifier)

    def _send(self, *, synchronous: bool) -> None:
        self._sent_at = self._clock()
        # MLflow takes at most a thousand values in one call.
        for start in range(0, len(self._waiting), 1000):
            metrics = self._waiting[start : start + 1000]
            self._client.log_batch(self._identifier, metrics=metrics, synchronous=synchronous)
        self._waiting = []

    def _create(self, mlflow: Any, name: str, job: Mapping[str, Any]) -> str:
        experiment = self._client.get_experiment_by_name("elastic-batch")
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment("elastic-batch")
        run = self._client.create_run(experiment_id, run_name=name)
        parameters = [self._entities.Param(key, str(value)[:500]) for key, value in flatten(job).items()]
        for start in range(0, len(parameters), 100):
            self._client.log_batch(run.info.run_id, params=parameters[start : start + 100])
        return str(run.info.run_id)


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The values of a record that can be drawn, by the names they have in a tracker.

    >>> scalars({"kind": "update", "update": 3, "position": 96, "loss": 0.5, "measured_noise_scale": None})
    {'train/loss': 0.5}
    >>> scalars({"kind": "evaluation", "update": 3, "position": 96, "metrics": {"accuracy": 0.9}})
    {'evaluation/accuracy': 0.9}
    """
    if record["kind"] == "evaluation":
        return {f"evaluation/{name}": float(value) for name, value in record["metrics"].items() if value is not None}
    values = ((name, value) for name, value in record.items() if name not in _NOT_VALUES)
    return {f"train/{name}": float(value) for name, value in values if isinstance(value, int | float)}


def flatten(value: Any, name: str = "") -> dict[str, Any]:
    """Dotted names to the values of a nested dict.

    >>> flatten({"schedule": {"factor": 5, "milestones": ["60ep"]}, "seed": 0})
    {'schedule.factor': 5, 'schedule.milestones': ['60ep'], 'seed': 0}
    """
    if not isinstance(value, Mapping):
        return {name: value}
    items: Iterable[dict[str, Any]] = (
        flatten(item, f"{name}.{key}" if name else str(key)) for key, item in value.items()
    )
    return {key: item for flat in items for key, item in flat.items()}


def _require(module: str, extra: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise InvalidSetting(
            "loggers",
            extra,
            f"needs the package {module}, which is not installed",
            f"Run: pip install 'elastic-batch[{extra}]'",
        ) from error


def _remembered(path: Path, make: Callable[[], str]) -> str:
    """The tracker's name of this run, from the run directory if it was there before."""
    if path.is_file():
        return path.read_text().strip()
    identifier = make()
    path.write_text(identifier + "\n")
    return identifier
