"""The coordinator's settings, as its command line gives them."""

from __future__ import annotations

import math
import re
import ssl
from dataclasses import dataclass, field, fields
from ipaddress import ip_address
from pathlib import Path

from elastic_batch.coordinator.announcement import choose_token
from elastic_batch.coordinator.state import MembershipConfig
from elastic_batch.errors import InvalidSetting

_TIMES = [one.name for one in fields(MembershipConfig) if one.type == "float"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CoordinatorConfig:
    """Where the coordinator serves, and for whom.

    Args:
        run_dir: The run's directory; journal and announcement lie there.
        host: The address to bind to.
        port: The port; 0 takes the one of the last time if it is free, else any.
        advertise: Host name or address under which others reach it; None: `host`, or the machine's address where that
            is a wildcard.
        allowed_hosts: Further names under which it may be called, such as that of a Kubernetes service.
        token_file: File with the token; None: that of the last time, else a new one.
        tls_cert: PEM file with the certificate and its chain.
        tls_key: PEM file with its key.
        membership: How membership is decided.

    Raises:
        InvalidSetting: A setting is impossible; the message names the flag.
    """

    run_dir: Path
    host: str = "127.0.0.1"
    port: int = 0
    advertise: str | None = None
    allowed_hosts: tuple[str, ...] = ()
    token_file: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    membership: MembershipConfig = field(default_factory=MembershipConfig)

    def __post_init__(self) -> None:
        _check_membership(self.membership)
        if not 0 <= self.port < 65536:
            raise InvalidSetting("--port", self.port, "must be from 0 (any free one) to 65535")
        if self.advertise is not None and not _is_host(self.advertise):
            rule = "must be a host's name or address, without scheme and port"
            raise InvalidSetting("--advertise", self.advertise, rule)
        if self.token_file is not None:
            choose_token(self.token_file, None)
        _check_tls(self.tls_cert, self.tls_key)


def _check_membership(membership: MembershipConfig) -> None:
    least, most = membership.min_workers, membership.max_workers
    if least < 1:
        raise InvalidSetting("--min-workers", least, "must be at least 1")
    if most < least:
        raise InvalidSetting("--max-workers", most, f"must be at least --min-workers, {least}")
    if membership.spares < 0:
        raise InvalidSetting("--spares", membership.spares, "must be at least 0")
    if membership.crashes < 1:
        raise InvalidSetting("--crashes", membership.crashes, "must be at least 1")
    for name in _TIMES:
        seconds = getattr(membership, name)
        if not seconds > 0 or (seconds == math.inf and name != "start"):
            raise InvalidSetting(f"--{name.replace('_', '-')}-seconds", seconds, "must be above 0, and finite")
    if membership.eviction <= 2 * membership.beat:
        rule = f"must be more than twice --beat-seconds, {membership.beat:g}, or one late beat would lose a worker"
        raise InvalidSetting("--eviction-seconds", membership.eviction, rule)


def _is_host(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return re.fullmatch(r"\w[\w.-]*", text) is not None
    return True


def _check_tls(cert: Path | None, key: Path | None) -> None:
    given = {"--tls-cert": cert, "--tls-key": key}
    for (flag, file), other in zip(given.items(), reversed(given), strict=True):
        if file is not None and given[other] is None:
            raise InvalidSetting(flag, str(file), f"needs {other} too")
        if file is not None and not file.is_file():
            raise InvalidSetting(flag, str(file), "must be a file")
    if cert is not None:
        try:
            ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(cert, key)
        except OSError as error:  # ssl's own among them
            rule = f"must be a PEM certificate that belongs to --tls-key ({error})"
            raise InvalidSetting("--tls-cert", str(cert), rule) from error
