"""The order in which an epoch shows a training set's rows."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

__all__ = ["blocks_at_once", "epoch_order"]

_LANES = 16
_WINDOW = 16  # blocks whose rows are shuffled together


def epoch_order(
    length: int, blocks: NDArray[np.int64] | None, batch_size: int, *, seed: int, epoch: int
) -> NDArray[np.int64]:
    """All rows of an epoch; batch s is rows s * batch_size up to (s + 1) * batch_size of it.

    Without blocks any order is equally likely. With them rows that lie together come near each other: the blocks, in
    random order, are dealt to 16 lanes (fewer where there are under 256 blocks), in each lane windows of 16 blocks
    (up to 31 where a lane has under 32) are joined and their rows shuffled, and batch s comes from lane s % 16. So
    1, 2, 4, 8 or 16 workers, of which worker s % W makes batch s, each read blocks of their own, once, and a batch
    still draws from 16 blocks. Each lane holds whole batches to the row: only the blocks at the ends of lanes, at
    most 15, are shared by two. As without blocks, the rows that make no whole batch, fewer than batch_size, stand
    last and remain unused; which ones differs from epoch to epoch.

    Args:
        length: N, the number of rows.
        blocks: (B + 1,) where each block of rows begins, ascending from 0, and last N; None for none.
        batch_size: rows per batch.
        seed, epoch: another order for each pair.

    Returns:
        (N,) a permutation of the rows, determined by the arguments.
    """
    rng = np.random.default_rng([seed, epoch])
    if blocks is None:
        return rng.permutation(length)
    dealt = rng.permutation(len(blocks) - 1)
    sizes = np.diff(blocks)[dealt]
    ends = np.cumsum(sizes)
    rows = np.arange(length) + np.repeat(blocks[:-1][dealt] - (ends - sizes), sizes)  # block after block
    steps, lanes = length // batch_size, _lanes(len(dealt))
    batches = rows[: steps * batch_size].reshape(steps, batch_size).copy()
    start = 0
    for lane in range(lanes):
        stop = start + len(range(lane, steps, lanes)) * batch_size
        if stop == start:
            break
        first, last = np.searchsorted(ends, [start, stop - 1], side="right")
        windows = np.array_split(np.arange(first, last + 1), max(1, (last + 1 - first) // _WINDOW))
        cuts = [start, *(int(ends[window[-1]]) for window in windows[:-1]), stop]
        mixed = [rng.permutation(rows[a:b]) for a, b in pairwise(cuts)]
        batches[lane::lanes] = np.concatenate(mixed).reshape(-1, batch_size)
        start = stop
    return np.concatenate([batches.ravel(), rows[start:]])


def blocks_at_once(count: int, workers: int) -> int:
    """Number of `count` blocks that each of `workers` processes (0: only this one) must keep to read none twice."""
    lanes = _lanes(count)
    each = -(-count // lanes)  # blocks in a lane
    window = _WINDOW + -(-_WINDOW // max(1, each // _WINDOW))
    # Worker w makes the batches w, w + W, ...: these are of so many lanes. A lane shares two blocks with others.
    return lanes // math.gcd(lanes, max(1, workers)) * (min(window, each) + 2)


def _lanes(count: int) -> int:
    """Powers of two, as numbers of workers mostly are; fewer where a lane would not fill a window."""
    lanes = _LANES
    while lanes > 1 and count < lanes * _WINDOW:
        lanes //= 2
    return lanes
