"""Workers on two hosts, made of network namespaces: they find each other, and outlive a cut cable."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.elastic import Course, train_alone
from support.elastic_jobs import MICRO_BATCH, SEED
from support.hosts import Host, TwoHosts, two_hosts, why_no_hosts
from support.reference import largest_difference
from support.witness import check_witnesses

EVICTION, GRACE = 1.5, 2.0


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    if (reason := why_no_hosts()) is not None:
        pytest.skip(reason)
    with two_hosts() as made:
        yield made


def _cluster(tmp_path: Path, hosts: tuple[Host, Host], pace: float = 0.02) -> TwoHosts:
    course = Course(pace=pace, options={"num_workers": 0}, end=640 * 6)
    options = ("--eviction-seconds", str(EVICTION), "--beat-seconds", "0.3", "--reconnect-grace-seconds", str(GRACE))
    return TwoHosts(tmp_path / "run", course, hosts, options)


def _active(cluster: TwoHosts) -> set[str]:
    status = cluster.status()
    if status is None or status["phase"] != "running":
        return set()
    return {worker["slot"] for worker in status["workers"] if worker["state"] == "active"}


def _start_both(cluster: TwoHosts, on: tuple[Host, Host]) -> None:
    cluster.start_coordinator()
    for number, host in enumerate(on):
        cluster.start_worker_on(host, f"w{number}")
    cluster.wait_until(lambda: _active(cluster) == {"w0", "w1"}, 60, "both train")


def _assert_sound(cluster: TwoHosts) -> None:
    """All was trained once, and the ends are those of an undisturbed run."""
    end = cluster.course.elastic_job.end
    check_witnesses(cluster.witnessed(), num_samples=640, seed=SEED, end=end, micro_batch_size=MICRO_BATCH)
    expected = train_alone(cluster.course)
    states = cluster.end_states()
    assert states
    assert max(largest_difference(expected, state) for state in states) < 1e-9


def test_workers_on_two_hosts_connect_over_the_cable_and_finish_the_job(
    tmp_path: Path, hosts: tuple[Host, Host]
) -> None:
    with _cluster(tmp_path, hosts) as cluster:
        _start_both(cluster, hosts)
        connections, service = cluster.connections(), int(cluster.url.rpartition(":")[2])
        data = {ends for ends in connections if service not in (ends[0][1], ends[1][1])}
        assert data, "the workers have no connection to each other"
        assert {address for ends in data for address, _ in ends} == {host.address for host in hosts}
        cluster.hurry()
        cluster.wait_until_finished()
        assert len(cluster.end_states()) == 2
        _assert_sound(cluster)


def test_a_loopback_address_beside_another_host_is_refused(tmp_path: Path, hosts: tuple[Host, Host]) -> None:
    with _cluster(tmp_path, hosts) as cluster:
        cluster.start_coordinator()
        cluster.start_worker_on(hosts[0], "sound")
        cluster.wait_for_update(2)
        cluster.start_worker_on(hosts[1], "loopback", "127.0.0.1")
        cluster.workers["loopback"].join(60)
        assert cluster.workers["loopback"].exitcode not in (None, 0)
        log = (cluster.run_dir / "logs" / "loopback.log").read_text()
        assert "ELASTIC_BATCH_ADDRESS" in log
        assert "must not be a loopback address" in log
        cluster.hurry()
        cluster.wait_until_finished()
        _assert_sound(cluster)


def test_a_cut_cable_costs_one_side_its_place_until_it_is_mended(tmp_path: Path, hosts: tuple[Host, Host]) -> None:
    with _cluster(tmp_path, hosts, pace=0.1) as cluster:
        _start_both(cluster, hosts)
        hosts[1].set_cable("down")
        cluster.wait_until(lambda: _active(cluster) == {"w0"}, EVICTION + 10, "the coordinator's side goes on")
        cluster.wait_for_update(cluster.last_update() + 5)
        hosts[1].set_cable("up")
        cluster.wait_until(lambda: _active(cluster) == {"w0", "w1"}, 20, "the other side is back")
        cluster.hurry()
        cluster.wait_until_finished()
        assert len(cluster.end_states()) == 2
        _assert_sound(cluster)


def test_a_world_trains_on_while_the_cable_to_the_coordinator_is_cut(tmp_path: Path, hosts: tuple[Host, Host]) -> None:
    with _cluster(tmp_path, hosts, pace=0.1) as cluster:
        _start_both(cluster, (hosts[1], hosts[1]))
        cluster.wait_for_update(cluster.last_update() + 3)
        generation = cluster.witnessed()[-1]["generation"]
        for seconds in (EVICTION + 1, EVICTION + GRACE + 2):  # they are waited for; they are given up and taken back
            hosts[0].set_cable("down")
            before = cluster.last_update()
            time.sleep(seconds)
            assert cluster.last_update() > before + 5
            hosts[0].set_cable("up")
            cluster.wait_until(lambda: _active(cluster) == {"w0", "w1"}, 20, "both are in sight")
        assert cluster.witnessed()[-1]["generation"] == generation
        cluster.hurry()
        cluster.wait_until_finished()
        _assert_sound(cluster)
