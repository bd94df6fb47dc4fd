"""A worker that lives through many changes of its world, and the coordinator, hold in the end what they held before."""

from __future__ import annotations

import time
from itertools import islice
from pathlib import Path

import pytest
from support.elastic import Cluster, Course
from support.leaks import CHANGES_OF_A_ROUND, ChangingWorld, Holdings, median

MIB = 1 << 20
RESULTS = Path(__file__).parents[2] / "docs" / "results" / "elastic-leaks.md"
HEAD = """# What 500 changes of the world leave behind

`make soak` runs `tests/worker/test_leaks.py`, which writes this page. A worker lives through 500 changes of its world:
its partner is killed, another joins, takes turns with the next one by SIGTERM and by SIGKILL. gloo, `num_workers=2`,
real processes over loopback, {seconds:.0f} s in all. Medians of five looks, each with two workers training. From 10 %
of the changes to the end, threads, descriptors and children may not grow, beyond the 6 descriptors of two batches that
data workers may hand over, and memory (resident, but for files' pages) by at most 8 MiB.

| process | changes | threads | descriptors | children | memory, MiB |
|---|---|---|---|---|---|"""
DESCRIPTORS = 6
"""What open files may differ by: large batches from data workers lie in shared memory, a file for each tensor."""
MEMORY = 8 * MIB
"""What memory may grow by: less than 17 KB for each of 500 changes; a process group and its buffers take more."""


def _run(tmp_path: Path, num_changes: int) -> dict[str, list[Holdings]]:
    """What survivor and coordinator held after each round of changes."""
    course = Course("endless", 0.01, {"num_workers": 2, "checkpoint_every": None})
    with Cluster(tmp_path / "run", course, max_workers=2) as cluster:
        cluster.start_coordinator()
        world = ChangingWorld(cluster)
        looks = [world.holdings for _ in islice(world.rounds(), num_changes // CHANGES_OF_A_ROUND)]
    return {"survivor": [survivor for survivor, _ in looks], "coordinator": [coordinator for _, coordinator in looks]}


def _assert_flat(name: str, before: Holdings, after: Holdings) -> None:
    assert after.threads <= before.threads, f"{name}: {before.threads} threads became {after.threads}"
    grown = after.descriptors - before.descriptors
    assert grown <= DESCRIPTORS, f"{name}: {before.descriptors} open files became {after.descriptors}"
    assert after.children <= before.children, f"{name}: {before.children} children became {after.children}"
    grown = after.memory - before.memory
    assert grown <= MEMORY, f"{name}: memory grew by {grown / MIB:.1f} MiB"


def test_twenty_changes_leave_nothing_behind(tmp_path: Path) -> None:
    for name, found in _run(tmp_path, 20).items():
        _assert_flat(name, median(found[:3]), median(found[-3:]))


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_five_hundred_changes_leave_nothing_behind(tmp_path: Path) -> None:
    since = time.monotonic()
    looks = _run(tmp_path, 500)
    warm_up = 500 // CHANGES_OF_A_ROUND // 10
    rows = [
        f"| {name} | {CHANGES_OF_A_ROUND * number} | {seen.threads} | {seen.descriptors} | {seen.children} "
        f"| {seen.memory / MIB:.1f} |"
        for name, found in looks.items()
        for number in range(warm_up, len(found) + 1, warm_up)
        for seen in [median(found[number - 5 : number])]
    ]
    RESULTS.write_text("\n".join([HEAD.format(seconds=time.monotonic() - since), *rows]) + "\n")
    for name, found in looks.items():
        _assert_flat(name, median(found[warm_up - 5 : warm_up]), median(found[-5:]))
