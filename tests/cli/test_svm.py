"""`robustfeat svm` as users meet it."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from robustfeat.files import FileLock
from tests import built_in
from tests.cli.test_cli import only_line
from tests.conftest import EXAMPLES, ROOT, Run
from tests.serving.http.conftest import wait_until
from tests.test_layering import loaded_after


@pytest.fixture(scope="module")
def features(robustfeat: Run, examples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("features") / "feats.npy"
    assert robustfeat("embed", examples, "--out", out, "--quiet").returncode == 0
    return out


@pytest.fixture(scope="module")
def head(robustfeat: Run, features: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("heads") / "clothes"
    result = robustfeat("svm", "fit", features, "--labels", "folder", "--out", out, "--C", "0.1")
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""
    assert "40 labelled rows of 10 classes" in result.stderr
    assert "held out: accuracy" in result.stderr
    return out


@pytest.fixture
def photos(examples: Path, tmp_path: Path) -> Path:
    """The examples in one folder, one of them broken."""
    root = tmp_path / "photos"
    root.mkdir()
    for file in examples.rglob("*.jpg"):
        shutil.copy(file, root)
    (root / "hat-2.jpg").write_bytes((root / "hat-2.jpg").read_bytes()[:400])
    return root


def test_a_head_is_two_files_and_reports(head: Path) -> None:
    assert sorted(file.name for file in head.iterdir()) == [
        "confusion.png",
        "head.json",
        "head.safetensors",
        "report.html",
        "report.md",
        "suspects.csv",
    ]
    about = json.loads((head / "head.json").read_text())
    assert about["model"]["name"] == built_in.NAME
    with Image.open(head / "confusion.png") as image:
        assert min(image.size) > 360


def test_a_report_without_pictures_is_said(robustfeat: Run, features: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.csv"
    labels.write_text("hat/hat-1.jpg,hat\nhat/hat-2.jpg,hat\nshoes/shoes-1.jpg,shoes\n")
    fit = ["svm", "fit", features, "--labels", labels, "--C", "0.1", "--scaling", "l2", "--out"]
    result = robustfeat(*fit, tmp_path / "names")
    assert f"{tmp_path / 'names' / 'report.html'} has no pictures; pass the embedded folder" in result.stderr
    assert "on 2 rows; means leave out 1 class without rows: shoes\n" in result.stderr
    result = robustfeat(*fit, tmp_path / "pictures", "--images", EXAMPLES)
    assert "has no pictures" not in result.stderr
    assert "data:image/webp" in (tmp_path / "pictures" / "report.html").read_text()


def test_score_prints_a_fraction(robustfeat: Run, head: Path, features: Path, tmp_path: Path) -> None:
    result = robustfeat("svm", "score", head, features, "--labels", "folder", "--report", tmp_path / "report")
    assert result.returncode == 0, result.stderr
    accuracy = float(only_line(result.stdout))
    assert 0.9 < accuracy <= 1
    rows = [line for line in result.stderr.splitlines() if line.startswith("| ")]
    assert [row.split()[1] for row in rows] == ["class", *sorted(folder.name for folder in EXAMPLES.iterdir())]
    assert f"accuracy {accuracy:.4f}" in (tmp_path / "report" / "report.md").read_text()
    assert "images have no picture" in (tmp_path / "report" / "report.html").read_text()
    shown = ["--report", tmp_path / "shown", "--images", EXAMPLES]
    assert robustfeat("svm", "score", head, features, "--labels", "folder", *shown).returncode == 0
    pictures = (tmp_path / "shown" / "report.html").read_text().count("data:image/webp")
    assert pictures == 24 + 24 + round(40 * (1 - accuracy))
    result = robustfeat("svm", "score", head, features, "--labels", "folder", "--json", "--quiet")
    summary = json.loads(only_line(result.stdout))
    assert summary["accuracy"] == accuracy
    assert [one["rows"] for one in summary["classes"]] == [4] * 10
    assert result.stderr == ""


def test_few_labels_and_many_photos_are_two_commands(robustfeat: Run, photos: Path, tmp_path: Path) -> None:
    names = sorted(file.name for file in photos.iterdir())
    labelled = [name for name in names if name.split("-")[0] in {"hat", "shoes"} and name[-5] in "123"]
    labels = tmp_path / "labels.csv"
    labels.write_text("path,label\n" + "".join(f"{name},{name.split('-')[0]}\n" for name in labelled))
    head, out = tmp_path / "head", tmp_path / "predictions.csv"
    result = robustfeat("svm", "fit", photos, "--labels", labels, "--out", head)
    assert result.returncode == 3
    assert "embed 6/6 images" in result.stderr  # those with labels alone
    assert "5 labelled rows of 2 classes; 1 more left out because of failed images" in result.stderr
    assert (head / "report.html").read_text().count("data:image/webp") >= 10

    result = robustfeat("svm", "predict", head, photos, "--out", out, "--suggest", 3, "--labels", labels)
    assert result.returncode == 3
    rows = list(csv.DictReader(io.StringIO(out.read_text())))
    assert [row["path"] for row in rows] == names
    assert [row["path"] for row in rows if row["error"]] == ["hat-2.jpg"]
    assert {row["prediction"] for row in rows} == {"hat", "shoes", ""}
    suggested = list(csv.DictReader(io.StringIO(result.stdout)))
    gaps = {
        row["path"]: abs(float(row["margin:hat"]) - float(row["margin:shoes"]))
        for row in rows
        if not row["error"] and row["path"] not in labelled
    }
    assert [row["path"] for row in suggested] == sorted(gaps, key=lambda name: gaps[name])[:3]


def test_predictions_go_to_stdout(robustfeat: Run, head: Path, features: Path) -> None:
    result = robustfeat("svm", "predict", head, features, "--quiet", "--probabilities", "--suggest", 2)
    assert result.returncode == 0, result.stderr
    rows = list(csv.DictReader(io.StringIO(result.stdout)))
    assert len(rows) == 40
    assert sum(float(rows[0][key]) for key in rows[0] if key.startswith("probability:")) == pytest.approx(1, abs=1e-4)
    assert result.stderr.splitlines()[0] == "path,prediction,certainty,typicality"
    result = robustfeat("svm", "predict", head, features, "--json")
    records = [json.loads(line) for line in result.stdout.splitlines()]
    assert [record["path"] for record in records] == [row["path"] for row in rows]
    assert [record["prediction"] for record in records] == [row["prediction"] for row in rows]


@pytest.mark.parametrize("kind", ["logistic", "naive-bayes", "nearest-mean"])
def test_other_kinds(kind: str, robustfeat: Run, features: Path, tmp_path: Path) -> None:
    command = ["svm", "fit", features, "--labels", "folder", "--out", tmp_path / "head", "--kind", kind, "--json"]
    result = robustfeat(*command, "--quiet", *(["--C", "0.01"] if kind == "logistic" else []))
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert json.loads(only_line(result.stdout))["measure"] == "accuracy"
    scored = robustfeat("svm", "score", tmp_path / "head", features, "--labels", "folder", "--quiet")
    assert float(scored.stdout) > 0.8


def test_several_labels(robustfeat: Run, features: Path, examples: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.csv"
    names = sorted(file.relative_to(examples).as_posix() for file in examples.rglob("*.jpg"))
    tags = {"shirt": "top|sleeves", "longsleeve": "top|sleeves", "t-shirt": "top", "hat": ""}
    labels.write_text("path,labels\n" + "".join(f"{name},{tags.get(name.split('/')[0], 'other')}\n" for name in names))
    command = ["svm", "fit", features, "--labels", labels, "--multi-label", "--out", tmp_path / "head", "--C", "1"]
    result = robustfeat(*command, "--scaling", "none")
    assert result.returncode == 0, result.stderr
    rows = csv.DictReader(io.StringIO(robustfeat("svm", "predict", tmp_path / "head", features).stdout))
    predicted = {row["path"]: row["prediction"] for row in rows}
    wanted = {name: "|".join(sorted(tags.get(name.split("/")[0], "other").split("|"))) for name in names}
    right = np.mean([predicted[name] == wanted[name] for name in names])
    assert right > 0.9
    scored = robustfeat("svm", "score", tmp_path / "head", features, "--labels", labels, "--quiet")
    assert float(scored.stdout) == right


def broken_head(head: Path, folder: Path, change: Any) -> Path:
    shutil.copytree(head, folder / "broken")
    change(folder / "broken")
    return folder / "broken"


def test_bad_input_is_one_line(robustfeat: Run, head: Path, features: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def labelled(text: str) -> Path:
        labels = tmp_path / f"{len(list(tmp_path.iterdir()))}.csv"
        labels.write_text(text)
        return labels

    def fit(text: str) -> list[Any]:
        return ["fit", features, "--labels", labelled(text), "--out", out, "--quiet"]

    single = tmp_path / "single"
    few = labelled("path,label\nhat/hat-1.jpg,a\nhat/hat-2.jpg,b\n")
    result = robustfeat("svm", "fit", features, "--labels", few, "--out", single)
    assert result.returncode == 0
    assert "so none could be held out" in result.stderr
    assert "fit 1/1 fits" in result.stderr
    score = ["score", head, features, "--quiet", "--labels"]
    cut = tmp_path / "cut.npy"
    np.save(cut, np.load(features)[:-1])
    for suffix in (".index.jsonl", ".meta.json"):
        shutil.copy(features.with_suffix(suffix), cut.with_suffix(suffix))
    altered = broken_head(head, tmp_path, lambda folder: (folder / "head.safetensors").write_bytes(b"x" * 100))
    cases: list[tuple[list[Any], str]] = [
        (["fit", cut, "--labels", "folder", "--out", out], "the files do not belong together; embed the images again"),
        (
            fit("path,label\nhat/hat-1.jpg,a\nhat/hat-2.jpg,a\n"),
            "got 2 labelled rows of one class, 'a'; label rows of at least two classes",
        ),
        (
            fit("path,label\nhat/hat-1.jpg,a\nhats/hat-2.jpg,b\nshoe.jpg,b\n"),
            "got 1 labelled row of one class, 'a'; 2 labels without a row, such as hats/hat-2.jpg; write their paths",
        ),
        (fit("path,label\nhat/hat-1.jpg,a\nhat/hat-1.jpg,b\n"), "labelled a second time"),
        (fit('path,label\nhat/hat-1.jpg,"a\nhat/hat-2.jpg,b\n'), "not a CSV file (line 3: "),
        (fit("path,label\nhat/hat-1.jpg,a, b\nhat/hat-2.jpg,b\n"), "line 2: has 3 columns; expected 2"),
        (["predict", head, features, "--suggest", 1, "--labels", few, "--out", few], "is also an input"),
        (["predict", head, features, "--suggest", 1, "--labels", f"{few}:label", "--out", few], "is also an input"),
        (fit("path,label\nnone.jpg,a\n"), "none of its 1 paths is one of the 40 rows"),
        (["fit", features, "--labels", tmp_path / "none.csv", "--out", out], "cannot be read"),
        (["fit", features, "--labels", "folder", "--out", head], "exists already"),
        (["fit", tmp_path / "none.npy", "--labels", "folder", "--out", out], "no such file"),
        (["fit", tmp_path / "none", "--labels", "folder", "--out", out], "no such file or folder"),
        ([*score, labelled("path,label\nhat/hat-1.jpg,zebra\n")], "'zebra', which is not one of the head's 10 classes"),
        (["predict", altered, features], "altered or truncated"),
        (["predict", tmp_path / "nothing", features], "not a head"),
        (["predict", single, features, "--probabilities"], "this head has no probabilities"),
        (["predict", head, features, "--out", tmp_path / "nowhere" / "x.csv"], "does not exist; make it first"),
    ]
    for arguments, reason in cases:
        result = robustfeat("svm", *arguments)
        assert result.returncode == 1, (arguments, result.stderr)
        assert reason in only_line(result.stderr)
        assert result.stdout == ""
        assert not out.exists()


def test_wrong_usage_is_said(robustfeat: Run, head: Path, features: Path, tmp_path: Path) -> None:
    out = ["--labels", "folder", "--out", tmp_path / "out"]
    for arguments, reason in [
        (["fit", features, features, *out], "expected one file of features; got 2 INPUTs"),
        (["fit", features, *out, "--precision", "int8"], "--precision is for images"),
        (["fit", features, *out, "--kind", "nearest-mean", "--C", 1], "has no --C"),
        (["fit", features, *out, "--C", "nan"], "nan is not a finite number"),
        (["predict", head, features, "--reject", "nan"], "nan is not a finite number"),
        (["predict", head, features, "--out", "x.txt"], "ending in .csv or .jsonl"),
        (["predict", head, features, "--labels", "folder"], "pass --suggest N, too"),
    ]:
        result = robustfeat("svm", *arguments)
        assert result.returncode == 2
        assert reason in result.stderr


def test_a_head_is_made_wherever_no_other_fit_makes_it(robustfeat: Run, features: Path, tmp_path: Path) -> None:
    fit = ["svm", "fit", features, "--labels", "folder", "--kind", "nearest-mean", "--quiet", "--out"]
    (tmp_path / "here").mkdir()
    assert robustfeat(*fit, tmp_path / "new" / "folder" / "head").returncode == 0
    command = [sys.executable, "-m", "robustfeat", *map(str, fit), "."]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    here = subprocess.run(command, cwd=tmp_path / "here", env=env, capture_output=True, text=True, check=False)
    assert here.returncode == 0, here.stderr
    assert (tmp_path / "here" / "head.json").is_file()
    partial = tmp_path / ".two.partial"
    partial.mkdir()
    lock = FileLock(partial)
    assert lock.take()
    second = robustfeat(*fit, tmp_path / "two")
    lock.release()
    assert "two: another process is writing it (process" in only_line(second.stderr)
    assert not (tmp_path / "two").exists()
    assert not (tmp_path / ".two.trials.json").exists()


def test_a_fit_that_cannot_write_its_head_keeps_what_it_tried(features: Path, tmp_path: Path, robustfeat: Run) -> None:
    fit = ["svm", "fit", features, "--labels", "folder", "--selection", "holdout", "--out", tmp_path / "head"]
    command = shlex.join(map(str, [sys.executable, "-m", "robustfeat", *fit]))
    # Files of at most 8 KiB: the settings fit in, the head does not.
    limited = ["bash", "-c", f"ulimit -f 8; exec {command}"]
    failed = subprocess.run(limited, cwd=ROOT, capture_output=True, text=True, check=False)
    assert failed.returncode == 1
    assert "File too large" in failed.stderr.splitlines()[-1]
    assert [file.name for file in tmp_path.iterdir()] == [".head.trials.json"]
    resumed = robustfeat(*fit)
    assert resumed.returncode == 0, resumed.stderr
    assert re.search(r"[1-9]\d* settings were tried before", resumed.stderr)
    assert [file.name for file in tmp_path.iterdir()] == ["head"]


def processor_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_an_interrupted_fit_stops_at_once_and_leaves_nothing(tmp_path: Path, write_features: Any) -> None:
    draw = np.random.default_rng(0)
    count = 30_000
    values = draw.normal(size=(count, 400)).astype(np.float32)
    file = write_features(tmp_path / "f.npy", values, [f"{row % 9}/{row}.jpg" for row in range(count)])
    command = [sys.executable, "-m", "robustfeat", "svm", "fit", file, "--labels", "folder", "--out", tmp_path / "head"]

    heed = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # a shell's background ignores it
    command[1:3] = ["-c", f"{heed}; from robustfeat.cli import main; main()"]
    with subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stderr is not None
        assert "30,000 labelled rows" in process.stderr.readline()
        # Whether a solver is at work shows in the time it takes: reading and sharing out 30,000 rows needs less.
        began = processor_seconds(process.pid)
        wait_until(lambda: processor_seconds(process.pid) > began + 3)
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert (
            process.stderr.read().splitlines()[-1] == "robustfeat: interrupted"
        )  # behind a line of progress, on a busy machine
        assert process.wait() == 1
        assert time.monotonic() - began < 3
    assert not (tmp_path / "head").exists()


def test_an_array_made_elsewhere_is_fitted_and_predicted(features: Path, tmp_path: Path, robustfeat: Run) -> None:
    other, names, head = tmp_path / "other.npy", tmp_path / "names.txt", tmp_path / "head"
    np.save(other, np.load(features).astype(np.float64))
    rows = [json.loads(line)["path"] for line in features.with_suffix(".index.jsonl").read_text().splitlines()]
    names.write_text("\n".join(rows))
    fitted = robustfeat("svm", "fit", other, "--names", names, "--labels", "folder", "--out", head, "--C", "0.1")
    assert fitted.returncode == 0
    assert "its model is unknown, so whether it matches a head is not checked" in fitted.stderr
    predicted = robustfeat("svm", "predict", head, other, "--names", names, "--quiet")
    assert [line.split(",")[0] for line in predicted.stdout.splitlines()[1:]] == rows
    assert float(robustfeat("svm", "score", head, features, "--labels", "folder", "--quiet").stdout) > 0.9
    refused = robustfeat("svm", "predict", head, features.parent, "--names", names)
    assert refused.returncode == 2
    assert "--names is for a .npy file of features" in refused.stderr


def test_rows_without_names_are_numbered_and_have_labels_in_order(
    features: Path, tmp_path: Path, robustfeat: Run
) -> None:
    other, labels, head = tmp_path / "other.npy", tmp_path / "labels.txt", tmp_path / "head"
    np.save(other, np.load(features))
    rows = [json.loads(line)["path"] for line in features.with_suffix(".index.jsonl").read_text().splitlines()]
    labels.write_text("".join(f"{path.split('/')[0]}\n" for path in rows))
    fitted = robustfeat("svm", "fit", other, "--labels", labels, "--out", head, "--C", "0.1")
    assert fitted.returncode == 0, fitted.stderr
    assert f"{other}: its rows have no names, so they are numbered from 0; its model is unknown" in fitted.stderr
    named = robustfeat("svm", "fit", features, "--labels", "folder", "--out", tmp_path / "named", "--C", "0.1")
    assert named.returncode == 0, named.stderr
    unnamed, wanted = (load_file(place / "head.safetensors")["coefficients"] for place in (head, tmp_path / "named"))
    np.testing.assert_array_equal(unnamed, wanted)
    predicted = robustfeat("svm", "predict", head, other, "--quiet").stdout.splitlines()[1:]
    assert [line.split(",")[0] for line in predicted] == [str(row) for row in range(40)]
    suggested = robustfeat(
        "svm", "predict", head, other, "--suggest", 3, "--labels", labels, "--out", tmp_path / "p.csv"
    )
    assert suggested.stdout.splitlines() == ["path,prediction,certainty"]  # all are labelled
    labels.write_text("hat\nshoes\n")
    refused = robustfeat("svm", "score", head, other, "--labels", labels)
    assert refused.returncode == 1
    told = "has 2 labels and no paths; expected one label for each of the 40 rows, in order"
    assert told in only_line(refused.stderr)


def test_a_fit_loads_neither_scipy_nor_scikit_learn(features: Path, tmp_path: Path) -> None:
    """They would take longer than the fit."""
    command = ["svm", "fit", str(features), "--labels", "folder", "--out", str(tmp_path / "head"), "--quiet"]
    loaded = loaded_after(f"from robustfeat.cli import cli; cli.main({command!r}, standalone_mode=False)")
    assert (tmp_path / "head" / "report.html").is_file()
    assert not {"scipy", "sklearn", "pandas", "matplotlib", "onnxruntime"} & loaded


def test_a_stray_file_beside_class_folders_is_counted_and_named(
    robustfeat: Run, examples: Path, tmp_path: Path
) -> None:
    for name in ("hat", "shoes"):
        shutil.copytree(examples / name, tmp_path / "photos" / name)
    shutil.copy(examples / "hat" / "hat-1.jpg", tmp_path / "photos" / "stray.jpg")
    fit = ["svm", "fit", tmp_path / "photos", "--labels", "folder", "--C", "0.1", "--scaling", "none", "--json"]
    result = robustfeat(*fit, "--out", tmp_path / "head")
    assert result.returncode == 0, result.stderr
    assert "images in no class folder: 1, such as stray.jpg (not embedded)" in result.stderr
    assert "embed 8/8 images" in result.stderr
    assert {"rows": 8, "unlabelled": 1, "failed": 0}.items() <= json.loads(only_line(result.stdout)).items()
    assert robustfeat("embed", tmp_path / "photos", "--out", tmp_path / "f.npy", "--quiet").returncode == 0
    result = robustfeat("svm", "score", tmp_path / "head", tmp_path / "f.npy", "--labels", "folder", "--json")
    assert "8 labelled rows of 2 classes; rows in no class folder: 1, such as stray.jpg" in result.stderr
    assert {"rows": 8, "unlabelled": 1}.items() <= json.loads(only_line(result.stdout)).items()
    result = robustfeat("svm", "fit", examples / "hat", "--labels", "folder", "--out", tmp_path / "none")
    assert result.returncode == 1
    reason = "hat-1.jpg: is in no class folder, like all others of the images; expected CLASS/NAME within INPUT; move"
    assert reason in result.stderr.splitlines()[-1]


def test_another_model_than_the_heads_is_refused_naming_both(
    robustfeat: Run, head: Path, features: Path, model: Path, examples: Path, tmp_path: Path
) -> None:
    mine = json.loads((head / "head.json").read_text())["model"]["name"]
    theirs = json.loads((model / "config.json").read_text())["robustfeat"]["name"]
    other = tmp_path / "other.npy"
    assert robustfeat("embed", examples, "--model", model, "--out", other, "--quiet").returncode == 0
    fitted = robustfeat("svm", "fit", other, "--labels", "folder", "--out", tmp_path / "head", "--C", 1, "--quiet")
    assert fitted.returncode == 0
    pass_it = "pass the model that the head was fitted with as --model{}, or fit a head with the other one"
    embed_it = "embed the images with the head's model, or fit a head on these features"
    cases: list[tuple[list[Any], str]] = [
        (
            [head, examples, "--model", model],
            f"features of {mine}, --model {model} of {theirs}; {pass_it.format(' builtin')}",
        ),
        (
            [tmp_path / "head", examples],
            f"features of {theirs}, the default --model builtin of {mine}; {pass_it.format('')}",
        ),
        ([head, other], f"{head}: needs features of {mine}, {other} of {theirs}; {embed_it}"),
    ]
    for command, reason in cases:
        result = robustfeat("svm", "predict", *command)
        assert result.returncode == 1
        assert reason in only_line(result.stderr)


def test_a_rejection_that_a_small_head_cannot_make_is_said(
    features: Path, head: Path, tmp_path: Path, robustfeat: Run
) -> None:
    out = tmp_path / "p.csv"
    result = robustfeat("svm", "predict", head, features, "--out", out, "--reject", 0.01)
    assert "--reject 0.01 rejects nothing: measured on 40 rows, typicality is at least 0.0244" in result.stderr
    assert f"{out}: 40 predictions\n" in result.stderr
    noise = np.random.default_rng(0).integers(0, 256, (80, 80, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    result = robustfeat("svm", "predict", head, tmp_path / "noise.png", "--out", out, "--reject", 0.9)
    assert f"{out}: 0 predictions, 1 rejected" in result.stderr
    assert out.read_text().splitlines()[1].startswith("noise.png,,,")
