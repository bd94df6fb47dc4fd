"""What `/status` tells of a run."""

from __future__ import annotations

from typing import Any

from elastic_batch.coordinator.decide import desired_workers, worker_state
from elastic_batch.coordinator.events import inside
from elastic_batch.coordinator.run import Run
from elastic_batch.coordinator.state import Worker

_OF_THE_RECORD = ("position", "epoch", "update", "global_batch_size", "num_micro_batches")


def status(run: Run) -> dict[str, Any]:
    """The run as plain values."""
    now, state = run.clock(), run.state
    members = state.world.members if state.world is not None else ()
    present = {worker.name for worker in inside(state)}
    ranks = {name: rank for rank, name in enumerate(members) if name in present}
    return {
        "run_id": run.run_id,
        "phase": _phase(run),
        "generation": state.generation,
        "reason": run.reason,
        "desired_workers": desired_workers(state, run.membership),
        **{name: run.record.get(name) for name in _OF_THE_RECORD},
        "workers": [_worker(run, now, worker, ranks.get(worker.name)) for worker in state.workers.values()],
        "ended": state.ended,
        "uptime_seconds": now - run.started_at,
    }


def _phase(run: Run) -> str:
    state = run.state
    if state.ended is not None:
        return "ended"
    return "waiting" if state.world is None or not inside(state) else state.world.phase.value


def _worker(run: Run, now: float, worker: Worker, rank: int | None) -> dict[str, Any]:
    member, connection = run.member(worker.name), run.connections.get(worker.name)
    return {
        "name": worker.name,
        "slot": worker.slot,
        "rank": rank,
        "host": member.host,
        "pid": member.pid,
        "state": worker_state(now, run.state, worker),
        "update": worker.update,
        "position": connection.position if connection is not None else None,
        "stage": worker.stage,
        "heard_seconds_ago": round(now - worker.heard_at, 3) if worker.connected else None,
    }
