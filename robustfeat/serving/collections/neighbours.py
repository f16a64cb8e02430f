"""Finds the rows of a collection that are nearest to a query by cosine, exactly for any blocks and threads.

Float32 products in blocks exclude rows that cannot be among the nearest. The cosines of the other rows are computed
again in float64, in an order that does not depend on blocks, and decide. Among equal cosines, the smaller row number is
nearer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from robustfeat.progress import Progress
from robustfeat.serving.collections.directions import Directions, product_error, to_units
from robustfeat.serving.heads.features import CHUNK_ROWS

__all__ = ["Neighbours", "find_neighbours", "queries_per_pass"]

_QUERIES, _ANSWERS = 4096, 2**22
"""Most queries per pass over the collection, and most neighbours of all its queries."""

_PRODUCTS = 2**21
"""Products in memory at a time: 8 MB, which fits a processor's caches."""

_LEAST_ROWS, _MOST_ROWS = 512, 2**15
_PENDING = 2**14


@dataclass(frozen=True)
class Neighbours:
    """The nearest rows to each of m queries.

    Attributes:
        rows: (m, k) int64, the nearest first; -1 for missing ones. k is at most the rows of the collection.
        cosines: (m, k) float64; NaN for missing ones.
    """

    rows: NDArray[np.int64]
    cosines: NDArray[np.float64]


def queries_per_pass(k: int) -> int:
    """Number of queries per pass, so that the k neighbours of all take at most 64 MB."""
    return max(1, min(_QUERIES, _ANSWERS // max(k, 1)))


def find_neighbours(
    collection: Directions,
    queries: NDArray[np.floating],
    k: int,
    *,
    own: NDArray[np.int64] | None = None,
    block_rows: int | None = None,
    progress: Progress | None = None,
) -> Neighbours:
    """Finds the k rows of a collection that are nearest to each query.

    Args:
        collection: the rows.
        queries: (m, D) features of the same model. An infinite or NaN query has no neighbours.
        k: number of neighbours, 1 or more. If the collection has fewer rows, all are returned.
        own: (m,) each query's own row, which is excluded; -1 for none.
        block_rows: rows per block; by default a fast number.
        progress: counts queries.

    Raises:
        ValueError: the queries have another shape, or k is less than 1.
    """
    if queries.ndim != 2 or queries.shape[1] != collection.size:
        raise ValueError(f"queries must be (m, {collection.size}); got {queries.shape}")
    if k < 1:
        raise ValueError(f"k must be 1 or more; got {k}")
    k = min(k, len(collection))
    rows = np.full((len(queries), k), -1, np.int64)
    cosines = np.full((len(queries), k), np.nan)
    step = queries_per_pass(k)
    for start in range(0, len(queries), step):
        part = slice(start, min(start + step, len(queries)))
        finite = np.flatnonzero(np.isfinite(queries[part]).all(1)) + start
        if len(finite):
            excluded = np.full(len(finite), -1, np.int64) if own is None else own[finite]
            nearest = _Nearest(collection, to_units(queries[finite]), k, excluded)
            rows[finite], cosines[finite] = nearest.search(block_rows)
        if progress:
            progress.advance(part.stop - part.start)
    return Neighbours(rows, cosines)


class _Nearest:
    """The nearest rows so far to some queries, (m, D) of length 1."""

    def __init__(
        self, collection: Directions, queries: NDArray[np.float64], k: int, excluded: NDArray[np.int64]
    ) -> None:
        self._collection, self._queries, self.k, self._excluded = collection, queries, k, excluded
        self._error = product_error(collection.size)
        self._floors = np.full(len(queries), -np.inf, np.float32)
        self._rows = np.full((len(queries), k), -1, np.int64)
        self._cosines = np.full((len(queries), k), -np.inf)
        self._pending: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []

    def search(self, block_rows: int | None) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Searches the collection. Returns rows and cosines, (m, k)."""
        units = self._queries.astype(np.float32)
        step = block_rows or min(max(_PRODUCTS // len(units), _LEAST_ROWS), _MOST_ROWS)
        most = max(_PENDING, 2 * self._rows.size)
        waiting = 0
        for start in range(0, len(self._collection), step):
            block = slice(start, min(start + step, len(self._collection)))
            waiting += self._offer(start, self._collection.products(block, units))
            if start == 0 or waiting > most:
                self._settle()
                waiting = 0
        self._settle()
        return self._rows, np.where(self._rows < 0, np.nan, self._cosines)

    def _offer(self, start: int, products: NDArray[np.float32]) -> int:
        """Stores the rows of a block that may be among the nearest, and returns their number."""
        floors = self._floors
        if start == 0 and products.shape[1] > self.k + 1:
            # The query's own row may be among the k + 1 best, so k others have at least this cosine.
            at = products.shape[1] - self.k - 1
            floors = np.partition(products, at, axis=1)[:, at] - np.float32(2 * self._error)
        query, place = np.divmod(np.flatnonzero(products >= floors[:, None]), products.shape[1])
        row = place + start
        wanted = (self._excluded[query] != row) & np.isfinite(products[query, place])
        self._pending.append((query[wanted], row[wanted]))
        return int(wanted.sum())

    def _settle(self) -> None:
        """Computes the exact cosines of the stored rows, and keeps the k nearest per query."""
        if not self._pending:
            return
        query, row = (np.concatenate(parts) for parts in zip(*self._pending, strict=True))
        self._pending = []
        cosine = np.empty(len(row))
        for start in range(0, len(row), CHUNK_ROWS):
            part = slice(start, start + CHUNK_ROWS)
            cosine[part] = self._collection.cosines(row[part], self._queries[query[part]])
        old = np.nonzero(self._rows >= 0)
        query = np.concatenate([old[0], query])
        row = np.concatenate([self._rows[old], row])
        cosine = np.concatenate([self._cosines[old], cosine])
        order = np.lexsort((row, -cosine, query))
        query, row, cosine = query[order], row[order], cosine[order]
        rank = np.arange(len(query)) - np.searchsorted(query, query)
        best = rank < self.k
        self._rows[query[best], rank[best]] = row[best]
        self._cosines[query[best], rank[best]] = cosine[best]
        self._floors = (self._cosines[:, -1] - self._error).astype(np.float32)
        self._floors = np.nextafter(self._floors, np.float32(-np.inf))
