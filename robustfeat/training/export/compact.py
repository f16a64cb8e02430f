"""Compact folders, whose model.onnx keeps its weights in model.safetensors; made, and turned into plain ones."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from robustfeat.errors import ExportError
from robustfeat.files import new_folder
from robustfeat.hub.card import render_card
from robustfeat.hub.folder import CARD, COMPACT_ONNX, ONNX, ModelFolder, seal_folder

__all__ = ["compact_onnx", "expand_folder"]

_MAX_INLINE = 8192
"""Constants up to this size (shapes, zero biases) stay in the graph of a compact file."""


def compact_onnx(source: Path, safetensors_file: Path, target: Path) -> None:
    """Writes a copy of `source` whose weights are external data in `safetensors_file`, which must be beside `target`.

    The engine casts fp16 weights to fp32 when it loads them, and the arithmetic stays fp32.

    Raises:
        ExportError: a weight of the graph is not in the file.
    """
    if safetensors_file.parent != target.parent:
        raise ValueError("external data must lie in the folder of the ONNX file: engines refuse other places")
    with open(safetensors_file, "rb") as handle:
        (header_bytes,) = struct.unpack("<Q", handle.read(8))
        entries: dict[str, Any] = json.loads(handle.read(header_bytes))
    start = 8 + header_bytes
    model = onnx.load(source)
    graph = model.graph
    casts = []
    kept = []
    for initializer in graph.initializer:
        entry = entries.get(initializer.name)
        if entry is None:
            if np.prod(initializer.dims) > _MAX_INLINE:
                raise ExportError(f"{source}: the weight {initializer.name} is not in {safetensors_file.name}")
            kept.append(initializer)
            continue
        if list(initializer.dims) != entry["shape"]:
            raise ExportError(
                f"{source}: the weight {initializer.name} has another shape than in {safetensors_file.name}"
            )
        half = entry["dtype"] == "F16"
        stored = TensorProto(
            name=initializer.name + ".fp16" if half else initializer.name,
            dims=initializer.dims,
            data_type=TensorProto.FLOAT16 if half else TensorProto.FLOAT,
            data_location=TensorProto.EXTERNAL,
        )
        first, last = entry["data_offsets"]
        for key, value in (("location", safetensors_file.name), ("offset", start + first), ("length", last - first)):
            stored.external_data.add(key=key, value=str(value))
        kept.append(stored)
        if half:
            casts.append(helper.make_node("Cast", [stored.name], [initializer.name], to=TensorProto.FLOAT))
    del graph.initializer[:]
    graph.initializer.extend(kept)
    nodes = list(graph.node)
    del graph.node[:]
    graph.node.extend([*casts, *nodes])
    del graph.value_info[:]
    target.write_bytes(model.SerializeToString())


def expand_folder(folder: ModelFolder, out: str | Path) -> ModelFolder:
    """Writes a copy of a compact folder with one-file ONNX, which the Hub needs. The features stay bit-identical.

    Raises:
        InputError: `out` exists, or cannot be written.
        ModelFolderError: a file was altered; nothing is left behind.
    """
    with new_folder(out) as path:
        contents = {name: folder.read(name) for name in folder.config.files if name != COMPACT_ONNX}
        for name, content in (contents | {ONNX["fp32"]: folder.read_onnx("fp32")}).items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(content)
        card = folder.path / CARD
        seal_folder(path, folder.config, card.read_text("utf-8") if card.is_file() else render_card(folder.config))
    return ModelFolder(out)
