from __future__ import annotations

import itertools
import math
import pickle
import subprocess
import sys

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_batch.errors import InvalidSetting
from elastic_batch.stream import SampleStream, micro_batch_seed

Indices = npt.NDArray[np.int64]

SIZES = sorted({1, 2, 3, 5, 7, 10, 97, 1437, 60_000, *(2**k + d for k in (2, 5, 8, 11, 12, 16) for d in (-1, 0, 1))})
HUGE = [10**12, 10**12 - 11, 2**40 + 1, 2**60]


def epochs(stream: SampleStream, count: int) -> Indices:
    """Shape [count, num_samples]."""
    return stream.indices(0, count * stream.num_samples).reshape(count, stream.num_samples)


def excess(counts: npt.NDArray[np.int64], degrees: int | None = None) -> float:
    """How far a chi-square statistic of equally likely cells is above its mean, in standard deviations."""
    expected = counts.sum() / counts.size
    degrees = counts.size - 1 if degrees is None else degrees
    statistic = float(((counts - expected) ** 2).sum() / expected) * degrees / (counts.size - 1)
    return (statistic - degrees) / math.sqrt(2 * degrees)


def correlation(left: Indices, right: Indices, num_samples: int) -> float:
    """Correlation of uniform indices, in standard deviations of independent ones."""
    centred = [(values + 0.5) / num_samples - 0.5 for values in (left, right)]
    return float((centred[0] * centred[1]).mean() * 12 * math.sqrt(left.size))


@pytest.mark.parametrize("num_samples", SIZES)
def test_every_sample_occurs_once_in_each_epoch(num_samples: int) -> None:
    for epoch in epochs(SampleStream(num_samples, seed=3), 3):
        assert np.array_equal(np.sort(epoch), np.arange(num_samples))


@given(st.integers(1, 6000), st.integers(0, 2**64 - 1), st.integers(0, 10**6), st.integers(1, 700) | st.none())
def test_any_epoch_is_a_permutation_with_and_without_blocks(
    num_samples: int, seed: int, epoch: int, block_size: int | None
) -> None:
    stream = SampleStream(num_samples, seed, block_size=block_size)
    order = stream.indices(epoch * num_samples, (epoch + 1) * num_samples)
    assert np.array_equal(np.sort(order), np.arange(num_samples))


@given(st.data(), st.integers(1, 5000), st.sampled_from([None, 1, 7, 64, 5000]))
def test_a_range_is_the_same_however_it_is_asked_for(
    data: st.DataObject, num_samples: int, block_size: int | None
) -> None:
    stream = SampleStream(num_samples, 9, block_size=block_size)
    start = data.draw(st.integers(0, 3 * num_samples))
    stop = start + data.draw(st.integers(0, 12_000))
    whole = stream.indices(start, stop)
    assert whole.dtype == np.int64
    cuts = [start, *sorted(data.draw(st.lists(st.integers(start, stop), max_size=4))), stop]
    pieces = [SampleStream(num_samples, 9, block_size=block_size).indices(*cut) for cut in itertools.pairwise(cuts)]
    assert np.array_equal(whole, np.concatenate(pieces))
    pieces = [stream.indices(*cut) for cut in reversed(list(itertools.pairwise(cuts)))]
    assert np.array_equal(whole, np.concatenate(pieces[::-1]))


