"""`elastic-batch status` and `drain`: what people see of an elastic run."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from support.coordinators import serving
from support.fake_worker import connected

from elastic_batch.cli.main import main
from elastic_batch.cli.status import render
from elastic_batch.coordinator.announcement import Announcement, write_announcement
from elastic_batch.protocol import Leave, Progress

RECORD = {"update": 5, "position": 40, "epoch": 0.1, "global_batch_size": 8, "num_micro_batches": 8, "world_size": 2}


def _with_a_worker(run_dir: Path, use: Callable[[], Any]) -> Any:
    """Do something on another thread while a worker trains."""

    async def scenario() -> Any:
        async with serving(run_dir) as coordinator, connected(run_dir, "local-1") as worker:
            await worker.ready()
            form = await worker.enter()
            await worker.say(Progress(generation=form.generation, record={**RECORD, "kind": "update", "seconds": 0.1}))
            await coordinator.until(lambda status: status["update"] == 5)
            result = await asyncio.to_thread(use)
            if result == "drained":
                await worker.hear(Leave)
            return result

    return asyncio.run(scenario())


def test_the_status_shows_world_workers_and_position(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _with_a_worker(tmp_path, lambda: main(["status", "--run-dir", str(tmp_path)], {})) == 0
    shown = capsys.readouterr().out
    assert "generation 1, 1 workers, 8 wanted" in shown
    assert "update 5, 40 samples, epoch 0.10" in shown
    assert "local-1" in shown
    assert "active" in shown


def test_the_status_as_json_is_the_coordinators_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    environ = {"ELASTIC_BATCH_RUN_DIR": str(tmp_path)}
    assert _with_a_worker(tmp_path, lambda: main(["status", "--json"], environ)) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["phase"], found["generation"], found["position"], found["ended"]) == ("running", 1, 40, None)
    [worker] = found["workers"]
    assert worker["name"] == worker["slot"] == "local-1"
    assert set(worker) >= {"host", "state", "update", "position", "stage", "heard_seconds_ago"}


def test_a_worker_is_drained_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def drain() -> str:
        assert main(["drain", "local-1", "--run-dir", str(tmp_path)], {}) == 0
        return "drained"

    assert _with_a_worker(tmp_path, drain) == "drained"
    assert "local-1 leaves" in capsys.readouterr().out


def test_draining_an_unknown_worker_suggests_the_nearest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _with_a_worker(tmp_path, lambda: main(["drain", "local-2", "--run-dir", str(tmp_path)], {})) == 1
    assert "there is no worker 'local-2'. Did you mean 'local-1'?" in capsys.readouterr().err


def test_a_coordinator_can_be_named_by_address_and_token_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def use() -> list[int]:
        door = json.loads((tmp_path / "coordinator.json").read_bytes())
        right, wrong = tmp_path / "right", tmp_path / "wrong"
        right.write_text(door["token"])
        wrong.write_text("0123456789abcdef")
        return [
            main(["status", "--coordinator", door["url"], "--token-file", str(file)], {}) for file in (right, wrong)
        ]

    assert _with_a_worker(tmp_path, use) == [0, 1]
    assert "refuses: wrong token" in capsys.readouterr().err


def test_without_a_coordinator_the_error_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status"], {}) == 2
    assert main(["status", "--run-dir", str(tmp_path)], {}) == 2

    async def come_and_go() -> None:
        async with serving(tmp_path):
            pass

    asyncio.run(come_and_go())
    assert main(["status", "--run-dir", str(tmp_path)], {}) == 1
    shown = capsys.readouterr().err
    assert "Give --run-dir" in shown
    assert "must hold the coordinator.json" in shown
    assert "does not answer" in shown
    assert "If workers are still running, training goes on" in shown
    assert f"elastic-batch coordinator --run-dir {tmp_path}" in shown


@pytest.mark.parametrize(
    ("door", "message"),
    [
        (["127.0.0.1:9"], "--coordinator = '127.0.0.1:9': must be an address such as http://10.0.0.1:7077"),
        (["ftp://x"], "--coordinator = 'ftp://x': must be an address such as http://10.0.0.1:7077"),
        (["http://x:1"], "--token-file = None: is required with --coordinator"),
        (["http://x:1", "--token-file", "none"], "--token-file = 'none': must be readable"),
    ],
)
def test_a_wrong_address_or_token_names_its_flag(
    door: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["status", "--coordinator", *door], {}) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("ended", "end", "shown"),
    [
        ("the job is complete", 96, "run r: the job is complete (96 samples); its coordinator has ended"),
        ("stopped: SIGINT", None, "run r: stopped: SIGINT; its coordinator has ended"),
    ],
)
def test_the_coordinator_of_a_run_that_is_over_is_not_silent(
    ended: str, end: int | None, shown: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    door = {"url": "http://127.0.0.1:9", "token": "x" * 32, "run_id": "r", "version": "1"}
    write_announcement(tmp_path, Announcement(**door, pid=1, ended=ended, completed_end=end))
    for flags in ([], ["--watch"]):
        assert main(["status", "--run-dir", str(tmp_path), *flags], {}) == 0
        assert capsys.readouterr().out.strip() == shown
    assert main(["status", "--run-dir", str(tmp_path), "--json"], {}) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {"run_id": "r", "phase": "ended", "ended": ended, "position": end}


def test_a_coordinator_that_serves_another_host_alone_is_told_as_such(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = Announcement(url="http://127.0.0.1:9", token="x" * 32, run_id="r", pid=1, version="1", host="other")
    write_announcement(tmp_path, said)
    assert main(["status", "--run-dir", str(tmp_path)], {}) == 2
    assert "listens on other for workers of that host alone" in capsys.readouterr().err


def test_watching_ends_with_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async def scenario() -> int:
        async with serving(tmp_path) as coordinator, connected(tmp_path, "a") as a:
            await a.ready()
            await a.enter()
            watching = asyncio.create_task(
                asyncio.to_thread(main, ["status", "--watch", "--json", "--run-dir", str(tmp_path)], {})
            )
            async with connected(tmp_path, "b"):  # keeps the coordinator until the watcher has seen the end
                await asyncio.sleep(0.3)
                await a.bye("finished")
                code = await watching
            await coordinator.outcome()
            return code

    assert asyncio.run(scenario()) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["ended"] for line in (lines[0], lines[-1])] == [None, "the job is complete"]


@pytest.mark.parametrize("reason", ["finished", "stopped"])
def test_watching_ends_with_a_run_whose_end_nobody_could_ask_for(
    reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def scenario() -> int:
        async with serving(tmp_path) as coordinator, connected(tmp_path, "a") as a:
            await a.ready()
            await a.enter()
            watching = asyncio.create_task(
                asyncio.to_thread(main, ["status", "--watch", "--json", "--run-dir", str(tmp_path)], {})
            )
            await asyncio.sleep(0.3)
            if reason == "stopped":
                await coordinator.http.post("/stop", json={"reason": "SIGINT"})
            await a.bye(reason)
            await coordinator.outcome()
            return await asyncio.wait_for(watching, 10)

    assert asyncio.run(scenario()) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["ended"] == {"finished": "the job is complete", "stopped": "stopped: SIGINT"}[reason]


def test_thousands_of_workers_do_not_fill_the_screen() -> None:
    worker = {"slot": "s", "host": "h", "state": "lost", "update": 1, "stage": "wait", "heard_seconds_ago": None}
    status = {
        "run_id": "r",
        "phase": "running",
        "ended": None,
        "generation": 3,
        "desired_workers": 5000,
        "reason": "trains",
        "update": None,
        "workers": [{"name": f"w{index}", **worker} for index in range(5000)],
    }
    console = Console(width=120)
    with console.capture() as capture:
        console.print(render(status))
    assert "... and 4900 more" in capture.get()
    assert "no update yet" in capture.get()
