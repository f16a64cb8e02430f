"""`robustfeat map` as users call it."""

from __future__ import annotations

import base64
import csv
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import ROOT, Run, WriteFeatures

PAGE = re.compile(r'<script type="application/json" id="data">(.*?)</script>', re.S)


def data_of(page: Path) -> Any:
    match = PAGE.search(page.read_text("utf-8"))
    assert match is not None
    return json.loads(match[1])


@pytest.fixture(scope="module")
def mapped(robustfeat: Run, examples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with feats.npy of the examples, a head, and a map of both."""
    folder = tmp_path_factory.mktemp("mapped")
    assert robustfeat("embed", examples, "--out", folder / "feats.npy", "--quiet").returncode == 0
    fitted = robustfeat("svm", "fit", folder / "feats.npy", "--labels", "folder", "--out", folder / "head", "--quiet")
    assert fitted.returncode == 0, fitted.stderr
    options = ("--images", examples, "--head", folder / "head", "--title", "Clothes")
    outs = ("--out", folder / "map.html", "--out", folder / "map.csv")
    done = robustfeat("map", folder / "feats.npy", *options, *outs, "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["images"], summary["thumbnails"], summary["missing"], summary["failed"]) == (40, 40, 0, 0)
    assert summary["out"] == {str(folder / name): (folder / name).stat().st_size for name in ("map.html", "map.csv")}
    assert "map.html: 40 images, 40 thumbnails" in done.stderr
    return folder


def test_a_page_holds_labels_predictions_clusters_layers_and_thumbnails(mapped: Path, examples: Path) -> None:
    data = data_of(mapped / "map.html")
    assert data["title"] == "Clothes"
    assert data["paths"] == sorted(file.relative_to(examples).as_posix() for file in examples.rglob("*.jpg"))
    colourings = {one["name"]: one for one in data["colourings"]}
    assert list(colourings) == ["folder", "prediction", "typicality", "cluster"]
    assert colourings["folder"]["names"] == sorted(folder.name for folder in examples.iterdir())
    assert [layer["name"] for layer in data["layers"]] == ["suspicious labels", "duplicates"]
    assert data["thumbnails"]["count"] == 40
    text = (mapped / "map.html").read_text("utf-8")
    assert re.findall(r"https?://[^\s\"']*", text) == []


def test_places_and_predictions_are_in_the_table(mapped: Path, robustfeat: Run) -> None:
    with open(mapped / "map.csv", newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert list(rows[0]) == ["path", "x", "y", "folder", "prediction", "typicality", "cluster"]
    predicted = robustfeat("svm", "predict", mapped / "head", mapped / "feats.npy")
    wanted = {row["path"]: row for row in csv.DictReader(predicted.stdout.splitlines())}
    assert {row["path"]: row["prediction"] for row in rows} == {path: row["prediction"] for path, row in wanted.items()}
    for row in rows:
        assert float(row["typicality"]) == pytest.approx(float(wanted[row["path"]]["typicality"]), rel=1e-4)


def test_the_same_map_is_made_again_and_from_its_table(mapped: Path, robustfeat: Run, tmp_path: Path) -> None:
    places = []
    for name, options in (("again", ()), ("kept", ("--layout", mapped / "map.csv")), ("other", ("--seed", "5"))):
        done = robustfeat("map", mapped / "feats.npy", "--clusters", 0, *options, "--out", tmp_path / f"{name}.html")
        assert done.returncode == 0, done.stderr
        assert "pass the images as --images to add them" in done.stderr
        places.append(data_of(tmp_path / f"{name}.html")["x"])
    first = data_of(mapped / "map.html")["x"]
    assert places[0] == first
    assert places[2] != first
    decoded = [np.frombuffer(base64.b64decode(str(text)), "<f4") for text in (first, places[1])]
    np.testing.assert_allclose(decoded[0], decoded[1], atol=1e-6)


def test_images_are_embedded_and_missing_ones_are_counted(
    examples: Path, robustfeat: Run, tmp_path: Path, mapped: Path
) -> None:
    images = tmp_path / "images"
    shutil.copytree(examples, images)
    shutil.rmtree(images / "hat")
    (images / "dress" / "dress-1.jpg").write_bytes(b"junk")
    done = robustfeat("map", images, "--out", tmp_path / "some.html", "--json", "--quiet")
    assert done.returncode == 3
    assert "1 of 36 images failed, not on the map: dress/dress-1.jpg (" in done.stderr
    summary = json.loads(done.stdout)
    assert (summary["images"], summary["failed"], summary["thumbnails"], summary["missing"]) == (35, 1, 35, 0)
    done = robustfeat("map", mapped / "feats.npy", "--images", images, "--out", tmp_path / "all.html", "--json")
    assert done.returncode == 3
    assert "5 images have no thumbnail: missing or unreadable" in done.stderr
    assert json.loads(done.stdout)["thumbnails"] == 35
    done = robustfeat(
        "map", mapped / "feats.npy", "--images", examples, "--thumbnail-mb", 0.02, "--out", tmp_path / "x.html"
    )
    assert done.returncode == 0
    assert re.search(r"\d+ images have no thumbnail, for a page below 0.02 MB: see --thumbnail-mb", done.stderr)
    done = robustfeat("map", mapped / "feats.npy", "--rows", 12, "--out", tmp_path / "few.html")
    assert "the map shows 12 of the 40 images, drawn at random" in done.stderr
    assert len(data_of(tmp_path / "few.html")["paths"]) == 12


def test_labels_and_layers_come_from_tables(mapped: Path, robustfeat: Run, tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("path,label\nhat-1.jpg,red\nhat/hat-2.jpg,blue\n")
    (tmp_path / "look.csv").write_text("path,group,why\nhat/hat-1.jpg,a,odd\nhat/hat-2.jpg,a,\nnowhere.jpg,b,\n")
    layer = f"to look at={tmp_path / 'look.csv'}"
    options = ("--labels", tmp_path / "labels.csv", "--layer", layer, "--duplicates", 0.5, "--clusters", 4)
    done = robustfeat("map", mapped / "feats.npy", *options, "--out", tmp_path / "map.html")
    assert done.returncode == 0, done.stderr
    assert "look.csv: 1 line names no image" in done.stderr
    data = data_of(tmp_path / "map.html")
    label, cluster = data["colourings"]
    assert label["names"] == ["blue", "red"]
    assert cluster["names"] == [f"cluster {number}" for number in (1, 2, 3, 4)]
    look, duplicates = data["layers"]
    assert look["texts"] == ["why odd", "why "]
    assert look["groups"] is not None
    assert any("cosine 0." in text for text in duplicates["texts"])


@pytest.mark.parametrize("option", ["--labels {}", "--labels {}:label", "--layer a={}", "--layout {}", "--names {}"])
def test_no_output_overwrites_an_input(mapped: Path, robustfeat: Run, tmp_path: Path, option: str) -> None:
    file, link = tmp_path / "own.csv", tmp_path / "link.csv"
    file.write_text("path,label,x,y\nhat/hat-1.jpg,red,0,0\n")
    link.symlink_to(file)
    before = file.read_bytes()
    for out in (file, link):
        done = robustfeat("map", mapped / "feats.npy", *option.format(file).split(), "--out", out)
        assert (done.returncode, file.read_bytes()) == (1, before)
        assert f"--out {out}: is also an input; choose another name" in done.stderr
        assert link.is_symlink()


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--out", "map.png"), 2, "--out map.png: expected a name ending in .html or .csv"),
        (("--out", "{tmp}/no/map.html"), 1, "does not exist; make it first"),
        (("--out", "{tmp}/m.html", "--clusters", "many"), 2, "'many' is neither auto nor a number from 0 to 1000"),
        (("--out", "{tmp}/m.html", "--layer", "name"), 2, "--layer name: expected NAME=FILE.csv"),
        (("--out", "{tmp}/m.html", "--layer", "a={tmp}/no.csv"), 1, "no.csv: cannot be read"),
        (("--out", "{tmp}/m.html", "--layer", "a={tmp}/odd.csv"), 1, "expected a column path"),
        (("--out", "{tmp}/m.html", "--layout", "{tmp}/odd.csv"), 1, "expected path, x and y"),
        (("--out", "{tmp}/m.html", "--layout", "{tmp}/nan.csv"), 1, "line 2: (nan, 1.0) is not finite"),
        (("--out", "{tmp}/m.html", "--layout", "{tmp}/else.csv"), 1, "has coordinates of none of these images"),
        (("--out", "{tmp}/m.html", "--labels", "{tmp}/labels.csv"), 1, "none of its paths is one of the 40 rows"),
        (("--out", "{tmp}/m.html", "--images", "{tmp}"), 1, "none of these images is on the map"),
        (("--out", "{tmp}/m.html", "--head", "{tmp}"), 1, "not a head"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_and_leave_nothing(
    mapped: Path,
    robustfeat: Run,
    tmp_path: Path,
    example_files: list[Path],
    options: tuple[str, ...],
    code: int,
    message: str,
) -> None:
    (tmp_path / "odd.csv").write_text("file,label\na,b\n")
    (tmp_path / "nan.csv").write_text("path,x,y\nhat/hat-1.jpg,nan,1\n")
    (tmp_path / "else.csv").write_text("path,x,y\nother.jpg,1,1\n")
    (tmp_path / "labels.csv").write_text("path,label\nother.jpg,a\n")
    shutil.copy(example_files[0], tmp_path / "else.jpg")
    before = sorted(tmp_path.iterdir())
    done = robustfeat("map", mapped / "feats.npy", "--quiet", *(option.format(tmp=tmp_path) for option in options))
    assert done.returncode == code
    assert message in done.stderr
    assert code == 2 or len(done.stderr.strip().splitlines()) == 1
    assert sorted(tmp_path.iterdir()) == before


def test_ctrl_c_leaves_nothing(tmp_path: Path, write_features: WriteFeatures) -> None:
    values = np.random.default_rng(0).normal(size=(4000, 32)).astype(np.float32)
    place = write_features(tmp_path / "feats.npy", values, [f"{row}.png" for row in range(4000)])
    before = sorted(tmp_path.iterdir())
    heed = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # a shell's background ignores it
    code = f"{heed}; from robustfeat.cli import main; main()"
    options = ["--duplicates", "0", "--clusters", "0", "--out", str(tmp_path / "map.html")]
    command = [sys.executable, "-c", code, "map", str(place), *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stderr is not None
        assert re.search("neighbours|layout", process.stderr.readline())
        process.send_signal(signal.SIGINT)
        assert process.stderr.read().splitlines()[-1] == "robustfeat: interrupted"
        assert process.wait() == 1
    assert sorted(tmp_path.iterdir()) == before
