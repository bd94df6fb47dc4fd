"""Which micro-batches of an update each worker computes: one contiguous share per worker, in rank order."""

from __future__ import annotations


def share(num_micro_batches: int, num_active: int, rank: int) -> range:
    """Return the micro-batches of one worker, numbered from 0 within the update.

    Sizes differ by at most one, the larger first. More workers than micro-batches is allowed: the last ones get none,
    and so do ranks beyond `num_active` (spares).

    Args:
        num_micro_batches: Micro-batches of the update, at least 0.
        num_active: Workers that share them, at least 1.
        rank: The worker's rank in the world, at least 0.

    Raises:
        ValueError: An argument is below its minimum.

    >>> [share(8, 3, rank) for rank in range(4)]
    [range(0, 3), range(3, 6), range(6, 8), range(8, 8)]
    >>> share(8, 1, 0), share(2, 3, 2)
    (range(0, 8), range(2, 2))
    """
    if num_micro_batches < 0 or num_active < 1 or rank < 0:
        raise ValueError(
            f"share({num_micro_batches=}, {num_active=}, {rank=}): "
            "must be at least 0 micro-batches, at least 1 active worker, and a rank of at least 0"
        )
    smaller, num_larger = divmod(num_micro_batches, num_active)
    rank = min(rank, num_active)
    start = rank * smaller + min(rank, num_larger)
    length = smaller + (rank < num_larger) if rank < num_active else 0
    return range(start, start + length)


def shares(num_micro_batches: int, num_active: int) -> list[range]:
    """Return the share of every active worker, by rank; together they are range(num_micro_batches).

    Raises:
        ValueError: Fewer than 0 micro-batches or fewer than 1 worker.

    >>> shares(5, 2)
    [range(0, 3), range(3, 5)]
    """
    return [share(num_micro_batches, num_active, rank) for rank in range(max(num_active, 1))]
