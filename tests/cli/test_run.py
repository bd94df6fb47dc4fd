"""`elastic-batch run`, `train --workers` and `worker`: whole elastic jobs on this machine, and mistakes in asking."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.supervision import is_alive

from elastic_batch.cli.main import main

TRAINING = """
import sys, time
import torch
from torch.nn import functional as F
import elastic_batch as eb

torch.set_num_threads(1)
torch.manual_seed(0)
data = torch.utils.data.TensorDataset(torch.randn(256, 8), torch.randint(0, 2, (256,)))
model = torch.nn.Linear(8, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[2, 4], gamma=0.5)
schedule = eb.from_lr_scheduler(scheduler, per="epoch", max_duration="6ep", global_batch_size=8)
trainer = eb.Trainer(
    model, optimizer, data, schedule, micro_batch_size=8, loss_fn=lambda net, b: F.cross_entropy(net(b[0]), b[1])
)
for update in trainer:
    time.sleep(0.03)
    if trainer.is_lead and (update.ends_epoch or trainer.num_updates == 5):
        print("update", trainer.num_updates, "of", *sys.argv[1:])
"""
DIGITS = [
    "digits",
    "--max-duration",
    "8ep",
    "--set",
    "schedule.milestones=[1ep, 2ep]",
    "--set",
    "evaluation.every=null",
]
PROGRAM = [sys.executable, "-m", "elastic_batch"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--workers", "4:1", "SCRIPT"], "--workers = '4:1': must be MIN:MAX"),
        (["run", "--workers", "many", "SCRIPT"], "--workers = 'many': must be MIN:MAX"),
        (["run", "no-such.py"], "SCRIPT = 'no-such.py': there is no such file"),
        (["run"], "Missing argument 'SCRIPT'"),
        (["run", "--worker", "1:2", "SCRIPT"], "Did you mean '--workers'?"),
        (["run", "digits"], "Train it with: elastic-batch train digits --workers MIN:MAX"),
        (["run", "--port", "99999999", "SCRIPT"], "--port = 99999999: must be from 0"),
        (["run", "--tls-cert", "none", "SCRIPT"], "--tls-cert = 'none': needs --tls-key too"),
        (["run", "--token-file", "none", "SCRIPT"], "--token-file = 'none': must be readable"),
        (["run", "--run-dir", "SCRIPT", "SCRIPT"], "must be a directory that can be written to"),
        (["train", "digits", "--workers", "0"], "--workers = '0': must be at least 1"),
        (["train", "digits", "--port", "7077"], "--port = '7077': needs --workers"),
        (["train", "digits", "--token-file", "token"], "--token-file = 'token': needs --workers"),
        (["train", "digits", "--resume", "atuo"], "Did you mean 'auto'?"),
        (["train", "digits", "--run-dir", "SCRIPT/run"], "must be a directory that can be written to"),
        (["worker", "SCRIPT"], "--coordinator = None: must be given with --token-file, or else --run-dir"),
        (["worker", "--coordinator", "http://a:1", "SCRIPT"], "must be given with --token-file"),
        (["worker", "--run-dir", ".", "--nproc-per-node", "0", "SCRIPT"], "--nproc-per-node = '0': must be auto or"),
        (["worker", "--run-dir", ".", "no-such.py"], "there is no such file"),
        (["worker", "--run-dir", "typo", "SCRIPT"], "--run-dir = 'typo': must be the run's directory"),
        (["worker", "--run-dir", ".", "--token-file", "typo", "SCRIPT"], "--token-file = 'typo': must hold"),
        (["worker", "--coordinator", "a:1", "--run-dir", ".", "SCRIPT"], "must be an address such as http://"),
        (["worker", "--run-dir", ".", "digts"], "Did you mean 'digits'?"),
        (["worker", "--run-dir", ".", "digits", "--strategy", "decay"], "Did you mean 'decay-lr'?"),
    ],
)
def test_mistakes_are_told_before_anything_starts(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)  # here may be runs of the user's
    (tmp_path / "script.py").write_text("")
    words = [word.replace("SCRIPT", str(tmp_path / "script.py")) for word in arguments]
    assert main(words, {}) == 2
    assert message in capsys.readouterr().err
    assert os.listdir() == ["script.py"], "nothing was made"


def test_workers_do_not_share_gpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "script.py").write_text("")
    assert main(["run", "--workers", "1:3", str(tmp_path / "script.py")], {"CUDA_VISIBLE_DEVICES": "0,1"}) == 2
    assert "must be at most 2, the number of GPUs that are visible" in capsys.readouterr().err


def test_a_used_run_directory_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.json").write_text("{}")
    for workers in ([], ["--workers", "1"]):
        assert main(["train", "digits", *workers, "--run-dir", str(tmp_path)], {}) == 2
        assert "already holds a run" in capsys.readouterr().err


def test_the_supervising_process_does_not_load_torch() -> None:
    modules = "elastic_batch.cli.run, elastic_batch.cli.worker, elastic_batch.cli.train, elastic_batch.cli.coordinator"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@contextmanager
def start(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*PROGRAM, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 100
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def holds(path: Path, text: str, times: int = 1) -> bool:
    return path.is_file() and path.read_text().count(text) >= times


def worker_pids(run_dir: Path) -> list[int]:
    words = (run_dir / "logs" / "coordinator.log").read_text().split()
    return sorted({int(word.split("-")[-3]) for word in words if word.endswith(("-local-0", "-local-1"))})


def test_a_script_is_trained_to_its_end_though_its_first_worker_is_killed(tmp_path: Path) -> None:
    script, run_dir = tmp_path / "script.py", tmp_path / "run"
    script.write_text(TRAINING)
    logs = run_dir / "logs"
    coordinator_log = logs / "coordinator.log"

    def leads(slot: str) -> bool:
        return holds(logs / f"{slot}.log", "update 5 of")

    with start("run", "--workers", "1:2", "--run-dir", str(run_dir), str(script), "--flag", "x") as process:
        wait_for(lambda: leads("local-0") or leads("local-1"), process)
        lead, other = ("local-0", "local-1") if leads("local-0") else ("local-1", "local-0")
        wait_for(lambda: holds(coordinator_log, "connected", 2), process)
        found = json.loads((run_dir / "coordinator.json").read_text())
        pids = [*worker_pids(run_dir), found["pid"]]
        first = next(
            int(line.split(" on ")[0].split("-")[-3])
            for line in coordinator_log.read_text().splitlines()
            if f"-{lead} on " in line
        )
        os.kill(first, signal.SIGKILL)
        out, err = process.communicate(timeout=100)
    assert process.returncode == 0, out + err
    assert f"{lead} was killed by SIGKILL; starting it again" in out
    assert "the job is complete" in out
    assert "of --flag x" in out
    assert f"[{other}] update" in out, "the other one leads now"
    assert not any(map(is_alive, pids))


def test_a_job_is_stopped_and_resumed_by_the_command_that_it_prints(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    arguments = ["train", *DIGITS, "--workers", "1:2", "--run-dir", str(run_dir), "--json"]
    with start(*arguments) as process:
        wait_for(lambda: holds(run_dir / "ledger.jsonl", "\n", 10), process)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=100)
    assert process.returncode == 75, out + err
    stopped = json.loads(out)
    assert (stopped["finished"], stopped["updates"] >= 10) == (False, True)
    again = shlex.split(err.rstrip().splitlines()[-1])
    assert again[0] == "elastic-batch"
    done = subprocess.run([*PROGRAM, *again[1:]], capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    finished = json.loads(done.stdout)
    assert (finished["finished"], finished["samples"]) == (True, 8 * 1437 // 32 * 32 + 32)
    assert f"at position {stopped['samples']}" in done.stderr


def test_workers_of_another_machine_join_by_address_and_token(tmp_path: Path) -> None:
    script, run_dir = tmp_path / "script.py", tmp_path / "run"
    script.write_text(TRAINING.replace("0.03", "0"))
    with start("coordinator", "--run-dir", str(run_dir), "--min-workers", "2", "--max-workers", "2") as coordinator:
        announced = run_dir / "coordinator.json"
        wait_for(announced.is_file, coordinator)
        door = ["--coordinator", json.loads(announced.read_text())["url"], "--token-file", str(announced)]
        with start("worker", "--nproc-per-node", "2", *door, str(script)) as worker:
            out, err = worker.communicate(timeout=100)
        assert worker.returncode == 0, out + err
        assert re.search(r"-[01]\] update", out)  # of whichever leads
        assert coordinator.wait(timeout=30) == 0
        coordinator.communicate()
