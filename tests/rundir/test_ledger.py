"""The ledger of committed ranges."""

from __future__ import annotations

import json
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_batch.rundir.ledger import Ledger, LedgerReader

ranges = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 12)), max_size=25)


@settings(deadline=None)
@given(ranges=ranges, position=st.integers(0, 80))
def test_covered_samples_are_those_of_the_union(ranges: list[tuple[int, int]], position: int) -> None:
    ledger, union, new = Ledger(), set[int](), 0
    for update, (start, size) in enumerate(ranges):
        new += not set(range(start, start + size)) <= union
        union |= set(range(start, start + size))
        ledger.add(update, start, start + size)
    assert ledger.covered(position) == len([sample for sample in union if sample < position])
    assert ledger.lost(position) == position - ledger.covered(position)
    assert (ledger.updates, ledger.repeated_updates) == (new, len(ranges) - new)
    flat = [edge for pair in ledger.ranges for edge in pair]
    assert flat == sorted(set(flat))


def test_a_reader_takes_in_what_was_added_since_and_waits_for_a_line_to_be_whole(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    reader = LedgerReader(path)
    assert reader.read().lost(0) == 0
    line = json.dumps({"update": 1, "start": 0, "stop": 32, "generation": 0})
    path.write_text(line + "\n" + line[:10])
    assert reader.read().covered(100) == 32
    with path.open("a") as file:
        file.write(line[10:] + "\n" + '{"update": "x"}\n{"update": 3, "start": 64, "stop": 96}\n')
    ledger = reader.read()
    assert ledger.ranges == [(0, 32), (64, 96)]
    assert (ledger.repeated_updates, ledger.last_update, ledger.lost(96)) == (1, 3, 32)
