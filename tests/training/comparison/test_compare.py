"""`robustfeat compare`: the published cells, real runs, and results of `evaluate`."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from robustfeat.cli.compare_command import command as compare_command
from robustfeat.cli.evaluate_command import command as evaluate_command
from robustfeat.cli.rendering import Failure
from robustfeat.training.comparison.methods import group_scores
from robustfeat.training.comparison.scores import read_scores
from robustfeat.training.loop.trainer import train
from tests.conftest import ROOT, Share
from tests.training.small import recipe

RESULTS = ROOT / "docs" / "results"
CELLS = RESULTS / "cells"
OWN_METHOD = """
from robustfeat.training.objective import Objective

class Half(Objective):
    def training_loss(self, losses, batch):
        return losses.mean() / 2
"""


def cells(stage: str, methods: str = "erm el cl hrrl") -> list[str]:
    return [str(file) for method in methods.split() for file in sorted(CELLS.glob(f"svm-*-{stage}-{method}-s*.json"))]


def rows(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    assert compare_command([*arguments, "--json", "--quiet"], standalone_mode=False) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize(("stage", "suffix"), [("main", ""), ("biased", "-biased")])
def test_published_cells_give_the_published_intervals(
    stage: str, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {(row["task"], row["method"]): row for row in rows(cells(stage), capsys)}
    titles = {"el": "EL", "cl": "CL", "hrrl": "HRRL"}
    for table, task in (("table2", "cifar10"), ("table3", "sop"), ("table4", "svhn")):
        with open(RESULTS / f"{table}{suffix}.csv", newline="") as handle:
            published = {row["method"]: row for row in csv.DictReader(handle)}
        for method, title in titles.items():
            row, shown = found[task, method], published[title]
            assert f"{100 * row['difference']:+.2f}" == shown["here, minus ERM"]
            for key, column in (("paired", "95 % over seeds"), ("images", "95 % over images")):
                ends = " to ".join(f"{100 * row[f'{key}_{end}']:+.2f}" for end in ("low", "high"))
                assert ends == shown[column]
    assert found["mean of all tasks (exploratory)", "hrrl"]["p_holm"] is None
    nine = [row["p"] for (task, method), row in found.items() if method != "erm" and "mean" not in task]
    corrected = [row["p_holm"] for (task, method), row in found.items() if method != "erm" and "mean" not in task]
    assert len(nine) == 9
    assert min(corrected) == pytest.approx(min(1, 9 * min(nine)))


def test_the_joint_row_is_the_mean_over_the_tasks_of_each_seed(capsys: pytest.CaptureFixture[str]) -> None:
    (joint,) = (row for row in rows(cells("main", "erm el"), capsys) if "mean" in row["task"] and row["method"] == "el")
    shares = {
        method: np.mean(
            [
                [json.loads((CELLS / f"svm-{task}-main-{method}-s{seed}.json").read_text())["values"]["accuracy"]
                 for seed in range(3)]
                for task in ("cifar10", "sop", "svhn")
            ], axis=0,
        )
        for method in ("erm", "el")
    }  # fmt: skip
    test = stats.ttest_ind(shares["el"], shares["erm"])
    assert joint["p"] == pytest.approx(test.pvalue)
    interval = test.confidence_interval()
    assert (joint["pooled_low"], joint["pooled_high"]) == pytest.approx((interval.low, interval.high))


def test_the_documented_command_prints_the_nine_comparisons(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "evaluation.md").read_text()
    (line,) = re.findall(r"<!-- compare -->\n```bash\n(.*)\n```", page)
    script = line.replace("robustfeat", f"{sys.executable} -m robustfeat", 1)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert sum(line.count("|") == 11 and " el " in line for line in done.stdout.splitlines()) == 4
    assert done.stderr == "besides the method, the recipes differ in tau, lam\n"


def test_all_formats_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outs = [tmp_path / f"table{suffix}" for suffix in (".csv", ".md", ".tex", ".json", ".png", ".svg")]
    options = [part for out in outs for part in ("--out", str(out))]
    arguments = [*cells("main", "erm el"), *options, "--interval", "paired"]
    assert compare_command(arguments, standalone_mode=False) == 0
    said = capsys.readouterr()
    assert said.err == "besides the method, the recipes differ in tau\n"
    assert said.out == (tmp_path / "table.md").read_text()
    assert "| cifar10 | el | 3 | 57.82 ± 0.12 | -0.68 | -0.89 to -0.48 |" in said.out
    objects = json.loads((tmp_path / "table.json").read_text())
    with open(tmp_path / "table.csv", newline="") as handle:
        lines = list(csv.DictReader(handle))
    assert [float(line["accuracy"]) for line in lines] == [row["accuracy"] for row in objects]
    assert lines[0]["p"] == ""
    assert objects[1]["p"] == pytest.approx(0.0049, abs=1e-4)
    latex = (tmp_path / "table.tex").read_text()
    assert latex.startswith("\\begin{tabular}{llllllllll}\n\\toprule\ntask & method & ")
    assert r"cifar10 & el & 3 & 57.82 $\pm$ 0.12 & -0.68 &" in latex
    assert r"95 \% paired" in latex
    assert latex.count(r" \\") == 9
    with Image.open(tmp_path / "table.png") as image:
        assert image.width > 2 * image.height  # three targets and their mean beside each other
    assert b"<svg" in (tmp_path / "table.svg").read_bytes()


@pytest.fixture(scope="module")
def runs(dataset: Path, share: Share) -> Path:
    """Runs of ERM and EL with two seeds each, and of one's own method."""

    def build(out: Path) -> None:
        out.mkdir()
        (out / "compared_method.py").write_text(OWN_METHOD)
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(out)
            for method in ("erm", "el", "compared_method:Half"):
                for seed in (0, 1):
                    chosen = recipe(dataset).replace(method=method, seed=seed)
                    place = out / f"{method.partition('_')[0]}-{seed}"
                    train(dataset, chosen, place, workers=0, threads=1, quiet=True)

    return share("compared-runs", build)


