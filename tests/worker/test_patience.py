"""What workers put up with: an interpreter that is held, a coordinator that is away."""

from __future__ import annotations

import json
import re
import statistics
import time
import urllib.request
from itertools import pairwise
from pathlib import Path

import pytest
from support.blocking import SECONDS, SIGNAL, block_on_signal
from support.elastic import Cluster, Course
from support.impatience import grow_impatient

COURSE = Course("endless", 0.02, {"num_workers": 0, "checkpoint_every": None})
SLACK = 3
"""How much longer than promised anything may take: others use this machine too."""
_CHECKPOINTS = re.compile(r'^elastic_batch_checkpoints_total\{result="saved".*\} (\S+)$', re.MULTILINE)
_UPDATES = re.compile(r"^elastic_batch_updates_total\{.*\} (\S+)$", re.MULTILINE)


def _start_two(cluster: Cluster) -> None:
    cluster.start_coordinator()
    for slot in ("w0", "w1"):
        cluster.start_worker(slot, prepare=block_on_signal)
    cluster.wait_until(lambda: _active(cluster) == {"w0", "w1"}, 60, "both train")
    cluster.wait_for_update(cluster.last_update() + 10)


def _active(cluster: Cluster) -> set[str]:
    status = cluster.status()
    if status is None or status["phase"] != "running":
        return set()
    return {worker["slot"] for worker in status["workers"] if worker["state"] == "active"}


def _generation(cluster: Cluster) -> int:
    return max(int(line["generation"]) for line in cluster.witnessed())


def _commits(cluster: Cluster, since: float) -> list[float]:
    """When each update was first committed, from a moment on."""
    first: dict[int, float] = {}
    for line in cluster.witnessed():
        first.setdefault(line["update"], line["time"])
    return sorted(moment for moment in first.values() if moment >= since)


def _num_updates(cluster: Cluster) -> float:
    """What the coordinator's counter says."""
    return _count(cluster, _UPDATES)


def _count(cluster: Cluster, pattern: re.Pattern[str]) -> float:
    """What one of the coordinator's metrics says."""
    door = json.loads((cluster.run_dir / "coordinator.json").read_bytes())
    request = urllib.request.Request(f"{door['url']}/metrics", headers={"Authorization": f"Bearer {door['token']}"})
    with urllib.request.urlopen(request, timeout=5) as reply:
        found = pattern.search(reply.read().decode())
    assert found is not None
    return float(found[1])


def test_a_worker_whose_interpreter_is_held_for_two_seconds_is_not_given_up(tmp_path: Path) -> None:
    with Cluster(tmp_path / "run", COURSE) as cluster:
        _start_two(cluster)
        generation, since = _generation(cluster), time.monotonic()
        cluster.kill("w1", SIGNAL)
        cluster.wait_for_update(cluster.last_update() + 10)
        longest = max(after - before for before, after in pairwise(_commits(cluster, since - 1)))
        assert longest > 0.9 * SECONDS, "its interpreter was not held"
        assert _generation(cluster) == generation


def _away(tmp_path: Path, seconds: float) -> None:
    with Cluster(tmp_path / "run", COURSE) as cluster:
        _start_two(cluster)
        generation, counted, since = _generation(cluster), _num_updates(cluster), time.monotonic()
        cluster.kill_coordinator()
        time.sleep(seconds)
        cluster.start_coordinator()
        cluster.wait_until(lambda: _active(cluster) == {"w0", "w1"}, 10, "both are back")
        cluster.wait_for_update(cluster.last_update() + 10)
        cluster.wait_until(lambda: _num_updates(cluster) > counted + seconds / 0.2, 5, "the counter goes on")
        assert _generation(cluster) == generation
        gaps = [after - before for before, after in pairwise(_commits(cluster, since))]
        assert max(gaps) <= SLACK * (3 * statistics.median(gaps) + 0.05)
        last = cluster.last_update()
        cluster.wait_until(lambda: _num_updates(cluster) >= last, 5, "the counter has all updates")
        assert _num_updates(cluster) <= cluster.last_update() + 1, "updates were counted twice"


def test_a_coordinator_away_for_six_seconds_is_not_missed(tmp_path: Path) -> None:
    _away(tmp_path, 6)


@pytest.mark.soak
def test_a_coordinator_away_for_half_a_minute_is_not_missed(tmp_path: Path) -> None:
    _away(tmp_path, 30)


def test_a_loss_while_the_coordinator_is_away_is_waited_out_and_made_good_on_its_return(tmp_path: Path) -> None:
    with Cluster(tmp_path / "run", COURSE) as cluster:
        _start_two(cluster)
        generation = _generation(cluster)
        cluster.kill_coordinator()
        cluster.kill("w1")
        time.sleep(6)
        last = cluster.last_update()
        log = (cluster.run_dir / "logs" / "w0.log").read_text()
        assert "still waiting for a world; the coordinator is out of reach" in log
        since = time.monotonic()
        cluster.start_coordinator()
        returned = time.monotonic()
        cluster.wait_for_update(last + 1, 30)
        committed = _commits(cluster, since)[0]
        assert committed - returned <= SLACK * 2
        assert _generation(cluster) > generation


def _start_impatient(cluster: Cluster, slot: str) -> int:
    """Returns its exit code."""
    process = cluster.start_worker(slot, prepare=grow_impatient)
    process.join(30)
    assert process.exitcode is not None
    return process.exitcode


def test_a_worker_that_comes_after_the_end_of_the_run_ends_too(tmp_path: Path) -> None:
    with Cluster(tmp_path / "run", Course(options={"num_workers": 0})) as cluster:
        cluster.start_coordinator()
        cluster.start_worker("w0")
        cluster.wait_until_finished()
        assert cluster.coordinator is not None
        assert cluster.coordinator.wait(30) == 0
        assert _start_impatient(cluster, "late") == 0


def test_a_worker_without_a_world_does_not_wait_for_a_coordinator_for_ever(tmp_path: Path) -> None:
    with Cluster(tmp_path / "run", COURSE) as cluster:
        cluster.start_coordinator()
        cluster.kill_coordinator()
        assert _start_impatient(cluster, "alone") not in (0, 75)
        log = (cluster.run_dir / "logs" / "alone.log").read_text()
        assert re.search(r"NoCoordinator: the coordinator has been out of reach \(.*\) for \d s", log)


def test_the_coordinator_hears_of_the_lead_workers_checkpoints(tmp_path: Path) -> None:
    with Cluster(tmp_path / "run", Course("endless", 0.02, {"num_workers": 0, "checkpoint_every": "160sp"})) as cluster:
        _start_two(cluster)
        cluster.wait_until(lambda: _count(cluster, _CHECKPOINTS) >= 2, 30, "two checkpoints are counted")
        time.sleep(2)  # once a second they are written to the journal
        cluster.kill_coordinator()
        cluster.start_coordinator()
        assert _count(cluster, _CHECKPOINTS) >= 2
