"""Selection and fits beside scikit-learn used by hand."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.model_selection import train_test_split
from sklearn.multioutput import MultiOutputClassifier
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import NearestCentroid
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer, StandardScaler
from sklearn.svm import LinearSVC

from robustfeat.serving.heads.features import open_features
from robustfeat.serving.heads.fitting.fit import fit_head, select_and_fit
from robustfeat.serving.heads.fitting.selection import hold_out
from robustfeat.serving.heads.fitting.training_set import TrainingSet
from robustfeat.serving.heads.labels.matching import match_labels
from robustfeat.serving.heads.labels.reading import read_labels
from robustfeat.serving.heads.solver import newton, rows
from tests.conftest import WriteFeatures

Digits = tuple[NDArray[np.float32], NDArray[np.int64]]

SCALERS = {"none": lambda: None, "l2": Normalizer, "standard": StandardScaler}


def test_selection_and_refit_equal_scikit_learn_used_by_hand(
    digit_files: Path, digits: Digits, write_features: WriteFeatures
) -> None:
    x, y = digits[0].astype(np.float64), digits[1]
    x_fit, x_held, y_fit, y_held = train_test_split(x[:500], y[:500], test_size=0.1, stratify=y[:500], random_state=0)
    scores: dict[tuple[str, float], float] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for scaling, scaler in SCALERS.items():
            for c in (0.001, 0.01, 0.1, 1.0, 10.0):
                pipeline = make_pipeline(scaler(), LinearSVC(C=c, dual=False, tol=1e-10, max_iter=100_000))
                scores[scaling, c] = pipeline.fit(x_fit, y_fit).score(x_held, y_held)
        best = max(scores, key=lambda key: scores[key])
        final = make_pipeline(SCALERS[best[0]](), LinearSVC(C=best[1], dual=False, tol=1e-10, max_iter=100_000)).fit(
            x[:500], y[:500]
        )

    names = [f"{row % 7}/{row:04}.png" for row in range(500)]
    features = open_features(str(write_features(digit_files / "few.npy", digits[0][:500], names)))
    labelled = match_labels(features, read_labels([str(digit_files / "labels.csv")]))
    head, report = fit_head(features, labelled, method="holdout")
    tried = {(one["scaling"], one["C"]): one["score"] for one in head.selection["candidates"]}
    assert tried == scores
    assert len(set(scores.values())) > 3  # the choice is one
    assert (head.selection["scaling"], head.selection["C"]) == best
    assert report is not None
    assert report.accuracy == scores[best]
    assert head.predict(x[1200:]).tolist() == [f"digit {one}" for one in final.predict(x[1200:])]
    np.testing.assert_allclose(head.margins(x[1200:]), final.decision_function(x[1200:]), atol=1e-3)


def test_the_best_of_equals_is_the_first(digits: Digits) -> None:
    kept = digits[1] < 2
    selection, _, _ = select_and_fit(
        digits[0][kept], digits[1][kept], cs=(0.01, 0.1), scalings=("standard", "none"), method="holdout"
    )
    assert {one.score for one in selection.candidates} == {1.0}
    assert (selection.best.scaling, selection.best.c) == ("standard", 0.01)


def test_hold_out_is_a_stratified_tenth() -> None:
    targets = np.repeat(np.arange(5), [100, 50, 30, 20, 10])
    fit, held = hold_out(targets)
    assert np.bincount(targets[held]).tolist() == [10, 5, 3, 2, 1]
    assert sorted([*fit, *held]) == list(range(210))
    reference = train_test_split(np.arange(210), test_size=0.1, stratify=targets, random_state=0)
    assert held.tolist() == reference[1].tolist()


@pytest.mark.parametrize(
    ("counts", "held_counts"),
    [([4] * 10, [1] * 10), ([50, 50, 1], [5, 5, 0]), ([3, 2, 1], [1, 1, 0]), ([1, 1, 1], [0, 0, 0])],
)
def test_hold_out_of_few_rows_leaves_a_row_of_each_class(counts: list[int], held_counts: list[int]) -> None:
    targets = np.repeat(np.arange(len(counts)), counts)
    fit, held = hold_out(targets)
    assert np.bincount(targets[held], minlength=len(counts)).tolist() == held_counts
    assert sorted([*fit, *held]) == list(range(len(targets)))
    assert set(targets[fit]) == set(targets)


def test_hold_out_with_several_labels_is_a_tenth_like_the_rest() -> None:
    draw = np.random.default_rng(0)
    targets = draw.random((1000, 20)) < 0.3
    targets[:, 5] = np.arange(1000) == 500
    for seed in range(20):
        fit, held = hold_out(targets, seed)
        assert sorted([*fit, *held]) == list(range(1000))
        assert 99 <= len(held) <= 100
        assert abs(targets[held].sum(1).mean() - targets.sum(1).mean()) < 1
        assert targets[fit][:, 5].any()


@pytest.mark.parametrize(("scalings", "scaling"), [(("none", "l2", "standard"), "none"), (("standard",), "standard")])
def test_without_held_out_rows_c_is_1(scalings: tuple[str, ...], scaling: str) -> None:
    selection, head, _ = select_and_fit(np.eye(3, 8), np.arange(3), scalings=scalings)
    assert (selection.best.scaling, selection.best.c, len(selection.candidates)) == (scaling, 1.0, 1)
    assert head.predict(np.eye(3, 8)).tolist() == [0, 1, 2]


def reference(kind: str, c: float) -> Any:
    return {
        "svm": lambda: LinearSVC(C=c, dual=False, tol=1e-10, max_iter=100_000),
        "logistic": lambda: LogisticRegression(C=c, tol=1e-10, solver="newton-cholesky"),
        "naive-bayes": GaussianNB,
        "nearest-mean": NearestCentroid,
    }[kind]()


def indicator(y: NDArray[np.int64]) -> NDArray[np.bool_]:
    return np.stack([y % 2 == 0, y > 4, y % 3 == 0], 1)


@pytest.mark.parametrize("task", ["ten classes", "two classes", "several labels"])
@pytest.mark.parametrize("scaling", ["none", "l2", "standard"])
@pytest.mark.parametrize("kind", ["svm", "logistic", "naive-bayes", "nearest-mean"])
@pytest.mark.parametrize("in_memory", [0, 2**20])
def test_fits_equal_scikit_learn(
    in_memory: int, kind: str, scaling: str, task: str, digits: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "_BLOCK", 100)
    monkeypatch.setattr(rows, "_IN_MEMORY", in_memory)
    x, classes = digits[0][:900] + 0.01, digits[1][:900]
    tasks: dict[str, NDArray[np.int64] | NDArray[np.bool_]] = {
        "ten classes": classes,
        "two classes": (classes > 4).astype(np.int64),
        "several labels": indicator(classes),
    }
    y = tasks[task]
    np.save(tmp_path / "x.npy", np.concatenate([x[:300] * np.nan, x]))
    values = np.load(tmp_path / "x.npy", mmap_mode="r")
    data = TrainingSet(values, np.arange(300, 1200), y, kind, threads=2)
    head, converged = data.fits(scaling, np.arange(899, -1, -1)).fit(0.1)
    classifier = reference(kind, 0.1)
    pipeline = make_pipeline(SCALERS[scaling](), MultiOutputClassifier(classifier) if y.ndim == 2 else classifier)
    pipeline.fit(x.astype(np.float64), y)
    assert converged
    test = digits[0][900:].astype(np.float64) + 0.01
    expected = pipeline.predict(test)
    assert len(np.unique(expected, axis=0)) > 1
    # Naive Bayes of constant pixels has variances of 1e-9: what is left there is rounding.
    assert np.mean(head.predict(test) == expected) > (0.99 if kind == "naive-bayes" else 0.998)
    if kind in {"svm", "logistic"}:
        # On the rows that were fitted: pixels that were hardly ever lit have coefficients that hardly matter.
        parts = getattr(pipeline[-1], "estimators_", [pipeline[-1]])
        scaled = pipeline[:-1].transform(x.astype(np.float64)) if scaling != "none" else x.astype(np.float64)
        wanted = np.concatenate([part.decision_function(scaled).reshape(len(x), -1) for part in parts], 1)
        np.testing.assert_allclose(head.raw_margins(x), wanted, atol=2e-3 * np.abs(wanted).max())


@pytest.mark.parametrize("kind", ["svm", "logistic", "naive-bayes", "nearest-mean"])
def test_numbers_that_no_row_has_are_no_classes(kind: str, digits: Digits) -> None:
    kept = np.isin(digits[1], (2, 3, 7))
    x, y = digits[0][kept] + 0.01 * np.arange(64), digits[1][kept]
    _, head, _ = select_and_fit(x, y, kind=kind, cs=(0.01,), scalings=("none",))
    assert head.classes == (2, 3, 7)
    assert np.mean(head.predict(x) == y) > 0.9


def test_several_labels_are_selected_by_macro_f1(digits: Digits) -> None:
    x, y = digits[0][:600], indicator(digits[1][:600])
    selection, _, _ = select_and_fit(x, y, cs=(0.01,), scalings=("l2",), method="holdout")
    reference = MultiOutputClassifier(LinearSVC(C=0.01, dual=False))
    normal = Normalizer().fit_transform(x.astype(np.float64))
    (((fit, held),),) = selection.splits
    predicted = reference.fit(normal[fit], y[fit]).predict(normal[held])
    assert selection.best.score == f1_score(y[held], predicted, average="macro")


def test_a_solver_that_stops_early_is_said(digits: Digits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(newton, "_MAX_STEPS", 1)
    assert not select_and_fit(*digits, cs=(10.0,), scalings=("none",), method="holdout")[0].best.converged
