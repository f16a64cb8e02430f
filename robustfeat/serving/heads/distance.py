"""Measures how far an image is from a head's training images, to detect images of no known class.

The distance is Mahalanobis's to the nearest class mean, for features of unit length, with one covariance within all
classes (Lee et al., NeurIPS 2018). `typicality` is the share of held-out images of the classes that are at least as far
away: the p-value of conformal outlier detection (Laxhammar and Falkman, 2010).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustfeat.serving.bulk.stacked import Rows
from robustfeat.serving.heads.kinds import Array, Arrays

__all__ = ["DISTANCE_ARRAYS", "distance_shapes", "fit_distance", "measure_distance", "measure_typicality"]

DISTANCE_ARRAYS = ("distance.means", "distance.basis", "distance.inverses", "distance.floor", "distance.unseen")
"""(M, D), (r, D), (r,), (1,) and (q,): class means, directions and inverse variances of the covariance, the variance in
other directions, and the ascending distances of held-out rows."""

_SHRUNK = 0.1
"""Share of the covariance that is spread evenly over all directions, since few rows cannot estimate it well."""

_DIRECTIONS = 128
_MOST_ROWS = 20_000
_MOST_UNSEEN = 1_000


def fit_distance(
    values: Rows,
    rows: NDArray[np.int64],
    groups: NDArray[np.int64],
    splits: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]],
) -> dict[str, Array]:
    """Fits the arrays that detect images unlike the classes.

    Args:
        values: (n, D) features, possibly memory-mapped.
        rows: (m,) rows with labels, of which at most `_MOST_ROWS` are used.
        groups: (m,) the class of each row, or zeros if rows may have several labels.
        splits: positions to fit on, and positions to measure.

    Returns:
        `DISTANCE_ARRAYS`, or nothing if no row is held out.
    """
    unseen = [
        measure_distance(_fit(values, rows, groups, fit), values[rows[held[:_MOST_ROWS]]]) for fit, held in splits
    ]
    if not unseen:
        return {}
    distances = np.sort(np.concatenate(unseen))
    kept = np.linspace(0, len(distances) - 1, min(len(distances), _MOST_UNSEEN)).round().astype(np.int64)
    return {**_fit(values, rows, groups, np.arange(len(rows))), "distance.unseen": distances[kept]}


def distance_shapes(arrays: Arrays, size: int, classes: int) -> dict[str, tuple[int, ...]]:
    """The shapes of these arrays for D features and K classes.

    Raises:
        ValueError: means or distances are missing, distances do not ascend, or there are more means than classes or
            more directions than features, which would slow down every prediction.
    """
    means, directions, unseen = (len(arrays[f"distance.{name}"]) for name in ("means", "basis", "unseen"))
    if not means or not unseen or (np.diff(arrays["distance.unseen"]) < 0).any():
        raise ValueError("distances must have a mean, and distances of held-out rows must ascend")
    if means > classes or directions > size:
        raise ValueError(
            f"distances must have at most {classes} means and {size} directions; got {means} and {directions}"
        )
    shapes = ((means, size), (directions, size), (directions,), (1,), (unseen,))
    return dict(zip(DISTANCE_ARRAYS, shapes, strict=True))


def measure_distance(arrays: Arrays, features: NDArray[Any]) -> Array:
    """Squared distances, (n,), of (n, D) features."""
    x = _unit(features)
    nearest = np.full(len(x), np.inf)
    for mean in arrays["distance.means"]:
        away = x - mean
        square = (away**2).sum(1) / arrays["distance.floor"][0]
        square += (away @ arrays["distance.basis"].T) ** 2 @ arrays["distance.inverses"]
        nearest = np.minimum(nearest, square)
    return nearest


def measure_typicality(arrays: Arrays, features: NDArray[Any]) -> Array:
    """Typicality, (n,) in (0, 1], of (n, D) features: evenly distributed in the classes, near 0 for other images."""
    unseen = arrays["distance.unseen"]
    as_far = len(unseen) - np.searchsorted(unseen, measure_distance(arrays, features), side="left")
    typicality: Array = (1 + as_far) / (1 + len(unseen))
    return typicality


def _fit(
    values: Rows, rows: NDArray[np.int64], groups: NDArray[np.int64], places: NDArray[np.int64]
) -> dict[str, Array]:
    if len(places) > _MOST_ROWS:
        places = np.sort(np.random.default_rng(0).choice(places, _MOST_ROWS, replace=False))
    x, own = _unit(values[rows[places]]), groups[places]
    present, own = np.unique(own, return_inverse=True)
    means = np.stack([x[own == group].mean(0) for group in range(len(present))])
    within = x - means[own]
    size = x.shape[1]
    even = max(float((within**2).sum()) / len(x) / size, 1e-12)  # the mean variance per direction
    variances, basis = _principal(within)
    shrunk = (1 - _SHRUNK) * variances + _SHRUNK * even
    # The rest of the trace is divided over the other directions.
    rest = max((even * size - shrunk.sum()) / max(size - len(shrunk), 1), _SHRUNK * even)
    return {
        "distance.means": means,
        "distance.basis": basis,
        "distance.inverses": 1 / shrunk - 1 / rest,
        "distance.floor": np.array([rest]),
    }


def _principal(within: Array) -> tuple[Array, Array]:
    """The largest variances, at most `_DIRECTIONS`, and their directions (r, D)."""
    count, size = within.shape
    wide = count < size
    variances, vectors = np.linalg.eigh((within @ within.T if wide else within.T @ within) / count)
    kept = np.flatnonzero(variances > 1e-9 * variances[-1])[-_DIRECTIONS:]
    basis = vectors[:, kept].T
    if wide:
        basis = basis @ within / np.sqrt(variances[kept] * count)[:, None]
    return variances[kept], np.ascontiguousarray(basis)


def _unit(features: NDArray[Any]) -> Array:
    x = np.asarray(features, np.float64)
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    unit: Array = x / np.where(norms == 0, 1.0, norms)
    return unit
