"""Scales with a gate and a margin: their rules, from accuracies that are known, and from small trainings."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from robustfeat.cli.paper_command import command as paper_command
from robustfeat.cli.rendering import Failure
from robustfeat.errors import InputError, StoppedError
from robustfeat.training.evaluation.answers import pack
from robustfeat.training.evaluation.probes import fold_scores
from robustfeat.training.loop.trainer import TrainingResult
from robustfeat.training.paper.exhibits import EXHIBITS
from robustfeat.training.paper.gate import measure_gate, pass_gate
from robustfeat.training.paper.measures import Measures
from robustfeat.training.paper.scale import SCALES, Gate, Scale, open_scale
from robustfeat.training.paper.study import Machine, Study
from robustfeat.training.recipe import Recipe
from tests.conftest import Run
from tests.training.paper.test_paper import benchmark, rows, target

__all__ = ["benchmark", "target"]

ROWS = 10_000
TARGETS = ("cifar10", "sop", "svhn")
GAINS = {"erm": 0.0, "erm-long": 0.002, "el": -0.02, "cl": 0.001, "hrrl": 0.02}
"""Shares by which each method is above ERM."""


def accuracy(method: str, seed: int, target: str) -> float:
    """Of the test images; seeds deviate by multiples of 0.001."""
    factor = {"erm": 1, "erm-long": 2, "el": 3, "cl": 4, "hrrl": 6}[method]
    deviation = (seed * factor % 5 - 2) / 1000
    return round(0.5 + 0.1 * TARGETS.index(target) + GAINS[method] + deviation, 4)


@pytest.fixture
def create_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Measures]:
    """Of a scale without data, with accuracies that are known."""

    def score(_: Measures, method: str, seed: int, target: str) -> dict[str, str]:
        return {"right": pack(np.arange(ROWS) < round(ROWS * accuracy(method, seed, target)))}

    def main_folds(_: Measures, method: str, seed: int, target: str) -> dict[str, Any]:
        gain = 0.003 if method == "erm-long" else 0.0
        shares = [0.4 + gain + 0.01 * seed + fold / 100 for fold in range(5)]
        return {"folds": shares, "training_accuracy": 0.93 + seed / 50, "validation_accuracy": 0.25}

    monkeypatch.setattr(Measures, "score", score)
    monkeypatch.setattr(Measures, "main_folds", main_folds)
    monkeypatch.setattr(Measures, "chosen", (0.35, 10.0))
    monkeypatch.setattr(Study, "images", lambda *_: (range(20_000), range(2_000)))

    def create(methods: tuple[str, ...] = (), scale: str = "saturated", **changes: Any) -> Measures:
        opened = replace(SCALES[scale](), **changes)
        places = {name: f"somewhere/my-{name}" for name in TARGETS}
        return Measures(Study(tmp_path, opened, "somewhere/small", places, Machine(quiet=True)), methods=methods)

    return create


def test_the_scale_is_the_protocols() -> None:
    scale = SCALES["saturated"]()
    assert (scale.rows, scale.concept_shares, scale.recipe.epochs, scale.long_epochs) == (20_000, True, 60, 101)
    assert (scale.recipe.validation_size, scale.recipe.image_sizes, scale.recipe.q_baseline) == (48, ((0, 48),), True)
    assert scale.gate == Gate(0.9, 0.005, (0, 1))
    assert (scale.taus, scale.lams, scale.selection_seeds) == ((0.1, 0.35, 1.0), (3.0, 10.0, 30.0), (100, 101))
    assert (scale.methods, len(scale.seeds)) == (("erm", "erm-long", "el", "cl", "hrrl"), 5)
    assert (scale.margin, scale.selection) == (0.005, scale.recipe.replace(seed=100))
    narrow = SCALES["narrow"]()
    assert (narrow.recipe.width, narrow.recipe.epochs, narrow.rows) == (16, 30, None)
    assert (narrow.methods, len(narrow.seeds), narrow.gate) == (("erm", "hrrl"), 3, None)


def test_a_gate_that_was_not_passed_is_tried_with_more_epochs() -> None:
    longer = open_scale("saturated", epochs=101)
    assert (longer.recipe.epochs, longer.selection.epochs, longer.long_epochs) == (101, 101, 170)
    assert longer.recipe.replace(epochs=60, milestones=SCALES["saturated"]().recipe.milestones) == (
        SCALES["saturated"]().recipe
    )
    with pytest.raises(InputError, match="the scale tiny has a fixed number of epochs"):
        open_scale("tiny", epochs=20)
    with pytest.raises(InputError, match="epochs=20"):
        open_scale("narrow", quick=True, epochs=20)


def test_the_primary_comparison_is_dunnetts_of_the_mean_of_targets(create_measures: Callable[..., Measures]) -> None:
    exhibit = EXHIBITS["verdicts"](create_measures())
    found = {row["method"]: row for row in exhibit.rows}
    assert list(found) == ["ERM", "ERM for HRRL's time", "EL", "CL", "HRRL"]
    means = {
        method: [float(np.mean([accuracy(method, seed, target) for target in TARGETS])) for seed in range(5)]
        for method in GAINS
    }
    reference = stats.dunnett(
        *[means[method] for method in GAINS if method != "erm"], control=means["erm"], rng=np.random.default_rng(0)
    )
    ends = reference.confidence_interval()
    titles = ["ERM for HRRL's time", "EL", "CL", "HRRL"]
    for title, low, high in zip(titles, ends.low, ends.high, strict=True):
        told = [float(end) for end in found[title]["95 %, Dunnett"].split(" to ")]
        assert told == pytest.approx([100 * low, 100 * high], abs=0.02)
    assert [found[title]["verdict"] for title in titles] == ["equivalent", "fails", "equivalent", "holds"]
    assert found["ERM"]["verdict"] == ""
    assert found["HRRL"]["minus ERM"] == "+2.00"
    assert "Its intervals hold together for 4 planned comparisons" in exhibit.notes[0]
    assert exhibit.notes[-1].startswith("Gate: ERM's training accuracy is 94.00 % (at least 90 %), and 101 epochs")


def test_the_nine_cells_are_corrected_by_holms_method(create_measures: Callable[..., Measures]) -> None:
    measures = create_measures()
    by_target = {}
    for place in TARGETS:
        groups = {method: [accuracy(method, seed, place) for seed in range(5)] for method in GAINS}
        error = np.sqrt(np.mean([np.var(values, ddof=1) for values in groups.values()]) * 2 / 5)
        for method in ("el", "cl", "hrrl"):
            gain = np.mean(groups[method]) - np.mean(groups["erm"])
            by_target[method, place] = 2 * stats.t.sf(abs(gain) / error, 20)
    ordered, least = sorted(by_target.items(), key=lambda item: item[1]), 0.0
    tables = {one: {row["method"]: row for row in EXHIBITS[f"table{number}"](measures).rows}
              for number, one in enumerate(TARGETS, 2)}  # fmt: skip
    for rank, ((method, place), p) in enumerate(ordered):
        least = max(least, min(1.0, (9 - rank) * p))
        row = tables[place][{"el": "EL", "cl": "CL", "hrrl": "HRRL"}[method]]
        assert float(row["p, Holm"].removeprefix("< ")) == pytest.approx(least, abs=1e-4)
        assert row["verdict"] == {"el": "fails", "cl": "undecided", "hrrl": "holds"}[method]
    assert "95 % over images" not in EXHIBITS["table2"](measures).columns
    cells = {row["method"]: row for row in EXHIBITS["verdicts"](measures).rows}
    assert cells["EL"]["my-sop (for SOP)"] == "-2.00 fails"


def test_a_tier_keeps_the_planned_number_of_comparisons(create_measures: Callable[..., Measures]) -> None:
    tier = create_measures(("el",))
    assert tier.methods == ("erm", "el")
    assert {method for method, *_ in tier.grid()} == {"el"}  # lambda is not needed yet
    exhibit = EXHIBITS["verdicts"](tier)
    (_, el) = exhibit.rows
    low, high = (float(end) for end in el["95 %, Dunnett"].split(" to "))
    means = [
        [np.mean([accuracy(method, seed, one) for one in TARGETS]) for seed in range(5)] for method in ("erm", "el")
    ]
    error = 100 * np.sqrt(np.var(means, axis=1, ddof=1).mean() * 2 / 5)
    assert (high - low) / 2 / error == pytest.approx(3.02, abs=0.06)  # Dunnett's for 4 comparisons, 8 degrees; not 2.31
    assert "Not in this table: ERM for HRRL's time, CL, HRRL." in exhibit.notes
    with pytest.raises(InputError, match="method=random: expected erm, erm-long, el, cl, hrrl"):
        create_measures(("random",))
    with pytest.raises(InputError, match="the scale saturated has no control methods; leave `controls` out"):
        Measures(tier.study, controls=True)


def test_one_comparison_has_students_interval(create_measures: Callable[..., Measures]) -> None:
    exhibit = EXHIBITS["verdicts"](create_measures(scale="narrow"))
    (_, hrrl) = exhibit.rows
    means = [[np.mean([accuracy(method, seed, one) for one in TARGETS]) for seed in range(3)]
             for method in ("erm", "hrrl")]  # fmt: skip
    expected = stats.ttest_ind(means[1], means[0]).confidence_interval()
    told = [float(end) for end in hrrl["95 %, Dunnett"].split(" to ")]
    assert told == pytest.approx([100 * expected.low, 100 * expected.high], abs=0.006)
    assert not any(note.startswith("Gate") for note in exhibit.notes)


def test_the_gate_shows_what_it_measured(create_measures: Callable[..., Measures]) -> None:
    exhibit = EXHIBITS["gate"](create_measures())
    assert [(row["method"], row["epochs"], row["seeds"]) for row in exhibit.rows] == [
        ("ERM", 60, 2), ("ERM for HRRL's time", 101, 2),
    ]  # fmt: skip
    erm, longer = exhibit.rows
    assert (erm["training"], erm["validation"]) == ("94.00 ± 1.41", "25.00 ± 0.00")
    assert (erm["my-sop (for SOP)"], erm["mean"], longer["mean"]) == ("42.50 ± 0.71", "42.50 ± 0.71", "42.80 ± 0.71")
    assert exhibit.notes[0] == (
        "Passed: ERM's training accuracy is 94.00 % (at least 90 %), and 101 epochs in place of 60 gain +0.30 points "
        "held out (less than 0.5)."
    )


@pytest.mark.parametrize(
    ("gate", "passed"),
    [
        (Gate(0.94, 0.0031, (0, 1)), True),
        (Gate(0.941, 0.0031, (0, 1)), False),
        (Gate(0.94, 0.0029, (0, 1)), False),
    ],
)
def test_a_gate_needs_both_conditions(create_measures: Callable[..., Measures], gate: Gate, passed: bool) -> None:
    measures = create_measures(gate=gate)
    assert measure_gate(measures).passed is passed
    refusal = pass_gate(measures)
    assert (refusal is None) is passed
    if refusal:
        assert str(refusal).startswith("the gate is not passed, so no methods are compared: ERM's training accuracy")
        assert str(refusal).endswith("; train longer with `epochs=101` and another `out`")


def test_the_selection_shows_the_error_and_what_is_within_it(
    create_measures: Callable[..., Measures], monkeypatch: pytest.MonkeyPatch
) -> None:
    means = {("el", 0.1): 0.49, ("el", 0.35): 0.505, ("el", 1.0): 0.51, ("cl", 10.0): 0.5, ("cl", 30.0): 0.4}

    def held_out_folds(_: Measures, method: str, value: float, target: str, seed: int) -> list[float] | None:
        """Folds deviate by up to 0.04, targets by 0.1 and seeds by 0.01. Lambda 3 diverges with one seed."""
        if (method, value) == ("cl", 3.0):
            return None if seed == 101 else [0.9] * 5
        apart = 0.1 * (TARGETS.index(target) - 1) + 0.02 * (seed - 100.5)
        return [means[method, value] + apart + place / 50 for place in range(-2, 3)]

    monkeypatch.undo()  # what is chosen is the rule's
    monkeypatch.setattr(Measures, "held_out_folds", held_out_folds)
    monkeypatch.setattr(Study, "images", lambda *_: (range(10_000), range(2_000)))
    measures = create_measures()
    assert measures.chosen == (0.35, 10.0)
    exhibit = EXHIBITS["selection"](measures)
    assert exhibit.title.endswith("small, 10,000 images, 60 epochs, 2 seeds")
    found = {row["model"]: row for row in exhibit.rows}
    assert [model for model, row in found.items() if row["chosen"]] == ["EL, tau 0.35", "CL, lambda 10"]
    el = found["EL, tau 1"]
    assert [el[f"my-{name}"] for name in ("cifar10 (for CIFAR-10)", "svhn (for SVHN)")] == ["41.00", "61.00"]
    assert (el["mean"], el["standard error"]) == ("51.00", "1.41")  # sqrt(0.001 / 5)
    assert (found["CL, lambda 3"]["mean"], found["CL, lambda 3"]["my-sop (for SOP)"]) == ("", "diverged")


@pytest.mark.parametrize("classes", [2, 3])
def test_fold_scores_are_of_rows_that_were_not_fitted(classes: int) -> None:
    rng = np.random.default_rng(0)
    y = rng.permutation(np.arange(1000) % classes) * 2  # numbers with gaps
    x = (rng.standard_normal((1000, 4)) + y[:, None] / 4).astype(np.float32)
    noise = rng.permutation(y)  # labels that nothing tells
    assert 1 / classes < np.mean(fold_scores(x, y, threads=1)["folds"]) < 1
    assert np.mean(fold_scores(x, noise, threads=1)["folds"]) == pytest.approx(1 / classes, abs=0.08)
    assert len(fold_scores(x, y, threads=1)["folds"]) == 5
    assert fold_scores(x[:classes], np.arange(classes), threads=1)["folds"] == []


def quick_scale() -> Scale:
    """The rules of the scale on the fewest images."""
    return replace(open_scale("saturated", quick=True), selection_rows=32, taus=(0.35,), lams=(1.0,))


def test_a_stopped_report_trains_only_the_rest(
    benchmark: Path, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal ends the third run of the gate. The next call leaves finished runs and cells as they are."""
    train = Study._train
    trained: list[str] = []

    def stop_in_the_third(study: Study, data: str, recipe: Recipe, folder: Path, resume: bool) -> TrainingResult:
        if len(trained) == 2:
            raise StoppedError("stopped")
        trained.append(folder.name)
        return train(study, data, recipe, folder, resume)

    def count(study: Study, data: str, recipe: Recipe, folder: Path, resume: bool) -> TrainingResult:
        trained.append(folder.name)
        return train(study, data, recipe, folder, resume)

    def create() -> Measures:
        places = dict.fromkeys(TARGETS, str(target))
        study = Study(tmp_path / "report", quick_scale(), str(benchmark), places, Machine("cpu", 1, 0, quiet=True))
        return Measures(study, methods=["el"])

    monkeypatch.setattr(Study, "_train", stop_in_the_third)
    with pytest.raises(StoppedError, match="main-erm-s1 is saved as far as it is"):
        pass_gate(create())
    kept = {file: file.read_bytes() for file in (tmp_path / "report" / "cells").iterdir()}
    assert sorted(file.name for file in kept) == sorted(
        f"folds-{name}-main-{method}-s0.json" for method in ("erm", "erm-long") for name in TARGETS
    )
    monkeypatch.setattr(Study, "_train", count)
    measures = create()
    assert pass_gate(measures) is None
    measures.compute(["verdicts"])
    assert len(trained) == len(set(trained))  # nothing twice
    runs = {"main-erm-s0", "main-erm-s1", "main-erm-long-s0", "main-erm-long-s1", "main-el-s0", "main-el-s1"}
    assert set(trained) == runs | {"selection-el-tau0.35-s100", "selection-el-tau0.35-s101"}
    assert {file: file.read_bytes() for file in kept} == kept
    assert measures.chosen == (0.35, None)
    trained.clear()
    again = create()
    again.compute(["gate", "verdicts"])
    assert EXHIBITS["verdicts"](again).rows == EXHIBITS["verdicts"](measures).rows
    assert trained == []
    # The main runs' images have ImageNet's shares, and the selection's are a part of them.
    origin = json.loads((tmp_path / "report" / "data" / "main" / "origin.json").read_text())
    assert (origin["shares"], origin["rows"]) == ("imagenet11", 60)
    assert measures.study.title.endswith("with ImageNet's shares of concepts")
    assert len(measures.study.images("selection")[0]) == 32
    cell = json.loads((tmp_path / "report" / "cells" / "folds-sop-selection-el-tau0.35-s101.json").read_text())
    assert (cell["inputs"]["recipe"]["seed"], cell["inputs"]["recipe"]["tau"]) == (101, 0.35)
    assert len(cell["values"]["folds"]) == 5


