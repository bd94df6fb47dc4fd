"""Elastic jobs from their start to their end: workers come, go and die, and the same model comes out."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from support.elastic import Cluster, Course, train_alone, train_as_worker
from support.elastic_jobs import MICRO_BATCH
from support.reference import largest_difference
from support.witness import check_witnesses

from elastic_batch.coordinator.journal import FILE
from elastic_batch.engines import FixedWorld, SoloEngine
from elastic_batch.rundir import read_run_ledger

SHORT = Course(
    pace=0.02, options={"num_workers": 2, "checkpoint_every": "160sp"}, end=320 + 32 * 30, phases="0:16 320sp:32"
)
"""20 updates of two micro-batches, then 30 of four."""
WITHOUT_PROCESSES = {**SHORT.options, "num_workers": 0}
QUICK = (
    "--eviction-seconds",
    "1.5",
    "--beat-seconds",
    "0.2",
    "--orphan-grace-seconds",
    "1",
    "--reconnect-grace-seconds",
    "1",
)
LEFT = 75
AT_MOST_ONE = 1
"""Repeated updates after a loss: the one that a lost worker had committed and its world had not."""

Start = Callable[..., Cluster]


@cache
def _alone() -> dict[str, Any]:
    return train_alone(SHORT)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a job with so many workers, named w1, w2, ..., and waits until they train."""
    clusters: list[Cluster] = []

    def start(workers: int, course: Course = SHORT, **options: Any) -> Cluster:
        cluster = Cluster(tmp_path / "run", course, options=QUICK, **options)
        clusters.append(cluster)
        cluster.start_coordinator()
        for number in range(1, workers + 1):
            cluster.start_worker(f"w{number}")
        cluster.wait_for_update(3)
        _wait_for_world(cluster, min(workers, 2))
        return cluster

    yield start
    for cluster in clusters:
        cluster.__exit__()


def _by_rank(cluster: Cluster) -> list[str]:
    workers = (cluster.status() or {"workers": []})["workers"]
    inside = [worker for worker in workers if worker["rank"] is not None and worker["state"] != "lost"]
    return [worker["slot"] for worker in sorted(inside, key=lambda worker: worker["rank"])]


def _wait_for_world(cluster: Cluster, size: int) -> None:
    def trains() -> bool:
        status = cluster.status()
        return status is not None and status["phase"] == "running" and len(_by_rank(cluster)) == size

    cluster.wait_until(trains, 60, f"{size} workers train")
    cluster.wait_for_update(cluster.last_update() + 2)


def _finish(cluster: Cluster) -> int:
    """Let the job end, see that nothing was lost and nothing changed. Returns how many updates were repeated."""
    cluster.hurry()
    cluster.wait_until_finished()
    assert cluster.coordinator is not None
    assert cluster.coordinator.wait(40) == 0
    job = cluster.course.elastic_job
    repeated = check_witnesses(
        cluster.witnessed(), num_samples=640, seed=cluster.course.seed, end=job.end, micro_batch_size=MICRO_BATCH
    )
    assert read_run_ledger(cluster.run_dir).ranges == [(0, job.end)]
    states = cluster.end_states()
    assert states
    assert max(largest_difference(state, _alone()) for state in states) <= 1e-9
    return repeated


def _exit_code(cluster: Cluster, slot: str) -> int | None:
    cluster.workers[slot].join(20)
    return cluster.workers[slot].exitcode


def _generation(cluster: Cluster) -> int:
    return max(int(line["generation"]) for line in cluster.witnessed())


def _largest_gap(cluster: Cluster, since: float) -> float:
    """Seconds without a commit, from a moment on."""
    times = [float(line["time"]) for line in cluster.witnessed() if line["time"] > since]
    return max(after - before for before, after in zip([since, *times], times, strict=False))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_worker_is_killed_and_another_one_takes_its_place(start: Start, rank: int) -> None:
    cluster = start(2)
    cluster.kill(_by_rank(cluster)[rank])
    cluster.start_worker("w3")
    _wait_for_world(cluster, 2)
    assert _finish(cluster) <= AT_MOST_ONE


def test_two_of_three_workers_are_killed_at_once(start: Start) -> None:
    cluster = start(3)
    cluster.wait_for_update(22)
    _wait_for_world(cluster, 3)
    for slot in _by_rank(cluster)[:2]:
        cluster.kill(slot)
    assert _finish(cluster) <= AT_MOST_ONE


