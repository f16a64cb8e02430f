"""The int8 graph: QuantizeLinear and DequantizeLinear nodes around the layers that are computed in int8."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from robustfeat.training.export.int8.layers import Layer
from robustfeat.training.export.int8.rounding import Rounded

__all__ = ["Int8Layer", "write_graph"]

_MOST_STEPS = 2**31 - 2**8


@dataclass(frozen=True)
class Int8Layer:
    """A layer with the numbers of its int8 form.

    Attributes:
        layer: the layer.
        rounded: its weights.
        biases: (G * R,) float32, with what the rounding takes from the mean of the outputs.
    """

    layer: Layer
    rounded: Rounded
    biases: NDArray[np.float32]


def write_graph(
    model: onnx.ModelProto,
    forms: Sequence[Int8Layer],
    kept: Sequence[Layer],
    ranges: Mapping[str, tuple[float, float]],
) -> onnx.ModelProto:
    """A copy of an fp32 network with some layers in int8.

    Args:
        model: the network.
        forms: the layers to compute in int8.
        kept: all other layers, which stay unchanged.
        ranges: the least and the largest value of each tensor that a layer reads or ends with.
    """
    results = {value.name for value in model.graph.output}
    tensors = dict.fromkeys(form.layer.source for form in forms)
    # ONNX Runtime computes a convolution in int8 only if its output is quantised as well.
    tensors |= dict.fromkeys(form.layer.end for form in forms if form.layer.kind == "Conv")
    scales = {name: _affine(*ranges[name]) for name in tensors if name not in results}
    writer = _Writer()
    by_name = {form.layer.name: form for form in forms}
    adders = {form.layer.adder: form for form in forms if form.layer.adder}
    between = {layer.name: ranges[layer.source] for layer in kept if layer.source in scales and layer.end in scales}
    stored = {constant.name for constant in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in stored]
    for value in inputs:
        if value.name in scales:
            writer.quantize(value.name, *scales[value.name])
    for original in model.graph.node:
        node = onnx.NodeProto()
        node.CopyFrom(original)
        node.input[:] = [_dequantized(name) if name in scales else name for name in node.input]
        if form := by_name.get(node.name):
            writer.rewrite(node, form, scales[form.layer.source][0])
        elif form := adders.get(node.name):
            writer.shift(node, form)
        elif (bounds := between.get(node.name)) is not None:
            writer.separate(node, *bounds)
        writer.nodes.append(node)
        for name in node.output:
            if name in scales:
                writer.quantize(name, *scales[name])
    replaced = {name for form in forms for name in (form.layer.weight, form.layer.bias)}
    replaced -= {name for node in writer.nodes for name in node.input}
    constants = [constant for constant in model.graph.initializer if constant.name not in replaced]
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    for entries, new in (
        (graph.node, writer.nodes),
        (graph.initializer, [*constants, *writer.constants]),
        (graph.input, inputs),
        (graph.value_info, []),
    ):
        del entries[:]
        entries.extend(new)
    return result


class _Writer:
    """Nodes and constants of the graph that is being written."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def quantize(self, name: str, scale: np.float32, zero_point: np.uint8) -> None:
        """Rounds a tensor to 8 bits and back."""
        grid = [self._constant(f"{name}_scale", scale), self._constant(f"{name}_zero_point", zero_point)]
        self.nodes += [
            helper.make_node("QuantizeLinear", [name, *grid], [f"{name}_quantized"], f"{name}_quantize"),
            helper.make_node(
                "DequantizeLinear", [f"{name}_quantized", *grid], [_dequantized(name)], f"{name}_dequantize"
            ),
        ]

    def rewrite(self, node: onnx.NodeProto, form: Int8Layer, source_scale: np.float32) -> None:
        """Gives a node its weights as int8, and its bias as int32, which ONNX Runtime asks for."""
        layer, integers, scales = form.layer, form.rounded.integers, form.rounded.scales.reshape(-1)
        if layer.kind != "MatMul":
            biases = form.biases.astype(np.float64)
            # The bias has the scale source * weight. Where it would not fit, the weights hardly count.
            coarse = np.maximum(scales, np.abs(biases) / _MOST_STEPS / source_scale).astype(np.float32)
            integers = np.rint(integers * (scales / coarse).reshape(form.rounded.scales.shape)).astype(np.int8)
            scales = coarse
            steps = np.rint(biases / scales / source_scale).astype(np.int32)
            node.input[2:] = [self._integers(f"{node.name}_bias", steps, source_scale * scales, 0)]
        node.input[1] = self._integers(f"{node.name}_weight", layer.stored(integers), scales, layer.axis)

    def shift(self, node: onnx.NodeProto, form: Int8Layer) -> None:
        """Gives the Add node behind a product the bias of its int8 form."""
        place = list(node.input).index(form.layer.bias)
        node.input[place] = self._constant(f"{form.layer.name}_bias", form.biases)

    def separate(self, node: onnx.NodeProto, low: float, high: float) -> None:
        """Puts a Clip that changes nothing before a layer that stays in floating point.

        ONNX Runtime turns such a layer into int8 by itself where it stands between DequantizeLinear and QuantizeLinear,
        with one scale for all its weights.
        """
        slack = (high - low) / 100 + 1e-3
        bounds = [
            self._constant(f"{node.name}_low", np.float32(min(low, 0) - slack)),
            self._constant(f"{node.name}_high", np.float32(max(high, 0) + slack)),
        ]
        self.nodes.append(
            helper.make_node("Clip", [node.input[0], *bounds], [f"{node.name}_source"], f"{node.name}_clip")
        )
        node.input[0] = f"{node.name}_source"

    def _integers(self, name: str, values: NDArray[Any], scales: NDArray[np.float32], axis: int) -> str:
        """The name of a constant that is stored as integers, with a scale for each place along `axis`."""
        grid = [
            self._constant(f"{name}_quantized", values),
            self._constant(f"{name}_scale", scales),
            self._constant(f"{name}_zero_point", np.zeros(len(scales), values.dtype)),
        ]
        self.nodes.append(
            helper.make_node("DequantizeLinear", grid, [_dequantized(name)], f"{name}_dequantize", axis=axis)
        )
        return _dequantized(name)

    def _constant(self, name: str, value: Any) -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name


def _dequantized(name: str) -> str:
    return f"{name}_dequantized"


def _affine(low: float, high: float) -> tuple[np.float32, np.uint8]:
    """Scale and zero point of 8 bits without a sign; 0 is one of the values."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = np.float32((high - low) / 255) or np.float32(1)
    return scale, np.uint8(np.clip(np.rint(-low / scale), 0, 255))
