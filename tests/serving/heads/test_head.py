"""Heads: what they compute, what a folder of one holds, and what is refused."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save
from scipy.optimize import minimize, minimize_scalar
from scipy.special import logsumexp
from sklearn.ensemble import RandomForestClassifier
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.multiclass import OneVsRestClassifier
from sklearn.multioutput import MultiOutputClassifier
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import NearestCentroid
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler, Normalizer, StandardScaler
from sklearn.svm import LinearSVC

from robustfeat.errors import HeadError, InputError
from robustfeat.serving import Head
from robustfeat.serving.heads.features import open_features
from robustfeat.serving.heads.fitting.calibration import calibrate
from robustfeat.serving.identity import ModelIdentity

Digits = tuple[NDArray[np.float32], NDArray[np.int64]]

CLASSIFIERS: dict[str, Callable[[], Any]] = {
    "svm": lambda: LinearSVC(C=0.01, dual=False),
    "logistic": lambda: LogisticRegression(C=0.01, solver="newton-cholesky"),
    "naive-bayes": lambda: GaussianNB(var_smoothing=1e-3),
    "nearest-mean": NearestCentroid,
}
SCALERS: dict[str, Callable[[], Any]] = {"none": lambda: None, "l2": Normalizer, "standard": StandardScaler}


def identity(**changes: Any) -> ModelIdentity:
    values = {
        "name": "digits-v1",
        "revision": None,
        "weights_sha256": "a" * 64,
        "preprocessing_hash": "b" * 64,
        "feature_size": 64,
        "precision": "fp32",
        "engine": "onnxruntime",
        "decoding": "exact",
    }
    return ModelIdentity(**(values | changes))


@pytest.fixture
def head(digits: Digits) -> Head:
    pipeline = make_pipeline(StandardScaler(), LinearSVC(C=0.01, dual=False)).fit(*digits)
    names = [f"digit {number}" for number in range(10)]
    return Head.from_sklearn(pipeline, model=identity(), classes=names, scores={"accuracy": 0.9})


@pytest.mark.parametrize("task", ["ten classes", "two classes", "several labels"])
@pytest.mark.parametrize("scaling", SCALERS)
@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_heads_equal_the_estimators_they_come_from_and_become(
    kind: str, scaling: str, task: str, digits: Digits, tmp_path: Path
) -> None:
    x, y = digits[0].astype(np.float64), digits[1]
    wanted: NDArray[Any] = y
    if task == "two classes":
        wanted = np.where(y > 4, "large", "small")
    elif task == "several labels":
        wanted = np.stack([y % 2 == 0, y > 4], 1)
    classifier = CLASSIFIERS[kind]()
    classifier = MultiOutputClassifier(classifier) if wanted.ndim == 2 else classifier
    pipeline = make_pipeline(SCALERS[scaling](), classifier).fit(x[:900], wanted[:900])
    made = Head.from_sklearn(pipeline)
    assert (made.kind, made.scaling, made.multi_label) == (kind, scaling, wanted.ndim == 2)
    made.save(tmp_path / "head")
    loaded = Head.load(tmp_path / "head")
    expected = pipeline.predict(x[900:])
    assert len(np.unique(expected, axis=0)) > 1
    for one in (made, loaded):
        answers = one.predict(x[900:])
        assert answers.tolist() == expected.tolist()
    back = loaded.to_sklearn()
    assert back.predict(x[900:]).tolist() == expected.tolist()
    assert Head.from_sklearn(back).predict(x[900:]).tolist() == expected.tolist()
    step = pipeline[-1]
    scaled = pipeline[:-1].transform(x[900:]) if scaling != "none" else x[900:]
    if kind in {"svm", "logistic"}:
        parts = [one.decision_function(scaled).reshape(len(scaled), -1) for one in getattr(step, "estimators_", [step])]
        margins = np.concatenate(parts, 1)
        np.testing.assert_allclose(loaded.margins(x[900:])[:, -margins.shape[1] :], margins, rtol=1e-9, atol=1e-12)
    elif kind == "naive-bayes" and task == "ten classes":
        np.testing.assert_allclose(loaded.margins(x[900:]), step.predict_joint_log_proba(scaled), rtol=1e-9)


@pytest.mark.parametrize("kind", ["svm", "logistic", "naive-bayes"])
def test_one_vs_rest_is_taken_for_several_labels(kind: str, digits: Digits) -> None:
    x, y = digits
    wanted = np.stack([y % 2 == 0, y > 4], 1)
    wrapper = OneVsRestClassifier(CLASSIFIERS[kind]()).fit(x[:900], wanted[:900])
    assert Head.from_sklearn(wrapper).predict(x[900:]).tolist() == (wrapper.predict(x[900:]) == 1).tolist()
    with pytest.raises(ValueError, match="use MultiOutputClassifier"):
        Head.from_sklearn(OneVsRestClassifier(NearestCentroid()).fit(x[:900], wanted[:900]))


def test_a_search_and_a_bare_classifier_are_taken(digits: Digits) -> None:
    search = GridSearchCV(make_pipeline(StandardScaler(), GaussianNB()), {"gaussiannb__var_smoothing": [1e-3, 1e-2]})
    search.fit(digits[0][:300], digits[1][:300])
    assert Head.from_sklearn(search).predict(digits[0]).tolist() == search.predict(digits[0]).tolist()


@pytest.mark.parametrize(
    ("estimator", "reason"),
    [
        (RandomForestClassifier(2), "cannot use RandomForestClassifier"),
        (make_pipeline(MinMaxScaler(), LinearSVC()), "cannot use MinMaxScaler"),
        (make_pipeline(Normalizer("l1"), LinearSVC()), "cannot use Normalizer"),
        (make_pipeline(StandardScaler(), Normalizer(), LinearSVC()), "one step before the classifier"),
        (NearestCentroid(shrink_threshold=0.1), "not shrunken"),
        (OneVsRestClassifier(LinearSVC()), "supported for several labels per row"),
        (LinearSVC(dual=False), "whole numbers; name others by classes"),
    ],
)
def test_other_estimators_are_refused(estimator: Any, reason: str, digits: Digits) -> None:
    targets = digits[1][:200]
    estimator.fit(digits[0][:200], targets > 4 if isinstance(estimator, LinearSVC) else targets)
    with pytest.raises(ValueError, match=reason):
        Head.from_sklearn(estimator)


def test_an_estimator_that_was_not_fitted_is_refused() -> None:
    with pytest.raises(NotFittedError):
        Head.from_sklearn(LinearSVC())


def test_a_saved_head_is_numbers_and_names(head: Head, tmp_path: Path) -> None:
    head.save(tmp_path / "head")
    assert sorted(file.name for file in (tmp_path / "head").iterdir()) == ["head.json", "head.safetensors"]
    about = json.loads((tmp_path / "head" / "head.json").read_text())
    assert about["classes"][3] == "digit 3"
    assert about["model"]["name"] == "digits-v1"
    raw = (tmp_path / "head" / "head.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    begin, end = header["coefficients"]["data_offsets"]
    values = np.frombuffer(raw[8 + length :][begin:end], "<f8").reshape(10, 64)
    assert (values == head.arrays["coefficients"]).all()
    loaded = Head.load(tmp_path / "head")
    assert loaded.model == head.model
    assert loaded.scores == {"accuracy": 0.9}
    with pytest.raises(InputError, match="exists already"):
        head.save(tmp_path / "head")


def tamper(folder: Path, change: str) -> None:
    tensors, about = folder / "head.safetensors", folder / "head.json"
    data, text = tensors.read_bytes(), about.read_text()
    if change == "tensors":
        tensors.write_bytes(data[:-8] + np.float64(3).tobytes())
    elif change == "truncated":
        tensors.write_bytes(data[:-100])
    elif change == "empty":
        tensors.write_bytes(b"")
        about.write_text(text.replace(hashlib.sha256(data).hexdigest(), hashlib.sha256(b"").hexdigest()))
    elif change == "classes":
        about.write_text(text.replace("digit 3", "digit 8000"))
    elif change == "model":
        about.write_text(text.replace("digits-v1", "digits-v2"))
    elif change == "newer":
        about.write_text(re.sub(r'"format_version": \d', '"format_version": 3', text))
    elif change == "no JSON":
        about.write_text(text[:100])
    elif change == "list":
        about.write_text("[]")
    elif change == "deep":
        about.write_text("[" * 100_000)
    elif change == "number":
        forged = json.loads(text)
        del forged["head.safetensors_sha256"]
        digest = hashlib.sha256(json.dumps(forged, sort_keys=True).encode()).hexdigest()
        arrays = {name: np.array(1.0) for name in ("coefficients", "intercepts", "scaling.mean", "scaling.scale")}
        tensors.write_bytes(save(arrays, metadata={"head_sha256": digest}))
        forged["head.safetensors_sha256"] = hashlib.sha256(tensors.read_bytes()).hexdigest()
        about.write_text(json.dumps(forged))
    elif change == "missing":
        tensors.unlink()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("tensors", "head.safetensors: altered or truncated"),
        ("truncated", "head.safetensors: altered or truncated"),
        ("empty", "not a valid head"),
        ("classes", "head.json: altered"),
        ("model", "head.json: altered"),
        ("newer", "format_version must be from 1 to 2; got 3"),
        ("no JSON", "not a valid head"),
        ("list", "not a valid head"),
        ("deep", "not a valid head"),
        ("number", "not a valid head .arrays must have rows"),
        ("missing", r"not a head \(no head.safetensors\)"),
    ],
)
def test_a_tampered_head_is_refused(change: str, reason: str, head: Head, tmp_path: Path) -> None:
    head.save(tmp_path / "head")
    tamper(tmp_path / "head", change)
    with pytest.raises(HeadError, match=reason):
        Head.load(tmp_path / "head")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"kind": "forest"}, "kind must be"),
        ({"scaling": "minmax"}, "scaling must be"),
        ({"classes": ("a", "a")}, "different"),
        ({"classes": ("a", 1, *"cdefghij")}, "all text or all whole numbers"),
        ({"classes": ("\ud800", *"bcdefghij")}, "the class .* cannot be written as UTF-8"),
        ({"classes": ("a", "b", "c")}, "intercepts must be|coefficients must be"),
        ({"scaling": "none"}, "none scaling has"),
        ({"model": identity(feature_size=512)}, "has 512 features, but the arrays 64"),
    ],
)
def test_parts_that_do_not_fit_are_refused(changes: dict[str, Any], reason: str, head: Head) -> None:
    with pytest.raises(ValueError, match=reason):
        Head(**(vars(head) | changes))


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("coefficients", 1.7e308, r"coefficients must have numbers up to 1e\+60; got 1.7e\+308"),
        ("intercepts", -1e61, "intercepts must have numbers up to"),
        ("scaling.scale", 5e-324, "scaling.scale must be above zero, at least 1e-60"),
    ],
)
def test_a_head_whose_margins_would_overflow_is_refused(
    name: str, value: float, reason: str, head: Head, tmp_path: Path
) -> None:
    """Margins that are not finite would be null in JSON."""
    arrays = dict(head.arrays) | {name: np.full_like(head.arrays[name], value)}
    object.__setattr__(head, "arrays", arrays)
    head.save(tmp_path / "head")
    with pytest.raises(HeadError, match=reason):
        Head.load(tmp_path / "head")


def test_the_largest_numbers_give_finite_margins(head: Head) -> None:
    extremes = {"coefficients": 1e60, "intercepts": 1e60, "scaling.mean": -1e60, "scaling.scale": 1e-60}
    arrays = {name: np.full_like(value, extremes.get(name, 1.0)) for name, value in head.arrays.items()}
    margins = Head(**(vars(head) | {"arrays": arrays})).margins(np.full((1, 64), np.finfo("f4").max))
    assert np.isfinite(margins).all()


def test_numbers_that_are_none_are_refused(head: Head) -> None:
    bad = dict(head.arrays) | {"intercepts": np.full(10, np.nan)}
    with pytest.raises(ValueError, match=r"intercepts must be .* finite"):
        Head(**(vars(head) | {"arrays": bad}))
    with pytest.raises(ValueError, match="features must be finite"):
        head.predict(np.full((1, 64), np.nan))
    with pytest.raises(ValueError, match=r"features must be \(n, 64\); got \(1, 63\)"):
        head.predict(np.zeros((1, 63)))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model": "digits-v2"}, "features of digits-v1, .* of digits-v2"),
        ({"files": {"model.safetensors": "c" * 64}}, "with weights sha256 aaaaaaaaaaaa..., .* with cccccccccccc"),
        ({"preprocessing_hash": "d" * 64}, "with preprocessing hash bbbbbbbbbbbb..., .* with dddddddddddd"),
    ],
)
def test_features_of_another_model_are_refused_saying_both(
    changes: dict[str, Any], reason: str, head: Head, digits: Digits, write_features: Any, tmp_path: Path
) -> None:
    write_features(tmp_path / "f.npy", digits[0][:3], ["a", "b", "c"], **changes)
    with pytest.raises(InputError, match=reason):
        head.predict(open_features(str(tmp_path / "f.npy")))


def test_what_does_not_change_the_features_may_differ(head: Head) -> None:
    identity(revision="v1").require(identity(revision="v2"), "the head", "f.npy")
    identity().require(identity(precision="int8", engine="openvino"), "the head", "f.npy")


def test_several_classes_get_the_temperature_that_made_them() -> None:
    draw = np.random.default_rng(0)
    logits = draw.normal(size=(20_000, 5))
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    targets = np.array([draw.choice(5, p=one) for one in shares])
    found = calibrate(logits / 3, targets)
    np.testing.assert_allclose(found["calibration.scale"], 3, rtol=0.03)
    assert (found["calibration.offset"] == 0).all()


@pytest.mark.parametrize("kind", ["usual", "few rows", "all right", "all wrong", "large"])
def test_the_temperature_is_where_scipy_finds_the_least_loss(kind: str) -> None:
    draw = np.random.default_rng(3)
    targets = draw.integers(0, 4, 7 if kind == "few rows" else 400)
    margins = draw.normal(size=(len(targets), 4)) * (1e6 if kind == "large" else 1)
    margins[np.arange(len(targets)), targets] += {"all right": 50, "all wrong": -50, "large": 1e6}.get(kind, 1)

    def loss(log_scale: float) -> float:
        logits = np.exp(log_scale) * margins
        return float(np.mean(logsumexp(logits, axis=1) - logits[np.arange(len(targets)), targets]))

    bounds = np.log(np.array([1e-3, 1e2]) / margins.std())
    wanted = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-10})
    scale = calibrate(margins, targets)["calibration.scale"][0]
    assert loss(np.log(scale)) <= wanted.fun * (1 + 1e-7) + 1e-9
    assert bounds[0] - 1e-6 <= np.log(scale) <= bounds[1] + 1e-6
    if kind in {"usual", "few rows", "large"}:
        assert np.log(scale) == pytest.approx(wanted.x, abs=1e-4)


@pytest.mark.parametrize("kind", ["usual", "few rows", "all right", "turned", "constant", "one answer"])
def test_sigmoids_are_where_scipy_finds_the_least_loss(kind: str) -> None:
    draw = np.random.default_rng(4)
    answers = draw.random(6 if kind == "few rows" else 300) < 0.3
    if kind == "one answer":
        answers[:] = True
    margins = draw.normal(size=len(answers)) * 3 + {"all right": 60, "turned": -2}.get(kind, 2) * answers
    if kind == "constant":
        margins[:] = 2.5
    found = calibrate(margins[:, None], answers.astype(np.int64))
    spread = margins.std() or 1.0
    wanted = np.where(answers, (answers.sum() + 1) / (answers.sum() + 2), 1 / ((~answers).sum() + 2))

    def loss(parameters: NDArray[np.float64]) -> float:
        logits = parameters[0] * margins / spread + parameters[1]
        return float(np.mean(np.logaddexp(0, logits) - wanted * logits))

    bounds = [(1e-3, 1e2), (None, None)]
    reference = minimize(loss, np.array([1.0, 0.0]), method="L-BFGS-B", bounds=bounds, options={"ftol": 1e-15})
    ours = np.array([found["calibration.scale"][0] * spread, found["calibration.offset"][0]])
    assert loss(ours) <= reference.fun * (1 + 1e-6) + 1e-9
    assert 1e-3 <= ours[0] <= 1e2


def test_margins_that_stand_alone_get_the_sigmoid_that_made_them() -> None:
    draw = np.random.default_rng(0)
    logits = draw.normal(size=(40_000, 2)) * 2
    answers = draw.random((40_000, 2)) < 1 / (1 + np.exp(-(logits * [1.0, 2.0] + [0.5, -1.0])))
    found = calibrate(logits, answers)
    np.testing.assert_allclose(found["calibration.scale"], [1, 2], rtol=0.05)
    np.testing.assert_allclose(found["calibration.offset"], [0.5, -1], atol=0.05)


def test_probabilities_follow_from_scale_and_offset(head: Head, digits: Digits) -> None:
    with pytest.raises(HeadError, match="no probabilities"):
        head.probabilities(digits[0])
    arrays = dict(head.arrays) | {"calibration.scale": np.full(10, 2.0), "calibration.offset": np.zeros(10)}
    shares = Head(**(vars(head) | {"arrays": arrays})).probabilities(digits[0])
    powers = np.exp(2 * head.margins(digits[0]))
    np.testing.assert_allclose(shares, powers / powers.sum(1, keepdims=True), rtol=1e-9)


def test_perfect_rows_keep_probabilities_finite() -> None:
    found = calibrate(np.eye(3)[[0, 1, 2, 0]] * 5, np.array([0, 1, 2, 0]))
    assert np.isfinite(found["calibration.scale"]).all()
    found = calibrate(np.array([[-1.0], [2.0]]), np.array([0, 1]))
    assert np.isfinite(found["calibration.scale"]).all()
    assert (found["calibration.scale"] > 0).all()
