"""Groups near-duplicates around one kept row per group, exactly and in bounded memory.

Rows are processed in order. If a row's cosine to the most similar kept row reaches the threshold, it joins that row's
group. Otherwise it is kept. So every member is similar to the kept row of its group, chains do not grow, and no two
kept rows are duplicates.

Most pairs are excluded without their full product. A row of length 1 has p coordinates h along the leading principal
directions and a rest of length r. By Cauchy's inequality, u.v <= h_u.h_v + r_u r_v, a product of p + 1 numbers. Only
pairs whose bound reaches the threshold get an exact cosine.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from robustfeat.errors import InputError
from robustfeat.progress import Progress
from robustfeat.serving.collections.directions import Directions, product_error

__all__ = ["Groups", "find_duplicates"]

_BLOCK_ROWS = 512
_TILE_ROWS = 1024
_SAMPLE_ROWS = 4096
_SIZES = (8, 16, 32, 48, 64, 96, 128, 192, 256)
_FLOPS, _PAIR_S = 5e10, 3e-6
"""Operations per second and processor, and seconds per exact cosine. The choice of p only uses their ratio."""

_Map = Callable[[Callable[[int], NDArray[np.int64]], Iterable[int]], Iterator[NDArray[np.int64]]]


@dataclass(frozen=True)
class Groups:
    """Groups of duplicates.

    Attributes:
        kept: (n,) int64: the kept row of each row's group; the row itself if it is kept, -1 if it was not grouped.
        cosines: (n,) float64: the cosine to that row; 1 for a kept row, NaN for rows that were not grouped.
        involved: (n,) bool: rows with at least one duplicate.
    """

    kept: NDArray[np.int64]
    cosines: NDArray[np.float64]
    involved: NDArray[np.bool_]


def find_duplicates(
    collection: Directions,
    threshold: float,
    order: NDArray[np.int64],
    *,
    threads: int = 1,
    block_rows: int = _BLOCK_ROWS,
    progress: Progress | None = None,
) -> Groups:
    """Groups rows whose cosine is at least `threshold`.

    Args:
        collection: the rows.
        threshold: smallest cosine of duplicates, above 0 and at most 1.
        order: the rows to group, without failed ones. Earlier rows are preferred to keep.
        threads: number of parallel tiles.
        block_rows: rows per block.
        progress: counts rows.

    Raises:
        ValueError: the threshold is out of range.
        InputError: a temporary file cannot be written.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must be above 0 and at most 1; got {threshold}")
    grouping = _Grouping(collection, threshold)
    if not len(order):
        return grouping.groups
    with ExitStack() as stack:
        run = _pool(stack, threads)
        grouping.begin(_Bound.choose(collection, order, threshold), len(order), run)
        for start in range(0, len(order), block_rows):
            rows = order[start : start + block_rows]
            grouping.add(rows)
            if progress:
                progress.advance(len(rows))
    return grouping.groups


def _pool(stack: ExitStack, threads: int) -> _Map:
    """A `map` on threads, with single-threaded matrix products."""
    from threadpoolctl import threadpool_limits

    stack.enter_context(threadpool_limits(1))
    return stack.enter_context(ThreadPoolExecutor(threads)).map if threads > 1 else map


class _Bound:
    """An upper bound of cosines from p + 1 numbers per row.

    Args:
        basis: (D, p) orthonormal; None for all D numbers without a rest.
        size: D.
        threshold: smallest cosine of duplicates.

    Attributes:
        size: numbers per row.
        least: smallest bound of pairs that may be duplicates.
    """

    def __init__(self, basis: NDArray[np.float64] | None, size: int, threshold: float) -> None:
        self._basis = basis
        self.size = size if basis is None else basis.shape[1] + 1
        self.least = np.float32(threshold - product_error(self.size))

    @classmethod
    def choose(cls, collection: Directions, order: NDArray[np.int64], threshold: float) -> _Bound:
        """Chooses the cheapest bound on a sample of pairs. A shorter bound lets more pairs pass."""
        size = collection.size
        places = np.linspace(0, len(order) - 1, min(len(order), _SAMPLE_ROWS)).astype(np.int64)
        sample = collection.units(order[places])
        # The rows that define the directions have smaller rests than others, so measure the cost on other rows.
        fitted, others = sample[::2], sample[1::2]
        _, _, directions = np.linalg.svd(fitted, full_matrices=False)
        found, least = cls(None, size, threshold), 2 * size / _FLOPS
        for count in (count for count in _SIZES if count < min(size, len(directions)) and len(others) > 1):
            bound = cls(np.ascontiguousarray(directions[:count].T), size, threshold)
            short = bound.of(others)
            share = np.count_nonzero(np.triu(short @ short.T >= bound.least, 1)) / (len(others) * (len(others) - 1) / 2)
            cost = 2 * bound.size / _FLOPS + share * _PAIR_S
            if cost < least:
                found, least = bound, cost
        return found

    def of(self, units: NDArray[np.float64]) -> NDArray[np.float32]:
        """Shortens rows of length 1 from (m, D) to (m, size)."""
        if self._basis is None:
            return units.astype(np.float32)
        short = np.empty((len(units), self.size))
        short[:, :-1] = units @ self._basis
        squares = (units * units).sum(1) - (short[:, :-1] * short[:, :-1]).sum(1)
        short[:, -1] = np.sqrt(np.maximum(squares, 0) + 1e-10)  # far above the errors of float64
        return short.astype(np.float32)