def test_more_workers_join_where_the_batch_grows(start: Start) -> None:
    cluster = start(4)
    assert len(_by_rank(cluster)) == 2
    _wait_for_world(cluster, 4)
    assert _finish(cluster) == 0
    together = [line for line in cluster.witnessed() if line["update"] == 49]
    assert len(together) == 4
    assert all(len(line["digests"]) == 1 for line in together)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_worker_that_is_told_to_end_leaves_between_two_updates(start: Start, rank: int) -> None:
    cluster = start(2)
    slot = _by_rank(cluster)[rank]
    cluster.kill(slot, signal.SIGTERM)
    assert _exit_code(cluster, slot) == LEFT
    assert _finish(cluster) == 0


def test_a_stopped_worker_finds_that_it_was_replaced_and_joins_anew(start: Start) -> None:
    cluster = start(2)
    stopped = _by_rank(cluster)[0]
    cluster.kill(stopped, signal.SIGSTOP)
    cluster.start_worker("w3")
    cluster.wait_for_update(cluster.last_update() + 5)
    assert stopped not in _by_rank(cluster)
    cluster.kill(stopped, signal.SIGCONT)
    _wait_for_world(cluster, 3)
    assert stopped in _by_rank(cluster)
    assert _finish(cluster) <= AT_MOST_ONE


def test_training_goes_on_while_the_coordinator_is_away(start: Start) -> None:
    cluster = start(2, replace(SHORT, pace=0.1))  # a coordinator takes seconds to start where others want the cores
    since, generation = time.monotonic(), _generation(cluster)
    cluster.kill_coordinator()
    cluster.wait_for_update(cluster.last_update() + 10)
    cluster.start_coordinator()
    _wait_for_world(cluster, 2)
    assert _generation(cluster) == generation
    assert _largest_gap(cluster, since) < 1.0
    assert _finish(cluster) == 0


def test_a_worker_cut_off_from_the_coordinator_comes_back(start: Start) -> None:
    cluster = start(2)
    slot, generation = _by_rank(cluster)[1], _generation(cluster)
    cluster.arm(slot, "compute.pass:1=partition,0.8")
    # Mostly first a world without it, then one with it: the other may be so late that it is back before.
    cluster.wait_until(lambda: _generation(cluster) > generation and slot in _by_rank(cluster), 20, "it is back")
    # Besides, it witnesses an update that it was at when the others' state came, which has that update.
    assert _finish(cluster) <= AT_MOST_ONE + 1


def test_a_worker_cut_off_for_a_moment_keeps_its_place(start: Start) -> None:
    cluster = start(2)
    slot, generation = _by_rank(cluster)[1], _generation(cluster)
    cluster.arm(slot, "compute.pass:1=partition,0.1")
    cluster.wait_until(lambda: len(cluster.happened()) == 1, 20, "it is cut off")
    assert _finish(cluster) == 0
    assert _generation(cluster) == generation


def test_when_all_are_killed_the_next_worker_resumes_the_newest_checkpoint(start: Start) -> None:
    cluster = start(2)
    cluster.wait_for_update(15)
    for slot in list(cluster.workers):
        cluster.kill(slot)
    reached = cluster.last_update()
    cluster.start_worker("w3")
    cluster.wait_for_update(reached + 1)
    first = min(line["update"] for line in cluster.witnessed() if line["worker"].startswith("w3"))
    assert 0 < first <= reached + 1  # somebody may have died before it could witness its last commit
    assert _finish(cluster) >= reached + 1 - first


def test_when_all_are_told_to_end_nothing_is_repeated(start: Start) -> None:
    cluster = start(2)
    for slot in list(cluster.workers):
        cluster.kill(slot, signal.SIGTERM)
    assert {_exit_code(cluster, slot) for slot in list(cluster.workers)} == {LEFT}
    reached = cluster.last_update()
    cluster.start_worker("w3")
    cluster.wait_for_update(reached + 1)
    assert _finish(cluster) == 0


