"""The end of a network's ONNX graph: a tensor of any kind becomes one float32 vector per image. Loads no PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from robustfeat.errors import InputError
from robustfeat.training.export.stamp import OUTPUT

__all__ = ["POOLINGS", "Found", "put_output"]

POOLINGS = ("cls", "mean")
"""How (N, T, D) tokens or an (N, D, H, W) map become a vector: the first token, or the mean over all."""

_AXES_ARE_INPUTS = 18
"""The opset from which ReduceMean takes its axes as an input."""


@dataclass(frozen=True)
class Found:
    """The tensor that becomes the features.

    Attributes:
        name: in the graph.
        values: what it is for some images.
        opset: opset of the graph.
        channels_last: whether a map is (N, H, W, D).
    """

    name: str
    values: NDArray[Any]
    opset: int
    channels_last: bool

    @property
    def single(self) -> bool:
        """Whether it is a map of one place."""
        shape = self.values.shape
        return len(shape) == 4 and (shape[1:3] if self.channels_last else shape[2:]) == (1, 1)

    @property
    def is_vector(self) -> bool:
        """Whether it is one vector per image, but for sides of 1."""
        return self.values.ndim == 2 or self.single

    @property
    def size(self) -> int:
        """D."""
        channels_first = self.values.ndim == 4 and not self.channels_last
        return int(self.values.shape[1 if channels_first else -1])


def put_output(graph: onnx.GraphProto, found: Found, pooling: str | None, prefix: int, source: str) -> str | None:
    """Appends what turns the tensor into float32 vectors called `features`; gives the pooling that was needed.

    Raises:
        InputError: it cannot, or only by a pooling that was not chosen.
    """
    _check(found, pooling, source)
    nodes: list[onnx.NodeProto] = []

    def then(operator: str, *constants: Sequence[int] | int, **attributes: Any) -> None:
        names = []
        for value in constants:
            names.append(f"{OUTPUT}.constant.{len(graph.initializer)}")
            graph.initializer.append(numpy_helper.from_array(np.array(value, np.int64), names[-1]))
        last = nodes[-1].output[0] if nodes else found.name
        nodes.append(helper.make_node(operator, [last, *names], [f"{OUTPUT}.{len(nodes)}"], **attributes))

    if found.single:
        then("Flatten", axis=1)
    elif pooling == "cls":
        then("Gather", 0, axis=1)
    elif pooling == "mean":
        tokens = found.values.ndim == 3
        axes = [1] if tokens else [1, 2] if found.channels_last else [2, 3]
        if tokens and prefix:
            then("Slice", [prefix], [2**31], [1])
        if found.opset >= _AXES_ARE_INPUTS:
            then("ReduceMean", axes, keepdims=0)
        else:
            then("ReduceMean", axes=axes, keepdims=0)
    if found.values.dtype != np.float32:
        then("Cast", to=TensorProto.FLOAT)
    if not nodes:
        then("Identity")
    nodes[-1].output[0] = OUTPUT
    graph.node.extend(nodes)
    return pooling


def _check(found: Found, pooling: str | None, source: str) -> None:
    shape, said = found.values.shape, f"{source}: {found.name} is of shape {found.values.shape}"
    if found.values.dtype not in (np.float32, np.float16, np.float64):
        raise InputError(
            f"{source}: {found.name} is {found.values.dtype}; expected floating-point numbers",
            fix="pass another `output`",
        )
    if len(shape) not in (2, 3, 4):
        raise InputError(f"{said}, which is no vector per image", fix="pass another `output`")
    if pooling is not None and (pooling not in POOLINGS or (found.is_vector and pooling == "cls") or len(shape) == 2):
        raise InputError(
            f"{said}" + (", a vector per image already" if found.is_vector else ""),
            argument="pooling",
            value=pooling,
            fix="leave `pooling` out, or pass another `output`" if found.is_vector else "pass `pooling=mean`",
        )
    if not found.is_vector and (pooling is None or (pooling == "cls" and len(shape) == 4)):
        kinds, fit = ("a map", "`pooling=mean`") if len(shape) == 4 else ("tokens", "`pooling=cls` or `pooling=mean`")
        raise InputError(f"{said}, {kinds} and no vector per image", fix=f"pass {fit}, or another `output`")
