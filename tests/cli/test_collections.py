"""`robustfeat similar` and `robustfeat duplicates` as users meet them."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter

from tests import built_in
from tests.cli.test_cli import only_line
from tests.conftest import Run, Towers, WriteFeatures
from tests.transformers_models import TEXTS, reference_texts


@pytest.fixture(scope="module")
def features(robustfeat: Run, examples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("features") / "feats.npy"
    assert robustfeat("embed", examples, "--out", out, "--quiet").returncode == 0
    return out


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def objects_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def nearest(features: Path, row: int) -> list[int]:
    """All rows but that one by their cosine to it, computed here."""
    values = np.load(features).astype(np.float64)
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    return [other for other in np.argsort(-(values @ values[row]), kind="stable").tolist() if other != row]


def test_rows_go_by_number_and_by_path_and_are_left_out_of_their_answers(robustfeat: Run, features: Path) -> None:
    result = robustfeat("similar", features, "5", "hat/hat-1.jpg", "-k", "3")
    assert result.returncode == 0, result.stderr
    found = rows_of(result.stdout)
    assert list(found[0]) == ["query", "rank", "row", "path", "cosine"]
    assert [one["query"] for one in found] == ["5"] * 3 + ["hat/hat-1.jpg"] * 3
    assert [one["rank"] for one in found] == ["1", "2", "3"] * 2
    assert [int(one["row"]) for one in found] == nearest(features, 5)[:3] + nearest(features, 4)[:3]
    assert "similar 2/2 queries" in result.stderr


def test_images_are_embedded_as_the_features_were(robustfeat: Run, features: Path, examples: Path) -> None:
    result = robustfeat("similar", features, examples / "hat", "7", "-k", "1", "--json", "--quiet")
    assert (result.returncode, result.stderr) == (0, "")
    found = objects_of(result.stdout)
    assert [(one["query"], one["path"]) for one in found[:4]] == [
        (f"hat-{number}.jpg", f"hat/hat-{number}.jpg") for number in range(1, 5)
    ]
    assert all(abs(one["cosine"] - 1) < 1e-6 and one["rank"] == 1 for one in found[:4])
    assert (found[4]["query"], found[4]["row"]) == ("7", nearest(features, 7)[0])


def test_features_of_a_file_are_queries_and_a_file_is_not_its_own_answer(
    robustfeat: Run, features: Path, examples: Path, tmp_path: Path
) -> None:
    hats = tmp_path / "hats.parquet"
    assert robustfeat("embed", examples / "hat", "--out", hats, "--quiet").returncode == 0
    found = rows_of(robustfeat("similar", features, hats, "-k", "1").stdout)
    assert [one["path"] for one in found] == [f"hat/hat-{number}.jpg" for number in range(1, 5)]
    out = tmp_path / "all.jsonl"
    result = robustfeat("similar", features, features, "-k", "39", "--out", out)
    assert (result.returncode, result.stdout) == (0, "")
    found_rows: dict[str, list[int]] = {}
    for one in objects_of(out.read_text()):
        found_rows.setdefault(one["query"], []).append(one["row"])
    assert [found_rows[path] for path in found_rows] == [nearest(features, row) for row in range(40)]


def test_failed_rows_never_answer_and_failed_queries_are_said(robustfeat: Run, examples: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    shutil.copytree(examples / "hat", photos)
    (photos / "bad.jpg").write_bytes(b"junk")
    (photos / "2").write_bytes((photos / "hat-1.jpg").read_bytes())
    out = tmp_path / "feats.npy"
    assert robustfeat("embed", photos, "--out", out, "--quiet").returncode == 3
    result = robustfeat("similar", out, "0", "1", photos / "bad.jpg", "--quiet")
    assert result.returncode == 3
    assert sorted(one["path"] for one in rows_of(result.stdout)) == ["hat-2.jpg", "hat-3.jpg", "hat-4.jpg"]
    assert {one["query"] for one in rows_of(result.stdout)} == {"1"}
    assert [line.split(": ")[1] for line in result.stderr.splitlines()] == ["0", "bad.jpg"]
    failed = objects_of(robustfeat("similar", out, "0", "--json").stdout)
    assert [list(one) for one in failed] == [["query", "error"]]
    as_file = robustfeat("similar", out, photos / "2", "-k", "1", "--quiet")
    assert rows_of(as_file.stdout)[0]["path"] == "hat-1.jpg"


def test_features_of_other_models_are_refused_with_both_names(
    robustfeat: Run, features: Path, write_features: WriteFeatures, tmp_path: Path, examples: Path
) -> None:
    values = np.random.default_rng(0).standard_normal((3, 512)).astype(np.float32)
    other = write_features(tmp_path / "other.npy", values, ["a", "b", "c"])
    line = only_line(robustfeat("similar", features, other).stderr)
    assert built_in.NAME in line
    assert "digits-v1" in line
    line = only_line(robustfeat("similar", other, examples / "hat").stderr)
    assert (
        "made by the model digits-v1, which images and words need, too; pass its folder or its name on the Hub "
        "as --model" in line
    )
    line = only_line(robustfeat("similar", other, examples / "hat", "--model", "builtin").stderr)
    assert "digits-v1" in line
    assert built_in.NAME in line
    assert rows_of(robustfeat("similar", other, "1", "-k", "9").stdout)[1]["rank"] == "2"


def test_arrays_made_elsewhere_are_searched_by_rows(robustfeat: Run, tmp_path: Path, examples: Path) -> None:
    array, names = tmp_path / "array.npy", tmp_path / "names.txt"
    np.save(array, np.eye(3, 4) + 0.5)
    names.write_text("a\nb\nc\n")
    result = robustfeat("similar", array, "b", "--names", names, "--quiet")
    assert [one["path"] for one in rows_of(result.stdout)] == ["a", "c"]
    line = only_line(robustfeat("similar", array, examples / "hat", "--names", names).stderr)
    assert "its model is unknown, so images and words cannot be embedded" in line


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["40"], "row 40: FEATS has 40 rows, from 0; for a file of this name, pass ./40"),
        (["hat/hat-9.jpg"], "no such file or folder"),
        (["0", "--out", "nowhere/x.csv"], "the folder nowhere does not exist"),
        (["0", "--out", "FEATS"], "expected a name ending in .csv or .jsonl"),
    ],
)
def test_wrong_queries_are_one_line(robustfeat: Run, features: Path, arguments: list[str], said: str) -> None:
    result = robustfeat("similar", features, *(str(features) if one == "FEATS" else one for one in arguments))
    assert result.returncode in {1, 2}
    assert result.stdout == ""
    assert said.replace("FEATS", str(features)) in result.stderr.splitlines()[-1]


@pytest.fixture(scope="module")
def photos(examples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight photographs, and copies of some: the same bytes, half the size, blurred, and unreadable."""
    root = tmp_path_factory.mktemp("photos") / "in"
    shutil.copytree(examples / "hat", root / "hat")
    shutil.copytree(examples / "shoes", root / "shoes")
    shutil.copy(root / "hat" / "hat-1.jpg", root / "a copy.jpg")
    image = Image.open(root / "hat" / "hat-2.jpg")
    image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS).save(root / "half.png")
    image.resize((image.width * 2, image.height * 2), Image.Resampling.BICUBIC).filter(
        ImageFilter.GaussianBlur(3)
    ).save(root / "hat" / "blurred.png")
    for name in ("bad-1.jpg", "bad-2.jpg"):
        (root / name).write_bytes(b"junk")
    return root


