"""Moves an ONNX file's external data into the file itself.

An engine would open external files by any name that the ONNX file gives. With the weights inside, it gets one verified
piece of memory and opens no file.

An ONNX file is a protobuf message with nested messages (see `protobuf`).
Reference: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import BinaryIO

from robustfeat.hub.protobuf import BYTES, VARINT, iterate_fields, read_varint, varint

__all__ = ["MAX_BYTES", "MESSAGES", "inline_external_data", "write_with_data_inside"]

MESSAGES: dict[str, dict[int, str]] = {
    "ModelProto": {7: "GraphProto", 20: "TrainingInfoProto", 25: "FunctionProto"},
    "TrainingInfoProto": {1: "GraphProto", 2: "GraphProto"},
    "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
    "GraphProto": {1: "NodeProto", 5: "TensorProto", 15: "SparseTensorProto"},
    "NodeProto": {5: "AttributeProto"},
    "AttributeProto": {
        5: "TensorProto",
        6: "GraphProto",
        10: "TensorProto",
        11: "GraphProto",
        22: "SparseTensorProto",
        23: "SparseTensorProto",
    },
    "SparseTensorProto": {1: "TensorProto", 2: "TensorProto"},
    "TensorProto": {},
}
"""Fields that lead from an ONNX message to tensors, by the message's name."""

_RAW_DATA, _EXTERNAL_DATA, _DATA_LOCATION = 9, 13, 14
_EXTERNAL = 1
MAX_BYTES = 2**31 - 1
"""Largest message that engines read, in bytes."""

_Pieces = list[bytes | memoryview]


def inline_external_data(content: bytes, read: Callable[[str], bytes]) -> bytes:
    """Returns an ONNX file with its external data inside, or `content` itself if there are none.

    Args:
        content: the content of the file.
        read: returns the content of an external file by its name, or raises.

    Raises:
        ValueError: the file is not ONNX, a reference is broken, or the result is too large for an engine.
    """
    pieces = _Inliner(read).convert(content)
    return content if pieces is None else b"".join(pieces)


def write_with_data_inside(content: bytes, read: Callable[[str], bytes | mmap.mmap], target: BinaryIO) -> None:
    """Writes the result of `inline_external_data` piece by piece, without copies if `read` maps files.

    Raises:
        ValueError: see `inline_external_data`.
    """
    target.writelines(_Inliner(read).convert(content) or [content])


class _Inliner:
    def __init__(self, read: Callable[[str], bytes | mmap.mmap]) -> None:
        self._read = read
        self._files: dict[str, bytes | mmap.mmap] = {}
        self._inlined = 0

    def convert(self, content: bytes) -> _Pieces | None:
        """The file in pieces, or None if it has no external data."""
        if not any(number == 7 and wire == BYTES for number, wire, *_ in iterate_fields(memoryview(content))):
            raise ValueError("not an ONNX file: it has no graph")
        try:
            return self._message(memoryview(content), "ModelProto")
        except RecursionError as exc:
            raise ValueError("its graphs are nested too deeply") from exc

    def _message(self, message: memoryview, kind: str) -> _Pieces | None:
        """The message with its tensors' data inside, or None if nothing changes."""
        if kind == "TensorProto":
            return self._tensor(message)
        pieces: _Pieces = []
        done = 0
        for number, wire, start, value, end in iterate_fields(message):
            inner = MESSAGES[kind].get(number) if wire == BYTES else None
            if inner and (changed := self._message(message[value:end], inner)) is not None:
                size = sum(map(len, changed))
                pieces += [message[done:start], varint(number << 3 | BYTES), varint(size), *changed]
                done = end
        return [*pieces, message[done:]] if done else None

    def _tensor(self, message: memoryview) -> _Pieces | None:
        kept: _Pieces = []
        place: dict[str, str] = {}
        external = False
        for number, wire, start, value, end in iterate_fields(message):
            if number == _DATA_LOCATION and wire == VARINT:
                external |= read_varint(message, value)[0] == _EXTERNAL
            elif number == _EXTERNAL_DATA and wire == BYTES:
                # A StringStringEntryProto: 1 is the key, 2 the value.
                entry = {
                    part: bytes(message[value:end][first:last])
                    for part, _, _, first, last in iterate_fields(message[value:end])
                }
                place[entry.get(1, b"").decode()] = entry.get(2, b"").decode()
            else:
                kept.append(message[start:end])
        if not external and not place:
            return None
        if not external or "location" not in place:
            raise ValueError("a tensor has an incomplete reference to external data")
        data = self._find(place)
        return [*kept, varint(_RAW_DATA << 3 | BYTES), varint(len(data)), data]

    def _find(self, place: dict[str, str]) -> memoryview:
        location = place["location"]
        if location not in self._files:
            self._files[location] = self._read(location)
        data = memoryview(self._files[location])
        first = int(place.get("offset", "0"))
        size = int(place.get("length", len(data) - first))
        if not 0 <= first <= first + size <= len(data):
            raise ValueError(f"a tensor's data end outside {location}")
        self._inlined += size
        if self._inlined > MAX_BYTES:
            raise ValueError("with its weights it exceeds 2 GB, the limit of engines")
        return data[first : first + size]
