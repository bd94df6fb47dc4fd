"""Which workers may take part: same version, same run, same job, within the others' reach."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import Any

from elastic_batch.coordinator import events
from elastic_batch.coordinator.connections import Connection
from elastic_batch.coordinator.journal import JournalUnusable
from elastic_batch.coordinator.run import Run
from elastic_batch.errors import JobDiffers
from elastic_batch.protocol import VERSION as PROTOCOL_VERSION
from elastic_batch.protocol import Hello, Refused, is_loopback
from elastic_batch.version import VERSION

logger = logging.getLogger(__name__)

REFUSED = 4001
"""WebSocket closing code."""
MAX_WORKERS = 20_000
"""Connected at once."""
_LENGTH = ("end", "schedule.so_far")
"""The fields of a job that change with its length. Whether they agree up to a checkpoint is seen when it is read."""
_ABSENT = "(not set)"


def speaks_another_version(said: Mapping[str, Any]) -> str | None:
    """Why a `Hello`, perhaps of a version that cannot be parsed, is refused for its versions; None: it is not."""
    if said.get("kind") != "hello":
        return None
    protocol, package = said.get("version"), said.get("package")
    if protocol == PROTOCOL_VERSION and package == VERSION:
        return None
    return (
        f"the worker runs elastic-batch {package} (protocol {protocol}), the coordinator {VERSION} "
        f"(protocol {PROTOCOL_VERSION}). Install the same version on both"
    )


def admit(run: Run, hello: Hello) -> str | None:
    """Why a worker is refused; None: it is welcome. A run without a name takes the name that the worker knows."""
    if (reason := speaks_another_version(hello.model_dump(include={"kind", "version", "package"}))) is not None:
        return reason
    if hello.run_id is not None and hello.run_id != run.run_id:
        if not run.is_new:
            return (
                f"the worker belongs to run {hello.run_id}, the coordinator in {run.directory} serves run "
                f"{run.run_id}. Start the worker anew, or give it the address of its own coordinator"
            )
        run.rename(hello.run_id)
    if len(run.connections) >= MAX_WORKERS:
        return f"{MAX_WORKERS} workers are connected; no more are let in"
    return None


def same_job(run: Run, job: dict[str, Any]) -> str | None:
    """Why a worker's job is not the run's, with every difference; None: it is, or the run had none yet.

    The length may change while no worker trains: a finished job is trained further.
    """
    is_idle = run.is_out_of_reach and not any(worker.ready for worker in run.state.workers.values())
    may_differ = _LENGTH if is_idle else ()
    if differences := _differences(run, job, but=may_differ):
        return str(JobDiffers(f"the run in {run.directory}", differences))
    if run.job != job:
        run.job = job
        try:
            run.journal.keep("job", job)
        except JournalUnusable as error:
            logger.error("%s", error)
    return None


def may_be_the_same_later(run: Run, job: dict[str, Any]) -> bool:
    """Whether a job is refused for its length alone, while perhaps nobody trains: this coordinator knows that soon."""
    return not _differences(run, job, but=_LENGTH) and not any(worker.connected for worker in events.inside(run.state))


def out_of_reach(run: Run, name: str, lead: str) -> str | None:
    """Why a newcomer cannot be in a world that another worker leads; None: it can.

    A loopback address is reached on its own host only, and connects to no other.
    """
    if name in run.state.holders:
        return None
    peer, newcomer = run.member(lead), run.member(name)
    alike = is_loopback(peer.address) == is_loopback(newcomer.address)
    if alike and (peer.host == newcomer.host or not is_loopback(peer.address)):
        return None
    return (
        f"worker {peer.name} is reached at {peer.address} on {peer.host}, this one at {newcomer.address} on "
        f"{newcomer.host}. ELASTIC_BATCH_ADDRESS must not be a loopback address, unless all workers have one and are "
        "on one host; without it, it is the address from which a worker reaches the coordinator"
    )


def refuse(run: Run, connection: Connection, name: str, reason: str) -> None:
    """Tell a worker why it cannot take part; it ends."""
    logger.warning("worker %s is refused: %s", name, reason)
    connection.send(Refused(reason=reason).model_dump_json())
    connection.close(REFUSED, "refused")
    if run.connections.remove(name, connection):
        events.left(run.state, run.clock(), name)


def _differences(run: Run, job: dict[str, Any], *, but: Collection[str]) -> dict[str, tuple[Any, Any]]:
    """Field -> (the run's, the job's), where they differ."""
    if run.job is None:
        return {}
    old, new = _flat(run.job), _flat(job)
    return {
        field: (old.get(field, _ABSENT), new.get(field, _ABSENT))
        for field in old.keys() | new.keys()
        if field not in but and old.get(field, _ABSENT) != new.get(field, _ABSENT)
    }


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            found.update(_flat(item, f"{prefix}{key}."))
        else:
            found[f"{prefix}{key}"] = item
    return found
