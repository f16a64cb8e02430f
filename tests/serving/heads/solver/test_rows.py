"""Rows as a solver sees them: in blocks, of which few are in memory."""

from __future__ import annotations

import weakref
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from robustfeat.serving.heads.kinds import Array
from robustfeat.serving.heads.solver import rows as module
from robustfeat.serving.heads.solver.rows import ScaledRows


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("scaling", ["none", "l2", "standard"])
def test_blocks_of_a_file_are_those_in_memory(
    scaling: str, threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = np.random.default_rng(0)
    np.save(tmp_path / "x.npy", draw.normal(1, 2, (10_000, 6)).astype(np.float32))
    values = np.load(tmp_path / "x.npy", mmap_mode="r")
    places = np.sort(draw.permutation(len(values))[:9000])

    def read() -> NDArray[np.float64]:
        seen: dict[int, NDArray[np.float64]] = {}

        def note(part: slice, x: Array) -> tuple[Array]:
            seen[part.start] = x.copy()
            return (x.sum(0),)

        (total,) = ScaledRows(values, places, scaling, threads).sum(note)
        read = np.concatenate([seen[start] for start in sorted(seen)])
        np.testing.assert_allclose(total, read.sum(0), atol=1e-9)
        return read

    kept = read()
    monkeypatch.setattr(module, "_IN_MEMORY", 0)
    np.testing.assert_array_equal(read(), kept)
    assert kept.shape == (9000, 7)


@pytest.mark.parametrize("large", [False, True])
def test_sums_do_not_depend_on_the_threads(large: bool) -> None:
    values = np.random.default_rng(0).normal(size=(7000, 5))

    def sums(threads: int) -> list[Array]:
        rows = ScaledRows(values, np.arange(7000), "standard", threads)
        return rows.sum(lambda part, x: (x.T @ x, np.sqrt(np.abs(x)).sum(0)), large=large)

    alone = sums(1)
    for threads in (2, 3, 8):
        for one, other in zip(alone, sums(threads), strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("large", [False, True])
def test_few_results_are_in_memory_at_once(large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The result of a block may be a Hessian: of a million rows all of them would fill the memory."""
    monkeypatch.setattr(module, "_BLOCK", 10)
    rows = ScaledRows(np.ones((20_000, 3), np.float32), np.arange(20_000), "none", 2)
    alive: list[weakref.ref[Array]] = []
    most = []

    def note(part: slice, x: Array) -> tuple[Array]:
        result = np.full(1, float(len(x)))
        alive.append(weakref.ref(result))
        most.append(sum(reference() is not None for reference in alive[-100:]))
        return (result,)

    assert rows.sum(note, large=large)[0] == 20_000
    assert max(most) <= 12, "about two a thread that wait, and two that each thread adds"


@pytest.mark.parametrize("size", [3, 300])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_each_item_is_visited_once(size: int, threads: int) -> None:
    rows = ScaledRows(np.zeros((4, size), np.float32), np.arange(4), "none", threads)
    for count in (0, 1, 7):
        visited: list[int] = []
        rows.each(visited.append, range(count))
        assert sorted(visited) == list(range(count))
