"""Finds the files of the training and the validation split in a folder."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from robustfeat.errors import DataError

__all__ = ["VALIDATION_NAMES", "SplitFiles", "find_split_files"]

VALIDATION_NAMES = ("val", "validation", "valid", "dev", "test")

_FILE = re.compile(rf"(?P<split>train|{'|'.join(VALIDATION_NAMES)})-.*\.(?P<kind>parquet|tar)")
_COMPRESSED = re.compile(rf"(train|{'|'.join(VALIDATION_NAMES)})-.*\.(tgz|tbz2?|txz|tar\.\w+)", re.IGNORECASE)


@dataclass(frozen=True)
class SplitFiles:
    """The names of a training set's files.

    Attributes:
        kind: parquet or tar; Parquet where there are both.
        validation: may be empty.
    """

    kind: str
    train: tuple[str, ...]
    validation: tuple[str, ...]


def find_split_files(names: Iterable[str], place: str, parts: int | None = None) -> SplitFiles | None:
    """The files of a training set in a folder; None if there are none.

    Args:
        names: names of its files.
        place: the folder's name for messages.
        parts: only so many training files.

    Raises:
        DataError: it is a compressed one.
    """
    found: dict[tuple[str, str], list[str]] = {}
    compressed = None
    for name in sorted(names):
        if match := _FILE.fullmatch(name):
            found.setdefault((match["kind"], match["split"]), []).append(name)
        elif _COMPRESSED.fullmatch(name):
            compressed = compressed or name
    for kind in ("parquet", "tar"):
        if train := found.get((kind, "train")):
            if kind == "tar" and compressed:
                break
            splits = [found[kind, name] for name in VALIDATION_NAMES if (kind, name) in found]
            return SplitFiles(kind, tuple(train[:parts]), tuple(splits[0]) if splits else ())
    if compressed:
        raise DataError(
            f"{place}/{compressed}: images cannot be read at random out of a compressed archive",
            fix="unpack it to a .tar",
        )
    return None
