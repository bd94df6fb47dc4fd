"""Keyed pseudo-random permutations of range(length), evaluated at any of its elements in O(1) time and memory.

A Feistel network whose halves are the row and the column of a grid with about `length` cells. All arithmetic is modulo
2^64 on arrays of unsigned words: integers only, so every machine gets the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import isqrt
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt

MAX_LENGTH = 2**60
"""Longest range: rows and columns of its grid stay below 2^32, so the round function's products fit 64 bits."""

Words = npt.NDArray[np.uint64]
_Word = TypeVar("_Word", int, Words)

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
_ROUNDS = 6
_SORTED = 2048  # ranges up to this length are shuffled by sorting


@dataclass(frozen=True, slots=True)
class Grid:
    """The domain of a permutation of range(length): the smallest grid near a square that covers it."""

    length: int
    rows: int
    columns: int

    @classmethod
    def covering(cls, length: int) -> Grid:
        # The cells beyond `length` are what cycle walking costs; some row count near the root leaves almost none.
        root = isqrt(length - 1) + 1
        rows = np.arange(root, root + min(256, root // 4 + 1), dtype=np.int64)
        columns = -(-length // rows)
        best = int(np.argmin(rows * columns))
        return cls(length, int(rows[best]), int(columns[best]))


def permute(values: Words, grid: Grid, tweak: Words) -> Words:
    """Apply the permutation of range(grid.length) chosen by `tweak` ([n], or [1] for all) to `values` [n]."""
    if grid.length <= _SORTED:
        return _shuffle(values, grid.length, tweak)
    # The grid may have more cells than the range: a value that lands outside is permuted again until it is inside
    # ("cycle walking": Black and Rogaway 2002, Ciphers with arbitrary finite domains); the map stays a bijection.
    values = _feistel(values, grid, tweak)
    outside = np.flatnonzero(values >= np.uint64(grid.length))
    while outside.size:
        values[outside] = _feistel(values[outside], grid, pick(tweak, outside))
        outside = outside[values[outside] >= np.uint64(grid.length)]
    return values


def _shuffle(values: Words, length: int, tweak: Words) -> Words:
    """Permute a short range by sorting hashes: exactly uniform, which few rounds on a tiny grid are not."""
    starts, lengths = _runs(tweak)
    number = np.arange(1, length + 1, dtype=np.uint64)
    orders: Words = np.argsort(_mix(tweak[starts, None] + number * np.uint64(_GOLDEN)), axis=1).view(np.uint64)
    run = np.repeat(np.arange(starts.size), lengths) if starts.size > 1 else 0
    result: Words = orders[run, values.view(np.int64)]  # orders: [runs, length]; a bijective hash has no ties
    return result


def _feistel(values: Words, grid: Grid, tweak: Words) -> Words:
    """Permute the cells of the grid: a round adds a keyed hash of one coordinate to the other, modulo its extent."""
    rows, columns = np.uint64(grid.rows), np.uint64(grid.columns)
    row = values // columns
    column = values - row * columns
    scratch = np.empty_like(row)
    for offset, multiplier in _round_keys(tweak):
        np.add(column, offset, out=scratch)
        _add_hashed(row, scratch, multiplier, rows)
        row, column, rows, columns = column, row, columns, rows
    return row * columns + column  # an even number of rounds: the coordinates are back in their places


def _add_hashed(target: Words, word: Words, multiplier: Words, extent: np.uint64) -> None:
    """target <- (target + hash(word) scaled to [0, extent)) modulo extent, in place; `word` is overwritten."""
    high = np.uint64(32)
    word *= multiplier
    word ^= word >> high
    word *= np.uint64(_GOLDEN)
    word >>= high
    word *= extent
    word >>= high
    target += word
    # Below the extent the difference wraps around to a huge number, so the minimum is the remainder.
    np.subtract(target, extent, out=word)
    np.minimum(target, word, out=target)


def _round_keys(tweak: Words) -> Sequence[tuple[Words, Words]]:
    """Offset and odd multiplier of each round, each of the shape of `tweak`."""
    if tweak.size == 1:
        return _round_keys_of_one(int(tweak[0]))
    starts, lengths = _runs(tweak)
    keys = np.repeat(_expand(tweak[starts]), lengths, axis=-1)
    return list(zip(keys[0], keys[1] | np.uint64(1), strict=True))


@lru_cache(maxsize=64)
def _round_keys_of_one(tweak: int) -> Sequence[tuple[Words, Words]]:
    keys = _expand(np.array([tweak], np.uint64))
    return list(zip(keys[0], keys[1] | np.uint64(1), strict=True))


def _expand(tweak: Words) -> Words:
    """Two words for each round from each tweak: [2, rounds, tweaks]."""
    number = np.arange(1, 2 * _ROUNDS + 1, dtype=np.uint64).reshape(2, _ROUNDS, 1)
    return _mix(tweak + number * np.uint64(_GOLDEN))


def _runs(tweak: Words) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Starts and lengths of the runs of equal elements."""
    starts = np.flatnonzero(np.concatenate(([True], tweak[1:] != tweak[:-1])))
    return starts, np.diff(starts, append=tweak.size)


def pick(words: Words, where: npt.NDArray[np.bool_] | npt.NDArray[np.intp]) -> Words:
    """The chosen elements of [n] words; a single word stands for all and is returned as it is."""
    return words if words.size == 1 else words[where]


def derive_each(key: int | Words, value: Words) -> Words:
    """Apply `derive` to every element of `value` [n], with one key or one for each ([n] or [1])."""
    if isinstance(key, int) and value.size == 1:  # plain integers are far cheaper than arrays of one element
        return np.array([derive(key, int(value[0]))], np.uint64)
    return _mix((value + np.uint64(1)) * np.uint64(_GOLDEN) + np.asarray(key, np.uint64))


def derive(key: int, value: int) -> int:
    """The value-th output of the splitmix64 generator with state `key`."""
    return _mix((key + (value + 1) * _GOLDEN) & _MASK)


def _mix(word: _Word) -> _Word:
    """The finalizer of splitmix64 (Steele, Lea and Flood 2014, Fast splittable pseudorandom number generators)."""
    mixed: Any = word  # the same operators for an int and for an array
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB & _MASK
    return cast(_Word, mixed ^ (mixed >> 31))
