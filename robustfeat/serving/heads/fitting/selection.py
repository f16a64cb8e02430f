"""Chooses C and scaling on held-out rows."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustfeat.errors import InputError
from robustfeat.progress import Progress
from robustfeat.serving.heads.fitting.training_set import Fits, TrainingSet
from robustfeat.serving.heads.fitting.trials import Candidate, Trials
from robustfeat.serving.heads.head import Head
from robustfeat.serving.heads.kinds import KINDS, Array

__all__ = ["C_GRID", "HELD_OUT", "SELECTIONS", "Selection", "choose", "fold", "hold_out"]

C_GRID = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
HELD_OUT = 0.1

SELECTIONS = ("auto", "folds", "holdout")
"""Methods of a selection. `auto` is folds below `FEW` rows, else a held-out part."""

FEW = 5000
MOST = 100_000
"""Most rows for a selection. 10,000 of them score, which resolves 1 %."""
_LEAST_OF_CLASS = 20

FOLDS = 5
_LEAST_SCORED = 1000
"""Predictions to score: folds are drawn again until there are so many, at most `_MOST_DRAWS` times."""
_MOST_DRAWS = 5

_PATIENCE = 2
"""Number of consecutive falls of the score after which C stops rising."""

Split = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Positions to fit on, and positions to score."""


@dataclass(frozen=True, eq=False)
class Selection:
    """The result of a selection.

    Attributes:
        best: the chosen setting.
        candidates: all settings in the order of the grid: by scaling, then by C.
        method: folds or holdout.
        splits: fitted and scored positions, by draw.
        held: (m,) int64, positions of the scored rows, each once.
        margins: (m, K), or (m, 1) for two classes: raw margins of `best` on these rows, fitted without them.
    """

    best: Candidate
    candidates: tuple[Candidate, ...]
    method: str
    splits: tuple[tuple[Split, ...], ...]
    held: NDArray[np.int64]
    margins: Array


def choose(
    data: TrainingSet,
    *,
    cs: Sequence[float] = C_GRID,
    scalings: Sequence[str],
    method: str = "auto",
    seed: int = 0,
    trials: Trials | None = None,
    progress: Progress | None = None,
) -> Selection:
    """Tries settings on held-out rows.

    With folds, the choice is the smallest C whose score is within one standard error of the best, with the best one's
    scaling (Breiman et al., 1984). With few rows the best score is partly luck, and a smaller C is a simpler model.
    With a held-out part, the best score wins, the first among equals. Above `MOST` rows, a random sample chooses.

    Args:
        data: labelled rows.
        cs, scalings: the grid; kinds without C only try the scalings. With `auto` and `folds`, larger C are skipped
            once the score has fallen twice in a row.
        method: one of `SELECTIONS`.
        seed: random seed of the draw.
        trials: finished trials, which are not repeated. New ones are added.
        progress: gets its total and counts fits.

    Raises:
        InputError: the method does not exist.
        ValueError: the features cannot be fitted.
    """
    if method not in SELECTIONS:
        raise InputError(f"expected {', '.join(SELECTIONS[:-1])} or {SELECTIONS[-1]}", argument="method", value=method)
    trials = Trials() if trials is None else trials
    folds = method == "folds" or (method == "auto" and len(data.targets) < FEW)
    draws = fold(data.targets, seed) if folds else [[_hold_out_of_part(data.targets, seed)]]
    draws = [[(fit, held) for fit, held in draw if len(held)] for draw in draws]
    splits = [split for draw in draws for split in draw]
    grid: Sequence[float | None] = cs if KINDS[data.kind].linear else [None]
    if not splits:  # without held-out rows, choose plain features and a medium C
        c = (1.0 if 1.0 in cs else cs[0]) if grid[0] is not None else None
        best = Candidate("none" if "none" in scalings else scalings[0], c, math.nan, math.nan, True)
        return Selection(best, (best,), "holdout", (), np.empty(0, np.int64), np.empty((0, data.outputs)))
    if progress:
        progress.total += len(scalings) * len(grid) * len(splits)
    patience = math.inf if method == "holdout" else _PATIENCE
    tries = [one for scaling in scalings for one in _climb(data, scaling, grid, splits, patience, trials, progress)]
    chosen = max(tries, key=lambda one: one.candidate.score)  # the first among equals
    if folds:
        chosen = _simplest(chosen, tries)
    once, best = draws[0], chosen.candidate
    margins = chosen.margins[: len(once)] or [  # empty for a trial of an earlier run
        data.margins(data.fits(best.scaling, fit).fit(best.c)[0], held) for fit, held in once
    ]
    return Selection(
        best,
        tuple(one.candidate for one in tries),
        "folds" if folds else "holdout",
        tuple(map(tuple, draws)),
        np.concatenate([held for _, held in once]),
        np.concatenate(margins),
    )