def test_a_worker_is_killed_while_all_evaluate(start: Start) -> None:
    cluster = start(2, Course(**{**vars(SHORT), "evaluates_every": 1}))
    cluster.kill(_by_rank(cluster)[1])
    cluster.start_worker("w3")
    _wait_for_world(cluster, 2)
    assert _finish(cluster) <= AT_MOST_ONE
    records = (cluster.run_dir / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in records if '"evaluation"' in line]
    assert len(found) >= 30
    assert {line["metrics"]["count"] for line in found} == {319.5}


def test_a_worker_with_another_job_is_refused_and_told_what_differs(start: Start) -> None:
    cluster = start(1, Course(**{**vars(SHORT), "options": WITHOUT_PROCESSES}))
    cluster.course = Course(**{**vars(cluster.course), "seed": 18})
    cluster.start_worker("other")
    assert _exit_code(cluster, "other") == 1
    log = (cluster.run_dir / "logs" / "other.log").read_text()
    assert "seed" in log
    assert "17" in log
    assert "18" in log
    cluster.course = Course(**{**vars(cluster.course), "seed": 17})
    assert _finish(cluster) == 0


def test_a_worker_that_nobody_needed_ends_with_the_job(start: Start) -> None:
    cluster = start(3, max_workers=2)
    [standby] = set(cluster.workers).difference(_by_rank(cluster))
    assert _finish(cluster) == 0
    assert _exit_code(cluster, standby) == 0
    assert not list((cluster.run_dir / "ends").glob(f"{standby}-*"))


def test_a_worker_that_waits_for_its_turn_leaves_when_told_to_end(start: Start) -> None:
    cluster = start(3, max_workers=2)
    [standby] = set(cluster.workers).difference(_by_rank(cluster))
    cluster.wait_until(lambda: len((cluster.status() or {"workers": []})["workers"]) == 3, 20, "it waits")
    cluster.kill(standby, signal.SIGTERM)
    assert _exit_code(cluster, standby) == LEFT
    assert _finish(cluster) == 0


def test_a_worker_that_must_go_while_it_waits_for_a_world_leaves_its_state(start: Start) -> None:
    cluster = start(2, Course(**{**vars(SHORT), "options": {**SHORT.options, "checkpoint_every": None}}))
    cluster.wait_for_update(15)
    lead, other = _by_rank(cluster)
    cluster.kill_coordinator()
    cluster.kill(lead)
    log = cluster.run_dir / "logs" / f"{other}.log"
    cluster.wait_until(lambda: "still waiting for a world" in log.read_text(), 20, "it waits")
    cluster.kill(other, signal.SIGTERM)
    assert _exit_code(cluster, other) == LEFT
    cluster.start_coordinator()
    cluster.start_worker("w3")
    assert _finish(cluster) <= AT_MOST_ONE


def test_a_run_may_go_on_without_a_coordinator_and_with_one_again(start: Start) -> None:
    cluster = start(2)
    cluster.wait_for_update(5)
    for slot in list(cluster.workers):
        cluster.kill(slot, signal.SIGTERM)
    assert {_exit_code(cluster, slot) for slot in list(cluster.workers)} == {LEFT}
    cluster.kill_coordinator()
    half = 320 + 32 * 15
    alone = Course(**{**vars(SHORT), "end": half, "pace": 0.0, "options": WITHOUT_PROCESSES})
    train_as_worker(alone, str(cluster.run_dir), "fixed", FixedWorld(SoloEngine()))
    for end in (cluster.run_dir / "ends").iterdir():
        end.unlink()
    cluster.start_coordinator()
    cluster.start_worker("w3")
    assert _finish(cluster) == 0


def test_checkpoints_are_written_on_when_the_journal_was_moved_away(start: Start) -> None:
    cluster = start(2)
    cluster.kill(_by_rank(cluster)[1])
    _wait_for_world(cluster, 1)  # of a generation that the next coordinator would give to a world once more
    cluster.kill(lead := _by_rank(cluster)[0], signal.SIGTERM)
    assert _exit_code(cluster, lead) == LEFT
    cluster.kill_coordinator()
    for file in cluster.run_dir.glob(f"{FILE}*"):
        file.unlink()
    cluster.start_coordinator()
    cluster.start_worker("w3")
    cluster.wait_for_update(cluster.last_update() + 4)
    cluster.kill("w3", signal.SIGTERM)
    assert _exit_code(cluster, "w3") == LEFT
    cluster.start_worker("w4")
    assert _finish(cluster) <= AT_MOST_ONE
