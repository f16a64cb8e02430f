"""Probes the features of a network in training by a classifier's accuracy on a small task."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from robustfeat.errors import DataError, DivergedError
from robustfeat.training.data.batches import EvaluationBatches, load_batches
from robustfeat.training.data.image_set import ImageSet
from robustfeat.training.evaluation.probes import Score, nearest_neighbours, svm
from robustfeat.training.evaluation.tasks import Task, TaskFeatures
from robustfeat.training.loop.distributed import gather_objects, together
from robustfeat.training.loop.preparation import Run
from robustfeat.training.loop.step import TrainingStep

__all__ = ["probe"]

_BATCH = 256

ReportFailures = Callable[[tuple[str, ...], int], None]


def probe(run: Run, step: TrainingStep, report_failures: ReportFailures) -> Score:
    """The accuracy on the run's probe. It is a collective call with the same result on all ranks.

    Args:
        run: with the task, and the recipe that names the classifier.
        step: with the network, which is left in evaluation mode.
        report_failures: gets a line for each image of this rank that cannot be decoded, and the number of images.

    Raises:
        DataError: the images that can be decoded are of a single class, or there is none to score.
        DivergedError: features are not finite.
    """
    assert run.probe is not None
    failures: list[str] = []
    (x, y), (x_test, y_test) = (_embed(run, step, images, failures) for images in (run.probe.train, run.probe.test))
    report_failures(tuple(failures), len(run.probe.train) + len(run.probe.test))
    score: Score | None = None
    with together():
        if run.ranks.rank == 0:
            score = _score(run, run.probe, TaskFeatures("probe", "", run.probe.train.classes, x, y, x_test, y_test))
    first: Score = gather_objects(score)[0]
    return first


def _score(run: Run, task: Task, features: TaskFeatures) -> Score:
    if not (np.isfinite(features.x).all() and np.isfinite(features.x_test).all()):
        raise DivergedError("the features of the probe's images are not finite", fix="pass a smaller `lr`")
    if len(np.unique(features.y)) < 2 or not len(features.y_test):
        raise DataError(
            f"too few of its {len(task.train):,} training and {len(task.test):,} test images can be decoded",
            argument="probe",
            value=run.recipe.probe,
        )
    if run.recipe.probe_classifier == "svm":
        return svm(features, threads=torch.get_num_threads())
    return nearest_neighbours(features)


def _embed(
    run: Run, step: TrainingStep, images: ImageSet, failures: list[str]
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """(n, D) features and (n,) labels of the images that can be decoded; each rank embeds every so many batches."""
    contract = run.recipe.preprocessing()
    batches = EvaluationBatches(images, _BATCH, contract)
    numbers = range(run.ranks.rank, len(batches), run.ranks.world)
    parts = {}
    for number, batch in zip(numbers, load_batches(batches, run.decoders, numbers), strict=True):
        failures.extend(batch.failures)
        if len(batch.labels):
            features = step.embed(batch.pixels(run.device, contract.image_size))
            parts[number] = features.cpu().numpy(), batch.labels.numpy()
    joined = {number: part for rank in gather_objects(parts) for number, part in rank.items()}
    in_order = [joined[number] for number in sorted(joined)]
    if not in_order:
        return np.empty((0, 1), np.float32), np.empty(0, np.int64)
    return np.concatenate([part[0] for part in in_order]), np.concatenate([part[1] for part in in_order])
