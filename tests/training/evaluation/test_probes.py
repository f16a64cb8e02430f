"""Scores of frozen features: against scripts of plain scikit-learn and SciPy, and blind to test labels."""

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, Normalizer, StandardScaler
from sklearn.svm import SVC, LinearSVC

from robustfeat.serving.heads.fitting.fit import select
from robustfeat.training.evaluation.probes import few_shot, libsvm, naive_bayes, nearest_neighbours, svm
from robustfeat.training.evaluation.tasks import TaskFeatures


@pytest.fixture(scope="module")
def digits() -> TaskFeatures:
    """Scans of digits, 600 and 400 rows of 64 values, some of them harder than they are."""
    data, labels = load_digits(return_X_y=True)
    noisy = (data + np.random.default_rng(0).normal(0, 4, data.shape)).astype(np.float32)
    names = tuple(str(number) for number in range(10))
    return TaskFeatures(
        "digits", "pixels", names, noisy[:600], labels[:600].astype(np.int64), noisy[600:1000], labels[600:1000]
    )


def test_the_svm_is_that_of_a_script_of_scikit_learn(digits: TaskFeatures) -> None:
    x, y = digits.x.astype(np.float64), digits.y
    fit, held = train_test_split(np.arange(len(y)), test_size=0.1, stratify=y, random_state=0)
    best: tuple[float, Any] = (-1.0, None)
    for scaler in (FunctionTransformer(), Normalizer(), StandardScaler()):
        for c in (1e-3, 1e-2, 1e-1, 1.0, 10.0):
            pipeline = make_pipeline(scaler, LinearSVC(C=c, dual=False))
            score = pipeline.fit(x[fit], y[fit]).score(x[held], y[held])
            if score > best[0]:
                best = (score, pipeline)
    expected = best[1].fit(x, y).predict(digits.x_test.astype(np.float64)) == digits.y_test
    score = svm(digits)
    assert score.accuracy == expected.mean()
    np.testing.assert_array_equal(score.right, expected)
    assert (score.details["C"], score.details["held_out"]) == (best[1][-1].C, best[0])


def test_test_labels_change_nothing_but_the_score(digits: TaskFeatures) -> None:
    shuffled = dataclasses.replace(digits, y_test=np.random.default_rng(1).permutation(digits.y_test))
    for probe in (svm, naive_bayes, nearest_neighbours):
        honest, blind = probe(digits), probe(shuffled)
        assert honest.details == blind.details
        assert blind.accuracy < 0.3 < honest.accuracy


def test_neighbours_are_those_of_the_cosine(digits: TaskFeatures) -> None:
    reference = KNeighborsClassifier(10, metric="cosine").fit(digits.x, digits.y)
    assert nearest_neighbours(digits).accuracy == reference.score(digits.x_test, digits.y_test)


def test_more_images_a_class_help_and_draws_repeat(digits: TaskFeatures) -> None:
    curve = few_shot(digits, (1, 5, 50, 1000))
    assert list(curve) == [1, 5, 50]  # no class has 1000
    assert curve[1]["accuracy"] < curve[5]["accuracy"] < curve[50]["accuracy"]
    assert curve == few_shot(digits, (1, 5, 50, 1000))


def test_libsvm_chooses_for_itself(digits: TaskFeatures) -> None:
    cs, scalings = (1e-3, 1e-1), {"none": FunctionTransformer(), "standard": StandardScaler()}
    both = libsvm(digits, cs=cs, scalings=tuple(scalings))
    x, y = digits.x.astype(np.float64), digits.y
    fit, held = train_test_split(np.arange(len(y)), test_size=0.1, stratify=y, random_state=0)
    tried = []
    for scaling, c in itertools.product(scalings, cs):
        pipeline = make_pipeline(scalings[scaling], SVC(kernel="linear", C=c))
        tried.append((pipeline.fit(x[fit], y[fit]).score(x[held], y[held]), scaling, c))
    share, scaling, c = max(tried, key=lambda one: one[0])
    assert len({one[0] for one in tried}) > 1
    reference = make_pipeline(scalings[scaling], SVC(kernel="linear", C=c)).fit(x, y)
    details = both["LIBSVM"].details
    assert (details["held_out"], details["scaling"], details["C"]) == (share, scaling, c)
    assert both["LIBSVM"].accuracy == reference.score(digits.x_test.astype(np.float64), digits.y_test)
    ours = svm(digits, cs=cs, scalings=tuple(scalings))
    assert both["LinearSVC"].accuracy == ours.accuracy != both["LIBSVM"].accuracy


def test_the_choice_may_be_by_folds(digits: TaskFeatures) -> None:
    """As `robustfeat svm fit` chooses: the same function with the same rows."""
    score = svm(digits, method="folds")
    expected = select(digits.x, digits.y, method="folds").best
    assert (score.details["C"], score.details["scaling"]) == (expected.c, expected.scaling)
    assert score.details["held_out"] == expected.score
