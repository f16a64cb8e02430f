"""Any vision network's ONNX graph, changed to take `pixel_values` and give `features`. Loads no PyTorch.

The network keeps its nodes and weights. New nodes turn our input into its own (channels last, 8 bits, half precision),
and its output into vectors (pooling). The sides of the input become numbers, and its batch becomes free.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
from onnx import TensorProto, helper

from robustfeat.errors import InputError
from robustfeat.hub.preprocessing import Preprocessing
from robustfeat.training.export.graph_batch import free_batch
from robustfeat.training.export.graph_editing import drop_unused, rename_tensors
from robustfeat.training.export.graph_pooling import Found, put_output
from robustfeat.training.export.graph_reading import (
    describe,
    dimensions,
    noise,
    require_order,
    run_graph,
)
from robustfeat.training.export.stamp import INPUT, OUTPUT

__all__ = ["AdaptedGraph", "adapt_graph"]

_BATCH = "batch"
_TYPES = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.UINT8}
_NORMALISING = {"Sub", "Div", "Mul", "Add"}
_LAYERS = {"Gemm", "MatMul"}
_MOST_PIXELS = 2**25
"""Largest batch, more than 600 images of 224 px."""


@dataclass(frozen=True)
class AdaptedGraph:
    """A graph that takes `pixel_values`, (N, 3, S, S) float32, and gives `features`, (N, D) float32.

    Attributes:
        model: the graph, with any batch size.
        image_size: S.
        feature_size: D.
        output: the tensor of the file that became the features.
        pooling: how it became a vector; None where it was one.
        takes_bytes: whether the network takes values from 0 to 255.
        normalises: the operators at its start that seem to normalise pixels.
        classifier_input: what the last layer sees, where that layer may be a classifier; a choice for `output`.
    """

    model: onnx.ModelProto
    image_size: int
    feature_size: int
    output: str
    pooling: str | None
    takes_bytes: bool
    normalises: tuple[str, ...]
    classifier_input: str | None


def adapt_graph(
    model: onnx.ModelProto,
    source: str,
    *,
    image_size: int | None = None,
    output: str | None = None,
    pooling: str | None = None,
    prefix: int = 0,
) -> AdaptedGraph:
    """Makes the graph one of a model folder's. `model` is changed.

    Args:
        model: a model from `load_graph`.
        source: names the file in messages.
        image_size: S; needed where the graph takes images of any size.
        output: the tensor that becomes the features, an output or any other one; needed where there are several.
        pooling: one of `POOLINGS`, for an output that is no vector.
        prefix: number of tokens before the patches, which `mean` skips.

    Raises:
        InputError: the graph needs more arguments. The message says what was found and what to pass.
    """
    graph = model.graph
    require_order(graph, source)
    chosen = named = _choose_output(graph, output, source)
    classifier_input = _classifier_input(graph, chosen) if output is None else None
    _prune(graph, chosen)
    given = _image_input(graph, source)
    nchw, side = _layout(given, image_size, source)
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 1)
    batch = dimensions(given)[0]
    _require_sizes(batch, side, source)
    kind = given.type.tensor_type.elem_type
    normalises = tuple(_normalising(graph, given.name))
    names = {name: f"{name}.inner" for name in (INPUT, OUTPUT)}
    rename_tensors(graph, names)
    taken, chosen = names.get(given.name, given.name), names.get(chosen, chosen)
    _put_input(graph, taken, kind, nchw=nchw, side=side, batch=batch)
    graph.output[0].name = chosen
    most = 255.0 if kind == TensorProto.UINT8 else 1.0
    (found,) = run_graph(model, [noise(batch or 1, side, most)], source)
    last = Found(chosen, found, opset, channels_last=not nchw)
    pooled = put_output(graph, last, pooling, prefix, source)
    graph.output[0].CopyFrom(helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, [batch or _BATCH, last.size]))
    free_batch(model, batch, side, most, source)
    drop_unused(graph, [OUTPUT])
    return AdaptedGraph(
        model,
        side,
        last.size,
        named,
        pooled,
        kind == TensorProto.UINT8,
        normalises,
        classifier_input,
    )


def _choose_output(graph: onnx.GraphProto, output: str | None, source: str) -> str:
    if output is None:
        if len(graph.output) == 1:
            return str(graph.output[0].name)
        raise InputError(
            f"{source}: has {len(graph.output)} outputs: {'; '.join(map(describe, graph.output))[:400]}",
            fix="pass the name of one as `output`",
        )
    made = {name for node in graph.node for name in node.output if name}
    if output not in made:
        raise InputError(
            f"{source} has no tensor of that name; its outputs are "
            f"{', '.join(value.name for value in graph.output)[:400]}",
            argument="output",
            value=output,
            fix="pass one of these, or any other tensor that a node of the graph gives",
        )
    return output


def _classifier_input(graph: onnx.GraphProto, output: str) -> str | None:
    """The input of the last layer, if that is a linear layer such as a classifier."""
    makers = {name: node for node in graph.node for name in node.output}
    weights = {tensor.name for tensor in graph.initializer}
    node = makers.get(output)
    while node is not None and node.op_type in {"Softmax", "LogSoftmax", "Sigmoid", "Add", "Identity", "Flatten"}:
        node = next(
            (makers[name] for name in node.input if name in makers and makers[name].op_type != "Constant"), None
        )
    if node is None or node.op_type not in _LAYERS or not any(name in weights for name in node.input[1:]):
        return None
    return str(node.input[0])


def _prune(graph: onnx.GraphProto, output: str) -> None:
    """Leaves what `output` needs, and makes it the only output."""
    drop_unused(graph, [output])
    # What was inferred of inner tensors holds for the old batch and the old sides.
    del graph.value_info[:], graph.output[:]
    graph.output.append(onnx.ValueInfoProto(name=output))


def _image_input(graph: onnx.GraphProto, source: str) -> onnx.ValueInfoProto:
    """The only input, an image.

    Raises:
        InputError: there are others, or none, or it is something else.
    """
    found = "; ".join(map(describe, graph.input))
    if len(graph.input) != 1:
        if not graph.input:
            raise InputError(f"{source}: {graph.output[0].name} depends on no input", fix="pass another `output`")
        raise InputError(
            f"{source}: {graph.output[0].name} needs {len(graph.input)} inputs: {found[:400]}; expected one, the image",
            fix="pass an `output` that depends on the image only, or export the image tower by itself",
        )
    value: onnx.ValueInfoProto = graph.input[0]
    if value.type.tensor_type.elem_type not in _TYPES:
        raise InputError(f"{source}: takes {found}; expected an image in float32, float16 or uint8")
    return value


def _layout(value: onnx.ValueInfoProto, image_size: int | None, source: str) -> tuple[bool, int]:
    """Whether channels come before the sides, and S.

    Raises:
        InputError: it is not (N, 3, S, S) or (N, S, S, 3), or S is not known or another one.
    """
    shape = dimensions(value)
    if len(shape) != 4 or (3 not in (shape[1], shape[3]) and None not in (shape[1], shape[3])):
        raise InputError(f"{source}: takes {describe(value)}; expected images in colour, (N, 3, S, S) or (N, S, S, 3)")
    nchw = shape[1] == 3 or (shape[1] is None and shape[3] != 3)
    height, width = shape[2:] if nchw else shape[1:3]
    if None not in (height, width) and height != width:
        raise InputError(f"{source}: takes {describe(value)}; only square images are supported")
    side = height or width
    if side is None and image_size is None:
        raise InputError(
            f"{source}: takes images of any size", fix="pass the side that it was trained for as `image_size`"
        )
    if side is not None and image_size not in (None, side):
        raise InputError(
            f"{source} takes {describe(value)}, and no other size",
            argument="image_size",
            value=image_size,
            fix="leave `image_size` out, or export the network with free sides",
        )
    return nchw, side or image_size or 0


def _require_sizes(batch: int | None, side: int, source: str) -> None:
    """Refuses what a contract does not allow, and a fixed batch that would fill the memory, before anything runs."""
    try:
        Preprocessing(side)
    except ValueError as exc:
        raise InputError(f"{source}: {exc}") from exc
    if batch is not None and batch * side**2 > _MOST_PIXELS:
        raise InputError(
            f"{source}: its batch is fixed to {batch}", fix="export it again with a free batch, or for one image"
        )


def _normalising(graph: onnx.GraphProto, name: str) -> Iterator[str]:
    """The operators that the image passes before anything else, which may normalise it."""
    constants = {tensor.name for tensor in graph.initializer}
    constants |= {name for node in graph.node if node.op_type == "Constant" for name in node.output}
    while True:
        readers = [node for node in graph.node if name in node.input]
        if len(readers) != 1 or readers[0].op_type not in {*_NORMALISING, "Cast", "Transpose"}:
            return
        if readers[0].op_type in _NORMALISING:
            if not constants & set(readers[0].input):
                return
            yield readers[0].op_type
        name = readers[0].output[0]


def _put_input(graph: onnx.GraphProto, name: str, kind: int, *, nchw: bool, side: int, batch: int | None) -> None:
    """Replaces the input by `pixel_values`, and turns it into what the network takes."""
    steps: list[tuple[str, dict[str, Any]]] = []
    if not nchw:
        steps.append(("Transpose", {"perm": [0, 2, 3, 1]}))
    if kind == TensorProto.UINT8:
        steps.append(("Round", {}))  # pixel / 255 * 255 is off by a millionth
    if kind != TensorProto.FLOAT:
        steps.append(("Cast", {"to": kind}))
    nodes, last = [], INPUT
    for number, (operator, attributes) in enumerate(steps, 1):
        made = name if number == len(steps) else f"{INPUT}.{operator.lower()}"
        nodes.append(helper.make_node(operator, [last], [made], **attributes))
        last = made
    if not steps:
        rename_tensors(graph, {name: INPUT})
    del graph.input[:]
    graph.input.append(helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, [batch or _BATCH, 3, side, side]))
    _prepend(graph, nodes)


def _prepend(graph: onnx.GraphProto, nodes: Sequence[onnx.NodeProto]) -> None:
    rest = [onnx.NodeProto.FromString(node.SerializeToString()) for node in graph.node]
    del graph.node[:]
    graph.node.extend([*nodes, *rest])
