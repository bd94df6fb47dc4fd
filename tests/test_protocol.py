"""Messages survive the wire; what is no message is an error."""

from __future__ import annotations

import json
import zlib
from base64 import b64encode

import pytest

from elastic_batch.protocol import MAX_MESSAGE_BYTES, Form, Hello, parse_from_coordinator, parse_from_worker


def test_a_world_of_thousands_is_told_in_few_bytes() -> None:
    names = tuple(f"node-{number // 8:04d}-{number % 8}" for number in range(5_000))
    form = Form(generation=3, members=names, all_on_loopback=False, seconds=30)
    text = form.model_dump_json()
    assert parse_from_coordinator(text) == form
    assert len(text) < 20_000


@pytest.mark.parametrize("members", [(), ("a",), ("ä b", 'c"d', "e\nf")])
def test_names_survive_the_wire(members: tuple[str, ...]) -> None:
    hello = Hello(package="1", worker="a", slot="a", host="h", address="10.0.0.1", pid=1, generation=2, members=members)
    assert parse_from_worker(hello.model_dump_json()) == hello


@pytest.mark.parametrize(
    "packed",
    [
        "?",
        b64encode(b"abc").decode(),
        b64encode(zlib.compress(b"{}")).decode(),
        b64encode(zlib.compress(b"[")).decode(),
    ],
)
def test_names_that_cannot_be_unpacked_are_an_error(packed: str) -> None:
    said = {"kind": "form", "generation": 1, "members": packed, "all_on_loopback": True, "seconds": 1}
    with pytest.raises(ValueError, match="members"):
        parse_from_coordinator(json.dumps(said))


def test_names_cannot_fill_the_memory() -> None:
    bomb = b64encode(zlib.compress(b'["' + b"a" * (64 << 20) + b'"]')).decode()
    assert len(bomb) < MAX_MESSAGE_BYTES
    said = {"kind": "form", "generation": 1, "members": bomb, "all_on_loopback": True, "seconds": 1}
    with pytest.raises(ValueError, match="members"):
        parse_from_coordinator(json.dumps(said))
