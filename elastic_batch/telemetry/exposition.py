"""How metrics leave the process: over HTTP for Prometheus, or in a text file for node_exporter."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from prometheus_client import CollectorRegistry, start_http_server, write_to_textfile

from elastic_batch.errors import InvalidSetting

logger = logging.getLogger(__name__)


class MetricsServer:
    """An HTTP server of a registry's metrics, on threads of its own, until `close`.

    It asks nobody who they are: bind it to loopback, or to a network where all may read.

    Args:
        registry: What to serve.
        port: Where; 0 takes a free one.
        address: The address to bind to.

    Raises:
        InvalidSetting: The port is taken or the address is not this machine's.
    """

    def __init__(self, registry: CollectorRegistry, port: int, address: str = "127.0.0.1") -> None:
        try:
            self._server, self._thread = start_http_server(port, address, registry)
        except (OSError, OverflowError) as error:
            raise InvalidSetting(
                "metrics_port", port, f"must be a free port on {address} ({error})", "Choose another, or 0 for any"
            ) from error
        self.port: int = self._server.server_port
        self.url = f"http://{address}:{self.port}/metrics"

    def close(self) -> None:
        """Stop serving and free the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def serve(registry: CollectorRegistry, port: int, address: str = "127.0.0.1") -> MetricsServer:
    """Serve a registry's metrics over HTTP; see `MetricsServer`."""
    return MetricsServer(registry, port, address)


class MetricsFile:
    """Keeps a text file of a registry's metrics for node_exporter's textfile collector.

    Args:
        registry: What to write.
        path: A file that ends with `.prom`, which the collector asks for; replaced whole each time.
        interval_seconds: Least time between two writings.
        clock: Monotonic seconds.

    Raises:
        InvalidSetting: The name does not end with `.prom`.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        path: str | os.PathLike[str],
        *,
        interval_seconds: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._registry, self._path, self._clock = registry, os.fspath(path), clock
        self._interval_seconds = interval_seconds
        self._written_at = self._complained_at = -float("inf")
        if not self._path.endswith(".prom"):
            raise InvalidSetting("metrics_file", self._path, "must end with .prom, or node_exporter passes it over")

    def maybe_write(self) -> None:
        """Write the file if it is time."""
        if self._clock() - self._written_at >= self._interval_seconds:
            self.write()

    def write(self) -> None:
        """Write the file now; a full disk is logged once a minute and ends nothing."""
        self._written_at = self._clock()
        try:
            write_to_textfile(self._path, self._registry)
        except OSError as error:
            if self._clock() - self._complained_at >= 60:
                self._complained_at = self._clock()
                logger.error("cannot write metrics to %s: %s", self._path, error)
