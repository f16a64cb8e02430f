"""docs/results.md: its tables are those of its cells, computed again here in another way."""

import csv
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

import results
from results import fill
from robustfeat.training.paper.scale import SCALES
from robustfeat.training.recipe import Recipe

DOCS = Path(__file__).parents[1] / "docs"
CELLS = DOCS / "results" / "cells"
TABLES = {"table2": "cifar10", "table3": "sop", "table4": "svhn"}
METHODS = {"erm": "ERM", "el": "EL", "cl": "CL", "hrrl": "HRRL"}
CONTROLS = {
    "erm-long": "ERM for HRRL's time", "random": "random directions", "balanced": "class-balanced ERM",
    "groupdro": "GroupDRO",
}  # fmt: skip


BENCHMARKS = {"": ("main", METHODS | CONTROLS), "-biased": ("biased", METHODS)}
"""By what names of tables end with: what names of their runs begin with, and the methods."""


def svm_cells(target: str, stage: str, method: str) -> list[dict[str, Any]]:
    files = sorted(CELLS.glob(f"svm-{target}-{stage}-{method}-s*.json"))
    return [json.loads(file.read_text())["values"] for file in files]


def answers(cell: dict[str, Any]) -> np.ndarray:
    count, digits = cell["right"].split(":")
    return np.array([int(bit) for digit in digits for bit in f"{int(digit, 16):04b}"][: int(count)])


def rows_of(table: str) -> dict[str, dict[str, str]]:
    with open(DOCS / "results" / f"{table}.csv", newline="") as handle:
        return {row["method"]: row for row in csv.DictReader(handle)}


def ends(text: str) -> list[float]:
    return [float(number) for number in text.split(" to ")]


def test_the_page_shows_the_tables_as_they_are() -> None:
    page = (DOCS / "results.md").read_text()
    assert page == fill(page, DOCS / "results")
    names = (*TABLES, "verdicts", "exploratory")
    needed = {f"{name}{suffix}" for name in names for suffix in BENCHMARKS}
    assert needed <= set(re.findall(r"<!-- results/(\S+)\.md -->", page))


@pytest.mark.parametrize("suffix", BENCHMARKS)
@pytest.mark.parametrize("table", TABLES)
def test_a_table_is_what_its_cells_say(table: str, suffix: str) -> None:
    rows, (stage, methods) = rows_of(table + suffix), BENCHMARKS[suffix]
    assert list(rows) == list(methods.values())
    cells = {method: svm_cells(TABLES[table], stage, method) for method in methods}
    baseline = np.array([cell["accuracy"] for cell in cells["erm"]])
    for method, title in methods.items():
        row, accuracies = rows[title], np.array([cell["accuracy"] for cell in cells[method]])
        assert int(row["seeds"]) == len(accuracies) >= 3
        assert row["here"] == f"{100 * accuracies.mean():.2f} ± {100 * accuracies.std(ddof=1):.2f}"
        images = np.stack([answers(cell) for cell in cells[method]])
        np.testing.assert_allclose(images.mean(1), accuracies)
        if method == "erm":
            continue
        paired = stats.ttest_1samp(100 * (accuracies - baseline), 0).confidence_interval(0.95)
        over_seeds = ends(row["95 % over seeds"])
        np.testing.assert_allclose(over_seeds, [paired.low, paired.high], atol=0.006)
        # The bootstrap of a mean of many images is close to the normal distribution.
        gains = 100 * (images - np.stack([answers(cell) for cell in cells["erm"]])).mean(0)
        half = 1.96 * gains.std() / np.sqrt(len(gains))
        over_images = ends(row["95 % over images"])
        np.testing.assert_allclose(over_images, [gains.mean() - half, gains.mean() + half], atol=0.05 + 0.05 * half)
        low, high = min(*over_seeds, *over_images), max(*over_seeds, *over_images)
        if min(abs(low), abs(high)) > 0.01:  # what is printed tells on which side of 0 it is
            assert row["verdict"] == ("holds" if low > 0 else "fails" if high < 0 else "undecided")


def test_readme_tells_the_verdicts_of_the_tables() -> None:
    readme = (DOCS.parent / "README.md").read_text().replace("\n", " ")
    told = []
    for suffix in BENCHMARKS:
        tables = [rows_of(table + suffix) for table in TABLES]
        marks = [rows[title]["verdict"] for rows in tables for title in METHODS.values() if title != "ERM"]
        told.append(", ".join(f"{marks.count(mark)} {mark}" for mark in ("holds", "fails", "undecided")))
    counts = r"\d holds, \d fails, \d undecided"
    assert re.findall(counts, readme) == told
    assert set(re.findall(counts, (DOCS / "results.md").read_text())) == set(told)
    tables = [rows_of(table) for table in TABLES]
    longer = [
        float(rows["ERM for HRRL's time"]["here"].split()[0]) - float(rows["HRRL"]["here"].split()[0])
        for rows in tables
    ]
    assert ("ERM trained for HRRL's time has better means" in readme) == (min(longer) > 0)


@pytest.mark.parametrize("suffix", BENCHMARKS)
def test_the_verdicts_are_those_of_the_tables(suffix: str) -> None:
    tables, methods = [rows_of(table + suffix) for table in TABLES], BENCHMARKS[suffix][1]
    for method, row in rows_of(f"verdicts{suffix}").items():
        told = [f"{rows[method]['here, minus ERM']} {rows[method]['verdict']}" for rows in tables]
        assert list(row.values()) == [method, *told]
    assert len(rows_of(f"verdicts{suffix}")) == len(methods) - 1


