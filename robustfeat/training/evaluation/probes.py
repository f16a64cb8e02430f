"""Scores frozen features with linear SVMs, and with classifiers without settings to choose."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustfeat.progress import Progress
from robustfeat.serving.heads.convert import scaler
from robustfeat.serving.heads.fitting.fit import measure_held_out, select, select_and_fit
from robustfeat.serving.heads.fitting.selection import C_GRID, hold_out
from robustfeat.serving.heads.head import Head
from robustfeat.serving.heads.kinds import KINDS, SCALINGS
from robustfeat.serving.heads.reports.report import Report
from robustfeat.system import available_cpus
from robustfeat.training.evaluation.tasks import TaskFeatures

__all__ = [
    "FEW_SHOTS", "Score", "few_shot", "fold_scores", "held_out_score", "libsvm", "naive_bayes",
    "nearest_neighbours", "svm",
]  # fmt: skip

FEW_SHOTS = (1, 5, 10, 50)
_DRAWS = 5
_NEIGHBOURS = 10
_LIBSVM_ROWS = 5000
_LIBSVM_STEPS = 200_000  # per pair of classes, since it may never end on unscaled features


@dataclass(frozen=True, eq=False)
class Score:
    """A classifier's scores on a task's test images.

    Attributes:
        accuracy, balanced_accuracy: shares. Balanced accuracy is the mean recall of the classes.
        interval: Wilson's 95 % interval of the accuracy.
        right: (m,) bool, for each test image.
        details: the chosen settings, as plain data.
        head: the fitted head, whose classes are numbers; None if it is not a `Head`.
    """

    accuracy: float
    balanced_accuracy: float
    interval: tuple[float, float]
    right: NDArray[np.bool_]
    details: dict[str, Any]
    head: Head | None = None

    @classmethod
    def of(
        cls, predicted: NDArray[np.int64], features: TaskFeatures, head: Head | None = None, **details: Any
    ) -> Score:
        """Compares predictions with the test labels."""
        report = Report.of(predicted, features.y_test, features.classes)
        right = predicted == features.y_test
        return cls(report.accuracy, report.balanced_accuracy, report.interval, right, details, head)

    def to_dict(self) -> dict[str, Any]:
        """For JSON, without the single images."""
        return {
            "accuracy": self.accuracy,
            "balanced_accuracy": self.balanced_accuracy,
            "interval": list(self.interval),
            **self.details,
        }


def svm(
    features: TaskFeatures,
    *,
    cs: Sequence[float] = C_GRID,
    scalings: Sequence[str] = tuple(SCALINGS),
    method: str = "holdout",
    calibrated: bool = False,
    threads: int | None = None,
    quiet: bool = True,
) -> Score:
    """A linear SVM, C and scaling chosen by training rows that were not fitted.

    Args:
        features: features of the task.
        cs, scalings, method: see `choose`; by default on a held-out tenth, the protocol of the published results.
        calibrated: give the head probabilities and typicality, if rows were held out.
        threads: number of processors; by default all that the cgroup allows.
        quiet: hide progress.
    """
    progress = Progress(f"{features.model}: {features.task} svm", 0, "fits", quiet=quiet)
    selection, head, converged = select_and_fit(
        features.x, features.y, cs=cs, scalings=scalings, method=method, threads=threads, progress=progress
    )
    progress.finish()
    if calibrated:
        places = np.searchsorted(head.classes, features.y)
        measured = measure_held_out(selection, features.x, np.arange(len(features.x)), places)
        head = replace(head, arrays=dict(head.arrays) | measured)
    best = selection.best
    held_out = None if math.isnan(best.score) else best.score
    chosen = {"C": best.c, "scaling": best.scaling, "held_out": held_out, "converged": converged}
    return Score.of(head.predict(features.x_test), features, head, **chosen)


def held_out_score(x: NDArray[np.float32], y: NDArray[np.int64], *, threads: int | None = None) -> dict[str, Any]:
    """The accuracy of `svm`'s choice on the held-out tenth that it was chosen by, for choices between models.

    Args:
        x, y: training rows.
        threads: number of processors; by default all that the cgroup allows.
    """
    best = select(x, y, method="holdout", threads=threads).best
    return {"held_out": best.score, "C": best.c, "scaling": best.scaling}


def fold_scores(x: NDArray[np.float32], y: NDArray[np.int64], *, threads: int | None = None) -> dict[str, Any]:
    """The accuracy of `svm`'s choice by folds on each of five folds of the rows, for choices between models.

    The folds depend only on the labels, so they are the same for all models.

    Args:
        x, y: training rows.
        threads: number of processors; by default all that the cgroup allows.
    """
    chosen = select(x, y, method="folds", threads=threads)
    margins, numbers = chosen.margins, np.unique(y)
    places = (margins[:, 0] > 0).astype(np.int64) if margins.shape[1] == 1 else margins.argmax(1)
    right = numbers[places] == y[chosen.held]
    sizes = [len(held) for _, held in chosen.splits[0]] if chosen.splits else []
    parts = np.split(right, np.cumsum(sizes)[:-1]) if sizes else []
    shares = [float(part.mean()) for part in parts]
    return {"folds": shares, "C": chosen.best.c, "scaling": chosen.best.scaling}


def naive_bayes(features: TaskFeatures, *, threads: int | None = None) -> Score:
    """Gaussian naive Bayes on plain features."""
    _, head, _ = select_and_fit(
        features.x, features.y, kind="naive-bayes", scalings=["none"], method="holdout", threads=threads
    )
    return Score.of(head.predict(features.x_test), features)


def nearest_neighbours(features: TaskFeatures) -> Score:
    """The majority of the 10 training images with the largest cosine (of fewer, where there are fewer)."""
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.preprocessing import normalize

    neighbours = min(_NEIGHBOURS, len(features.x))
    x, x_test = (normalize(part.astype(np.float64)).astype(np.float32) for part in (features.x, features.x_test))
    classifier = KNeighborsClassifier(neighbours).fit(x, features.y)
    return Score.of(classifier.predict(x_test), features, neighbours=neighbours)


def few_shot(features: TaskFeatures, shots: Sequence[int] = FEW_SHOTS, *, seed: int = 0) -> dict[int, dict[str, Any]]:
    """Accuracy with few images a class: by number of images, mean and deviation over five draws.

    C = 1 and l2 scaling: one image a class leaves nothing to choose by. Numbers that not every class has are left out.
    """
    from sklearn.preprocessing import normalize

    x, x_test = (normalize(part.astype(np.float64)) for part in (features.x, features.x_test))
    classes = np.unique(features.y)
    least = min(int((features.y == one).sum()) for one in classes)
    curve = {}
    for count in shots:
        if count > least:
            continue
        scores = []
        for draw in range(_DRAWS):
            rng = np.random.default_rng([seed, count, draw])
            own = [np.flatnonzero(features.y == one) for one in classes]
            rows = np.concatenate([rng.choice(part, count, replace=False) for part in own])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it warns of as many classes as rows, which is normal for one shot
                classifier = KINDS["svm"].classifier(C=1.0).fit(x[rows], features.y[rows])
            scores.append(float(np.mean(classifier.predict(x_test) == features.y_test)))
        curve[count] = {"accuracy": float(np.mean(scores)), "deviation": float(np.std(scores, ddof=1))}
    return curve


def libsvm(
    features: TaskFeatures,
    *,
    cs: Sequence[float] = C_GRID,
    scalings: Sequence[str] = tuple(SCALINGS),
    seed: int = 0,
    threads: int | None = None,
) -> dict[str, Score]:
    """LIBSVM's linear SVM (one against one, hinge loss), the paper's, beside `LinearSVC` on the same rows.

    Each chooses its own C and scaling, on the same held-out tenth of these rows.

    Args:
        features: features. At most 5,000 training rows are used, drawn with `seed`, and one of each class that these
            have not.
        cs, scalings: the grid of both.
        seed: random seed of the draw.
        threads: number of processors; by default all that the cgroup allows.
    """
    drawn = np.random.default_rng(seed).permutation(len(features.x))[:_LIBSVM_ROWS]
    firsts = np.unique(features.y, return_index=True)[1]  # rare classes must be included
    rows = np.unique(np.concatenate([drawn, firsts[~np.isin(features.y[firsts], features.y[drawn])]]))
    part = replace(features, x=features.x[rows], y=features.y[rows])
    ours = svm(part, cs=cs, scalings=scalings, threads=threads)
    return {
        "LIBSVM": _one_against_one(part, cs, scalings, threads or available_cpus()),
        "LinearSVC": replace(ours, details={**ours.details, "rows": len(rows)}),
    }


def _one_against_one(features: TaskFeatures, cs: Sequence[float], scalings: Sequence[str], threads: int) -> Score:
    """LIBSVM's, with the choice of `select_and_fit`: the first of equals by scaling, then by C."""
    from sklearn.pipeline import make_pipeline
    from sklearn.svm import SVC

    x, y = features.x.astype(np.float64), features.y
    fit, held = hold_out(y)

    def train(setting: tuple[str, float], places: NDArray[np.int64]) -> Any:
        scaling, c = setting
        classifier = SVC(kernel="linear", C=c, max_iter=_LIBSVM_STEPS)
        return make_pipeline(scaler(scaling), classifier).fit(x[places], y[places])

    grid = list(itertools.product(scalings, cs)) if len(held) else [("none", 1.0)]
    with warnings.catch_warnings(), ThreadPoolExecutor(threads) as pool:
        warnings.simplefilter("ignore")  # it warns of too few iterations, but is scored as it is
        tried = pool.map(lambda setting: train(setting, fit).score(x[held], y[held]) if len(held) else 0.0, grid)
        scores = list(tried)
        best = grid[int(np.argmax(scores))]
        chosen = train(best, np.arange(len(y)))
    return Score.of(
        chosen.predict(features.x_test.astype(np.float64)),
        features,
        C=best[1],
        scaling=best[0],
        held_out=max(scores) if len(held) else None,
        rows=len(y),
        converged=bool(np.max(chosen[-1].n_iter_) < _LIBSVM_STEPS),
    )