def places(runs: Path) -> list[str]:
    return sorted(str(run) for run in runs.iterdir() if run.is_dir() and run.name[-2] == "-")


def test_runs_are_grouped_by_method_and_compared_by_validation(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = {row["method"]: row for row in rows(places(runs), capsys)}
    assert sorted(found) == ["compared_method:Half", "el", "erm"]
    for method, prefix in (("erm", "erm"), ("el", "el"), ("compared_method:Half", "compared")):
        logged = [
            [json.loads(line) for line in (runs / f"{prefix}-{seed}" / "metrics.jsonl").read_text().splitlines()]
            for seed in (0, 1)
        ]
        validation = [
            [line for line in lines if line["event"] == "epoch"][-1]["validation_accuracy"] for lines in logged
        ]
        assert found[method]["accuracy"] == pytest.approx(np.mean(validation))
        assert found[method]["validation_accuracy"] == found[method]["accuracy"]
        last = [[line for line in lines if line["event"] == "train"][-1]["accuracy"] for lines in logged]
        assert found[method]["training_accuracy"] == pytest.approx(np.mean(last))  # a line an epoch
        assert found[method]["seeds"] == "0 1"
        assert found[method]["images_low"] is None


def test_results_of_evaluate_keep_the_answers_of_each_image(
    runs: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results.json"
    arguments = [*places(runs), "--task", f"clothes={dataset}", "--out", str(out), "--no-few-shot", "--quiet"]
    assert evaluate_command(arguments, standalone_mode=False) == 0
    results = json.loads(out.read_text())
    capsys.readouterr()
    found = rows([str(out)], capsys)
    assert [row["method"] for row in found] == ["erm", "compared_method:Half", "el"]
    for row in found:
        own = [one for one in results if one["training"]["recipe"]["method"] == row["method"]]
        assert row["accuracy"] == pytest.approx(np.mean([one["svm"]["accuracy"] for one in own]))
        assert row["training_accuracy"] == pytest.approx(np.mean([one["training"]["training_accuracy"] for one in own]))
    for score in read_scores([str(out)]):
        assert score.right is not None
        assert score.right.mean() == pytest.approx(score.accuracy)
    assert found[1]["images_low"] is not None
    # Names make one method of results that differ, and models without a recipe have no seed.
    for place, result in enumerate(results):
        result["training"] = {}
        (tmp_path / f"{place}.json").write_text(json.dumps([result]))
    named = [f"{'new' if place % 2 else 'old'}={tmp_path / f'{place}.json'}" for place in range(len(results))]
    old, new = rows([*named, "--baseline", "old"], capsys)
    assert (old["method"], old["runs"], new["method"], new["runs"]) == ("old", 3, "new", 3)
    assert new["paired_low"] is None
    assert new["pooled_low"] is not None
    with pytest.raises(Failure, match="new has the seeds unknown, unknown, unknown and old unknown"):
        compare_command([*named, "--baseline", "old", "--interval", "paired"], standalone_mode=False)


def test_methods_of_one_name_are_told_apart_by_their_settings() -> None:
    scores = read_scores(cells("main", "erm erm-long el"))
    tasks = group_scores(scores)
    assert list(tasks["sop"]) == ["erm, epochs 10, milestones [30, 60]", "erm, epochs 17, milestones [51, 102]", "el"]
    assert all(len(runs.accuracies) == 3 for methods in tasks.values() for runs in methods.values())


def test_runs_that_cannot_be_compared_are_refused(runs: Path, tmp_path: Path) -> None:
    half = Path(shutil.copytree(runs / "erm-0", tmp_path / "half"))
    saved = torch.load(half / "checkpoint.pt", weights_only=True)
    saved["recipe"]["epochs"] = saved["epoch"] + 7
    torch.save(saved, half / "checkpoint.pt")
    other = json.loads((CELLS / "svm-sop-main-el-s0.json").read_text())
    other["inputs"]["task"][2] = "other images"
    (tmp_path / "svm-sop-main-el-s0.json").write_text(json.dumps(other))
    (tmp_path / "notes.json").write_text('{"a": 1}')
    unlogged = Path(shutil.copytree(runs / "erm-0", tmp_path / "unlogged"))
    (unlogged / "metrics.jsonl").unlink()
    erm = str(CELLS / "svm-sop-main-erm-s0.json")
    refused = [
        ([str(half)], r"half: is at epoch (\d) of \d; runs must be finished"),
        ([str(unlogged)], "its metrics have no validation accuracy"),
        ([str(tmp_path / "nothing")], "nothing: expected a run of robustfeat train"),
        ([str(tmp_path)], "got a folder without checkpoint"),
        (["=x"], "=x: expected NAME=RUN"),
        ([str(tmp_path / "notes.json")], "expected results of evaluate, or an svm cell"),
        ([erm], "sop: expected the baseline erm and another method; got nothing beside it"),
        ([erm, erm], "are both erm with seed 0; leave one out"),
        ([erm, f"mine={erm}", "--baseline", "his"], "got no his"),
        ([erm, str(tmp_path / "svm-sop-main-el-s0.json")], "were scored on different test images"),
        (cells("main", "erm erm-long"), "several methods are ERM: .*; pass one of them as --baseline"),
        ([*cells("main", "el")[:2], *cells("main", "erm")[1:3], "--interval", "paired"], "pass --interval pooled"),
    ]  # fmt: skip
    for arguments, message in refused:
        with pytest.raises(Failure, match=message):
            compare_command(arguments, standalone_mode=False)
