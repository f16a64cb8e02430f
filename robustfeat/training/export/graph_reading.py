"""A network's ONNX file, read, described and run as it is. Loads no PyTorch."""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from robustfeat.errors import InputError, RobustFeatError, first_line
from robustfeat.hub.external_data import MAX_BYTES, inline_external_data
from robustfeat.training.export.stamp import quiet

__all__ = [
    "RunError",
    "describe",
    "dimensions",
    "inner_graphs",
    "load_graph",
    "noise",
    "output_shapes",
    "read_by",
    "require_order",
    "run_graph",
    "run_outputs",
    "tensor_shapes",
]


class RunError(InputError):
    """The network was loaded, and fails on images."""


def load_graph(file: Path) -> tuple[onnx.ModelProto, str]:
    """The network in an ONNX file, with the weights in files beside it put inside, and the sha256 of the file's bytes.

    Files of weights must be in the file's folder or below it, and links must not lead out of it.

    Raises:
        InputError: a file cannot be read, the first is no ONNX file, or all are larger than engines can read.
    """
    reader = _Reader(file)
    try:
        content = reader.read(file)
    except OSError as exc:
        raise InputError(f"{file}: cannot be read ({exc.strerror or first_line(exc)})") from exc
    try:
        whole = inline_external_data(content, reader.read_beside)
        model = onnx.load_model_from_string(whole)
    except RobustFeatError:
        raise
    except Exception as exc:  # protobuf's errors have no base of their own
        raise InputError(
            f"{file}: not an ONNX file, or a damaged one ({first_line(exc)[:200]})", fix="download or export it again"
        ) from exc
    if not model.graph.node:
        raise InputError(f"{file}: not an ONNX file of a network (its graph is empty)")
    return model, hashlib.sha256(content).hexdigest()


