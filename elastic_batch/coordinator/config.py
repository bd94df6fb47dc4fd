"""The coordinator's settings, as its command line gives them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from elastic_batch.coordinator.state import MembershipConfig
from elastic_batch.errors import InvalidSetting


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
        membership = self.membership
        if membership.min_workers < 1:
            raise InvalidSetting("min_workers", membership.min_workers, "must be at least 1")
        if membership.max_workers < membership.min_workers:
            raise InvalidSetting(
                "max_workers", membership.max_workers, f"must be at least min_workers, {membership.min_workers}"
            )
        if membership.spares < 0:
            raise InvalidSetting("spares", membership.spares, "must be at least 0")
        if not 0 <= self.port < 65536:
            raise InvalidSetting("port", self.port, "must be from 0 (any free one) to 65535")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise InvalidSetting(
                "tls_cert" if self.tls_cert else "tls_key",
                str(self.tls_cert or self.tls_key),
                "needs the other one too",
                "Give --tls-cert and --tls-key",
            )
        for name, file in (("tls_cert", self.tls_cert), ("tls_key", self.tls_key)):
            if file is not None and not file.is_file():
                raise InvalidSetting(name, str(file), "must be a file")
