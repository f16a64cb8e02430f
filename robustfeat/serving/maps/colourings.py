"""Colours the points of a map by categories or numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustfeat.palette import CATEGORIES

__all__ = ["Colouring", "categories_of", "category_colours", "name_places"]

_NEIGHBOURS = 8
_NAMED = 300
_NAMED_POINTS = 5
_BINS = 48


@dataclass(frozen=True, eq=False)
class Colouring:
    """One colouring of the points.

    Attributes:
        name: the name.
        values: (n,) int32 into `names`, -1 for none; or (n,) float32, NaN for none.
        names: names of the categories; empty for numbers.
        note: an explanation in a sentence.
    """

    name: str
    values: NDArray[Any]
    names: tuple[str, ...] = ()
    note: str = ""

    @property
    def is_numeric(self) -> bool:
        """Whether the values are numbers."""
        return bool(self.values.dtype.kind == "f")

    def take(self, rows: NDArray[np.int64]) -> Colouring:
        """The colouring of some of the points, without unused categories."""
        if self.is_numeric:
            return replace(self, values=self.values[rows])
        texts = [None if value < 0 else self.names[value] for value in self.values[rows].tolist()]
        return replace(categories_of(self.name, texts), note=self.note)


def categories_of(name: str, texts: Sequence[str | None], note: str = "") -> Colouring:
    """Colours by text, with sorted names. None is no category."""
    names = tuple(sorted({text for text in texts if text is not None}))
    index = {text: number for number, text in enumerate(names)}
    values = np.array([-1 if text is None else index[text] for text in texts], np.int32)
    return Colouring(name, values, names, note)


def category_colours(values: NDArray[np.int32], count: int, places: NDArray[np.float32]) -> list[int]:
    """Assigns colours of the palette so that neighbouring categories on the map differ.

    There may be many more categories than distinguishable colours.

    Args:
        values: (n,) categories, -1 for none.
        count: number of categories.
        places: (n, 2) coordinates of the points.

    Returns:
        `count` indices of colours.
    """
    from scipy.spatial import cKDTree

    beside = np.zeros((count, count))
    known = np.flatnonzero(values >= 0)
    if len(known) > 1:
        some = known if len(known) <= 20_000 else known[:: len(known) // 20_000]
        _, near = cKDTree(places[some]).query(places[some], min(_NEIGHBOURS + 1, len(some)))
        own = values[some]
        np.add.at(beside, (np.repeat(own, near.shape[1] - 1), own[near[:, 1:]].reshape(-1)), 1)
        beside += beside.T
    sizes = np.bincount(values[known], minlength=count)
    colours = np.full(count, -1)
    used = np.zeros(len(CATEGORIES.light))
    for category in np.argsort(-sizes, kind="stable"):
        clashes = np.zeros(len(used))
        coloured = colours >= 0
        np.add.at(clashes, colours[coloured], beside[category, coloured] / max(1, beside[category].sum()))
        chosen = int(np.lexsort((np.arange(len(used)), used, np.round(clashes, 3)))[0])
        colours[category] = chosen
        used[chosen] += 1
    return [int(colour) for colour in colours]


def name_places(values: NDArray[np.int32], count: int, places: NDArray[np.float32]) -> list[list[float] | None] | None:
    """Places the name of each category where its points are densest.

    Args:
        values: (n,) categories, -1 for none.
        count: number of categories.
        places: (n, 2) coordinates of the points, from 0 to 1.

    Returns:
        `count` pairs of x and y, or None for a category of fewer than five points, or with very many categories.
    """
    from scipy.ndimage import gaussian_filter

    if not 1 < count <= _NAMED:
        return None
    found: list[list[float] | None] = []
    for category in range(count):
        own = places[values == category]
        if len(own) < _NAMED_POINTS:
            found.append(None)
            continue
        cells = np.clip((own * _BINS).astype(int), 0, _BINS - 1)
        density = np.zeros((_BINS, _BINS))
        np.add.at(density, (cells[:, 0], cells[:, 1]), 1)
        peak = np.unravel_index(int(gaussian_filter(density, 1.5).argmax()), density.shape)
        near = own[(np.abs(cells - np.array(peak)) <= 2).all(1)]
        middle = np.median(near, 0) if len(near) else (np.array(peak) + 0.5) / _BINS
        found.append([round(float(value), 5) for value in middle])
    return found
