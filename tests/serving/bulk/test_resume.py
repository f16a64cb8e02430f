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
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from robustfeat import FeatureExtractor
from robustfeat.errors import InputError
from robustfeat.serving.bulk.embedding import EmbeddingResult, embed_files
from robustfeat.serving.inputs.listing import list_inputs

Embed = Callable[..., EmbeddingResult]


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory, example_files: list[Path]) -> Path:
    """700 images of which every 50th is broken."""
    root = tmp_path_factory.mktemp("many")
    for number in range(700):
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
        options = {"batch_size": 16, "shard_rows": 48, "quiet": True, **options}
        with list_inputs([root]) as inputs:
            return embed_files(extractor, inputs, out, **options)

    return call


@pytest.fixture(scope="module")
def unbroken(many: Path, embed: Embed, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("unbroken") / "feats.npy"
    result = embed(many, out)
    assert (result.images, result.failed) == (700, 14)
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
    options = ["--model", model, "--batch-size", "16", "--shard-rows", "48", "--threads", "2"]
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
        kept += "going on" in said
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
    for number in range(7, 350, 50):
        (root / f"{number:04}.jpg").unlink()
        (root / f"{number:04}.jpg").symlink_to(root / "0000.jpg")
    with pytest.raises(InputError, match=r"0357.jpg: .* \(row 357\); stopped, as asked"):
        embed(root, out, on_error="stop")
    shards = sorted((tmp_path / ".feats.npy.shards").glob("*.jsonl"))
    assert len(shards) == 357 // 48
    stamps = [shard.stat().st_mtime_ns for shard in shards]
    assert not out.exists()
    with pytest.raises(InputError, match=r"0357.jpg"):
        embed(root, out, on_error="stop")
    assert [shard.stat().st_mtime_ns for shard in shards] == stamps
    result = embed(root, out)
    assert (result.images, result.failed) == (700, 7)
    assert [entry.name for entry in tmp_path.glob(".*")] == []


def test_another_model_option_or_input_is_refused_with_the_reason(
    many: Path, embed: Embed, extractor: FeatureExtractor, model: Path, tmp_path: Path
) -> None:
    root, out = tmp_path / "images", tmp_path / "feats.npy"
    shutil.copytree(many, root, symlinks=True)
    with pytest.raises(InputError, match="stopped, as asked"):
        embed(root, out, on_error="stop", shard_rows=1, batch_size=1)
    with pytest.raises(InputError, match=r"other settings.*batch_size was 1, now 16.*restart=True"):
        embed(root, out, shard_rows=1)
    one = FeatureExtractor.from_pretrained(model, threads=1)
    with list_inputs([root]) as inputs, pytest.raises(InputError, match="threads was 2, now 1"):
        embed_files(one, inputs, out, shard_rows=1, batch_size=1, quiet=True)
    other = FeatureExtractor.from_pretrained(threads=2, streams=2)
    with list_inputs([root]) as inputs, pytest.raises(InputError, match=r'model was .*, now "robustfeat-resnet18-tiny'):
        embed_files(other, inputs, out, shard_rows=1, batch_size=1, quiet=True)
    (root / "0000.jpg").rename(root / "zzz.jpg")
    with pytest.raises(InputError, match="inputs_sha256 was"):
        embed(root, out, shard_rows=1, batch_size=1)
    for file in root.glob("0[1-9]*.jpg"):
        file.unlink()
    assert embed(root, out, restart=True).images == 100
    assert [entry.name for entry in tmp_path.glob(".*")] == []


def test_a_run_killed_while_it_joins_its_shards_ends_the_same(
    many: Path, embed: Embed, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between any two of the three files, and before the shards are deleted."""
    from robustfeat.serving.bulk import shards
    from robustfeat.serving.bulk.storage import open_output

    out = tmp_path / "feats.npy"
    for suffix in ("feats.npy", "feats.index.jsonl", "feats.meta.json"):

        def failing(place: str, suffix: str = suffix) -> Any:
            if place.endswith(suffix):
                raise KeyboardInterrupt
            return open_output(place)

        with monkeypatch.context() as patch:
            patch.setattr(shards, "open_output", failing)
            patch.setattr("robustfeat.serving.bulk.formats.open_output", failing)
            with pytest.raises(KeyboardInterrupt):
                embed(many, out)
        assert (tmp_path / ".feats.npy.shards").is_dir()
    embed(many, out)
    assert written(out) == written(unbroken)


def test_two_processes_do_not_write_the_same_output(many: Path, model: Path, tmp_path: Path, embed: Embed) -> None:
    out = tmp_path / "feats.npy"
    command = [sys.executable, "-m", "robustfeat", "embed", many, "--out", out, "--model", model, "--shard-rows", "16"]
    first = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE)
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


@pytest.mark.parametrize(
    "suffix",
    [".npy", pytest.param(".safetensors", marks=pytest.mark.slow), pytest.param(".parquet", marks=pytest.mark.slow)],
)
def test_an_append_that_is_killed_anywhere_goes_on(
    many: Path, embed: Embed, tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from robustfeat.serving.bulk.storage import open_output

    small = tmp_path / "small"
    small.mkdir()
    for number in range(60):
        (small / f"{number:04}.jpg").symlink_to(many / f"{number:04}.jpg")
    killed, whole = (tmp_path / f"{name}{suffix}" for name in ("killed", "whole"))
    for out in (killed, whole):
        embed(small, out)
    assert embed(many, whole, append=True).images == 700
    for ending in (suffix, ".index.jsonl", ".meta.json"):

        def failing(place: str, ending: str = ending) -> Any:
            if place.endswith(ending):
                raise KeyboardInterrupt
            return open_output(place)

        with monkeypatch.context() as patch:
            patch.setattr("robustfeat.serving.bulk.shards.open_output", failing)
            patch.setattr("robustfeat.serving.bulk.formats.open_output", failing)
            with pytest.raises(KeyboardInterrupt):
                embed(many, killed, append=True)
    embed(many, killed, append=True)
    assert written(killed) == written(whole)
    assert [entry.name for entry in tmp_path.glob(".*")] == []


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
    out.with_suffix(".meta.json").write_text("{}")
    with pytest.raises(InputError, match="is not what robustfeat embed writes"):
        embed(many, out, append=True)
