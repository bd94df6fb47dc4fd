"""A process that has imported what training needs and forks a worker whenever it is asked for one.

It has no thread, no connection but the one to its owner, and no CUDA context; each worker is born as if by `python`.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from elastic_batch.scaling.lifeline import end_with_parent, outlive_parent

PRELOADED = (
    "torch",
    "torch._dynamo",
    "torch.distributed",
    "torch.optim",
    "torch.utils.data",
    "elastic_batch.trainer",
    "elastic_batch.worker",
)
"""What workers find imported."""
_UNHEARD = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""Meant for the owner or for workers; the nursery ends when the owner hangs up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Birth:
    """A worker that is asked for.

    Args:
        slot: Which one; there is at most one process of a slot at a time.
        script: Path of the script that it runs; None: the package's own command line.
        arguments: What follows the program's name.
        environ: Variables besides those of the nursery.
        name_variable: The variable that gets the worker's name, HOST-PID-SLOT.
    """

    slot: str
    script: str | None
    arguments: Sequence[str]
    environ: dict[str, str]
    name_variable: str


def worker_name(pid: int, slot: str) -> str:
    """The name of a slot's process, for its whole life."""
    return f"{socket.gethostname()}-{pid}-{slot}"


def serve(descriptor: int, owner: int, modules: Sequence[str] = PRELOADED) -> None:
    """Import, then fork workers until the owner hangs up; in a worker this returns when its program has ended.

    Args:
        descriptor: A Unix stream socket to the owner: a line of JSON for each message.
        owner: The owner's process id.
        modules: What to import first.
    """
    end_with_parent(owner)
    ending = _Ending()
    atexit.register(ending.leave)  # first to come, last to be called
    for number in _UNHEARD:
        signal.signal(number, signal.SIG_IGN)
    for module in modules:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # what is there now stays shared between all workers
    # From here on the socket tells, and workers' whole process groups are ended, not only the workers.
    outlive_parent()
    birth = _Nursery(socket.socket(fileno=descriptor)).run()
    if birth is None:
        os._exit(0)  # nothing to tidy up
    _live(birth, ending)


class _Nursery:
    """Serves one owner.

    Args:
        owner: The connection to it.
    """

    def __init__(self, owner: socket.socket) -> None:
        self._owner = owner
        self._unread = b""
        self._outputs: deque[int] = deque()
        self._requests: deque[dict[str, Any]] = deque()
        self._slots: dict[int, str] = {}
        self._wakeup, self._waker = socket.socketpair()
        self._waker.setblocking(False)
        signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)

    def run(self) -> Birth | None:
        """Serve until the owner hangs up: None. In a worker: what it is to do."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._owner, selectors.EVENT_READ)
            selector.register(self._wakeup, selectors.EVENT_READ)
            while True:
                ready = {key.fileobj for key, _ in selector.select()}
                if self._wakeup in ready:
                    self._wakeup.recv(4096)
                if self._owner in ready and not self._receive():
                    self._end_all()
                    return None
                while self._requests:
                    birth = self._obey(self._requests.popleft())
                    if birth is not None:
                        return birth
                self._reap()

    def _receive(self) -> bool:
        """Read what the owner wrote; False if it has hung up."""
        try:
            data, descriptors, _, _ = socket.recv_fds(self._owner, 1 << 16, 16)
        except OSError:
            return False
        self._outputs.extend(descriptors)
        *lines, self._unread = (self._unread + data).split(b"\n")
        self._requests.extend(json.loads(line) for line in lines)
        return bool(data)

    def _obey(self, request: dict[str, Any]) -> Birth | None:
        """Do what a request says; only in a new worker there is a result."""
        if "signal" in request:
            self._signal(request["slot"], request["signal"])
            return None
        birth, output, nursery = Birth(**request), self._outputs.popleft(), os.getpid()
        pid = os.fork()
        if pid == 0:
            self._let_go()
            _begin(birth, output, nursery)
            return birth
        os.close(output)
        self._slots[pid] = birth.slot
        self._say(started=birth.slot, pid=pid)
        return None

    def _signal(self, slot: str, number: int) -> None:
        for pid in [pid for pid, other in self._slots.items() if other == slot]:
            if number == signal.SIGKILL:
                _kill_group(pid)
            else:
                os.kill(pid, number)  # a child that has not been waited for: the number is still its own

    def _reap(self) -> None:
        while self._slots:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is None:
                return
            pid = ended.si_pid
            if ended.si_code != os.CLD_EXITED:
                _kill_group(pid)  # what it could not end itself
            _, status = os.waitpid(pid, 0)
            self._say(ended=self._slots.pop(pid), pid=pid, code=os.waitstatus_to_exitcode(status))

    def _say(self, **message: object) -> None:
        try:
            self._owner.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            return  # it has hung up, which the next read tells

    def _end_all(self) -> None:
        for pid in self._slots:
            _kill_group(pid)

    def _let_go(self) -> None:
        """In a worker: drop what belongs to the nursery alone."""
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, *_UNHEARD):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for connection in (self._owner, self._wakeup, self._waker):
            connection.close()
        for output in self._outputs:
            os.close(output)


def _kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:  # it has not become a leader yet
        os.kill(pid, signal.SIGKILL)


def _begin(birth: Birth, output: int, nursery: int) -> None:
    """Make a fork a process of its own."""
    os.setsid()
    end_with_parent(nursery)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    # A worker's lines are read as they come.
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr] # None and others only under pythonw
    os.environ.update(birth.environ)
    os.environ[birth.name_variable] = worker_name(os.getpid(), birth.slot)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()  # or all workers would draw what the nursery would have drawn


class _Ending:
    """How a worker's interpreter ends: when all else is done, at once.

    Taking torch's modules apart would cost a second, and touch all memory that is shared with the nursery.

    Attributes:
        code: The exit code.
    """

    def __init__(self) -> None:
        self.code = 0

    def leave(self) -> None:
        """End this process."""
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(self.code)


def _live(birth: Birth, ending: _Ending) -> None:
    """Run a worker's program as `python` would."""
    try:
        _run(birth)
    except SystemExit as error:
        ending.code = error.code & 0xFF if isinstance(error.code, int) else int(error.code is not None)
        raise
    except BaseException as error:
        ending.code = 1
        error.__traceback__ = _part_of(error.__traceback__, birth.script)
        sys.excepthook(type(error), error, error.__traceback__)
        raise SystemExit(1) from None


def _run(birth: Birth) -> None:
    if birth.script is None:
        sys.argv = ["elastic-batch", *birth.arguments]
        runpy.run_module("elastic_batch", run_name="__main__")
        return
    sys.argv = [birth.script, *birth.arguments]
    if not sys.flags.safe_path:
        sys.path[0] = str(Path(birth.script).resolve().parent)
    runpy.run_path(birth.script, run_name="__main__")


def _part_of(traceback: TracebackType | None, script: str | None) -> TracebackType | None:
    """A traceback from the user's file on."""
    part = traceback
    while part is not None and part.tb_frame.f_code.co_filename != script:
        part = part.tb_next
    return part or traceback
