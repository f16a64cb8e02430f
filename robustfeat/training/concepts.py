"""Concepts: which group of classes each class belongs to (Table 1 of the paper for ImageNet)."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources

import numpy as np
from numpy.typing import NDArray

from robustfeat.errors import DataError

__all__ = ["ConceptMap", "assign_concepts", "load_concepts"]


@dataclass(frozen=True)
class ConceptMap:
    """Each class's concept, for one training set.

    Attributes:
        names: the K concepts that have classes here, sorted.
        of_class: (C,) int64, the concept of each class.
        empty: concepts of the map without any class here; they are left out, since N / N_k would be infinite.
    """

    names: tuple[str, ...]
    of_class: NDArray[np.int64]
    empty: tuple[str, ...] = ()


def load_concepts(source: str) -> dict[str, str]:
    """Class to concept, from `imagenet11` (ImageNet's 1,000 wnids, Table 1) or a CSV with the header `class,concept`.

    Raises:
        DataError: the file is missing, has another header, or gives a class two concepts.
    """
    if source == "imagenet11":
        text = resources.files("robustfeat.training").joinpath("concept_maps/imagenet11.csv").read_text("utf-8")
    else:
        try:
            with open(source, encoding="utf-8-sig", newline="") as handle:
                text = handle.read()
        except (OSError, UnicodeDecodeError) as exc:
            reason = exc.strerror if isinstance(exc, OSError) else "not UTF-8"
            raise DataError(
                f"--concepts {source}: cannot be read ({reason}); "
                "expected imagenet11, classes, or a CSV file with the header class,concept"
            ) from exc
    rows = csv.reader(text.splitlines())
    header = [cell.strip() for cell in next(rows, [])]
    if header[:2] != ["class", "concept"]:
        raise DataError(
            f"--concepts {source}: the first line must be class,concept; got {','.join(header) or 'nothing'}"
        )
    concepts: dict[str, str] = {}
    for number, row in enumerate(rows, start=2):
        if not row:
            continue
        if len(row) < 2 or not row[0].strip() or not row[1].strip():
            raise DataError(f"--concepts {source}: line {number} needs a class and a concept; got {','.join(row)!r}")
        name, concept = row[0].strip(), row[1].strip()
        if concepts.setdefault(name, concept) != concept:
            raise DataError(f"--concepts {source}: line {number} gives class {name!r} a second concept, {concept!r}")
    return concepts


def assign_concepts(source: str, classes: Sequence[str], counts: NDArray[np.int64]) -> ConceptMap:
    """The concepts of a training set's classes.

    Args:
        source: `classes` (each class is a concept of its own) or what `load_concepts` takes. `imagenet11` also takes
            ImageNet's 1,000 classes as the Hub names them ("tench, Tinca tinca" first), or numbered from 0.
        classes: the C class names.
        counts: (C,) training examples of each class.

    Raises:
        DataError: a class has no concept.
    """
    mapping = {name: name for name in classes} if source == "classes" else load_concepts(source)
    if source == "imagenet11":
        mapping |= _concepts_by_position(mapping, classes)
    missing = [name for name in classes if name not in mapping]
    if missing:
        raise DataError(
            f"--concepts {source}: {len(missing)} of {len(classes)} classes have no concept, first {missing[0]!r}; "
            "add a line for each to a CSV file with the header class,concept, "
            "or pass --concepts classes to make each class its own concept"
        )
    used = sorted({mapping[name] for name, count in zip(classes, counts, strict=True) if count > 0})
    index = {concept: number for number, concept in enumerate(used)}
    # A class without examples never appears in a batch; any index serves.
    of_class = np.array([index.get(mapping[name], 0) for name in classes], np.int64)
    return ConceptMap(tuple(used), of_class, tuple(sorted(set(mapping.values()) - set(used))))


def _concepts_by_position(concepts: Mapping[str, str], classes: Sequence[str]) -> dict[str, str]:
    """The concepts of ImageNet's classes under other names: wnids, sorted, are its classes 0, 1, 2, ...

    Empty unless the classes are all of them, by number ("0" to "999", in any order) or in words (beginning with tench).
    """
    if len(classes) != len(concepts) or any(name in concepts for name in classes):
        return {}
    wnids = sorted(concepts)
    if set(classes) == {str(number) for number in range(len(wnids))}:
        return {name: concepts[wnids[int(name)]] for name in classes}
    if classes[0].lower().startswith("tench"):
        return {name: concepts[wnid] for name, wnid in zip(classes, wnids, strict=True)}
    return {}
