"""One machine's part in a job: from the start to the end of everything that it started."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import supervision
from support.supervision import FakeLink, is_alive, supervisor_settings, write_script

from elastic_batch.scaling import coordinator_process
from elastic_batch.scaling import supervisor as supervisor_module
from elastic_batch.scaling.link import CoordinatorLink, Status
from elastic_batch.scaling.supervisor import Supervisor, SupervisorSettings, supervise

SLEEP = "import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(100)\n"
LEAVES_WHEN_TOLD = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
print(os.getpid(), flush=True)
time.sleep(100)
"""


def start(script: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, supervision.__file__, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )


def wait_for_pids(process: subprocess.Popen[str]) -> list[int]:
    assert process.stdout is not None
    return [int(process.stdout.readline().split()[1]) for _ in range(2)]


def wait_until_gone(pids: list[int], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while any(map(is_alive, pids)):
        assert time.monotonic() < deadline, "a process is left"
        time.sleep(0.01)


def test_nothing_is_left_when_the_supervisor_is_killed(tmp_path: Path) -> None:
    with start(write_script(tmp_path, SLEEP)) as process:
        pids = wait_for_pids(process)
        nursery = int(Path(f"/proc/{pids[0]}/stat").read_text().rpartition(")")[2].split()[1])
        process.kill()
        wait_until_gone([*pids, nursery], 2.0)


def test_the_first_signal_stops_with_75_and_the_second_kills(tmp_path: Path) -> None:
    for number in (signal.SIGTERM, signal.SIGUSR1):
        with start(write_script(tmp_path, LEAVES_WHEN_TOLD)) as process:
            wait_for_pids(process)
            process.send_signal(number)
            out, _ = process.communicate(timeout=30)
        assert process.returncode == 75
        assert f"{number.name}: stopping after the update under way, with a checkpoint; once more to kill" in out
    deaf = LEAVES_WHEN_TOLD.replace("lambda *_: sys.exit(75)", "signal.SIG_IGN")
    with start(write_script(tmp_path, deaf)) as process:
        pids = wait_for_pids(process)
        process.send_signal(signal.SIGINT)
        assert process.stdout is not None
        assert "SIGINT: stopping" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
    assert process.returncode == 130
    wait_until_gone(pids, 2.0)


@pytest.mark.parametrize(
    ("coordinator", "code"),
    [(("recipes",), 0), (("plan", "no-such-recipe"), 2)],
    ids=["it says complete", "it refuses its settings"],
)
def test_the_coordinators_last_word_is_the_jobs(coordinator: tuple[str, ...], code: int, tmp_path: Path) -> None:
    shown: list[str] = []
    settings = supervisor_settings(write_script(tmp_path, SLEEP), coordinator)
    assert supervise(settings, FakeLink({}), shown.append) == code
    assert any(line.startswith("[coordinator] ") for line in shown)
    assert (tmp_path / "logs" / "coordinator.log").stat().st_size


def test_a_worker_of_the_last_world_ends_in_its_own_time_and_its_failure_counts(tmp_path: Path) -> None:
    script = write_script(tmp_path, "import sys, time\ntime.sleep(4)\nprint('saved')\nsys.exit(3)\n")
    shown: list[str] = []
    link = FakeLink({"workers": []})
    settings = supervisor_settings(script, ("recipes",))

    async def run() -> int:
        supervisor = Supervisor(settings, link, shown.append)
        working = asyncio.ensure_future(supervisor.run())
        while not (workers := supervisor._pool.workers):
            await asyncio.sleep(0.01)
        link.now = {"workers": [{"name": sorted(workers)[0], "state": "active"}], "ended": "the job is complete"}
        return await working

    assert asyncio.run(run()) == 1
    assert "[local-0] saved" in shown
    assert "[local-1] saved" not in shown, "it was outside the world, and told to end"
    assert "training is over, but local-0 ended with exit code 3" in shown


def test_user_code_after_training_is_not_ended_and_its_death_is_told(tmp_path: Path) -> None:
    text = "import os, time\ntime.sleep(4)\nprint('exported')\nos.kill(os.getpid(), 9)\n"
    shown: list[str] = []
    link = FakeLink({"workers": []})
    settings = supervisor_settings(write_script(tmp_path, text), ("recipes",))

    async def run() -> int:
        supervisor = Supervisor(settings, link, shown.append)
        working = asyncio.ensure_future(supervisor.run())
        while not (workers := supervisor._pool.workers):
            await asyncio.sleep(0.01)
        link.now = {"workers": [{"name": sorted(workers)[0], "state": "active"}]}
        while not supervisor._members:
            await asyncio.sleep(0.01)
        link.now = {"workers": [], "ended": "the job is complete"}  # it has said goodbye
        return await working

    assert asyncio.run(run()) == 1
    assert "[local-0] exported" in shown
    assert "training is over, but local-0 was killed by SIGKILL" in shown


def test_a_worker_that_fell_out_of_the_world_is_not_waited_for_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_module, "_KILL_SECONDS", 0.5)
    text = (
        "import os, signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "time.sleep(4 if os.environ['SLOT'] == 'local-0' else 99)\n"
    )
    link = FakeLink({"workers": []})
    settings = supervisor_settings(write_script(tmp_path, text), ("recipes",))

    async def run() -> int:
        supervisor = Supervisor(settings, link, lambda _: None)
        working = asyncio.ensure_future(supervisor.run())
        while len(workers := sorted(supervisor._pool.workers)) < 2:
            await asyncio.sleep(0.01)
        for generation, members in ((1, workers), (2, workers[:1])):
            link.now = {"generation": generation, "workers": [{"name": name, "state": "active"} for name in members]}
            while supervisor._generation < generation:
                await asyncio.sleep(0.01)
        return await asyncio.wait_for(working, 30)

    assert asyncio.run(run()) == 0