def test_a_comparison_is_refused_until_the_gate_is_passed(
    benchmark: Path, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, robustfeat: Run
) -> None:
    out, places = tmp_path / "report", [part for name in TARGETS for part in ("--target", f"{name}={target}")]
    shared = ("--quick", "--benchmark", benchmark, *places, "--out", out, "--threads", 1, "--workers", 0)
    done = robustfeat("paper", "gate", "--scale", "saturated", *shared, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "Passed: ERM's training accuracy is" in done.stdout
    assert {row["method"] for row in rows(out / "gate.csv")} == {"ERM", "ERM for HRRL's time"}
    # A stricter gate refuses the same runs. No method is trained for a comparison.
    monkeypatch.setattr("robustfeat.training.paper.scale._OPEN_GATE", Gate(1.01, 1.0, (0, 1)))
    arguments = ["verdicts", "table1", "--scale", "saturated", *map(str, shared), "--device", "cpu", "--quiet"]
    with pytest.raises(Failure, match=r"the gate is not passed, so .*; train longer with --epochs 2 and another --out"):
        paper_command(arguments, standalone_mode=False)
    assert not (out / "verdicts.csv").exists()
    assert (out / "table1.csv").exists()
    assert "Not passed: ERM's training accuracy" in (out / "gate.md").read_text().replace("\n", " ")
    assert "Not passed" in (out / "index.html").read_text()
    assert {folder.name for folder in (out / "runs").iterdir()} == {
        f"main-{method}-s{seed}" for method in ("erm", "erm-long") for seed in (0, 1)
    }
    done = robustfeat("paper", "gate", "--scale", "tiny", *shared)
    assert done.stderr.startswith("robustfeat: gate: expected verdicts, exploratory, table1")
    done = robustfeat("paper", "exploratory", "--scale", "saturated", *shared)
    assert done.stderr.startswith("robustfeat: exploratory: expected gate, verdicts, table1")
    done = robustfeat("paper", "verdicts", "--epochs", 3, *shared)
    assert done.stderr.startswith("robustfeat: --epochs 3: the scale tiny has a fixed number of epochs; leave --epochs")
