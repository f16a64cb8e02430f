"""Which rows choose the settings, and which settings they choose."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from sklearn.metrics import accuracy_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

from robustfeat.cli import cli
from robustfeat.errors import InputError
from robustfeat.serving.heads.features import open_features
from robustfeat.serving.heads.fitting import selection
from robustfeat.serving.heads.fitting.fit import fit_head, select, select_and_fit
from robustfeat.serving.heads.fitting.selection import FOLDS, Selection, draw_part, fold
from robustfeat.serving.heads.fitting.training_set import Fits
from robustfeat.serving.heads.fitting.trials import Trials, fingerprint_rows
from robustfeat.serving.heads.labels.matching import match_labels
from robustfeat.serving.heads.labels.reading import read_labels
from tests.conftest import WriteFeatures
from tests.serving.heads.solver.test_newton import blobs


@pytest.mark.parametrize("counts", [[40, 40], [7, 20, 33], [5] * 10, [2, 3, 4, 50], [1, 1, 9, 9], [1000, 1000]])
def test_folds_are_stratified_and_score_each_row_once_a_draw(counts: list[int]) -> None:
    y = np.random.default_rng(1).permutation(np.repeat(np.arange(len(counts)), counts))
    draws = fold(y)
    splits = [split for draw in draws for split in draw]
    alone = np.flatnonzero(np.bincount(y)[y] == 1)
    for draw in draws:
        assert len(draw) == FOLDS
        assert sorted(np.concatenate([held for _, held in draw])) == sorted(set(range(len(y))) - set(alone))
        sizes = [len(held) for _, held in draw]
        assert max(sizes) - min(sizes) <= 1
        for fit, held in draw:
            assert sorted([*fit, *held]) == list(range(len(y)))
            assert set(y[fit]) == set(y), "each class is fitted"
            shares = np.bincount(y[held], minlength=len(counts))
            assert all(abs(share - count / FOLDS) < 1 for share, count in zip(shares, counts, strict=True) if count > 1)
    assert len({tuple(held) for _, held in splits}) == len(splits), "draws differ"
    assert len(splits) * len(y) / FOLDS >= min(1000, 5 * len(y)) or len(y) < 200


def test_an_unknown_method_is_refused() -> None:
    x, y = blobs([10, 10], 3, 1.0)
    with pytest.raises(InputError, match="method=leave-one-out: expected auto, folds or holdout"):
        select(x, y, method="leave-one-out")


@pytest.mark.parametrize(("command", "default"), [("svm fit", "auto"), ("evaluate", "holdout")])
def test_commands_offer_the_selections_that_there_are(command: str, default: str) -> None:
    found: click.Command = cli
    for name in command.split():
        assert isinstance(found, click.Group)
        found = found.get_command(click.Context(found), name) or cli
    (option,) = [one for one in found.params if one.name == "selection"]
    assert isinstance(option.type, click.Choice)
    assert (tuple(option.type.choices), option.default) == (selection.SELECTIONS, default)


def test_folds_of_several_labels_leave_rows_with_and_without_each() -> None:
    rng = np.random.default_rng(0)
    y = rng.random((60, 4)) < 0.5
    y[:, 2] = False
    y[7, 2] = True
    for fit, held in (split for draw in fold(y) for split in draw):
        assert sorted([*fit, *held]) == list(range(60))
        assert y[fit].any(0).all()
        assert not y[fit].all(0).any()


def test_scores_and_margins_are_those_of_scikit_learn_on_the_same_folds() -> None:
    x, y = blobs([30, 25, 20, 5], 10, 3.0)
    found = select(x, y, cs=(0.01, 1.0), scalings=("standard",), method="folds")
    assert len(found.candidates) == 2
    for candidate in found.candidates:
        scores = []
        for fit, held in (split for draw in found.splits for split in draw):
            classifier = make_pipeline(StandardScaler(), LinearSVC(C=candidate.c, dual=False, tol=1e-10)).fit(
                x[fit], y[fit]
            )
            scores.append(accuracy_score(y[held], classifier.predict(x[held])))
        assert candidate.score == pytest.approx(np.mean(scores))
        assert candidate.error == pytest.approx(np.std(scores, ddof=1) / np.sqrt(FOLDS))
    assert sorted(found.held) == list(range(80))
    for (fit, held), margins in zip(found.splits[0], np.split(found.margins, np.arange(16, 80, 16)), strict=True):
        classifier = make_pipeline(StandardScaler(), LinearSVC(C=found.best.c, dual=False, tol=1e-10))
        wanted = classifier.fit(x[fit], y[fit]).decision_function(x[held])
        np.testing.assert_allclose(margins, wanted, atol=1e-3)


def chosen(scores: dict[float, float], error: float, monkeypatch: pytest.MonkeyPatch) -> Selection:
    """What is chosen where the unseen rows give these scores for each C."""
    by_c = iter(scores.values())
    monkeypatch.setattr(selection, "_standard_error", lambda _: error)
    monkeypatch.setattr(selection, "fold", lambda targets, seed: [[(np.arange(20), np.arange(20, 40))]])
    monkeypatch.setattr(selection, "_score", lambda *_: next(by_c))
    x, y = blobs([20, 20], 3, 1.0)
    order = np.random.default_rng(0).permutation(40)
    return select(x[order], y[order], cs=tuple(scores), scalings=("none",), method="folds")


def test_the_smallest_c_within_a_standard_error_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = {0.001: 0.5, 0.01: 0.79, 0.1: 0.81, 1.0: 0.84, 10.0: 0.83}
    assert chosen(scores, 0.04, monkeypatch).best.c == 0.1
    assert chosen(scores, 0.06, monkeypatch).best.c == 0.01
    assert chosen(scores, 0.0, monkeypatch).best.c == 1.0


def test_c_stops_rising_when_the_score_has_fallen_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    def tried(*scores: float) -> list[float | None]:
        grid = dict(zip((0.001, 0.01, 0.1, 1.0, 10.0), scores, strict=True))
        return [candidate.c for candidate in chosen(grid, 0.0, monkeypatch).candidates]

    assert tried(0.9, 0.8, 0.7, 1.0, 1.0) == [0.001, 0.01, 0.1]
    assert tried(0.9, 0.8, 0.85, 0.8, 0.85) == [0.001, 0.01, 0.1, 1.0, 10.0]
    assert tried(0.5, 0.5, 0.5, 0.4, 0.3) == [0.001, 0.01, 0.1, 1.0, 10.0]


def test_few_rows_are_folded_and_many_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = blobs([60, 60], 4, 1.0)

    def method(asked: str) -> tuple[str, int]:
        found = select(x, y, cs=(0.1,), scalings=("none",), method=asked)
        return found.method, sum(map(len, found.splits))

    assert method("auto") == method("folds") == ("folds", 25)
    assert method("holdout") == ("holdout", 1)
    monkeypatch.setattr(selection, "FEW", 120)
    assert method("auto") == ("holdout", 1)


def test_a_part_has_the_shares_of_the_classes_and_some_rows_of_each() -> None:
    y = np.random.default_rng(1).permutation(np.repeat(np.arange(5), [8000, 1500, 400, 30, 3]))
    part = draw_part(y, 1000)
    assert (np.diff(part) > 0).all()
    np.testing.assert_array_equal(np.bincount(y[part]), [806, 152, 41, 20, 3])
    np.testing.assert_array_equal(part, draw_part(y, 1000))
    assert set(part) != set(draw_part(y, 1000, seed=1))
    np.testing.assert_array_equal(draw_part(y, len(y)), np.arange(len(y)))
    several = np.stack([y == 0, y == 1], 1)
    assert len(set(draw_part(several, 1000))) == 1000


def test_a_part_of_very_many_rows_chooses_and_all_are_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = blobs([2400, 1600, 2000], 6, 1.5)
    monkeypatch.setattr(selection, "MOST", 1500)
    found, head, converged = select_and_fit(x, y, scalings=("none",))
    part = draw_part(y, 1500)
    assert converged
    assert set(found.held) < set(part)
    assert len(found.held) == 150
    of_part = select(x[part], y[part], scalings=("none",), method="holdout")
    assert [one.score for one in found.candidates] == [one.score for one in of_part.candidates]
    classifier = LinearSVC(C=found.best.c, dual=False, tol=1e-10)
    np.testing.assert_allclose(head.arrays["coefficients"], classifier.fit(x, y).coef_, rtol=1e-3, atol=1e-4)


def test_a_choice_by_folds_depends_less_on_luck() -> None:
    """The scores of the same settings on 30 draws of 60 rows: a held-out tenth has four times the deviation."""
    x, y = blobs([600, 600, 600], 20, 4.0)
    deviations = {}
    for method in ("holdout", "folds"):
        scores = []
        for draw in range(30):
            rows = np.random.default_rng(draw).permutation(len(y))[:60]
            scores.append(select(x[rows], y[rows], cs=(0.1,), scalings=("none",), method=method).best.score)
        deviations[method] = float(np.std(scores))
    assert deviations["folds"] < 0.5 * deviations["holdout"]


def test_a_stopped_fit_resumes_with_what_it_had_tried(
    tmp_path: Path, write_features: WriteFeatures, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = blobs([25, 25, 25], 6, 2.0)
    names = [f"{label}/{row}.jpg" for row, label in enumerate(y)]
    features = open_features(str(write_features(tmp_path / "f.npy", x.astype(np.float32), names)))
    labelled = match_labels(features, read_labels(["folder"]))
    whole, report = fit_head(features, labelled, cs=(0.01, 0.1))
    resume = tmp_path / ".head.trials.json"
    fit, fitted = Fits.fit, [0]

    def stopping(self: Fits, c: float | None) -> Any:
        fitted[0] += 1
        if fitted[0] == 60:  # in the third of six settings with 25 parts each
            raise KeyboardInterrupt
        return fit(self, c)

    monkeypatch.setattr(Fits, "fit", stopping)
    with pytest.raises(KeyboardInterrupt):
        fit_head(features, labelled, cs=(0.01, 0.1), resume=resume)
    kept = json.loads(resume.read_text())
    assert [(one["scaling"], one["c"]) for one in kept["tried"]] == [("none", 0.01), ("none", 0.1)]
    fitted[0] = 1000
    head, again = fit_head(features, labelled, cs=(0.01, 0.1), resume=resume)
    assert fitted[0] - 1000 <= 4 * 25 + 5 + 1
    assert head.selection == whole.selection
    assert report is not None
    assert again is not None
    assert again.to_dict() == report.to_dict()
    np.testing.assert_allclose(head.margins(x), whole.margins(x), atol=1e-4)
    # Other settings are another fit.
    resume.write_text(json.dumps(kept))
    fitted[0] = 1000
    fit_head(features, labelled, cs=(0.01, 0.2), resume=resume)
    assert fitted[0] - 1000 == 6 * 25 + 1


TRIED = {"scaling": "none", "c": 0.1, "score": 0.5, "error": 0.1, "converged": True}


def tried(**values: Any) -> str:
    return json.dumps({"fingerprint": "f", "tried": [TRIED | values]})


@pytest.mark.parametrize(
    "content",
    [
        "",
        "null",
        "[]",
        '{"fingerprint": "f"}',
        '{"fingerprint": "f", "tried": [{}]}',
        tried(c=[1]),
        tried(score="0.5"),
        tried(error=None),
        tried(scaling=[]),
    ],
)
def test_a_damaged_file_of_trials_is_no_trial(content: str, tmp_path: Path) -> None:
    (tmp_path / "trials.json").write_text(content)
    assert len(Trials(tmp_path / "trials.json", "f")) == 0
    (tmp_path / "trials.json").write_text(tried())
    assert len(Trials(tmp_path / "trials.json", "f")) == 1


def test_a_pipe_in_the_place_of_trials_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "trials.json")
    assert len(Trials(tmp_path / "trials.json", "f")) == 0


@pytest.mark.parametrize("counts", [[2, 1], [2, 2], [1, 1, 2], [3, 2, 1]])
def test_of_very_few_rows_each_is_scored_once(counts: list[int]) -> None:
    y = np.repeat(np.arange(len(counts)), counts)
    found = select(np.random.default_rng(0).normal(size=(len(y), 4)), y, cs=(0.1,), scalings=("none",))
    assert sorted(found.held) == [row for row in range(len(y)) if counts[y[row]] > 1]
    assert len(found.margins) == len(found.held)


def test_other_features_rows_labels_or_settings_are_another_fit() -> None:
    values, rows = np.arange(30, dtype=np.float32).reshape(10, 3), np.arange(8)
    targets = rows % 2
    fits = [
        (values, rows, targets, ["svm"]),
        (values + 1, rows, targets, ["svm"]),
        (values, rows + 1, targets, ["svm"]),
        (values, rows, 1 - targets, ["svm"]),
        (values, rows, targets, ["logistic"]),
    ]
    assert len({fingerprint_rows(*fit) for fit in fits}) == len(fits)
    assert fingerprint_rows(values.copy(), rows, targets, ["svm"]) == fingerprint_rows(*fits[0])
