"""What a worker and the coordinator say to each other: versioned, typed messages, one JSON text each.

A worker opens a WebSocket, says `Hello` and hears `Welcome` or `Refused`; after that both sides may speak at any time.
"""

from __future__ import annotations

import json
import zlib
from base64 import b64decode, b64encode
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, TypeAdapter

from elastic_batch.errors import InvalidSetting

VERSION = 1
"""Raised with every change that an older peer would misunderstand; peers of different versions refuse each other."""
PATH = "/worker"
"""Where the coordinator accepts workers."""
MAX_MESSAGE_BYTES = 1 << 20


_MAX_PACKED_NAMES_BYTES = 16 << 20


def _pack(names: tuple[str, ...]) -> str:
    return b64encode(zlib.compress(json.dumps(names).encode())).decode()


def _unpack(said: Any) -> Any:
    if not isinstance(said, str):
        return said
    try:
        return json.loads(zlib.decompressobj().decompress(b64decode(said), _MAX_PACKED_NAMES_BYTES))
    except (zlib.error, RecursionError) as error:
        raise ValueError(f"the names cannot be unpacked: {error}") from None


Names = Annotated[tuple[str, ...], BeforeValidator(_unpack), PlainSerializer(_pack, when_used="json")]
"""Workers by rank, compressed on the wire: a world of thousands is told to each of them."""


class Message(BaseModel):
    """The base of all messages."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Hello(Message):
    """First from a worker, on each connection."""

    kind: Literal["hello"] = "hello"
    version: int = VERSION
    package: str
    """Version of this package."""
    worker: str = Field(min_length=1, max_length=300)
    """The process's name for its whole life, the same on each connection."""
    slot: str = Field(max_length=300)
    """What is started again when this worker dies, such as `local-2`; crashes are counted by it."""
    host: str
    address: str
    """Where the other workers reach it."""
    pid: int
    generation: int = -1
    """The world that it is in; -1: none."""
    members: Names = ()
    """That world's workers, by rank."""
    run_id: str | None = None
    """The run that it belongs to, once it has heard that."""


class Ready(Message):
    """The worker waits for a world: it is warm, and out of the world `after`."""

    kind: Literal["ready"] = "ready"
    after: int = -1
    """Generation of the world that it was in; -1: none yet."""
    broken: bool = False
    """Whether that world broke; else it was left at a boundary."""
    reason: str = ""
    num_micro_batches: int = Field(ge=1)
    """Micro-batches of the update that comes next: more workers than that have nothing to do."""
    job: dict[str, Any] = Field(default_factory=dict)
    """What alters the trajectory; workers of one run have the same."""
    newest_writer: int = -1
    """The newest generation that has written checkpoints of this run: worlds to come must be newer. -1: none."""


class Entered(Message):
    """The worker is in the world, its state is that of the others."""

    kind: Literal["entered"] = "entered"
    generation: int
    sync_seconds: float = Field(default=0, ge=0)
    """How long agreeing on the state took, once the world was formed."""


class Beat(Message):
    """Sign of life, once in `Welcome.beat_seconds`."""

    kind: Literal["beat"] = "beat"
    update: int
    position: int
    stage: str = Field(max_length=20)
    """What its training thread is at."""
    num_micro_batches: int = Field(ge=1)
    busy_seconds: float = 0
    """How much longer, at most, the stage may take without being a stall: compiling, loading."""


class Progress(Message):
    """What the lead worker records: its newest update, at most ten a second, and everything else."""

    kind: Literal["progress"] = "progress"
    generation: int
    record: dict[str, Any]
    """With an update's or evaluation's `kind` its line in the metrics log; else see `telemetry.Metrics.happened`."""
    skipped: int = Field(default=0, ge=0)
    """Updates since the last report that consumed their samples but changed nothing; this one included."""


class Leaving(Message):
    """The worker was told to end (SIGTERM); it leaves at the next boundary."""

    kind: Literal["leaving"] = "leaving"


