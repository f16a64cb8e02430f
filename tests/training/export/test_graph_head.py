"""A head's ONNX nodes give the answers of scikit-learn and SciPy in two engines, for any head and any opset."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from scipy.spatial.distance import cdist
from scipy.special import expit, softmax
from sklearn.datasets import load_digits
from sklearn.multioutput import MultiOutputClassifier
from sklearn.pipeline import make_pipeline

from robustfeat.serving.heads.distance import fit_distance
from robustfeat.serving.heads.fitting.calibration import calibrate
from robustfeat.serving.heads.head import Head
from robustfeat.training.export.graph_head import put_head
from tests.serving.heads.test_head import CLASSIFIERS, SCALERS

Array = NDArray[Any]
Answers = dict[str, Array]

TASKS = ["ten classes", "two classes", "several labels"]


@pytest.fixture(scope="module")
def digits() -> tuple[Array, Array]:
    x, y = load_digits(return_X_y=True)
    return x.astype(np.float32), y


def targets(task: str, y: Array) -> Array:
    if task == "two classes":
        return np.asarray(y > 4, np.int64)
    return np.stack([y % 2 == 0, y > 4, y == 3], 1) if task == "several labels" else y


def pipeline_of(kind: str, scaling: str, wanted: Array) -> Any:
    classifier = CLASSIFIERS[kind]()
    return make_pipeline(SCALERS[scaling](), MultiOutputClassifier(classifier) if wanted.ndim == 2 else classifier)


def complete(head: Head, x: Array, wanted: Array) -> Head:
    """The head with calibration and distances, fitted to the first half of the rows."""
    half = len(x) // 2
    groups = np.zeros(len(x), np.int64) if wanted.ndim == 2 else wanted
    splits = [(np.arange(half), np.arange(half, len(x)))]
    distances = fit_distance(x, np.arange(len(x)), groups, splits)
    answers = wanted.astype(bool) if head.multi_label else wanted
    return replace(head, arrays={**head.arrays, **calibrate(head.raw_margins(x), answers), **distances})


def graph_of(head: Head, opset: int = 18, inner: str = "features") -> onnx.ModelProto:
    """A network that gives its input as features, through a tensor called `inner`, with the head behind it."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", head.feature_size]) for name in "xf"]
    nodes = [helper.make_node("Identity", ["x"], [inner]), helper.make_node("Identity", [inner], ["f"])]
    graph = helper.make_graph(nodes, "network", ends[:1], ends[1:])
    put_head(graph, head, "f", opset)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model


def onnx_runtime(model: onnx.ModelProto, x: Array) -> Answers:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, {"x": x}), strict=True))


def open_vino(model: onnx.ModelProto, x: Array) -> Answers:
    exact = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.compile_model(openvino.Core().read_model(model.SerializeToString(), b""), "CPU", exact)
    found = compiled(x)
    return {value.name: found[value.name] for value in model.graph.output}


def reference(pipeline: Any, head: Head, x: Array) -> Answers:
    """The same answers from the estimators and SciPy, in float64, by the definitions."""
    x = x.astype(np.float64)
    scaled, last = pipeline[:-1].transform(x) if len(pipeline) > 1 else x, pipeline[-1]
    if head.multi_label:
        scores = np.stack([column(one, scaled) for one in last.estimators_], 1)
    elif len(head.classes) == 2 and hasattr(last, "coef_"):
        scores = np.outer(column(last, scaled), [-1, 1])
    else:
        scores = rows(last, scaled)
    scale, offset = head.arrays["calibration.scale"], head.arrays["calibration.offset"]
    if head.multi_label:
        probabilities = expit(scores * scale + offset)
    elif len(scale) == 1:
        probabilities = np.stack([1 - expit(scores[:, 1] * scale + offset), expit(scores[:, 1] * scale + offset)], 1)
    else:
        probabilities = softmax(scores * scale + offset, axis=1)
    parts = {name: head.arrays[f"distance.{name}"] for name in ("means", "basis", "inverses", "floor", "unseen")}
    precision = np.eye(x.shape[1]) / parts["floor"] + parts["basis"].T @ np.diag(parts["inverses"]) @ parts["basis"]
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    distance = (cdist(unit, parts["means"], "mahalanobis", VI=precision) ** 2).min(1)
    as_far = (parts["unseen"] >= distance[:, None]).sum(1)
    typicality = (1 + as_far) / (1 + len(parts["unseen"]))
    return {"scores": scores, "probabilities": probabilities, "distance": distance, "typicality": typicality}


def rows(classifier: Any, x: Array) -> Array:
    if hasattr(classifier, "predict_joint_log_proba"):
        return np.asarray(classifier.predict_joint_log_proba(x))
    if hasattr(classifier, "centroids_"):
        return np.asarray(-(cdist(x, classifier.centroids_) ** 2))
    return np.asarray(classifier.decision_function(x))


def column(classifier: Any, x: Array) -> Array:
    found = rows(classifier, x)
    return found if found.ndim == 1 else np.asarray(found[:, 1] - found[:, 0])


