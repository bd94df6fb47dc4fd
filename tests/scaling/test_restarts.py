"""When a worker is started again."""

from __future__ import annotations

import signal

from elastic_batch.scaling.restarts import EXIT_IMPOSSIBLE, EXIT_STOPPED, Restarts


def ends(codes: list[int], position: int = 0) -> list[float | None]:
    slot = Restarts()
    return [slot.ended(code, position, 1.0, has_trained=position > 0) for code in codes]


def test_a_killed_worker_is_replaced_at_once_and_never_given_up() -> None:
    delays = ends([-signal.SIGKILL] * 20)
    assert delays[:3] == [0.0, 0.2, 0.4]
    assert delays[-1] == 5.0


def test_a_program_that_fails_four_times_without_progress_has_failed() -> None:
    assert ends([1, 1, 1, 1])[-1] is None
    assert ends([-signal.SIGSEGV] * 4)[-1] is None


def test_progress_forgives() -> None:
    slot = Restarts()
    delays = [slot.ended(1, position, 1.0, has_trained=position > 0) for position in range(10)]
    assert None not in delays
    assert delays[-1] == 5.0, "others make progress while this slot fails at its start"


def test_a_process_that_lived_long_is_replaced_soon() -> None:
    slot = Restarts()
    lives = (1.0, 1.0, 1.0, 60.0, 1.0)
    assert [slot.ended(1, position, seconds, has_trained=True) for position, seconds in enumerate(lives)] == [
        0.1,
        0.2,
        0.4,
        0.1,
        0.2,
    ]


def test_impossible_settings_are_final_at_once_unless_they_were_possible_before() -> None:
    assert ends([EXIT_IMPOSSIBLE]) == [None]
    assert ends([EXIT_IMPOSSIBLE], position=32) == [0.1]


def test_leaving_is_no_failure_but_ending_without_training_is() -> None:
    assert set(ends([EXIT_STOPPED] * 10)) == {1.0}
    assert ends([0, 0, 0, 0]) == [1.0, 1.0, 1.0, None]
