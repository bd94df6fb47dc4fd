"""What a supervisor asks of the coordinator and tells it, over HTTP."""

from __future__ import annotations

import json
import socket
import ssl
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from elastic_batch.errors import InvalidSetting
from elastic_batch.protocol import is_loopback

ANNOUNCEMENT = "coordinator.json"
_SECONDS = 2.0
_ENTERED = ("active", "spare", "draining")


class CoordinatorAway(Exception):
    """The coordinator does not answer now; it may be starting again."""


class CoordinatorElsewhere(CoordinatorAway):
    """It serves another host alone, unless what it announced is of an earlier one."""


class Status(dict[str, Any]):
    """What `GET /status` gives."""

    @property
    def wanted(self) -> int:
        """How many workers the job wants in its world now."""
        return int(self.get("desired_workers") or 0)

    @property
    def is_over(self) -> bool:
        """Whether the run is: complete or stopped."""
        return self.get("ended") is not None

    @property
    def is_complete(self) -> bool:
        """Whether the job is."""
        return self.is_over and not str(self["ended"]).startswith("stopped")

    @property
    def position(self) -> int:
        """Samples committed."""
        return int(self.get("position") or 0)

    @property
    def members(self) -> set[str]:
        """Names of the workers in the world."""
        return {worker["name"] for worker in self.get("workers", ()) if worker.get("state") in _ENTERED}


class CoordinatorLink:
    """Speaks to the coordinator that a run directory or an address names; a restarted one is found again.

    Args:
        url: Its address; None: as the run directory's `coordinator.json` says.
        token_file: A file with the token, or a `coordinator.json`; None: the run directory's.
        run_dir: Where `coordinator.json` is looked for.
    """

    def __init__(self, *, url: str | None = None, token_file: Path | None = None, run_dir: Path | None = None) -> None:
        self._url = url
        self._files = [path for path in (token_file, run_dir / ANNOUNCEMENT if run_dir else None) if path is not None]
        self._client: httpx.AsyncClient | None = None

    async def status(self) -> Status:
        """How things stand.

        Raises:
            CoordinatorAway: It does not answer.
        """
        return Status(await self._ask("GET", "/status"))

    def announced_end(self) -> str | None:
        """Why the run was over when its coordinator went, as its announcement says; None: it does not."""
        try:
            return self._read_announced().get("ended")
        except CoordinatorAway:
            return None

    async def exited(self, worker: str) -> None:
        """A worker's process was seen to end.

        Raises:
            CoordinatorAway: It does not answer.
        """
        await self._ask("POST", f"/workers/{worker}/exited")

    async def stop(self, reason: str) -> None:
        """Stop the run on all workers after the same update, with a checkpoint.

        Raises:
            CoordinatorAway: It does not answer.
        """
        await self._ask("POST", "/stop", {"reason": reason})

    async def close(self) -> None:
        """Close the connection."""
        if self._client is not None:
            await self._client.aclose()
            self._client = None

    async def _ask(self, method: str, path: str, body: dict[str, str] | None = None) -> dict[str, Any]:
        try:
            client = await self._open()
            answer = await client.request(method, path, json=body)
            answer.raise_for_status()
            found = answer.json() if answer.content else {}
        # Another request may just have closed the client; what is announced may be no address.
        except (httpx.HTTPError, httpx.InvalidURL, RuntimeError, ValueError) as error:
            await self.close()  # it may have moved
            raise CoordinatorAway(str(error) or type(error).__name__) from error
        return found if isinstance(found, dict) else {}

    async def _open(self) -> httpx.AsyncClient:
        if self._client is not None:
            return self._client
        url, token, certificate = self._read_door()
        # Without TLS none is prepared: that takes long, and a coordinator that is away is asked again and again.
        is_secure = url.startswith("https")
        try:
            verify = ssl.create_default_context(cafile=certificate) if is_secure else False
        except OSError as error:
            raise CoordinatorAway(f"{certificate} cannot be read ({error})") from error
        headers = {"Authorization": f"Bearer {token}"}
        # Proxies of the environment are for other places.
        self._client = httpx.AsyncClient(
            base_url=url, headers=headers, timeout=_SECONDS, trust_env=False, verify=verify
        )
        return self._client

    def _read_door(self) -> tuple[str, str, str | None]:
        """Address, token and, for TLS, the certificate to trust, as they are announced now."""
        found = self._read_announced()
        if self._url is None and "url" in found:
            try:
                require_reachable(found["url"], found.get("host"))
            except InvalidSetting as error:
                raise CoordinatorElsewhere(str(error)) from error
        url = self._url or found.get("url")
        if not url or not found.get("token"):
            raise CoordinatorAway("no coordinator has announced itself yet")
        return url, found["token"], found.get("tls_cert")

    def _read_announced(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for path in reversed(self._files):
            found |= _read(path)
        return found


def require_reachable(url: str, host: str | None) -> None:
    """Refuse a coordinator that is reached on its own host alone, if this is another one.

    Args:
        url: Its address, as it announces it.
        host: Its host's name, as it announces it; None: it does not say.

    Raises:
        InvalidSetting: Asking it is in vain.
    """
    here = socket.gethostname()
    if is_loopback(urlsplit(url).hostname or "") and host not in (None, here):
        rule = f"listens on {host} for workers of that host alone, and this is {here}"
        raise InvalidSetting("coordinator", url, rule, "Start the run with --host 0.0.0.0, then try again here")


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8").strip()
        found = json.loads(text) if text.startswith("{") else {"token": text}
    except (OSError, ValueError) as error:
        raise CoordinatorAway(f"{path} cannot be read ({error})") from error
    return found if isinstance(found, dict) else {}
