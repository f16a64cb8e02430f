"""Marks rows on a map: suspicious labels, duplicates, or any list of paths in a CSV file."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from robustfeat.errors import InputError
from robustfeat.progress import Progress
from robustfeat.serving.collections.directions import Directions
from robustfeat.serving.collections.duplicates import find_duplicates
from robustfeat.serving.collections.thresholds import default_threshold
from robustfeat.serving.heads.cells import unquote_cell
from robustfeat.serving.heads.features import Features
from robustfeat.serving.inputs.sources import printable

__all__ = ["Layer", "duplicates_layer", "read_layer", "suspects_of"]


@dataclass(frozen=True, eq=False)
class Layer:
    """Marked points.

    Attributes:
        name: the name.
        rows: (m,) int32 points, ascending.
        groups: (m,) int32 groups, whose points are linked; None without groups.
        texts: a text per point; empty without texts.
        note: an explanation in a sentence.
    """

    name: str
    rows: NDArray[np.int32]
    groups: NDArray[np.int32] | None = None
    texts: tuple[str, ...] = ()
    note: str = ""

    def take(self, numbers: dict[int, int]) -> Layer:
        """The layer of some of the points: `numbers` has their new numbers."""
        kept = [at for at, row in enumerate(self.rows.tolist()) if row in numbers]
        rows = np.array([numbers[int(self.rows[at])] for at in kept], np.int32)
        groups = None if self.groups is None else self.groups[kept]
        return Layer(self.name, rows, groups, tuple(self.texts[at] for at in kept) if self.texts else (), self.note)


def read_layer(name: str, file: str, paths: Sequence[str]) -> tuple[Layer, int]:
    """Reads a layer from a CSV file with a column `path`, and counts the lines that name no point.

    A column `group` links points. The other columns become the texts.

    Raises:
        InputError: the file cannot be read, or has no column `path`.
    """
    index = {path: row for row, path in enumerate(paths)}
    found: dict[int, tuple[str, str]] = {}
    missing = 0
    try:
        with open(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as handle:
            reader = csv.DictReader(handle)
            columns = list(reader.fieldnames or ())
            if "path" not in columns:
                listed = ", ".join(columns) or "none"
                raise InputError(f"{file}: has the columns {listed}; expected a column path")
            others = [column for column in columns if column not in {"path", "group"}]
            for record in reader:
                row = index.get(unquote_cell(record["path"] or ""))
                if row is None:
                    missing += 1
                    continue
                said = ", ".join(f"{column} {unquote_cell(record[column] or '')}" for column in others)
                found[row] = (record.get("group") or "", said)
    except (OSError, UnicodeError, csv.Error) as exc:
        raise InputError(f"{file}: cannot be read ({exc})", fix="pass a CSV file with a column path") from exc
    rows = sorted(found)
    numbers = {group: at for at, group in enumerate(sorted({found[row][0] for row in rows}))}
    groups = np.array([numbers[found[row][0]] for row in rows], np.int32) if "group" in columns else None
    texts = tuple(found[row][1] for row in rows) if others else ()
    return Layer(name, np.array(rows, np.int32), groups, texts), missing


def suspects_of(head: str) -> str | None:
    """The file of suspicious labels that `svm fit` wrote beside a head; None if it is missing."""
    file = Path(head) / "suspects.csv"
    return str(file) if file.is_file() else None


def duplicates_layer(
    features: Features, rows: NDArray[np.int64], cosine: float | None, *, threads: int = 1, quiet: bool = False
) -> Layer:
    """Marks groups of near-duplicates among `rows`; see `find_duplicates`.

    Args:
        features: the collection.
        rows: rows on the map.
        cosine: smallest cosine of duplicates, above 0 and at most 1; None for `default_threshold`.
        threads: number of threads.
        quiet: hide progress.
    """
    if cosine is None:
        cosine, _ = default_threshold(features)
    progress = Progress("duplicates", len(rows), quiet=quiet)
    found = find_duplicates(Directions(features), cosine, rows, threads=threads, progress=progress)
    progress.finish()
    kept = found.kept[rows]
    _, numbers, sizes = np.unique(kept, return_inverse=True, return_counts=True)
    members = np.flatnonzero((sizes[numbers] > 1) & (kept >= 0))
    texts = []
    for at in members:
        row, first = int(rows[at]), int(kept[at])
        if row == first:
            texts.append(f"{sizes[numbers[at]] - 1:,} of this one")
        else:
            texts.append(f"of {printable(features.paths[first])}, cosine {found.cosines[row]:.4f}")
    return Layer(
        "duplicates",
        rows[members].astype(np.int32),
        numbers[members].astype(np.int32),
        tuple(texts),
        f"Images whose features have a cosine of {cosine:g} or more.",
    )
