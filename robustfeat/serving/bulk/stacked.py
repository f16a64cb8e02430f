"""Presents the rows of several arrays as one, for datasets of many files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Rows", "StackedRows"]


class StackedRows:
    """Stacked arrays that take slices and row numbers like one array, without a copy.

    Args:
        parts: at least one array, (n, D) each, of the same D and dtype. They may be memory-mapped.

    Attributes:
        shape: (rows of all parts, D).
        dtype: dtype of the parts.
        ndim: 2.
    """

    ndim = 2

    def __init__(self, parts: Sequence[NDArray[Any]]) -> None:
        # Slicing an array is faster than slicing a memory map.
        self._parts = [np.asarray(part) for part in parts]
        self._starts = np.cumsum([0, *map(len, self._parts)])
        self.shape = (int(self._starts[-1]), int(self._parts[0].shape[1]))
        self.dtype = self._parts[0].dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: int | np.integer[Any] | slice | NDArray[Any]) -> NDArray[Any]:
        """One row, (D,), a slice, or the rows of an array of numbers from 0 or of (n,) booleans.

        Raises:
            IndexError: the row does not exist.
        """
        if isinstance(rows, slice):
            start, stop, step = rows.indices(len(self))
            return self._span(start, stop) if step == 1 else self._take(np.arange(start, stop, step))
        if isinstance(rows, (int, np.integer)):
            return np.asarray(self._take(np.array([rows + len(self) if rows < 0 else rows]))[0])
        rows = np.asarray(rows)
        return self._take(np.flatnonzero(rows) if rows.dtype == bool else rows)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        """Copies all rows to memory."""
        if copy is False:
            raise ValueError("rows of several files cannot be one array without a copy")
        return np.concatenate(self._parts).astype(dtype or self.dtype, copy=False)

    def _span(self, start: int, stop: int) -> NDArray[Any]:
        stop = max(start, stop)
        first = min(int(np.searchsorted(self._starts, start, side="right")), len(self._parts)) - 1
        last = max(first + 1, int(np.searchsorted(self._starts, stop, side="left")))
        pieces = [
            self._parts[number][max(0, start - self._starts[number]) : stop - self._starts[number]]
            for number in range(first, last)
        ]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _take(self, rows: NDArray[Any]) -> NDArray[Any]:
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"rows must be between 0 and {len(self) - 1}; got {rows.min()} to {rows.max()}")
        part = np.searchsorted(self._starts, rows, side="right") - 1
        taken = np.empty((len(rows), self.shape[1]), self.dtype)
        for number in np.unique(part):
            chosen = part == number
            taken[chosen] = self._parts[number][rows[chosen] - self._starts[number]]
        return taken


Rows = NDArray[Any] | StackedRows
"""(n, D) features, as one array or several."""
