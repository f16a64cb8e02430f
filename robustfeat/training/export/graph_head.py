"""A head as ONNX nodes, in float32: from features to scores, probabilities, distance and typicality."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper

from robustfeat.serving.heads.head import Head
from robustfeat.serving.heads.kinds import KINDS, Array
from robustfeat.training.export.graph_editing import Appender, rename_tensors

__all__ = ["DISTANCE", "PROBABILITIES", "SCORES", "TYPICALITY", "put_head"]

PROBABILITIES, SCORES, DISTANCE, TYPICALITY = "probabilities", "scores", "distance", "typicality"
"""The outputs in order. The first one and the last two are optional."""

_TINY = 1e-30
"""A vector of zeros is divided by this instead of its length."""


def put_head(graph: onnx.GraphProto, head: Head, features: str, opset: int) -> None:
    """Appends a head to a graph. The head's predictions become the outputs.

    Args:
        graph: is changed.
        head: any.
        features: the tensor with the head's features, (N, D) float32.
        opset: opset of the graph, 9 or later.

    Raises:
        OverflowError: a number of the head exceeds the range of float32.
    """
    names = (PROBABILITIES, SCORES, DISTANCE, TYPICALITY)
    prefix = "head"
    while any(name.startswith(prefix) for node in graph.node for name in node.output):
        prefix += "_"
    # A network may have inner tensors of these names: attention has scores.
    rename_tensors(graph, {name: f"{name}.network" for name in names})
    then = Appender(graph, opset, prefix)
    length = then("Sqrt", _weighted_sum(then, then("Mul", features, features), np.ones(head.feature_size)))
    unit = then("Div", features, then("Max", length, np.array([_TINY])))
    raw = _put_margins(then, head, _put_scaling(then, head, features, unit))
    shapes: dict[str, list[str | int]] = {}
    if head.calibrated:
        _put_probabilities(then, head, raw)
        shapes[PROBABILITIES] = ["batch", len(head.classes)]
    _put_scores(then, head, raw)
    shapes[SCORES] = ["batch", len(head.classes)]
    if head.tells_typicality:
        _put_typicality(then, head, unit)
        shapes |= {DISTANCE: ["batch"], TYPICALITY: ["batch"]}
    del graph.output[:]
    graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items())


def _weighted_sum(then: Appender, x: str, weights: Array) -> str:
    """(..., D) to (..., 1).

    A product: OpenVINO 2026.4 gives infinities for a Reduce of (N, K, D) that arithmetic follows.
    """
    return then("MatMul", x, weights[:, None])


def _put_scaling(then: Appender, head: Head, features: str, unit: str) -> str:
    if head.scaling == "l2":
        return unit
    if head.scaling == "standard":
        # The mean in two parts, and not folded into the coefficients: one far from zero would cost digits.
        mean = head.arrays["scaling.mean"]
        coarse = mean.astype(np.float32)
        return then("Div", then("Sub", then("Sub", features, coarse), mean - coarse), head.arrays["scaling.scale"])
    return features


def _put_margins(then: Appender, head: Head, x: str) -> str:
    """`Head.raw_margins` of scaled features."""
    if KINDS[head.kind].linear:
        return then("Gemm", x, head.arrays["coefficients"], head.arrays["intercepts"], transB=1)
    means, size = head.arrays["means"], head.feature_size  # (K, D), or (K, 2, D) without and with each label
    spreads, offsets = np.ones_like(means), np.zeros(means.shape[:-1])
    if head.kind == "naive-bayes":
        spreads = np.sqrt(2 * head.arrays["variances"])
        offsets = np.log(head.arrays["priors"]) - 0.5 * np.log(2 * np.pi * head.arrays["variances"]).sum(-1)
    # Each difference is squared, however large the tensor: expanded squares would cancel where a variance is tiny.
    rows = then("Reshape", x, np.array([-1, *([1] * offsets.ndim), size]))
    away = then("Div", then("Sub", rows, means), spreads)
    squares = then("Mul", away, away)
    if head.multi_label:
        # Before the sum, whose two halves may be large and close.
        squares = then("Sub", *(then("Gather", squares, np.array(side), axis=2) for side in (1, 0)))
        offsets = offsets[:, 1] - offsets[:, 0]
    total = then("Reshape", _weighted_sum(then, squares, np.ones(size)), np.array([-1, len(head.classes)]))
    return then("Sub", offsets, total)


def _put_probabilities(then: Appender, head: Head, raw: str) -> None:
    """`Head.calibrate`."""
    scale, offset = head.arrays["calibration.scale"], head.arrays["calibration.offset"]
    logits = then("Add", then("Mul", raw, scale), offset)
    if head.multi_label:
        then("Sigmoid", logits, name=PROBABILITIES)
    elif len(scale) == 1:
        then("Sigmoid", then("Concat", then("Neg", logits), logits, axis=1), name=PROBABILITIES)
    else:
        then("Softmax", logits, axis=1, name=PROBABILITIES)


def _put_scores(then: Appender, head: Head, raw: str) -> None:
    """`Head.margins`."""
    if len(head.classes) == 2 and KINDS[head.kind].linear and not head.multi_label:
        then("Concat", then("Neg", raw), raw, axis=1, name=SCORES)
    else:
        then("Identity", raw, name=SCORES)


def _put_typicality(then: Appender, head: Head, unit: str) -> None:
    """`measure_distance` and `measure_typicality`.

    The distance to a mean m is (u - m)' P (u - m), with P = I / floor + B' diag(inverses) B. Expanded around the mean
    of the means it needs no (N, M, D) tensor: v' P v, the same for all means, and a linear function of v for each.
    """
    means, basis, inverses, floor, unseen = (
        head.arrays[f"distance.{name}"] for name in ("means", "basis", "inverses", "floor", "unseen")
    )
    centre = means.mean(0)
    away = means - centre
    product: Array = away / floor + (away @ basis.T * inverses) @ basis  # P (m - centre), (M, D)
    v = then("Sub", unit, centre)
    quadratic = _weighted_sum(then, then("Mul", v, v), np.ones(head.feature_size) / floor)
    if len(basis):
        along = then("MatMul", v, basis.T)
        quadratic = then("Add", quadratic, _weighted_sum(then, then("Mul", along, along), inverses))
    linear = then("Gemm", v, -2 * product, (product * away).sum(1), transB=1)
    distance = then.minimum(then("Add", quadratic, linear), 1, name=DISTANCE)
    nearer = then("Greater", then("Reshape", distance, np.array([-1, 1])), unseen)
    as_far = then("Cast", then("Not", nearer), to=TensorProto.FLOAT)
    one_more = then("Gemm", as_far, np.ones((len(unseen), 1)), np.ones(1))
    then("Div", then("Reshape", one_more, np.array([-1])), np.array([1.0 + len(unseen)]), name=TYPICALITY)
