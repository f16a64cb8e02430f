"""Rows of features as a solver sees them: chosen, scaled, with a 1 for the intercept, a block at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from robustfeat.serving.heads.kinds import Array

__all__ = ["ScaledRows"]

_T = TypeVar("_T")

_BLOCK = 512
"""Rows of a block: of 512 features a processor's cache holds it. Passes over a file took a quarter less processor time
than with 4,096."""
_ALONE = 4096
"""So many rows are not worth a second thread."""
_IN_MEMORY = 2**26
"""Rows of up to so many values (131,072 rows of 512, 512 MiB) are scaled once and kept; others at each pass."""


class ScaledRows:
    """Some rows of features, scaled.

    Args:
        values: (n, D) features, possibly memory-mapped.
        rows: (m,) int64, ascending: those to see.
        scaling: one of `SCALINGS`.
        threads: blocks that are worked on at once.
        spanned: show fewer rows than features by their coordinates in the space that they span, (m, m + 1): there a
            linear classifier has the same minimum, in a fraction of the time.

    Attributes:
        count, size: m, and r, the columns of a block.
        arrays: what a head needs to know of the scaling.
    """

    def __init__(
        self,
        values: NDArray[Any],
        rows: NDArray[np.int64],
        scaling: str,
        threads: int = 1,
        *,
        spanned: bool = False,
    ) -> None:
        self._values, self._rows, self._threads = values, rows, threads
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

    def map(self, function: Callable[[slice, Array], _T]) -> Iterator[_T]:
        """Calls `function` with each block's places, from 0 to m, and (n, r) float64 rows; results come in order."""
        return self._map(lambda part: function(part, self._block(part)))

    def to_features(self, weights: Array) -> Array:
        """Weights (K, r) of these rows to weights (K, D + 1) of scaled features and the intercept."""
        if self._basis is None:
            return weights
        return np.concatenate([weights[:, :-1] @ self._basis.T, weights[:, -1:]], 1)

    def _keep(self) -> None:
        kept = np.empty((self.count, self.size))
        for part in self._parts():
            kept[part] = self._block(part)
        self._kept = kept

    def _span(self) -> None:
        assert self._kept is not None
        self._basis, triangle = np.linalg.qr(self._kept[:, :-1].T)
        self._kept = _padded(triangle.T)
        self.size = self.count + 1

    def _map(self, function: Callable[[slice], _T]) -> Iterator[_T]:
        parts = self._parts()
        if self._threads == 1 or self.count <= _ALONE:
            yield from map(function, parts)
            return
        waiting: deque[Future[_T]] = deque()
        with ThreadPoolExecutor(self._threads) as pool:
            for part in parts:
                waiting.append(pool.submit(function, part))
                if len(waiting) > 2 * self._threads:  # results may be as large as a Hessian
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    def _parts(self) -> list[slice]:
        return [slice(start, min(start + _BLOCK, self.count)) for start in range(0, self.count, _BLOCK)]

    def _raw(self, part: slice) -> Array:
        return self._values[self._rows[part]].astype(np.float64)

    def _block(self, part: slice) -> Array:
        if self._kept is not None:
            return self._kept[part]
        block = np.ones((part.stop - part.start, self.size))  # scaled in place: a pass over a file is mostly this
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
        """Means and standard deviations by feature, as scikit-learn's StandardScaler has them: 1 for constant ones."""
        mean: Array = sum(self._map(lambda part: self._raw(part).sum(0)), np.zeros(self.size - 1)) / self.count
        squares = sum(self._map(lambda part: ((self._raw(part) - mean) ** 2).sum(0)), np.zeros(self.size - 1))
        variance = squares / self.count
        epsilon = np.finfo(np.float64).eps
        constant = variance <= self.count * epsilon * variance + (self.count * mean * epsilon) ** 2
        return mean, np.where(constant, 1.0, np.sqrt(variance))


def _padded(x: Array) -> Array:
    return np.concatenate([x, np.ones((len(x), 1))], 1)
