"""Fitting heads: one way of choosing C and scaling for all of robustfeat, and the final fit on all rows."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from robustfeat.errors import InputError, first_line
from robustfeat.progress import Progress
from robustfeat.serving.heads.calibration import calibrate
from robustfeat.serving.heads.convert import scaler
from robustfeat.serving.heads.features import Features
from robustfeat.serving.heads.head import Head
from robustfeat.serving.heads.kinds import KINDS, SCALINGS, Array
from robustfeat.serving.heads.labels import LabelledRows
from robustfeat.serving.heads.large import LargeSet
from robustfeat.serving.heads.report import Report
from robustfeat.system import available_cpus

__all__ = [
    "C_GRID",
    "HELD_OUT",
    "Candidate",
    "Selection",
    "fit_head",
    "hold_out",
    "require_two",
    "select",
    "select_and_fit",
]

C_GRID = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
HELD_OUT = 0.1

LARGE = 2**26
"""Sets of more values than this (131,072 rows of 512) are read from disk again and again instead of held in memory."""

_WORKING_BYTES = 2**31
_BYTES_PER_VALUE = 24  # a scaled copy, and what liblinear makes of it


@dataclass(frozen=True)
class Candidate:
    """A setting that was tried.

    Attributes:
        scaling: one of `SCALINGS`.
        c: None for kinds that have no such thing.
        score: on the held-out rows: accuracy; with several labels a row, the mean over labels of F1. NaN without any.
        converged: whether the solver came to its end.
    """

    scaling: str
    c: float | None
    score: float
    converged: bool


@dataclass(frozen=True, eq=False)
class Selection:
    """What was chosen.

    Attributes:
        best: the setting with the best score, the first one of equals.
        candidates: all of them, in the order of the grid: by scaling, then by C.
        fit, held: (m,) int64, the places of the rows that they were fitted on and scored by.
        head: the best one, fitted on `fit`; its classes are numbers.
    """

    best: Candidate
    candidates: tuple[Candidate, ...]
    fit: NDArray[np.int64]
    held: NDArray[np.int64]
    head: Head


class _Set(Protocol):
    """Rows to fit on, in memory or not."""

    workers: int

    def fit(self, scaling: str, c: float | None, places: NDArray[np.int64]) -> tuple[Head, bool]: ...


class _SetInMemory:
    """Fits by scikit-learn."""

    def __init__(self, values: NDArray[Any], targets: NDArray[Any], kind: str, threads: int) -> None:
        self._x = np.asarray(values, np.float64)
        self._targets, self._kind = targets, kind
        self.workers = max(1, min(threads, _WORKING_BYTES // max(1, self._x.size * _BYTES_PER_VALUE)))

    def fit(self, scaling: str, c: float | None, places: NDArray[np.int64]) -> tuple[Head, bool]:
        from sklearn.multioutput import MultiOutputClassifier
        from sklearn.pipeline import make_pipeline

        classifier = KINDS[self._kind].classifier(**({} if c is None else {"C": c}))
        if self._targets.ndim == 2:
            classifier = MultiOutputClassifier(classifier)
        pipeline = make_pipeline(scaler(scaling), classifier)
        pipeline.fit(self._x[places], self._targets[places])
        parts = getattr(classifier, "estimators_", [classifier])
        spent = max((int(np.max(getattr(part, "n_iter_", 0))) for part in parts), default=0)
        return Head.from_sklearn(pipeline), spent < getattr(parts[0], "max_iter", math.inf)


def hold_out(targets: NDArray[Any], seed: int = 0) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Parts rows for a selection: 10 % of them, stratified.

    What is alone in its class is never held out. Where 10 % are fewer rows than classes, one row of each class is.
    With several labels a row there are no classes to stratify by: 10 % are drawn, and where the others would then
    all have a label, or none would, a row goes back to them.

    Args:
        targets: (m,) int64, or (m, K) bool.
        seed: of the draw.

    Returns:
        The places to fit on, and those held out; none of the latter where every class has one row.
    """
    from sklearn.model_selection import train_test_split

    if targets.ndim == 2:
        return _hold_out_any(targets, seed)
    ids = targets
    counts = np.bincount(ids)
    shared = np.flatnonzero(counts[ids] >= 2)
    classes = int((counts >= 2).sum())
    if not classes:
        return np.arange(len(ids)), np.empty(0, np.int64)
    if math.ceil(HELD_OUT * len(shared)) >= classes:
        fit, held = train_test_split(shared, test_size=HELD_OUT, stratify=ids[shared], random_state=seed)
        return np.concatenate([fit, np.flatnonzero(counts[ids] < 2)]), held
    draw = np.random.default_rng(seed)
    held = np.array([draw.choice(np.flatnonzero(ids == one)) for one in np.flatnonzero(counts >= 2)])
    return np.setdiff1d(np.arange(len(ids)), held), held


