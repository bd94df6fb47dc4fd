"""The manifest: the small file beside a checkpoint's payload that says what it is and proves that it is whole."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from elastic_batch.errors import CheckpointDamaged
from elastic_batch.strict_json import to_json

VERSION = 1
_NAME = re.compile(r"(?P<position>\d{12,})-g(?P<generation>\d+)-[0-9a-f]{12}")


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointInfo:
    """What the training loop says about a state that it hands over.

    Args:
        position: Samples committed in this state.
        update: Updates committed in this state.
        fingerprint: The settings that alter the trajectory (see `elastic_batch.checkpoint.fingerprint`).
        details: Anything else worth reading in the manifest: plain JSON values.
    """

    position: int
    update: int
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A committed checkpoint.

    Attributes:
        name: Its name, without suffix: position, generation and the digest's first digits.
        position: Samples committed.
        update: Updates committed.
        generation: The world that wrote it.
        digest: SHA-256 of the payload, hexadecimal.
        num_bytes: The payload's length.
        created_seconds: When it was written, seconds since 1970.
        written_by: Versions of this package and of torch.
        fingerprint: The settings that alter the trajectory.
        details: What else the training loop wished to say.
    """

    name: str
    position: int
    update: int
    generation: int
    digest: str
    num_bytes: int
    created_seconds: float
    written_by: str
    fingerprint: Mapping[str, Any]
    details: Mapping[str, Any]

    @property
    def order(self) -> tuple[int, int, float]:
        """Greater is newer. A later world's word counts more than a greater position of one that it replaced."""
        return self.generation, self.position, self.created_seconds

    def to_bytes(self) -> bytes:
        """The manifest file's content: the fields, the format's version, and a checksum of these."""
        fields = json.loads(to_json({"version": VERSION, **asdict(self)}))
        return (to_json({**fields, "checksum": _checksum(fields)}, indent=2) + "\n").encode()

    @classmethod
    def from_bytes(cls, name: str, data: bytes) -> Manifest:
        """Read the manifest file of the checkpoint `name`.

        Raises:
            CheckpointDamaged: It is garbled, belongs to another name, or has a version that this release does not know.
        """
        try:
            fields = json.loads(data)
            version, checksum = fields["version"], fields.pop("checksum")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointDamaged(name, "its manifest is garbled") from error
        # A later version may reckon its checksum in another way.
        if version != VERSION:
            raise CheckpointDamaged(
                name, f"its format has version {version!r}, this release reads {VERSION}; use the release that wrote it"
            )
        if checksum != _checksum(fields):
            raise CheckpointDamaged(name, "its manifest was altered: the checksum in it is another")
        manifest = cls(**{field_name: value for field_name, value in fields.items() if field_name != "version"})
        if manifest.name != name:
            raise CheckpointDamaged(name, f"its manifest is that of {manifest.name!r}")
        return manifest


def checkpoint_name(position: int, generation: int, digest: str) -> str:
    """A name that no checkpoint with another content has.

    >>> checkpoint_name(46080, 2, "3fa2b1c9d0e1ffff")
    '000000046080-g2-3fa2b1c9d0e1'
    """
    return f"{position:012d}-g{generation}-{digest[:12]}"


def generation_of(name: str) -> int | None:
    """The generation in a checkpoint's name; None if it is not such a name.

    >>> generation_of("000000046080-g2-3fa2b1c9d0e1"), generation_of("weights")
    (2, None)
    """
    match = _NAME.fullmatch(name)
    return int(match["generation"]) if match else None


def _checksum(fields: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
