"""Stores finished parts of a report as small JSON files, so a kill loses one part and machines can share the work."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from robustfeat.errors import InputError
from robustfeat.files import new_file
from robustfeat.training.paper.locks import Locks
from robustfeat.training.recipe import Recipe

__all__ = ["Cells"]

_VERSIONS = {
    "held-out": 2, "folds": 1, "svm": 2, "opinions": 3, "corruptions": 2, "finetune": 2, "steps": 2, "concepts": 2,
}  # fmt: skip
"""Versions by kind of cell, raised whenever a change of code changes the contents of such cells."""
_EARLIER = {kind: tuple(range(1, version)) for kind, version in _VERSIONS.items()}
"""Earlier versions by kind that are shown as they are. They lack the accuracies of their run. In the first `opinions`,
LIBSVM had LinearSVC's C and scaling."""


class Cells:
    """Results by name, each with what it was computed from.

    Args:
        folder: folder of the files, created with the first file.
        locks: with other processes.
    """

    def __init__(self, folder: Path, locks: Locks) -> None:
        self._folder, self._locks = folder, locks

    def get(
        self, kind: str, name: str, inputs: Mapping[str, Any], compute: Callable[[], Mapping[str, Any]]
    ) -> Mapping[str, Any]:
        """The values of a cell: from its file if that has the same inputs, else computed and written.

        Args:
            kind: the measurement, first part of the file's name.
            name: the subject, second part of the file's name.
            inputs: plain data; everything that decides the values, but for the code.
            compute: gives the values, plain data.

        Raises:
            BusyError: another process computes it, and `locks.wait` is not set.
            InputError: the file has the result of other inputs.
        """
        if (known := self.known(kind, name, inputs)) is not None:
            return known
        file = self._folder / f"{kind}-{name}.json"
        with self._locks.held(file.stem):
            if (known := self.known(kind, name, inputs)) is not None:  # by whom we waited for
                return known
            values: dict[str, Any] = json.loads(json.dumps(dict(compute())))
            self._folder.mkdir(parents=True, exist_ok=True)
            with new_file(file) as partial:
                cell = {**_key(kind, inputs), "values": values, "sha256": _digest(values)}
                partial.write_text(json.dumps(cell, indent=1) + "\n", "utf-8")
        return values

    def known(self, kind: str, name: str, inputs: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """The values of a cell like `get`, or None if they would have to be computed.

        Raises:
            InputError: the file has the result of other inputs.
        """
        return _values(self._folder / f"{kind}-{name}.json", _key(kind, inputs), _EARLIER[kind])


def _key(kind: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The required contents of a cell's file, besides its values."""
    return {"version": _VERSIONS[kind], "inputs": json.loads(json.dumps(inputs))}


def _values(file: Path, key: Mapping[str, Any], earlier: tuple[int, ...]) -> Mapping[str, Any] | None:
    """The contents of a cell's file; None if it is missing, damaged, or of older code than `earlier` versions."""
    try:
        known = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(known, dict) or known.get("version") not in {key["version"], *earlier}:
        return None
    values, inputs = known.get("values"), known.get("inputs")
    if not isinstance(values, dict) or not isinstance(inputs, dict) or known.get("sha256") != _digest(values):
        return None
    inputs = {**inputs, **_with_new_keys(inputs.get("recipe"))}
    if changed := [name for name in sorted({*inputs, *key["inputs"]}) if inputs.get(name) != key["inputs"].get(name)]:
        raise InputError(
            f"{file}: is the result of another {' and '.join(changed)}",
            fix="move the folder away, or choose another `out`",
        )
    found: Mapping[str, Any] = values
    return found


def _with_new_keys(recipe: Any) -> dict[str, Any]:
    """The recipe of a cell, where it has one: keys that are newer than the cell have their defaults."""
    if not isinstance(recipe, dict):
        return {}
    try:
        return {"recipe": json.loads(json.dumps(Recipe.from_dict(recipe).to_dict()))}
    except InputError:
        return {}  # newer code wrote it, so compare it as it is


def _digest(values: Mapping[str, Any]) -> str:
    """Tells whether values are those that were written."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
