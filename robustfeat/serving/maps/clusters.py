"""Clusters similar rows by k-means."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from robustfeat.progress import Progress

__all__ = ["find_clusters"]

_CANDIDATES = (4, 6, 8, 10, 12, 16, 20, 25, 30)
_SCORED_ROWS = 2000
_BATCH_ROWS = 4096


def find_clusters(
    reduced: NDArray[np.float32], clusters: int | None, *, seed: int = 0, quiet: bool = True
) -> NDArray[np.int32]:
    """Finds the cluster of each row, numbered by decreasing size.

    Args:
        reduced: (n, d) from `reduce_features`.
        clusters: number of clusters; None chooses 4 to 30 by the mean silhouette of 2,000 rows (Rousseeuw, 1987).
        seed: random seed of the starts and the sample.
        quiet: hide progress.

    Returns:
        (n,) int32, from 0.
    """
    from sklearn.metrics import silhouette_score

    distinct = len(np.unique(reduced, axis=0)) if len(reduced) <= 10_000 else len(reduced)
    if clusters is not None:
        return _by_size(_fit(reduced, min(clusters, distinct), seed))
    scored = np.sort(np.random.default_rng(seed).permutation(len(reduced))[:_SCORED_ROWS])
    best, found = -np.inf, np.zeros(len(reduced), np.int32)
    candidates = [count for count in _CANDIDATES if count < min(distinct, len(scored))]
    progress = Progress("clusters", len(candidates), "numbers of them", quiet=quiet)
    for count in candidates:
        labels = _fit(reduced, count, seed)
        progress.advance(1)
        if len(np.unique(labels[scored])) < 2:
            continue
        score = silhouette_score(reduced[scored], labels[scored])
        if score > best:
            best, found = score, labels
    progress.finish()
    return _by_size(found)


def _fit(reduced: NDArray[np.float32], count: int, seed: int) -> NDArray[np.int32]:
    from sklearn.cluster import MiniBatchKMeans

    model = MiniBatchKMeans(count, batch_size=_BATCH_ROWS, n_init=3, random_state=seed)
    return np.asarray(model.fit_predict(reduced), np.int32)


def _by_size(labels: NDArray[np.int32]) -> NDArray[np.int32]:
    _, numbers, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    ranks = np.empty(len(sizes), np.int32)
    ranks[np.argsort(-sizes, kind="stable")] = np.arange(len(sizes))
    return np.asarray(ranks[numbers])
