"""The order of samples as a pure function of (seed, epoch, position), and the seeds that belong to a position.

Nothing here imports torch: planning needs none.
"""

from __future__ import annotations

from functools import lru_cache
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from elastic_batch.errors import InvalidSetting
from elastic_batch.permutation import MAX_LENGTH, Grid, Words, derive, derive_each, permute, pick

_CHUNK = 8192  # positions worked on at once: the working arrays stay in a core's cache
# Positions evaluated for a small request; the calls, not the elements, are what it costs. Further ahead where requests
# follow each other: who jumps from share to share throws most of it away.
_AHEAD, _FAR_AHEAD = 1024, 8192
_NOTHING_AHEAD = (0, np.empty(0, np.int64))


class SampleStream:
    """The endless sequence of sample indices that training consumes; every epoch is a permutation of the data set.

    Any range of positions can be asked for, in any order, by any process: the answer depends on the arguments of the
    constructor only. Epochs follow each other without a gap. Instances pickle small and may be shared by threads.

    Args:
        num_samples: Size N of the data set, from 1 to 2^60.
        seed: Seed of the job, from 0 to 2^64 - 1.
        block_size: Samples that stay together for the sake of slow storage: blocks of this many consecutive samples are
            permuted, and the samples inside each block. None permutes single samples. The last block may be shorter.

    Raises:
        InvalidSetting: An argument is outside its range.

    >>> stream = SampleStream(5, seed=1)
    >>> sorted(stream.indices(0, 5).tolist()), sorted(stream.indices(5, 10).tolist())
    ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4])
    >>> stream.indices(3, 7).tolist() == stream.indices(0, 10).tolist()[3:7]
    True
    """

    def __init__(self, num_samples: int, seed: int, *, block_size: int | None = None) -> None:
        if not 1 <= num_samples <= MAX_LENGTH:
            raise InvalidSetting("num_samples", num_samples, "must be from 1 to 2^60")
        if not 0 <= seed <= 2**64 - 1:
            raise InvalidSetting("seed", seed, "must be from 0 to 2^64 - 1")
        if block_size is not None and block_size < 1:
            raise InvalidSetting("block_size", block_size, "must be at least 1 sample, or None for no blocks")
        self.num_samples = num_samples
        self.seed = seed
        self.block_size = block_size
        self._order: _SampleOrder | _BlockOrder = (
            _SampleOrder(num_samples, seed) if block_size is None else _BlockOrder(num_samples, seed, block_size)
        )
        self._ahead = _NOTHING_AHEAD

    def __repr__(self) -> str:
        return f"SampleStream(num_samples={self.num_samples}, seed={self.seed}, block_size={self.block_size})"

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_ahead": _NOTHING_AHEAD}

    def indices(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Return the sample indices at positions [start, stop), as a new int64 array of shape [stop - start].

        Raises:
            ValueError: start is negative or above stop.
        """
        if not 0 <= start <= stop:
            raise ValueError(f"positions [{start}, {stop}): start must be at least 0 and at most stop")
        if stop - start > _AHEAD:
            return self._evaluate(start, stop)
        first, ahead = self._ahead
        if not first <= start <= stop <= first + len(ahead):
            number = _FAR_AHEAD if first <= start <= first + len(ahead) else _AHEAD
            first, ahead = self._ahead = start, self._evaluate(start, start + number)
        return ahead[start - first : stop - first].copy()

    def _evaluate(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        result = np.empty(stop - start, np.uint64)
        for low in range(start, stop, _CHUNK):
            high = min(low + _CHUNK, stop)
            first_epoch, last_epoch = low // self.num_samples, (high - 1) // self.num_samples
            if first_epoch == last_epoch:
                within = np.arange(low, high, dtype=np.uint64) - np.uint64(first_epoch * self.num_samples)
                epoch = np.array([first_epoch], np.uint64)
            else:
                epoch, within = np.divmod(np.arange(low, high, dtype=np.uint64), np.uint64(self.num_samples))
            result[low - start : high - start] = self._order.at(within, epoch)
        return result.view(np.int64)


def micro_batch_seed(seed: int, position: int, purpose: str) -> int:
    """Return the seed of what is random in the micro-batch at a position: a pure, well mixed function of its arguments.

    Args:
        seed: Seed of the job.
        position: First position of the micro-batch, at least 0.
        purpose: What draws from it ("data", "model", ...); different purposes get unrelated seeds.

    Returns:
        An integer from 0 to 2^63 - 1 (what every generator accepts).

    >>> micro_batch_seed(0, 32, "data") == micro_batch_seed(0, 32, "data")
    True
    >>> len({micro_batch_seed(s, p, w) for s in range(4) for p in range(0, 320, 32) for w in ("data", "model")})
    80
    """
    return derive(_root_key(seed, purpose), position) >> 1


class _SampleOrder:
    """Permutes the single samples of each epoch."""

    def __init__(self, num_samples: int, seed: int) -> None:
        self._key = _root_key(seed, "order")
        self._grid = Grid.covering(num_samples)

    def at(self, within: Words, epoch: Words) -> Words:
        """Samples at positions `within` [n] of the epochs `epoch` [n], or [1] if they share one."""
        return permute(within, self._grid, derive_each(self._key, epoch))


class _BlockOrder:
    """Permutes blocks of consecutive samples in each epoch, and the samples inside each block.

    N need not be a multiple of the block size. The short block's slot is drawn per epoch, the full blocks are permuted
    over the other slots: together a random order of all blocks, without the need to invert a permutation.
    """

    def __init__(self, num_samples: int, seed: int, block_size: int) -> None:
        self._size = min(block_size, num_samples)
        self._num_full, self._rest = divmod(num_samples, self._size)
        self._slot_key, self._order_key, self._inner_key = (
            _root_key(seed, purpose) for purpose in ("short block", "block order", "inside block")
        )
        self._full_blocks = Grid.covering(self._num_full)
        self._inside_full = Grid.covering(self._size)
        self._inside_short = Grid.covering(max(self._rest, 1))

    def at(self, within: Words, epoch: Words) -> Words:
        """Samples at positions `within` [n] of the epochs `epoch` [n], or [1] if they share one."""
        size, rest = np.uint64(self._size), np.uint64(self._rest)
        short_start = size * (derive_each(self._slot_key, epoch) % np.uint64(self._num_full + 1))
        # Positions behind the short block count as if it were full; then it leaves the numbering of the full ones.
        behind = (within >= short_start + rest) & (rest > 0)
        slot, offset = np.divmod(within + behind * (size - rest), size)
        starts = np.flatnonzero(np.concatenate(([True], offset[1:] == 0)))  # runs of positions in one block
        is_short = ((within >= short_start) & (within < short_start + rest))[starts]
        epoch = pick(epoch, starts)
        number = np.where(is_short, np.uint64(0), (slot - behind)[starts])
        block = permute(number, self._full_blocks, derive_each(self._order_key, epoch))
        block[is_short] = self._num_full
        tweak = derive_each(derive_each(self._inner_key, epoch), block)

        lengths = np.diff(starts, append=within.size)
        base, tweak = np.repeat(block * size, lengths), np.repeat(tweak, lengths)
        if not is_short.any():
            return base + permute(offset, self._inside_full, tweak)
        short = np.repeat(is_short, lengths)
        offset[~short] = permute(offset[~short], self._inside_full, tweak[~short])
        offset[short] = permute(offset[short], self._inside_short, tweak[short])
        return base + offset


@lru_cache(maxsize=256)
def _root_key(seed: int, purpose: str) -> int:
    return int.from_bytes(blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest(), "little")
