"""Fits heads: chooses C and scaling, calibrates, and fits on all rows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustfeat.counts import format_count
from robustfeat.errors import InputError, first_line
from robustfeat.progress import Progress
from robustfeat.serving.bulk.stacked import Rows
from robustfeat.serving.heads.distance import fit_distance
from robustfeat.serving.heads.features import Features
from robustfeat.serving.heads.fitting.calibration import calibrate
from robustfeat.serving.heads.fitting.selection import C_GRID, Selection, choose
from robustfeat.serving.heads.fitting.training_set import TrainingSet
from robustfeat.serving.heads.fitting.trials import Candidate, Trials, fingerprint_rows
from robustfeat.serving.heads.head import Head
from robustfeat.serving.heads.kinds import SCALINGS, Array
from robustfeat.serving.heads.labels.matching import LabelledRows
from robustfeat.serving.heads.reports.answers import Answers
from robustfeat.serving.heads.reports.intervals import wilson_interval
from robustfeat.serving.heads.reports.report import Report
from robustfeat.system import available_cpus

__all__ = ["fit_head", "measure_held_out", "require_two", "select", "select_and_fit"]


def select_and_fit(
    values: Rows,
    targets: NDArray[Any],
    *,
    kind: str = "svm",
    rows: NDArray[np.int64] | None = None,
    cs: Sequence[float] = C_GRID,
    scalings: Sequence[str] = tuple(SCALINGS),
    method: str = "auto",
    seed: int = 0,
    threads: int | None = None,
    trials: Trials | None = None,
    progress: Progress | None = None,
) -> tuple[Selection, Head, bool]:
    """Chooses C and scaling on held-out rows, then fits on all rows.

    Features are float64. The SVM reaches the minimum of scikit-learn's `LinearSVC(C=c, dual=False)`, and logistic
    regression the minimum of `LogisticRegression(C=c)`.

    Args:
        values: (n, D) features, possibly memory-mapped.
        targets: (m,) int64 from 0, or (m, K) bool for several labels per row.
        kind: one of `KINDS`.
        rows: (m,) the rows of the targets, ascending; by default all.
        cs, scalings, method, seed, trials: see `choose`.
        threads: number of processors; by default all that the cgroup allows.
        progress: gets its total and counts fits.

    Returns:
        The selection, the head, whose classes are numbers, and whether its solver converged.

    Raises:
        InputError: the features cannot be fitted.
    """
    rows = np.arange(len(values)) if rows is None else rows
    with _fitting():
        data = TrainingSet(values, rows, targets, kind, threads or available_cpus(), progress)
        if progress:
            progress.total += 1
        selection = choose(data, cs=cs, scalings=scalings, method=method, seed=seed, trials=trials, progress=progress)
        head, converged = data.fits(selection.best.scaling, np.arange(len(targets))).fit(selection.best.c)
    if progress:
        progress.advance(1)
    return selection, head, converged


def select(
    values: Rows,
    targets: NDArray[Any],
    *,
    kind: str = "svm",
    cs: Sequence[float] = C_GRID,
    scalings: Sequence[str] = tuple(SCALINGS),
    method: str = "auto",
    seed: int = 0,
    threads: int | None = None,
) -> Selection:
    """Makes the selection of `select_and_fit` without the final fit."""
    with _fitting():
        data = TrainingSet(values, np.arange(len(values)), targets, kind, threads or available_cpus())
        return choose(data, cs=cs, scalings=scalings, method=method, seed=seed)


@contextmanager
def _fitting() -> Iterator[None]:
    """Limits BLAS to one thread, since our threads each work on a block."""
    from threadpoolctl import threadpool_limits

    try:
        with threadpool_limits(1):
            yield
    except ValueError as exc:
        raise InputError(f"these features cannot be fitted: {first_line(exc)}") from exc


def fit_head(
    features: Features,
    labelled: LabelledRows,
    *,
    kind: str = "svm",
    cs: Sequence[float] = C_GRID,
    scalings: Sequence[str] = tuple(SCALINGS),
    method: str = "auto",
    threads: int | None = None,
    resume: Path | None = None,
    quiet: bool = True,
) -> tuple[Head, Report | None]:
    """Selects, calibrates and scores on held-out rows, then fits on all rows.

    Args:
        features: the rows.
        labelled: their labels.
        kind: one of `KINDS`.
        cs, scalings: the settings to choose from.
        method: one of `SELECTIONS`.
        threads: number of processors; by default all that the cgroup allows.
        resume: a file of finished trials, from which an interrupted fit of the same rows and settings resumes. It is
            kept; remove it once the head is written.
        quiet: hide progress.

    Returns:
        The head, and the report of its settings on held-out rows; None if every class has a single row. The same rows
        chose the settings, so new images may score lower.

    Raises:
        InputError: the rows are in one class.
    """
    targets, classes = labelled.targets, labelled.classes
    require_two(features.place, labelled)
    progress = Progress("fit", 0, "fits", quiet=quiet)
    trials = Trials()
    if resume is not None:
        settings = [kind, list(cs), list(scalings), method]
        trials = Trials(resume, fingerprint_rows(features.values, labelled.rows, targets, settings))
        if len(trials):
            progress.say(f"resuming: {format_count(len(trials), 'setting was', 'settings were')} tried before")
    selection, head, converged = select_and_fit(
        features.values,
        targets,
        kind=kind,
        rows=labelled.rows,
        cs=cs,
        scalings=scalings,
        method=method,
        threads=threads,
        trials=trials,
        progress=progress,
    )
    progress.finish()
    head = replace(
        head,
        classes=classes,
        arrays=dict(head.arrays) | measure_held_out(selection, features.values, labelled.rows, targets),
        model=features.model,
        selection=_describe(selection, labelled, converged=converged),
    )
    if not len(selection.held):
        return head, None
    paths = [features.paths[row] for row in labelled.rows[selection.held]]
    margins = head.both(selection.margins)
    report = Report.of_answers(Answers.of(head, margins, targets[selection.held], paths, classes), unseen=True)
    return replace(head, scores={"held_out": report.to_dict()}), replace(report, settings=_settings(head.selection))


def measure_held_out(
    selection: Selection, values: Rows, rows: NDArray[np.int64], targets: NDArray[Any]
) -> dict[str, Array]:
    """The arrays of a head for probabilities and typicality, from the rows that the selection held out.

    Args:
        selection: the selection of the head.
        values: (n, D) features, possibly memory-mapped.
        rows: (m,) the rows of the targets.
        targets: (m,) int64 positions among the head's classes, or (m, K) bool.

    Returns:
        Nothing if no row was held out.
    """
    if not len(selection.held):
        return {}
    groups = targets if targets.ndim == 1 else np.zeros(len(targets), np.int64)
    distances = fit_distance(values, rows, groups, selection.splits[0])
    return calibrate(selection.margins, targets[selection.held]) | distances


def require_two(place: str, labelled: LabelledRows) -> None:
    """Refuses labels that teach nothing; `place` names the rows.

    Raises:
        InputError: the rows are in one class, or a label is on all of them or none.
    """
    unmatched = f"; {labelled.missing_summary()}" if labelled.missing else ""
    if labelled.targets.ndim == 1:
        if len(labelled.classes) < 2:
            rows = format_count(len(labelled.rows), "labelled row")
            raise InputError(
                f"{place}: expected labels of two or more classes; got {rows} of one class, {labelled.classes[0]!r}"
                f"{unmatched}",
                fix="write their paths as in the index" if unmatched else "label rows of at least two classes",
            )
        return
    share: Array = labelled.targets.mean(0)
    for name, part in zip(labelled.classes, share, strict=True):
        if part in (0.0, 1.0):
            raise InputError(
                f"{place}: label {name!r} is on {'every' if part else 'no'} labelled row{unmatched}",
                fix="label some rows with it and some without",
            )
    if not labelled.classes:
        raise InputError(f"{place}: no labelled row has a label{unmatched}")


def _settings(selection: Mapping[str, Any]) -> tuple[dict[str, str], ...]:
    """Finished trials as rows of a table."""

    def row(candidate: Mapping[str, Any]) -> dict[str, str]:
        low, high = candidate.get("interval", (None, None))
        error, c = candidate["standard_error"], candidate["C"]
        is_chosen = (candidate["scaling"], c) == (selection["scaling"], selection["C"])
        return {
            "scaling": candidate["scaling"],
            "C": "" if c is None else f"{c:g}",
            selection["measure"]: f"{candidate['score']:.4f}",
            "95 %": "" if low is None else f"{low:.4f} to {high:.4f}",
            "standard error": "" if error is None else f"{error:.4f}",
            "chosen": "yes" if is_chosen else "",
        }

    return tuple(map(row, selection["candidates"]))


def _describe(selection: Selection, labelled: LabelledRows, *, converged: bool) -> dict[str, Any]:
    is_share = labelled.targets.ndim == 1  # Wilson's interval needs a share, which F1 is not

    def record(candidate: Candidate) -> dict[str, Any]:
        numbers = {"score": candidate.score, "standard_error": candidate.error}
        known: dict[str, Any] = {name: None if math.isnan(value) else value for name, value in numbers.items()}
        if is_share and known["score"] is not None:
            known["interval"] = list(wilson_interval(candidate.score, len(selection.held)))
        return {"scaling": candidate.scaling, "C": candidate.c, **known, "converged": candidate.converged}

    return {
        "method": selection.method,
        "C": selection.best.c,
        "scaling": selection.best.scaling,
        "measure": "accuracy" if is_share else "macro F1",
        "candidates": [record(candidate) for candidate in selection.candidates],
        "seed": 0,
        "parts": sum(map(len, selection.splits)),
        "rows_held_out": len(selection.held),
        "rows": len(labelled.rows),
        "converged": converged,
    }
