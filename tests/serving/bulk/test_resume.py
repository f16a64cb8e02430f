"""Runs that are killed, stopped and repeated end with the bytes of an unbroken one."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from robustfeat import FeatureExtractor
from robustfeat.errors import InputError
from robustfeat.serving.bulk.commits import NewOutput
from robustfeat.serving.bulk.embedding import EmbeddingResult, embed_files
from robustfeat.serving.bulk.storage import LocalFolder
from robustfeat.serving.heads.features import open_features
from robustfeat.serving.inputs.listing import list_inputs
from tests import built_in
from tests.conftest import Start, files_of

Embed = Callable[..., EmbeddingResult]


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory, example_files: list[Path]) -> Path:
    """250 images of which every 50th is broken."""
    root = tmp_path_factory.mktemp("many")
    for number in range(250):
        file = root / f"{number:04}.jpg"
        if number % 50 == 7:
            file.write_bytes(b"\xff\xd8\xff junk")
        else:
            file.symlink_to(example_files[number % len(example_files)])
    return root


@pytest.fixture(scope="module")
def extractor(model: Path) -> FeatureExtractor:
    return FeatureExtractor.from_pretrained(model, threads=2, streams=2)


@pytest.fixture(scope="module")
def embed(extractor: FeatureExtractor) -> Embed:
    def call(root: Path, out: Path, **options: Any) -> EmbeddingResult:
        options = {"batch_size": 16, "shard_rows": 16, "workers": 1, "quiet": True, **options}
        with list_inputs([root]) as inputs:
            return embed_files(extractor, inputs, out, **options)

    return call


@pytest.fixture(scope="module")
def unbroken(many: Path, embed: Embed, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("unbroken") / "feats.npy"
    result = embed(many, out, workers=2)
    assert (result.images, result.failed) == (250, 5)
    return out


def written(out: Path) -> tuple[bytes, bytes, dict[str, Any]]:
    meta = json.loads(out.with_suffix(".meta.json").read_text())
    del meta["timing"]
    return out.read_bytes(), out.with_suffix(".index.jsonl").read_bytes(), meta


@pytest.mark.slow
def test_twenty_kills_of_the_process_group_change_no_byte(
    many: Path, model: Path, unbroken: Path, tmp_path: Path
) -> None:
    out = tmp_path / "feats.npy"
    options = ["--model", model, "--batch-size", "16", "--shard-rows", "16", "--threads", "2"]
    command = [sys.executable, "-m", "robustfeat", "embed", many, "--out", out, *options]
    shards = tmp_path / ".feats.npy.shards"
    draw = random.Random(0)
    kills, kept = 0, 0
    while kills < 20:
        # Start-up takes most of so short a run, so the moment is drawn from the work: after a few more shards, or none.
        wanted = len(list(shards.glob("*.jsonl"))) + draw.randrange(6)
        process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True, start_new_session=True)
        while process.poll() is None and len(list(shards.glob("*.jsonl"))) < wanted:
            time.sleep(0.001)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=draw.uniform(0, 0.05))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        _, said = process.communicate()
        kept += "resuming" in said
        if process.returncode == -signal.SIGKILL:
            kills += 1
        else:
            assert process.returncode == 3, said  # it was faster than its killer
            out.unlink()
    assert kept > 0  # some went on from what others had left
    assert subprocess.run([*map(str, command), "--quiet"], check=False).returncode == 3
    assert written(out) == written(unbroken)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["feats.index.jsonl", "feats.meta.json", "feats.npy"]


def test_a_stopped_run_redoes_at_most_one_shard(many: Path, embed: Embed, unbroken: Path, tmp_path: Path) -> None:
    """The first broken image is number 7, so the run is stopped there once they are out of the way."""
    root, out = tmp_path / "images", tmp_path / "feats.npy"
    shutil.copytree(many, root, symlinks=True)
    for number in range(7, 150, 50):
        (root / f"{number:04}.jpg").unlink()
        (root / f"{number:04}.jpg").symlink_to(root / "0000.jpg")
    with pytest.raises(InputError, match=r"0157.jpg: .* \(row 157\); stopped at this image"):
        embed(root, out, on_error="stop")
    shards = sorted((tmp_path / ".feats.npy.shards").glob("*.jsonl"))
    assert len(shards) == 157 // 16
    stamps = [shard.stat().st_mtime_ns for shard in shards]
    assert not out.exists()
    with pytest.raises(InputError, match=r"0157.jpg"):
        embed(root, out, on_error="stop")
    assert [shard.stat().st_mtime_ns for shard in shards] == stamps
    result = embed(root, out)
    assert (result.images, result.failed) == (250, 2)
    assert [entry.name for entry in tmp_path.glob(".*")] == []


def test_another_model_option_or_input_is_refused_with_the_reason(
    many: Path, embed: Embed, extractor: FeatureExtractor, model: Path, tmp_path: Path
) -> None:
    root, out = tmp_path / "images", tmp_path / "feats.npy"
    shutil.copytree(many, root, symlinks=True)
    with pytest.raises(InputError, match="stopped at this image"):
        embed(root, out, on_error="stop", shard_rows=1, batch_size=1)
    with pytest.raises(InputError, match=r"other settings.*batch_size was 1, now 16.*restart=True"):
        embed(root, out, shard_rows=1)
    one = FeatureExtractor.from_pretrained(model, threads=1)
    with list_inputs([root]) as inputs, pytest.raises(InputError, match="threads was 2, now 1"):
        embed_files(one, inputs, out, shard_rows=1, batch_size=1, quiet=True)
    other = FeatureExtractor.from_pretrained(threads=2, streams=2)
    with list_inputs([root]) as inputs, pytest.raises(InputError, match=f'model was .*, now "{built_in.NAME}'):
        embed_files(other, inputs, out, shard_rows=1, batch_size=1, quiet=True)
    (root / "0000.jpg").rename(root / "zzz.jpg")
    with pytest.raises(InputError, match="inputs_sha256 was"):
        embed(root, out, shard_rows=1, batch_size=1)
    for file in root.glob("0[1-9]*.jpg"):
        file.unlink()
    assert embed(root, out, restart=True).images == 100
    assert [entry.name for entry in tmp_path.glob(".*")] == []


STEPS = [(LocalFolder, "remove"), (NewOutput, "open"), (NewOutput, "open")]
STEPS += [(LocalFolder, "write"), (LocalFolder, "write"), *[(LocalFolder, "move")] * 3]
STEPS += [(LocalFolder, "delete"), (LocalFolder, "remove")]
"""A run makes a new folder, writes features, index, meta and the commit file, moves three files, and deletes."""


def kill_before(step: int, patch: pytest.MonkeyPatch) -> None:
    """Ends the process, as far as the files can tell, before step number `step` of `STEPS`."""
    seen: Counter[tuple[type, str]] = Counter()
    for owner, name in set(STEPS):
        call = getattr(owner, name)

        def counted(*args: Any, call: Any = call, key: Any = (owner, name), **kwargs: Any) -> Any:
            written = key != (LocalFolder, "write") or str(args[1]) in {"new-meta", "commit"}
            if written and key == STEPS[step] and seen[key] == STEPS[:step].count(key):
                raise KeyboardInterrupt
            seen[key] += written
            return call(*args, **kwargs)

        patch.setattr(owner, name, counted)


@pytest.mark.parametrize("append", [False, True])
def test_a_reader_sees_the_old_output_or_the_new_one_wherever_a_run_is_killed(
    append: bool, embed: Embed, example_files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, file in enumerate(example_files[:8]):
        folder = tmp_path / ("old" if number < 4 else "new")
        folder.mkdir(exist_ok=True)
        (folder / f"{number}.jpg").symlink_to(file)
    images = tmp_path / "new"
    (tmp_path / "start").mkdir()
    embed(tmp_path / "old", tmp_path / "start" / "feats.npy")
    old = values_of(tmp_path / "start" / "feats.npy")
    outputs = []
    for step in range(len(STEPS) + 1):
        place = tmp_path / f"at{step}" / "feats.npy"
        shutil.copytree(tmp_path / "start", place.parent)
        with monkeypatch.context() as patch:
            if step < len(STEPS):
                kill_before(step, patch)
                with pytest.raises(KeyboardInterrupt):
                    embed(images, place, append=append)
            else:
                embed(images, place, append=append)
        seen = values_of(place)
        if step < 5:
            assert seen == old, step
        elif step < len(STEPS):
            outputs.append(seen)
        embed(images, place, append=append)
        outputs.append(values_of(place))
        assert sorted(entry.name for entry in place.parent.iterdir()) == [
            "feats.index.jsonl", "feats.meta.json", "feats.npy",
        ]  # fmt: skip
    assert outputs == [outputs[-1]] * len(outputs)
    assert outputs[-1] != old


def values_of(place: Path) -> tuple[list[str], bytes]:
    features = open_features(str(place))
    return list(features.paths), features.values[:].tobytes()


def test_a_reader_beside_writers_never_sees_a_mixture(embed: Embed, example_files: list[Path], tmp_path: Path) -> None:
    """One thread replaces the output again and again; what is read belongs together each time."""
    out = tmp_path / "feats.npy"
    expected = {}
    for name, file in zip("ab", example_files, strict=False):
        (tmp_path / f"{name}.jpg").symlink_to(file)
        embed(tmp_path / f"{name}.jpg", out)
        expected[f"{name}.jpg"] = values_of(out)
    done = threading.Event()

    def write() -> None:
        for number in range(10):
            embed(tmp_path / f"{'ab'[number % 2]}.jpg", out)
        done.set()

    with ThreadPoolExecutor() as pool:
        writer = pool.submit(write)
        while not done.is_set() and not writer.done():
            seen = values_of(out)
            assert seen == expected[seen[0][0]]
        writer.result()


@pytest.mark.parametrize("unfinished", [False, True])
def test_two_outputs_never_share_an_index(
    unfinished: bool, embed: Embed, example_files: list[Path], tmp_path: Path
) -> None:
    if unfinished:
        (tmp_path / "bad.jpg").write_bytes(b"junk")
        images = [example_files[0], tmp_path / "bad.jpg"]
        with list_inputs(images) as inputs, pytest.raises(InputError, match="stopped at this image"):
            extractor = FeatureExtractor.from_pretrained(threads=1)
            embed_files(extractor, inputs, tmp_path / "f.npy", on_error="stop", batch_size=1, shard_rows=1, quiet=True)
    else:
        embed(example_files[0], tmp_path / "f.npy")
    before = files_of(tmp_path)
    with pytest.raises(InputError, match=r"f.parquet: its index and meta files would be .*f.npy; choose another name"):
        embed(example_files[1], tmp_path / "f.parquet")
    assert files_of(tmp_path) == before


def test_images_in_a_parquet_file_of_the_same_stem_are_no_other_output(
    embed: Embed, example_files: list[Path], tmp_path: Path
) -> None:
    images = pyarrow.table({"image": [file.read_bytes() for file in example_files[:3]]})
    parquet.write_table(images, tmp_path / "f.parquet")
    for _ in range(2):
        assert embed(tmp_path / "f.parquet", tmp_path / "f.npy").images == 3


def test_two_processes_do_not_write_the_same_output(
    many: Path, model: Path, tmp_path: Path, embed: Embed, start: Start
) -> None:
    out = tmp_path / "feats.npy"
    options = ["--model", model, "--shard-rows", 2, "--batch-size", 1]
    first = start(list(map(str, ["embed", many, "--out", out, *options])))
    try:
        while not (tmp_path / ".feats.npy.shards" / "000000.jsonl").exists():
            assert first.poll() is None
        first.send_signal(signal.SIGSTOP)
        with pytest.raises(InputError, match="another process is writing it"):
            embed(many, out)
    finally:
        first.send_signal(signal.SIGCONT)
    _, said = first.communicate()
    assert first.returncode == 3, said


def test_append_adds_the_new_files_behind_the_old(many: Path, embed: Embed, tmp_path: Path) -> None:
    root, out = tmp_path / "images", tmp_path / "feats.npy"
    root.mkdir()
    for number in range(0, 100, 2):
        shutil.copy(many / f"{number:04}.jpg", root / f"{number:04}.jpg")
    embed(root, out)
    before = written(out)
    for number in range(1, 100, 2):
        shutil.copy(many / f"{number:04}.jpg", root / f"{number:04}.jpg")
    result = embed(root, out, append=True)
    assert (result.images, result.failed, result.known) == (100, 2, 50)
    features, index, meta = written(out)
    rows = [json.loads(line) for line in index.splitlines()]
    assert [row["row"] for row in rows] == list(range(100))
    assert [row["path"] for row in rows[50:]] == [f"{number:04}.jpg" for number in range(1, 100, 2)]
    assert index.startswith(before[1])
    assert features[128:].startswith(before[0][128:])  # behind the header
    assert (meta["images"], meta["failed"]) == (100, 2)
    # Once more: there is nothing to add, and nothing changes.
    assert embed(root, out, append=True).known == 100
    assert written(out) == (features, index, meta)


def test_an_append_to_an_output_that_changes_meanwhile_is_refused(
    embed: Embed, example_files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "feats.npy"
    embed(example_files[0], out)
    commit = NewOutput.commit

    def late(self: NewOutput, *args: Any, **kwargs: Any) -> None:
        meta = json.loads(out.with_suffix(".meta.json").read_text()) | {"timing": {}}
        out.with_suffix(".meta.json").write_text(json.dumps(meta))
        commit(self, *args, **kwargs)

    monkeypatch.setattr(NewOutput, "commit", late)
    with pytest.raises(InputError, match="another process has changed it; repeat the command"):
        embed(example_files[1], out, append=True)
    monkeypatch.undo()
    assert embed(example_files[1], out, append=True).images == 2


def test_append_refuses_what_it_cannot_add_to(
    many: Path, embed: Embed, extractor: FeatureExtractor, tmp_path: Path
) -> None:
    out = tmp_path / "feats.npy"
    with pytest.raises(InputError, match=r"append=True: .*feats.npy does not exist; run without `append` first"):
        embed(many, out, append=True)
    embed(many, out)
    other = FeatureExtractor.from_pretrained(threads=2, streams=2)
    with list_inputs([many]) as inputs, pytest.raises(InputError, match=r"was made with files .* use the same model"):
        embed_files(other, inputs, out, append=True, quiet=True)
    meta = out.with_suffix(".meta.json").read_text()
    out.with_suffix(".meta.json").write_text("{}")
    with pytest.raises(InputError, match="not what robustfeat embed writes"):
        embed(many, out, append=True)
    # Version 0.1 wrote no hashes: the files themselves are looked at.
    old = {key: value for key, value in json.loads(meta).items() if not key.endswith("_sha256")}
    out.with_suffix(".meta.json").write_text(json.dumps(old))
    features, index = np.load(out), out.with_suffix(".index.jsonl").read_bytes()
    for values in (features.astype(np.float64), features.astype(">f4"), np.asfortranarray(features), features[1:]):
        np.save(out, values)
        with pytest.raises(InputError, match="not the features that its meta file describes"):
            embed(many, out, append=True)
    np.save(out, features)
    lines = index.splitlines(keepends=True)
    for damaged in (lines[:-1], [*lines, lines[0]], [b"{}\n", *lines[1:]], [b"\xff\n", *lines[1:]]):
        out.with_suffix(".index.jsonl").write_bytes(b"".join(damaged))
        with pytest.raises(InputError, match=r"feats.index.jsonl: "):
            embed(many, out, append=True)
    out.with_suffix(".index.jsonl").write_bytes(index)
    assert embed(many, out, append=True).known == 250


def test_features_of_another_model_are_not_replaced_unasked(
    many: Path, embed: Embed, extractor: FeatureExtractor, tmp_path: Path
) -> None:
    out = tmp_path / "feats.npy"
    embed(many, out)
    other = FeatureExtractor.from_pretrained(threads=2, streams=2)
    before = files_of(tmp_path)
    names = f"the model {extractor.config.name} .*; this run uses {other.config.name} .*; use another `out`"
    with list_inputs([many]) as inputs, pytest.raises(InputError, match=names):
        embed_files(other, inputs, out, quiet=True)
    assert files_of(tmp_path) == before
    with list_inputs([many]) as inputs:
        assert embed_files(other, inputs, out, restart=True, quiet=True).feature_size == other.feature_size
    # Another precision is another way to run the same model.
    fast = FeatureExtractor.from_pretrained(precision="int8", threads=2, streams=2)
    with list_inputs([many]) as inputs:
        assert embed_files(fast, inputs, out, quiet=True).images == 250


@pytest.mark.parametrize("job", [b"", b"junk", b"[]", b"[" * 100_000, b"\xff"])
def test_a_damaged_folder_of_an_unfinished_run_is_said(
    job: bytes, embed: Embed, example_files: list[Path], tmp_path: Path
) -> None:
    out, shards = tmp_path / "f.npy", tmp_path / ".f.npy.shards"
    shards.mkdir()
    (shards / "job.json").write_bytes(job)
    (shards / "odd.jsonl").write_bytes(b"")
    with pytest.raises(InputError, match=r"f\.npy: an unfinished run is there, and its job\.json is damaged; pass"):
        embed(example_files[0], out)
    assert embed(example_files[0], out, restart=True).images == 1
    assert not shards.exists()
