"""Labels that are probably wrong: planted errors, and cleanlab beside it."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cleanlab.filter import find_label_issues
from cleanlab.rank import get_label_quality_scores
from numpy.typing import NDArray

from robustfeat.serving.heads.features import open_features
from robustfeat.serving.heads.fitting.fit import fit_head
from robustfeat.serving.heads.labels.matching import match_labels
from robustfeat.serving.heads.labels.reading import read_labels
from robustfeat.serving.heads.reports.answers import Answers
from robustfeat.serving.heads.reports.files import save_report
from robustfeat.serving.heads.reports.report import Report
from tests.conftest import WriteFeatures

Digits = tuple[NDArray[np.float32], NDArray[np.int64]]


def answers_of(probabilities: Any, targets: Any) -> Answers:
    shares, given = np.asarray(probabilities, np.float64), np.asarray(targets)
    names = [f"{row}.png" for row in range(len(shares))]
    predicted = shares > 0.5 if given.ndim == 2 else shares.argmax(1)
    return Answers(names, "abc"[: shares.shape[1]], given, predicted, np.log(shares), shares, shares.max(1))


@pytest.fixture(scope="session")
def planted(
    tmp_path_factory: pytest.TempPathFactory, digits: Digits, write_features: WriteFeatures
) -> tuple[Report, set[str], Path]:
    """A report on digits of which 5 % have a wrong label, the names of those, and a folder of features and labels."""
    folder = tmp_path_factory.mktemp("planted")
    x, y = digits
    draw = np.random.default_rng(0)
    wrong = draw.choice(len(y), len(y) // 20, replace=False)
    given = y.copy()
    given[wrong] = (y[wrong] + draw.integers(1, 10, len(wrong))) % 10
    names = [f"{row:04}.png" for row in range(len(y))]
    write_features(folder / "feats.npy", x, names)
    lines = [f"{name},{label}\n" for name, label in zip(names, given, strict=True)]
    (folder / "labels.csv").write_text("path,label\n" + "".join(lines))
    features = open_features(str(folder / "feats.npy"))
    labelled = match_labels(features, read_labels([str(folder / "labels.csv")]))
    _, report = fit_head(features, labelled, cs=(0.001,), scalings=("standard",))
    assert report is not None
    return report, {names[row] for row in wrong}, folder


def test_planted_errors_are_found(planted: tuple[Report, set[str], Path]) -> None:
    report, wrong, _ = planted
    assert report.answers is not None
    assert len(report.answers.paths) == 1797
    found = {report.answers.paths[at] for at in report.answers.suspects}
    assert len(found) == report.suspects
    assert len(found & wrong) / len(found) > 0.9  # precision
    assert len(found & wrong) / len(wrong) > 0.85  # recall


def test_more_are_found_than_by_confident_learning(planted: tuple[Report, set[str], Path]) -> None:
    report, wrong, _ = planted
    answers = report.answers
    assert answers is not None
    assert answers.probabilities is not None
    theirs = find_label_issues(answers.targets, answers.probabilities, filter_by="confident_learning", n_jobs=1)
    others = {answers.paths[at] for at in np.flatnonzero(theirs).tolist()}
    found = {answers.paths[at] for at in answers.suspects}
    assert len(others & wrong) > 40
    assert len(others & found) / len(others) > 0.8
    assert len(found & wrong) > len(others & wrong)


def test_doubt_is_cleanlabs_self_confidence_as_a_share_of_the_answers_probability(
    planted: tuple[Report, set[str], Path],
) -> None:
    answers = planted[0].answers
    assert answers is not None
    assert answers.doubt is not None
    assert answers.probabilities is not None
    theirs = get_label_quality_scores(answers.targets, answers.probabilities, method="self_confidence")
    np.testing.assert_allclose(answers.doubt, theirs / answers.probabilities.max(1), rtol=1e-6)


def test_they_are_listed_the_most_doubtful_first(planted: tuple[Report, set[str], Path], tmp_path: Path) -> None:
    report = planted[0]
    save_report(report, tmp_path / "report", "held out")
    rows = list(csv.DictReader(io.StringIO((tmp_path / "report" / "suspects.csv").read_text())))
    assert len(rows) == report.suspects > 50
    doubts = [float(row["relative_probability"]) for row in rows]
    assert doubts == sorted(doubts)
    assert doubts[-1] < 0.05
    assert all(row["label"] != row["prediction"] for row in rows)
    text = (tmp_path / "report" / "report.md").read_text()
    assert f"probably wrong: {len(rows)} of 1,797; the first 50, all are in suspects.csv" in text
    assert text.count(".png |") == 50
    assert f"| {rows[0]['path']} | {rows[0]['label']} | {rows[0]['prediction']} |" in text


def test_an_uncertain_answer_is_no_suspicion() -> None:
    answers = answers_of([[0.02, 0.5, 0.48], [0.04, 0.3, 0.66], [0.98, 0.01, 0.01], [0.5, 0.49, 0.01]], [0, 0, 0, 2])
    assert answers.suspects == [3, 0]


def test_each_of_several_labels_counts() -> None:
    shares = [[0.99, 0.01], [0.99, 0.01], [0.6, 0.4], [0.999, 0.5]]
    answers = answers_of(shares, [[True, False], [True, True], [False, True], [False, False]])
    assert answers.suspects == [3, 1]
    assert [answers.given(at) for at in (3, 1)] == ["", "a|b"]


def test_rows_that_were_fitted_are_not_suspected(tmp_path: Path) -> None:
    answers = answers_of([[0.99, 0.01], [0.01, 0.99]], [1, 0])
    seen, unseen = Report.of_answers(answers), Report.of_answers(answers, unseen=True)
    assert (seen.suspects, unseen.suspects) == (0, 2)
    save_report(seen, tmp_path / "seen", "score")
    assert not (tmp_path / "seen" / "suspects.csv").exists()


def test_names_in_the_list_keep_their_bytes_and_run_no_formula(tmp_path: Path) -> None:
    answers = answers_of([[0.99, 0.01], [0.01, 0.99]], [1, 0])
    odd = Answers(["\udcff|x.png", "=1+1"], *list(vars(answers).values())[1:])
    save_report(Report.of_answers(odd, unseen=True), tmp_path / "report", "held out")
    data = (tmp_path / "report" / "suspects.csv").read_bytes()
    assert data.splitlines()[1:] == [b"\xff|x.png,b,a,0.0101", b"'=1+1,a,b,0.0101"]
    assert "\ufffd\\|x.png" in (tmp_path / "report" / "report.md").read_text("utf-8")
