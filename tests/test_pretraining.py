"""benchmarks/pretraining.py: its recipes, what its runs share, and its table."""

from pathlib import Path

import pytest

import pretraining


@pytest.mark.parametrize("signal", pretraining.SIGNALS)
def test_cells_of_one_seed_differ_only_in_method_and_signal(signal: str) -> None:
    erm, hrrl = (pretraining.cell_recipe(signal, method, 1, "teacher") for method in ("ERM", "HRRL"))
    assert erm.to_dict() | {"method": "hrrl", "epochs": hrrl.epochs} == hrrl.to_dict()
    assert erm.epochs / hrrl.epochs == pytest.approx(1.21, abs=0.02)  # equal time: docs/training.md, Speed
    assert bool(erm.teacher) == ("teacher" in signal)
    assert erm.labels == ("labels" in signal)


def test_the_twin_of_the_long_run_changes_its_size_at_the_same_share() -> None:
    hrrl, erm = (pretraining.long_recipe(method, "teacher") for method in ("hrrl", "erm"))
    for (first, side), (twins, twins_side) in zip(hrrl.image_sizes, erm.image_sizes, strict=True):
        assert side == twins_side
        assert first / hrrl.epochs == pytest.approx(twins / erm.epochs)


def test_runs_share_a_teachers_features(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    pretraining.borrow_features(second, [first])
    assert not second.exists()  # there are none yet
    for name in pretraining.KEPT_FEATURES:
        (first / name).write_text(name)
    pretraining.borrow_features(second, [first])
    assert [(second / name).read_text() for name in pretraining.KEPT_FEATURES] == list(pretraining.KEPT_FEATURES)


def test_table() -> None:
    cells = [
        {"signal": "labels", "method": "ERM", "seed": seed, "svm": {"a": value, "b": 50.0}}
        for seed, value in ((0, 40.0), (1, 42.0))
    ]
    assert pretraining.table(cells) == (
        "| learned from | method | seeds | a | b |\n|---|---|---|---|---|\n"
        "| labels | ERM | 2 | 41.00 ± 1.41 | 50.00 ± 0.00 |"
    )
