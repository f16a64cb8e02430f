"""Defines `Cell`, a label at its place in a file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from robustfeat.errors import InputError

__all__ = ["Cell", "is_missing", "paths_without_names"]


_MISSING = {"NA", "N/A", "#N/A", "<NA>", "NaN", "nan", "NULL", "null"}
"""Texts that R, pandas and databases write for a missing label."""


@dataclass(frozen=True)
class Cell:
    """A label.

    Attributes:
        place: file and line, for messages.
        path: the image's path; empty if the file has no paths.
        value: the value in the file; None for a missing label.
    """

    place: str
    path: str
    value: Any


def is_missing(text: str) -> bool:
    """Whether a text means a missing label."""
    return text in _MISSING


def paths_without_names(file: str, column: str) -> InputError:
    """The error for a file with paths when the rows have no names."""
    what = f"{file}: has paths (column {column}), but the rows of the features have no names"
    return InputError(what, fix="pass `names=FILE` with the path of each row, or leave the column out")