def require_close(got: Answers, wanted: Answers, probability: float = 1e-5) -> None:
    """Probabilities within 1e-5; scores and distances within 1e-5 of the largest; typicality within one row."""
    assert list(got) == ["probabilities", "scores", "distance", "typicality"]
    for name in ("scores", "distance"):
        np.testing.assert_allclose(got[name], wanted[name], rtol=0, atol=1e-5 * np.abs(wanted[name]).max())
    np.testing.assert_allclose(got["probabilities"], wanted["probabilities"], rtol=0, atol=probability)
    steps = np.abs(got["typicality"] - wanted["typicality"]) / wanted["typicality"].min()
    assert (steps > 1e-3).mean() < 0.01
    assert steps.max() < 1.01


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("scaling", SCALERS)
@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_the_nodes_give_the_answers_of_scikit_learn(
    kind: str, scaling: str, task: str, digits: tuple[Array, Array]
) -> None:
    x, wanted = digits[0], targets(task, digits[1])
    pipeline = pipeline_of(kind, scaling, wanted).fit(x[:900], wanted[:900])
    head = complete(Head.from_sklearn(pipeline), x[:900], wanted[:900])
    expected = reference(pipeline, head, x[900:])
    model = graph_of(head)
    # Sums of squares lose more digits: those of nearest-mean reach thousands here, and differ by ones.
    most = 1e-5 if kind in {"svm", "logistic"} else 1e-4
    require_close(onnx_runtime(model, x[900:]), expected, most)
    require_close(open_vino(model, x[900:]), expected, most)
    own = head.margins(x[900:])
    own_answers = expected | {"scores": own, "probabilities": head.calibrate(own)}
    require_close(onnx_runtime(model, x[900:]), own_answers, most)


@pytest.mark.parametrize("opset", [9, 11, 13, 17, 18, 21])
def test_any_opset_and_batch_will_do(opset: int, digits: tuple[Array, Array]) -> None:
    x, y = digits
    pipeline = pipeline_of("logistic", "l2", y).fit(x, y)
    head = complete(Head.from_sklearn(pipeline), x, y)
    model, expected = graph_of(head, opset), reference(pipeline, head, x)
    for count in (1, 3, 257):
        require_close(onnx_runtime(model, x[:count]), {name: values[:count] for name, values in expected.items()})


def test_a_row_of_zeros_has_answers(digits: tuple[Array, Array]) -> None:
    x, y = digits
    head = complete(Head.from_sklearn(pipeline_of("svm", "l2", y).fit(x, y)), x, y)
    zeros = np.zeros((2, 64), np.float32)
    got = onnx_runtime(graph_of(head), zeros)
    np.testing.assert_allclose(got["probabilities"], head.probabilities(zeros), atol=1e-6)
    np.testing.assert_allclose(got["typicality"], head.typicality(zeros), atol=1e-6)


def test_what_a_head_has_not_is_no_output(digits: tuple[Array, Array]) -> None:
    x, y = digits
    head = Head.from_sklearn(pipeline_of("svm", "none", y).fit(x, y))
    assert list(onnx_runtime(graph_of(head), x[:3])) == ["scores"]


@pytest.mark.parametrize("inner", ["scores", "probabilities", "distance", "typicality", "head", "head.1"])
def test_names_of_the_network_are_no_obstacle(inner: str, digits: tuple[Array, Array]) -> None:
    x, y = digits
    head = complete(Head.from_sklearn(pipeline_of("svm", "none", y).fit(x, y)), x, y)
    expected = onnx_runtime(graph_of(head), x[:5])
    got = onnx_runtime(graph_of(head, inner=inner), x[:5])
    assert {name: values.tobytes() for name, values in got.items()} == {
        name: values.tobytes() for name, values in expected.items()
    }


def test_features_far_from_zero_keep_their_digits(digits: tuple[Array, Array]) -> None:
    x, y = digits[0] + np.float32(1000), digits[1]
    pipeline = pipeline_of("logistic", "standard", y).fit(x.astype(np.float64), y)
    head = complete(Head.from_sklearn(pipeline), x, y)
    got, wanted = onnx_runtime(graph_of(head), x), head.probabilities(x)
    np.testing.assert_allclose(got["probabilities"], wanted, rtol=0, atol=1e-5)


def test_numbers_beyond_float32_are_refused(digits: tuple[Array, Array]) -> None:
    x, y = digits
    head = Head.from_sklearn(pipeline_of("svm", "none", y).fit(x, y))
    arrays = {**head.arrays, "coefficients": head.arrays["coefficients"] * 1e60}
    with pytest.raises(OverflowError, match="exceeds the range of float32"):
        graph_of(replace(head, arrays=arrays))


def test_weights_are_stored_once(digits: tuple[Array, Array]) -> None:
    x, y = digits
    head = complete(Head.from_sklearn(pipeline_of("svm", "standard", y).fit(x, y)), x, y)
    sizes = [numpy_helper.to_array(tensor).nbytes for tensor in graph_of(head).graph.initializer]
    own = sum(array.nbytes for array in head.arrays.values()) // 2
    assert sum(sizes) < own + 64 * 4 * 10 + 2**13
