"""The tables and figures of `robustfeat paper`, from answers that are known."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from robustfeat.training.evaluation.answers import pack
from robustfeat.training.evaluation.corruptions import CORRUPTIONS, SEVERITIES
from robustfeat.training.evaluation.figures import Curve, Panel
from robustfeat.training.paper.exhibit import Exhibit
from robustfeat.training.paper.exhibits import EXHIBITS
from robustfeat.training.paper.measures import Measures
from robustfeat.training.paper.scale import SCALES
from robustfeat.training.paper.study import Machine, Study

SHARES = {"erm": 50, "el": 60, "cl": 40, "hrrl": 70, "erm-long": 55, "random": 50, "balanced": 45, "groupdro": 50}
"""Of 100 kinds of test images that each method tells, one more of them with each seed."""


@pytest.fixture
def measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Measures:
    def score(_: Measures, method: str, seed: int, target: str) -> dict[str, str]:
        return {"right": pack(np.arange(2000) % 100 < SHARES[method] + seed)}

    monkeypatch.setattr(Measures, "score", score)
    monkeypatch.setattr(Measures, "chosen", (0.1, 10.0))
    monkeypatch.setattr(Study, "images", lambda *_: (range(20_000), range(10_000)))
    targets = {name: f"somewhere/my-{name}" for name in ("cifar10", "sop", "svhn")}
    study = Study(tmp_path, SCALES["tiny"](), "somewhere/small", targets, Machine())
    return Measures(study, controls=getattr(request, "param", False))


@pytest.mark.parametrize("measures", [False, True], ids=["methods", "and controls"], indirect=True)
def curves_of(exhibit: Exhibit) -> Sequence[Curve]:
    panel = exhibit.panels[0]
    assert isinstance(panel, Panel)
    return panel.curves


def test_a_table_has_the_papers_numbers_beside_ours(measures: Measures) -> None:
    table = EXHIBITS["table4"](measures)
    rows = {row["method"]: row for row in table.rows}
    assert len(rows) == len(measures.methods)
    assert (rows["ERM"]["paper"], rows["ERM"]["here"]) == ("63.23 ± 0.35", "51.00 ± 1.00")
    assert {rows["ERM"][key] for key in ("paper, minus ERM", "here, minus ERM", "verdict")} == {""}
    hrrl = [rows["HRRL"][key] for key in ("paper", "here", "paper, minus ERM", "here, minus ERM", "verdict")]
    assert hrrl == ["67.33 ± 0.39", "71.00 ± 1.00", "+4.10", "+20.00", "holds"]
    if "GroupDRO" in rows:  # the paper has none
        assert [rows["GroupDRO"][key] for key in ("paper", "paper, minus ERM", "verdict")] == ["", "", "undecided"]
    assert "my-svhn (for SVHN); pre-trained on small, 20,000 images" in table.title


@pytest.mark.parametrize("measures", [False, True], ids=["methods", "and controls"], indirect=True)
def test_only_the_papers_methods_are_counted(measures: Measures) -> None:
    table = EXHIBITS["verdicts"](measures)
    assert [row["method"] for row in table.rows][:3] == ["EL", "CL", "HRRL"]
    assert len(table.rows) == len(measures.methods) - 1
    assert "Of the paper's 9 comparisons: 6 holds, 3 fails, 0 undecided." in table.notes[0]
    assert ("controls" in table.notes[0]) == (len(table.rows) > 3)
    assert {row["my-sop (for SOP)"] for row in table.rows if row["method"] == "CL"} == {"-10.00 fails"}


def test_the_accuracies_of_the_runs_are_shown_where_all_logged_them(
    measures: Measures, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = EXHIBITS["table2"](measures)
    assert "training" not in table.columns
    assert table.notes[-1] == "The training and validation accuracy of these runs were not recorded."
    score = Measures.score

    def logged(self: Measures, method: str, seed: int, target: str) -> dict[str, Any]:
        both = {} if method == "cl" and seed == 1 else {"training_accuracy": 0.5 + seed / 10, "validation_accuracy": 0}
        return {**score(self, method, seed, target), **both}

    monkeypatch.setattr(Measures, "score", logged)
    rows = {row["method"]: row for row in EXHIBITS["table2"](measures).rows}
    assert rows["EL"]["training"] == "60.00 ± 10.00"
    assert "training" not in rows["CL"]


@pytest.mark.parametrize("measures", [False, True], ids=["methods", "and controls"], indirect=True)
def test_the_exploratory_table_corrects_and_joins(measures: Measures) -> None:
    exhibit = EXHIBITS["exploratory"](measures)
    methods = [row["method"] for row in EXHIBITS["verdicts"](measures).rows]
    assert [row["method"] for row in exhibit.rows] == 4 * methods
    hrrl = [row for row in exhibit.rows if row["method"] == "HRRL"]
    assert [row["task"] for row in hrrl][::3] == ["my-cifar10 (for CIFAR-10)", "mean of all tasks (exploratory)"]
    # Each seed has one point more: a deviation of 1, three runs, and 2 degrees of freedom for each method.
    half = stats.t.ppf(0.975, 2 * len(measures.methods)) * np.sqrt(2 / 3)
    assert {row["95 % pooled"] for row in hrrl} == {f"{20 - half:+.2f} to {20 + half:+.2f}"}
    assert [row["verdict"] for row in hrrl] == ["holds"] * 3 + [""]
    assert [bool(row["p, Holm"]) for row in hrrl] == [True] * 3 + [False]
    if "GroupDRO" in methods:  # three families of controls that differ, and three that do not
        controls = [row for row in exhibit.rows if row["method"] in {"GroupDRO", "random directions"}]
        assert {row["p, Holm"] for row in controls} == {"1.0000", ""}
    assert len(exhibit.panels) == 4
    assert b"<svg" in exhibit.svg


def test_the_chosen_values_are_marked(measures: Measures, monkeypatch: pytest.MonkeyPatch) -> None:
    logged = {"training_accuracy": 0.75, "validation_accuracy": 0.5}

    def held_out(_: Measures, method: str, value: float | None, target: str) -> dict[str, Any] | None:
        if method == "erm" and target == "svhn":
            return None
        if value == 3.5 or (value, target) == (1, "svhn"):
            return {"diverged": "lost"}
        return {"held_out": 0.5 if target == "sop" else 0.25, **(logged if method == "erm" else {})}

    monkeypatch.setattr(Measures, "held_out_cell", held_out)
    exhibit = EXHIBITS["selection"](measures)
    rows = {row["model"]: row for row in exhibit.rows}
    assert [rows["ERM"][f"my-{name} (for {title})"] for name, title in (("sop", "SOP"), ("svhn", "SVHN"))] == [
        "50.00", "not measured",
    ]  # fmt: skip
    assert [rows["ERM"][key] for key in ("mean", "chosen", "training", "validation")] == ["", "", "75.00", "50.00"]
    assert "training" not in rows["EL, tau 0.1"]
    assert "Empty cells were not recorded." in exhibit.notes[0]
    assert [model for model, row in rows.items() if row["chosen"]] == ["EL, tau 0.1", "CL, lambda 10"]
    assert rows["CL, lambda 1"]["my-sop (for SOP)"] == "50.00"
    assert {rows["CL, lambda 10"]["mean"], rows["EL, tau 0.35"]["mean"]} == {"33.33"}
    assert {rows["CL, lambda 1"]["mean"], rows["EL, tau 1"]["mean"]} == {""}  # of two targets: not to be compared
    assert (rows["EL, tau 3.5"]["my-sop (for SOP)"], rows["EL, tau 3.5"]["mean"]) == ("diverged", "")


def test_corrupted_images_are_compared_with_erms(measures: Measures, monkeypatch: pytest.MonkeyPatch) -> None:
    def corrupted(_: Measures, method: str, seed: int, target: str) -> dict[str, Any]:
        share = {"erm": 0.3, "hrrl": 0.4}[method]
        told = np.full(1000, round(30 * share), np.uint8)
        by = {name: {str(one): {"accuracy": share - one / 100} for one in SEVERITIES} for name in CORRUPTIONS}
        scores = {"clean": 0.5, "corrupted": share, "kept": share / 0.5, "drift": 0.125}
        return {**scores, "by_corruption": by, "told": told.tobytes().hex()}

    monkeypatch.setattr(Measures, "corrupted", corrupted)
    exhibit = EXHIBITS["corruptions"](measures)
    erm, hrrl = exhibit.rows[:2]
    assert (hrrl["method"], hrrl["corrupted"], hrrl["kept"]) == ("HRRL", "40.00 ± 0.00", "0.8000 ± 0.0000")
    assert (erm["corrupted, minus ERM"], hrrl["corrupted, minus ERM"]) == ("", "+10.00")
    assert hrrl["95 % over images"] == "+10.00 to +10.00"
    (drawn,) = (curve for curve in curves_of(exhibit) if curve.label == "HRRL")
    np.testing.assert_allclose(drawn.points, [(0, 50), (1, 39), (2, 38), (3, 37), (4, 36), (5, 35)])


def test_what_diverged_is_said_in_figures_4_and_5(measures: Measures, monkeypatch: pytest.MonkeyPatch) -> None:
    measures.scale = replace(measures.scale, steps=(0.0, 1.0))
    monkeypatch.setattr(Measures, "by_step", lambda _, method, tau: None if tau == 1 else [0.5, 0.25])
    figure = EXHIBITS["fig4"](measures)
    assert figure.columns == ["model", "step 0", "step 1"]
    assert [row["model"] for row in figure.rows if len(row) == 1] == ["EL, tau 1, diverged"]
    assert [curve.label for curve in curves_of(figure)] == ["ERM", "EL, tau 0.1", "EL, tau 0.35", "EL, tau 3.5"]
    assert figure.rows[0]["step 1"] == "25.00"
    assert figure.title.endswith("small, 20,000 images, 5 epochs, one seed")
    cell = {"by_concept": {"Dog": 0.25, "Bird": 0.5}, "by_class": {"a": 0.25, "b": 0.375, "c": 0.5}}
    monkeypatch.setattr(Measures, "by_class", lambda _, method, lam: None if lam == 1 else cell)
    erm, lost, *others = EXHIBITS["fig5"](measures).rows
    assert lost == {"model": "CL, lambda 1, diverged"}
    assert len(others) == 2
    expected = {"worst concept": "Dog 25.00", "best concept": "Bird 50.00", "deviation over concepts": "12.50"}
    expected |= {"worst class": "a 25.00", "worst tenth of classes": "25.00", "Dog": "25.00", "Bird": "50.00"}
    assert erm == {"model": "ERM", **expected}


@pytest.mark.parametrize(
    ("method", "trained"),
    [
        ("erm", ("erm", 0.35, 10.0, 10)),
        ("el", ("el", 0.1, 10.0, 10)),
        ("cl", ("cl", 0.35, 100.0, 10)),
        ("hrrl", ("hrrl", 0.1, 100.0, 10)),
        ("erm-long", ("erm", 0.35, 10.0, 17)),
        ("random", ("random", 0.1, 10.0, 10)),
        ("balanced", ("balanced", 0.35, 10.0, 10)),
        ("groupdro", ("groupdro", 0.35, 10.0, 10)),
    ],
)
def test_each_run_has_its_own_seed_and_what_was_chosen(
    measures: Measures, monkeypatch: pytest.MonkeyPatch, method: str, trained: tuple[Any, ...]
) -> None:
    monkeypatch.setattr(Measures, "chosen", (0.1, 100.0))  # the recipe itself has 0.35 and 10
    for seed in (0, 2):
        name, recipe = measures.main_run(method, seed)
        assert name == f"main-{method}-s{seed}"
        assert (recipe.method, recipe.tau, recipe.lam, recipe.epochs) == trained
        assert recipe.seed == seed
