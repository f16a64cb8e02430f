"""Cells of a report: computed once, shared by processes, and kept by later versions."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from robustfeat.errors import InputError
from robustfeat.training.evaluation.answers import pack, unpack
from robustfeat.training.evaluation.report import libsvm_cell
from robustfeat.training.paper.cells import Cells
from robustfeat.training.paper.locks import BusyError, Locks
from robustfeat.training.recipe import Recipe


@pytest.mark.parametrize("count", [1, 7, 8, 9, 1000])
def test_packed_answers_come_back(count: int) -> None:
    right = np.random.default_rng(count).random(count) < 0.5
    np.testing.assert_array_equal(unpack(pack(right)), right)


def test_answers_that_were_cut_short_are_refused() -> None:
    with pytest.raises(ValueError, match="expected 1000 answers"):
        unpack(pack(np.ones(1000, bool))[:-2])


def test_a_cell_that_is_only_looked_up_is_not_computed(tmp_path: Path) -> None:
    cells = Cells(tmp_path, Locks(tmp_path / "locks", print))
    assert cells.known("svm", "a", {"seed": 0}) is None
    cells.get("svm", "a", {"seed": 0}, lambda: {"accuracy": 0.5})
    assert cells.known("svm", "a", {"seed": 0}) == {"accuracy": 0.5}
    with pytest.raises(InputError, match="another seed"):
        cells.known("svm", "a", {"seed": 1})


def test_a_cell_is_computed_once_for_the_same_inputs(tmp_path: Path) -> None:
    calls = []

    def compute() -> dict[str, float]:
        calls.append(1)
        return {"accuracy": 0.1 + len(calls)}

    locks = Locks(tmp_path / "locks", print)
    cells = Cells(tmp_path / "cells", locks)
    first = cells.get("svm", "a", {"seed": 0, "sizes": (1, 2)}, compute)
    assert Cells(tmp_path / "cells", locks).get("svm", "a", {"seed": 0, "sizes": (1, 2)}, compute) == first
    assert len(calls) == 1
    file = tmp_path / "cells" / "svm-a.json"
    with pytest.raises(InputError, match=r"svm-a\.json: is the result of another seed; move the folder away"):
        cells.get("svm", "a", {"seed": 1, "sizes": (1, 2)}, compute)
    whole = file.read_text()
    damaged = ["{", whole.replace("1.1", "9.9"), whole.replace('"version": 2', '"version": 0')]
    for count, text in enumerate(damaged, 2):
        assert text != whole
        file.write_text(text)
        cells.get("svm", "a", {"seed": 0, "sizes": (1, 2)}, compute)
        assert len(calls) == count


def test_a_cell_is_kept_when_recipes_get_new_keys(tmp_path: Path) -> None:
    cells = Cells(tmp_path / "cells", Locks(tmp_path / "locks", print))
    recipe = Recipe(method="erm", seed=3).to_dict()
    cells.get("svm", "a", {"recipe": recipe}, lambda: {"accuracy": 0.5})
    file = tmp_path / "cells" / "svm-a.json"
    cell = json.loads(file.read_text())
    del cell["inputs"]["recipe"]["recalibrate"]  # as it was before there was one
    file.write_text(json.dumps(cell))
    assert cells.get("svm", "a", {"recipe": recipe}, dict) == {"accuracy": 0.5}
    for changed in ({**recipe, "recalibrate": 5}, {**recipe, "seed": 4}):
        with pytest.raises(InputError, match="another recipe"):
            cells.get("svm", "a", {"recipe": changed}, dict)


def test_what_another_process_does_is_left_to_it_or_waited_for(tmp_path: Path) -> None:
    said: list[str] = []
    ours, other = Locks(tmp_path, said.append), Locks(tmp_path, said.append)
    other.wait = False

    def wait() -> None:
        with other.held("run", always_wait=True):
            pass

    with ThreadPoolExecutor() as pool:
        with ours.held("run"):
            with pytest.raises(BusyError, match="run"), other.held("run"):
                pass
            with other.held("another run"):
                pass
            waiting = pool.submit(wait)
            while not said:
                time.sleep(0.01)
            assert said == ["waiting for another process, which is at work on run"]
            assert not waiting.done()
        waiting.result(timeout=60)


def test_opinions_of_before_libsvm_chose_are_kept_and_marked(tmp_path: Path) -> None:
    cells = Cells(tmp_path / "cells", Locks(tmp_path / "locks", print))
    before = {name: {"accuracy": 0.5, "converged": True} for name in ("LIBSVM", "LinearSVC")}
    cells.get("opinions", "a", {"seed": 0}, lambda: {"libsvm": before})
    file = tmp_path / "cells" / "opinions-a.json"
    assert json.loads(file.read_text())["version"] == 3
    for version, known in ((2, {"libsvm": before}), (1, {"libsvm": before}), (0, {"new": 1})):
        file.write_text(json.dumps({**json.loads(file.read_text()), "version": version}))
        assert cells.get("opinions", "a", {"seed": 0}, lambda: {"new": 1}) == known
    assert libsvm_cell(before) == "50.00+ / 50.00"
    assert libsvm_cell({name: {**scores, "C": 1.0} for name, scores in before.items()}) == "50.00 / 50.00"
