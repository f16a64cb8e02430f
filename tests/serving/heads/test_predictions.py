"""Reports and predictions."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.metrics import accuracy_score, balanced_accuracy_score, classification_report, confusion_matrix, f1_score

from robustfeat.serving import Head
from robustfeat.serving.heads.features import open_features
from robustfeat.serving.heads.fitting.fit import fit_head
from robustfeat.serving.heads.labels.matching import match_labels
from robustfeat.serving.heads.labels.reading import read_labels
from robustfeat.serving.heads.predictions import Rejection, Suggestions, predict_rows, to_csv, to_jsonl
from robustfeat.serving.heads.reports.page import draw_page
from robustfeat.serving.heads.reports.report import Report
from robustfeat.serving.inputs.sources import path_of_index


def draw_answers(classes: int, rows: int = 500) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    draw = np.random.default_rng(0)
    targets = draw.integers(0, classes, rows)
    return np.where(draw.random(rows) < 0.6, targets, draw.integers(0, classes, rows)), targets


def test_a_report_equals_scikit_learn() -> None:
    predicted, targets = draw_answers(4)
    names = ["a", "b|c", "d", "e"]
    report = Report.of(predicted, targets, names)
    assert report.accuracy == accuracy_score(targets, predicted)
    assert report.balanced_accuracy == pytest.approx(balanced_accuracy_score(targets, predicted))
    expected = classification_report(targets, predicted, target_names=names, output_dict=True)
    for one in report.classes:
        row = expected[one.name]
        assert (one.precision, one.recall, one.f1) == (row["precision"], row["recall"], row["f1-score"])
        assert one.rows == row["support"]
    assert report.macro_f1 == pytest.approx(expected["macro avg"]["f1-score"])
    assert report.confusion is not None
    assert report.confusion.tolist() == confusion_matrix(targets, predicted).tolist()
    assert json.loads(json.dumps(report.to_dict()))["rows"] == 500
    table = report.to_markdown("test").splitlines()
    assert len(table) == 4 + len(names)
    assert len({line.replace(r"\|", "").count("|") for line in table[2:]}) == 1


def test_names_of_classes_are_text_in_a_report() -> None:
    """Markdown may hold HTML, links and images."""
    names = ["<script>alert(1)</script>", "![x](http://example.org/x.png)"]
    report = Report.of(np.array([0, 1]), np.array([0, 1]), names)
    text = report.to_markdown("<b>test</b>")
    assert "&lt;script>alert(1)&lt;/script>" in text
    assert r"![x]\(http://example.org/x.png)" in text
    assert "<" not in text
    # A terminal shows no Markdown.
    assert all(f"| {name} " in report.to_text("<b>test</b>") for name in names)
    assert len(Report.of(np.array([0, 1]), np.array([0, 1]), ["a<b|c", "d\ne"]).to_text("test").split("\n")) == 6


def test_classes_without_rows_are_left_out_of_both_means_and_named() -> None:
    targets, predicted = np.array([0, 0, 1]), np.array([0, 1, 1])
    report = Report.of(predicted, targets, ["a", "b", "c"])
    assert report.balanced_accuracy == 0.75
    assert report.macro_f1 == pytest.approx(f1_score(targets, predicted, average="macro"))
    left_out = "on 3 rows; means leave out 1 class without rows: c"
    assert report.to_text("held out").split("\n")[0].endswith(left_out)
    assert "leave out 1 class without rows: <bdi>c</bdi>" in draw_page(report, "held out")
    # A label that is predicted but on no row is left out, too.
    several = Report.of(np.eye(3, dtype=bool), np.diag([True, True, False]), ["a", "b", "c"])
    assert (several.balanced_accuracy, several.macro_f1, several.absent) == (1, 1, ("c",))
    many = Report.of(np.array([0]), np.array([0]), [f"n{row}" for row in range(9)])
    assert "leave out 8 classes without rows: n1, n2, n3, n4, n5, ..." in many.to_text("score")
    assert "leave out" not in Report.of(predicted, targets, ["a", "b"]).to_text("score")
    none = Report.of(np.zeros((2, 2), bool), np.zeros((2, 2), bool), ["a", "b"])
    assert (none.macro_f1, none.absent) == (0, ())


def test_several_labels_are_right_together() -> None:
    targets = np.array([[1, 0], [1, 1], [0, 0], [0, 1]], bool)
    predicted = np.array([[1, 0], [1, 0], [0, 0], [1, 1]], bool)
    report = Report.of(predicted, targets, ["a", "b"])
    assert report.accuracy == 0.5
    # a: 2 of 2 with it, 1 of 2 without; b: 1 of 2 with it, 2 of 2 without.
    assert report.balanced_accuracy == 0.75
    assert report.picture is None


@pytest.fixture
def fitted(digit_files: Path) -> tuple[Head, Path]:
    features = open_features(str(digit_files / "train.npy"))
    head, _ = fit_head(features, match_labels(features, read_labels([str(digit_files / "labels.csv")])), cs=(0.01,))
    return head, digit_files


def test_predictions_keep_rows_and_say_what_failed(fitted: tuple[Head, Path], digits: Any, write_features: Any) -> None:
    head, folder = fitted
    values = digits[0][1200:1206].copy()
    values[2] = np.nan
    names = ["a.png", 'b, "c".png', "bad.png", "d.png", "e.png", "f.png"]
    features = open_features(str(write_features(folder / "few.npy", values, names, {2: "truncated"})))
    expected = head.margins(digits[0][1200:1206])
    lines = list(csv.DictReader(io.StringIO("".join(to_csv(head, predict_rows(head, features))))))
    assert [line["path"] for line in lines] == names
    assert lines[2]["prediction"] == ""
    assert lines[2]["error"] == "truncated"
    records = [json.loads(line) for line in to_jsonl(head, predict_rows(head, features, probabilities=True))]
    for row in (0, 1, 3, 4, 5):
        best = str(head.classes[int(expected[row].argmax())])
        assert lines[row]["prediction"] == records[row]["prediction"] == best
        assert float(lines[row][f"margin:{best}"]) == pytest.approx(expected[row].max(), rel=1e-5)
        assert records[row]["margins"] == pytest.approx(dict(zip(head.classes, expected[row], strict=True)))
        assert sum(records[row]["probabilities"].values()) == pytest.approx(1)
    failed = {"path": "bad.png", "prediction": None, "margins": None, "typicality": None, "error": "truncated"}
    assert records[2] == failed
    assert lines[2]["typicality"] == ""
    usual = head.typicality(digits[0][1200:1206])
    for row in (0, 1, 3, 4, 5):
        assert records[row]["typicality"] == usual[row]
        assert float(lines[row]["typicality"]) == pytest.approx(usual[row], rel=1e-5)
    some = float(np.median(usual[[0, 1, 3, 4, 5]]))
    rejection = Rejection(some)
    for row, one in enumerate(rejection.watch(predict_rows(head, features))):
        assert bool(one.labels) == (row != 2 and usual[row] >= some)
    assert rejection.count == np.count_nonzero(usual[[0, 1, 3, 4, 5]] < some)


def test_names_come_back_from_predictions_as_they_were(
    fitted: tuple[Head, Path], digits: Any, write_features: Any, tmp_path: Path
) -> None:
    head, folder = fitted
    names = ["caf\udce9.png", "caf\udce8.png", "=cmd.png", "-x.png", "'=quoted.png", "'plain.png", "@a\tb.png", "-1"]
    features = open_features(str(write_features(folder / "odd.npy", digits[0][1200 : 1200 + len(names)], names)))
    text = "".join(to_csv(head, predict_rows(head, features)))
    (tmp_path / "p.csv").write_bytes(text.encode("utf-8", "surrogateescape"))
    cells = [line["path"] for line in csv.DictReader(io.StringIO(text))]
    assert not [cell for cell in cells[:-1] if cell[0] in "=+-@\t\r"]
    assert cells[-1] == "-1"
    labels = read_labels([f"{tmp_path}/p.csv:prediction"])
    assert [labels.key(path) for path in names] == names
    assert match_labels(features, labels).missing == ()
    records = [json.loads(line) for line in to_jsonl(head, predict_rows(head, features))]
    assert [path_of_index(record) for record in records] == names
    suggestions = Suggestions(len(names))
    list(suggestions.watch(predict_rows(head, features)))
    found = {line["path"] for line in csv.DictReader(io.StringIO(suggestions.to_csv()))}
    assert found == set(cells)


def test_suggestions_are_the_least_certain_first(fitted: tuple[Head, Path]) -> None:
    head, folder = fitted
    features = open_features(str(folder / "test.npy"))
    margins = np.sort(head.margins(features), axis=1)
    gaps = margins[:, -1] - margins[:, -2]
    order = np.argsort(gaps, kind="stable")
    suggestions = Suggestions(5, lambda path: path == features.paths[order[1]])
    assert len(list(suggestions.watch(predict_rows(head, features)))) == len(features)
    expected = [features.paths[row] for row in order[[0, 2, 3, 4, 5]]]
    assert [one.path for one in suggestions.found()] == expected


def test_calibration_makes_probabilities_honest(fitted: tuple[Head, Path], digits: Any) -> None:
    head, _ = fitted
    shares = head.probabilities(digits[0][1200:])
    right = head.predict(digits[0][1200:]) == np.array([f"digit {one}" for one in digits[1][1200:]])
    powers = np.exp(head.margins(digits[0][1200:]))
    before = (powers / powers.sum(1, keepdims=True)).max(1).mean()
    # The last digits are from other hands than the first, so that all are a little too sure of them.
    assert abs(shares.max(1).mean() - right.mean()) < 0.08
    assert abs(before - right.mean()) > 0.1
