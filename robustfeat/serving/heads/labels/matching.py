"""Matches labels with rows of features or with images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustfeat.counts import format_count
from robustfeat.errors import InputError
from robustfeat.serving.heads.features import Features
from robustfeat.serving.heads.labels.labels import Labels, Unlabelled
from robustfeat.serving.inputs.input_list import InputList

__all__ = ["LabelledRows", "labelled_inputs", "match_labels", "match_paths"]


@dataclass(frozen=True, eq=False)
class LabelledRows:
    """Rows of features that have labels.

    Attributes:
        rows: (m,) int64, ascending.
        targets: (m,) int64 into `classes`, or (m, K) bool with several labels per row.
        classes: K names, sorted.
        failed: number of labelled rows that were left out because their images failed.
        unlabelled: count of the rows without a label.
        missing: labelled paths without a row.
        repeated: see `Labels`.
    """

    rows: NDArray[np.int64]
    targets: NDArray[Any]
    classes: tuple[str, ...]
    failed: int
    unlabelled: Unlabelled
    missing: tuple[str, ...]
    repeated: int = 0

    def summary(self) -> str:
        """The counts as one line."""
        parts = [f"{format_count(len(self.rows), 'labelled row')} of {format_count(len(self.classes), 'class')}"]
        if self.failed:
            parts.append(f"{self.failed:,} more left out because of failed images")
        if self.unlabelled.count:
            parts.append(self.unlabelled.summary("rows"))
        if self.repeated:
            parts.append(f"{format_count(self.repeated, 'label')} given twice")
        if self.missing:
            parts.append(self.missing_summary())
        return "; ".join(parts)

    def missing_summary(self) -> str:
        """The number of labels without a row, and one of them; there must be one."""
        return f"{format_count(len(self.missing), 'label')} without a row, such as {self.missing[0]}"


def match_labels(
    features: Features, labels: Labels, *, multi_label: bool = False, classes: Sequence[str] | None = None
) -> LabelledRows:
    """Matches labels with features, which are read once to check that they are finite.

    Raises:
        InputError: see `match_paths`, or a row is not finite.
    """
    found = match_paths(
        features.place, features.paths, labels, errors=features.errors, multi_label=multi_label, classes=classes
    )
    features.check()
    return found


def match_paths(
    place: str,
    paths: Sequence[str],
    labels: Labels,
    *,
    errors: Mapping[int, str] | None = None,
    multi_label: bool = False,
    classes: Sequence[str] | None = None,
) -> LabelledRows:
    """Finds the rows that have labels.

    Args:
        place: the rows' place for messages.
        paths: paths of the rows.
        labels: labels from `read_labels`.
        errors: failed rows.
        multi_label: see `read_labels`.
        classes: the accepted classes; by default all that occur.

    Raises:
        InputError: two rows have the same labelled path, no labelled row is left, or a label is unknown.
    """
    labels = labels.matched(paths)
    rows: list[int] = []
    kept: list[tuple[str, ...]] = []
    failed, unlabelled = 0, Unlabelled(labels)
    seen: dict[str, int] = {}
    for row, path in enumerate(paths):
        found = labels.of(path)
        if found is None:
            unlabelled.add(path)
            continue
        key = str(labels.key(path))
        if key in seen:
            raise InputError(
                f"{place}: rows {seen[key]} and {row} have the same path, {path}, so its label is ambiguous",
                fix="embed one folder above both",
            )
        seen[key] = row
        if row in (errors or {}):
            failed += 1
        else:
            rows.append(row)
            kept.append(found)
    if not rows:
        raise _nothing_labelled(place, paths, labels, failed)
    names = tuple(classes) if classes is not None else tuple(sorted({label for found in kept for label in found}))
    targets = _number(kept, names, [paths[row] for row in rows], labels.source, multi_label=multi_label)
    missing = tuple(path for path in labels.by_path or () if path not in seen)
    return LabelledRows(np.array(rows, np.int64), targets, names, failed, unlabelled, missing, labels.repeated)


def _nothing_labelled(place: str, paths: Sequence[str], labels: Labels, failed: int) -> InputError:
    if failed:
        return InputError(
            f"{place}: {format_count(failed, 'labelled image')} failed, and there is no other", fix="see their errors"
        )
    if labels.by_path is None:
        return InputError(
            f"{paths[0]}: is in no class folder, like all others of {place}; expected CLASS/NAME within INPUT",
            fix="move them there, or pass a file of labels: `labels=FILE.csv` or `labels=FILE.parquet:COLUMN`",
        )
    there = next(iter(labels.by_path), "")
    return InputError(
        f"none of its {len(labels.by_path):,} paths is one of the {len(paths):,} rows of {place} "
        f"(there {there!r}, here {paths[0]!r})",
        argument="labels",
        value=labels.source,
        fix="write the paths as in the index, or such that each matches only one image",
    )


def _number(
    kept: Sequence[tuple[str, ...]], names: Sequence[str], paths: Sequence[str], source: str, *, multi_label: bool
) -> NDArray[Any]:
    """Converts the labels of each path to targets."""
    index = {name: number for number, name in enumerate(names)}
    for path, labels in zip(paths, kept, strict=True):
        for label in labels:
            if label not in index:
                listed = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
                what = f"{path} is labelled {label!r}, which is not one of the head's {len(names)} classes ({listed})"
                raise InputError(what, argument="labels", value=source)
    if not multi_label:
        return np.array([index[label] for label, *_ in kept], np.int64)
    targets = np.zeros((len(kept), len(names)), bool)
    for row, labels in enumerate(kept):
        targets[row, [index[label] for label in labels]] = True
    return targets


def labelled_inputs(inputs: InputList, labels: Labels) -> tuple[InputList, Unlabelled]:
    """The images with labels, and the count of the others."""
    labels = labels.matched(image.path for image in inputs)
    found, unlabelled = InputList(), Unlabelled(labels)
    for image in inputs:
        if labels.of(image.path) is None:
            unlabelled.add(image.path)
        else:
            found.append(image)
    return found, unlabelled
