"""Minima beside liblinear's and scikit-learn's, both solved to their ends, on data of every shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import logsumexp
from sklearn import datasets
from sklearn.linear_model import LogisticRegression
from sklearn.svm import LinearSVC

from robustfeat.serving.heads.fitting.training_set import TrainingSet
from robustfeat.serving.heads.head import Head
from robustfeat.serving.heads.solver import preconditioner
from robustfeat.serving.heads.solver import rows as module
from robustfeat.serving.heads.solver.rows import ScaledRows

Data = tuple[NDArray[np.float64], NDArray[np.int64]]


def scaled(x: NDArray[Any]) -> NDArray[np.float64]:
    result: NDArray[np.float64] = (x - x.mean(0)) / np.maximum(x.std(0), 1e-9)
    return result


def blobs(counts: list[int], size: int, spread: float, seed: int = 0) -> Data:
    rng = np.random.default_rng(seed)
    y = np.repeat(np.arange(len(counts)), counts)
    return rng.normal(size=(len(counts), size))[y] + spread * rng.normal(size=(len(y), size)), y


def digits() -> Data:
    x, y = datasets.load_digits(return_X_y=True)
    return x[:800] / 16, y[:800]


def iris() -> Data:
    x, y = datasets.load_iris(return_X_y=True)
    return x, y


def wine() -> Data:
    x, y = datasets.load_wine(return_X_y=True)
    return scaled(x), y


def tumours() -> Data:
    x, y = datasets.load_breast_cancer(return_X_y=True)
    return scaled(x), y


def doubled() -> Data:
    x, y = blobs([30, 30, 30], 12, 1.5)
    return np.concatenate([x, x]), np.concatenate([y, y])


def contradictory() -> Data:
    x, y = blobs([30, 30], 8, 1.0)
    return np.concatenate([x, x]), np.concatenate([y, 1 - y])


def with_constants() -> Data:
    x, y = blobs([40, 40, 20], 10, 1.0)
    return np.concatenate([x, np.zeros((100, 2)), np.full((100, 2), 7.0)], 1), y


def collinear() -> Data:
    x, y = blobs([40, 40, 20], 10, 1.0)
    return np.concatenate([x, x, x[:, :5] + x[:, 5:]], 1), y


def rectified() -> Data:
    """As a network's features are: none is negative, and all rows share a large mean."""
    x, y = blobs([50] * 6, 64, 2.0)
    return np.maximum(x, 0) + 0.3, y


def far_from_zero() -> Data:
    x, y = blobs([60, 60], 6, 1.0)
    return x + 50, y


DATA: dict[str, Callable[[], Data]] = {
    "digits": digits,
    "iris": iris,
    "wine": wine,
    "tumours": tumours,
    "separable": lambda: blobs([50, 50, 50], 20, 0.1),
    "overlapping": lambda: blobs([80, 80, 80], 5, 5.0),
    "two classes": lambda: blobs([100, 100], 30, 2.0),
    "skewed": lambda: blobs([300, 20, 3], 16, 2.0),
    "one row a class": lambda: blobs([1] * 8, 12, 1.0),
    "one row of two classes": lambda: blobs([1, 1], 3, 1.0),
    "100 classes": lambda: blobs([5] * 100, 32, 1.0),
    "more features than rows": lambda: blobs([10, 10, 10], 200, 4.0),
    "as many features as rows": lambda: blobs([10, 11], 21, 4.0),
    "one feature": lambda: blobs([30, 30, 30], 1, 1.0),
    "doubled": doubled,
    "contradictory": contradictory,
    "constant columns": with_constants,
    "collinear": collinear,
    "rectified": rectified,
    "far from zero": far_from_zero,
}


def head_of(x: NDArray[Any], y: NDArray[np.int64], kind: str, *cs: float) -> Head:
    """The last of these C, reached through the others."""
    fits = TrainingSet(x, np.arange(len(x)), y, kind).fits("none", np.arange(len(x)))
    for c in cs:
        head, converged = fits.fit(c)
        assert converged
    return head


def objective(kind: str, c: float, w: NDArray[Any], b: NDArray[Any], x: NDArray[Any], y: NDArray[np.int64]) -> float:
    """As scikit-learn's documentation has it, summed over classes where they are fitted apart."""
    margins = x @ w.T + b
    signs = np.where(y[:, None] == (1 if len(w) == 1 else np.arange(len(w))), 1, -1)
    if kind == "svm":
        return float(0.5 * (w**2).sum() + 0.5 * (b**2).sum() + c * (np.maximum(0, 1 - signs * margins) ** 2).sum())
    if len(w) == 1:
        loss = np.logaddexp(0, -signs * margins).sum()
    else:
        loss = (logsumexp(margins, axis=1) - margins[np.arange(len(y)), y]).sum()
    return float(0.5 * (w**2).sum() + c * loss)


