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
"""The outputs, in this order; the first and the last two where the head has them."""

_TINY = 1e-30
"""A vector of zeros is divided by this instead of its length."""


def put_head(graph: onnx.GraphProto, head: Head, features: str, opset: int) -> None:
    """Appends a head to a graph; the head's answers become its outputs.

    Args:
        graph: is changed.
        head: any.
        features: the tensor with the head's features, (N, D) float32.
        opset: of the graph; 9 or later.

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
    length = then("Sqrt", _sum_squares(then, features, np.ones(head.feature_size)))
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


def _sum_squares(then: Appender, x: str, weights: Array) -> str:
    """(..., D) to (..., 1): the sum of weights * x ** 2.

    A product with the weights: OpenVINO 2026.4 gives infinities for a Reduce of (N, K, D) that arithmetic follows.
    """
    return then("MatMul", then("Mul", x, x), weights[:, None])


def _put_scaling(then: Appender, head: Head, features: str, unit: str) -> str:
    if head.scaling == "l2":
        return unit
    if head.scaling == "standard":
        # Not folded into the coefficients: a mean far from zero would cost digits.
        return then("Div", then("Sub", features, head.arrays["scaling.mean"]), head.arrays["scaling.scale"])
    return features


def _put_margins(then: Appender, head: Head, x: str) -> str:
    """`Head.raw_margins` of scaled features."""
    if KINDS[head.kind].linear:
        return then("Gemm", x, head.arrays["coefficients"], head.arrays["intercepts"], transB=1)
    size = head.feature_size
    means = head.arrays["means"].reshape(-1, size)  # of several labels, those without and with each label in turn
    spreads, offsets = np.ones_like(means), np.zeros(len(means))
    if head.kind == "naive-bayes":
        variances = head.arrays["variances"].reshape(-1, size)
        spreads = np.sqrt(2 * variances)
        offsets = np.log(head.arrays["priors"].ravel()) - 0.5 * np.log(2 * np.pi * variances).sum(1)
    # Each difference is squared, however large the tensor: expanded squares would cancel where a variance is tiny.
    away = then("Div", then("Sub", then("Reshape", x, np.array([-1, 1, size])), means), spreads)
    squares = then("Reshape", _sum_squares(then, away, np.ones(size)), np.array([-1, len(means)]))
    margins = then("Sub", offsets, squares)
    if not head.multi_label:
        return margins
    pairs = then("Reshape", margins, np.array([-1, len(head.classes), 2]))
    return then("Sub", *(then("Gather", pairs, np.array(side), axis=2) for side in (1, 0)))


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

    The distance to a mean m is (u - m)' P (u - m), with P = I / floor + B' diag(inverses) B. Expanded around the mean of
    the means it needs no (N, M, D) tensor: v' P v, the same for all means, and a linear function of v for each.
    """
    means, basis, inverses, floor, unseen = (
        head.arrays[f"distance.{name}"] for name in ("means", "basis", "inverses", "floor", "unseen")
    )
    centre = means.mean(0)
    away = means - centre
    product: Array = away / floor + (away @ basis.T * inverses) @ basis  # P (m - centre), (M, D)
    v = then("Sub", unit, centre)
    quadratic = _sum_squares(then, v, np.ones(head.feature_size) / floor)
    if len(basis):
        quadratic = then("Add", quadratic, _sum_squares(then, then("MatMul", v, basis.T), inverses))
    linear = then("Gemm", v, -2 * product, (product * away).sum(1), transB=1)
    distance = then.minimum(then("Add", quadratic, linear), 1, name=DISTANCE)
    nearer = then("Greater", then("Reshape", distance, np.array([-1, 1])), unseen)
    as_far = then("Cast", then("Not", nearer), to=TensorProto.FLOAT)
    one_more = then("Gemm", as_far, np.ones((len(unseen), 1)), np.ones(1))
    then("Div", then("Reshape", one_more, np.array([-1])), np.array([1.0 + len(unseen)]), name=TYPICALITY)
