"""Keeps the finished trials of a selection in a file, from which an interrupted one resumes."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustfeat.files import new_file
from robustfeat.serving.bulk.stacked import Rows
from robustfeat.serving.heads.features import CHUNK_ROWS

__all__ = ["Candidate", "Trials", "fingerprint_rows"]


@dataclass(frozen=True)
class Candidate:
    """A finished trial.

    Attributes:
        scaling: one of `SCALINGS`.
        c: None for kinds without C.
        score: accuracy on held-out rows, or the mean F1 over labels with several labels per row. NaN without such rows.
        error: the standard error of the score over folds; NaN for a single part.
        converged: whether the solver converged.
    """

    scaling: str
    c: float | None
    score: float
    error: float
    converged: bool


class Trials:
    """The candidates of one selection.

    Args:
        file: the file; candidates of another selection in it are discarded. None keeps nothing.
        fingerprint: identifies everything that affects the scores.
    """

    def __init__(self, file: Path | None = None, fingerprint: str = "") -> None:
        self._file, self._fingerprint = file, fingerprint
        self._known = {(one.scaling, one.c): one for one in self._read()}

    def __len__(self) -> int:
        return len(self._known)

    def get(self, scaling: str, c: float | None) -> Candidate | None:
        """The candidate with this setting, if it was tried."""
        return self._known.get((scaling, c))

    def add(self, candidate: Candidate) -> None:
        """Adds a candidate."""
        self._known[candidate.scaling, candidate.c] = candidate
        if self._file is not None:
            content = {"fingerprint": self._fingerprint, "tried": [asdict(one) for one in self._known.values()]}
            with new_file(self._file) as partial:
                partial.write_text(json.dumps(content))

    def _read(self) -> list[Candidate]:
        if self._file is None or not self._file.is_file():
            return []
        try:
            content = json.loads(self._file.read_text())
            return [_candidate(one) for one in content["tried"]] if content["fingerprint"] == self._fingerprint else []
        except (OSError, ValueError, KeyError, TypeError, RecursionError):  # missing or invalid: try again
            return []


def _candidate(values: dict[str, Any]) -> Candidate:
    """Reads a candidate from JSON.

    Raises:
        TypeError: the value is not a candidate.
    """
    one = Candidate(**values)
    numbers = [one.score, one.error, 0.0 if one.c is None else one.c]
    if not isinstance(one.scaling, str) or any(type(number) not in {int, float} for number in numbers):
        raise TypeError("a candidate has a scaling and numbers")
    return one


def fingerprint_rows(values: Rows, rows: NDArray[np.int64], targets: NDArray[Any], settings: Any) -> str:
    """sha256 of features, labels and settings."""
    digest = hashlib.sha256(json.dumps([values.shape, str(values.dtype), settings]).encode())
    for array in (rows, targets):
        digest.update(np.ascontiguousarray(array).data.cast("B"))
    for start in range(0, len(values), CHUNK_ROWS):
        digest.update(np.ascontiguousarray(values[start : start + CHUNK_ROWS]).data.cast("B"))
    return digest.hexdigest()
