"""The batch of a network's ONNX graph: whatever it was exported with, it becomes free. Loads no PyTorch."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from robustfeat.errors import InputError
from robustfeat.training.export.graph_reading import RunError, noise, read_by, run_graph, tensor_shapes
from robustfeat.training.export.stamp import INPUT

__all__ = ["free_batch"]

_IMAGES = 3
_END = 2**31


def free_batch(model: onnx.ModelProto, batch: int | None, side: int, most: float, source: str) -> None:
    """Frees the first dimension of input and output, and makes sure that each image's features are its own.

    Args:
        model: takes and gives what a model folder's does, in batches of `batch`.
        batch: what the graph is fixed to; None where it says that it takes any.
        side: S.
        most: the largest value of a pixel.
        source: names the file in messages.

    Raises:
        InputError: the graph computes with the batch that it was exported with, images change each other's features, or
            features are not finite.
    """
    size = batch or 1
    images = noise(_IMAGES * size, side, most)
    expected = np.concatenate(run_graph(model, np.split(images, _IMAGES), source))
    if not np.isfinite(expected).all():
        raise InputError(
            f"{source}: its features are not finite",
            fix="export it again in fp32 from weights that are finite",
        )
    repair = _Repair(model, images[:size], source) if batch else None
    reason = ""
    for attempt in (None, repair) if repair else (None,):
        if attempt:
            attempt.apply()
        for value in (model.graph.input[0], model.graph.output[0]):
            value.type.tensor_type.shape.dim[0].dim_param = "batch"
        try:
            got = np.concatenate(run_graph(model, [images[:1], images[1:]], source))
        except RunError as exc:
            said = f"its batch is fixed to {batch}" if batch else "its batch is free by name only"
            reason = f"{said} ({exc.what.rpartition(': ')[2][:200]})"
            continue
        if got.shape == expected.shape and np.allclose(got, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max()):
            return
        reason = "the features of an image change with the other images of its batch"
        if batch:
            reason = f"its batch is fixed to {batch}, and the images of other batches mix"
    raise InputError(
        f"{source}: {reason}",
        fix="export it again in fp32 with a free batch dimension (dynamic_shapes or dynamic_axes in PyTorch)",
    )


class _Repair:
    """Frees the constants that a fixed batch left in a graph.

    - The first dimension of a shape is the batch, or a multiple of it, and is left to be computed. The
      others are what they are for a batch of the old size.
    - A constant that is joined to images, such as a class token, is repeated for each of them.
    - Flattened tensors whose values are taken in order, as PyTorch writes `as_strided`, are reshaped.

    Whether that was right shows in the features, which `free_batch` compares.
    """

    def __init__(self, model: onnx.ModelProto, images: NDArray[np.float32], source: str) -> None:
        self._graph = model.graph
        self._constants = {tensor.name: tensor for tensor in model.graph.initializer}
        for node in model.graph.node:
            if node.op_type == "Constant" and node.attribute[0].HasField("t"):
                self._constants[node.output[0]] = node.attribute[0].t
        names = [node.output[0] for node in model.graph.node if node.op_type == "Reshape"]
        self._shapes = tensor_shapes(model, names, images, source)
        self._nodes: list[onnx.NodeProto] = []

    def apply(self) -> None:
        """Changes the graph."""
        dependent = {INPUT}  # tensors that depend on the images
        for node in self._graph.node:
            if dependent & read_by(node):
                if node.op_type == "Reshape":
                    self._reshape(node)
                elif node.op_type == "Gather":
                    self._gather(node)
                elif node.op_type == "Concat" and helper.get_node_attr_value(node, "axis") != 0:
                    self._concat(node, dependent)
                dependent |= set(node.output)
            self._nodes.append(node)
        copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in self._nodes]
        del self._graph.node[:]
        self._graph.node.extend(copies)

    def _reshape(self, node: onnx.NodeProto) -> None:
        shape = self._shapes[node.output[0]]
        if shape and 0 not in shape:
            self._set_shape(node, [-1, *shape[1:]])

    def _set_shape(self, node: onnx.NodeProto, shape: list[Any]) -> None:
        node.input[1] = self._add(f"{node.output[0]}.shape", shape)
        for place, attribute in enumerate(node.attribute):
            if attribute.name == "allowzero":
                del node.attribute[place]
                break

    def _gather(self, node: onnx.NodeProto) -> None:
        """Gather(Reshape(x, [-1]), 0 ... n-1) becomes a Reshape of x."""
        flat = next((one for one in self._nodes if node.input[0] in one.output), None)
        if flat is None or flat.op_type != "Reshape" or not {node.input[1], flat.input[1]} <= self._constants.keys():
            return
        places = self._array(node.input[1])
        axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
        if axis == 0 and self._array(flat.input[1]).tolist() == [-1] and (places.ravel() == range(places.size)).all():
            made = helper.make_node("Reshape", [flat.input[0], ""], list(node.output))
            self._set_shape(made, [-1, *places.shape[1:]])
            node.CopyFrom(made)

    def _concat(self, node: onnx.NodeProto, dependent: set[str]) -> None:
        for place, name in enumerate(node.input):
            if name not in dependent:
                made = f"{node.output[0]}.{place}"
                self._repeat(name, made)
                node.input[place] = made

    def _repeat(self, name: str, made: str) -> None:
        """Repeats the first row of a constant for each image. Broadcasting keeps its other dimensions."""
        first, rest, end = (self._add(f"{made}.{place}", [place]) for place in (0, 1, _END))
        self._nodes += [
            helper.make_node("Shape", [INPUT], [f"{made}.images"]),
            helper.make_node("Slice", [f"{made}.images", first, rest], [f"{made}.batch"]),
            helper.make_node("Slice", [name, first, rest], [f"{made}.row"]),
            helper.make_node("Shape", [f"{made}.row"], [f"{made}.own"]),
            helper.make_node("Slice", [f"{made}.own", rest, end], [f"{made}.sides"]),
            helper.make_node("Concat", [f"{made}.batch", f"{made}.sides"], [f"{made}.shape"], axis=0),
            helper.make_node("Expand", [f"{made}.row", f"{made}.shape"], [made]),
        ]

    def _array(self, name: str) -> NDArray[Any]:
        return np.asarray(numpy_helper.to_array(self._constants[name]))

    def _add(self, name: str, values: list[Any]) -> str:
        tensor = numpy_helper.from_array(np.array(values, np.int64), name)
        self._graph.initializer.append(tensor)
        self._constants[name] = tensor
        return name
