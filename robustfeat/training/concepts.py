"""Maps classes to concepts, groups of classes (Table 1 of the paper for ImageNet)."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources

import numpy as np
from numpy.typing import NDArray

from robustfeat.errors import DataError

__all__ = ["ConceptMap", "assign_concepts", "cluster_count", "load_concepts", "load_reference"]


@dataclass(frozen=True)
class ConceptMap:
    """Each class's concept, or each image's, for one training set.

    Attributes:
        names: the K concepts that have classes here, sorted.
        of_class: (C,) int64, the concept of each class.
        class_counts: (C,) int64, the training examples of each class.
        empty: concepts of the map without classes here. They are left out, since N / N_k would be infinite.
        of_image: (N,) int64, the concept of each image, where its class does not decide; `of_class` then has the
            commonest of each class.
    """

    names: tuple[str, ...]
    of_class: NDArray[np.int64]
    class_counts: NDArray[np.int64]
    empty: tuple[str, ...] = ()
    of_image: NDArray[np.int64] | None = None

    @property
    def counts(self) -> NDArray[np.int64]:
        """(K,) N_k, the training examples of each concept."""
        if self.of_image is not None:
            return np.bincount(self.of_image, minlength=len(self.names))
        return np.bincount(self.of_class, weights=self.class_counts, minlength=len(self.names)).astype(np.int64)

    def distribution(self, shares: Mapping[str, float]) -> NDArray[np.float64]:
        """(K,) summing to 1, from shares or counts by name. Those of concepts without classes here are left out.

        Raises:
            DataError: a name is no concept of the map, a concept has no share, or nothing is left.
        """
        unknown = sorted(set(shares) - set(self.names) - set(self.empty))
        if unknown:
            raise DataError(f"reference: {unknown[0]!r} is no concept here; known are {', '.join(self.names)}")
        missing = [name for name in self.names if name not in shares]
        if missing:
            raise DataError(f"reference: no share for concept {missing[0]!r}", fix="add one, 0 if that is meant")
        values = np.array([float(shares[name]) for name in self.names])
        if (values < 0).any() or not 0 < values.sum() < math.inf:
            raise DataError(f"reference: shares must be non-negative, finite and not all 0; got {dict(shares)}")
        distribution: NDArray[np.float64] = values / values.sum()
        return distribution


def cluster_count(source: str) -> int | None:
    """K of `clusters:K`; None where concepts are not clusters.

    Raises:
        ValueError: K is no whole number from 1 to 10,000.
    """
    name, colon, count = source.partition(":")
    if name != "clusters" or not colon:
        return None
    if not (count.isascii() and count.isdecimal() and 1 <= int(count[:9]) <= 10_000):
        raise ValueError("must be clusters:K with a whole number K from 1 to 10,000")
    return int(count)


def load_concepts(source: str) -> dict[str, str]:
    """Class to concept, from `imagenet11` (ImageNet's 1,000 wnids, Table 1) or a CSV with the header `class,concept`.

    Raises:
        DataError: the file is missing, has another header, or gives a class two concepts.
    """
    concepts: dict[str, str] = {}
    for number, (name, concept) in _read_rows(source, "concepts", ("class", "concept")):
        if concepts.setdefault(name, concept) != concept:
            raise DataError(
                f"line {number} gives class {name!r} a second concept, {concept!r}", argument="concepts", value=source
            )
    return concepts


def _read_rows(source: str, argument: str, header: tuple[str, str]) -> list[tuple[int, tuple[str, str]]]:
    """Line numbers and cells of a CSV file with two columns, or of a shipped one."""
    expected = ",".join(header)
    if argument == "concepts" and source == "imagenet11":
        text = resources.files("robustfeat.training").joinpath("concept_maps/imagenet11.csv").read_text("utf-8")
    else:
        try:
            with open(source, encoding="utf-8-sig", newline="") as handle:
                text = handle.read()
        except (OSError, UnicodeDecodeError) as exc:
            reason = exc.strerror if isinstance(exc, OSError) else "not UTF-8"
            names = "imagenet11, classes, clusters:K, or " if argument == "concepts" else ""
            raise DataError(
                f"cannot be read ({reason}); expected {names}a CSV file with the header {expected}",
                argument=argument,
                value=source,
            ) from exc
    try:
        rows = list(csv.reader(text.splitlines()))
    except csv.Error as exc:
        raise DataError(
            f"not a CSV file ({exc}); expected the header {expected}", argument=argument, value=source
        ) from exc
    first = [cell.strip() for cell in rows[0]] if rows else []
    if tuple(first[:2]) != header:
        raise DataError(
            f"the first line must be {expected}; got {','.join(first) or 'nothing'}", argument=argument, value=source
        )
    pairs = []
    for number, row in enumerate(rows[1:], start=2):
        if not row:
            continue
        if len(row) < 2 or not row[0].strip() or not row[1].strip():
            raise DataError(
                f"line {number} needs a {header[0]} and a {header[1]}; got {','.join(row)!r}",
                argument=argument,
                value=source,
            )
        pairs.append((number, (row[0].strip(), row[1].strip())))
    return pairs


def load_reference(file: str) -> dict[str, float]:
    """Concept to share, from a CSV with the header `concept,share`; shares may also be counts.

    Raises:
        DataError: the file is missing, has another header, or a share is no number.
    """
    rows = _read_rows(file, "reference", ("concept", "share"))
    shares: dict[str, float] = {}
    for number, (name, text) in rows:
        try:
            share = float(text)
        except ValueError:
            share = math.nan
        if not 0 <= share < math.inf or name in shares:
            raise DataError(
                f"line {number} needs a new concept and a share >= 0; got {name!r}, {text!r}",
                argument="reference",
                value=file,
            )
        shares[name] = share
    return shares


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
            f"{len(missing)} of {len(classes)} classes have no concept, first {missing[0]!r}",
            argument="concepts",
            value=source,
            fix="add a line for each to a CSV file with the header class,concept, or pass `concepts=classes` to make "
            "each class its own concept",
        )
    used = sorted({mapping[name] for name, count in zip(classes, counts, strict=True) if count > 0})
    index = {concept: number for number, concept in enumerate(used)}
    # A class without examples never appears in a batch, so any index is fine.
    of_class = np.array([index.get(mapping[name], 0) for name in classes], np.int64)
    return ConceptMap(tuple(used), of_class, np.asarray(counts), tuple(sorted(set(mapping.values()) - set(used))))


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
