"""Target tasks: labelled images to learn from and to test on, and a model's features of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from robustfeat.counts import format_count
from robustfeat.errors import DataError, DecodeError
from robustfeat.progress import Progress
from robustfeat.serving.feature_cache import FeatureCache, embed_contents
from robustfeat.training.data.image_set import ImageSet
from robustfeat.training.data.opening import open_training_data
from robustfeat.training.evaluation.arguments import require_task
from robustfeat.training.evaluation.inputs import REPAIR
from robustfeat.training.evaluation.subject import Subject

__all__ = ["Task", "TaskFeatures", "draw_images", "draw_rows", "embed_images", "embed_task", "open_task"]


@dataclass(frozen=True)
class Task:
    """Labelled images.

    Attributes:
        name: what tables call it.
        train, test: training and test images of the same classes.
    """

    name: str
    train: ImageSet
    test: ImageSet

    @property
    def remarks(self) -> list[str]:
        """Remarks that affect the scores, such as skipped images, or test images of unknown classes."""
        told = list(dict.fromkeys(self.train.remarks + self.test.remarks))
        if lost := int((~np.isin(self.test.labels, self.train.labels)).sum()):
            told.append(
                f"{self.name}: {lost:,} of {len(self.test):,} test images are of classes without training images, and "
                "count as wrong"
            )
        return told


@dataclass(frozen=True, eq=False)
class TaskFeatures:
    """A model's view of a task.

    Attributes:
        task, model: names.
        classes: C names.
        x, x_test: (n, D) and (m, D) float32.
        y, y_test: (n,) and (m,) int64 into `classes`.
    """

    task: str
    model: str
    classes: tuple[str, ...]
    x: NDArray[np.float32]
    y: NDArray[np.int64]
    x_test: NDArray[np.float32]
    y_test: NDArray[np.int64]


def open_task(
    name: str,
    place: str,
    *,
    train_rows: int | None = None,
    test_rows: int | None = None,
    val_fraction: float = 0.2,
    seed: int = 0,
) -> Task:
    """Opens a task's two splits.

    Args:
        name: what tables call it.
        place: any DATA of `robustfeat train`. Its validation split (or `test`) is the test set.
        train_rows, test_rows: at most so many images, drawn with `seed`.
        val_fraction: the share that is the test set where there is no such split.
        seed: random seed of both draws.

    Raises:
        DataError: the data are missing, a split is empty, or there are fewer than two classes.
    """
    require_task(name, place)
    train, test = open_training_data(place, val_fraction=val_fraction, seed=seed)
    parts = []
    for split, images, limit in (("training", train, train_rows), ("test", test, test_rows)):
        part = draw_images(images, limit, seed)
        if not len(part):
            raise DataError(f"{name}={place}: no {split} images; a task needs some of both splits")
        parts.append(part)
    found = np.unique(parts[0].labels)
    if len(found) < 2:
        only = format_count(len(parts[0]), "training image is", "training images are")
        raise DataError(f"{name}={place}: {only} of one class, {train.classes[int(found[0])]!r}; a task needs two")
    return Task(name, parts[0], parts[1])


def draw_images(images: ImageSet, limit: int | None, seed: int = 0) -> ImageSet:
    """At most `limit` of the images, in their order; all of them by default."""
    if limit is None or limit >= len(images):
        return images
    return images.subset(draw_rows(len(images), limit, seed))


def draw_rows(count: int, limit: int, seed: int = 0) -> NDArray[np.int64]:
    """The rows that `draw_images` draws of `count` images, ascending."""
    return np.sort(np.random.default_rng(seed).permutation(count)[:limit])


def embed_images(
    subject: Subject, images: ImageSet, *, cache: Path | None = None, label: str = "", quiet: bool = True
) -> NDArray[np.float32]:
    """(N, D) float32, row i of image i.

    Args:
        subject: the model.
        images: read in order.
        cache: a file of features by content (see `FeatureCache`): what is there is not computed again.
        label: for the progress line.
        quiet: hide progress.

    Raises:
        DecodeError: naming an image that cannot be read.
        DataError: features are not finite.
    """
    try:
        return _embed_all(subject, images, FeatureCache(cache, subject) if cache else None, label, quiet)
    except (DecodeError, DataError) as exc:
        if not label:
            raise
        raise type(exc)(f"{label}: {exc.problem}", fix=exc.fix) from exc


def _embed_all(
    subject: Subject, images: ImageSet, cache: FeatureCache | None, label: str, quiet: bool
) -> NDArray[np.float32]:
    features = np.empty((len(images), subject.feature_size), np.float32)
    progress = Progress(label, len(images), quiet=quiet)
    for start in range(0, len(images), subject.batch_size):
        rows = range(start, min(start + subject.batch_size, len(images)))
        features[rows.start : rows.stop] = _embed_rows(subject, images, rows, cache)
        progress.advance(len(rows))
    progress.finish()
    if not np.isfinite(features).all():
        bad = int(np.flatnonzero(~np.isfinite(features).all(1))[0])
        raise DataError(f"{images.source.name(bad)}: its features are not finite", fix="repair the model")
    return features


def _embed_rows(
    subject: Subject, images: ImageSet, rows: Sequence[int], cache: FeatureCache | None
) -> NDArray[np.float32]:
    try:
        contents = [images.read(row) for row in rows]
    except DecodeError as exc:
        raise DecodeError(str(exc), fix=REPAIR) from exc

    def refuse(place: int, error: DecodeError) -> DecodeError:
        return DecodeError(f"{images.source.name(rows[place])}: {error}", fix=REPAIR)

    return embed_contents(subject, contents, cache, refuse=refuse)


def embed_task(subject: Subject, task: Task, *, cache: Path | None = None, quiet: bool = True) -> TaskFeatures:
    """A model's features of a task; see `embed_images`."""
    x, x_test = (
        embed_images(subject, images, cache=cache, label=f"{subject.name}: {task.name} {split}", quiet=quiet)
        for split, images in (("train", task.train), ("test", task.test))
    )
    if not np.ptp(x, axis=0).any():
        raise DataError(
            f"{subject.name}: gives all training images of {task.name} the same features", fix="repair the model"
        )
    return TaskFeatures(task.name, subject.name, task.train.classes, x, task.train.labels, x_test, task.test.labels)