@pytest.mark.parametrize("kind", ["svm", "logistic"])
@pytest.mark.parametrize("name", DATA)
def test_minima_are_scikit_learns(name: str, kind: str) -> None:
    x, y = DATA[name]()
    for c in (0.001, 0.1, 10.0):
        head = head_of(x, y, kind, c)
        if kind == "svm":
            reference = LinearSVC(C=c, dual=False, tol=1e-11, max_iter=1_000_000)
        else:
            reference = LogisticRegression(C=c, tol=1e-10, max_iter=10_000)
        reference.fit(x, y)
        ours = objective(kind, c, head.arrays["coefficients"], head.arrays["intercepts"], x, y)
        theirs = objective(kind, c, reference.coef_, reference.intercept_, x, y)
        assert ours <= theirs * (1 + 1e-7)
        wanted = reference.decision_function(x).reshape(len(x), -1)
        np.testing.assert_allclose(head.raw_margins(x), wanted, atol=2e-3 * np.abs(wanted).max() + 2e-4)


@pytest.mark.parametrize("kind", ["svm", "logistic"])
def test_the_way_to_a_minimum_does_not_matter(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One preconditioner for all classes, one for each that is renewed at once, steps along C, and none of these."""
    x, y = digits()
    direct = head_of(x, y, kind, 1.0).raw_margins(x)
    margins = [head_of(x, y, kind, 0.01, 100.0, 1.0).raw_margins(x)]
    monkeypatch.setattr(preconditioner, "_LARGEST", 0)
    margins.append(head_of(x, y, kind, 0.1, 1.0).raw_margins(x))
    monkeypatch.setattr(preconditioner, "_LARGEST", 2**26)
    monkeypatch.setattr(preconditioner, "_PASS", 1e9)
    margins.append(head_of(x, y, kind, 0.1, 1.0).raw_margins(x))
    for found in margins:
        np.testing.assert_allclose(found, direct, atol=1e-3 * np.abs(direct).max())


@pytest.mark.parametrize(
    "data", [iris(), tumours(), blobs([9, 9, 9], 500, 3.0)], ids=["iris", "tumours", "few of many"]
)
@pytest.mark.parametrize("kind", ["svm", "logistic"])
def test_small_hessians_are_solved_exactly_and_lead_to_the_same_minimum(
    kind: str, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = data[0][:400], data[1][:400]
    places = np.arange(len(x))
    margins, steps = [], []
    for most in (64, 0):
        monkeypatch.setattr(module, "_SMALL", most)
        fits = TrainingSet(x, places, y, kind).fits("none", places)
        head, converged = fits.fit(1.0)
        assert converged
        assert fits._newton is not None
        margins.append(head.raw_margins(x))
        steps.append(fits._newton.passes)
    np.testing.assert_allclose(margins[0], margins[1], atol=1e-3 * np.abs(margins[1]).max())
    assert steps[0] <= steps[1]


def test_renewed_preconditioners_save_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = digits()
    places = np.arange(len(x))
    passes = {}
    for cost in (0.0, 12.0, 1e9):
        monkeypatch.setattr(preconditioner, "_PASS", cost)
        fits = TrainingSet(x, places, y, "svm").fits("none", places)
        fits.fit(10.0)
        assert fits._newton is not None
        passes[cost] = fits._newton.passes
    assert passes[1e9] < passes[12.0] < passes[0.0]
    assert passes[1e9] < 40


@pytest.mark.parametrize("size", [1, 64, 65, 130, 301])
@pytest.mark.parametrize("c", [1e-3, 1.0, 1e3])
def test_preconditioners_are_inverses_of_hessians(size: int, c: float) -> None:
    """Also where most directions hardly vary: there the halves of an inverse lose what is left of symmetry."""
    draw = np.random.default_rng(0)
    x = np.maximum(draw.normal(0.5, 1, (900, size)) * np.geomspace(10, 1e-3, size), 0)
    rows = ScaledRows(x, np.arange(900), "none", 2)
    one = preconditioner.Preconditioner(rows, np.ones(size + 1), 3)
    one.set_c(c)
    bends = np.where(draw.random((900, 3)) < 0.3, np.float32(2), np.float32(0))
    one.count(np.arange(3), np.full(3, 10**6))  # passes have cost enough for an inverse of each output's own
    one.renew_where_worthwhile(np.arange(3), bends)
    vectors = draw.normal(size=(2, size + 1))
    padded = np.concatenate([x, np.ones((900, 1))], 1)
    for output, vector, found in zip([0, 2], vectors, one(np.array([0, 2]), vectors), strict=True):
        hessian = np.eye(size + 1) + c * padded.T @ (bends[:, [output]] * padded)
        np.testing.assert_allclose(hessian @ found, vector, atol=1e-8)


def test_features_that_are_too_large_are_refused() -> None:
    x, y = blobs([5, 5], 3, 1.0)
    with pytest.raises(ValueError, match="they are too large: scale them"):
        head_of(x * 1e160, y, "svm", 1.0)