@pytest.mark.parametrize("block_size", [None, 1, 1000, 4096])
@pytest.mark.parametrize("num_samples", HUGE)
def test_a_huge_data_set_has_no_collisions_and_no_index_outside(num_samples: int, block_size: int | None) -> None:
    stream = SampleStream(num_samples, 5, block_size=block_size)
    starts = (0, num_samples // 3, num_samples - 100_000)
    seen = np.concatenate([stream.indices(start, start + 100_000) for start in starts])
    assert seen.min() >= 0
    assert seen.max() < num_samples
    assert np.unique(seen).size == seen.size
    if block_size is None:
        assert abs(seen.mean() / num_samples - 0.5) < 5 / math.sqrt(12 * seen.size)


@pytest.mark.parametrize(("num_samples", "block_size"), [(1000, 10), (1003, 10), (5003, 50), (100, 64), (10, 64)])
def test_blocks_stay_together_and_both_levels_are_shuffled(num_samples: int, block_size: int) -> None:
    orders = epochs(SampleStream(num_samples, 1, block_size=block_size), 40)
    firsts = set()
    for order in orders:
        blocks = order // block_size
        runs = blocks[np.flatnonzero(np.concatenate(([True], np.diff(blocks) != 0)))]
        assert len(runs) == len(set(runs)) == math.ceil(num_samples / block_size)
        firsts.add(int(runs[-1]))
    assert len(firsts) > min(8, math.ceil(num_samples / block_size)) // 2  # the short block is not always last
    inner = [tuple(order[order // block_size == 0]) for order in orders]
    assert len(set(inner)) == len(inner)


@pytest.mark.parametrize("num_samples", [2, 3, 4, 5, 6])
def test_every_order_of_a_few_samples_is_equally_likely(num_samples: int) -> None:
    count = math.factorial(num_samples) * 50
    codes = epochs(SampleStream(num_samples, 7), count) @ num_samples ** np.arange(num_samples)
    seen = np.unique(codes, return_counts=True)[1]
    assert seen.size == math.factorial(num_samples)
    assert abs(excess(seen)) < 4


@pytest.mark.parametrize("num_samples", [30, 101, 2100, 4096])
def test_every_sample_is_equally_likely_at_every_position(num_samples: int) -> None:
    cells = min(num_samples, 60)
    orders = epochs(SampleStream(num_samples, 2), max(2_000_000 // num_samples, 40) // 2)
    rows = np.arange(num_samples) * cells // num_samples
    counts = np.bincount((rows * cells + orders * cells // num_samples).ravel(), minlength=cells * cells)
    expected = np.outer(np.bincount(rows), np.bincount(rows)).ravel() * len(orders) / num_samples
    degrees = (cells - 1) ** 2
    assert abs(((counts - expected) ** 2 / expected).sum() - degrees) < 5 * math.sqrt(2 * degrees)


@pytest.mark.parametrize("num_samples", [100, 2500, 60_000, 1_281_167])
def test_neighbours_epochs_and_seeds_are_independent(num_samples: int) -> None:
    count = max(1_000_000 // num_samples, 3)
    orders = epochs(SampleStream(num_samples, 2), count)
    shift = math.sqrt(count / num_samples)  # neighbours in a permutation differ, which correlates them by -1/N
    for lag in (1, 2, 32):
        if lag < num_samples // 2:
            assert abs(correlation(orders[:, lag:], orders[:, :-lag], num_samples) + shift) < 4.5
    assert abs(correlation(orders[1:], orders[:-1], num_samples)) < 4.5
    assert abs(correlation(orders, epochs(SampleStream(num_samples, 3), count), num_samples)) < 4.5
    assert abs(correlation(orders, np.broadcast_to(np.arange(num_samples), orders.shape), num_samples)) < 4.5


@pytest.mark.parametrize("num_samples", [64, 2520, 75_600])
def test_steps_between_neighbours_are_uniform(num_samples: int) -> None:
    orders = epochs(SampleStream(num_samples, 4), max(1_500_000 // num_samples, 2))
    steps = (np.diff(orders, axis=1) % num_samples).ravel()
    if num_samples == 64:
        assert abs(excess(np.bincount(steps)[1:])) < 5
    else:
        assert abs(excess(np.bincount(steps * 30 // num_samples))) < 5
        pairs = (orders[:, :-1] * 30 // num_samples) * 30 + orders[:, 1:] * 30 // num_samples
        assert abs(excess(np.bincount(pairs.ravel(), minlength=900))) < 5


def test_the_order_never_changes_between_versions() -> None:
    """Recorded once: a run must resume with the same order after an upgrade."""
    assert SampleStream(10, 0).indices(0, 10).tolist() == [2, 4, 5, 0, 7, 1, 3, 6, 9, 8]
    assert SampleStream(60_000, 1).indices(59_998, 60_004).tolist() == [14515, 38685, 39342, 10151, 33745, 59767]
    assert SampleStream(10**12, 2).indices(10**12, 10**12 + 3).tolist() == [324103110422, 285670611995, 389996422410]
    assert SampleStream(10_007, 3, block_size=100).indices(98, 103).tolist() == [6898, 6873, 3498, 3431, 3404]
    assert micro_batch_seed(4, 96, "data") == 1799632174833677106


def test_a_stream_pickles_small_and_continues_alike() -> None:
    stream = SampleStream(10**9, 8, block_size=512)
    stream.indices(0, 32)
    data = pickle.dumps(stream)
    assert len(data) < 1000
    assert np.array_equal(pickle.loads(data).indices(5, 77), stream.indices(5, 77))


def test_the_result_may_be_changed_by_the_caller() -> None:
    stream = SampleStream(100, 8)
    first = stream.indices(0, 32)
    first[:] = -1
    assert stream.indices(0, 32).min() >= 0


@pytest.mark.parametrize(
    ("arguments", "field"),
    [((0, 1), "num_samples"), ((2**60 + 1, 1), "num_samples"), ((5, -1), "seed"), ((5, 2**64), "seed")],
)
def test_an_impossible_stream_is_refused(arguments: tuple[int, int], field: str) -> None:
    with pytest.raises(InvalidSetting, match=field):
        SampleStream(*arguments)


def test_an_empty_block_is_refused() -> None:
    with pytest.raises(InvalidSetting, match="block_size = 0"):
        SampleStream(5, 1, block_size=0)


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (4, 3)])
def test_an_impossible_range_is_refused(start: int, stop: int) -> None:
    with pytest.raises(ValueError, match=r"start must be at least 0"):
        SampleStream(5, 1).indices(start, stop)


def test_seeds_of_micro_batches_are_distinct_and_well_mixed() -> None:
    seeds = [micro_batch_seed(s, p, w) for s in range(5) for p in range(0, 64_000, 32) for w in ("data", "model")]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    bits = np.unpackbits(np.array(seeds, np.uint64).view(np.uint8).reshape(-1, 8), axis=1, bitorder="little")[:, :63]
    assert np.abs(bits.mean(axis=0) - 0.5).max() < 5 * 0.5 / math.sqrt(len(seeds))
    flips = bits[2::2][: len(bits) // 2 - 1] ^ bits[:-2:2]  # neighbouring positions of one purpose
    assert np.abs(flips.mean(axis=0) - 0.5).max() < 0.04


def test_a_seed_may_be_any_unsigned_word_and_32_bits_of_it_differ_elsewhere() -> None:
    low = [micro_batch_seed(0, 32 * i, "data") & 0xFFFFFFFF for i in range(2000)]
    high = [micro_batch_seed(0, 32 * i, "data") >> 31 for i in range(2000)]
    assert len(set(low)) == len(set(high)) == 2000
    assert micro_batch_seed(2**64 - 1, 0, "data") != micro_batch_seed(0, 0, "data")


def test_the_stream_does_not_load_torch() -> None:
    code = "import sys, elastic_batch.stream, elastic_batch.shares; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
