"""Intervals beside accuracies: those of SciPy, wherever an accuracy is told."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import binom, binomtest

from robustfeat.serving.heads.features import open_features
from robustfeat.serving.heads.fitting.fit import fit_head
from robustfeat.serving.heads.labels.labels import Labels, Unlabelled
from robustfeat.serving.heads.labels.matching import LabelledRows, match_labels
from robustfeat.serving.heads.labels.reading import read_labels
from robustfeat.serving.heads.reports.files import save_report
from robustfeat.serving.heads.reports.intervals import wilson_interval
from tests.conftest import WriteFeatures

Digits = tuple[NDArray[np.float32], NDArray[np.int64]]


def wilson_of_scipy(right: int, rows: int) -> tuple[float, float]:
    found = binomtest(right, rows).proportion_ci(method="wilson")
    return found.low, found.high


@pytest.mark.parametrize(("right", "rows"), [(81, 100), (0, 7), (7, 7), (5000, 10_000)])
def test_intervals_are_those_of_scipy(right: int, rows: int) -> None:
    np.testing.assert_allclose(wilson_interval(right / rows, rows), wilson_of_scipy(right, rows), atol=1e-12)


@pytest.mark.parametrize("true", [0.05, 0.22, 0.5, 0.97])
def test_of_40_rows_the_interval_holds_the_true_share_as_often_as_it_says(true: float) -> None:
    ends = [wilson_interval(right / 40, 40) for right in range(41)]
    held = [right for right, (low, high) in enumerate(ends) if low <= true <= high]
    assert 0.92 < binom.pmf(held, 40, true).sum() < 0.99


def test_a_fit_tells_the_interval_of_each_setting_and_of_its_choice(
    digits: Digits, write_features: WriteFeatures, tmp_path: Path
) -> None:
    x, y = digits
    names = [f"{label}/{row:04}.png" for row, label in enumerate(y[:300])]
    features = open_features(str(write_features(tmp_path / "f.npy", x[:300], names)))
    head, report = fit_head(features, match_labels(features, read_labels(["folder"])))
    assert report is not None
    right = round(report.accuracy * 300)
    assert report.interval == pytest.approx(wilson_of_scipy(right, 300))
    assert head.scores["held_out"]["interval"] == list(report.interval)
    for candidate in head.selection["candidates"]:
        low, high = candidate["interval"]
        assert low < candidate["score"] < high
        assert candidate["interval"] == pytest.approx(wilson_interval(candidate["score"], 300))
    save_report(report, tmp_path / "report", "held out")
    text, page = ((tmp_path / "report" / name).read_text() for name in ("report.md", "report.html"))
    told = f"accuracy {report.accuracy:.4f} (95 %: {report.interval[0]:.4f} to {report.interval[1]:.4f})"
    assert text.startswith(f"held out: {told}, balanced")
    assert f"<dd>{report.interval[0]:.3f} to {report.interval[1]:.3f}</dd>" in page
    rows = [line for line in text.splitlines() if line.startswith(("| none ", "| l2 ", "| standard "))]
    assert (
        len(rows)
        == len(head.selection["candidates"])
        == page.count("<td><bdi>none<") + page.count("<td><bdi>l2<") + page.count("<td><bdi>standard<")
    )
    (chosen,) = [row for row in rows if row.endswith("| yes |")]
    assert chosen.startswith(f"| {head.scaling} | {head.selection['C']:g} | ")


def test_macro_f1_is_no_share_and_has_no_interval(
    digits: Digits, write_features: WriteFeatures, tmp_path: Path
) -> None:
    x, y = digits
    features = open_features(str(write_features(tmp_path / "f.npy", x[:200], [f"{row}.png" for row in range(200)])))
    targets = np.stack([y[:200] % 2 == 0, y[:200] > 4], 1)
    labelled = LabelledRows(np.arange(200), targets, ("even", "large"), 0, Unlabelled(Labels("", {})), ())
    head, report = fit_head(features, labelled, cs=(0.01, 0.1), scalings=("none",))
    assert report is not None
    assert not any("interval" in candidate for candidate in head.selection["candidates"])
    assert report.interval == pytest.approx(wilson_of_scipy(round(report.accuracy * 200), 200))
    assert [row["95 %"] for row in report.settings] == ["", ""]
