from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_batch.shares import share, shares

micro_batches = st.integers(0, 5000)
workers = st.integers(1, 300)


@given(micro_batches, workers)
def test_shares_are_contiguous_in_rank_order_and_cover_the_update_once(num: int, active: int) -> None:
    parts = shares(num, active)
    assert len(parts) == active
    assert [i for part in parts for i in part] == list(range(num))


@given(micro_batches, workers)
def test_sizes_differ_by_at_most_one_and_the_larger_come_first(num: int, active: int) -> None:
    sizes = [len(part) for part in shares(num, active)]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


@given(micro_batches, workers, st.integers(0, 400))
def test_one_share_agrees_with_all_of_them_and_spares_have_none(num: int, active: int, rank: int) -> None:
    part = share(num, active, rank)
    if rank < active:
        assert part == shares(num, active)[rank]
    else:
        assert len(part) == 0
    assert 0 <= part.start <= part.stop <= num


def test_three_workers_share_eight_micro_batches_unevenly() -> None:
    assert shares(8, 3) == [range(3), range(3, 6), range(6, 8)]


@pytest.mark.parametrize("arguments", [(-1, 1, 0), (1, 0, 0), (1, 1, -1)])
def test_impossible_arguments_are_refused(arguments: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="must be at least 0 micro-batches"):
        share(*arguments)
    if arguments[1] == 0:
        with pytest.raises(ValueError, match="at least 1 active worker"):
            shares(*arguments[:2])
