"""A folder of several files is read as one file is, and interrupted runs end with the same bytes."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset
import pytest

import robustfeat
from robustfeat.errors import InputError
from robustfeat.serving.bulk.commits import NewOutput
from robustfeat.serving.bulk.joining import join_parts
from robustfeat.serving.bulk.parts import Part
from robustfeat.serving.bulk.stacked import StackedRows
from robustfeat.serving.bulk.storage import LocalFolder
from robustfeat.serving.heads.features import Features
from tests.conftest import files_of
from tests.serving.bulk.conftest import Embed


@pytest.fixture(scope="module")
def folder(folder: Path) -> Path:
    """The images, two of them with names to escape: 4 files of 8 rows."""
    (folder / "08.jpg").rename(folder / '08 "a\\b é.jpg')
    (folder / "10.jpg").rename(os.fsdecode(os.fsencode(folder) + b"/10 \xff.jpg"))
    return folder


@pytest.fixture(scope="module")
def one_file(folder: Path, embed: Embed, tmp_path_factory: pytest.TempPathFactory) -> Features:
    out = tmp_path_factory.mktemp("one") / "feats.npy"
    embed(folder, out)
    return robustfeat.load(out)


@pytest.fixture(scope="module")
def feats(folder: Path, embed: Embed, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dataset") / "feats"
    result = embed(folder, f"{out}/", rows_per_file=7)  # raised to two shards
    assert (result.images, result.failed, result.skipped) == (30, 2, 1)
    return out


def written(out: Path) -> dict[str, Any]:
    files: dict[str, Any] = {file.name: file.read_bytes() for file in out.iterdir()}
    files["_meta.json"] = json.loads(files["_meta.json"])
    del files["_meta.json"]["timing"]
    return files


def names(count: int, suffix: str = ".npy") -> list[str]:
    numbers = [f"{number:06}" for number in range(count)]
    return sorted([f"{n}{suffix}" for n in numbers] + [f"_{n}.index.jsonl" for n in numbers] + ["_meta.json"])


def test_a_dataset_has_the_rows_of_one_file(feats: Path, one_file: Features) -> None:
    assert sorted(file.name for file in feats.iterdir()) == names(4)
    assert not list(feats.parent.glob(".*"))
    whole = np.concatenate([np.load(feats / f"{number:06}.npy") for number in range(4)])
    assert whole.tobytes() == one_file.values[:].tobytes()
    lines = b"".join((feats / f"_{number:06}.index.jsonl").read_bytes() for number in range(4))
    index = Path(one_file.place).with_suffix(".index.jsonl")
    assert lines == index.read_bytes()
    meta, single = written(feats)["_meta.json"], json.loads(index.with_name("feats.meta.json").read_text())
    assert [one["rows"] for one in meta["feature_files"]] == [8, 8, 8, 6]
    assert [one["failed"] for one in meta["feature_files"]] == [1, 0, 0, 1]
    assert [one["features"] for one in meta["feature_files"]] == [f"{number:06}.npy" for number in range(4)]
    assert {key: meta.get(key) for key in single if key not in {"timing", "features_sha256", "index_sha256"}} == {
        key: value for key, value in single.items() if key not in {"timing", "features_sha256", "index_sha256"}
    }
    loaded = robustfeat.load(f"{feats}/")
    assert list(loaded.paths) == list(one_file.paths)
    assert (loaded.errors, loaded.model) == (one_file.errors, one_file.model)
    assert loaded.hashes is not None
    assert one_file.hashes is not None
    np.testing.assert_array_equal(loaded.hashes, one_file.hashes)
    np.testing.assert_array_equal(np.asarray(loaded.values), one_file.values)
    assert robustfeat.load(feats).meta_sha256 == loaded.meta_sha256  # without the slash


@pytest.mark.parametrize("suffix", [".parquet", ".safetensors"])
def test_the_suffix_before_the_slash_is_the_format(
    suffix: str, folder: Path, embed: Embed, one_file: Features, tmp_path: Path
) -> None:
    out = tmp_path / f"feats{suffix}"
    embed(folder, f"{out}/", rows_per_file=8)
    assert sorted(file.name for file in out.iterdir()) == names(4, suffix)
    out = out.rename(tmp_path / "moved")  # the meta file tells the format
    np.testing.assert_array_equal(np.asarray(robustfeat.load(out).values), one_file.values)
    if suffix == ".parquet":  # other readers take the folder as it is
        table = pyarrow.dataset.dataset(out, format="parquet").to_table()
        assert table.num_rows == 30
        assert table["path"].to_pylist()[:2] == list(one_file.paths)[:2]


@pytest.mark.parametrize("length", [[3, 0, 5, 1, 0, 7], [16], [0, 4], [0]])
def test_stacked_rows_are_read_as_one_array(length: list[int]) -> None:
    draw = np.random.default_rng(0)
    parts = [draw.normal(size=(rows, 3)).astype(np.float32) for rows in length]
    stacked, whole = StackedRows(parts), np.concatenate(parts)
    assert (stacked.shape, stacked.dtype, stacked.ndim, len(stacked)) == (whole.shape, whole.dtype, 2, len(whole))
    for start in range(-2, len(whole) + 2):
        for stop in [None, *range(-2, len(whole) + 2)]:
            for step in (None, 2, -1):
                np.testing.assert_array_equal(stacked[start:stop:step], whole[start:stop:step])
    if len(whole):
        rows = draw.integers(0, len(whole), 20)
        np.testing.assert_array_equal(stacked[rows], whole[rows])
        np.testing.assert_array_equal(stacked[-1], whole[-1])
        np.testing.assert_array_equal(stacked[whole[:, 0] > 0], whole[whole[:, 0] > 0])
    np.testing.assert_array_equal(stacked[np.array([], np.int64)], whole[:0])
    np.testing.assert_array_equal(np.asarray(stacked), whole)
    with pytest.raises(IndexError, match="rows must be between 0 and"):
        stacked[np.array([len(whole)])]


def test_paths_are_read_where_they_are_asked_for(
    embed: Embed, example_files: list[Path], tmp_path: Path, folder: Path, one_file: Features
) -> None:
    expected = sorted((file.name for file in folder.glob("*.jpg")), key=os.fsencode)
    assert list(one_file.paths) == expected
    assert [one_file.paths[row] for row in range(-30, 30)] == expected * 2
    assert one_file.paths[5:25:3] == expected[5:25:3]
    for row in (-31, 30):
        with pytest.raises(IndexError):
            one_file.paths[row]
    many = tmp_path / "many"
    many.mkdir()
    for number in range(200):
        (many / f"{number:03}.jpg").symlink_to(example_files[0])
    embed(many, tmp_path / "many.npy", batch_size=64, shard_rows=64)
    paths = robustfeat.load(tmp_path / "many.npy").paths
    order = random.Random(0).sample(range(200), 200)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(paths.__getitem__, order)) == [f"{row:03}.jpg" for row in order]


def test_a_stopped_run_keeps_whole_files_and_ends_with_the_same_bytes(
    folder: Path, feats: Path, embed: Embed, tmp_path: Path
) -> None:
    root, out, shards = tmp_path / "images", tmp_path / "feats", tmp_path / ".feats.shards"
    shutil.copytree(folder, root)
    shutil.copy(root / "00.jpg", root / "05.jpg")
    with pytest.raises(InputError, match=r"29.jpg: .*stopped at this image"):
        embed(root, f"{out}/", rows_per_file=8, on_error="stop")
    assert not out.exists()
    # Three files are whole, and their shards are gone.
    kept = sorted(file.name for file in shards.iterdir() if file.suffix in {".jsonl", ".f32", ".json"})
    assert kept == ["000006.f32", "000006.jsonl", "job.json", *(f"new-{number:06}.json" for number in range(3))]
    stamps = {file.name: file.stat().st_mtime_ns for file in shards.glob("new-*")}
    with pytest.raises(InputError, match=r"other settings \(rows_per_file was 8, now 12\)"):
        embed(root, f"{out}/", rows_per_file=12)
    with pytest.raises(InputError, match=r"29.jpg: .*stopped at this image"):
        embed(root, f"{out}/", rows_per_file=8, on_error="stop")
    assert {file.name: file.stat().st_mtime_ns for file in shards.glob("new-*")} == stamps
    embed(root, f"{out}/", rows_per_file=8)
    embed(root, f"{tmp_path}/unbroken/", rows_per_file=8)
    assert written(out) == written(tmp_path / "unbroken")
    assert not shards.exists()


def steps_of(embed: Embed, images: Path, out: Path, patch: pytest.MonkeyPatch, kill_at: int, **options: Any) -> int:
    """Embeds, and ends like a killed process before step number `kill_at` of all that it does to files."""
    seen = 0
    for owner, name in [(LocalFolder, "write"), (LocalFolder, "move"), (LocalFolder, "delete"), (NewOutput, "open")]:
        call = getattr(owner, name)

        def counted(*args: Any, call: Any = call, **kwargs: Any) -> Any:
            nonlocal seen
            seen += 1
            if seen == kill_at:
                raise KeyboardInterrupt
            return call(*args, **kwargs)

        patch.setattr(owner, name, counted)
    embed(images, f"{out}/", rows_per_file=4, **options)
    return seen


@pytest.mark.parametrize("change", ["replace", "append", "sync"])
def test_a_reader_sees_the_old_dataset_or_the_new_one_wherever_a_run_is_killed(
    change: str, embed: Embed, example_files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, file in enumerate(example_files[:11]):
        for name in [part for part, has in (("old", number < 9), ("new", number > 3 or change == "append")) if has]:
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / f"{number:02}.jpg").symlink_to(file)
    options = {} if change == "replace" else {change: True}
    embed(tmp_path / "old", f"{tmp_path}/start/", rows_per_file=4)

    def changed(kill_at: int) -> tuple[Path, int]:
        place = tmp_path / f"at{kill_at}"
        shutil.copytree(tmp_path / "start", place)
        with monkeypatch.context() as patch:
            return place, steps_of(embed, tmp_path / "new", place, patch, kill_at, **options)

    old = list(robustfeat.load(tmp_path / "start").paths)
    whole, steps = changed(0)
    new = list(robustfeat.load(whole).paths)
    assert new != old
    assert len(list(whole.glob("*.npy"))) == -(-len(new) // 4)  # none of an earlier file is left
    assert steps > 10
    later = 0
    for kill_at in range(1 + (change == "append"), steps + 1, 3):  # every third step, to take less time
        with pytest.raises(KeyboardInterrupt):
            changed(kill_at)
        place = tmp_path / f"at{kill_at}"
        seen = robustfeat.load(place)
        assert list(seen.paths) in (old, new)
        later += list(seen.paths) == new
        embed(tmp_path / "new", f"{place}/", rows_per_file=4, **options)
        assert written(place) == written(whole)
        assert not list(tmp_path.glob(".at*"))
    assert later


def test_append_leaves_whole_files_as_they_are(embed: Embed, folder: Path, feats: Path, tmp_path: Path) -> None:
    first, out = tmp_path / "first", tmp_path / "feats"
    shutil.copytree(folder, first)
    for number in range(20, 30):
        (first / f"{number}.jpg").unlink()
    embed(first, f"{out}/", rows_per_file=8)
    inodes = {file.name: file.stat().st_ino for file in out.iterdir()}
    assert embed(folder, out, append=True).known == 20  # cut as the dataset is
    same = {file.name for file in out.iterdir() if file.stat().st_ino == inodes.get(file.name)}
    assert same == {"000000.npy", "000001.npy", "_000000.index.jsonl", "_000001.index.jsonl"}
    mine, theirs = written(out), written(feats)
    assert mine.pop("_meta.json")["feature_files"] == theirs.pop("_meta.json")["feature_files"]
    assert mine == theirs
    # With files of another size, all are written anew.
    (first / "20.jpg").write_bytes(b"new")
    assert embed(first, out, sync=True, rows_per_file=4).images == 21
    assert sorted(file.name for file in out.iterdir()) == names(6)


@pytest.mark.parametrize("of", [3, 12])  # of 12, four are empty
def test_joined_parts_are_the_whole_dataset(of: int, folder: Path, feats: Path, embed: Embed, tmp_path: Path) -> None:
    parts = [f"{tmp_path}/part-{number}{'/' if number % 2 else '.npy'}" for number in range(1, of + 1)]
    for number, place in enumerate(parts, 1):
        embed(folder, place, part=Part(number, of), **({"rows_per_file": 4} if place.endswith("/") else {}))
    random.Random(0).shuffle(parts)
    join_parts(parts, f"{tmp_path}/joined/", rows_per_file=5, quiet=True)
    assert written(tmp_path / "joined") == written(feats)
    join_parts(parts, f"{tmp_path}/joined.npy", quiet=True)
    whole = np.asarray(robustfeat.load(feats).values)
    assert np.load(tmp_path / "joined.npy").tobytes() == whole.tobytes()


def test_more_files_than_may_be_open_are_loaded(folder: Path, embed: Embed, tmp_path: Path) -> None:
    embed(folder, f"{tmp_path}/feats/", rows_per_file=1, shard_rows=1, batch_size=1)
    assert len(list((tmp_path / "feats").glob("*.npy"))) == 30
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 40, hard))
    try:
        assert len(robustfeat.load(tmp_path / "feats").paths) == 30  # each has features and index, opened and mapped
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_what_is_no_dataset_is_one_line(folder: Path, feats: Path, embed: Embed, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(feats, tmp_path / "copy"))
    shutil.copy(copy / "000001.npy", copy / "000002.npy")
    with pytest.raises(InputError, match=r"000002.npy: the sha256 must be .*do not belong together"):
        robustfeat.load(copy)
    (copy / "_000001.index.jsonl").unlink()
    with pytest.raises(InputError, match=r"_000001.index.jsonl: no such file; expected .* a folder with files"):
        robustfeat.load(copy)
    meta = json.loads((copy / "_meta.json").read_text())
    (copy / "_meta.json").write_text(json.dumps(meta | {"images": 31}))
    with pytest.raises(InputError, match=r"not what robustfeat embed writes .*images is 31, its files have 30"):
        robustfeat.load(copy)
    with pytest.raises(InputError, match=r"rows_per_file=8: is for a folder of several files; .*feats.npy is one file"):
        embed(folder, tmp_path / "feats.npy", rows_per_file=8)
    (tmp_path / "file").touch()
    for out, message in [
        (f"{tmp_path}/file/", "is a file"),
        (f"{tmp_path}/no/such/", "the folder .*no does not exist"),
        ("./", "or in / for a folder"),
        ("s3://bucket/", "or in / for a folder"),
    ]:
        with pytest.raises(InputError, match=message):
            embed(folder, out)


def test_what_others_wrote_is_not_replaced(folder: Path, embed: Embed, tmp_path: Path) -> None:
    out, photos = tmp_path / "feats.npy", tmp_path / "photos"
    np.save(out, np.zeros((3, 4)))
    shutil.copytree(folder, photos)
    before = files_of(tmp_path)
    said = r"already exists without \S+meta.json, so robustfeat embed did not write it; choose another"
    with pytest.raises(InputError, match=f"feats.npy: {said}"):
        embed(folder, out)
    with pytest.raises(InputError, match=f"photos/00.jpg: {said}"):
        embed(folder, f"{photos}/")
    assert files_of(tmp_path) == before
    assert embed(folder, out, restart=True).images == 30
    (tmp_path / "empty").mkdir()
    assert embed(folder, f"{tmp_path}/empty/").images == 30


def test_a_commit_file_of_others_deletes_nothing_but_files_of_the_dataset(
    folder: Path, feats: Path, embed: Embed, tmp_path: Path
) -> None:
    out, shards = Path(shutil.copytree(feats, tmp_path / "feats")), tmp_path / ".feats.shards"
    (tmp_path / "mine.npy").touch()
    (out / "notes.txt").touch()
    shards.mkdir()
    stale = ["../mine.npy", str(tmp_path / "mine.npy"), "notes.txt", "../000000.npy", "000009.npy"]
    (shards / "commit").write_text(json.dumps({"files": 0, "stale": stale}))
    (out / "000009.npy").touch()
    embed(folder, f"{out}/", rows_per_file=8)
    assert (tmp_path / "mine.npy").exists()
    assert (out / "notes.txt").exists()
    assert not (out / "000009.npy").exists()


def test_a_reader_beside_writers_never_sees_a_mixture(embed: Embed, folder: Path, tmp_path: Path) -> None:
    images, done = [tmp_path / "a", tmp_path / "b"], threading.Event()
    for number, root in enumerate(images):
        root.mkdir()
        for file in sorted(folder.glob("1*.jpg"))[: 5 + 4 * number]:
            (root / f"{root.name}{file.name}").symlink_to(file)
        embed(root, f"{tmp_path}/feats/", rows_per_file=4)

    def write() -> None:
        for number in range(5):
            embed(images[number % 2], f"{tmp_path}/feats/", rows_per_file=4)
        done.set()

    with ThreadPoolExecutor() as pool:
        writer = pool.submit(write)
        seen = set()
        while not done.is_set() and not writer.done():
            features = robustfeat.load(tmp_path / "feats")
            first = {path[0] for path in features.paths}
            assert len(features) == {"a": 5, "b": 9}[first.pop()]
            assert not first
            seen.add(len(features))
        writer.result()
    assert seen == {5, 9}


@pytest.mark.slow
def test_kills_of_the_process_group_change_no_byte_of_a_dataset(
    example_files: list[Path], model: Path, tmp_path: Path
) -> None:
    root = tmp_path / "images"
    root.mkdir()
    for number in range(600):
        (root / f"{number:04}.jpg").symlink_to(example_files[number % len(example_files)])
    base = [sys.executable, "-m", "robustfeat", "embed", str(root), "--model", str(model), "--threads", "1"]
    base += ["--batch-size", "8", "--shard-rows", "8", "--rows-per-file", "40", "--workers", "1", "--quiet"]
    assert subprocess.run([*base, "--out", f"{tmp_path}/whole/"], check=False).returncode == 0
    shards, draw, kills = tmp_path / ".feats.shards", random.Random(0), 0
    while not (tmp_path / "feats" / "_meta.json").exists():
        # A file of five shards comes and goes: what counts is how many files and shards there have been.
        wanted = progress_of(shards) + draw.randint(1, 9)
        process = subprocess.Popen([*base, "--out", f"{tmp_path}/feats/"], start_new_session=True)
        while process.poll() is None and (kills == 15 or progress_of(shards) < wanted):
            time.sleep(0.001)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills >= 10
    assert written(tmp_path / "feats") == written(tmp_path / "whole")
    assert not shards.exists()


def progress_of(shards: Path) -> int:
    names = [file.name for file in shards.glob("*")]
    return sum(name.endswith(".jsonl") for name in names) + 5 * sum(
        name.startswith("new-0") and name.endswith(".json") for name in names
    )
