"""The root of the command line: help, suggestions, exit codes, lazy imports."""

from __future__ import annotations

import subprocess
import sys

import pytest

from elastic_batch.cli import main as main_module
from elastic_batch.cli.main import COMMANDS, main
from elastic_batch.errors import (
    CheckpointMissing,
    ElasticBatchError,
    InvalidSetting,
    JobDiffers,
    LeftWorld,
    Refusal,
    RunDirectoryMissing,
    RunDirectoryUsed,
)
from elastic_batch.version import VERSION


def test_help_lists_every_command_without_importing_any(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"], {}) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in COMMANDS)


@pytest.mark.parametrize("name", ["recipes", "plan", "train", "schema"])
def test_each_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "-h"], {}) == 0
    assert "Usage: elastic-batch " + name in capsys.readouterr().out


def test_the_version_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"], {}) == 0
    assert VERSION in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["pln"], "no command 'pln'. Did you mean 'plan'?"),
        (["frobnicate"], "Known: recipes, plan, train"),
        (["plan", "digits", "--strateg", "x"], "Did you mean '--strategy'?"),
        (["plan", "digts"], "Did you mean 'digits'?"),
        (["plan", "digits", "--strategy", "decay"], "Did you mean 'decay-lr'?"),
        (["plan", "digits", "--set", "optimizer.lr=1"], "no such field in optimizer"),
        (["plan", "digits", "--set", "model.name=wrn-10"], "Did you mean 'wrn-10-1'?"),
        (["plan", "digits", "--set", "data.name=digit"], "Did you mean 'digits'?"),
        (["plan", "digits", "--max-duration", "10"], "a number with a unit"),
        (["plan", "none.yaml"], "no such file"),
        (["train", "digits", "--log", "foo"], "--log = 'foo': must be one of mlflow, tensorboard, wandb"),
        (["train", "digits", "--metrics-port", "-1"], "--metrics-port = -1: must be greater than"),
        (["train", "digits", "--resume", ""], "--resume = '': must be auto, never, or the path"),
        (["train", "digits", "--init-from", ""], "--init-from = '': must be the path of weights"),
        (["plan", "digits", "--seed", "-1"], "--seed = -1: must be greater than or equal to 0"),
        (["plan", "digits", "--set", "seed=["], "--set seed = '[': is not valid YAML"),
        (["plan", "/tmp"], "job file = '/tmp': must be a file, and this is a directory"),
    ],
)
def test_a_wrong_command_line_is_one_message_and_exit_code_2(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments, {}) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (ElasticBatchError("it broke"), 1),
        (InvalidSetting("seed", -1, "must be at least 0"), 2),
        (RunDirectoryUsed("runs/a"), 2),
        (RunDirectoryMissing("runs/a"), 2),
        (JobDiffers("runs/a", {"seed": (0, 1)}), 2),
        (CheckpointMissing("there is no checkpoint"), 2),
        (Refusal("the worker runs another version"), 2),
        (PermissionError("cannot write there"), 1),
        (KeyboardInterrupt(), 130),
        (SystemExit(0), 1),
    ],
)
def test_errors_become_a_message_and_a_code(
    raised: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr(main_module.root, "main", fail)
    assert main([], {}) == code
    words = "sys.exit(0)" if isinstance(raised, SystemExit) else str(raised) or "Interrupted"
    assert words in capsys.readouterr().err


def test_the_message_of_another_worker_than_the_first_says_whose_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "none.yaml"], {"RANK": "2"})
    assert capsys.readouterr().err.startswith("worker 2: Error: job file")


@pytest.mark.parametrize("environ", [{"RANK": "abc"}, {"SLURM_PROCID": "x"}])
def test_a_rank_that_is_none_does_not_hide_the_error(
    environ: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "none.yaml"], environ) == 2
    assert capsys.readouterr().err.startswith("Error: job file")


@pytest.mark.parametrize("arguments", [["plan", "cifar10-wrn16-4-grow-batch"], ["recipes"], ["schema"]])
def test_planning_commands_never_load_torch(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from elastic_batch.cli.main import main\n"
        f"assert main({arguments!r}, {{}}) == 0\n"
        "print('torch' in sys.modules, 'matplotlib' in sys.modules, file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr.strip() == "False False"


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    command = f"{sys.executable} -m elastic_batch schema | head -n 1"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout, done.stderr, done.returncode) == ("{\n", "", 0)


def test_a_worker_that_left_ends_with_the_code_of_that() -> None:
    with pytest.MonkeyPatch.context() as patch:

        def leave(*_: object, **__: object) -> None:
            raise LeftWorld("told to", job_is_complete=False)

        patch.setattr(main_module.root, "main", leave)
        with pytest.raises(LeftWorld):
            main([], {})
