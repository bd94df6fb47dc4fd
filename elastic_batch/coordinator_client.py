"""Asks a coordinator over HTTP, for the command line. It finds it by the run directory or by address and token."""

from __future__ import annotations

import json
import ssl
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import httpx

from elastic_batch.coordinator.announcement import read_announcement
from elastic_batch.errors import ElasticBatchError, InvalidSetting
from elastic_batch.protocol import require_address
from elastic_batch.scaling.link import require_reachable

RUN_DIR, COORDINATOR, TOKEN_FILE = "ELASTIC_BATCH_RUN_DIR", "ELASTIC_BATCH_COORDINATOR", "ELASTIC_BATCH_TOKEN_FILE"
_SECONDS = 5.0


class CoordinatorSilent(ElasticBatchError):
    """The coordinator cannot be reached, or does not let this client in."""


class RunOver(CoordinatorSilent):
    """The run is complete or was stopped, and its coordinator has ended.

    Args:
        run_id: The run's name.
        ended: Why it is over.
        num_samples: How many samples it committed; None: it is not complete, or nobody said.
    """

    def __init__(self, run_id: str, ended: str, num_samples: int | None) -> None:
        self.run_id, self.ended, self.num_samples = run_id, ended, num_samples
        samples = "" if num_samples is None else f" ({num_samples} samples)"
        super().__init__(f"run {run_id}: {ended}{samples}; its coordinator has ended")


class UnknownWorker(ElasticBatchError):
    """There is no worker of that name; the message has the nearest one."""


class CoordinatorClient:
    """A coordinator, as seen from outside; a context manager.

    Args:
        url: `http://host:port` or `https://host:port`.
        token: What opens its door.
        tls_cert: PEM file to trust for `https`; None: the machine's usual authorities.
        run_dir: The run's directory; None: it is not known.
    """

    def __init__(self, url: str, token: str, tls_cert: str | None = None, run_dir: Path | None = None) -> None:
        self.url = url
        self._run_dir = run_dir
        verify: ssl.SSLContext | bool = ssl.create_default_context(cafile=tls_cert) if tls_cert else True
        # Proxies of the environment are for other places.
        self._client = httpx.Client(
            base_url=url,
            headers={"Authorization": f"Bearer {token}"},
            timeout=_SECONDS,
            trust_env=False,
            verify=verify,
        )

    @classmethod
    def find(
        cls,
        environ: Mapping[str, str],
        *,
        run_dir: Path | None = None,
        url: str | None = None,
        token_file: Path | None = None,
    ) -> CoordinatorClient:
        """The coordinator that flags or the environment name; flags win.

        Raises:
            InvalidSetting: Neither does, or a file cannot be used.
        """
        if run_dir is None and url is None:
            run_dir = Path(environ[RUN_DIR]) if RUN_DIR in environ else None
            url = environ.get(COORDINATOR)
        token_file = token_file or (Path(environ[TOKEN_FILE]) if TOKEN_FILE in environ else None)
        if url is not None:
            require_address("--coordinator", url)
        announced = read_announcement(run_dir) if run_dir is not None else None
        if announced is not None:
            if url is None and announced.completed_end is None:
                require_reachable(announced.url, announced.host)
            return cls(url or announced.url, announced.token, announced.tls_cert, run_dir)
        if url is not None and token_file is not None:
            return cls(url, *_read_token(token_file))
        if run_dir is not None:
            raise InvalidSetting("--run-dir", str(run_dir), "must hold the coordinator.json of an elastic run")
        if url is not None:
            raise InvalidSetting("--token-file", None, "is required with --coordinator")
        raise InvalidSetting(
            "--run-dir", None, "must be known", f"Give --run-dir, or --coordinator and --token-file, or set {RUN_DIR}"
        )

    def status(self) -> dict[str, Any]:
        """How things stand: what `GET /status` gives.

        Raises:
            RunOver: It has ended with the run.
            CoordinatorSilent: It cannot be reached.
        """
        found: dict[str, Any] = self._ask("GET", "/status").json()
        return found

    def drain(self, worker: str) -> None:
        """Ask a worker to leave at the next boundary.

        Raises:
            UnknownWorker: There is none of that name.
            CoordinatorSilent: The coordinator cannot be reached.
        """
        answer = self._ask("POST", f"/workers/{quote(worker, safe='')}/drain", accepted=(200, 404))
        if answer.status_code == 404:
            raise UnknownWorker(str(answer.json().get("error", f"there is no worker {worker!r}")))

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, method: str, path: str, accepted: tuple[int, ...] = (200,)) -> httpx.Response:
        try:
            answer = self._client.request(method, path)
        except httpx.HTTPError as error:
            raise self._silence(error) from error
        if answer.status_code not in accepted:
            raise CoordinatorSilent(f"the coordinator at {self.url} refuses: {_reason(answer)}")
        return answer

    def _silence(self, error: httpx.HTTPError) -> CoordinatorSilent:
        """What it means that there is no answer."""
        announced = read_announcement(self._run_dir) if self._run_dir is not None else None
        if announced is not None and announced.ended is not None:
            return RunOver(announced.run_id, announced.ended, announced.completed_end)
        return CoordinatorSilent(
            f"the coordinator at {self.url} does not answer ({error}). If workers are still running, training goes on; "
            f"start it again with: elastic-batch coordinator --run-dir {self._run_dir or 'DIR'}"
        )


def _reason(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["error"])
    except (ValueError, KeyError, TypeError):
        return f"status {answer.status_code}"


def _read_token(path: Path) -> tuple[str, str | None]:
    """The token, and the certificate to trust if the file is a coordinator's announcement."""
    try:
        text = path.read_text(encoding="utf-8").strip()
        found = json.loads(text) if text.startswith("{") else {"token": text}
        return str(found["token"]), found.get("tls_cert")
    except (OSError, ValueError, KeyError) as error:
        raise InvalidSetting("--token-file", str(path), f"must be readable and hold the token ({error})") from error
