"""The layers of a network that int8 can compute: convolutions and products with constant matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from onnx import helper, numpy_helper

__all__ = ["Layer", "find_layers"]

_RESHAPING = {"Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}


@dataclass(frozen=True, eq=False)
class Layer:
    """A node of the graph with constant weights.

    Attributes:
        name: name of the node, unique in the graph.
        kind: Conv, Gemm or MatMul.
        source: the tensor that it reads.
        output: the tensor that it writes.
        end: `output`, or what a ReLU or Clip makes of it where nothing else reads it.
        weight: the initializer of its weights.
        bias: the initializer of its bias; None where there is none.
        adder: for a MatMul with a bias, the Add node that adds it.
        weights: (G, R, K): G groups of R outputs, each a sum over K inputs.
        biases: (G * R,); zeros where there is no bias.
        axis: output axis of the stored weights.
        shape: shape of the stored weights.
        settings: the node's attributes.
        misread: OpenVINO 2026.4 would compute its int8 form wrongly. Either its output is joined with a constant, such
            as a class token, which is then rounded as well; or its input is a mean without the averaged axes, on
            whose way the scales of a product before it are lost.
    """

    name: str
    kind: str
    source: str
    output: str
    end: str
    weight: str
    bias: str | None
    adder: str | None
    weights: NDArray[np.float32]
    biases: NDArray[np.float32]
    axis: int
    shape: tuple[int, ...]
    settings: Mapping[str, Any]
    misread: bool

    def stored(self, matrix: NDArray[Any]) -> NDArray[Any]:
        """(G, R, K) in the shape and order of the stored weights."""
        if self.axis == 0:
            return matrix.reshape(self.shape)
        return np.ascontiguousarray(matrix.reshape(self.shape[::-1]).T)

    def columns(self, inputs: NDArray[np.float32], count: int) -> NDArray[np.float32]:
        """The values that the layer multiplies with its weights, for some of its outputs on one image.

        Args:
            inputs: the tensor `source`, of one image.
            count: at most so many places, drawn with a fixed seed where there are more.

        Returns:
            (G, K, P) float32 with P <= `count`.
        """
        if self.kind != "Conv":
            rows = inputs.reshape(-1, inputs.shape[-1])
            return np.ascontiguousarray(rows[_some(len(rows), count)].T[None])
        top, left, bottom, right = self.settings.get("pads", (0, 0, 0, 0))
        padded = np.pad(inputs, ((0, 0), (0, 0), (top, bottom), (left, right)))
        down, across = self.settings.get("dilations", (1, 1))
        height, width = self.shape[2:]
        window = ((height - 1) * down + 1, (width - 1) * across + 1)
        step_down, step_across = self.settings.get("strides", (1, 1))
        views = sliding_window_view(padded, window, (2, 3))[0, :, ::step_down, ::step_across, ::down, ::across]
        places = _some(views.shape[1] * views.shape[2], count)
        patches = views[:, places // views.shape[2], places % views.shape[2]]  # (C, P, height, width)
        groups = len(self.weights)
        split = patches.reshape(groups, -1, len(places), height * width).transpose(0, 1, 3, 2)
        return np.ascontiguousarray(split).reshape(groups, -1, len(places))


def find_layers(model: onnx.ModelProto) -> list[Layer]:
    """The layers that int8 can compute, in the order of the graph, whose nodes have names of their own."""
    graph = model.graph
    constants = {constant.name: constant for constant in graph.initializer}
    readers: dict[str, list[onnx.NodeProto]] = {value.name: [] for value in graph.output}
    results = set(readers)
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    makers = {name: node for node in graph.node for name in node.output}
    fixed = _fixed(graph)
    layers = []
    for node in graph.node:
        settings = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
        if not _known(node, settings, constants) or node.input[0] in results:
            continue
        output = node.output[0]
        sole = readers[output][0] if len(readers.get(output, ())) == 1 and output not in results else None
        bias, adder = (node.input[2] if len(node.input) > 2 else ""), None
        matrix = numpy_helper.to_array(constants[node.input[1]])
        axis = _axis(node.op_type, settings)
        width, groups = matrix.shape[axis], int(settings.get("group", 1))
        if node.op_type == "MatMul" and (bias := _added(sole, constants, width)):
            adder = sole.name if sole else None
        layers.append(
            Layer(
                name=node.name,
                kind=node.op_type,
                source=node.input[0],
                output=output,
                end=sole.output[0] if sole and sole.op_type in {"Relu", "Clip"} else output,
                weight=node.input[1],
                bias=bias or None,
                adder=adder,
                weights=np.ascontiguousarray(matrix if axis == 0 else matrix.T).reshape(groups, width // groups, -1),
                biases=_vector(constants.get(bias), width),
                axis=axis,
                shape=matrix.shape,
                settings=settings,
                misread=_is_joined(output, readers, fixed) or _is_mean(node.input[0], makers),
            )
        )
    return layers


def _fixed(graph: onnx.GraphProto) -> set[str]:
    """Tensors that are the same for all images, but for the size of the batch."""
    fixed = {constant.name for constant in graph.initializer}
    for node in graph.node:
        if node.op_type == "Shape" or all(name in fixed for name in node.input if name):
            fixed.update(node.output)
    return fixed


def _is_joined(name: str, readers: Mapping[str, Sequence[onnx.NodeProto]], fixed: set[str]) -> bool:
    """Whether a tensor is joined with a constant, in whatever shape."""
    return any(
        (node.op_type == "Concat" and not fixed.isdisjoint(node.input))
        or (node.op_type in _RESHAPING and _is_joined(node.output[0], readers, fixed))
        for node in readers.get(name, ())
    )


def _is_mean(name: str, makers: Mapping[str, onnx.NodeProto]) -> bool:
    """Whether a tensor is a mean whose averaged axes are gone."""
    maker = makers.get(name)
    if maker is None or maker.op_type != "ReduceMean":
        return False
    return any(entry.name == "keepdims" and entry.i == 0 for entry in maker.attribute)


def _known(node: onnx.NodeProto, settings: Mapping[str, Any], constants: Mapping[str, onnx.TensorProto]) -> bool:
    """Whether a node is one that `Layer` describes."""
    if node.domain or node.op_type not in {"Conv", "Gemm", "MatMul"} or node.input[0] in constants:
        return False
    weight = constants.get(node.input[1])
    if weight is None or weight.data_type != onnx.TensorProto.FLOAT:
        return False
    if node.op_type == "Conv":
        plain = len(weight.dims) == 4 and settings.get("auto_pad", b"NOTSET") == b"NOTSET"
    else:
        plain = len(weight.dims) == 2 and not settings.get("transA", 0)
        plain = plain and settings.get("alpha", 1.0) == settings.get("beta", 1.0) == 1.0
    if len(node.input) < 3 or not node.input[2]:
        return plain
    bias = constants.get(node.input[2])
    return plain and bias is not None and list(bias.dims) == [weight.dims[_axis(node.op_type, settings)]]


def _axis(kind: str, settings: Mapping[str, Any]) -> int:
    """The output axis of stored weights."""
    return 0 if kind == "Conv" or settings.get("transB", 0) else 1


def _added(node: onnx.NodeProto | None, constants: Mapping[str, onnx.TensorProto], width: int) -> str:
    """The vector that an Add node adds to the product of a matrix with `width` columns; empty where there is none."""
    if node is None or node.op_type != "Add":
        return ""
    return next((name for name in node.input if name in constants and list(constants[name].dims) == [width]), "")


def _vector(constant: onnx.TensorProto | None, width: int) -> NDArray[np.float32]:
    if constant is None:
        return np.zeros(width, np.float32)
    return numpy_helper.to_array(constant).astype(np.float32)


def _some(total: int, count: int) -> NDArray[np.int64]:
    """`count` different places of `total`, in order, or all of them."""
    if total <= count:
        return np.arange(total)
    return np.sort(np.random.default_rng(0).choice(total, count, replace=False))
