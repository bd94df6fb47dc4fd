"""The coordinator's listening socket, and the address under which others reach it."""

from __future__ import annotations

import contextlib
import errno
import resource
import socket

from elastic_batch.coordinator.config import CoordinatorConfig
from elastic_batch.errors import InvalidSetting

_WILDCARDS = ("0.0.0.0", "::", "")
_ANYWHERE = ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1"))
"""Of ranges for documentation; nothing is sent there."""


def bind(config: CoordinatorConfig, last_port: int) -> socket.socket:
    """A listening socket; where any port will do, the last one if it is free.

    Args:
        config: Where to listen.
        last_port: The port of the last coordinator of this run; 0: there was none.

    Raises:
        InvalidSetting: The port is taken, or the address is not this machine's.
    """
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    if not config.port and last_port:
        with contextlib.suppress(OSError):
            return _listen(config.host, last_port, family)
    try:
        return _listen(config.host, config.port, family)
    except OSError as error:
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            rule, remedy = f"must be free on {config.host} ({error.strerror})", "Choose another, or 0 for any free one"
            raise InvalidSetting("--port", config.port, rule, remedy) from error
        rule = f"must be an address of this machine ({error.strerror})"
        raise InvalidSetting("--host", config.host, rule, "0.0.0.0 is all of them") from error


def public_url(config: CoordinatorConfig, listener: socket.socket) -> str:
    """Where others reach the listener."""
    scheme = "https" if config.tls_cert else "http"
    host = config.advertise or (_own_address(listener) if config.host in _WILDCARDS else config.host)
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"


def allow_many_connections() -> None:
    """Raise the number of files that this process may have open to what the system lets it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # some systems name a limit that they do not grant
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _listen(host: str, port: int, family: socket.AddressFamily) -> socket.socket:
    both = family == socket.AF_INET6 and host == "::" and socket.has_dualstack_ipv6()
    listener = socket.create_server((host, port), family=family, backlog=4096, dualstack_ipv6=both)
    # Connections inherit it. asyncio sets it on sockets that name their protocol, which accepted ones here do not; and
    # without it a message that follows another one waits 40 ms for the first one's acknowledgement.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _own_address(listener: socket.socket) -> str:
    """The address of the interface that leads out; loopback where none does."""
    for family, anywhere in _ANYWHERE:
        if family == socket.AF_INET6 != listener.family:
            continue
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((anywhere, 9))
            return str(probe.getsockname()[0])
    return "127.0.0.1"
