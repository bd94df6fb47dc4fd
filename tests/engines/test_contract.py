"""What every engine must do, run against each of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from support import engine_contract as contract
from support.worlds import Connect, WorldFailed, form_elastic, join_fixed, run_world

from elastic_batch.engines import SoloEngine

Run = Callable[..., list[Any]]


def _run_solo(work: Callable[..., Any], *args: Any) -> list[Any]:
    return [work(SoloEngine(), *args)]


def _run_gloo(size: int, connect: Connect) -> Run:
    def run(work: Callable[..., Any], *args: Any) -> list[Any]:
        return run_world(size, work, *args, timeout_seconds=30, connect=connect)

    return run


ENGINES = [
    pytest.param(_run_solo, 1, id="solo"),
    pytest.param(_run_gloo(2, join_fixed), 2, id="distributed-2"),
    pytest.param(_run_gloo(3, join_fixed), 3, id="distributed-3"),
    pytest.param(_run_gloo(2, form_elastic), 2, id="elastic-2"),
    pytest.param(_run_gloo(3, form_elastic), 3, id="elastic-3"),
]


@pytest.mark.parametrize(("run", "size"), ENGINES)
def test_ranks_are_consecutive_and_the_size_is_common(run: Run, size: int) -> None:
    assert run(contract.describe) == [(rank, size, 0) for rank in range(size)]


@pytest.mark.parametrize(("run", "size"), ENGINES)
def test_all_reduce_sums_in_place_on_every_worker(run: Run, size: int) -> None:
    expected = [size * (size + 1) / 2] * 5
    for sums in run(contract.sum_in_every_type):
        assert all(values == expected for values in sums.values())


@pytest.mark.parametrize(("run", "size"), ENGINES)
def test_broadcast_gives_everybody_the_source_s_values(run: Run, size: int) -> None:
    assert run(contract.broadcast_from_last) == [[float(size - 1)] * 3] * size


@pytest.mark.parametrize(("run", "size"), ENGINES)
def test_abort_wakes_a_pending_wait_within_a_second(run: Run, size: int) -> None:
    raised, seconds = run(contract.abort_while_waiting)[0]
    assert raised == "WorldBroken"
    assert seconds < 1


@pytest.mark.parametrize(("run", "size"), ENGINES)
def test_nothing_succeeds_after_an_abort(run: Run, size: int) -> None:
    assert run(contract.launch_after_abort) == ["WorldBroken WorldBroken"] * size


@pytest.mark.parametrize(("run", "size"), ENGINES)
def test_close_does_not_wait_for_the_others(run: Run, size: int) -> None:
    assert max(run(contract.close_alone)) < 0.5


@pytest.mark.parametrize("connect", [join_fixed, form_elastic])
@pytest.mark.parametrize("size", [2, 3])
def test_a_dead_peer_breaks_the_world_of_the_others(size: int, connect: Connect) -> None:
    # The message that run_world raises has only the dead worker in it: all others returned.
    with pytest.raises(WorldFailed, match=f"^worker {size - 1}: died without a word$"):
        run_world(size, contract.lose_a_peer, timeout_seconds=30, connect=connect)
