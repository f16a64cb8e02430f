"""Concepts of images without labels: clusters of a teacher's features."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from robustfeat.errors import DataError
from robustfeat.files import new_file
from robustfeat.training.concepts import ConceptMap

__all__ = ["CLUSTERS_NAME", "Clusters", "find_clusters", "load_clusters", "save_clusters"]

CLUSTERS_NAME = "clusters.npz"
_STARTS = 3


@dataclass(frozen=True)
class Clusters:
    """The clusters of a training set's images.

    Attributes:
        centres: (K, D) float32, the mean features.
        of_image: (N,) int64, the cluster of each image; 0 for images that could not be decoded.
    """

    centres: NDArray[np.float32]
    of_image: NDArray[np.int64]

    def concepts(self, labels: NDArray[np.int64], classes: int) -> ConceptMap:
        """The clusters as concepts; a class is of the concept that most of its images are of."""
        count = len(self.centres)
        table = np.zeros((classes, count), np.int64)
        np.add.at(table, (labels, self.of_image), 1)
        names = tuple(f"cluster {number:0{len(str(count - 1))}}" for number in range(count))
        return ConceptMap(names, table.argmax(1), table.sum(1), of_image=self.of_image)

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint."""
        return {"centres": torch.from_numpy(self.centres), "of_image": torch.from_numpy(self.of_image)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Clusters:
        """The inverse of `state_dict`."""
        return cls(state["centres"].numpy(), state["of_image"].numpy())


def find_clusters(features: NDArray[np.float32], count: int, seed: int) -> Clusters:
    """k-means by scikit-learn: Lloyd's algorithm from k-means++, the best of 3 starts.

    Args:
        features: (N, D), of length 1; a row of NaN is an image that could not be decoded.
        count: K; clusters that stay empty, as where images are the same, are dropped.
        seed: random seed of the starts.

    Raises:
        DataError: there are fewer images than clusters.
    """
    from sklearn.cluster import KMeans

    good = np.isfinite(features).all(1)
    if good.sum() < count:
        raise DataError(
            f"{good.sum()} images make no {count} clusters", fix="pass a smaller K in `concepts=clusters:K`"
        )
    found = KMeans(count, n_init=_STARTS, random_state=seed % 2**32).fit(features[good])
    used, numbers = np.unique(found.labels_, return_inverse=True)
    of_image = np.zeros(len(features), np.int64)
    of_image[good] = numbers
    return Clusters(found.cluster_centers_[used].astype(np.float32), of_image)


def save_clusters(clusters: Clusters, run: Path, key: Mapping[str, Any]) -> None:
    """Keeps clusters in a run's folder, with what they were made of."""
    with new_file(run / CLUSTERS_NAME) as partial, open(partial, "wb") as handle:
        np.savez(handle, centres=clusters.centres, of_image=clusters.of_image, key=np.array(json.dumps(key)))


def load_clusters(run: Path, key: Mapping[str, Any]) -> Clusters | None:
    """The clusters in a run's folder that were made of the same; None where there are none."""
    try:
        with np.load(run / CLUSTERS_NAME, allow_pickle=False) as held:
            if json.loads(str(held["key"])) != key:
                return None
            return Clusters(held["centres"], held["of_image"])
    except Exception:  # what NumPy raises on a damaged file has no common base
        return None
