"""What a head on frozen features keeps when images get worse, unfamiliar or hostile, for one model and task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustfeat.serving.heads.distance import measure_distance
from robustfeat.serving.heads.head import Head
from robustfeat.serving.heads.kinds import Array
from robustfeat.serving.heads.reports.reliability import Reliability
from robustfeat.training.concepts import ConceptMap
from robustfeat.training.evaluation.attack import measure_attack
from robustfeat.training.evaluation.corruptions import SEVERITIES, embed_corrupted
from robustfeat.training.evaluation.severities import SCALED, corrupt_to_scale
from robustfeat.training.evaluation.subject import NetworkSubject, Subject
from robustfeat.training.evaluation.tasks import Task, TaskFeatures, draw_images, draw_rows, embed_images

__all__ = ["ATTACKED_ROWS", "CORRUPTED_ROWS", "CenteredDistances", "Extent", "measure_robustness"]

CORRUPTED_ROWS, ATTACKED_ROWS = 500, 50
"""Default largest numbers of test images."""

_KINDS = tuple((name, severity) for name in SCALED for severity in SEVERITIES)
_BINS = 15
_BLOCK = 1000
_LEAST_DISTANCE = 1e-6
"""Two unit vectors that are nearer than this, in float32, come from copies of one image."""


@dataclass(frozen=True)
class Extent:
    """How much of a card is measured.

    Attributes:
        rows: at most so many test images are corrupted.
        attacked_rows: at most so many test images are attacked; 0 for no attack.
        concepts: the concepts of the task's classes, if there are any.
        others: tasks whose test images are unknown to the head.
        network: the subject in PyTorch, which the attack needs.
        no_attack: why there is no network, if one was wanted.
    """

    rows: int = CORRUPTED_ROWS
    attacked_rows: int = ATTACKED_ROWS
    concepts: ConceptMap | None = None
    others: Sequence[Task] = ()
    network: NetworkSubject | None = None
    no_attack: str = ""


class CenteredDistances:
    """Distances between features as directions from the mean of the training images.

    Features after a ReLU are not negative, so all cosines between them are large. From the mean, they are not.

    Args:
        training: (n, D) features, whose mean is the centre.
        clean: (m, D) features of test images.

    Attributes:
        nearest: (m,) the distance of each test image to the nearest other one that is not a copy; NaN without one.
    """

    def __init__(self, training: NDArray[np.float32], clean: NDArray[np.float32]) -> None:
        self._centre = training.mean(0, dtype=np.float64)
        self._clean = self._directions(clean)
        self.nearest = np.concatenate([self._nearest(start) for start in range(0, len(clean), _BLOCK)])

    def moved(self, rows: slice, features: NDArray[np.float32]) -> Array:
        """How far these clean rows are from their corrupted versions, over their distance to the nearest other row."""
        away = np.linalg.norm(self._directions(features) - self._clean[rows], axis=1)
        ratios: Array = away / self.nearest[rows]
        return ratios

    def _directions(self, features: NDArray[np.float32]) -> Array:
        away = features - self._centre
        lengths = np.linalg.norm(away, axis=1, keepdims=True)
        directions: Array = away / np.where(lengths == 0, 1.0, lengths)
        return directions

    def _nearest(self, start: int) -> Array:
        block = self._clean[start : start + _BLOCK]
        squares = (block**2).sum(1)[:, None] + (self._clean**2).sum(1) - 2 * block @ self._clean.T
        distances = np.sqrt(np.maximum(squares, 0))
        distances[distances <= _LEAST_DISTANCE] = np.inf
        distances[np.arange(len(block)), np.arange(start, start + len(block))] = np.inf
        nearest: Array = distances.min(1)
        nearest[np.isinf(nearest)] = np.nan
        return nearest


@dataclass(frozen=True, eq=False)
class _Answers:
    """A head's answers on rows of features: class numbers, and if it is calibrated also probability and distance."""

    predicted: NDArray[np.int64]
    confidence: Array | None
    distance: Array | None

    @classmethod
    def of(cls, head: Head, features: NDArray[np.float32]) -> _Answers:
        margins = head.margins(features)
        calibrated = head.calibrated
        return cls(
            head.decide(margins),
            head.calibrate(margins).max(1) if calibrated else None,
            measure_distance(head.arrays, features) if calibrated else None,
        )

    @classmethod
    def joined(cls, parts: Sequence[_Answers]) -> _Answers:
        """The answers on batches, in their order."""
        confidences = [part.confidence for part in parts if part.confidence is not None]
        distances = [part.distance for part in parts if part.distance is not None]
        return cls(
            np.concatenate([part.predicted for part in parts]),
            np.concatenate(confidences) if confidences else None,
            np.concatenate(distances) if distances else None,
        )

    def calibration_error(self, right: NDArray[np.bool_]) -> float | None:
        """The expected calibration error with 15 bins (Guo et al., ICML 2017)."""
        return None if self.confidence is None else Reliability.of_confidence(self.confidence, right, _BINS).error

    def auroc(self, unknown: _Answers) -> float | None:
        """How well the distance tells `unknown` images from these: 0.5 for chance, 1 for always."""
        if self.distance is None or unknown.distance is None:
            return None
        from sklearn.metrics import roc_auc_score

        is_unknown = np.repeat([0, 1], [len(self.distance), len(unknown.distance)])
        return float(roc_auc_score(is_unknown, np.concatenate([self.distance, unknown.distance])))