@pytest.fixture(scope="module")
def copies(robustfeat: Run, photos: Path) -> Path:
    out = photos.parent / "feats.npy"
    assert robustfeat("embed", photos, "--out", out, "--quiet").returncode == 3
    return out


@pytest.mark.parametrize(
    ("keep", "kept", "dropped"),
    [
        ("first", "half.png", ["hat/blurred.png", "hat/hat-2.jpg"]),
        ("largest", "hat/blurred.png", ["half.png", "hat/hat-2.jpg"]),
        ("sharpest", "hat/hat-2.jpg", ["half.png", "hat/blurred.png"]),
    ],
)
def test_groups_of_duplicates_and_which_image_is_kept(
    robustfeat: Run, photos: Path, copies: Path, keep: str, kept: str, dropped: list[str], tmp_path: Path
) -> None:
    listed = tmp_path / "drop.txt"
    before = sorted(photos.rglob("*"))
    result = robustfeat(
        "duplicates", copies, "--threshold", "0.88", "--keep", keep, "--images", photos, "--drop-list", listed
    )
    assert result.returncode == 3  # for the failed rows
    assert "2 groups: 3 images to drop (1 exact copy, 2 near)" in result.stderr
    assert re.search(r"2 of \d+ images failed, left out: \S+ \(.+\), \S+ \(.+\)$", result.stderr, re.MULTILINE)
    found = rows_of(result.stdout)
    assert list(found[0]) == ["group", "row", "path", "cosine", "action", "kind"]
    groups = [(one["group"], one["path"], one["action"], one["kind"]) for one in found]
    exact = [("1", "a copy.jpg", "keep", "kept"), ("1", "hat/hat-1.jpg", "drop", "exact")]
    assert groups == [*exact, ("2", kept, "keep", "kept"), *(("2", path, "drop", "near") for path in dropped)]
    assert listed.read_text().splitlines() == ["hat/hat-1.jpg", *dropped]
    assert all(float(one["cosine"]) >= 0.88 for one in found)
    assert sorted(photos.rglob("*")) == before


