"""The rows of a collection that are nearest to a query by cosine: exact, whatever the blocks and threads.

Float32 products, computed in blocks, leave out all rows that cannot be among the nearest. The cosines of the others
are computed anew in float64, in an order that does not depend on blocks, and decide. Of equal cosines the row with
the smaller number is the nearer one.
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
"""The most queries that share one pass over the collection, and the most neighbours that these have together."""

_PRODUCTS = 2**21
"""Products that are in memory at a time: 8 MB, which a processor's caches hold."""

_LEAST_ROWS, _MOST_ROWS = 512, 2**15
_PENDING = 2**14


@dataclass(frozen=True)
class Neighbours:
    """The nearest rows to each of m queries.

    Attributes:
        rows: (m, k) int64, the nearest first; -1 where there are no more. k is at most the rows of the collection.
        cosines: (m, k) float64; NaN there.
    """

    rows: NDArray[np.int64]
    cosines: NDArray[np.float64]


def queries_per_pass(k: int) -> int:
    """How many queries share one pass, so that the k neighbours of each take at most 64 MB."""
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
    """The k rows of a collection that are nearest to each query.

    Args:
        collection: the rows.
        queries: (m, D) features of the same model. A query that is not finite has no neighbours.
        k: 1 or more; of more than the collection has rows, all rows answer.
        own: (m,) the row that each query is, which is left out of its answer; -1 for none.
        block_rows: rows that are multiplied at a time; by default as many as are fast.
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
    """The nearest rows so far to each of some queries, (m, D) of length 1."""

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
        """The rows and their cosines, (m, k)."""
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
        """Notes the rows of a block that may be among the nearest, and returns how many there are."""
        floors = self._floors
        if start == 0 and products.shape[1] > self.k + 1:
            # The query's own row may be among the k + 1 best; k others then have at least this cosine.
            at = products.shape[1] - self.k - 1
            floors = np.partition(products, at, axis=1)[:, at] - np.float32(2 * self._error)
        query, place = np.divmod(np.flatnonzero(products >= floors[:, None]), products.shape[1])
        row = place + start
        wanted = (self._excluded[query] != row) & np.isfinite(products[query, place])
        self._pending.append((query[wanted], row[wanted]))
        return int(wanted.sum())

    def _settle(self) -> None:
        """Computes the exact cosines of the rows that were noted, and keeps the k nearest of each query."""
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
