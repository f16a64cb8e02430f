"""What `robustfeat embed` writes, from files as users have them."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from robustfeat import FeatureExtractor
from robustfeat.errors import DecodeError, InputError
from robustfeat.serving.bulk.embedding import EmbeddingResult, embed_files
from robustfeat.serving.inputs.listing import list_inputs
from robustfeat.serving.verify import cosine


@pytest.fixture(scope="module")
def extractor(model: Path) -> FeatureExtractor:
    return FeatureExtractor.from_pretrained(model, threads=2, streams=2)


def embed(extractor: FeatureExtractor, root: Path, out: Path, **options: Any) -> EmbeddingResult:
    with list_inputs([root]) as inputs:
        return embed_files(extractor, inputs, out, quiet=True, **options)


@pytest.fixture
def photos(tmp_path: Path, example_files: list[Path]) -> Path:
    """Good, bad and foreign files, in folders whose walk order differs from the byte order of the paths."""
    root = tmp_path / "photos"
    places = ["b.jpg", "a/z.JPEG", "a-1/y.jpg", "Z.jpeg", "é.jpg"]
    for place, file in zip(places, example_files, strict=False):
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, root / place)
    (root / "broken.png").write_bytes(b"\x89PNG junk")
    (root / "dangling.jpg").symlink_to(root / "nowhere.jpg")
    (root / "empty.gif").touch()
    (root / "notes.txt").write_text("not an image")
    (root / ".hidden.jpg").write_text("ignored")
    (root / ".git").mkdir()
    (root / ".git" / "c.jpg").write_text("ignored")
    return root


def read_index(out: Path) -> list[dict[str, Any]]:
    return [
        json.loads(line) for line in out.with_suffix(".index.jsonl").read_text("utf-8").removesuffix("\n").split("\n")
    ]


def test_each_image_is_one_row_in_the_byte_order_of_its_path(
    extractor: FeatureExtractor, photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "feats.npy"
    result = embed(extractor, photos, out)
    features, index = np.load(out, mmap_mode="r"), read_index(out)
    paths = ["Z.jpeg", "a-1/y.jpg", "a/z.JPEG", "b.jpg", "broken.png", "dangling.jpg", "empty.gif", "é.jpg"]
    assert [row["path"] for row in index] == paths
    assert [row["row"] for row in index] == list(range(8))
    assert features.shape == (8, 512)
    assert features.dtype == np.float32
    assert (result.images, result.failed, result.skipped) == (8, 3, 3)
    for row in index:
        file, vector = photos / row["path"], features[row["row"]]
        if row["error"] is None:
            np.testing.assert_allclose(vector, extractor.embed([file])[0], rtol=1e-3, atol=1e-5)
            assert row["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
        else:
            assert np.isnan(vector).all()
    assert {row["path"] for row in index if row["error"]} == {"broken.png", "dangling.jpg", "empty.gif"}
    assert index[5]["sha256"] is None


def test_the_limit_of_pixels_is_an_option_and_part_of_the_run(extractor: FeatureExtractor, tmp_path: Path) -> None:
    options = replace(extractor.options, max_pixels=400)
    small = FeatureExtractor(extractor.folder, extractor.engine, options)
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    Image.new("RGB", (20, 21)).save(tmp_path / "b.png")
    assert embed(small, tmp_path, tmp_path / "f.npy").failed == 1
    assert read_index(tmp_path / "f.npy")[1]["error"] == "20 x 21 is over the limit of 400 pixels"
    assert json.loads((tmp_path / "f.meta.json").read_text())["max_pixels"] == 400
    with pytest.raises(DecodeError, match="20 x 21 is over the limit of 400 pixels"):
        small.embed([tmp_path / "b.png"])
    assert embed(extractor, tmp_path, tmp_path / "g.npy").failed == 0


def test_meta_says_which_model_made_the_features(extractor: FeatureExtractor, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "feats.npy"
    embed(extractor, photos, out)
    meta = json.loads(out.with_suffix(".meta.json").read_text())
    assert meta["model"] == extractor.config.name
    assert meta["files"] == extractor.config.files
    assert meta["preprocessing_hash"] == extractor.config.preprocessing.hash
    assert (meta["images"], meta["failed"], meta["skipped"]) == (8, 3, 3)
    assert meta["precision"] == "fp32"
    assert meta["engine"] == "onnxruntime"


def test_more_images_than_a_few_batches_stay_in_order(
    extractor: FeatureExtractor, tmp_path: Path, example_files: list[Path]
) -> None:
    root = tmp_path / "many"
    root.mkdir()
    for number in range(300):
        (root / f"{number:04}.jpg").symlink_to(example_files[number % 7])
    out = tmp_path / "feats.npy"
    embed(extractor, root, out)
    features = np.load(out)
    first = extractor.embed(example_files[:7])
    np.testing.assert_allclose(features, first[np.arange(300) % 7], rtol=1e-3, atol=1e-5)


def test_outputs_of_two_runs_are_byte_identical(extractor: FeatureExtractor, photos: Path, tmp_path: Path) -> None:
    for name in ("a.npy", "b.npy"):
        embed(extractor, photos, tmp_path / name)
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()
    assert (tmp_path / "a.index.jsonl").read_bytes() == (tmp_path / "b.index.jsonl").read_bytes()
    meta = [json.loads((tmp_path / f"{name}.meta.json").read_text()) for name in "ab"]
    assert all(entry.pop("timing")["seconds"] > 0 for entry in meta)
    assert meta[0] == meta[1]
    assert not [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")]


def test_workers_and_batches_do_not_change_the_features(
    extractor: FeatureExtractor, photos: Path, tmp_path: Path
) -> None:
    embed(extractor, photos, tmp_path / "one.npy", workers=1, batch_size=4)
    embed(extractor, photos, tmp_path / "three.npy", workers=3, batch_size=4)
    embed(extractor, photos, tmp_path / "alone.npy", batch_size=1)
    one, three, alone = (np.load(tmp_path / f"{name}.npy") for name in ("one", "three", "alone"))
    np.testing.assert_array_equal(one, three)  # bit for bit at one batch size
    good = np.isfinite(one).all(1)
    assert good.sum() == 5
    assert cosine(one[good], alone[good]).min() >= 0.999999
    np.testing.assert_allclose(one[good], alone[good], rtol=1e-3, atol=1e-4)  # these features all point one way


def test_names_that_are_not_utf8_keep_their_bytes(
    extractor: FeatureExtractor, tmp_path: Path, example_files: list[Path]
) -> None:
    root = tmp_path / "odd"
    root.mkdir()
    shutil.copy(os.fsencode(example_files[0]), os.fsencode(root) + b"/\xff.jpg")
    out = tmp_path / "feats.npy"
    embed(extractor, root, out)
    assert base64.b64decode(read_index(out)[0]["path_bytes"]) == b"\xff.jpg"
    assert np.isfinite(np.load(out)).all()


def test_a_file_named_itself_is_always_a_row(tmp_path: Path, example_files: list[Path]) -> None:
    odd = tmp_path / "photo.dat"
    shutil.copy(example_files[0], odd)
    (tmp_path / "gone.jpg").symlink_to("nowhere")
    with list_inputs([odd, example_files[1], tmp_path / "gone.jpg"]) as found:
        assert [image.path for image in found] == ["photo.dat", example_files[1].name, "gone.jpg"]


def test_pipes_are_failed_rows_and_do_not_hang(
    extractor: FeatureExtractor, tmp_path: Path, example_files: list[Path]
) -> None:
    root = tmp_path / "odd"
    root.mkdir()
    os.mkfifo(root / "pipe.jpg")
    shutil.copy(example_files[0], root / "photo.jpg")
    out = tmp_path / "feats.npy"
    embed(extractor, root, out)
    assert [row["error"] for row in read_index(out)] == [None, "not a regular file"]


@pytest.mark.parametrize("out", ["feats.csv", "feats", "no/such/feats.npy"])
def test_a_bad_out_is_refused(extractor: FeatureExtractor, photos: Path, tmp_path: Path, out: str) -> None:
    with pytest.raises(InputError, match=rf"^out=\S*{out}: "):
        embed(extractor, photos, tmp_path / out)
    assert [entry.name for entry in tmp_path.iterdir()] == ["photos"]


def test_missing_and_empty_inputs_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file or folder"):
        list_inputs([tmp_path / "none"])
    (tmp_path / "a.txt").touch()
    with pytest.raises(InputError, match=r"no images found; files left out: 1 \(\.txt 1\)"):
        list_inputs([tmp_path])