def test_the_default_threshold_is_said_and_finds_copies(robustfeat: Run, copies: Path, tmp_path: Path) -> None:
    out = tmp_path / "found.jsonl"
    result = robustfeat("duplicates", copies, "--out", out)
    assert f"(measured for {built_in.NAME})" in result.stderr
    found = objects_of(out.read_text())
    assert {one["path"] for one in found} >= {"a copy.jpg", "hat/hat-1.jpg", "half.png", "hat/hat-2.jpg"}
    assert not any("shoes" in one["path"] for one in found)


def test_images_that_are_gone_are_kept_last(robustfeat: Run, photos: Path, copies: Path, tmp_path: Path) -> None:
    rest = tmp_path / "rest"
    shutil.copytree(photos, rest)
    (rest / "hat" / "blurred.png").unlink()
    (rest / "hat" / "hat-2.jpg").write_bytes(b"changed")
    result = robustfeat("duplicates", copies, "--threshold", "0.88", "--keep", "largest", "--images", rest)
    assert "2 images could not be found or read" in result.stderr
    assert {one["path"] for one in rows_of(result.stdout) if one["action"] == "keep"} == {"a copy.jpg", "half.png"}


def test_copies_are_found_where_features_tell_nothing(
    robustfeat: Run, write_features: WriteFeatures, tmp_path: Path
) -> None:
    place = write_features(tmp_path / "zeros.npy", np.zeros((4, 8), np.float32), list("abcd"), hashes=False)
    index = place.with_suffix(".index.jsonl")
    lines = objects_of(index.read_text())
    for line, digit in zip(lines, "abca", strict=True):
        line["sha256"] = digit * 64
    index.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = robustfeat("duplicates", place, "--threshold", "0.9", "--quiet")
    assert result.returncode == 0, result.stderr
    assert [(one["row"], one["kind"]) for one in rows_of(result.stdout)] == [("0", "kept"), ("3", "exact")]
    lines[1]["sha256"] = "no hash"
    index.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "the sha256 of row 1" in only_line(robustfeat("duplicates", place).stderr)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--keep", "largest"], "pass those given to embed as --images"),
        (["--null"], "--null applies to --drop-list"),
        (["--threshold", "0"], "0 is not in the range"),
        (["--drop-list", "nowhere/drop.txt"], "the folder nowhere does not exist"),
    ],
)
def test_wrong_options_are_one_line(robustfeat: Run, copies: Path, arguments: list[str], said: str) -> None:
    result = robustfeat("duplicates", copies, *arguments)
    assert result.returncode in {1, 2}
    assert said in result.stderr.splitlines()[-1]


