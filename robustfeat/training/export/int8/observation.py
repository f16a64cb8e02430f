"""Observes a network's layers: ranges and sizes of their tensors, and the covariance of their inputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper

from robustfeat.system import available_cpus
from robustfeat.training.export.int8.layers import Layer
from robustfeat.training.export.stamp import INPUT

__all__ = ["Inputs", "observe_inputs", "observe_ranges"]

_MOST_INPUTS = 3072
"""Layers with more inputs per output (K) get no moments, which take K**2 numbers and K**3 operations."""

_MOMENTS_AT_ONCE = 32_000_000
_PLACES = (1024, 4096)


@dataclass(frozen=True)
class Inputs:
    """The values that a layer multiplies with its weights, over some images.

    Attributes:
        mean: (G, K) float32.
        moments: (G, K, K) float32, the sums of x x^T; None for a layer with very many inputs.
    """

    mean: NDArray[np.float32]
    moments: NDArray[np.float32] | None


def _open_session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    """ONNX Runtime on the processors of this machine."""
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = available_cpus()
    settings.log_severity_level = 3
    return onnxruntime.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])


def observe_ranges(
    model: onnx.ModelProto, layers: Sequence[Layer], batches: Iterable[NDArray[np.float32]]
) -> tuple[dict[str, tuple[float, float]], dict[str, int]]:
    """Runs a network on batches (n, 3, S, S).

    Returns:
        The least and the largest value of each tensor that a layer reads or ends with, and each layer's
        multiply-adds per image.
    """
    tensors = list(dict.fromkeys(name for layer in layers for name in (layer.source, layer.end)))
    nodes = [
        helper.make_node(kind, [name], [f"{name}|{kind}"], keepdims=0)
        for name in tensors
        for kind in ("ReduceMin", "ReduceMax")
    ]
    sizes = [helper.make_node("Shape", [layer.output], [f"{layer.output}|Shape"]) for layer in layers]
    wanted = [node.output[0] for node in (*nodes, *sizes)]
    kinds = [TensorProto.FLOAT] * len(nodes) + [TensorProto.INT64] * len(sizes)
    session = _open_session(_extended(model, [*nodes, *sizes], dict(zip(wanted, kinds, strict=True))))
    low, high = np.full(len(tensors), np.inf), np.full(len(tensors), -np.inf)
    multiply_adds: dict[str, int] = {}
    for batch in batches:
        values = session.run(wanted, {INPUT: batch})
        found = np.array([float(value) for value in values[: len(nodes)]])
        low, high = np.minimum(low, found[::2]), np.maximum(high, found[1::2])
        for layer, shape in zip(layers, values[len(nodes) :], strict=True):
            multiply_adds[layer.name] = int(np.prod(shape)) // len(batch) * layer.weights.shape[2]
    return dict(zip(tensors, zip(low.tolist(), high.tolist(), strict=True), strict=True)), multiply_adds


def observe_inputs(
    model: onnx.ModelProto, layers: Sequence[Layer], images: NDArray[np.float32]
) -> Iterator[tuple[Layer, Inputs]]:
    """Each layer with its inputs on images (n, 3, S, S); as many layers at a time as memory allows."""
    sources = list(dict.fromkeys(layer.source for layer in layers))
    session = _open_session(_extended(model, [], {name: TensorProto.FLOAT for name in sources if name != INPUT}))
    for group in _groups(layers):
        wanted = list(dict.fromkeys(layer.source for layer in group if layer.source != INPUT))
        sums = [_Sums(layer) for layer in group]
        for image in images:
            # Run one image at a time, so the inputs of all these layers fit in memory.
            tensors = {INPUT: image[None]}
            if wanted:
                tensors |= dict(zip(wanted, session.run(wanted, {INPUT: image[None]}), strict=True))
            for layer, entry in zip(group, sums, strict=True):
                entry.add(layer.columns(tensors[layer.source], _places(layer) // len(images) + 1))
        for layer, entry in zip(group, sums, strict=True):
            yield layer, entry.inputs()


class _Sums:
    """Sums over a layer's inputs."""

    def __init__(self, layer: Layer) -> None:
        groups, _, inputs = layer.weights.shape
        self._count = 0
        self._sum = np.zeros((groups, inputs), np.float64)
        self._moments = np.zeros((groups, inputs, inputs), np.float32) if inputs <= _MOST_INPUTS else None
        self._waiting: list[NDArray[np.float32]] = []

    def add(self, columns: NDArray[np.float32]) -> None:
        """Adds (G, K, P)."""
        self._count += columns.shape[2]
        self._sum += columns.sum(2)
        if self._moments is not None:
            self._waiting.append(columns)
            # Few columns against many inputs: adding up the matrix would take longer than the product.
            if sum(part.shape[2] for part in self._waiting) >= columns.shape[1]:
                self._flush()

    def inputs(self) -> Inputs:
        """The statistics so far."""
        self._flush()
        return Inputs((self._sum / self._count).astype(np.float32), self._moments)

    def _flush(self) -> None:
        if self._moments is not None and self._waiting:
            columns = np.concatenate(self._waiting, axis=2)
            self._moments += columns @ columns.transpose(0, 2, 1)
        self._waiting = []


def _places(layer: Layer) -> int:
    """Outputs whose inputs are looked at, over all images: some four for each of its inputs."""
    least, most = _PLACES
    inputs: int = layer.weights.shape[2]
    return min(max(4 * inputs, least), most)


def _groups(layers: Sequence[Layer]) -> Iterator[list[Layer]]:
    """Layers whose moments fit into memory together."""
    group: list[Layer] = []
    size = 0
    for layer in layers:
        groups, _, inputs = layer.weights.shape
        needed = groups * inputs**2 if inputs <= _MOST_INPUTS else 0
        if group and size + needed > _MOMENTS_AT_ONCE:
            yield group
            group, size = [], 0
        group.append(layer)
        size += needed
    if group:
        yield group


def _extended(model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto], outputs: Mapping[str, int]) -> onnx.ModelProto:
    """A copy with further nodes, and with further outputs of these types."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    copy.graph.node.extend(nodes)
    given = {value.name for value in copy.graph.output}
    copy.graph.output.extend(
        helper.make_tensor_value_info(name, kind, None) for name, kind in outputs.items() if name not in given
    )
    return copy
