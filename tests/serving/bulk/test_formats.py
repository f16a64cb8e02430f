"""The output files, read by the libraries that users read them with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
from pyarrow import parquet
from safetensors import safe_open

from robustfeat import FeatureExtractor
from tests import built_in

Run = Callable[..., "CompletedProcess[str]"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, example_files: list[Path]) -> Path:
    """5 images, the third of them broken, and all three outputs."""
    root = tmp_path_factory.mktemp("formats")
    (root / "images").mkdir()
    for number in range(5):
        target = root / "images" / f"{number}.jpg"
        target.write_bytes(b"junk" if number == 2 else example_files[number].read_bytes())
    return root


@pytest.fixture(scope="module")
def expected(example_files: list[Path]) -> np.ndarray:
    """From the images one by one; the broken one is NaN."""
    features = np.concatenate([FeatureExtractor.from_pretrained().embed([file]) for file in example_files[:5]])
    features[2] = np.nan
    return features


@pytest.fixture(scope="module", params=["npy", "safetensors", "parquet"])
def out(request: pytest.FixtureRequest, folder: Path, robustfeat: Run) -> Path:
    target = folder / f"feats-{request.param}.{request.param}"
    result = robustfeat("embed", folder / "images", "--out", target)
    assert result.returncode == 3, result.stderr
    assert "1 of 5 images failed" in result.stderr
    names = {f"{target.stem}.index.jsonl", f"{target.stem}.meta.json", target.name}
    assert {entry.name for entry in folder.iterdir() if entry.name.strip(".").startswith(target.stem)} == names
    return target


def test_every_format_holds_the_same_rows(out: Path, expected: np.ndarray) -> None:
    if out.suffix == ".npy":
        features = np.load(out, mmap_mode="r")
    elif out.suffix == ".safetensors":
        with safe_open(out, "np") as file:
            assert list(file.keys()) == ["features"]
            assert file.metadata()["model"] == built_in.NAME
            features = file.get_tensor("features")
    else:
        table = parquet.read_table(out)
        assert table.column_names == ["path", "features", "error"]
        assert table["path"].to_pylist() == [f"{number}.jpg" for number in range(5)]
        errors = table["error"].to_pylist()
        assert "not an image" in errors.pop(2)
        assert errors == [None] * 4
        assert table.schema.metadata[b"model"] == built_in.NAME.encode()
        features = np.stack(table["features"].to_numpy())
    assert features.shape == (5, 512)
    assert features.dtype == np.float32
    np.testing.assert_allclose(features, expected, rtol=1e-3, atol=1e-4)
    index = [json.loads(line) for line in out.with_suffix(".index.jsonl").read_text().splitlines()]
    assert [(row["row"], row["path"], bool(row["error"])) for row in index] == [
        (number, f"{number}.jpg", number == 2) for number in range(5)
    ]


def test_the_header_of_safetensors_is_aligned(folder: Path, out: Path) -> None:
    if out.suffix == ".safetensors":
        assert int.from_bytes(out.read_bytes()[:8], "little") % 8 == 0


def test_an_unknown_suffix_is_refused_before_anything_is_done(folder: Path, robustfeat: Run) -> None:
    result = robustfeat("embed", folder / "images", "--out", folder / "feats.csv")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].endswith(
        "in .npy, .parquet, .safetensors, or in / for a folder of several files"
    )
    assert not (folder / "feats.csv").exists()
