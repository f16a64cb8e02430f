"""Rows of features as directions: their lengths, float32 products to choose by, and exact cosines."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from robustfeat.serving.heads.features import CHUNK_ROWS, Features, Rows

__all__ = ["Directions", "lengths_of", "product_error", "to_units"]

_USUAL = (1e-15, 1e15)
"""Lengths of rows whose float32 products neither overflow nor lose digits; other rows are scaled first."""


class Directions:
    """The rows of a collection as directions.

    A failed row has none, and answers nothing. The cosine between a row of zeros and any row is 0.

    Args:
        features: the collection; its rows are read once, for their lengths.

    Attributes:
        features: the collection.
        lengths: (n,) float64 Euclidean lengths; NaN for failed rows.

    Raises:
        InputError: a row is not finite, and the index knows no error of it.
    """

    def __init__(self, features: Features) -> None:
        self.features = features
        values = features.values
        # A slice of a memory map costs more than a slice of an array.
        self._values: Rows = np.asarray(values) if isinstance(values, np.ndarray) else values
        self.lengths = np.empty(len(features))
        for rows, values in features.chunks():
            self.lengths[rows.start : rows.stop] = lengths_of(values)
        self._failed = ~features.good
        self.lengths[self._failed] = np.nan
        usual = (self.lengths >= _USUAL[0]) & (self.lengths <= _USUAL[1])
        self._unusual = ~(usual | self._failed | (self.lengths == 0))
        self._inverse = np.zeros(len(features), np.float32)
        np.divide(1, self.lengths, out=self._inverse, where=usual, casting="same_kind")

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def size(self) -> int:
        """D."""
        return int(self._values.shape[1])

    def units(self, rows: slice | NDArray[np.int64]) -> NDArray[np.float64]:
        """(m, D) rows of length 1; zeros for failed rows and rows of zeros."""
        return to_units(np.where(self._failed[rows][:, None], 0, self._values[rows]))

    def products(self, rows: slice, units: NDArray[np.float32]) -> NDArray[np.float32]:
        """(q, m) approximate cosines between (q, D) `units` and some rows; -inf for failed rows.

        They differ from the exact ones by at most `product_error(D)`.
        """
        block = self._values[rows]
        if block.dtype != np.float32 or self._unusual[rows].any():
            found = units @ self.units(rows).astype(np.float32).T
        else:
            with np.errstate(invalid="ignore"):  # infinities in failed rows
                found = units @ block.T
                found *= self._inverse[rows]
        failed = self._failed[rows]
        if failed.any():
            found[:, failed] = -np.inf
        return found

    def cosines(self, rows: NDArray[np.int64], others: NDArray[np.float64]) -> NDArray[np.float64]:
        """(m,) exact cosines between `rows` that did not fail and as many directions `others`, (m, D) of length 1.

        Each is a sum in float64, in an order that depends on D only.
        """
        if self._values.dtype.itemsize > 4:
            found = np.einsum("ij,ij->i", self.units(rows), others)
        else:
            lengths = self.lengths[rows]
            found = np.einsum("ij,ij->i", self._values[rows].astype(np.float64), others)
            found /= np.where(lengths > 0, lengths, 1)
        return np.asarray(np.clip(found, -1, 1))

    def pairs(self, rows: NDArray[np.int64], others: NDArray[np.int64]) -> NDArray[np.float64]:
        """(m,) exact cosines between `rows` and as many other rows, a few at a time."""
        found = np.empty(len(rows))
        for start in range(0, len(rows), CHUNK_ROWS):
            part = slice(start, start + CHUNK_ROWS)
            found[part] = self.cosines(rows[part], self.units(others[part]))
        return found


def lengths_of(values: NDArray[np.floating]) -> NDArray[np.float64]:
    """(n,) Euclidean lengths of (n, D) rows."""
    # Rows of float64 may hold numbers whose squares overflow.
    largest = np.abs(values).max(1, initial=0).astype(np.float64) if values.dtype.itemsize > 4 else None
    x = values.astype(np.float64)
    if largest is None:
        return np.asarray(np.sqrt((x * x).sum(1)))
    x /= np.where(largest > 0, largest, 1)[:, None]
    return np.asarray(np.sqrt((x * x).sum(1)) * largest)


def to_units(values: NDArray[np.floating]) -> NDArray[np.float64]:
    """(n, D) rows at length 1, as float64; a row of zeros stays one."""
    lengths = lengths_of(values)
    return np.asarray(values.astype(np.float64) / np.where(lengths > 0, lengths, 1)[:, None])


def product_error(size: int) -> float:
    """The largest error of a float32 product of two directions of D numbers, whatever the order of its sum.

    Source: Higham, Accuracy and Stability of Numerical Algorithms, section 3.1, with Cauchy's inequality; 8 more
    roundings are granted for the two scalings.
    """
    return (size + 8) * 2.0**-24
