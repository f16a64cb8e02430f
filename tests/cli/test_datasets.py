"""Commands answer the same from a folder of several files as from one file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.test_cli import only_line
from tests.conftest import Run


@pytest.fixture(scope="module")
def outputs(robustfeat: Run, examples: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The same 24 images in one file and in three."""
    root = tmp_path_factory.mktemp("outputs")
    options = ["--quiet", "--shard-rows", "8", "--batch-size", "8"]
    feats = f"{root}/feats.npy", f"{root}/feats/"
    assert robustfeat("embed", examples, "--out", feats[0], *options).returncode == 0
    assert robustfeat("embed", examples, "--out", feats[1], "--rows-per-file", "8", *options).returncode == 0
    assert len(list((root / "feats").glob("*.npy"))) > 2
    return feats


@pytest.mark.parametrize(
    "command",
    [
        ["similar", "FEATS", "5", "hat/hat-1.jpg", "-k", "40"],
        ["similar", "FEATS", "FEATS", "-k", "2", "--json"],
        ["similar", "FEATS", "5", "-k", "3", "--approximate"],
        ["duplicates", "FEATS", "--threshold", "0.5"],
        ["svm", "predict", "HEAD", "FEATS"],
    ],
    ids=" ".join,
)
def test_both_answer_the_same(robustfeat: Run, outputs: tuple[str, str], command: list[str], tmp_path: Path) -> None:
    answers = []
    for place in outputs:
        head = str(tmp_path / Path(place).name)
        if "HEAD" in command:
            done = robustfeat("svm", "fit", place, "--labels", "folder", "--out", head, "--quiet")
            assert done.returncode == 0, done.stderr
        words = [{"FEATS": place, "HEAD": head}.get(word, word) for word in command]
        result = robustfeat(*words, "--quiet")
        assert result.returncode in {0, 3}, result.stderr
        answers.append(result.stdout)
    assert answers[0] == answers[1]
    assert answers[0].count("\n") > 1


def test_info_counts_the_files(robustfeat: Run, outputs: tuple[str, str]) -> None:
    _, feats = outputs
    said = robustfeat("info", feats).stdout
    count = len(list(Path(feats).glob("*.npy")))
    assert f"files:         {count}\n" in said
    assert robustfeat("info", feats.rstrip("/")).stdout.splitlines()[1:] == said.splitlines()[1:]
    about = json.loads(robustfeat("info", feats, "--json").stdout)
    assert len(about["feature_files"]) == count
    assert about["rows_per_file"] == 8


def test_what_is_said_of_a_dataset(robustfeat: Run, outputs: tuple[str, str], examples: Path, tmp_path: Path) -> None:
    _, feats = outputs
    result = robustfeat("similar", feats, "5", "--out", f"{feats}_000000.index.jsonl")
    assert "is also an input; choose another name" in only_line(result.stderr)
    result = robustfeat("embed", examples, "--out", tmp_path / "f.npy", "--rows-per-file", "8")
    assert only_line(result.stderr) == (
        f"robustfeat: --rows-per-file 8: is for a folder of several files; {tmp_path}/f.npy is one file; "
        f"name it {tmp_path}/f.npy/, or leave this out"
    )
    done = robustfeat("embed", examples, "--out", f"{tmp_path}/new/", "--json", "--quiet")
    assert json.loads(done.stdout)["out"] == f"{tmp_path}/new/"
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == [
        "000000.npy", "_000000.index.jsonl", "_meta.json",
    ]  # fmt: skip
