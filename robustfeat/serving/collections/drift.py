"""How far a new collection lies from a reference: a test, the images that are least typical, and what a head answers.

Only a sample of large collections is compared, so that memory and time are bounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustfeat.errors import InputError
from robustfeat.serving.collections.directions import to_units
from robustfeat.serving.collections.two_sample import Comparison, compare_samples, distances_between, energy_distance
from robustfeat.serving.heads.accuracy import estimate_accuracy
from robustfeat.serving.heads.features import CHUNK_ROWS, Features
from robustfeat.serving.heads.head import Head
from robustfeat.serving.heads.shares import fit_shares

__all__ = ["ATYPICAL", "MOST_MEASURED", "Answers", "Drift", "Reference", "draw_rows", "measure_drift"]

MOST_MEASURED = 50_000
"""Rows of a collection whose typicality is measured."""

_MOST_ANSWERED = 10_000
"""Rows that a head answers for."""

ATYPICAL = 0.05
"""Images of a lower typicality are called atypical: about as large a share of them is so without a shift."""

_NEIGHBOURS = 10
_EXPLAINED = 0.5
_LEAST_SHARE = 1e-6
"""Of a class among the reference's images: EM divides by it."""


@dataclass(frozen=True, eq=False)
class Answers:
    """What a head answers for both collections.

    Attributes:
        classes: K names.
        reference_shares, new_shares: (K,) shares of the classes. Those of the new collection are by EM.
        explained: how much of the distance goes when the reference's images are weighted to the new shares, up to 1.
            Near 0 the images differ in another way, and the new shares are not to be trusted.
        reference_accuracy, new_accuracy: by `estimate_accuracy`, for the shares of the reference. If the new shares
            explain more than half of the distance, they are used for the new collection.
    """

    classes: tuple[str | int, ...]
    reference_shares: NDArray[np.float64]
    new_shares: NDArray[np.float64]
    explained: float
    reference_accuracy: float
    new_accuracy: float

    @property
    def moved(self) -> float:
        """The share of images that would have to change their class to turn one set of shares into the other."""
        return float(np.abs(self.new_shares - self.reference_shares).sum() / 2)


@dataclass(frozen=True, eq=False)
class Drift:
    """How a new collection differs from a reference.

    Attributes:
        comparison: the distance between samples of both, and its p-value.
        rows: (m,) rows of the new collection that were measured, the least typical first.
        typicality: (m,) of these; see `Reference`.
        away: (m,) their distance to the reference.
        in_both: images of the new collection whose bytes are those of an image of the reference.
        answers: those of a head, if there is one.
    """

    comparison: Comparison
    rows: NDArray[np.int64]
    typicality: NDArray[np.float64]
    away: NDArray[np.float64]
    in_both: int
    answers: Answers | None = None


class Reference:
    """A sample of the reference, which tells how typical other images are.

    The distance of an image is that to its tenth nearest row of the sample (Sun et al., ICML 2022). Its typicality is
    the share of the sample's own rows that lie at least as far from the others (Laxhammar and Falkman, 2010). It is
    about even between 0 and 1 for images like the reference's, and near 0 for others. Lengths of rows do not count.

    Args:
        sample: (m, D) finite, at least two rows.

    """

    def __init__(self, sample: NDArray[np.floating]) -> None:
        self._units = to_units(sample)
        away = distances_between(self._units, self._units)
        np.fill_diagonal(away, np.inf)
        self._nearest = min(_NEIGHBOURS, len(sample) - 1)
        self._own = np.sort(np.partition(away, self._nearest - 1, axis=1)[:, self._nearest - 1])

    def distances(self, values: NDArray[np.floating]) -> NDArray[np.float64]:
        """(n, D) rows to their distances, (n,)."""
        away = distances_between(to_units(values), self._units)
        return np.asarray(np.partition(away, self._nearest - 1, axis=1)[:, self._nearest - 1])

    def typicality(self, distances: NDArray[np.float64]) -> NDArray[np.float64]:
        """(n,) distances to (n,), above 0 and up to 1."""
        as_far = len(self._own) - np.searchsorted(self._own, distances, side="left")
        return np.asarray((1 + as_far) / (1 + len(self._own)))

    def compare(self, values: NDArray[np.floating], **options: Any) -> Comparison:
        """Compares the sample with (n, D) rows. `options` are those of `compare_samples`."""
        return compare_samples(self._units, to_units(values), **options)


