"""Run as a program: forks writers of checkpoints, kills each at another moment, and checks what is left after each.

Prints a JSON object with the number of trials; an assertion that fails ends it with a traceback.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from support.dying_os import DyingOs

from elastic_batch import durable
from elastic_batch.checkpoint import CheckpointInfo, CheckpointStore, CheckpointWriter
from elastic_batch.errors import CheckpointDamaged

KEEP = 1
NUM_SAVES = 2


def state_at(position: int) -> dict[str, Any]:
    """A state that its position determines."""
    generator = torch.Generator().manual_seed(position)
    return {
        "position": position,
        "model": {"weight": torch.randn(170, 50, generator=generator)},
        "optimizer": {"lr": 0.1, "betas": (0.9, 0.999)},
    }


def info_at(position: int) -> CheckpointInfo:
    return CheckpointInfo(position=position, update=position // 32, fingerprint={"seed": 1})


def write(directory: Path, acknowledged: int, first: int, last: int) -> None:
    """Save state after state; tell each through the pipe once the store says that it lasts."""
    store = CheckpointStore(directory, keep=KEEP)
    for position in range(first, last):
        store.save(state_at(position), info_at(position))
        os.write(acknowledged, position.to_bytes(8, "little"))


def write_in_background(directory: Path, acknowledged: int, first: int, last: int) -> None:
    """The same through the background writer."""
    with CheckpointWriter(CheckpointStore(directory, keep=KEEP)) as writer:
        for position in range(first, last):
            writer.copy_and_submit(state_at(position), info_at(position)).result()
            os.write(acknowledged, position.to_bytes(8, "little"))


def fork_writer(directory: Path, moment: int | None, writer: Any, last: int) -> tuple[int, int]:
    """A child that saves until it dies or is done; gives its process id and the pipe of its acknowledgements."""
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        return child, reading
    os.close(reading)
    if moment is not None:
        vars(durable)["os"] = DyingOs(moment, lambda: os.kill(os.getpid(), signal.SIGKILL))
    writer(directory, writing, 1, last)
    os._exit(0)


def finish(child: int, reading: int) -> tuple[bool, int]:
    """Wait for a child; whether it was killed, and the last position that it acknowledged."""
    _, status = os.waitpid(child, 0)
    with os.fdopen(reading, "rb") as pipe:
        told = pipe.read()
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, f"the writer failed by itself: {status}"
    return os.WIFSIGNALED(status), int.from_bytes(told[-8:], "little")


def check(directory: Path, acknowledged: int) -> None:
    """What every kill must leave: the newest acknowledged state or a newer one, no damage, and a run that goes on."""
    damages: list[CheckpointDamaged] = []
    store = CheckpointStore(directory, keep=KEEP)
    newest = store.load_newest(damages.append)
    assert not damages, damages
    position = newest.manifest.position if newest else 0
    assert position >= acknowledged, (position, acknowledged)
    if newest:
        torch.testing.assert_close(newest.state, state_at(position), rtol=0, atol=0)
    store.save(state_at(position + 1), info_at(position + 1))
    resumed = store.load_newest(damages.append)
    assert resumed is not None, "nothing to resume from"
    assert resumed.manifest.position == position + 1
    assert not damages, damages
    files = {path.name for path in directory.iterdir()} - {"fence"}
    stems = {name.removesuffix(".json") for name in files if name.endswith(".json")}
    assert files == {stem + suffix for stem in stems for suffix in (".json", ".pt")}, files
    assert 1 <= len(stems) <= KEEP
    assert all(re.fullmatch(r"\d{12}-g0-[0-9a-f]{12}", stem) for stem in stems)


def every_moment(root: Path, writer: Any, stride: int = 1) -> int:
    """Kill before each effect on the disk in turn (or every few), until a writer gets through; gives their number."""
    moment = 0
    while True:
        directory = root / f"{writer.__name__}-{moment}"
        killed, acknowledged = finish(*fork_writer(directory, moment, writer, NUM_SAVES + 1))
        check(directory, acknowledged)
        shutil.rmtree(directory)
        if not killed:
            assert acknowledged == NUM_SAVES
            return moment // stride
        moment += stride


def any_time(root: Path, trials: int) -> int:
    """Kill after a random delay, with nothing replaced."""
    delays = random.Random(7)
    num_killed = 0
    for trial in range(trials):
        directory = root / f"timed-{trial}"
        child, reading = fork_writer(directory, None, write, 10_000)
        time.sleep(delays.uniform(0.002, 0.08))
        os.kill(child, signal.SIGKILL)
        killed, acknowledged = finish(child, reading)
        num_killed += killed
        check(directory, acknowledged)
        shutil.rmtree(directory)
    return num_killed


def main() -> None:
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    counts = {
        "moments": every_moment(root, write),
        "background_moments": every_moment(root, write_in_background, 4),
        "timed": any_time(root, int(sys.argv[2])),
    }
    sys.stdout.write(json.dumps(counts) + "\n")


if __name__ == "__main__":
    main()
