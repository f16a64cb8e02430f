"""Edits ONNX graphs: renames tensors, drops unused nodes and appends nodes. Loads no PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from robustfeat.training.export.graph_reading import inner_graphs, read_by

__all__ = ["Appender", "drop_unused", "rename_tensors"]

_AXES_ARE_INPUTS = 18
"""The opset from which ReduceMin takes its axes as an input."""


def rename_tensors(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    """Gives tensors other names, also within graphs of nodes."""
    for node in graph.node:
        for field in (node.input, node.output):
            for place, name in enumerate(field):
                field[place] = names.get(name, name)
        for inner in inner_graphs(node):
            rename_tensors(inner, names)
    for value in (*graph.input, *graph.output, *graph.initializer, *graph.value_info):
        value.name = names.get(value.name, value.name)


def drop_unused(graph: onnx.GraphProto, outputs: Iterable[str]) -> None:
    """Deletes the nodes, weights and inputs that these tensors do not need."""
    needed = set(outputs)
    for node in reversed(graph.node):
        if needed & set(node.output):
            needed |= read_by(node)
    weights = {tensor.name for tensor in graph.initializer}
    # Old files list the weights among the inputs, too.
    _keep(graph.input, lambda value: value.name in needed - weights)
    _keep(graph.initializer, lambda tensor: tensor.name in needed)
    _keep(graph.node, lambda node: bool(needed & set(node.output)))


def _keep(field: Any, wanted: Callable[[Any], bool]) -> None:
    """Deletes the other entries of a repeated field, in place: weights are large."""
    for place in reversed(range(len(field))):
        if not wanted(field[place]):
            del field[place]


class Appender:
    """Appends nodes and constants to the end of a graph, in float32.

    Args:
        graph: is changed.
        opset: opset of the graph.
        prefix: prefix of the names of new tensors, which no other name has.
    """

    def __init__(self, graph: onnx.GraphProto, opset: int, prefix: str) -> None:
        self._graph, self._opset, self._prefix, self._count = graph, opset, prefix, 0

    def __call__(self, operator: str, *inputs: str | NDArray[Any], name: str | None = None, **attributes: Any) -> str:
        """Appends a node and gives the name of its output.

        Args:
            operator: an operator of ONNX.
            inputs: names of tensors, or constants: integers become int64, other numbers float32.
            name: name of the output; by default a new one.
            attributes: attributes of the node.

        Raises:
            OverflowError: a constant exceeds the range of float32.
        """
        taken = [one if isinstance(one, str) else self._constant(one) for one in inputs]
        made = name or self._new_name()
        self._graph.node.append(helper.make_node(operator, taken, [made], name=f"{made}.node", **attributes))
        return made

    def minimum(self, taken: str, axis: int, *, name: str | None = None) -> str:
        """Appends the minimum over an axis, which is then gone."""
        if self._opset >= _AXES_ARE_INPUTS:
            return self("ReduceMin", taken, np.array([axis]), name=name, keepdims=0)
        return self("ReduceMin", taken, name=name, axes=[axis], keepdims=0)

    def _new_name(self) -> str:
        self._count += 1
        return f"{self._prefix}.{self._count}"

    def _constant(self, values: NDArray[Any]) -> str:
        if values.dtype.kind == "i":
            stored = values.astype(np.int64)
        else:
            with np.errstate(over="ignore"):
                stored = values.astype(np.float32)
            if not np.isfinite(stored).all():
                raise OverflowError(f"the number {float(np.abs(values).max()):.3g} exceeds the range of float32")
        name = self._new_name()
        self._graph.initializer.append(numpy_helper.from_array(np.asarray(stored, order="C"), name))
        return name
