"""A pool of workers: born from one process, kept in number, ended together."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support.supervision import LATER, NAME, SLOT, in_pool, is_alive, pool_settings, until, write_script

from elastic_batch.scaling import nursery_link
from elastic_batch.scaling import pool as pool_module
from elastic_batch.scaling.nursery import worker_name
from elastic_batch.scaling.pool import Pool
from elastic_batch.scaling.processes import start_python

SLEEP = "import time\ntime.sleep(100)\n"
TELL = f"""
import json, os, signal, sys, random, threading
known = dict(
    name=os.environ["{NAME}"], slot=os.environ["{SLOT}"], pid=os.getpid(), argv=sys.argv, path=sys.path[0],
    main=__name__, file=__file__, group=os.getpgid(0), threads=threading.active_count(), draw=random.random(),
    sigterm=signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, stdin=sys.stdin.read(),
    sockets=sum(os.readlink(f"/proc/self/fd/{{fd}}").startswith("socket:") for fd in os.listdir("/proc/self/fd")
        if os.path.exists(f"/proc/self/fd/{{fd}}")),
)
print(json.dumps(known))
"""


def has_spoken(log: Path) -> bool:
    return log.stat().st_size > 0


def pids(pool: Pool) -> list[int]:
    return [int(name.split("-")[-3]) for name in sorted(pool.workers)]


def nursery_of(pool: Pool) -> int:
    return int(Path(f"/proc/{pids(pool)[0]}/stat").read_text().split(") ")[1].split()[1])


def test_a_worker_is_as_python_would_have_it(tmp_path: Path) -> None:
    script = write_script(tmp_path, TELL + SLEEP)
    shown: list[str] = []

    async def scenario(pool: Pool) -> None:
        pool.resize(2)
        await until(pool, lambda: all((tmp_path / "logs" / f"local-{i}.log").stat().st_size for i in range(2)))

    shown, _ = in_pool(pool_settings(script, 2, "a", "--b"), scenario)
    known = [json.loads(line.partition("] ")[2]) for line in sorted(shown) if line.startswith("[")]
    for index, worker in enumerate(known):
        assert worker["name"] == worker_name(worker["pid"], f"local-{index}")
        assert (worker["slot"], worker["group"]) == (f"local-{index}", worker["pid"])
        assert (worker["argv"], worker["path"]) == ([str(script), "a", "--b"], str(tmp_path))
        assert (worker["main"], worker["file"]) == ("__main__", str(script))
        assert (worker["threads"], worker["sigterm"], worker["stdin"], worker["sockets"]) == (1, True, "", 0)
    assert known[0]["draw"] != known[1]["draw"]


def test_a_killed_worker_is_replaced_and_its_end_told(tmp_path: Path) -> None:
    script = write_script(tmp_path, SLEEP)
    names: list[str] = []

    async def scenario(pool: Pool) -> None:
        pool.resize(2)
        await until(pool, lambda: len(pool.workers) == 2)
        names.extend(sorted(pool.workers))
        os.kill(pids(pool)[0], signal.SIGKILL)
        await until(pool, lambda: len(pool.workers - {names[0]}) == 2)

    shown, ended = in_pool(pool_settings(script), scenario)
    assert ended[0] == names[0]
    assert shown == ["local-0 was killed by SIGKILL; starting it again"]


def test_a_pool_grows_up_to_its_slots_and_does_not_shrink(tmp_path: Path) -> None:
    async def scenario(pool: Pool) -> None:
        for wanted, found in ((1, 1), (9, 2), (1, 2)):
            pool.resize(wanted)
            await until(pool, lambda found=found: len(pool.workers) == found)  # type: ignore[misc] # default argument

    in_pool(pool_settings(write_script(tmp_path, SLEEP)), scenario)


def test_a_program_that_always_fails_is_given_up_with_its_last_lines(tmp_path: Path) -> None:
    script = write_script(tmp_path, "print('before')\nraise ValueError('bad luck')\n")

    async def scenario(pool: Pool) -> None:
        pool.resize(1)
        await until(pool, lambda: pool.failure is not None)
        assert pool.failure is not None
        assert pool.failure.startswith("local-0 ended with exit code 1, as often before, and nothing was trained")
        assert pool.failure.endswith("ValueError: bad luck")

    shown, ended = in_pool(pool_settings(script), scenario)
    assert len(ended) == 4
    trace = shown[shown.index("[local-0] Traceback (most recent call last):") :]
    assert trace[1] == f'[local-0]   File "{script}", line 2, in <module>', "none of our own frames"


def test_exit_codes_messages_and_exit_handlers_are_those_of_python(tmp_path: Path) -> None:
    script = write_script(
        tmp_path, "import atexit, sys\natexit.register(print, 'handler')\nprint('x', end='')\nsys.exit('message')\n"
    )

    async def scenario(pool: Pool) -> None:
        pool.resize(1)
        await until(pool, lambda: bool(pool.codes))
        pool.retire()

    shown, _ = in_pool(pool_settings(script), scenario)
    assert any("local-0 ended with exit code 1" in line for line in shown)
    assert (tmp_path / "logs" / "local-0.log").read_text().startswith("xmessage\nhandler\n")


def test_what_a_killed_worker_started_ends_with_it(tmp_path: Path) -> None:
    script = write_script(
        tmp_path,
        "import subprocess\nchild = subprocess.Popen(['sleep', '100'])\nprint(child.pid)\n" + SLEEP,
    )
    log = tmp_path / "logs" / "local-0.log"

    async def scenario(pool: Pool) -> None:
        pool.resize(1)
        await until(pool, lambda: log.read_bytes().endswith(b"\n"))
        child = int(log.read_text())
        os.kill(pids(pool)[0], signal.SIGKILL)
        await until(pool, lambda: not is_alive(child))

    in_pool(pool_settings(script), scenario)


def test_workers_are_told_by_signal_but_not_those_excepted(tmp_path: Path) -> None:
    async def scenario(pool: Pool) -> None:
        pool.resize(2)
        await until(pool, lambda: len(pool.workers) == 2)
        pool.retire()
        spared = sorted(pool.workers)[1]
        pool.signal(signal.SIGTERM, but={spared})
        await until(pool, lambda: pool.workers == {spared})
        assert pool.codes == {"local-0": -signal.SIGTERM}

    in_pool(pool_settings(write_script(tmp_path, SLEEP)), scenario)


def test_workers_know_whether_the_job_has_made_progress(tmp_path: Path) -> None:
    script = write_script(tmp_path, f'import os\nprint("later:", os.environ.get("{LATER}"))\n' + SLEEP)

    async def scenario(pool: Pool) -> None:
        for size in (1, 2):
            pool.progressed(8 * size, [])
            pool.resize(size)
            await until(pool, partial(has_spoken, tmp_path / "logs" / f"local-{size - 1}.log"))

    shown, _ = in_pool(pool_settings(script), scenario)
    assert [line for line in shown if "later" in line] == ["[local-0] later: None", "[local-1] later: 1"]


def test_all_come_back_when_the_process_that_bears_them_dies(tmp_path: Path) -> None:
    async def scenario(pool: Pool) -> None:
        pool.resize(2)
        await until(pool, lambda: len(pool.workers) == 2)
        first = pool.workers
        os.kill(nursery_of(pool), signal.SIGKILL)
        await until(pool, lambda: len(pool.workers - first) == 2)
        assert not any(is_alive(int(name.split("-")[-3])) for name in first)

    _, ended = in_pool(pool_settings(write_script(tmp_path, SLEEP)), scenario)
    assert len(ended) >= 2


def fail_to_start(monkeypatch: pytest.MonkeyPatch, fails: Callable[[int], bool]) -> None:
    """Let starts of processes that bear workers fail, as told by their number."""
    starts = iter(range(100))

    async def start_or_fail(*arguments: Any, **fields: Any) -> asyncio.subprocess.Process:
        if fails(next(starts)):
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return await start_python(*arguments, **fields)

    monkeypatch.setattr(nursery_link, "start_python", start_or_fail)


def test_a_process_that_bears_workers_is_started_later_if_there_can_be_none_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_to_start(monkeypatch, lambda number: number == 1)

    async def scenario(pool: Pool) -> None:
        pool.resize(1)
        await until(pool, lambda: len(pool.workers) == 1)
        first = pool.workers
        os.kill(nursery_of(pool), signal.SIGKILL)
        await until(pool, lambda: len(pool.workers - first) == 1)

    shown, _ = in_pool(pool_settings(write_script(tmp_path, SLEEP)), scenario)
    assert any("cannot be started: [Errno 11] Resource temporarily unavailable" in line for line in shown)


def test_the_job_fails_if_no_process_that_bears_workers_can_be_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_to_start(monkeypatch, lambda number: number > 0)
    monkeypatch.setattr(pool_module, "_MAX_LOST_NURSERIES", 1)

    async def scenario(pool: Pool) -> None:
        pool.resize(1)
        await until(pool, lambda: len(pool.workers) == 1)
        os.kill(nursery_of(pool), signal.SIGKILL)
        await until(pool, lambda: pool.failure is not None)
        await pool.wait_for_change(0.0)
        assert pool.is_empty

    in_pool(pool_settings(write_script(tmp_path, SLEEP)), scenario)


def test_a_dead_process_that_bears_workers_is_noticed_by_asking_it(tmp_path: Path) -> None:
    async def scenario(pool: Pool) -> None:
        pool.resize(1)
        await until(pool, lambda: len(pool.workers) == 1)
        first, nursery = pool.workers, nursery_of(pool)
        assert pool._nursery._socket is not None
        asyncio.get_running_loop().remove_reader(pool._nursery._socket)
        os.kill(nursery, signal.SIGKILL)
        while is_alive(nursery):
            time.sleep(0.01)
        pool.resize(2)
        await until(pool, lambda: len(pool.workers - first) == 2)

    in_pool(pool_settings(write_script(tmp_path, SLEEP)), scenario)


def test_output_that_cannot_be_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(descriptor: int, _: object) -> None:
        os.close(descriptor)
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(pool_module, "read_output", fail)

    async def scenario(pool: Pool) -> None:
        pool.resize(1)
        await until(pool, lambda: len(pool.workers) == 1)

    shown, _ = in_pool(pool_settings(write_script(tmp_path, SLEEP)), scenario)
    assert shown == ["what local-0 prints is lost from now on: [Errno 24] Too many open files"]
