"""`Cell`: a label where it stands in a file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from robustfeat.errors import InputError

__all__ = ["Cell", "is_missing", "paths_without_names"]


_MISSING = {"NA", "N/A", "#N/A", "<NA>", "NaN", "nan", "NULL", "null"}
"""What R, pandas and databases write where a label is missing."""


@dataclass(frozen=True)
class Cell:
    """A label.

    Attributes:
        place: where it stands, for messages.
        path: of its image; empty where there is none.
        value: as the file has it; None where it is missing.
    """

    place: str
    path: str
    value: Any


def is_missing(text: str) -> bool:
    """Whether text says that there is no label."""
    return text in _MISSING


def paths_without_names(file: str, column: str) -> InputError:
    """The error of a file with paths where labels are in the order of rows without names."""
    what = f"{file}: has paths (column {column}), but the rows of the features have no names"
    return InputError(what, fix="pass `names=FILE` with the path of each row, or leave the column out")
