"""Where the coordinator is and what opens its door: from the environment, or from the run directory's file."""

from __future__ import annotations

import errno
import json
import os
import secrets
import socket
import ssl
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elastic_batch.errors import InvalidSetting
from elastic_batch.protocol import PATH, require_address

COORDINATOR, TOKEN_FILE, RUN_DIR = "ELASTIC_BATCH_COORDINATOR", "ELASTIC_BATCH_TOKEN_FILE", "ELASTIC_BATCH_RUN_DIR"
SLOT, NAME, ADDRESS = "ELASTIC_BATCH_SLOT", "ELASTIC_BATCH_WORKER_NAME", "ELASTIC_BATCH_ADDRESS"
GOES_ON = "ELASTIC_BATCH_GOES_ON"
ANNOUNCEMENT = "coordinator.json"


_PASSING = {errno.ESTALE, errno.EIO, errno.EMFILE, errno.ENFILE, errno.EINTR, errno.EAGAIN, errno.ETIMEDOUT}


@dataclass(frozen=True, slots=True)
class Door:
    """A coordinator's address and token.

    Args:
        url: `http://host:port` or `https://host:port`.
        token: What every request carries.
        tls_cert: PEM file that is trusted for https; None: the machine's usual authorities.
    """

    url: str
    token: str
    tls_cert: str | None = None

    @property
    def tls(self) -> ssl.SSLContext | None:
        """How the connection is secured; None: it is not."""
        return ssl.create_default_context(cafile=self.tls_cert) if self.url.startswith("https") else None

    @property
    def websocket_url(self) -> str:
        """Where workers connect."""
        return "ws" + self.url.removeprefix("http").rstrip("/") + PATH


@dataclass(frozen=True, slots=True)
class Credentials:
    """How a worker finds the coordinator and presents itself.

    Args:
        url: The coordinator's address; None: as the run directory says.
        token_file: A file with the token, or a coordinator's announcement.
        run_dir: The run's directory, where the coordinator announces itself.
        name: The worker's name.
        slot: What is started again when the worker dies.
        address: Where the other workers reach this host; None: the interface that reaches the coordinator.
        goes_on: Whether the run had made progress when this worker was started.
    """

    url: str | None
    token_file: Path | None
    run_dir: Path | None
    name: str
    slot: str
    address: str | None
    goes_on: bool = False

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Credentials:
        """What `ELASTIC_BATCH_*` say.

        Raises:
            InvalidSetting: The address is none, or there is no token.
        """
        url, token_file, run_dir = environ.get(COORDINATOR), environ.get(TOKEN_FILE), environ.get(RUN_DIR)
        if url is not None:
            require_address(COORDINATOR, url)
        if token_file is None and run_dir is None:
            raise InvalidSetting(TOKEN_FILE, None, f"must name a file with the token, or {RUN_DIR} the run's directory")
        host = socket.gethostname()
        return cls(
            url=url,
            token_file=Path(token_file) if token_file else None,
            run_dir=Path(run_dir) if run_dir else None,
            name=environ.get(NAME) or f"{host}-{os.getpid()}-{secrets.token_hex(2)}",
            slot=environ.get(SLOT) or host,
            address=environ.get(ADDRESS),
            goes_on=bool(environ.get(GOES_ON)),
        )

    def door(self) -> Door:
        """The coordinator as it is announced now; a restarted one may have moved.

        Raises:
            OSError: No coordinator has announced itself yet, or its announcement cannot be read at the moment.
            InvalidSetting: A file may not be read or does not hold what it should.
        """
        announced = _announcement(self.run_dir / ANNOUNCEMENT) if self.run_dir is not None else {}
        if not announced and self.url is None:
            raise FileNotFoundError(f"{self.run_dir} has no {ANNOUNCEMENT} yet")
        url = self.url or announced.get("url")
        # An announcement as the token's file says which certificate to trust, too.
        announced |= _token(self.token_file) if self.token_file is not None else {}
        token = announced.get("token")
        if not url or not token:
            raise InvalidSetting(COORDINATOR, url, "must be known, and its token too", f"Give {COORDINATOR}")
        return Door(url, token, announced.get("tls_cert"))

    def completed_end(self) -> float:
        """The job's end, in samples, at which it was complete when its coordinator ended; -1: nobody says so."""
        announced: dict[str, Any] = {}
        with suppress(OSError):
            announced = _announcement(self.run_dir / ANNOUNCEMENT) if self.run_dir is not None else {}
        found = announced.get("completed_end")
        return found if isinstance(found, int | float) else -1


def _announcement(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        _raise_if_passing(error)
        raise InvalidSetting(RUN_DIR, path.parent, f"must hold a readable {ANNOUNCEMENT} ({error})") from None
    return found if isinstance(found, dict) else {}


def _token(path: Path) -> dict[str, Any]:
    """A file with the token alone, or an announcement."""
    try:
        text = path.read_text(encoding="utf-8").strip()
    except OSError as error:
        _raise_if_passing(error)
        raise InvalidSetting(TOKEN_FILE, path, f"must be readable ({error.strerror})") from None
    return _announcement(path) if text.startswith("{") else {"token": text}


def _raise_if_passing(error: OSError | ValueError) -> None:
    """Raise what another try may not meet, such as a network file system's handle that has gone stale."""
    if isinstance(error, OSError) and error.errno in _PASSING:
        raise error
