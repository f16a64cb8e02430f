"""Reads and writes protobuf's wire format, as far as ONNX files need it.

A message is a sequence of fields. A field has a tag (number and wire type) and a value, which may be another message.
Fields may repeat.
Reference: https://protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

__all__ = ["BYTES", "VARINT", "Message", "Value", "iterate_fields", "read_varint", "varint"]

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


class Message:
    """A message as a list of fields, to read and rebuild. It does not copy the original's values."""

    def __init__(self, fields: list[tuple[int, int, Value]]) -> None:
        self._fields = fields

    @classmethod
    def parse(cls, data: Value) -> Message:
        """Parses a message.

        Raises:
            ValueError: the bytes are not a message.
        """
        if isinstance(data, Message):
            return data
        view = memoryview(data)
        return cls([(number, wire, view[value:end]) for number, wire, _, value, end in iterate_fields(view)])

    @classmethod
    def of(cls, fields: Mapping[int, Iterable[int | str | Value]]) -> Message:
        """Makes a message of fields. An int becomes a varint; other values have a length."""
        return cls([_field(number, value) for number, values in fields.items() for value in values])

    def values(self, number: int) -> list[Value]:
        """The values of a field, in order."""
        return [value for found, _, value in self._fields if found == number]

    def text(self, number: int) -> str:
        """The value of a text field; empty if the field is missing."""
        return next(iter(self.texts(number)), "")

    def texts(self, number: int) -> list[str]:
        """The values of a repeated text field."""
        return [str(value, "utf-8") for value in self.values(number) if not isinstance(value, Message)]

    def data(self, number: int) -> bytes:
        """The concatenated bytes of a field's values: its fixed-size numbers, packed or not."""
        return b"".join(value for value in self.values(number) if not isinstance(value, Message))

    def integers(self, number: int) -> list[int]:
        """The values of a number field, packed or not."""
        found = []
        for value in self.values(number):
            at = 0
            while not isinstance(value, Message) and at < len(value):
                one, at = read_varint(memoryview(value), at)
                found.append(one)
        return found

    def replacing(self, changes: Mapping[int, Iterable[int | str | Value]]) -> Message:
        """Replaces the values of some fields. They go to the field's first position, or to the end."""
        left = dict(changes)
        fields = []
        for number, wire, value in self._fields:
            if number not in changes:
                fields.append((number, wire, value))
            elif number in left:
                fields += [_field(number, new) for new in left.pop(number)]
        return Message([*fields, *(_field(number, new) for number, values in left.items() for new in values)])

    def encode(self) -> bytes:
        """The bytes of the message."""
        return b"".join(self._pieces())

    def _pieces(self) -> list[bytes | memoryview]:
        pieces: list[bytes | memoryview] = []
        for number, wire, value in self._fields:
            inner = value._pieces() if isinstance(value, Message) else [value]
            pieces.append(varint(number << 3 | wire))
            if wire == BYTES:
                pieces.append(varint(sum(map(len, inner))))
            pieces += inner
        return pieces


Value = bytes | memoryview | Message


def _field(number: int, value: int | str | Value) -> tuple[int, int, Value]:
    if isinstance(value, int):
        return number, VARINT, varint(value)
    return number, BYTES, value.encode() if isinstance(value, str) else value


def iterate_fields(message: memoryview) -> Iterator[tuple[int, int, int, int, int]]:
    """Yields each field's number and wire type, and the positions of its tag, its value and its end.

    Raises:
        ValueError: the bytes are not a message.
    """
    at = 0
    while at < len(message):
        start = at
        tag, at = read_varint(message, at)
        number, wire = tag >> 3, tag & 7
        size = {FIXED64: 8, FIXED32: 4}.get(wire)
        if wire == BYTES:
            size, at = read_varint(message, at)
        elif wire == VARINT:
            size = read_varint(message, at)[1] - at
        if not number or size is None or at + size > len(message):
            raise ValueError(f"not an ONNX file, or a damaged one (at byte {start} of a message)")
        yield number, wire, start, at, at + size
        at += size


def read_varint(message: memoryview, at: int) -> tuple[int, int]:
    """Reads an unsigned number at a position, and returns it with the position after it."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            break
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("not an ONNX file, or a damaged one (a number has no end)")


def varint(value: int) -> bytes:
    """Encodes a non-negative number."""
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
