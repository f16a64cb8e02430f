"""Sorts a collection into images to keep and duplicates to drop, as lines to write."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from robustfeat.errors import InputError
from robustfeat.progress import Progress, json_line
from robustfeat.serving.collections.directions import Directions
from robustfeat.serving.collections.duplicates import Groups, find_duplicates
from robustfeat.serving.collections.keeping import Measures
from robustfeat.serving.heads.cells import csv_line
from robustfeat.serving.heads.features import Features
from robustfeat.serving.inputs.sources import path_fields

__all__ = ["Sorted", "Verdict", "drop_list", "sort_duplicates", "to_csv", "to_jsonl"]


@dataclass(frozen=True)
class Verdict:
    """The decision about one image with duplicates.

    Attributes:
        group: number of the group, from 1.
        row, path: the image in the collection.
        cosine: cosine to the kept image.
        action: keep or drop.
        kind: exact if the file has the kept file's bytes, else near; `kept` for the kept image.
    """

    group: int
    row: int
    path: str
    cosine: float
    action: Literal["keep", "drop"]
    kind: Literal["kept", "exact", "near"]


@dataclass(frozen=True)
class Sorted:
    """All decisions.

    Attributes:
        verdicts: decisions by group, the kept image first.
        groups, exact, near: number of groups, and of images to drop by kind.
        unread: number of images that could not be measured, so others were preferred.
        repeated: number of rows left out because an earlier row has the same path and bytes.
    """

    verdicts: Sequence[Verdict]
    groups: int
    exact: int
    near: int
    unread: int
    repeated: int


def sort_duplicates(
    features: Features,
    threshold: float,
    measure: Callable[[Sequence[str]], Measures] | None = None,
    *,
    threads: int = 1,
    progress: Progress | None = None,
) -> Sorted:
    """Groups the duplicates of a collection, and decides which to keep and which to drop.

    Files of the same bytes are duplicates, whatever their features. Failed rows are left out. So are rows with the path
    and the bytes of an earlier row, since they may be the same file, listed twice.

    Args:
        features: the collection.
        threshold: smallest cosine of near-duplicates.
        measure: returns the quality of images by path, larger is better. The best image of a group is kept, by default
            the first row.
        threads: number of processors for the search.
        progress: counts rows.
    """
    collection = Directions(features)
    good = np.flatnonzero(features.good)
    order = _without_repeats(features, good)
    if progress:
        progress.advance(len(good) - len(order))
    groups = _group(collection, threshold, order, threads, progress)
    unread = 0
    if measure:
        rows = np.flatnonzero(groups.involved)
        images = [(features.paths[row], _sha256(features, row)) for row in rows.tolist()]
        found = measure([path for path, _ in images])
        worst = (-np.inf, -1)
        merits = [found.get(image, worst) for image in images]
        unread = sum(merit is worst for merit in merits)
        best = sorted(range(len(rows)), key=lambda at: (-merits[at][0], -merits[at][1], at))
        groups = _group(collection, threshold, rows[np.array(best, np.int64)], threads, None)
    verdicts = _verdicts(features, groups)
    kinds = [one.kind for one in verdicts]
    counts = kinds.count("kept"), kinds.count("exact"), kinds.count("near")
    return Sorted(verdicts, *counts, unread, len(good) - len(order))


def _without_repeats(features: Features, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Removes rows with the path and the bytes of an earlier one."""
    first = _first_copies(features.hashes, rows)
    copies = np.flatnonzero(first != rows)
    files = {(row, features.paths[row]) for row in first[copies].tolist()}
    repeats = []
    for at in copies.tolist():
        file = int(first[at]), features.paths[int(rows[at])]
        if file in files:
            repeats.append(at)
        files.add(file)
    return np.delete(rows, repeats)


def _sha256(features: Features, row: int) -> bytes | None:
    """The sha256 of a row's image file; None if unknown."""
    if features.hashes is None or not features.hashes[row].any():
        return None
    return bytes(features.hashes[row])


