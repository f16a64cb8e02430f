"""Reads the paths of an output from its index files on demand, since they may not fit into memory."""

from __future__ import annotations

import json
import mmap
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from robustfeat.serving.inputs.remote import is_remote
from robustfeat.serving.inputs.sources import path_of_index

__all__ = ["IndexPaths"]

_EVERY = 64
"""Rows between two stored positions in the file, which takes 1 byte of memory per 8 rows."""

_USUAL = re.compile(rb'\{"row": [0-9]+, "path": "([^"\\]*)", "sha256": ')
"""A line whose path is text without escapes, which needs no JSON parser."""


class IndexPaths(Sequence[str]):
    """The path of each row, (n,). The index files stay mapped.

    Args:
        files: the open index files in order, with one line per row.
        place: the place of the output. Remote files are copied to this machine.
    """

    def __init__(self, files: Sequence[Any], place: str) -> None:
        parts = [_Part(file, is_remote(place)) for file in files]
        self._parts = [part for part in parts if part.rows]
        self._starts = np.cumsum([0, *(part.rows for part in self._parts)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __iter__(self) -> Iterator[str]:
        return self._from(0)

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> list[str]: ...
    def __getitem__(self, row: int | slice) -> str | list[str]:
        if isinstance(row, slice):
            return [self[at] for at in range(*row.indices(len(self)))]
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        return next(self._from(row % len(self)))

    def _from(self, row: int) -> Iterator[str]:
        first = int(np.searchsorted(self._starts, row, side="right")) - 1
        for number, part in enumerate(self._parts[first:], first):
            yield from map(_path, part.lines(max(0, row - int(self._starts[number]))))


class _Part:
    """The lines of one index file."""

    def __init__(self, file: Any, copy: bool) -> None:
        file.seek(0)
        if copy:
            with tempfile.TemporaryFile(prefix="robustfeat-") as here:
                shutil.copyfileobj(file, here)
                here.seek(0)
                self._marks, self.rows = _scan(here)
                self._map = _map(here)
        else:
            self._marks, self.rows = _scan(file)
            self._map = _map(file)

    def lines(self, first: int) -> Iterator[bytes]:
        """Yields the lines from `first` on."""
        skip = first % _EVERY
        for at in range(first // _EVERY, len(self._marks) - 1):
            # Avoid `readline`, which moves the position, since several threads may read.
            yield from self._map[self._marks[at] : self._marks[at + 1]].splitlines()[skip:]
            skip = 0


def _scan(file: Any) -> tuple[NDArray[np.int64], int]:
    """The positions of every 64th line and of the end, and the number of lines."""
    marks, at, row = [], 0, -1
    for row, line in enumerate(file):
        if row % _EVERY == 0:
            marks.append(at)
        at += len(line)
    return np.array([*marks, at], np.int64), row + 1


def _map(file: Any) -> mmap.mmap | bytes:
    file.seek(0, 2)
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if file.tell() else b""


def _path(line: bytes) -> str:
    usual = _USUAL.match(line)
    return usual[1].decode() if usual and b'"path_bytes"' not in line else path_of_index(json.loads(line))