class _Reader:
    """Reads an ONNX file and the files beside it, and knows before that they are not too large together."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._total = 0

    def read(self, path: Path) -> bytes:
        """The content of a regular file."""
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise OSError("it is not a regular file")
        self._total += status.st_size
        if self._total > MAX_BYTES:
            raise InputError(
                f"{self._file}: with its weights it is larger than 2 GB, which engines cannot read from one ONNX file",
                fix="use a smaller network",
            )
        return path.read_bytes()

    def read_beside(self, place: str) -> bytes:
        """The content of a file of weights, by the path that the ONNX file gives."""
        try:
            folder = self._file.parent.resolve()
            found = (folder / place).resolve()
            if not found.is_relative_to(folder):
                raise OSError("it lies outside the folder of the ONNX file")
            return self.read(found)
        except (OSError, RuntimeError, ValueError) as exc:  # also links in a circle, and a path with a zero byte
            reason = getattr(exc, "strerror", None) or first_line(exc)
            raise InputError(
                f"{self._file}: its weights lie in {place[:200]}, which cannot be read ({reason})",
                fix="put that file beside the ONNX file",
            ) from exc


def output_shapes(model: onnx.ModelProto, source: str) -> dict[str, list[int | str | None]]:
    """The shapes of the outputs as ONNX Runtime infers them, by name.

    Raises:
        InputError: it cannot be loaded.
    """
    return {value.name: list(value.shape) for value in _session(model, source).get_outputs()}


def run_graph(model: onnx.ModelProto, batches: Sequence[NDArray[Any]], source: str) -> list[NDArray[Any]]:
    """ONNX Runtime's first output for each batch of the only input.

    Raises:
        RunError: the network fails on them.
        InputError: it cannot be loaded.
    """
    return [next(iter(outputs.values())) for outputs in run_outputs(model, batches, source)]


def run_outputs(model: onnx.ModelProto, batches: Sequence[NDArray[Any]], source: str) -> list[dict[str, NDArray[Any]]]:
    """All of ONNX Runtime's outputs, by name, for each batch of the only input.

    Raises:
        RunError, InputError: see `run_graph`.
    """
    session = _session(model, source)
    name = session.get_inputs()[0].name
    names = [value.name for value in session.get_outputs()]
    try:
        return [dict(zip(names, session.run(names, {name: batch}), strict=True)) for batch in batches]
    except Exception as exc:
        raise RunError(f"{source}: ONNX Runtime cannot run it ({_reason(exc)})") from exc


def tensor_shapes(
    model: onnx.ModelProto, names: Sequence[str], batch: NDArray[Any], source: str
) -> dict[str, tuple[int, ...]]:
    """The shapes of inner tensors for a batch of the only input, by name.

    Raises:
        RunError: the network fails on it.
        InputError: it cannot be loaded.
    """
    count = len(model.graph.output)
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    try:
        session = _session(model, source)
        values = session.run(list(names), {session.get_inputs()[0].name: batch}) if names else []
    except InputError:
        raise
    except Exception as exc:
        raise RunError(f"{source}: ONNX Runtime cannot run it ({_reason(exc)})") from exc
    finally:
        del model.graph.output[count:]
    return {name: value.shape for name, value in zip(names, values, strict=True)}


def _session(model: onnx.ModelProto, source: str) -> Any:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4
    try:
        with quiet():
            content = model.SerializeToString()
            return onnxruntime.InferenceSession(content, settings, providers=["CPUExecutionProvider"])
    except Exception as exc:  # ONNX Runtime's exceptions share no base class of their own
        versions = ", ".join(f"{entry.domain or 'ai.onnx'} {entry.version}" for entry in model.opset_import)
        raise InputError(
            f"{source}: ONNX Runtime {onnxruntime.__version__} cannot load it ({_reason(exc)}); the file has IR "
            f"version {model.ir_version} and opset {versions}",
            fix="upgrade onnxruntime, or export the network for an earlier opset",
        ) from exc


def describe(value: onnx.ValueInfoProto) -> str:
    """Its name, shape and type, for messages."""
    kind = value.type.tensor_type.elem_type
    name = TensorProto.DataType.Name(kind).lower() if kind else "no tensor"
    shape = ", ".join("?" if side is None else str(side) for side in dimensions(value))
    return f"{value.name} ({shape}) {name}"


def dimensions(value: onnx.ValueInfoProto) -> list[int | None]:
    """The shape, with None for free dimensions. Some exporters write a side of 0 or less for a free one."""
    return [
        dimension.dim_value if dimension.HasField("dim_value") and dimension.dim_value > 0 else None
        for dimension in value.type.tensor_type.shape.dim
    ]


def inner_graphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The graphs that a node runs, such as the branches of an If."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def read_by(node: onnx.NodeProto) -> set[str]:
    """The names that a node reads, also within its graphs."""
    names = set(node.input)
    for inner in inner_graphs(node):
        names |= {value.name for value in inner.output}
        for one in inner.node:
            names |= read_by(one)
    return names - {""}


def require_order(graph: onnx.GraphProto, source: str) -> None:
    """Refuses nodes that read what a later node, or they themselves, give: such graphs may run in a circle.

    Raises:
        InputError: naming the tensor.
    """
    made = {output: place for place, node in enumerate(graph.node) for output in node.output if output}
    for place, node in enumerate(graph.node):
        early = next((name for name in node.input if made.get(name, -1) >= place), None)
        if early is not None:
            raise InputError(
                f"{source}: its nodes are not in the order in which they run ({early!r} is read before it is made)",
                fix="export it again",
            )


def noise(count: int, side: int, most: float = 1.0) -> NDArray[np.float32]:
    """Random images, (count, 3, S, S) float32 from 0 to `most`. The last one has the largest range."""
    images = np.random.default_rng(0).random((count, 3, side, side), np.float32)
    images *= most * np.linspace(1 / count, 1, count, dtype=np.float32)[:, None, None, None]
    return images


def _reason(exc: BaseException) -> str:
    """The message of an exception of ONNX Runtime, without its leading name and number."""
    return first_line(exc).rpartition("[ONNXRuntimeError] : ")[2][:200]
