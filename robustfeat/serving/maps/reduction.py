"""Reduces features to their principal components, for layouts and clusters."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from robustfeat.serving.heads.features import CHUNK_ROWS, Features

__all__ = ["REDUCED_SIZE", "reduce_features"]

REDUCED_SIZE = 50
"""Number of principal components, as in the t-SNE literature (van der Maaten and Hinton, JMLR 2008)."""


def reduce_features(features: Features, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """Principal components of rows scaled to length 1, so small distances mean large cosines.

    The rows are read three times, in blocks.

    Args:
        features: features with finite values in `rows`.
        rows: (m,) row numbers, ascending.

    Returns:
        (m, min(D, 50)) float32, the leading component first. The largest loading of each component is positive, which
        fixes its sign.
    """
    size = features.values.shape[1]
    total, products = np.zeros(size), np.zeros((size, size))
    parts = [rows[start : start + CHUNK_ROWS] for start in range(0, len(rows), CHUNK_ROWS)]
    for part in parts:
        total += _units(features, part).sum(0)
    mean = total / len(rows)
    for part in parts:
        centred = _units(features, part) - mean
        products += centred.T @ centred
    _, vectors = np.linalg.eigh(products)
    leading = vectors[:, ::-1][:, :REDUCED_SIZE]
    leading *= np.sign(leading[np.abs(leading).argmax(0), np.arange(leading.shape[1])])
    reduced = np.empty((len(rows), leading.shape[1]), np.float32)
    for number, part in enumerate(parts):
        reduced[number * CHUNK_ROWS :][: len(part)] = (_units(features, part) - mean) @ leading
    return reduced


def _units(features: Features, rows: NDArray[np.int64]) -> NDArray[np.float64]:
    values = np.asarray(features.values[rows], np.float64)
    largest = np.abs(values).max(1, keepdims=True)  # the squares of large numbers overflow
    values = values / np.where(largest > 0, largest, 1)
    lengths = np.linalg.norm(values, axis=1, keepdims=True)
    return np.asarray(values / np.where(lengths > 0, lengths, 1))
