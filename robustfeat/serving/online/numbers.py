"""Reads long arrays of numbers in JSON in small steps, between which a server handles other requests.

The input of a network is millions of numbers as text. Reading them at once would block a worker for a second.
"""

from __future__ import annotations

import math
import re
import secrets
from collections.abc import Generator, Sequence
from typing import TypeVar

import numpy as np
import orjson
from numpy.typing import NDArray

__all__ = ["LongArray", "finish", "set_aside", "set_aside_in_turns"]

Result = TypeVar("Result")

_DATA = re.compile(rb'"data"\s*:\s*(?=\[)')
_NUMBERS = b"0123456789+-.eE \t\r\n"
_OTHER = re.compile(rb"[^0-9+\-.eE \t\r\n\[\],]")
_BLANK = bytes.maketrans(b"[]", b"  ")
_LONG_BYTES = 2**18
"""Smallest array to read in steps, in bytes. Shorter ones take milliseconds with the rest of the request."""
_SLICE_BYTES = 2**16
_SCAN_BYTES = 2**20


class LongArray:
    """The text of an array of numbers within a request.

    Args:
        body: the request.
        start, end: positions of the array's start and end.
    """

    def __init__(self, body: bytes, start: int, end: int) -> None:
        self._body, self._start, self._end = body, start, end

    def read(self, shape: Sequence[int]) -> Generator[None, None, NDArray[np.float32]]:
        """Reads the numbers of a flat or nested array. Yields after each slice.

        Returns:
            float32 of that shape. Numbers beyond float32 are infinite.

        Raises:
            ValueError: the array does not have `math.prod(shape)` numbers, or is nested in another way.
        """
        body, at, filled, marked = self._body, self._start, 0, 0
        count = math.prod(shape)
        commas = 0
        for first in range(at, self._end, _SCAN_BYTES):
            commas += body.count(b",", first, min(first + _SCAN_BYTES, self._end))
            yield
        if commas != count - 1:
            raise ValueError(f"there are not {count:,} numbers")
        values = np.empty(count, np.float32)
        structures = [b"[" + b"," * (count - 1) + b"]", _nested(shape)]
        while at < self._end:
            stop = body.find(b",", at + _SLICE_BYTES, self._end)
            stop = self._end if stop < 0 else stop
            piece = body[at:stop]
            marks = piece.translate(None, _NUMBERS) + (b"," if stop < self._end else b"")
            structures = [known for known in structures if known[marked : marked + len(marks)] == marks]
            # Follow JSON's rules for numbers: no 01, no nan, no spaces inside.
            part = np.asarray(orjson.loads(b"[" + piece.translate(_BLANK) + b"]"))
            if not structures or part.dtype.kind not in "iuf" or len(part) != piece.count(b",") + 1:
                raise ValueError("they are nested in another way")
            with np.errstate(over="ignore"):
                values[filled : filled + len(part)] = part
            filled, marked, at = filled + len(part), marked + len(marks), stop + 1
            yield
        if all(len(known) != marked for known in structures):
            raise ValueError("an array among them has no end")
        return values.reshape(shape)


def _nested(shape: Sequence[int]) -> bytes:
    """The brackets and commas of nested arrays."""
    marks = b""
    for size in reversed(shape):
        marks = b"[" + b",".join([marks] * size) + b"]"
    return marks


def finish(steps: Generator[None, None, Result]) -> Result:
    """Runs a generator without pauses, and returns its result."""
    while True:
        try:
            next(steps)
        except StopIteration as done:
            result: Result = done.value
            return result


def set_aside(body: bytes) -> tuple[bytes, str, LongArray] | None:
    """Runs `set_aside_in_turns` without pauses."""
    return finish(set_aside_in_turns(body))


def set_aside_in_turns(body: bytes) -> Generator[None, None, tuple[bytes, str, LongArray] | None]:
    """Takes a long array of numbers under the key `data` out of a JSON body. Yields after each MiB.

    Returns:
        The body with an array of one unguessable text instead, that text, and the array. None if the first `data` is
        not a long array of numbers.
    """
    match = _DATA.search(body)
    if match is None or len(body) - match.end() < _LONG_BYTES:
        return None
    start = stop = match.end()
    while stop < len(body):
        chunk = body[stop : stop + _SCAN_BYTES]
        if chunk.translate(None, _NUMBERS + b"[],"):  # several times as fast as a regular expression
            other = _OTHER.search(chunk)
            assert other is not None
            stop += other.start()
            break
        stop += len(chunk)
        yield
    end = body.rfind(b"]", start, stop) + 1
    if end - start < _LONG_BYTES or body[end:stop].strip(b", \t\r\n"):
        return None
    token = "\0" + secrets.token_hex(16)
    return body[:start] + orjson.dumps([token]) + body[end:], token, LongArray(body, start, end)
