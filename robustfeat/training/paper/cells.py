"""Finished parts of a report: a small JSON file each, so that machines and days add up and a kill costs one part."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustfeat.files import new_file

__all__ = ["Cells", "pack", "unpack"]

_FORMAT_VERSION = 1


class Cells:
    """Results by name, each with what it was computed from.

    Args:
        folder: of the files; made when the first is written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, name: str, inputs: Mapping[str, Any], compute: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
        """The values of a cell: from its file if that has the same inputs, else computed and written.

        Args:
            name: of the file.
            inputs: plain data; everything that decides the values.
            compute: gives the values, plain data.
        """
        file = self._folder / f"{name}.json"
        key = {"format_version": _FORMAT_VERSION, "inputs": json.loads(json.dumps(inputs))}
        try:
            known = json.loads(file.read_text("utf-8"))
            if isinstance(known, dict) and isinstance(known.get("values"), dict) and key.items() <= known.items():
                values: Mapping[str, Any] = known["values"]
                return values
        except (OSError, ValueError):
            pass  # missing or damaged: computed
        values = dict(compute())
        self._folder.mkdir(parents=True, exist_ok=True)
        with new_file(file) as partial:
            partial.write_text(json.dumps({**key, "values": values}, indent=1) + "\n", "utf-8")
        return values


def pack(right: NDArray[np.bool_]) -> str:
    """(m,) bool as text."""
    return f"{len(right)}:{np.packbits(right).tobytes().hex()}"


def unpack(text: str) -> NDArray[np.bool_]:
    """The inverse of `pack`."""
    count, _, digits = text.partition(":")
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(digits), np.uint8), count=int(count))
    right: NDArray[np.bool_] = bits.astype(bool)
    return right
