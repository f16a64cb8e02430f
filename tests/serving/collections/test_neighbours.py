"""The nearest rows are those of brute force, bit by bit the same for all sizes of blocks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from robustfeat import InputError
from robustfeat.serving.collections.directions import Directions, product_error
from robustfeat.serving.collections.neighbours import Neighbours, find_neighbours
from robustfeat.serving.collections.similar import Queries, find_similar
from tests.serving.collections.conftest import FeaturesOf

BLOCKS = [1, 7, 64, 1000, None]


def brute_force(values: NDArray[Any], query: NDArray[Any], failed: set[int]) -> list[tuple[float, int]]:
    """Minus the cosine, and the row, of all rows that did not fail: sums without rounding, the nearest row first."""

    def cosine(row: NDArray[Any]) -> float:
        x, q = [float(one) for one in row], [float(one) for one in query]
        a, b = math.hypot(*x) or 1.0, math.hypot(*q) or 1.0
        return math.fsum((one / a) * (other / b) for one, other in zip(x, q, strict=True))

    return sorted((-cosine(values[row]), row) for row in range(len(values)) if row not in failed)


@pytest.fixture(scope="module")
def collection() -> tuple[NDArray[np.float32], tuple[int, ...]]:
    """300 rows with ties: copies, zeros, failed rows, and neighbours that float32 products cannot tell apart."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((300, 24)).astype(np.float32)
    values[50:90] = values[7]  # copies
    values[120] = values[290] = 0
    values[200:240] = values[3] * (1 + 1e-7 * rng.standard_normal((40, 24)))
    values[30] *= 1e-25  # products of such rows are denormal or infinite
    values[31] *= 1e30
    failed = (0, 66, 299)
    values[list(failed)] = np.nan
    return values, failed


@pytest.mark.parametrize("block_rows", BLOCKS)
@pytest.mark.parametrize("k", [1, 5, 60, 1000])
def test_the_nearest_rows_are_those_of_brute_force(
    collection: tuple[NDArray[np.float32], tuple[int, ...]], block_rows: int | None, k: int, features_of: FeaturesOf
) -> None:
    values, failed = collection
    queries = np.concatenate([values[[7, 3, 120, 30, 31, 5]], np.random.default_rng(1).standard_normal((3, 24))])
    found = find_neighbours(Directions(features_of(values, failed)), queries, k, block_rows=block_rows)
    assert found.rows.shape == found.cosines.shape == (9, min(k, 300))
    for number, query in enumerate(queries):
        expected = brute_force(values, query, set(failed))[:k]
        count = len(expected)
        assert (found.rows[number, count:] == -1).all()
        assert np.isnan(found.cosines[number, count:]).all()
        np.testing.assert_allclose(found.cosines[number, :count], [-negative for negative, _ in expected], atol=1e-14)
        _require_same_order(found.rows[number, :count].tolist(), expected)


def _require_same_order(rows: list[int], expected: list[tuple[float, int]]) -> None:
    """The same rows in the same order; rows whose cosines differ by rounding only may change places."""
    place = {row: at for at, (_, row) in enumerate(expected)}
    for at, row in enumerate(rows):
        if row in place:
            assert abs(expected[place[row]][0] - expected[at][0]) < 1e-15
    copies = [row for row in rows if 50 <= row < 90 or row == 7]
    assert copies == sorted(copies)


def test_blocks_and_the_other_queries_change_no_bit(
    collection: tuple[NDArray[np.float32], tuple[int, ...]], features_of: FeaturesOf
) -> None:
    values, failed = collection
    directions = Directions(features_of(values, failed))
    queries = np.random.default_rng(2).standard_normal((40, 24)).astype(np.float32)
    whole = find_neighbours(directions, queries, 30)
    for block_rows in BLOCKS:
        found = find_neighbours(directions, queries, 30, block_rows=block_rows)
        assert (found.rows == whole.rows).all()
        assert (found.cosines == whole.cosines).all()
    for number, query in enumerate(queries):
        alone = find_neighbours(directions, query[None], 30)
        assert (alone.rows[0] == whole.rows[number]).all()
        assert (alone.cosines[0] == whole.cosines[number]).all()


@pytest.mark.parametrize("block_rows", BLOCKS)
def test_the_query_itself_is_left_out_and_its_copies_are_not(
    collection: tuple[NDArray[np.float32], tuple[int, ...]], block_rows: int | None, features_of: FeaturesOf
) -> None:
    values, failed = collection
    own = np.array([7, 80, 4, -1])
    found = find_neighbours(
        Directions(features_of(values, failed)), values[[7, 80, 4, 7]], 4, own=own, block_rows=block_rows
    )
    assert found.rows[0].tolist() == [50, 51, 52, 53]
    assert found.rows[1].tolist() == [7, 50, 51, 52]
    assert 4 not in found.rows[2]
    assert found.rows[3].tolist() == [7, 50, 51, 52]


