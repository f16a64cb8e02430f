"""Gives a solver blocks of chosen, scaled rows with a 1 for the intercept."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from robustfeat.serving.bulk.stacked import Rows
from robustfeat.serving.heads.kinds import Array

__all__ = ["ScaledRows"]

_T = TypeVar("_T")
_R = TypeVar("_R")

_BLOCK = 512
"""Rows per block. With 512 features, a block fits a processor's cache. Passes over a file took a quarter less processor
time than with 4,096."""
_SMALL = 64
_WIDE = 256
"""Values per row from which work on (r, r) matrices is worth a second thread."""
_CHUNK = 4
"""Blocks that a thread sums per result. The number does not depend on the threads, so neither does the result."""
_IN_MEMORY = 2**26
"""Most values (131,072 rows of 512, 512 MiB) that are scaled once and kept. Larger data are scaled in each pass."""


class ScaledRows:
    """Chosen and scaled rows of features.

    Args:
        values: (n, D) features, possibly memory-mapped.
        rows: (m,) int64, ascending: the chosen rows.
        scaling: one of `SCALINGS`.
        threads: number of parallel blocks.
        spanned: represent fewer rows than features by coordinates in the space that they span, (m, m + 1). A linear
            classifier has the same minimum there, in a fraction of the time.

    Attributes:
        count, size: m, and r, the columns of a block.
        arrays: the scaling's arrays for a head.
    """

    def __init__(
        self,
        values: Rows,
        rows: NDArray[np.int64],
        scaling: str,
        threads: int = 1,
        *,
        spanned: bool = False,
    ) -> None:
        self._values, self._rows, self._threads = values, rows, threads
        self._pool: ThreadPoolExecutor | None = None
        self.count, self.size = len(rows), values.shape[1] + 1
        self._unit = scaling == "l2"
        self.arrays: dict[str, Array] = {}
        if scaling == "standard":
            self.arrays = dict(zip(("scaling.mean", "scaling.scale"), self._measure(), strict=True))
        self._kept: Array | None = None
        self._basis: Array | None = None
        if self.count * self.size <= _IN_MEMORY:
            self._keep()
            if spanned and self.count < self.size - 1:
                self._span()

    @property
    def is_small(self) -> bool:
        """Whether (r, r) matrices take less time than the calls of functions that make and solve them."""
        return self.count <= _BLOCK and self.size <= _SMALL

    def sum(self, function: Callable[[slice, Array], tuple[Array, ...]], *, large: bool = False) -> list[Array]:
        """Sums the results of `function` over blocks, given positions in 0 to m and (n, r) float64 rows.

        Args:
            function: called in several threads at once.
            large: use larger blocks, for results whose sums take time.
        """
        return self._sum(lambda part: function(part, self._block(part)), large=large)

    def each(self, function: Callable[[_T], None], items: Sequence[_T]) -> None:
        """Calls `function` with each item, in several threads at once. It must not use this object."""
        if self._threads == 1 or self.size < _WIDE:
            deque(map(function, items), 0)
            return
        shares = [items[first :: self._threads] for first in range(min(self._threads, len(items)))]
        deque(self._in_threads(lambda share: deque(map(function, share), 0), shares), 0)

    def to_features(self, weights: Array) -> Array:
        """Converts weights (K, r) of these rows to weights (K, D + 1) of scaled features and the intercept."""
        if self._basis is None:
            return weights
        return np.concatenate([weights[:, :-1] @ self._basis.T, weights[:, -1:]], 1)

    def _keep(self) -> None:
        kept = np.empty((self.count, self.size))
        for part in self._parts(_BLOCK):
            kept[part] = self._block(part)
        self._kept = kept

    def _span(self) -> None:
        assert self._kept is not None
        self._basis, triangle = np.linalg.qr(self._kept[:, :-1].T)
        self._kept = _padded(triangle.T)
        self.size = self.count + 1

    def _sum(self, function: Callable[[slice], tuple[Array, ...]], *, large: bool = False) -> list[Array]:
        parts = self._parts(_CHUNK * _BLOCK if large else _BLOCK)
        share = 1 if large else _CHUNK
        chunks = [parts[start : start + share] for start in range(0, len(parts), share)]

        def sum_chunk(chunk: Sequence[slice]) -> list[Array]:
            return _total(map(function, chunk))

        if self._threads == 1 or len(chunks) == 1:
            return _total(map(sum_chunk, chunks))
        return _total(self._in_threads(sum_chunk, chunks))

    def _in_threads(self, function: Callable[[_T], _R], items: Sequence[_T]) -> Iterator[_R]:
        """Yields results in order, few at a time, since each may be as large as a Hessian."""
        self._pool = self._pool or ThreadPoolExecutor(self._threads)
        waiting: deque[Future[_R]] = deque()
        for item in items:
            waiting.append(self._pool.submit(function, item))
            if len(waiting) > 2 * self._threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _parts(self, size: int) -> list[slice]:
        return [slice(start, min(start + size, self.count)) for start in range(0, self.count, size)]

    def _raw(self, part: slice) -> Array:
        return self._values[self._rows[part]].astype(np.float64)

    def _block(self, part: slice) -> Array:
        if self._kept is not None:
            return self._kept[part]
        block = np.ones((part.stop - part.start, self.size))  # scaled in place, which dominates a pass over a file
        x = block[:, :-1]
        x[:] = self._values[self._rows[part]]
        if self.arrays:
            x -= self.arrays["scaling.mean"]
            x /= self.arrays["scaling.scale"]
        elif self._unit:
            norms = np.sqrt(np.einsum("ij,ij->i", x, x))[:, None]
            x /= np.where(norms == 0, 1.0, norms)
        return block

    def _measure(self) -> tuple[Array, Array]:
        """Means and standard deviations per feature, as in scikit-learn's StandardScaler: 1 for constant features."""
        (total,) = self._sum(lambda part: (self._raw(part).sum(0),))
        mean = total / self.count
        (squares,) = self._sum(lambda part: (((self._raw(part) - mean) ** 2).sum(0),))
        variance = squares / self.count
        epsilon = np.finfo(np.float64).eps
        constant = variance <= self.count * epsilon * variance + (self.count * mean * epsilon) ** 2
        return mean, np.where(constant, 1.0, np.sqrt(variance))


def _padded(x: Array) -> Array:
    return np.concatenate([x, np.ones((len(x), 1))], 1)


def _total(results: Iterable[Sequence[Array]]) -> list[Array]:
    """Sums arrays by position, in the order of the results. The first result is overwritten."""
    totals: list[Array] = []
    for found in results:
        if totals:
            for at, more in enumerate(found):
                totals[at] += more
        else:
            totals = list(found)
    return totals