@pytest.mark.parametrize("suffix", BENCHMARKS)
def test_the_exploratory_table_is_what_its_cells_say(suffix: str) -> None:
    """Computed again by an analysis of variance and by Holm's steps."""
    stage, methods = BENCHMARKS[suffix]
    with open(DOCS / "results" / f"exploratory{suffix}.csv", newline="") as handle:
        rows = list(csv.DictReader(handle))
    marks = [row["verdict"] for name in TABLES for row in rows_of(name + suffix).values() if row["verdict"]]
    assert [row["verdict"] for row in rows if row["verdict"]] == marks
    shares = np.array([
        [[cell["accuracy"] for cell in svm_cells(target, stage, method)] for method in methods]
        for target in TABLES.values()
    ])  # fmt: skip
    shares = 100 * np.concatenate([shares, shares.mean(0)[None]])  # by target or their mean, method, seed
    exact: list[tuple[float, dict[str, str]]] = []
    degrees, seeds = len(methods) * (shares.shape[2] - 1), shares.shape[2]
    for table, (values, own) in enumerate(zip(shares, np.split(np.array(rows), len(shares)), strict=True)):
        error = np.sqrt(values.var(1, ddof=1).mean() * 2 / seeds)
        gains = values[1:].mean(1) - values[0].mean()
        p_values = 2 * stats.t.sf(abs(gains) / error, degrees)
        for row, gain, p in zip(own, gains, p_values, strict=True):
            half = stats.t.ppf(0.975, degrees) * error
            np.testing.assert_allclose(ends(row["95 % pooled"]), [gain - half, gain + half], atol=0.006)
            assert float(row["p"].removeprefix("< ")) == pytest.approx(p, abs=1e-4)
            assert bool(row["p, Holm"]) == (table < len(TABLES))
            exact.append((p, row))
    for family in (set(METHODS.values()), set(CONTROLS.values())):
        told = sorted((p, row["p, Holm"]) for p, row in exact if row["method"] in family and row["p, Holm"])
        least = 0.0
        for place, (p, corrected) in enumerate(told):
            least = max(least, min(1, (len(told) - place) * p))
            assert float(corrected.removeprefix("< ")) == pytest.approx(least, abs=1e-4)


def test_a_reports_results_are_put_beside_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    docs, report = tmp_path / "docs", tmp_path / "report"
    for folder in (docs / "results" / "cells", report / "cells"):
        folder.mkdir(parents=True)
        (folder / f"of-{folder.parent.name}.json").write_text("{}")
    (docs / "results.md").write_text("Before\n<!-- results/t.md -->\nold\n<!-- end -->\nafter\n")
    (report / "t.md").write_text("new\n")
    monkeypatch.setattr(results, "DOCS", docs)
    monkeypatch.setattr("sys.argv", ["results.py", str(report)])
    results.main()
    assert (docs / "results.md").read_text() == "Before\n<!-- results/t.md -->\nnew\n\n<!-- end -->\nafter\n"
    assert sorted(file.name for file in (docs / "results" / "cells").iterdir()) == ["of-report.json", "of-results.json"]
    monkeypatch.setattr("sys.argv", ["results.py", str(tmp_path / "repotr")])
    with pytest.raises(SystemExit):
        results.main()


@pytest.mark.parametrize("stage", ["main", "biased"])
def test_runs_that_are_compared_differ_in_nothing_but_the_method(stage: str) -> None:
    recipes = defaultdict(list)
    for file in CELLS.glob(f"svm-*-{stage}-*.json"):
        if "-erm-long-" in file.name:  # differs in its epochs: that is its point
            continue
        inputs = json.loads(file.read_text())["inputs"]
        assert inputs["data"].get("stage", "main") == stage, file
        recipe = {key: value for key, value in inputs["recipe"].items() if key not in {"method", "seed", "tau", "lam"}}
        recipes[json.dumps([recipe, inputs["data"]], sort_keys=True)].append(file.name)
    assert len(recipes) == 1


@pytest.mark.parametrize("stage", ["main", "biased"])
def test_runs_were_trained_with_their_seed_and_what_was_chosen(stage: str) -> None:
    with open(DOCS / "results" / "selection.csv", newline="") as handle:
        chosen = [row["model"].split() for row in csv.DictReader(handle) if row["chosen"]]
    (_, _, tau), (_, _, lam) = chosen
    for file in CELLS.glob(f"svm-*-{stage}-*.json"):
        method, _, seed = file.stem.partition(f"-{stage}-")[2].rpartition("-s")
        recipe = json.loads(file.read_text())["inputs"]["recipe"]
        assert (recipe["method"], recipe["seed"]) == ("erm" if method == "erm-long" else method, int(seed)), file
        assert recipe["epochs"] == (17 if method == "erm-long" else 10), file
        assert method not in {"el", "hrrl", "random"} or recipe["tau"] == float(tau), file
        assert method not in {"cl", "hrrl"} or recipe["lam"] == float(lam), file


def test_published_cells_are_of_todays_scale() -> None:
    """So `robustfeat paper --scale tiny` finds them, whatever the recipe of that name says by then."""
    scale = SCALES["tiny"]()
    chosen = {"method", "seed", "tau", "lam", "parts"}
    for file in sorted(CELLS.glob("*-s*.json")):
        own = Recipe.from_dict(json.loads(file.read_text())["inputs"]["recipe"]).to_dict()
        wanted = (scale.selection if "-selection-" in file.name else scale.recipe).to_dict()
        differs = {key for key in own if own[key] != wanted[key]} - chosen
        assert differs <= ({"epochs", "milestones", "warmup_epochs"} if "-erm-long-" in file.name else set()), file.name
