"""Data workers: they outlive plans and errors, read a bounded number ahead, and leave nothing behind."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from support.samples import Draws, Troubled, read, requests
from torch.utils.data import DataLoader, Dataset

from elastic_batch.data import BatchSource, DataError, PassRequest, iterate, open_source
from elastic_batch.stream import SampleStream

STREAM = SampleStream(64, 2)


def open_workers(dataset: Any, **settings: Any) -> BatchSource:
    usable: dict[str, Any] = {"stream": STREAM, "micro_batch_size": 4, "device": "cpu", "num_workers": 2}
    return open_source(dataset, **(usable | settings))


def expected(start: int, stop: int) -> list[int]:
    return list(map(int, STREAM.indices(start, stop)))


def flat(batches: list[torch.Tensor]) -> list[int]:
    return torch.cat(batches).tolist()


def is_gone(pid: int) -> bool:
    """Whether no such process runs (a zombie runs no more)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def drain(source: BatchSource) -> None:
    while True:
        source.next()


def wait_until(condition: Any, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return bool(condition())


def test_a_new_plan_is_served_at_once_by_the_same_processes(tmp_path: Path) -> None:
    dataset = Troubled(tmp_path)
    with closing(open_workers(dataset, prefetch_factor=4)) as source:
        assert flat(read(source, 4)) == expected(0, 16)
        source.start(PassRequest(start * 4, 1) for start in count(100))  # what was read ahead is never seen
        for start, width in ((800, 1), (48, 4), (0, 2), (480, 1)):
            assert flat(read(source, 8, start=start, width=width)) == expected(start, start + 32)
        for _ in range(30):
            source.start(requests(8))
            assert source.next().tolist() == expected(0, 4)
    assert len(dataset.pids) == 2
    assert os.getpid() not in dataset.pids


def test_requests_are_read_a_bounded_number_ahead() -> None:
    taken = []

    def endless() -> Iterator[PassRequest]:
        for start in count(0, 4):
            taken.append(start)
            yield PassRequest(start, 1)

    with closing(open_workers(Draws(64), prefetch_factor=3)) as source:
        source.start(endless())
        for served in range(1, 20):
            source.next()
            assert served <= len(taken) <= served + 2 * 3 + 1


def test_an_error_of_the_data_set_is_told_and_the_same_workers_go_on(tmp_path: Path) -> None:
    dataset = Troubled(tmp_path)
    with closing(open_workers(dataset)) as source:
        read(source, 8)
        pids = dataset.pids
        (tmp_path / "fail").touch()
        source.start(requests(8, start=16, width=2))
        with pytest.raises(DataError, match=r"position 16 .*UnpicklableError: sample \d+ is broken") as raised:
            source.next()
        first = expected(16, 17)
        assert (raised.value.position, list(raised.value.sample_indices)) == (16, first)
        assert "in __getitem__" in raised.value.traceback_text
        assert raised.value.traceback_text in raised.value.__notes__
        (tmp_path / "fail").unlink()
        assert flat(read(source, 8, start=16, width=2)) == expected(16, 48)
        assert dataset.pids == pids


def test_the_error_is_the_same_without_workers(tmp_path: Path) -> None:
    (tmp_path / "fail").touch()
    messages = []
    for num_workers in (0, 2):
        with closing(open_workers(Troubled(tmp_path), num_workers=num_workers)) as source:
            source.start(requests(4, start=20))
            with pytest.raises(DataError) as raised:
                source.next()
            messages.append(str(raised.value))
    assert messages[0] == messages[1]


def test_an_error_of_the_requests_is_raised_as_it_is() -> None:
    def broken() -> Iterator[PassRequest]:
        yield from requests(6)
        raise KeyError("schedule")

    with closing(open_workers(Draws(64))) as source:
        source.start(broken())
        with pytest.raises(KeyError, match="schedule"):
            drain(source)
        assert len(read(source, 4)) == 4


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_worker_is_told_and_replaced_at_the_next_start(tmp_path: Path, victim: int) -> None:
    dataset = Troubled(tmp_path)
    with closing(open_workers(dataset)) as source:
        source.start(requests(100))
        for _ in range(8):
            source.next()
        killed = sorted(dataset.pids)[victim]
        os.kill(killed, signal.SIGKILL)
        started = time.monotonic()
        with pytest.raises(DataError, match=rf"a data worker died \(pid {killed}, exit code -9\)"):
            drain(source)  # what had arrived before may still be served
        assert time.monotonic() - started < 2
        with pytest.raises(RuntimeError, match=r"call start\(\)"):
            source.next()
        old = dataset.pids
        assert flat(read(source, 8, start=32)) == expected(32, 64)
        assert not dataset.pids & old - {killed} or all(map(is_gone, old))
        assert len(dataset.pids) == 4


@pytest.fixture
def torch_listens(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A DataLoader of the user's has had workers: torch's handler is in force."""
    before = signal.getsignal(signal.SIGCHLD)
    monkeypatch.setattr("torch.utils.data._utils.signal_handling._SIGCHLD_handler_set", False)
    assert len(list(DataLoader(Draws(4), num_workers=1))) == 4
    assert signal.getsignal(signal.SIGCHLD) is not before
    yield
    signal.signal(signal.SIGCHLD, before)


@pytest.mark.usefixtures("torch_listens")
def test_a_killed_worker_raises_nothing_before_its_batch_is_asked_for(tmp_path: Path) -> None:
    dataset = Troubled(tmp_path)
    with closing(open_workers(dataset)) as source:
        source.start(requests(100))
        source.next()
        assert wait_until(lambda: len(dataset.pids) == 2, 5)
        for pid in dataset.pids:
            os.kill(pid, signal.SIGKILL)
        assert wait_until(lambda: all(map(is_gone, dataset.pids)), 5)
        time.sleep(0.1)  # where signals are heard
        with pytest.raises(DataError, match="a data worker died"):
            drain(source)


@pytest.mark.usefixtures("torch_listens")
def test_other_loaders_can_be_iterated_over_alike() -> None:
    batches = iterate(DataLoader(Draws(8), num_workers=1, prefetch_factor=1))
    next(batches)
    (worker,) = multiprocessing.active_children()
    worker.kill()
    assert wait_until(lambda: not worker.is_alive(), 5)
    time.sleep(0.1)
    assert len(list(iterate(DataLoader(Draws(8))))) == 8


def test_a_sample_that_kills_its_worker_is_told_by_its_position(tmp_path: Path) -> None:
    with closing(open_workers(Troubled(tmp_path))) as source:
        read(source, 4)
        (tmp_path / "die").touch()
        source.start(requests(4, start=40))
        with pytest.raises(DataError, match=r"position 40 .*exit code -9") as raised:
            source.next()
        assert list(raised.value.sample_indices) == expected(40, 44)
        (tmp_path / "die").unlink()
        assert flat(read(source, 4, start=40)) == expected(40, 56)


def test_a_worker_that_died_between_two_plans_is_replaced_silently(tmp_path: Path) -> None:
    dataset = Troubled(tmp_path)
    with closing(open_workers(dataset)) as source:
        read(source, 8)
        killed = min(dataset.pids)
        os.kill(killed, signal.SIGKILL)
        assert wait_until(lambda: killed not in {child.pid for child in multiprocessing.active_children()}, 5)
        assert flat(read(source, 8)) == expected(0, 32)


def test_a_batch_that_cannot_be_pickled_is_an_error_not_a_silence() -> None:
    with closing(open_workers(Draws(64), collate_fn=lambda samples: lambda: samples)) as source:
        source.start(requests(4))
        with pytest.raises(DataError, match=r"position 0 .*pickle"):
            source.next()


class Slow(Dataset[int]):
    """Samples that take far longer than a poll for dead workers, in a process that does not hear SIGTERM."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> int:
        time.sleep(self.seconds)
        return index


def test_slow_samples_are_waited_for() -> None:
    with closing(open_workers(Slow(0.15), micro_batch_size=4)) as source:
        assert flat(read(source, 2)) == expected(0, 8)


def test_a_new_plan_does_not_wait_for_passes_that_nobody_wants() -> None:
    with closing(open_workers(Slow(0.05), micro_batch_size=2, prefetch_factor=2)) as source:
        source.start(iter([PassRequest(0, 16)] * 8))  # each would take 1.6 s
        time.sleep(0.2)
        started = time.monotonic()
        assert read(source, 1, micro_batch_size=2)[0].tolist() == expected(0, 2)
        assert time.monotonic() - started < 1.2


def test_closing_takes_bounded_time_even_if_a_sample_never_ends(tmp_path: Path) -> None:
    source = open_workers(Slow(1000))
    source.start(requests(4))
    started = time.monotonic()
    source.close()
    assert time.monotonic() - started < 5


def test_a_forgotten_source_takes_its_workers_with_it(tmp_path: Path) -> None:
    dataset = Troubled(tmp_path)
    source = open_workers(dataset)
    read(source, 8)
    del source
    gc.collect()
    assert wait_until(lambda: all(map(is_gone, dataset.pids)), 5)


def test_a_signal_to_the_process_group_does_not_reach_the_workers(tmp_path: Path) -> None:
    dataset = Troubled(tmp_path)
    with closing(open_workers(dataset)) as source:
        read(source, 8)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            for pid in dataset.pids:
                os.kill(pid, number)
        assert flat(read(source, 8)) == expected(0, 32)
        assert len(dataset.pids) == 2


def test_a_source_may_be_started_by_a_thread_that_ends(tmp_path: Path) -> None:
    with closing(open_workers(Draws(64))) as source:
        thread = threading.Thread(target=source.start, args=(requests(100),))
        thread.start()
        thread.join()
        time.sleep(0.1)
        assert len([source.next() for _ in range(20)]) == 20


def test_each_worker_is_prepared_by_the_user_s_function(tmp_path: Path) -> None:
    def prepare(worker_id: int) -> None:
        (tmp_path / f"prepared-{worker_id}").touch()

    with closing(open_workers(Draws(64), worker_init_fn=prepare)) as source:
        read(source, 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prepared-0", "prepared-1"]


def test_an_error_in_the_user_s_function_is_told() -> None:
    def prepare(worker_id: int) -> None:
        raise ValueError("no licence for the reader")

    with closing(open_workers(Draws(64), worker_init_fn=prepare)) as source:
        source.start(requests(4))
        with pytest.raises(DataError, match=r"a data worker failed \(ValueError: no licence for the reader\)$"):
            source.next()


SLOW = pytest.mark.soak  # every such worker imports torch anew
SCRIPT = textwrap.dedent("""
    import sys
    import torch
    from torch.utils.data import DataLoader, Dataset
    from elastic_batch.data import PassRequest, open_source
    from elastic_batch.stream import SampleStream

    class Squares(Dataset):
        def __len__(self): return 64
        def __getitem__(self, index): return index * index

    def read(start_method):
        stream = SampleStream(64, 2)
        source = open_source(Squares(), stream=stream, micro_batch_size=4, device="cpu", num_workers=1,
                             start_method=start_method)
        for start in (0, 200):
            source.start(PassRequest(start + 4 * i, 1) for i in range(100))
            assert source.next().tolist() == [i * i for i in stream.indices(start, start + 4)]
        return source

    if __name__ == "__main__":
        torch.set_num_threads(1)
        for start_method in sys.argv[1:]:
            read(start_method).close()
        forgotten = [read(start_method) for start_method in sys.argv[1:]]
""")


@pytest.mark.parametrize(
    "start_method", ["fork", pytest.param("forkserver", marks=SLOW), pytest.param("spawn", marks=SLOW)]
)
def test_every_start_method_works_and_an_interpreter_exits_cleanly_over_open_sources(
    tmp_path: Path, start_method: str
) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-W", "error", str(script), start_method]
    done = subprocess.run(command, timeout=100, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