def _group(
    collection: Directions, threshold: float, order: NDArray[np.int64], threads: int, progress: Progress | None
) -> Groups:
    """Groups rows, given in the order of preference. Of files with the same bytes, only the first is compared."""
    first = _first_copies(collection.features.hashes, order)
    different = order[first == order]
    groups = find_duplicates(collection, threshold, different, threads=threads, progress=progress)
    if progress:
        progress.advance(len(order) - len(different))
    copies, originals = order[first != order], first[first != order]
    groups.involved[copies] = groups.involved[originals] = True
    groups.kept[copies] = groups.kept[originals]
    groups.cosines[copies] = collection.pairs(copies, groups.kept[copies])
    return groups


def _first_copies(hashes: NDArray[np.uint8] | None, order: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each row, the first row whose file has the same bytes."""
    if hashes is None or not len(order):
        return order
    chosen = np.ascontiguousarray(hashes[order]).view("V32")[:, 0]
    _, first, place = np.unique(chosen, return_index=True, return_inverse=True)
    known = hashes[order].any(1)
    return np.where(known, order[first[place]], order)


def _verdicts(features: Features, groups: Groups) -> list[Verdict]:
    members = np.flatnonzero((groups.kept >= 0) & (groups.kept != np.arange(len(features))))
    kept = np.unique(groups.kept[members])
    rows = np.concatenate([kept, members])
    leaders = np.concatenate([kept, groups.kept[members]])
    verdicts = []
    for at in np.lexsort((rows, rows != leaders, leaders)):
        row, leader = int(rows[at]), int(leaders[at])
        number = int(np.searchsorted(kept, leader)) + 1
        path = features.paths[row]
        if row == leader:
            verdicts.append(Verdict(number, row, path, 1.0, "keep", "kept"))
        else:
            kind: Literal["exact", "near"] = "exact" if _same_file(features.hashes, row, leader) else "near"
            verdicts.append(Verdict(number, row, path, float(groups.cosines[row]), "drop", kind))
    return verdicts


def _same_file(hashes: NDArray[np.uint8] | None, row: int, other: int) -> bool:
    return hashes is not None and bool(hashes[row].any() and (hashes[row] == hashes[other]).all())


def to_csv(verdicts: Iterable[Verdict]) -> Iterator[str]:
    """Yields a CSV header and one line per image: group, row, path, cosine, action, kind."""
    yield csv_line(["group", "row", "path", "cosine", "action", "kind"])
    for one in verdicts:
        yield csv_line([one.group, one.row, one.path, one.cosine, one.action, one.kind])


def to_jsonl(verdicts: Iterable[Verdict]) -> Iterator[str]:
    """Yields one JSON object per image with the same names."""
    for one in verdicts:
        fields = {"group": one.group, "row": one.row, **path_fields(one.path), "cosine": one.cosine}
        yield json_line({**fields, "action": one.action, "kind": one.kind}) + "\n"


def drop_list(verdicts: Iterable[Verdict], features: Features, *, null: bool = False) -> Iterator[str]:
    """The paths to drop, one per line or each followed by NUL. All paths are checked first.

    Raises:
        InputError: an image to keep has the path of an image to drop; or a path has a line break, and the lines do not
            end in NUL.
    """
    dropped = [one for one in verdicts if one.action == "drop"]
    _require_own_paths(dropped, features)
    for one in dropped:
        if not null and "\n" in one.path:
            raise InputError(f"{one.path!r}: a path with a line break needs lines that end in NUL", fix="pass `null`")
    return (one.path + ("\0" if null else "\n") for one in dropped)


def _require_own_paths(dropped: Sequence[Verdict], features: Features) -> None:
    """Refuses a path of two images. Paths are relative to the embedded folders, so two folders may share one."""
    rows = {one.path: one.row for one in dropped}
    files = {(one.path, _sha256(features, one.row)) for one in dropped}
    numbers = {one.row for one in dropped}
    for row, path in enumerate(features.paths):
        if path not in rows or row in numbers:
            continue
        sha256 = _sha256(features, row)
        if sha256 is None or (path, sha256) not in files:
            raise InputError(
                f"{path!r}: is the path of row {rows[path]}, which is to drop, and of row {row}, which is not",
                fix="embed one folder with all images, so each has its own path",
            )
