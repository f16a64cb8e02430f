"""Treats rows of features as directions: lengths, fast float32 products, and exact cosines."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from robustfeat.serving.heads.features import CHUNK_ROWS, Features, Rows

__all__ = ["Directions", "lengths_of", "product_error", "to_units"]

_USUAL = (1e-15, 1e15)
"""Lengths of rows whose float32 products neither overflow nor lose digits. Other rows are scaled first."""


class Directions:
    """The rows of a collection as directions.

    A failed row has no direction and is never found. The cosine with a row of zeros is 0.

    Args:
        features: the collection. Its rows are read once, for their lengths.

    Attributes:
        features: the collection.
        lengths: (n,) float64 Euclidean lengths; NaN for failed rows.

    Raises:
        InputError: a row is not finite, but has no error in the index.
    """

    def __init__(self, features: Features) -> None:
        self.features = features
        values = features.values
        # Slicing an array is faster than slicing a memory map.
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
        """D, the length of a feature vector."""
        return int(self._values.shape[1])

    def units(self, rows: slice | NDArray[np.int64]) -> NDArray[np.float64]:
        """Rows scaled to length 1, (m, D); zeros for failed rows and rows of zeros."""
        return to_units(np.where(self._failed[rows][:, None], 0, self._values[rows]))

    def products(self, rows: slice, units: NDArray[np.float32]) -> NDArray[np.float32]:
        """Approximate cosines, (q, m), between (q, D) `units` and some rows; -inf for failed rows.

        They differ from the exact cosines by at most `product_error(D)`.
        """
        block = self._values[rows]
        if block.dtype != np.float32 or self._unusual[rows].any():
            found = units @ self.units(rows).astype(np.float32).T
        else:
            with np.errstate(invalid="ignore"):  # failed rows may be infinite
                found = units @ block.T
                found *= self._inverse[rows]
        failed = self._failed[rows]
        if failed.any():
            found[:, failed] = -np.inf
        return found

    def cosines(self, rows: NDArray[np.int64], others: NDArray[np.float64]) -> NDArray[np.float64]:
        """Exact cosines, (m,), between good `rows` and directions `others`, (m, D) of length 1, pair by pair.

        Each is a float64 sum in an order that only depends on D.
        """
        if self._values.dtype.itemsize > 4:
            found = np.einsum("ij,ij->i", self.units(rows), others)
        else:
            lengths = self.lengths[rows]
            found = np.einsum("ij,ij->i", self._values[rows].astype(np.float64), others)
            found /= np.where(lengths > 0, lengths, 1)
        return np.asarray(np.clip(found, -1, 1))

    def pairs(self, rows: NDArray[np.int64], others: NDArray[np.int64]) -> NDArray[np.float64]:
        """Exact cosines, (m,), between `rows` and other rows, pair by pair, in blocks."""
        found = np.empty(len(rows))
        for start in range(0, len(rows), CHUNK_ROWS):
            part = slice(start, start + CHUNK_ROWS)
            found[part] = self.cosines(rows[part], self.units(others[part]))
        return found


def lengths_of(values: NDArray[np.floating]) -> NDArray[np.float64]:
    """Euclidean lengths, (n,), of (n, D) rows."""
    # Squares of float64 numbers may overflow.
    largest = np.abs(values).max(1, initial=0).astype(np.float64) if values.dtype.itemsize > 4 else None
    x = values.astype(np.float64)
    if largest is None:
        return np.asarray(np.sqrt((x * x).sum(1)))
    x /= np.where(largest > 0, largest, 1)[:, None]
    return np.asarray(np.sqrt((x * x).sum(1)) * largest)


def to_units(values: NDArray[np.floating]) -> NDArray[np.float64]:
    """Scales (n, D) rows to length 1, as float64. A row of zeros stays zero."""
    lengths = lengths_of(values)
    return np.asarray(values.astype(np.float64) / np.where(lengths > 0, lengths, 1)[:, None])


def product_error(size: int) -> float:
    """The largest error of a float32 product of two directions of D numbers, for any order of the sum.

    Source: Higham, Accuracy and Stability of Numerical Algorithms, section 3.1, with Cauchy's inequality. It includes 8
    more roundings for the two scalings.
    """
    return (size + 8) * 2.0**-24