def measure_robustness(
    subject: Subject,
    task: Task,
    features: TaskFeatures,
    head: Head,
    extent: Extent,
    *,
    cache: Path | None = None,
    quiet: bool = True,
) -> dict[str, Any]:
    """The robustness card of one model on one task, as plain data.

    Args:
        subject: the model.
        task: its images.
        features: their features.
        head: an SVM of the training features, whose classes are numbers. Without calibration, there are no
            probabilities and distances.
        extent: how much is measured.
        cache: a file that keeps the features of other tasks (see `embed_images`).
        quiet: hide progress.

    Returns:
        `images`, `clean`, `corrupted` (mean over all corruptions), `by_corruption`, `worst_class`,
        `worst_class_corrupted`, with concepts also `worst_concept`, `ece`, `ece_corrupted`, `moved`, `auroc` by other
        task, `auroc_corrupted`, and `attack`. docs/robustness.md defines each. Whatever needs held-out rows is None
        without them.
    """
    images, rows = draw_images(task.test, extent.rows), draw_rows(len(task.test), extent.rows)
    distances = CenteredDistances(features.x, features.x_test[rows])
    before: list[_Answers] = []
    after: list[list[_Answers]] = [[] for _ in _KINDS]
    moved = np.empty((len(_KINDS), len(images)))
    for here, clean_features, corrupted in embed_corrupted(subject, images, _KINDS, corrupt_to_scale, quiet=quiet):
        before.append(_Answers.of(head, clean_features))
        for place, worse in enumerate(corrupted):
            after[place].append(_Answers.of(head, worse))
            moved[place, here] = distances.moved(here, worse)
    clean, kinds = _Answers.joined(before), [_Answers.joined(parts) for parts in after]
    right = np.stack([one.predicted == images.labels for one in [clean, *kinds]])
    conditions = [
        {
            "accuracy": float(right[1 + place].mean()),
            "ece": one.calibration_error(right[1 + place]),
            "auroc": clean.auroc(one),
            "moved": _median(moved[place]),
        }
        for place, one in enumerate(kinds)
    ]
    all_right = head.predict(features.x_test) == features.y_test
    concepts = extent.concepts
    return {
        "images": len(images),
        "clean": float(right[0].mean()),
        "ece": clean.calibration_error(right[0]),
        "corrupted": _mean(conditions, "accuracy"),
        **{f"{name}_corrupted": _mean(conditions, name) for name in ("ece", "auroc")},
        "moved": _mean(conditions, "moved"),
        "worst_class": _worst(all_right, features.y_test, features.classes),
        "worst_class_corrupted": _worst(right[1:].mean(0), images.labels, features.classes),
        "worst_concept": _worst(all_right, concepts.of_class[features.y_test], concepts.names) if concepts else None,
        "auroc": _other_tasks(subject, head, clean, extent, cache=cache, quiet=quiet),
        "attack": _attack(head, task, extent, quiet=quiet),
        "by_corruption": _by_name(conditions),
    }


def _by_name(conditions: Sequence[Mapping[str, float | None]]) -> dict[str, dict[str, Any]]:
    """By name and severity, as text for JSON."""
    named: dict[str, dict[str, Any]] = {}
    for (name, severity), condition in zip(_KINDS, conditions, strict=True):
        named.setdefault(name, {})[str(severity)] = dict(condition)
    return named


def _median(ratios: Array) -> float | None:
    """The median of the rows that have a neighbour."""
    known = ratios[~np.isnan(ratios)]
    return float(np.median(known)) if len(known) else None


def _mean(conditions: Sequence[Mapping[str, float | None]], name: str) -> float | None:
    values = [value for one in conditions if (value := one[name]) is not None]
    return float(np.mean(values)) if values else None


def _worst(right: NDArray[Any], groups: NDArray[np.int64], names: Sequence[str]) -> dict[str, Any]:
    """The group of test images with the lowest accuracy, and its number of images."""
    counts = np.bincount(groups, minlength=len(names))
    shares = np.bincount(groups, right, len(names)) / np.maximum(counts, 1)
    worst = int(np.argmin(np.where(counts > 0, shares, np.inf)))
    return {"name": names[worst], "accuracy": float(shares[worst]), "images": int(counts[worst])}


def _other_tasks(
    subject: Subject, head: Head, clean: _Answers, extent: Extent, *, cache: Path | None, quiet: bool
) -> dict[str, float | None]:
    """The AUROC of each other task's test images."""
    found = {}
    for other in extent.others:
        images, label = draw_images(other.test, extent.rows), f"{subject.name}: {other.name} test"
        features = embed_images(subject, images, cache=cache, label=label, quiet=quiet)
        found[other.name] = clean.auroc(_Answers.of(head, features))
    return found


def _attack(head: Head, task: Task, extent: Extent, *, quiet: bool) -> dict[str, Any]:
    if extent.network is None or not extent.attacked_rows:
        return {"left_out": extent.no_attack}
    return measure_attack(extent.network, head, draw_images(task.test, extent.attacked_rows), quiet=quiet)