def test_all_rows_are_alike_and_the_first_ones_answer(features_of: FeaturesOf) -> None:
    values = np.tile(np.arange(1, 9, dtype=np.float32), (20_000, 1))
    found = find_neighbours(Directions(features_of(values)), values[:2], 3, own=np.array([0, 1]), block_rows=700)
    assert found.rows.tolist() == [[1, 2, 3], [0, 2, 3]]
    np.testing.assert_allclose(found.cosines, 1, atol=1e-15)


def test_one_row_no_row_and_failed_queries(features_of: FeaturesOf) -> None:
    one = Directions(features_of(np.ones((1, 4), np.float32)))
    assert find_neighbours(one, np.ones((1, 4)), 3).rows.tolist() == [[0]]
    assert find_neighbours(one, np.ones((1, 4)), 3, own=np.array([0])).rows.tolist() == [[-1]]
    none = Directions(features_of(np.ones((0, 4), np.float32)))
    assert find_neighbours(none, np.ones((1, 4)), 2).rows.shape == (1, 0)
    bad = np.array([[np.nan] * 4, [np.inf, 0, 0, 0], [1, 1, 1, 1]])
    assert find_neighbours(one, bad, 1).rows.tolist() == [[-1], [-1], [0]]
    assert find_neighbours(one, np.ones((0, 4)), 2).rows.shape == (0, 1)


def test_a_huge_k_costs_no_more_memory_than_all_rows(features_of: FeaturesOf) -> None:
    values = np.random.default_rng(5).standard_normal((3000, 8)).astype(np.float32)
    features = features_of(values)
    directions = Directions(features)
    found = find_neighbours(directions, values[:2], 10**6)
    assert found.rows.shape == found.cosines.shape == (2, 3000)
    asked = []

    def search(queries: NDArray[np.float32], k: int, own: NDArray[np.int64]) -> Neighbours:
        asked.append(queries.shape[0] * k)
        return find_neighbours(directions, queries, k, own=own)

    first = next(find_similar(features, search, Queries.of_features(features, own=True), 10**6))
    assert first.row == brute_force(values, values[0], {0})[0][1]
    assert asked[0] <= 2**22
    few = find_neighbours(directions, values[:1400], 3000)  # more than one pass
    assert (few.rows[1399] == find_neighbours(directions, values[1399:1400], 3000).rows[0]).all()


def test_a_query_of_zeros_is_at_cosine_0_to_all(features_of: FeaturesOf) -> None:
    found = find_neighbours(Directions(features_of(np.eye(4, dtype=np.float32))), np.zeros((1, 4)), 2)
    assert (found.rows.tolist(), found.cosines.tolist()) == ([[0, 1]], [[0, 0]])


@pytest.mark.parametrize("kind", [np.float16, np.float64])
def test_arrays_of_other_floats_are_searched(kind: type, features_of: FeaturesOf) -> None:
    values: NDArray[Any] = np.random.default_rng(3).standard_normal((50, 8)).astype(kind)
    if kind is np.float64:
        values[4] *= 1e200
    found = find_neighbours(Directions(features_of(values)), values[:5].astype(np.float64), 2)
    for number in range(5):
        assert found.rows[number].tolist() == [row for _, row in brute_force(values, values[number], set())[:2]]


def test_a_row_that_is_not_finite_and_has_no_error_is_refused(features_of: FeaturesOf) -> None:
    values = np.ones((3, 4), np.float32)
    values[1, 2] = np.inf
    with pytest.raises(InputError, match=r"row 1 \(1\.jpg\) is not finite"):
        Directions(features_of(values))


def test_wrong_arguments_are_refused(features_of: FeaturesOf) -> None:
    directions = Directions(features_of(np.ones((3, 4), np.float32)))
    with pytest.raises(ValueError, match=r"queries must be \(m, 4\); got \(2, 5\)"):
        find_neighbours(directions, np.ones((2, 5)), 1)
    with pytest.raises(ValueError, match="k must be 1 or more; got 0"):
        find_neighbours(directions, np.ones((2, 4)), 0)


def test_products_are_within_their_error(features_of: FeaturesOf) -> None:
    rng = np.random.default_rng(4)
    values = (rng.standard_normal((500, 512)) * 10.0 ** rng.integers(-20, 20, (500, 1))).astype(np.float32)
    directions = Directions(features_of(values))
    units = directions.units(slice(0, 500))
    found = directions.products(slice(0, 500), units.astype(np.float32))
    assert np.abs(found - units @ units.T).max() <= product_error(512)
