"""`robustfeat drift` as users meet it: images, features and heads, and its exit codes."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from tests.cli.test_cli import only_line
from tests.conftest import ROOT, Run, WriteFeatures


@pytest.fixture(scope="module")
def features(robustfeat: Run, examples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("features") / "feats.npy"
    assert robustfeat("embed", examples, "--out", out, "--quiet").returncode == 0
    return out


@pytest.fixture(scope="module")
def blurred(examples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The photographs out of focus."""
    folder = tmp_path_factory.mktemp("blurred")
    for place in sorted(examples.rglob("*.jpg")):
        with Image.open(place) as image:
            image.filter(ImageFilter.GaussianBlur(12)).save(folder / place.name)
    return folder


def test_blurred_photographs_are_a_shift(
    robustfeat: Run, features: Path, blurred: Path, clothes: Path, tmp_path: Path
) -> None:
    out = tmp_path / "images.csv"
    result = robustfeat("drift", features, blurred, "--head", clothes, "--out", out)
    assert result.returncode == 3, result.stderr
    line = only_line(result.stdout)
    assert line.startswith("shift: p 0.001, distance 0.")
    assert line.endswith("% on the reference")
    assert f"compared all 40 images of {features} with all 40 images of {blurred}" in result.stderr
    rows = list(csv.DictReader(out.open()))
    assert {row["path"] for row in rows} == {place.name for place in blurred.iterdir()}
    assert [float(row["distance"]) for row in rows] == sorted((float(row["distance"]) for row in rows), reverse=True)
    assert np.median([float(row["typicality"]) for row in rows]) < 0.1


def test_images_of_the_reference_are_no_shift(robustfeat: Run, features: Path, examples: Path, tmp_path: Path) -> None:
    result = robustfeat("drift", examples, features, "--json", "--quiet")
    assert (result.returncode, result.stderr) == (0, "")
    found = json.loads(only_line(result.stdout))
    assert (found["shift"], found["p"], found["distance"], found["in_both"]) == (False, 1.0, 0.0, 40)
    assert "accuracy" not in found
    np.save(tmp_path / "other.npy", np.load(features) + 5)  # of an unknown model
    result = robustfeat("drift", features, tmp_path / "other.npy", "--alpha", "0.1", "--permutations", "19", "--json")
    assert result.returncode == 3, result.stderr
    assert json.loads(result.stdout)["p"] == 0.05


def test_failed_images_are_left_out(robustfeat: Run, write_features: WriteFeatures, tmp_path: Path) -> None:
    values = np.random.default_rng(0).random((30, 4), np.float32)
    values[4] = np.nan
    names = [f"{row}.jpg" for row in range(30)]
    place = write_features(tmp_path / "feats.npy", values, names, {4: "damaged"})
    result = robustfeat("drift", place, place, "--json", "--quiet")
    assert result.returncode == 3
    assert result.stderr == 2 * "robustfeat: 1 of 30 images failed, left out: 4.jpg (damaged)\n"
    assert json.loads(result.stdout)["failed"] == {"reference": 1, "new": 1}


def test_what_cannot_be_compared_is_refused_in_a_line(
    robustfeat: Run, features: Path, examples: Path, write_features: WriteFeatures, tmp_path: Path
) -> None:
    other = write_features(tmp_path / "other.npy", np.ones((3, 512), np.float32), ["a", "b", "c"])
    np.save(tmp_path / "plain.npy", np.ones((3, 512), np.float32))
    for arguments, code, text in (
        ([features, features, "--alpha", "0.001"], 2, "--alpha 0.001 needs --permutations above 999; got 999"),
        ([features, features, "--out", features], 2, "expected a name ending in .csv or .jsonl"),
        ([features, other], 1, "of digits-v1; use the same model for both"),
        ([features, features, "--model", "builtin"], 2, "--model is for images"),
        ([tmp_path / "plain.npy", examples], 1, "embed the images first, and pass their features"),
    ):
        result = robustfeat("drift", *arguments)
        assert (result.returncode, result.stdout) == (code, ""), result.stderr
        assert text in result.stderr.splitlines()[-1]


def test_the_example_in_the_docs_prints_what_they_say(robustfeat: Run) -> None:
    text = (ROOT / "docs" / "drift.md").read_text("utf-8")
    ((line, said),) = re.findall(r"    \$ robustfeat (.*)\n    (.*)\n", text)
    result = robustfeat(*line.replace("examples/", f"{ROOT}/examples/").split())
    assert (result.returncode, result.stderr) == (0, "")
    # The last digits depend on the processor.
    numbers = [[float(number) for number in re.findall(r"[\d.]+\d", one)] for one in (said, result.stdout)]
    assert numbers[0] == pytest.approx(numbers[1], rel=0.05)
    assert result.stdout.startswith("no shift found: p ")
