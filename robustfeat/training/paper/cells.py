"""Finished parts of a report: a small JSON file each, so that machines and days add up and a kill costs one part."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustfeat.files import new_file

__all__ = ["BusyError", "Cells", "held", "pack", "unpack"]

_FORMAT_VERSION = 1


class BusyError(Exception):
    """Another process is at work on this part of the report."""


@contextmanager
def held(lock: Path, *, wait: bool) -> Iterator[None]:
    """Keeps other processes that do the same from a part of a report.

    Args:
        lock: an empty file, which is made and stays.
        wait: for another process to come to its end.

    Raises:
        BusyError: another process is at it, and `wait` is False.
    """
    import fcntl

    lock.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise BusyError(str(lock)) from None
        yield


class Cells:
    """Results by name, each with what it was computed from.

    Args:
        folder: of the files; made when the first is written.
        locks: a folder for locks.

    Attributes:
        wait: for other processes that compute the same; otherwise `BusyError` is raised.
    """

    def __init__(self, folder: Path, locks: Path) -> None:
        self._folder, self._locks = folder, locks
        self.wait = True

    def get(self, name: str, inputs: Mapping[str, Any], compute: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
        """The values of a cell: from its file if that has the same inputs, else computed and written.

        Args:
            name: of the file.
            inputs: plain data; everything that decides the values.
            compute: gives the values, plain data.

        Raises:
            BusyError: see `wait`.
        """
        file = self._folder / f"{name}.json"
        key = {"format_version": _FORMAT_VERSION, "inputs": json.loads(json.dumps(inputs))}
        if (known := _values(file, key)) is not None:
            return known
        with held(self._locks / f"{name}.lock", wait=self.wait):
            if (known := _values(file, key)) is not None:  # by whom we waited for
                return known
            values = dict(compute())
            self._folder.mkdir(parents=True, exist_ok=True)
            with new_file(file) as partial:
                partial.write_text(json.dumps({**key, "values": values}, indent=1) + "\n", "utf-8")
        return values


def _values(file: Path, key: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What a cell's file holds; None where it is missing, damaged, or of other inputs."""
    try:
        known = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    if isinstance(known, dict) and isinstance(known.get("values"), dict) and key.items() <= known.items():
        values: Mapping[str, Any] = known["values"]
        return values
    return None


def pack(right: NDArray[np.bool_]) -> str:
    """(m,) bool as text."""
    return f"{len(right)}:{np.packbits(right).tobytes().hex()}"


def unpack(text: str) -> NDArray[np.bool_]:
    """The inverse of `pack`."""
    count, _, digits = text.partition(":")
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(digits), np.uint8), count=int(count))
    right: NDArray[np.bool_] = bits.astype(bool)
    return right