def measure_drift(
    reference: Features,
    new: Features,
    head: Head | None = None,
    *,
    sample: int = 1000,
    permutations: int = 999,
    seed: int = 0,
    advance: Callable[[int], None] = lambda count: None,
) -> Drift:
    """Compares a new collection with a reference.

    Args:
        reference, new: of the same model, at least two rows that did not fail in each.
        head: calibrated, with one label per image, of this model.
        sample: rows of each collection that are compared, drawn at random if there are more.
        permutations: see `compare_samples`.
        seed: of all draws.
        advance: told how many permutations are done.

    Raises:
        InputError: a collection has too few rows, or the two are of different models, or the head's is another one.
        HeadError: the head has no probabilities.
    """
    if reference.model is not None and new.model is not None:
        reference.model.require(new.model, reference.place, new.place)
    elif reference.values.shape[1] != new.values.shape[1]:
        sizes = reference.values.shape[1], new.values.shape[1]
        raise InputError(
            f"{new.place}: expected the {sizes[0]} features of {reference.place}; got {sizes[1]}",
            fix="embed both with the same model",
        )
    if head is not None:
        _require_head(head, (reference, new))
    draw = np.random.default_rng(seed)
    measured = draw_rows(new, MOST_MEASURED, draw)
    answered = draw_rows(reference, _MOST_ANSWERED, draw), _part(measured, _MOST_ANSWERED, draw)
    rows = _part(answered[0], sample, draw), _part(answered[1], sample, draw)
    nearby = Reference(reference.take(rows[0]))
    away = np.concatenate([nearby.distances(values) for values in _chunks(new, measured)])
    order = np.argsort(-away, kind="stable")
    comparison = nearby.compare(new.take(rows[1]), permutations=permutations, seed=seed, advance=advance)
    return Drift(
        comparison=comparison,
        rows=measured[order],
        typicality=nearby.typicality(away[order]),
        away=away[order],
        in_both=_count_in_both(reference, new),
        answers=None if head is None else _answer(head, (reference, new), answered, rows),
    )


def _require_head(head: Head, both: tuple[Features, Features]) -> None:
    for features in both:
        head.require_features(features, "the head")
    head.require_calibration()
    if head.multi_label:
        raise InputError("the head: expected one label per image; got a head of several", fix="leave `head` out")


def draw_rows(features: Features, most: int, draw: np.random.Generator) -> NDArray[np.int64]:
    """Numbers of rows that did not fail, at most so many, ascending.

    Raises:
        InputError: there are fewer than two.
    """
    rows = np.flatnonzero(features.good)
    if len(rows) < 2:
        raise InputError(f"{features.place}: expected two images or more that did not fail; got {len(rows)}")
    return _part(rows, most, draw)


def _part(rows: NDArray[np.int64], most: int, draw: np.random.Generator) -> NDArray[np.int64]:
    return rows if len(rows) <= most else np.sort(draw.choice(rows, most, replace=False))


def _chunks(features: Features, rows: NDArray[np.int64]) -> Iterator[NDArray[np.floating]]:
    for start in range(0, len(rows), CHUNK_ROWS):
        yield features.take(rows[start : start + CHUNK_ROWS])


def _count_in_both(reference: Features, new: Features) -> int:
    if reference.hashes is None or new.hashes is None:
        return 0
    # 8 of 32 bytes tell files apart, and take a quarter of the memory. Zeros are no hash.
    known, found = (
        np.ascontiguousarray(features.hashes[features.good, :8]).view(np.uint64).ravel()
        for features in (reference, new)
        if features.hashes is not None
    )
    return int(np.isin(found[found != 0], known).sum())


def _answer(
    head: Head,
    both: tuple[Features, Features],
    answered: tuple[NDArray[np.int64], NDArray[np.int64]],
    compared: tuple[NDArray[np.int64], NDArray[np.int64]],
) -> Answers:
    """Shares of all `answered` rows, and the rest by those of them that are compared."""
    before, after = (
        np.concatenate([head.calibrate(head.margins(values)) for values in _chunks(features, rows)])
        for features, rows in zip(both, answered, strict=True)
    )
    shares = np.maximum(before.mean(0), _LEAST_SHARE)
    shares /= shares.sum()
    new_shares = fit_shares(after, shares)
    before, after = (
        of[np.isin(all_rows, rows)] for of, all_rows, rows in zip((before, after), answered, compared, strict=True)
    )
    x, y = (to_units(features.take(rows)) for features, rows in zip(both, compared, strict=True))
    distance, left = energy_distance(x, y), energy_distance(x, y, before @ (new_shares / shares))
    explained = min(max(1 - left / distance, 0.0), 1.0) if distance > 0 else 0.0
    return Answers(
        classes=head.classes,
        reference_shares=shares,
        new_shares=new_shares,
        explained=explained,
        reference_accuracy=estimate_accuracy(before, shares),
        new_accuracy=estimate_accuracy(after, new_shares if explained > _EXPLAINED else shares),
    )
