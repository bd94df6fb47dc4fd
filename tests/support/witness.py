"""Checks what workers witnessed of a run: every sample in its place, each update's last commit counting.

The order of samples is computed here once more, in plain integers, from its definition.
"""

from __future__ import annotations

import struct
import zlib
from collections import defaultdict
from hashlib import blake2b
from typing import Any

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15


def _mix(word: int) -> int:
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB & _MASK
    return word ^ (word >> 31)


def order_of_samples(num_samples: int, seed: int, stop: int) -> list[int]:
    """The samples at the positions before `stop`, for a data set of at most 2 048 samples."""
    key = int.from_bytes(blake2b(f"{seed}/order".encode(), digest_size=8).digest(), "little")
    order: list[int] = []
    for epoch in range(-(-stop // num_samples)):
        tweak = _mix((key + (epoch + 1) * _GOLDEN) & _MASK)
        words = [_mix((tweak + (number + 1) * _GOLDEN) & _MASK) for number in range(num_samples)]
        order += sorted(range(num_samples), key=words.__getitem__)
    return order[:stop]


def check_witnesses(
    lines: list[dict[str, Any]], *, num_samples: int, seed: int, end: int, micro_batch_size: int
) -> int:
    """See that the last commits of all updates cover every position before `end` once, with the right samples.

    A worker that was killed between the commit and its line is missing from that update; what the others witnessed of
    the update's range, and of their own shares, has to be right all the same.

    Returns:
        How many commits were done again in a later world.
    """
    order = order_of_samples(num_samples, seed, end)
    commits: dict[int, dict[int, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        commits[line["update"]][line["generation"]].append(line)
    position = 0
    for update in range(len(commits)):
        assert update in commits, f"nobody witnessed update {update}"
        last = commits[update][max(commits[update])]
        ranges = {(line["start"], line["stop"]) for line in last}
        assert ranges == {(position, last[0]["stop"])}, f"update {update} covers {ranges}, expected from {position}"
        _check_shares(last, order, micro_batch_size)
        position = last[0]["stop"]
    assert position == end, f"witnessed up to position {position} of {end}"
    return sum(len(generations) - 1 for generations in commits.values())


def _check_shares(lines: list[dict[str, Any]], order: list[int], size: int) -> None:
    """Each worker's micro-batches are a run of the update's, and no two workers had the same."""
    start, stop = lines[0]["start"], lines[0]["stop"]
    expected = [
        zlib.crc32(struct.pack(f"<{size}q", *order[first : first + size])) for first in range(start, stop, size)
    ]
    taken: set[int] = set()
    for line in lines:
        digests = line["digests"]
        if not digests:
            continue
        places = [place for place in range(len(expected)) if expected[place : place + len(digests)] == digests]
        assert places, f"{line['worker']} had other samples than update {line['update']} has"
        mine = set(range(places[0], places[0] + len(digests)))
        assert not mine & taken, f"two workers had the same micro-batches of update {line['update']}"
        taken |= mine