@dataclass(frozen=True, eq=False)
class _Try:
    candidate: Candidate
    margins: list[Array]  # margins of the scored rows of all draws; empty for a trial of an earlier run


def _climb(
    data: TrainingSet,
    scaling: str,
    cs: Sequence[float | None],
    splits: Sequence[Split],
    patience: float,
    trials: Trials,
    progress: Progress | None,
) -> Iterator[_Try]:
    """Tries C in ascending order on all parts, until the score has fallen often enough in a row."""
    paths: list[Fits] = []
    falls, before = 0, -math.inf
    for number, c in enumerate(cs):
        known = trials.get(scaling, c)
        if known is not None:
            one = _Try(known, [])
            if progress:
                progress.advance(len(splits))
        else:
            paths = paths or [data.fits(scaling, fit) for fit, _ in splits]
            one = _attempt(data, paths, splits, scaling, c, progress)
            trials.add(one.candidate)
        yield one
        score = one.candidate.score
        falls, before = falls + 1 if score < before else 0, score
        if falls >= patience:
            if progress:
                progress.total -= (len(cs) - number - 1) * len(splits)
            return


def _attempt(
    data: TrainingSet,
    paths: Sequence[Fits],
    splits: Sequence[Split],
    scaling: str,
    c: float | None,
    progress: Progress | None,
) -> _Try:
    scores, margins, all_converged = [], [], True
    for path, (_, held) in zip(paths, splits, strict=True):
        head, converged = path.fit(c)
        if len(splits) > 1:
            path.rest()
        margins.append(data.margins(head, held))
        scores.append(_score(head, margins[-1], data.targets[held]))
        all_converged &= converged
        if progress:
            progress.advance(1)
    candidate = Candidate(scaling, c, float(np.mean(scores)), _standard_error(scores), all_converged)
    return _Try(candidate, margins)


def _standard_error(scores: Sequence[float]) -> float:
    """The standard error of the mean. Several draws of the same rows count once."""
    return float(np.std(scores, ddof=1)) / math.sqrt(min(len(scores), FOLDS)) if len(scores) > 1 else math.nan


def _simplest(best: _Try, tries: Sequence[_Try]) -> _Try:
    """The smallest C of the same scaling that is within one standard error."""
    enough = best.candidate.score - best.candidate.error
    same = [one for one in tries if one.candidate.scaling == best.candidate.scaling]
    return next(one for one in sorted(same, key=lambda one: one.candidate.c or 0.0) if one.candidate.score >= enough)


def _score(head: Head, margins: Array, targets: NDArray[Any]) -> float:
    predicted = head.decide(head.both(margins))
    if targets.ndim == 2:
        from sklearn.metrics import f1_score

        return float(f1_score(targets, predicted, average="macro", zero_division=0))
    return float(np.mean(predicted == targets))


