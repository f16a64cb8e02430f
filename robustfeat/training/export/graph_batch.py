"""The batch of a network's ONNX graph: whatever it was exported with, it becomes free. Loads no PyTorch."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

from robustfeat.errors import InputError
from robustfeat.training.export.graph_reading import RunError, noise, read_by, run_graph
from robustfeat.training.export.stamp import INPUT

__all__ = ["free_batch"]

_IMAGES = 3


def free_batch(model: onnx.ModelProto, batch: int | None, side: int, most: float, source: str) -> None:
    """Frees the first dimension of input and output, and makes sure that each image's features are its own.

    Args:
        model: takes and gives what a model folder's does, in batches of `batch`.
        batch: what the graph is fixed to; None where it says that it takes any.
        side: S.
        most: the largest value of a pixel.
        source: names the file in messages.

    Raises:
        InputError: the graph computes with the batch that it was exported with, or images change each other's features.
    """
    size = batch or 1
    images = noise(_IMAGES * size, side, most)
    expected = np.concatenate(run_graph(model, np.split(images, _IMAGES), source))
    reason = f"its batch is fixed to {batch}" if batch else "its batch is free by name only"
    for repaired in (False, True) if batch == 1 else (False,):
        if repaired:
            _repair(model.graph)
        for value in (model.graph.input[0], model.graph.output[0]):
            value.type.tensor_type.shape.dim[0].dim_param = "batch"
        try:
            got = np.concatenate(run_graph(model, [images[:1], images[1:]], source))
        except RunError as exc:
            reason = f"{reason.partition(' (')[0]} ({exc.what.rpartition(': ')[2][:200]})"
            continue
        if got.shape == expected.shape and np.allclose(got, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max()):
            return
        reason = "the features of an image change with the other images of its batch"
    raise InputError(
        f"{source}: {reason}",
        fix="export it again in fp32 with a free batch dimension (dynamic_shapes or dynamic_axes in PyTorch)",
    )


def _repair(graph: onnx.GraphProto) -> None:
    """Frees constants that a batch of 1 left in the graph: shapes, and tensors that join others along an axis."""
    values = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].HasField("t"):
            values[node.output[0]] = node.attribute[0].t
    dependent = {INPUT}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        depends = bool(dependent & read_by(node))
        if depends and node.op_type == "Reshape" and node.input[1] in values:
            shape = numpy_helper.to_array(values[node.input[1]]).copy()
            if shape.size > 1 and shape[0] == 1:
                shape[0] = 0 if -1 in shape else -1
                node.input[1] = f"{node.output[0]}.shape"
                graph.initializer.append(numpy_helper.from_array(shape, node.input[1]))
        if depends and node.op_type == "Concat":
            for place, name in enumerate(node.input):
                if name not in dependent and helper.get_node_attr_value(node, "axis") != 0:
                    nodes += _spread(graph, name, f"{node.output[0]}.{place}")
                    node.input[place] = f"{node.output[0]}.{place}"
        nodes.append(node)
        if depends:
            dependent |= set(node.output)
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)


def _spread(graph: onnx.GraphProto, name: str, made: str) -> list[onnx.NodeProto]:
    """Nodes that repeat a constant (1, ...) for each image of the batch. Broadcasting keeps its other dimensions."""
    for suffix, value in (("from", [0]), ("to", [1]), ("end", [2**31])):
        graph.initializer.append(numpy_helper.from_array(np.array(value, np.int64), f"{made}.{suffix}"))
    return [
        helper.make_node("Shape", [INPUT], [f"{made}.all"]),
        helper.make_node("Slice", [f"{made}.all", f"{made}.from", f"{made}.to"], [f"{made}.batch"]),
        helper.make_node("Shape", [name], [f"{made}.own"]),
        helper.make_node("Slice", [f"{made}.own", f"{made}.to", f"{made}.end"], [f"{made}.rest"]),
        helper.make_node("Concat", [f"{made}.batch", f"{made}.rest"], [f"{made}.shape"], axis=0),
        helper.make_node("Expand", [name, f"{made}.shape"], [made]),
    ]
