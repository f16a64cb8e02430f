"""The tables of `robustfeat paper`, from answers that are known."""

from pathlib import Path

import numpy as np
import pytest

from robustfeat.training.paper.cells import pack
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
    targets = {name: f"somewhere/my-{name}" for name in ("cifar10", "sop", "svhn")}
    study = Study(tmp_path, SCALES["tiny"](), "somewhere/small", targets, Machine())
    return Measures(study, controls=request.param)


@pytest.mark.parametrize("measures", [False, True], ids=["methods", "and controls"], indirect=True)
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
