"""Groups of duplicates are those of a plain loop over all pairs, for all sizes of blocks and numbers of threads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from robustfeat.serving.collections.directions import Directions
from robustfeat.serving.collections.duplicates import Groups, find_duplicates
from tests.serving.collections.conftest import FeaturesOf

FAILED = (0, 150, 399)


def plain_groups(values: NDArray[Any], threshold: float, order: list[int]) -> tuple[dict[int, int], set[int]]:
    """The kept row of each row, and the rows that are a duplicate of some row: all pairs, in float64."""
    x = values.astype(np.float64)
    lengths = np.sqrt((x * x).sum(1))
    x /= np.where(lengths > 0, lengths, 1)[:, None]
    cosines = np.stack([(x * row).sum(1) for row in x])
    kept: list[int] = []
    groups = {}
    for row in order:
        near = [(-cosines[row, one], at, one) for at, one in enumerate(kept) if cosines[row, one] >= threshold]
        groups[row] = min(near)[2] if near else row
        if not near:
            kept.append(row)
    pairs = np.triu(cosines >= threshold, 1)
    involved = set(np.flatnonzero((pairs | pairs.T).any(0)).tolist())
    return groups, involved


@pytest.fixture(scope="module")
def values() -> NDArray[np.float32]:
    """400 rows about 40 centres, with copies, zeros, a chain and failed rows."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((40, 32))
    found = (centres[rng.integers(0, 40, 400)] + 0.25 * rng.standard_normal((400, 32))).astype(np.float32)
    found[100:110] = found[20]
    found[200:202] = 0
    turns = np.arange(20)[:, None] * 0.15
    found[300:320] = np.cos(turns) * np.eye(32)[0] + np.sin(turns) * np.eye(32)[1]
    found[list(FAILED)] = np.nan
    return found


@pytest.mark.parametrize("threshold", [0.5, 0.9, 0.95, 0.99, 1 - 1e-12])
@pytest.mark.parametrize(("block_rows", "threads"), [(1, 1), (17, 2), (512, 1)])
def test_groups_are_those_of_a_plain_loop(
    values: NDArray[np.float32], threshold: float, block_rows: int, threads: int, features_of: FeaturesOf
) -> None:
    order = np.array([row for row in np.random.default_rng(1).permutation(400) if row not in FAILED])
    found = find_duplicates(
        Directions(features_of(values, FAILED)), threshold, order, block_rows=block_rows, threads=threads
    )
    groups, involved = plain_groups(values, threshold, order.tolist())
    assert {row: int(found.kept[row]) for row in order.tolist()} == groups
    assert set(np.flatnonzero(found.involved).tolist()) == involved
    assert found.kept[list(FAILED)].tolist() == [-1, -1, -1]
    assert np.isnan(found.cosines[list(FAILED)]).all()
    assert (found.cosines[order] >= threshold).all()


def test_a_chain_is_no_group(values: NDArray[np.float32], features_of: FeaturesOf) -> None:
    found = find_duplicates(Directions(features_of(values, FAILED)), 0.985, np.arange(300, 320))
    assert found.kept[300:320].tolist() == [row - (row - 300) % 2 for row in range(300, 320)]


@pytest.mark.parametrize("dimensions", [3, 64, 512])
def test_short_bounds_lose_no_pair(dimensions: int, features_of: FeaturesOf) -> None:
    rng = np.random.default_rng(2)
    basis = rng.standard_normal((8, dimensions))  # most of the length lies in few directions
    rows = (rng.standard_normal((3000, 8)) @ basis + 0.1 * rng.standard_normal((3000, dimensions))).astype(np.float32)
    copies = rng.permutation(3000)[:400]
    rows[copies[:200]] = rows[copies[200:]] * (1 + 0.02 * rng.standard_normal((200, dimensions)))
    units = rows.astype(np.float64)
    units /= np.sqrt((units * units).sum(1))[:, None]
    for threshold in (0.97, 0.999):
        found = find_duplicates(Directions(features_of(rows)), threshold, np.arange(3000), threads=2)
        near = np.tril(units @ units.T >= threshold, -1)
        assert (found.involved == (near | near.T).any(0)).all()
        kept = np.flatnonzero(found.kept == np.arange(3000))
        assert not near[np.ix_(kept, kept)].any()


def test_many_copies_make_one_group(features_of: FeaturesOf) -> None:
    values = np.ones((20_000, 16), np.float32)
    found = find_duplicates(Directions(features_of(values)), 0.99, np.arange(20_000))
    assert (found.kept == 0).all()


def test_one_row_and_no_row(features_of: FeaturesOf) -> None:
    directions = Directions(features_of(np.ones((1, 4), np.float32)))
    found: Groups = find_duplicates(directions, 0.9, np.arange(1))
    assert (found.kept.tolist(), found.cosines.tolist(), found.involved.tolist()) == ([0], [1.0], [False])
    assert find_duplicates(directions, 0.9, np.arange(0)).kept.tolist() == [-1]


@pytest.mark.parametrize("threshold", [0.0, 1.5, float("nan")])
def test_a_threshold_out_of_range_is_refused(threshold: float, features_of: FeaturesOf) -> None:
    with pytest.raises(ValueError, match="threshold must be above 0 and at most 1"):
        find_duplicates(Directions(features_of(np.ones((1, 4), np.float32))), threshold, np.arange(1))