def select_and_fit(
    values: NDArray[Any],
    targets: NDArray[Any],
    *,
    kind: str = "svm",
    rows: NDArray[np.int64] | None = None,
    cs: Sequence[float] = C_GRID,
    scalings: Sequence[str] = tuple(SCALINGS),
    seed: int = 0,
    threads: int | None = None,
    progress: Progress | None = None,
) -> tuple[Selection, Head, bool]:
    """Chooses C and scaling on held-out rows, then fits on all.

    Features are float64; the SVM is scikit-learn's `LinearSVC(C=c, dual=False)`, and for sets of more than `LARGE`
    values the same minimum found by L-BFGS.

    Args:
        values: (n, D) features, possibly memory-mapped.
        targets: (m,) int64 from 0, or (m, K) bool for several labels a row.
        kind: one of `KINDS`.
        rows: (m,) the rows that the targets are of, ascending; all by default.
        cs, scalings: the grid; kinds without C try the scalings alone.
        seed: of the held-out rows.
        threads: processors; by default what the cgroup grants.
        progress: gets its total, and is advanced by one a fit.

    Returns:
        The selection, the head, whose classes are numbers, and whether its solver converged.
    """
    selection, data = _select(values, targets, kind, rows, cs, scalings, seed, threads, progress)
    best = selection.best
    everything = np.arange(len(targets))
    fit = partial(data.fit, best.scaling, best.c, everything)
    ((head, converged),) = _run([fit], 1, threads or available_cpus())
    if progress:
        progress.advance(1)
    return selection, head, converged


def select(
    values: NDArray[Any],
    targets: NDArray[Any],
    *,
    kind: str = "svm",
    cs: Sequence[float] = C_GRID,
    scalings: Sequence[str] = tuple(SCALINGS),
    seed: int = 0,
    threads: int | None = None,
) -> Selection:
    """The first half of `select_and_fit`: what is chosen on held-out rows, without the fit on all."""
    return _select(values, targets, kind, None, cs, scalings, seed, threads, None)[0]


def _select(
    values: NDArray[Any],
    targets: NDArray[Any],
    kind: str,
    rows: NDArray[np.int64] | None,
    cs: Sequence[float],
    scalings: Sequence[str],
    seed: int,
    threads: int | None,
    progress: Progress | None,
) -> tuple[Selection, _Set]:
    rows = np.arange(len(values)) if rows is None else rows
    threads = threads or available_cpus()
    data: _Set
    if len(rows) * values.shape[1] > LARGE:
        data = LargeSet(values, rows, targets, kind, threads, progress)
    else:
        data = _SetInMemory(values[rows], targets, kind, threads)
    fit, held = hold_out(targets, seed)
    grid = [(scaling, c) for scaling in scalings for c in (cs if KINDS[kind].linear else [None])]

    def attempt(setting: tuple[str, float | None]) -> tuple[Candidate, Head]:
        head, converged = data.fit(*setting, fit)
        score = _score(head.predict(values, rows[held]), targets[held]) if len(held) else math.nan
        if progress:
            progress.advance(1)
        return Candidate(*setting, score, converged), head

    if not len(held):  # nothing to choose by: plain features, and a C in the middle
        grid = [("none" if "none" in scalings else scalings[0], (1.0 if 1.0 in cs else cs[0]) if grid[0][1] else None)]
    if progress:
        progress.total = len(grid) + 1
    tried = _run([partial(attempt, setting) for setting in grid], data.workers, threads)
    candidates = tuple(candidate for candidate, _ in tried)
    chosen = max(range(len(grid)), key=lambda at: candidates[at].score)  # the first one of equals
    return Selection(candidates[chosen], candidates, fit, held, tried[chosen][1]), data


def _run(tasks: Sequence[Callable[[], Any]], workers: int, threads: int) -> list[Any]:
    pool = ThreadPoolExecutor(workers)
    try:
        with _quiet(threads, workers):
            return [future.result() for future in [pool.submit(task) for task in tasks]]
    except ValueError as exc:
        raise InputError(f"these features cannot be fitted: {first_line(exc)}") from exc
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


