"""`coordinator.json`: where the coordinator is and what opens its door, for those who may read the run directory."""

from __future__ import annotations

import json
import os
import secrets
import socket
from dataclasses import asdict, dataclass, field
from pathlib import Path

from elastic_batch.durable import PendingFile, temporary_beside
from elastic_batch.errors import InvalidSetting

FILE = "coordinator.json"
_SHORTEST_TOKEN = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Announcement:
    """What `coordinator.json` says.

    Args:
        url: `http://host:port` or `https://host:port`.
        token: What every request carries.
        run_id: The run's name.
        pid: The coordinator's process.
        version: The package's.
        tls_cert: PEM file that a client trusts for `https`; None: the machine's usual authorities.
        ended: Why the run was over when the coordinator ended; None: it is not.
        completed_end: The job's end, in samples, once it is complete; workers that come later and want no more need
            not wait. None: it is not complete.
        host: The name of the coordinator's host; None: it does not say.
    """

    url: str
    token: str
    run_id: str
    pid: int
    version: str
    tls_cert: str | None = None
    ended: str | None = None
    completed_end: int | None = None
    host: str | None = field(default_factory=socket.gethostname)

    @property
    def port(self) -> int:
        """The port in `url`."""
        return int(self.url.rpartition(":")[2])


def read_announcement(run_dir: Path) -> Announcement | None:
    """What the coordinator of a run directory says, or said before it ended; None: there was none.

    Raises:
        InvalidSetting: The file cannot be read or is not a coordinator's.
    """
    path = run_dir / FILE
    try:
        found = json.loads(path.read_bytes())
        text = {name: found[name] for name in ("url", "token", "run_id", "version")}
        if not all(isinstance(value, str) for value in text.values()):
            raise TypeError("a field is not a text")
        optional = {name: found.get(name) for name in ("tls_cert", "ended", "completed_end", "host")}
        return Announcement(**text, pid=int(found["pid"]), **optional)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InvalidSetting(
            "--run-dir", str(run_dir), f"must hold a readable {FILE} ({error})", "Remove that file to have it made anew"
        ) from error


def write_announcement(run_dir: Path, announcement: Announcement) -> None:
    """Replace the file, all or nothing; nobody but its owner can read it at any time."""
    with PendingFile(temporary_beside(run_dir / FILE)) as pending:
        os.chmod(pending.path, 0o600)
        pending.write((json.dumps(asdict(announcement), indent=2) + "\n").encode())
        pending.sync()
        pending.publish(run_dir / FILE)


def choose_token(token_file: Path | None, last: Announcement | None) -> str:
    """The token from its file; else the last coordinator's, else a new one.

    Raises:
        InvalidSetting: The file cannot be read, or its token is too short or cannot stand in a header.
    """
    if token_file is None:
        return last.token if last is not None else secrets.token_urlsafe(32)
    try:
        token = token_file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidSetting("--token-file", str(token_file), f"must be readable ({error})") from error
    if len(token) < _SHORTEST_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
        raise InvalidSetting(
            "--token-file",
            str(token_file),
            f"must hold one token of at least {_SHORTEST_TOKEN} ASCII characters without spaces",
            "Make one with: openssl rand -hex 32",
        )
    return token