def test_more_workers_are_started_when_more_are_wanted_and_one_is_kept_warm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = FakeLink({"desired_workers": 1})
    base = supervisor_settings(write_script(tmp_path, SLEEP))
    settings = SupervisorSettings(
        pool=supervision.pool_settings(tmp_path / "script.py", 4), num_workers=1, warm=1, follows_demand=True
    )
    assert base.warm == 0

    monkeypatch.setattr(supervisor_module, "_FAR_POLL_SECONDS", 0.1)

    async def run() -> list[int]:
        supervisor = Supervisor(settings, link, lambda _: None)
        working = asyncio.ensure_future(supervisor.run())
        found = []
        for wanted, expected in ((1, 2), (2, 3), (4, 4)):
            link.now = {"desired_workers": wanted}
            while len(supervisor._pool.workers) < expected:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.3)
            found.append(len(supervisor._pool.workers))
        os.kill(os.getpid(), signal.SIGTERM)
        assert await working == 75
        return found

    assert asyncio.run(asyncio.wait_for(run(), 30)) == [2, 3, 4]
    assert sum(line.startswith("exited ") for line in link.told) >= 1


def test_a_failing_program_ends_the_job_with_1_and_says_what_it_printed(tmp_path: Path) -> None:
    shown: list[str] = []
    script = write_script(tmp_path, "raise ValueError('bad luck')\n")
    assert supervise(supervisor_settings(script), FakeLink({}), shown.append) == 1
    report = next(line for line in shown if "nothing was trained meanwhile" in line)
    assert "ValueError: bad luck" in report


def test_workers_of_the_world_may_save_at_leisure_when_the_program_has_failed_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_module, "_KILL_SECONDS", 0.1)
    text = (
        "import os, signal, sys, time\n"
        "if os.environ['SLOT'] == 'local-1':\n    sys.exit(1)\n"
        "def save(*_):\n    time.sleep(0.5)\n    print('saved')\n    sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, save)\ntime.sleep(99)\n"
    )
    shown: list[str] = []
    link = FakeLink({"workers": []})

    async def run() -> int:
        supervisor = Supervisor(supervisor_settings(write_script(tmp_path, text)), link, shown.append)
        working = asyncio.ensure_future(supervisor.run())
        while not supervisor._pool.workers:
            await asyncio.sleep(0.01)
        names = supervisor._pool.workers
        link.now = {"workers": [{"name": name, "state": "active"} for name in names if name.endswith("local-0")]}
        return await asyncio.wait_for(working, 30)

    assert asyncio.run(run()) == 1
    assert "[local-0] saved" in shown


def test_an_error_beside_the_rest_ends_the_job(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class BrokenLink(FakeLink):
        async def status(self) -> Status:
            raise ZeroDivisionError("a mistake of ours")

    assert supervise(supervisor_settings(write_script(tmp_path, SLEEP)), BrokenLink(), lambda _: None) == 1
    assert "a mistake of ours" in caplog.text


def test_workers_live_on_when_what_they_print_cannot_be_shown(tmp_path: Path) -> None:
    def fail(line: str) -> None:
        raise OSError(28, "No space left on device")

    script = write_script(tmp_path, "import time\nfor _ in range(9):\n    print('x')\n    time.sleep(0.02)\n")
    assert supervise(supervisor_settings(script), FakeLink({"ended": "the job is complete"}), fail) == 0
    assert (tmp_path / "logs" / "local-0.log").read_text() == "x\n" * 9


def test_a_coordinator_that_hangs_is_killed_and_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coordinator_process, "_SILENT_SECONDS", 0.1)
    counter = tmp_path / "starts"
    code = f"import os, time; os.path.exists({str(counter)!r}) and sys.exit(75); open({str(counter)!r}, 'w'); "
    monkeypatch.setattr(coordinator_process, "_CODE", code + "time.sleep(99)")
    link = FakeLink({"workers": []})

    async def run() -> int:
        working = asyncio.ensure_future(
            Supervisor(supervisor_settings(write_script(tmp_path, SLEEP), ("x",)), link, lambda _: None).run()
        )
        while not counter.exists():
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.5)
        link.now = None
        return await asyncio.wait_for(working, 30)

    assert asyncio.run(run()) == 75