@contextmanager
def _quiet(threads: int, workers: int) -> Iterator[None]:
    """Silences what the report says instead, or what is of no matter; keeps BLAS within the processors granted."""
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    with warnings.catch_warnings(), threadpool_limits(max(1, threads // workers)):
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.filterwarnings("ignore", "The number of unique classes is greater than 50%")  # few images a class
        warnings.filterwarnings("ignore", module="sklearn.neighbors")  # features that do not vary within a class
        yield


def _score(predicted: NDArray[Any], targets: NDArray[Any]) -> float:
    from sklearn.metrics import f1_score

    if targets.ndim == 2:
        return float(f1_score(targets, predicted, average="macro", zero_division=0))
    return float(np.mean(predicted == targets))


def fit_head(
    features: Features,
    labelled: LabelledRows,
    *,
    kind: str = "svm",
    cs: Sequence[float] = C_GRID,
    scalings: Sequence[str] = tuple(SCALINGS),
    threads: int | None = None,
    quiet: bool = True,
) -> tuple[Head, Report | None]:
    """Selects, calibrates and scores on held-out rows, then fits on all.

    Args:
        features: the rows.
        labelled: which have which labels.
        kind: one of `KINDS`.
        cs, scalings: what to choose from.
        threads: processors; by default what the cgroup grants.
        quiet: no progress.

    Returns:
        The head, and what its settings reach on the held-out rows when fitted on the others; None where every class
        has a single row. The same rows chose the settings, so that a test on further images may come out lower.

    Raises:
        InputError: the rows are of one class.
    """
    targets, classes = labelled.targets, labelled.classes
    require_two(features.place, labelled)
    progress = Progress("fit", 0, "fits", quiet=quiet)
    selection, head, converged = select_and_fit(
        features.values,
        targets,
        kind=kind,
        rows=labelled.rows,
        cs=cs,
        scalings=scalings,
        threads=threads,
        progress=progress,
    )
    progress.finish()
    report, calibration = None, {}
    if len(selection.held):
        held, answers = labelled.rows[selection.held], targets[selection.held]
        calibration = calibrate(selection.head.raw_margins(features.values, held), answers)
        report = Report.of(selection.head.predict(features.values, held), answers, classes)
    head = replace(
        head,
        classes=classes,
        arrays=dict(head.arrays) | calibration,
        model=features.model,
        selection=_describe(selection, labelled, converged=converged),
        scores={"held_out": report.to_dict()} if report else {},
    )
    return head, report


def _hold_out_any(targets: NDArray[np.bool_], seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    order = np.random.default_rng(seed).permutation(len(targets))
    is_held = np.zeros(len(targets), bool)
    is_held[order[: math.ceil(HELD_OUT * len(targets))]] = True
    for label in targets.T:
        for with_it in (label, ~label):
            if with_it.any() and not (with_it & ~is_held).any():
                is_held[np.flatnonzero(with_it)[0]] = False
    return np.flatnonzero(~is_held), np.flatnonzero(is_held)


def require_two(place: str, labelled: LabelledRows) -> None:
    """Refuses labels that nothing can be learnt from; `place` names the rows.

    Raises:
        InputError: the rows are of one class, or all of them have a label, or none.
    """
    if labelled.targets.ndim == 1:
        if len(labelled.classes) < 2:
            raise InputError(
                f"{place}: all {len(labelled.rows):,} labelled rows are of one class, {labelled.classes[0]!r}",
                fix="label rows of two classes or more",
            )
        return
    share: Array = labelled.targets.mean(0)
    for name, part in zip(labelled.classes, share, strict=True):
        if part in (0.0, 1.0):
            raise InputError(
                f"{place}: label {name!r} is on {'every' if part else 'no'} labelled row",
                fix="label some rows with it and some without",
            )
    if not labelled.classes:
        raise InputError(f"{place}: no labelled row has a label")


def _describe(selection: Selection, labelled: LabelledRows, *, converged: bool) -> dict[str, Any]:
    def record(candidate: Candidate) -> dict[str, Any]:
        score = None if math.isnan(candidate.score) else candidate.score
        return {"scaling": candidate.scaling, "C": candidate.c, "score": score, "converged": candidate.converged}

    return {
        "C": selection.best.c,
        "scaling": selection.best.scaling,
        "measure": "accuracy" if labelled.targets.ndim == 1 else "macro F1",
        "candidates": [record(candidate) for candidate in selection.candidates],
        "seed": 0,
        "rows_fit": len(selection.fit),
        "rows_held_out": len(selection.held),
        "rows": len(labelled.rows),
        "converged": converged,
    }
