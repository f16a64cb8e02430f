"""Small vision networks as ONNX files, as other exporters write them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

__all__ = ["SIDE", "convolutional", "run_file", "save", "transformer"]

SIDE = 32
WIDTH = 16

Shape = Sequence[int | str | None]


def weights(**shapes: tuple[int, ...]) -> list[TensorProto]:
    drawn = np.random.default_rng(1)
    return [
        numpy_helper.from_array(drawn.normal(0, 0.5, shape).astype(np.float32), name) for name, shape in shapes.items()
    ]


def save(
    file: Path,
    nodes: Sequence[onnx.NodeProto],
    taken: Shape,
    initializers: Sequence[TensorProto],
    *,
    outputs: Sequence[str] = ("out",),
    name: str = "image",
    kind: int = TensorProto.FLOAT,
    inputs: Sequence[onnx.ValueInfoProto] = (),
    opset: int = 17,
    ir_version: int = 9,
    external: bool = False,
) -> Path:
    """Writes a graph whose first input is an image."""
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info(name, kind, taken), *inputs],
        [onnx.ValueInfoProto(name=output) for output in outputs],
        initializers,
    )
    domains = {"": opset, **{node.domain: 1 for node in nodes if node.domain}}
    imported = [helper.make_opsetid(domain, version) for domain, version in domains.items()]
    model = helper.make_model(graph, opset_imports=imported, ir_version=ir_version)
    file.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, file, save_as_external_data=external, location=f"{file.name}.data", size_threshold=0)
    return file


def convolutional(
    file: Path,
    taken: Shape = ("N", 3, SIDE, SIDE),
    *,
    before: Sequence[onnx.NodeProto] = (),
    last: str = "out",
    **options: Any,
) -> Path:
    """Patches, ReLU, mean and a linear layer: outputs `out` (N, 16), `map` (N, 16, 8, 8) and `pooled` (N, 16, 1, 1).

    Args:
        before: nodes from `image` to `pixels`, what the convolution sees; by default the same.
        last: the name of `out`.
    """
    first = "pixels" if before else options.get("name", "image")
    nodes = [
        *before,
        helper.make_node("Conv", [first, "kernel"], ["patches"], strides=[4, 4]),
        helper.make_node("Relu", ["patches"], ["map"]),
        helper.make_node("GlobalAveragePool", ["map"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["vector"]),
        helper.make_node("Gemm", ["vector", "matrix", "bias"], [last]),
    ]
    made = weights(kernel=(WIDTH, 3, 4, 4), matrix=(WIDTH, WIDTH), bias=(WIDTH,))
    return save(file, nodes, taken, [*made, *options.pop("initializers", ())], **options)


def transformer(file: Path, taken: Shape = (1, 3, SIDE, SIDE), **options: Any) -> Path:
    """A class token and 16 patches through one layer that mixes them, as PyTorch writes it for a fixed batch."""
    batch = taken[0]
    assert isinstance(batch, int)
    shapes = {"tokens": [batch, WIDTH, 16], "heads": [batch, 17, 2, 8], "joined": [batch, -1, WIDTH]}
    nodes = [
        helper.make_node("Conv", ["image", "kernel"], ["patches"], strides=[8, 8]),
        helper.make_node("Reshape", ["patches", "shape.tokens"], ["flat"]),
        helper.make_node("Transpose", ["flat"], ["patch_tokens"], perm=[0, 2, 1]),
        helper.make_node("Concat", ["class", "patch_tokens"], ["tokens"], axis=1),
        helper.make_node("Reshape", ["tokens", "shape.heads"], ["split"]),
        helper.make_node("Softmax", ["split"], ["weighted"], axis=1),
        helper.make_node("Mul", ["weighted", "split"], ["mixed"]),
        helper.make_node("ReduceMean", ["mixed"], ["mean"], axes=[1], keepdims=1),
        helper.make_node("Add", ["mixed", "mean"], ["added"]),
        helper.make_node("Reshape", ["added", "shape.joined"], ["out"], allowzero=1),
    ]
    made = weights(kernel=(WIDTH, 3, 8, 8))
    token = np.linspace(-1, 1, WIDTH, dtype=np.float32)[None, None].repeat(batch, 0)
    made.append(numpy_helper.from_array(token, "class"))
    made += [numpy_helper.from_array(np.array(shape, np.int64), f"shape.{name}") for name, shape in shapes.items()]
    return save(file, nodes, taken, made, **options)


def run_file(file: Path, images: NDArray[Any], output: str | None = None) -> NDArray[Any]:
    """The file itself in ONNX Runtime, one image at a time."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    rows = [session.run(None if output is None else [output], {name: image[None]})[0] for image in images]
    return np.concatenate(rows)