def test_where_the_coordinator_is_elsewhere_the_part_ends_with_the_job(tmp_path: Path) -> None:
    link = FakeLink({"ended": "the job is complete"})
    assert supervise(supervisor_settings(write_script(tmp_path, "pass\n")), link, lambda _: None) == 0
    script = write_script(tmp_path, "import sys\nsys.exit(75)\n")
    assert supervise(supervisor_settings(script), FakeLink({"ended": "stopped: SIGINT"}), lambda _: None) == 75


@pytest.mark.parametrize(
    ("ended", "codes", "expected"),
    [
        ("the job is complete", (75, 0), 0),
        ("the job is complete", (1, 0), 1),
        ("stopped: SIGINT", (75, 0), 75),
        ("stopped: SIGINT", (0, 0), 75),
        (None, (75, 0), 0),
        (None, (75, 75), 75),
    ],
)
def test_the_exit_code_where_the_coordinator_is_elsewhere(
    ended: str | None, codes: tuple[int, int], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_module, "_AWAY_SECONDS", 0.8)
    script = write_script(tmp_path, f"import os, sys\nsys.exit({codes}[os.environ['SLOT'] == 'local-1'])\n")
    link = FakeLink({"ended": ended} if ended else None)
    assert supervise(supervisor_settings(script), link, lambda _: None) == expected


def test_what_a_coordinator_elsewhere_announced_of_the_end_counts_when_it_has_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = FakeLink({"phase": "running"})
    monkeypatch.setattr(link, "announced_end", lambda: "stopped: SIGINT")
    settings = supervisor_settings(write_script(tmp_path, "import sys, time\ntime.sleep(0.5)\nsys.exit(1)\n"))

    async def run() -> int:
        working = asyncio.ensure_future(Supervisor(settings, link, lambda _: None).run())
        await asyncio.sleep(0.3)
        link.now = None
        return await asyncio.wait_for(working, 30)

    assert asyncio.run(run()) == 75


def test_a_coordinator_elsewhere_is_asked_seldom_but_at_once_when_a_worker_has_ended(tmp_path: Path) -> None:
    link = FakeLink({"phase": "running"})
    settings = supervisor_settings(write_script(tmp_path, "import time\ntime.sleep(1.2)\n"))

    async def run() -> int:
        working = asyncio.ensure_future(Supervisor(settings, link, lambda _: None).run())
        await asyncio.sleep(1.0)
        assert link.num_asked == 1
        link.now = {"ended": "the job is complete"}
        return await asyncio.wait_for(working, 1.5)

    assert asyncio.run(run()) == 0


def test_workers_that_ended_well_are_not_replaced_when_the_coordinator_elsewhere_has_gone_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_module, "_AWAY_SECONDS", 1.5)
    monkeypatch.setattr(supervisor_module, "_FAR_POLL_SECONDS", 60.0)  # a worker's end is reason enough to ask
    shown: list[str] = []
    settings = supervisor_settings(write_script(tmp_path, "print('trained')\n"))
    assert supervise(settings, FakeLink(), shown.append) == 0
    assert sorted(shown) == ["[local-0] trained", "[local-1] trained"]


def test_a_machine_whose_workers_failed_does_not_wait_for_a_lost_coordinator_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_module, "_HOPELESS_SECONDS", 1.5)
    settings = supervisor_settings(write_script(tmp_path, "import sys\nsys.exit(1)\n"))
    assert supervise(settings, FakeLink(), lambda _: None) == 1


def test_settings_that_are_impossible_end_the_job_at_once_with_2_and_one_message(tmp_path: Path) -> None:
    script = write_script(tmp_path, "import sys\nprint('Error: seed must be at least 0')\nsys.exit(2)\n")
    settings = supervisor_settings(script)
    shown: list[str] = []
    alone = SupervisorSettings(pool=settings.pool, num_workers=1)
    assert supervise(alone, FakeLink({}), shown.append) == 2
    assert shown == [
        "[local-0] Error: seed must be at least 0",
        "local-0 ended with exit code 2: it would do so again, for what it printed is wrong with its settings",
    ]


def test_of_several_workers_whose_settings_are_impossible_one_is_told_of(tmp_path: Path) -> None:
    shown: list[str] = []
    assert (
        supervise(supervisor_settings(write_script(tmp_path, "import sys\nsys.exit(2)\n")), FakeLink({}), shown.append)
        == 2
    )
    assert len(shown) == 1, "the other one's end is no news"


def test_a_coordinator_that_serves_another_host_alone_is_not_waited_for(tmp_path: Path) -> None:
    announced = {"url": "http://127.0.0.1:9", "token": "secret", "host": "another-host"}
    (tmp_path / "coordinator.json").write_text(json.dumps(announced))
    shown: list[str] = []
    settings = supervisor_settings(write_script(tmp_path, SLEEP))
    assert supervise(settings, CoordinatorLink(run_dir=tmp_path), shown.append) == 2
    assert any("Start the run with --host 0.0.0.0" in line for line in shown)
