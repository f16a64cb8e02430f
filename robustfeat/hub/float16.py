"""Converts an ONNX file from fp32 to fp16, with float32 inputs and outputs.

Weights, constants and intermediate values become fp16. `Cast` nodes follow the inputs and precede the outputs.
Some numbers need more than rounding:

- BatchNorm becomes one factor and one offset per channel, computed in float64. Its statistics often exceed the range of
  fp16, but factor and offset do not.
- The scales of `Resize` stay float32. ONNX requires it, and a rounded scale would change sizes.
- A single number that fp16 rounds to 0, such as an epsilon, becomes the smallest fp16 number.
- Numbers beyond 1e30, as in masks, become the largest fp16 number.

Field numbers: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustfeat.hub.protobuf import Message, Value

__all__ = ["convert_to_float16", "with_float32_ends"]

# Field numbers, by message.
_GRAPH, _FUNCTION = 7, 25
_NODE, _INITIALIZER, _INPUT, _OUTPUT, _VALUE_INFO, _SPARSE = 1, 5, 11, 12, 13, 15
_READS, _WRITES, _NODE_NAME, _OPERATOR, _ATTRIBUTE, _FUNCTION_NODE = 1, 2, 3, 4, 5, 7
_ATTRIBUTE_NAME, _NUMBER, _INTEGER, _TENSOR, _INNER_GRAPH, _NUMBERS, _KIND = 1, 2, 3, 5, 6, 7, 20
_DIMS, _DATA_TYPE, _FLOAT_DATA, _TENSOR_NAME, _RAW_DATA = 1, 2, 4, 8, 9

_FLOAT, _HALF = 1, 10
_INTEGER_KIND, _TENSOR_KIND = 2, 4
_LARGEST, _SMALLEST, _MASK = 65504.0, 2.0**-24, 1e30
_SUFFIX = "_fp16"

_SCALES = {"Resize": 2, "Upsample": 1}
"""Operators, and the positions of their scale inputs."""


def convert_to_float16(content: bytes) -> bytes:
    """Converts a network to fp16. Inputs and outputs keep their names and shapes, and stay float32.

    Args:
        content: an ONNX file with its weights inside (see `inline_external_data`).

    Raises:
        ValueError: the file is not ONNX, is quantised, or a weight exceeds the range of fp16.
    """
    return _Conversion(whole=True).model(content)


def with_float32_ends(content: bytes) -> bytes:
    """Converts float16 inputs and outputs to float32. Returns `content` itself if there are none.

    Raises:
        ValueError: the file is not ONNX.
    """
    return _Conversion(whole=False).model(content)


@dataclass
class _Conversion:
    """Converts the whole network, or only its float16 inputs and outputs."""

    whole: bool
    renamed: dict[str, str] = field(default_factory=dict)
    """Inputs and outputs, with the names of their fp16 counterparts inside the network."""
    kept: set[str] = field(default_factory=set)
    """Values that stay float32."""
    used: set[str] = field(default_factory=set)
    """Values that nodes use as inputs."""

    def model(self, content: bytes) -> bytes:
        try:
            return self._model(content)
        except (IndexError, OverflowError) as exc:
            raise ValueError("not an ONNX file, or a damaged one (a node or tensor is incomplete)") from exc
        except RecursionError as exc:
            raise ValueError("its graphs are nested too deeply") from exc

    def _model(self, content: bytes) -> bytes:
        model = Message.parse(content)
        if len(model.values(_GRAPH)) != 1:
            raise ValueError("not an ONNX file: it has no graph")
        graph = Message.parse(model.values(_GRAPH)[0])
        weights = {Message.parse(value).text(_TENSOR_NAME) for value in graph.values(_INITIALIZER)}
        kinds = {_FLOAT, _HALF} if self.whole else {_HALF}
        inputs, outputs = (
            [name for name, kind in map(_name_and_type, graph.values(end)) if kind in kinds and name not in weights]
            for end in (_INPUT, _OUTPUT)
        )
        if not self.whole and not inputs and not outputs:
            return content
        self.renamed = {name: name + _SUFFIX for name in (*inputs, *outputs)}
        before = [_node("Cast", name, self.renamed[name], to=_HALF) for name in inputs]
        after = [_node("Cast", self.renamed[name], name, to=_FLOAT) for name in outputs]
        functions = [
            function.replacing({_FUNCTION_NODE: self._nodes(function.values(_FUNCTION_NODE))})
            for function in map(Message.parse, model.values(_FUNCTION))
        ]
        return model.replacing({_GRAPH: [self._graph(graph, before, after)], _FUNCTION: functions}).encode()

    def _graph(self, graph: Message, before: Sequence[Message] = (), after: Sequence[Message] = ()) -> Message:
        """Converts a graph and adds nodes at its start and end."""
        tensors = {tensor.text(_TENSOR_NAME): tensor for tensor in map(Message.parse, graph.values(_INITIALIZER))}
        nodes = graph.values(_NODE)
        if self.whole:
            if graph.values(_SPARSE):
                raise ValueError("its weights are sparse")
            nodes = [_fold_batch_norm(Message.parse(node), tensors) for node in nodes]
        changes: dict[int, Iterable[int | str | Value]] = {
            _NODE: [*before, *self._nodes(nodes), *after],
            _INPUT: [self._end(value) for value in graph.values(_INPUT)],
            _OUTPUT: [self._end(value) for value in graph.values(_OUTPUT)],
            _VALUE_INFO: [],
        }
        if self.whole:
            # Statistics that only BatchNorm used may not fit fp16. An initializer that is an input must stay.
            needed = self.used | {_name_and_type(value)[0] for value in graph.values(_INPUT)}
            changes[_INITIALIZER] = [
                tensor if name in self.kept else _halve(tensor) for name, tensor in tensors.items() if name in needed
            ]
        return graph.replacing(changes)

    def _nodes(self, nodes: Iterable[Value]) -> list[Message]:
        parsed = [Message.parse(node) for node in nodes]
        if self.whole:
            for node in parsed:
                at, reads = _SCALES.get(node.text(_OPERATOR)), node.texts(_READS)
                if at is not None and len(reads) > at:
                    self.kept.add(reads[at])
        return [self._node(node) for node in parsed]

    def _node(self, node: Message) -> Message:
        operator, reads, writes = node.text(_OPERATOR), node.texts(_READS), node.texts(_WRITES)
        self.used.update(reads)
        attributes = [Message.parse(value) for value in node.values(_ATTRIBUTE)]
        if self.whole:
            if "Quantize" in operator or operator.startswith("QLinear") or operator.endswith("Integer"):
                raise ValueError("it is quantised")
            if operator == "Constant" and self.kept.intersection(writes):
                return node
            if operator == "ConstantOfShape" and not attributes:
                attributes = [_attribute("value", np.zeros(1, np.float32))]
        return node.replacing(
            {
                _READS: [self.renamed.get(name, name) for name in reads],
                _WRITES: [self.renamed.get(name, name) for name in writes],
                _ATTRIBUTE: [self._attribute(operator, attribute) for attribute in attributes],
            }
        )

    def _attribute(self, operator: str, attribute: Message) -> Message:
        if graphs := attribute.values(_INNER_GRAPH):
            return attribute.replacing({_INNER_GRAPH: [self._graph(Message.parse(graphs[0]))]})
        if not self.whole:
            return attribute
        if tensors := attribute.values(_TENSOR):
            return attribute.replacing({_TENSOR: [_halve(Message.parse(tensors[0]))]})
        name = attribute.text(_ATTRIBUTE_NAME)
        if operator == "Constant" and name in {"value_float", "value_floats"}:
            values = np.frombuffer(attribute.data(_NUMBER) + attribute.data(_NUMBERS), "<f4")
            return _attribute("value", values if name == "value_floats" else values.reshape(()))
        if name in {"to", "dtype"} and attribute.integers(_INTEGER) == [_FLOAT]:
            return attribute.replacing({_INTEGER: [_HALF]})
        return attribute

    def _end(self, value: Value) -> Value:
        """An input or output: float32 if a Cast is beside it, else fp16."""
        name, kind = _name_and_type(value)
        if kind not in {_FLOAT, _HALF} or not (self.whole or name in self.renamed):
            return value
        wanted = _FLOAT if name in self.renamed else _HALF
        end = Message.parse(value)
        outer = Message.parse(end.values(2)[0])
        tensor = Message.parse(outer.values(1)[0])
        return end.replacing({2: [outer.replacing({1: [tensor.replacing({1: [wanted]})]})]})


def _fold_batch_norm(node: Message, tensors: dict[str, Message]) -> Message:
    """Folds BatchNorm's statistics into a factor and an offset, if they are weights, and puts those into `tensors`.

    scale (x - mean) / sqrt(var + eps) + bias = factor x / sqrt(1 + eps) + offset.
    """
    reads = node.texts(_READS)
    parameters = [tensors[name] for name in reads[1:5] if name in tensors]
    kinds = [tensor.integers(_DATA_TYPE) for tensor in parameters]
    if node.text(_OPERATOR) != "BatchNormalization" or kinds != 4 * [[_FLOAT]]:
        return node
    scale, bias, mean, variance = (_values(tensor).astype(np.float64) for tensor in parameters)
    given = {one.text(_ATTRIBUTE_NAME): one for one in map(Message.parse, node.values(_ATTRIBUTE))}
    epsilon = 1e-5
    if "epsilon" in given:
        epsilon = float(np.frombuffer(given["epsilon"].data(_NUMBER), "<f4")[0])
    with np.errstate(all="ignore"):  # a damaged file may overflow; the features then show it
        factor = scale / np.sqrt(variance + epsilon)
        offset = bias - mean * factor
    parts = {
        "factor": factor * np.sqrt(1 + epsilon),
        "offset": offset,
        "mean": np.zeros_like(mean),
        "variance": np.ones_like(mean),
    }
    names = [f"{node.texts(_WRITES)[0]}_{part}" for part in parts]
    for name, values in zip(names, parts.values(), strict=True):
        tensors[name] = _tensor(name, values)
    return node.replacing({_READS: [reads[0], *names]})


def _halve(tensor: Message) -> Message:
    """Converts a float32 tensor to fp16; others stay as they are."""
    if tensor.integers(_DATA_TYPE) != [_FLOAT]:
        return tensor
    return _tensor(tensor.text(_TENSOR_NAME), _values(tensor))


def _values(tensor: Message) -> NDArray[np.float32]:
    """The values of a float32 tensor."""
    flat: NDArray[np.float32] = np.frombuffer(tensor.data(_RAW_DATA) or tensor.data(_FLOAT_DATA), "<f4")
    return flat.reshape(tensor.integers(_DIMS))


def _tensor(name: str, values: NDArray[np.floating[Any]]) -> Message:
    """Makes a float16 tensor.

    Raises:
        ValueError: a value exceeds the range of fp16.
    """
    size = np.abs(values)
    if np.any((size > _LARGEST) & (size < _MASK)):
        largest = float(size[size < _MASK].max())
        raise ValueError(f"{name or 'a constant'} has the value {largest:.3g}; fp16 ends at 65504")
    half = np.where(np.isinf(values), values, np.clip(values, -_LARGEST, _LARGEST)).astype("<f2")
    if half.size == 1 and not half.any() and values.any():
        half = np.full_like(half, _SMALLEST * np.sign(values.reshape(-1)[0]))
    return Message.of({_DIMS: values.shape, _DATA_TYPE: [_HALF], _TENSOR_NAME: [name], _RAW_DATA: [half.tobytes()]})


def _attribute(name: str, value: NDArray[np.floating[Any]] | int) -> Message:
    if isinstance(value, int):
        return Message.of({_ATTRIBUTE_NAME: [name], _INTEGER: [value], _KIND: [_INTEGER_KIND]})
    return Message.of({_ATTRIBUTE_NAME: [name], _TENSOR: [_tensor("", value)], _KIND: [_TENSOR_KIND]})


def _node(operator: str, read: str, written: str, **attributes: int) -> Message:
    return Message.of(
        {
            _READS: [read],
            _WRITES: [written],
            _NODE_NAME: [f"{operator}_{written}"],
            _OPERATOR: [operator],
            _ATTRIBUTE: [_attribute(name, value) for name, value in attributes.items()],
        }
    )


def _name_and_type(value: Value) -> tuple[str, int | None]:
    """The name of an input or output, and the element type of a tensor."""
    message = Message.parse(value)
    for outer in message.values(2):
        for tensor in Message.parse(outer).values(1):
            return message.text(1), next(iter(Message.parse(tensor).integers(1)), None)
    return message.text(1), None
