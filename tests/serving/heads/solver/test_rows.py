"""Rows as a solver sees them: in blocks, of which few are in memory."""

from __future__ import annotations

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
        blocks = list(ScaledRows(values, places, scaling, threads).map(lambda part, x: (part, x.copy())))
        assert [part.start for part, _ in blocks] == sorted(part.start for part, _ in blocks)
        return np.concatenate([x for _, x in blocks])

    kept = read()
    monkeypatch.setattr(module, "_IN_MEMORY", 0)
    np.testing.assert_array_equal(read(), kept)
    assert kept.shape == (9000, 7)


def test_blocks_are_not_computed_far_ahead_of_those_that_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The result of a block may be a Hessian: of a million rows all of them would fill the memory."""
    monkeypatch.setattr(module, "_BLOCK", 10)
    rows = ScaledRows(np.zeros((5000, 3), np.float32), np.arange(5000), "none", 2)
    begun: list[int] = []

    def note(part: slice, x: Array) -> int:
        begun.append(part.start)
        return int(part.start)

    taken = rows.map(note)
    for number in range(100):
        assert next(taken) == 10 * number
        assert len(begun) <= number + 1 + 2 * 2
    assert list(taken) == list(range(1000, 5000, 10))