@pytest.fixture(scope="module")
def two_folders(robustfeat: Run, examples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Features of the folders a and b beside them. b/1.jpg is a copy of a/7.jpg, and a/1.jpg is something else."""
    root = tmp_path_factory.mktemp("two")
    for name, image in (("a/1.jpg", "shoes/shoes-1.jpg"), ("a/7.jpg", "hat/hat-1.jpg"), ("b/1.jpg", "hat/hat-1.jpg")):
        (root / name).parent.mkdir(exist_ok=True)
        shutil.copy(examples / image, root / name)
    done = robustfeat("embed", root / "a", root / "b", "--out", root / "feats.npy", "--quiet")
    assert done.returncode == 0, done.stderr
    return root


def test_the_drop_list_names_no_image_that_is_kept(robustfeat: Run, two_folders: Path, tmp_path: Path) -> None:
    feats, listed, table = two_folders / "feats.npy", tmp_path / "drop.txt", tmp_path / "all.csv"
    result = robustfeat("duplicates", feats, "--quiet", "--drop-list", listed, "--out", table)
    assert (result.returncode, result.stdout) == (1, "")
    said = "'1.jpg': is the path of row 2, which is to drop, and of row 0, which is not; embed one folder"
    assert said in only_line(result.stderr)
    assert not list(tmp_path.iterdir())
    rows = rows_of(robustfeat("duplicates", feats, "--quiet").stdout)
    assert [(one["row"], one["action"]) for one in rows] == [("1", "keep"), ("2", "drop")]


def test_a_file_that_is_listed_twice_is_no_duplicate(robustfeat: Run, two_folders: Path, tmp_path: Path) -> None:
    photos, feats, listed = two_folders / "a", tmp_path / "feats.npy", tmp_path / "drop.txt"
    assert robustfeat("embed", photos, photos / "7.jpg", "--out", feats, "--quiet").returncode == 0
    result = robustfeat("duplicates", feats, "--drop-list", listed)
    assert result.returncode == 0, result.stderr
    assert rows_of(result.stdout) == []
    assert "1 row left out with path and bytes of an earlier row" in result.stderr
    assert listed.read_text() == ""
    # A copy of a file that is listed twice is dropped as ever.
    shutil.copytree(photos, tmp_path / "a")
    shutil.copy(photos / "7.jpg", tmp_path / "a" / "0.jpg")
    feats = tmp_path / "more.npy"
    done = robustfeat("embed", tmp_path / "a", tmp_path / "a" / "7.jpg", "--out", feats, "--quiet")
    assert done.returncode == 0, done.stderr
    assert robustfeat("duplicates", feats, "--drop-list", listed).returncode == 0
    assert listed.read_text() == "7.jpg\n"


def test_images_of_the_same_path_are_measured_by_their_bytes(robustfeat: Run, examples: Path, tmp_path: Path) -> None:
    image = Image.open(examples / "hat" / "hat-1.jpg")
    for name, scale in (("a/0.png", 2), ("a/1.png", 4), ("b/1.png", 1)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        size = (image.width * scale // 2, image.height * scale // 2)
        image.resize(size, Image.Resampling.LANCZOS).save(tmp_path / name)
    folders, feats = (tmp_path / "a", tmp_path / "b"), tmp_path / "feats.npy"
    assert robustfeat("embed", *folders, "--out", feats, "--quiet").returncode == 0
    places = [part for folder in folders for part in ("--images", folder)]
    result = robustfeat("duplicates", feats, "--threshold", "0.8", "--keep", "largest", *places, "--quiet")
    assert result.returncode == 0, result.stderr
    assert [(one["row"], one["action"]) for one in rows_of(result.stdout)] == [
        ("1", "keep"),
        ("0", "drop"),
        ("2", "drop"),
    ]


def test_no_output_overwrites_an_input(robustfeat: Run, features: Path, tmp_path: Path) -> None:
    for name in ("feats.npy", "feats.index.jsonl", "feats.meta.json"):
        shutil.copy(features.with_name(name), tmp_path / name)
    feats, names, link = tmp_path / "feats.npy", tmp_path / "names.csv", tmp_path / "link.jsonl"
    names.write_text("".join(f"{row}\n" for row in range(40)))
    link.symlink_to(tmp_path / "feats.index.jsonl")
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    index, meta = tmp_path / "feats.index.jsonl", tmp_path / "feats.meta.json"
    for arguments in (
        ("similar", feats, "4", "--out", index),
        ("similar", feats, "4", "--out", link),
        ("similar", feats, "4", "--out", f"{tmp_path}/../{tmp_path.name}/{index.name}"),
        ("similar", feats, "4", "--names", names, "--out", names),
        ("duplicates", feats, "--out", index),
        ("duplicates", feats, "--drop-list", index),
        ("duplicates", feats, "--drop-list", meta),
        ("duplicates", feats, "--drop-list", feats),
        ("duplicates", feats, "--names", names, "--drop-list", names),
        ("duplicates", feats, "--out", tmp_path / "new.csv", "--drop-list", tmp_path / "new.csv"),
    ):
        result = robustfeat(*arguments)
        line = only_line(result.stderr)
        assert result.returncode == 1, arguments
        assert line.endswith(f"{arguments[-2]} {arguments[-1]}: is also an input; choose another name"), line
        assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before, arguments


@pytest.mark.skipif(os.name != "posix", reason="names of bytes")
def test_names_that_lines_cannot_hold(robustfeat: Run, examples: Path, tmp_path: Path) -> None:
    root = tmp_path / "odd"
    root.mkdir()
    for name in (b"a.jpg", b"b\n.jpg", b"c\xff.jpg"):
        (root / os.fsdecode(name)).write_bytes((examples / "hat" / "hat-1.jpg").read_bytes())
    out, listed, table = tmp_path / "feats.npy", tmp_path / "drop", tmp_path / "all.csv"
    assert robustfeat("embed", root, "--out", out, "--quiet").returncode == 0
    line = only_line(robustfeat("duplicates", out, "--quiet", "--drop-list", listed).stderr)
    assert "a path with a line break" in line
    assert "pass --null" in line
    assert not listed.exists()
    result = robustfeat("duplicates", out, "--quiet", "--drop-list", listed, "--null", "--out", table)
    assert result.returncode == 0, result.stderr
    assert listed.read_bytes() == b"b\n.jpg\0c\xff.jpg\0"
    assert b"c\xff.jpg" in table.read_bytes()


def test_words_find_images(robustfeat: Run, examples: Path, features: Path, towers: Towers, tmp_path: Path) -> None:
    folder, out = towers("clip"), tmp_path / "clip.npy"
    assert robustfeat("embed", examples, "--out", out, "--model", folder, "--quiet").returncode == 0
    texts = [part for text in TEXTS for part in ("--text", text)]
    result = robustfeat("similar", out, "--model", folder, *texts, "3", "-k", "4", "--json", "--quiet")
    assert (result.returncode, result.stderr) == (0, "")
    found = objects_of(result.stdout)
    assert [one["query"] for one in found[::4]] == ["3", *TEXTS]
    images, words = np.load(out).astype(np.float64), reference_texts("clip", folder, TEXTS).astype(np.float64)
    cosines = (words / np.linalg.norm(words, axis=1)[:, None]) @ (images / np.linalg.norm(images, axis=1)[:, None]).T
    for number, expected in enumerate(cosines, 1):
        rows = found[4 * number : 4 * number + 4]
        assert [one["row"] for one in rows] == np.argsort(-expected, kind="stable")[:4].tolist()
        np.testing.assert_allclose([one["cosine"] for one in rows], np.sort(expected)[::-1][:4], atol=1e-5)
    result = robustfeat("similar", features, "--text", "a hat")
    assert result.returncode == 1
    assert "builtin: the model has no text tower; use a model like CLIP or SigLIP" in only_line(result.stderr)
    result = robustfeat("similar", features)
    assert result.returncode == 2
    assert "Missing argument 'QUERY...', or --text." in result.stderr


def test_an_index_is_made_once_and_refused_when_the_features_change(
    robustfeat: Run, examples: Path, tmp_path: Path
) -> None:
    photos, out = tmp_path / "photos", tmp_path / "feats.npy"
    shutil.copytree(examples, photos)
    assert robustfeat("embed", photos, "--out", out, "--quiet").returncode == 0
    exact = robustfeat("similar", out, out, "-k", "2", "--quiet")
    first = robustfeat("similar", out, out, "-k", "2", "--approximate")
    assert "index 40/40 rows" in first.stderr
    assert first.stdout == exact.stdout
    again = robustfeat("similar", out, "0", "--approximate")
    assert "index" not in again.stderr
    (photos / "hat" / "hat-1.jpg").unlink()
    assert robustfeat("embed", photos, "--out", out, "--sync", "--quiet").returncode == 0
    line = only_line(robustfeat("similar", out, "0", "--approximate", "--quiet").stderr)
    assert "is the index of an earlier" in line
    assert "remove" in line