class _ShortRows:
    """Short rows in a temporary file, so the system can reuse their memory."""

    def __init__(self, bound: _Bound, most: int, run: _Map) -> None:
        self.bound, self._run = bound, run
        self.rows = np.empty(most, np.int64)
        self.count = 0
        try:
            with tempfile.TemporaryFile(prefix="robustfeat-") as file:
                file.truncate(4 * most * bound.size)
                self._short = np.asarray(np.memmap(file, np.float32, "r+", shape=(most, bound.size)))
        except OSError as exc:
            raise InputError(f"a temporary file cannot be written ({exc.strerror})", fix="free space") from exc

    def append(self, rows: NDArray[np.int64], short: NDArray[np.float32]) -> None:
        """Adds rows."""
        end = self.count + len(rows)
        self.rows[self.count : end], self._short[self.count : end] = rows, short
        self.count = end

    def near(self, short: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Pairs of (m, size) rows and stored rows that may be duplicates, as positions in both."""

        def compare(start: int) -> NDArray[np.int64]:
            tile = self._short[start : min(start + _TILE_ROWS, self.count)]
            products = short @ tile.T
            place, other = np.divmod(np.flatnonzero(products >= self.bound.least), len(tile))
            return np.stack([place, other + start])

        parts = list(self._run(compare, range(0, self.count, _TILE_ROWS)))
        place, other = np.concatenate(parts, axis=1) if parts else np.empty((2, 0), np.int64)
        return place, other


class _Grouping:
    """Builds groups block by block."""

    def __init__(self, collection: Directions, threshold: float) -> None:
        self._collection, self._threshold = collection, threshold
        count = len(collection)
        self.groups = Groups(np.full(count, -1, np.int64), np.full(count, np.nan), np.zeros(count, bool))

    def begin(self, bound: _Bound, most: int, run: _Map) -> None:
        """Reserves room for a number of rows."""
        self._bound = bound
        self._kept, self._members = _ShortRows(bound, most, run), _ShortRows(bound, most, run)

    def add(self, rows: NDArray[np.int64]) -> None:
        """Adds each row to a group, or keeps it."""
        short = self._bound.of(self._collection.units(rows))
        place, other = self._kept.near(short)
        best_row, best = _most_similar(len(rows), *self._duplicates(rows, place, self._kept.rows[other]))
        later, earlier = np.nonzero(np.tril(short @ short.T >= self._bound.least, -1))
        place_of = {int(row): place for place, row in enumerate(rows)}
        # In the order of rows, the fate of a pair's earlier row is known when the later row needs it.
        for at, row, cosine in zip(*self._duplicates(rows, later, rows[earlier]), strict=True):
            if best_row[place_of[int(row)]] < 0 and cosine > best[at]:
                best_row[at], best[at] = row, cosine
        alone = best_row < 0
        place, other = self._members.near(short[alone])
        self._duplicates(rows[alone], place, self._members.rows[other])  # marks the involved kept rows
        self.groups.kept[rows] = np.where(alone, rows, best_row)
        self.groups.cosines[rows] = np.where(alone, 1.0, best)
        self._kept.append(rows[alone], short[alone])
        self._members.append(rows[~alone], short[~alone])

    def _duplicates(
        self, rows: NDArray[np.int64], place: NDArray[np.int64], others: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
        """The pairs of `rows[place]` and `others` that are duplicates, and their cosines."""
        cosines = self._collection.pairs(rows[place], others)
        near = cosines >= self._threshold
        self.groups.involved[rows[place[near]]] = self.groups.involved[others[near]] = True
        return place[near], others[near], cosines[near]


def _most_similar(
    count: int, place: NDArray[np.int64], others: NDArray[np.int64], cosines: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """For each of `count` rows, the most similar duplicate, the first among equals; -1 for none."""
    best_row, best = np.full(count, -1, np.int64), np.full(count, -np.inf)
    order = np.lexsort((np.arange(len(place)), -cosines, place))
    _, first = np.unique(place[order], return_index=True)
    chosen = order[first]
    best_row[place[chosen]], best[place[chosen]] = others[chosen], cosines[chosen]
    return best_row, best
