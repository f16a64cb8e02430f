"""The order of an epoch: what it holds, what it mixes, and who reads what."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from robustfeat.training.data.image_set import ImageSet, sort_classes
from robustfeat.training.data.order import blocks_at_once, epoch_order


def boundaries(sizes: list[int] | NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


UNEVEN = boundaries(np.random.default_rng(0).integers(1, 60, 700))
SETS = {
    "even": boundaries([25] * 600),
    "uneven": UNEVEN,
    "few": boundaries([50] * 37),
    "one": boundaries([100]),
    "rows": boundaries([1] * 500),
    "large first": boundaries([5000, *[10] * 300]),
}


def block_of(blocks: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.searchsorted(blocks, rows, side="right") - 1


def test_without_blocks_it_is_a_plain_permutation() -> None:
    expected = np.random.default_rng([7, 3]).permutation(1000)
    np.testing.assert_array_equal(epoch_order(1000, None, 64, seed=7, epoch=3), expected)


@pytest.mark.parametrize("batch_size", [1, 7, 64, 256])
@pytest.mark.parametrize("name", SETS)
def test_each_row_comes_once(name: str, batch_size: int) -> None:
    blocks = SETS[name]
    order = epoch_order(int(blocks[-1]), blocks, batch_size, seed=1, epoch=0)
    assert order.dtype == np.int64
    np.testing.assert_array_equal(np.sort(order), np.arange(blocks[-1]))


def test_it_follows_from_its_arguments() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        rows: list[int] = epoch_order(int(UNEVEN[-1]), UNEVEN, 32, seed=seed, epoch=epoch).tolist()
        return rows

    assert order(1, 2) == order(1, 2)
    assert order(1, 2) != order(1, 3)
    assert order(1, 2) != order(2, 2)


def test_the_rows_left_over_differ_between_epochs() -> None:
    left = [set(epoch_order(15_000, SETS["even"], 256, seed=0, epoch=epoch)[-(15_000 % 256) :]) for epoch in (0, 1)]
    assert len(left[0]) == 152
    assert len(left[0] & left[1]) < 30


@pytest.mark.parametrize("name", ["even", "uneven", "few"])
def test_a_batch_mixes_sixteen_blocks(name: str) -> None:
    blocks = SETS[name]
    order = epoch_order(int(blocks[-1]), blocks, 256, seed=1, epoch=0)
    batches = order[: len(order) // 256 * 256].reshape(-1, 256)
    mixed = [len(set(block_of(blocks, batch).tolist())) for batch in batches]
    # In an uneven set a block of a few rows is easily in none of a window's batches but one.
    assert min(mixed) >= (16 if name != "uneven" else 12)
    assert np.mean(mixed) > 16


@pytest.mark.parametrize("workers", [1, 2, 4, 8, 16])
def test_a_block_is_read_by_one_worker_but_at_the_ends_of_lanes(workers: int) -> None:
    order = epoch_order(15_000, SETS["even"], 50, seed=1, epoch=0)
    readers: dict[int, set[int]] = {}
    for step, batch in enumerate(order.reshape(-1, 50)):
        for block in block_of(SETS["even"], batch):
            readers.setdefault(int(block), set()).add(step % workers)
    assert sum(len(who) > 1 for who in readers.values()) <= 15


@pytest.mark.parametrize("workers", [0, 1, 2, 4, 8, 16])
@pytest.mark.parametrize("name", ["even", "uneven", "few", "rows"])
def test_blocks_that_are_open_at_once_are_few(name: str, workers: int) -> None:
    """A block is open from its first row to its last: no worker has more of them open than `blocks_at_once` says."""
    blocks = SETS[name]
    order = epoch_order(int(blocks[-1]), blocks, 20, seed=1, epoch=0)
    used = order[: len(order) // 20 * 20]
    for worker in range(max(1, workers)):
        own = block_of(blocks, used.reshape(-1, 20)[worker :: max(1, workers)].ravel())
        _, first = np.unique(own, return_index=True)
        _, last = np.unique(own[::-1], return_index=True)
        change = np.zeros(len(own) + 1, int)
        np.add.at(change, first, 1)
        np.add.at(change, len(own) - last, -1)
        assert change.cumsum().max() <= blocks_at_once(len(blocks) - 1, workers)
    assert blocks_at_once(10_000, workers) <= 16 / max(1, workers) * 20


def test_blocks_survive_in_an_ascending_subset() -> None:
    data = ImageSet(("a",), np.zeros(10, np.int64), object(), "", boundaries([3, 3, 4]))  # type: ignore[arg-type]
    some, every = data.subset(np.array([0, 2, 7, 9])).blocks, data.subset(np.arange(10)).blocks
    assert some is not None
    assert some.tolist() == [0, 2, 4]  # the second block has no row left
    assert data.subset(np.array([5, 1])).blocks is None
    assert every is not None
    assert every.tolist() == [0, 3, 6, 10]


def test_class_names_that_are_numbers_are_sorted_as_such() -> None:
    assert sort_classes([10, 2, 0, 2]) == sort_classes(["10", "0", "2"]) == ("0", "2", "10")
    assert sort_classes(["b", "10", "2"]) == ("10", "2", "b")
