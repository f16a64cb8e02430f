"""The clusters of a run's images, found once by the first rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustfeat.progress import Progress
from robustfeat.training.clusters import Clusters, find_clusters, load_clusters, save_clusters
from robustfeat.training.concepts import cluster_count
from robustfeat.training.data.batches import EvaluationBatches, load_batches
from robustfeat.training.data.image_set import decoding_key
from robustfeat.training.loop.checkpoint import fitting
from robustfeat.training.loop.distributed import gather_objects, together
from robustfeat.training.loop.preparation import Run

__all__ = ["cluster_images"]

_BATCH = 64


def cluster_images(run: Run, saved: Mapping[str, Any]) -> Run:
    """The run with the clusters of its training images as concepts; a collective call.

    They come from the checkpoint, from the run's folder, or from the teacher's features of the images, which the
    teacher sees whole, as it is meant to be used.

    Args:
        run: the run, whose folder this process has claimed.
        saved: the clusters in the checkpoint; empty in a new run.

    Raises:
        DataError: there are fewer images than clusters.
        CheckpointError: the checkpoint's clusters are damaged.
    """
    clusters: Clusters | None = None
    with together():
        if run.ranks.rank == 0:
            clusters = _restore(run, saved) if saved else _find(run)
    first: Clusters = gather_objects(clusters)[0]
    concepts = first.concepts(run.train_set.labels, len(run.train_set.classes))
    return replace(run, clusters=first, concepts=concepts)


def _restore(run: Run, saved: Mapping[str, Any]) -> Clusters:
    with fitting():
        clusters = Clusters.from_state(saved)
        numbers = clusters.of_image
        if numbers.shape != (len(run.train_set),) or not (0 <= numbers.min() <= numbers.max() < len(clusters.centres)):
            raise ValueError("clusters of other images")
    return clusters


def _find(run: Run) -> Clusters:
    recipe = run.recipe
    key = {
        "fingerprint": run.train_set.fingerprint,
        "teacher": recipe.teacher_sha256,
        "precision": recipe.teacher_precision,
        "concepts": recipe.concepts,
        "seed": recipe.seed,
        **decoding_key(recipe.preprocessing_version),
    }
    if (kept := load_clusters(run.folder, key)) is not None:
        return kept
    count = cluster_count(recipe.concepts)
    assert count is not None
    clusters = find_clusters(_embed(run), count, recipe.seed)
    save_clusters(clusters, run.folder, key)
    return clusters


def _embed(run: Run) -> NDArray[np.float32]:
    """(N, D) features of length 1, with NaN for undecodable images, which the loop over epochs reports."""
    teacher = run.teacher
    assert teacher is not None
    features = np.full((len(run.train_set), teacher.extractor.feature_size), np.nan, np.float32)
    batches = EvaluationBatches(run.train_set, _BATCH, teacher.extractor.config.preprocessing)
    progress = Progress("embedding for clusters", len(features), quiet=run.quiet)
    for batch in load_batches(batches, run.decoders):
        assert batch.rows is not None
        features[batch.rows.numpy()] = teacher.features(batch.images.float()).numpy()
        progress.advance(len(batch.labels) + len(batch.failures))
    progress.finish()
    return features
