"""What is known of the way the command was called."""

from __future__ import annotations

import pytest

from elastic_batch.cli.invocation import Invocation


@pytest.mark.parametrize(
    ("environ", "rank"),
    [({}, 0), ({"RANK": "2"}, 2), ({"SLURM_PROCID": "3"}, 3), ({"RANK": "1", "SLURM_PROCID": "3"}, 1)],
)
def test_the_rank_is_the_launchers(environ: dict[str, str], rank: int) -> None:
    assert Invocation([], environ).rank == rank


@pytest.mark.parametrize(
    ("environ", "restarted"),
    [
        ({}, False),
        ({"TORCHELASTIC_RESTART_COUNT": "0"}, False),
        ({"TORCHELASTIC_RESTART_COUNT": "1"}, True),
        ({"SLURM_RESTART_COUNT": "2"}, True),
    ],
)
def test_a_restart_by_the_launcher_is_noticed(environ: dict[str, str], restarted: bool) -> None:
    assert Invocation([], environ).was_restarted is restarted


def test_options_of_either_spelling_are_replaced() -> None:
    invocation = Invocation(["train", "a b.yaml", "--resume=never", "--seed", "3"], {})
    assert invocation.with_options(resume="auto") == "elastic-batch train 'a b.yaml' --seed 3 --resume auto"


def test_under_a_launcher_the_command_names_it() -> None:
    command = Invocation(["train", "digits"], {"WORLD_SIZE": "2"}).with_options(resume="auto")
    assert command == "torchrun ... -m elastic_batch train digits --resume auto"