def fold(targets: NDArray[Any], seed: int = 0) -> list[list[Split]]:
    """Splits rows into five stratified folds, and draws again while few rows are scored.

    The only row of a class is always fitted and never scored. Several labels per row cannot be stratified. A row is
    then not scored if the other rows would all have a label, or none would.

    Args:
        targets: (m,) int64, or (m, K) bool.
        seed: random seed of the draws.

    Returns:
        Five pairs of positions per draw: to fit on, and to score.
    """
    rng = np.random.default_rng(seed)
    draws = min(_MOST_DRAWS, math.ceil(_LEAST_SCORED / len(targets)))
    found = []
    for _ in range(draws):
        order = rng.permutation(len(targets))
        if targets.ndim == 1:
            order = order[np.argsort(targets[order], kind="stable")]
            order = order[np.bincount(targets)[targets[order]] > 1]
        splits = []
        for first in range(FOLDS):
            held = np.sort(order[first::FOLDS])
            if targets.ndim == 2:
                held = _keeping_labels(targets, held)
            splits.append((np.setdiff1d(np.arange(len(targets)), held), held))
        found.append(splits)
    return found


def _hold_out_of_part(targets: NDArray[Any], seed: int) -> Split:
    part = draw_part(targets, MOST, seed)
    fit, held = hold_out(targets[part], seed)
    return part[fit], part[held]


def draw_part(targets: NDArray[Any], most: int, seed: int = 0) -> NDArray[np.int64]:
    """Draws about `most` rows: the same share of each class, but at least 20 rows or all of a smaller class.

    Args:
        targets: (m,) int64, or (m, K) bool, which is not stratified.
        most: number of rows. If there are fewer, all are taken.
        seed: random seed of the draw.

    Returns:
        Ascending positions.
    """
    if len(targets) <= most:
        return np.arange(len(targets))
    order = np.random.default_rng(seed).permutation(len(targets))
    if targets.ndim == 2:
        return np.sort(order[:most])
    order = order[np.argsort(targets[order], kind="stable")]
    counts = np.bincount(targets)
    wanted = np.maximum(np.ceil(most / len(targets) * counts), _LEAST_OF_CLASS)
    rank = np.arange(len(targets)) - (np.cumsum(counts) - counts)[targets[order]]
    return np.sort(order[rank < wanted[targets[order]]])


def hold_out(targets: NDArray[Any], seed: int = 0) -> Split:
    """Holds out 10 % of the rows, stratified, for a selection.

    The only row of a class is never held out. If 10 % are fewer rows than classes, one row per class is held out.
    Several labels per row cannot be stratified. Then 10 % are drawn, and a row is returned if the other rows would all
    have a label, or none would.

    Args:
        targets: (m,) int64, or (m, K) bool.
        seed: random seed of the draw.

    Returns:
        Positions to fit on, and held-out positions; none if every class has one row.
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
        with warnings.catch_warnings():
            # Classes may have few images.
            warnings.filterwarnings("ignore", "The number of unique classes is greater than 50%")
            fit, held = train_test_split(shared, test_size=HELD_OUT, stratify=ids[shared], random_state=seed)
        return np.concatenate([fit, np.flatnonzero(counts[ids] < 2)]), held
    draw = np.random.default_rng(seed)
    held = np.array([draw.choice(np.flatnonzero(ids == one)) for one in np.flatnonzero(counts >= 2)])
    return np.setdiff1d(np.arange(len(ids)), held), held


def _hold_out_any(targets: NDArray[np.bool_], seed: int) -> Split:
    order = np.random.default_rng(seed).permutation(len(targets))
    held = _keeping_labels(targets, np.sort(order[: math.ceil(HELD_OUT * len(targets))]))
    return np.setdiff1d(np.arange(len(targets)), held), held


def _keeping_labels(targets: NDArray[np.bool_], held: NDArray[np.int64]) -> NDArray[np.int64]:
    """Removes held-out rows that the others need, so that each label is on some of the others but not on all."""
    is_held = np.zeros(len(targets), bool)
    is_held[held] = True
    for label in targets.T:
        for with_it in (label, ~label):
            if with_it.any() and not (with_it & ~is_held).any():
                is_held[np.flatnonzero(with_it)[0]] = False
    return np.flatnonzero(is_held)
