"""Where a process stands among those that a launcher started, and what is wrong with a launcher's variables."""

from __future__ import annotations

import pytest

from elastic_batch.errors import InvalidSetting
from elastic_batch.launchers import launched_local_rank, launched_rank, launched_size, launched_world

STEP = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "a", "SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0"}


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE = 'abc': must be a whole number. torchrun sets it"),
        ({"WORLD_SIZE": "2"}, "RANK = None: must be a whole number. torchrun sets it"),
        ({"WORLD_SIZE": "2", "RANK": "abc"}, "RANK = 'abc': must be a whole number"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK = 2: must be below WORLD_SIZE, 2"),
        ({"RANK": "1"}, "RANK = 1: must be below WORLD_SIZE, 1"),
        ({**STEP, "SLURM_PROCID": "x"}, "SLURM_PROCID = 'x': must be a whole number. srun sets it"),
    ],
)
def test_what_is_wrong_with_a_launchers_variables_is_named(environ: dict[str, str], message: str) -> None:
    with pytest.raises(InvalidSetting, match=message):
        launched_world(environ)


def test_torchruns_variables_win_over_slurms() -> None:
    environ = {"RANK": "1", "LOCAL_RANK": "0", "SLURM_PROCID": "3", "SLURM_LOCALID": "2"}
    assert (launched_rank(environ), launched_local_rank(environ), launched_size(environ)) == (1, 0, 1)
    slurm = {name: value for name, value in environ.items() if name.startswith("SLURM")}
    assert (launched_rank(slurm), launched_local_rank(slurm)) == (3, 2)
    assert launched_rank({}) == launched_local_rank({}) == 0