class Bye(Message):
    """Last from a worker."""

    kind: Literal["bye"] = "bye"
    reason: Literal["left", "finished", "stopped", "failed"]
    """`finished`: the job is complete. `stopped`: all workers stopped after the same update; it can be resumed."""
    text: str = ""


class StoreRequest(Message):
    """One operation on the store through which the workers of a generation find each other."""

    kind: Literal["store"] = "store"
    request: int
    generation: int
    operation: Literal["set", "get", "add", "check", "delete", "compare_set", "append"]
    keys: tuple[str, ...]
    value: str = ""
    """Base64."""
    expected: str = ""
    """Base64; of `compare_set`."""
    amount: int = 0
    wait_seconds: float = Field(default=0, ge=0)
    """How long `get` waits for all its keys."""


class Welcome(Message):
    """The worker is known."""

    kind: Literal["welcome"] = "welcome"
    run_id: str
    beat_seconds: float
    generation: int
    """The newest world's. A worker whose own is older drops its state."""


class Refused(Message):
    """The worker cannot take part; it ends with this error."""

    kind: Literal["refused"] = "refused"
    reason: str


class Form(Message):
    """Form this world."""

    kind: Literal["form"] = "form"
    generation: int
    members: Names
    """Workers by rank."""
    all_on_loopback: bool
    """Whether all workers are reached over the loopback interface."""
    seconds: float
    """How long forming may take."""


class Regroup(Message):
    """Leave the world at the next boundary: another one waits to be formed."""

    kind: Literal["regroup"] = "regroup"
    generation: int
    reason: str


class Probe(Message):
    """A fellow's connection to the coordinator ended: see whether it is gone from the world too."""

    kind: Literal["probe"] = "probe"
    generation: int


class Abort(Message):
    """The world is over, or was never formed: stop waiting for its collectives and say `Ready`."""

    kind: Literal["abort"] = "abort"
    generation: int
    reason: str


class Leave(Message):
    """Leave at the next boundary and end."""

    kind: Literal["leave"] = "leave"
    reason: str


class Stop(Message):
    """Stop the run on all workers after the same update, with a checkpoint."""

    kind: Literal["stop"] = "stop"
    reason: str


class End(Message):
    """The job is complete; a worker outside the world ends."""

    kind: Literal["end"] = "end"
    reason: str


class StoreReply(Message):
    """Answer to a `StoreRequest`."""

    kind: Literal["store_reply"] = "store_reply"
    request: int
    values: tuple[str, ...] = ()
    """Base64, in the order of the keys."""
    number: int = 0
    error: str | None = None


FromWorker = Hello | Ready | Entered | Beat | Progress | Leaving | Bye | StoreRequest
FromCoordinator = Welcome | Refused | Form | Regroup | Probe | Abort | Leave | Stop | End | StoreReply

_FROM_WORKER: TypeAdapter[FromWorker] = TypeAdapter(Annotated[FromWorker, Field(discriminator="kind")])
_FROM_COORDINATOR: TypeAdapter[FromCoordinator] = TypeAdapter(Annotated[FromCoordinator, Field(discriminator="kind")])


def is_loopback(address: str) -> bool:
    """Whether an address in `Hello` is reached on its own host alone."""
    return address.startswith("127.") or address in ("::1", "localhost")


def require_address(setting: str, url: str) -> None:
    """Refuse what is no coordinator's address.

    Raises:
        InvalidSetting: It is not of HTTP, or names no host.
    """
    found = urlsplit(url)
    if found.scheme not in ("http", "https") or not found.hostname:
        raise InvalidSetting(setting, url, "must be an address such as http://10.0.0.1:7077")


def parse_from_worker(text: str | bytes) -> FromWorker:
    """A worker's message.

    Raises:
        ValueError: It is none.
    """
    return _FROM_WORKER.validate_json(text)


def parse_from_coordinator(text: str | bytes) -> FromCoordinator:
    """A message of the coordinator.

    Raises:
        ValueError: It is none.
    """
    return _FROM_COORDINATOR.validate_json(text)
