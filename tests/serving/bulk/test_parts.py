"""Parts of a run, embedded by processes of their own, join to the bytes of a run that was not parted."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from robustfeat import FeatureExtractor
from robustfeat.errors import InputError
from robustfeat.serving.bulk.embedding import embed_files
from robustfeat.serving.bulk.joining import join_parts
from robustfeat.serving.bulk.parts import Part
from robustfeat.serving.heads.features import open_features
from robustfeat.serving.inputs.listing import list_inputs
from tests.serving.bulk.conftest import Embed, fill_disk_after


@pytest.fixture(scope="module")
def parted(folder: Path, embed: Embed, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three parts."""
    root = tmp_path_factory.mktemp("parted")
    places = [root / f"part-{number}.npy" for number in (1, 2, 3)]
    for number, place in enumerate(places, 1):
        embed(folder, place, part=Part(number, 3))
    return places


def written(out: Path) -> tuple[bytes, bytes, dict[str, Any]]:
    meta = json.loads(out.with_suffix(".meta.json").read_text())
    del meta["timing"]
    return out.read_bytes(), out.with_suffix(".index.jsonl").read_bytes(), meta


def test_every_row_is_in_one_part() -> None:
    for inputs, shard_rows, of in itertools.product((0, 1, 4, 5, 30, 1000), (1, 4, 64), (1, 2, 3, 7, 40)):
        rows = [Part(number, of).rows(inputs, shard_rows) for number in range(1, of + 1)]
        assert list(itertools.chain(*rows)) == list(range(inputs))
        assert all(part.start % shard_rows == 0 for part in rows if part)
        shards = [-(-len(part) // shard_rows) for part in rows]
        assert max(shards) - min(shards) <= 1


@pytest.mark.parametrize("suffix", [".npy", ".safetensors", ".parquet"])
@pytest.mark.parametrize("of", [1, 3, 12])  # of 12, four are empty
def test_joined_parts_are_the_whole_run(suffix: str, of: int, folder: Path, embed: Embed, tmp_path: Path) -> None:
    whole, joined = tmp_path / f"whole{suffix}", tmp_path / f"joined{suffix}"
    embed(folder, whole)
    parts = [tmp_path / f"part-{number}.npy" for number in range(1, of + 1)]
    for number, place in enumerate(parts, 1):
        embed(folder, place, part=Part(number, of))
    random.Random(0).shuffle(parts)
    result = join_parts([str(place) for place in parts], str(joined), quiet=True)
    assert (result.images, result.failed, result.skipped) == (30, 2, 1)
    assert written(joined) == written(whole)
    assert not list(tmp_path.glob(".*"))


def test_a_part_is_an_output_of_its_own(folder: Path, embed: Embed, parted: list[Path], tmp_path: Path) -> None:
    _, index, meta = written(parted[1])
    assert [json.loads(line)["row"] for line in index.splitlines()] == list(range(12))
    assert (meta["part"]["number"], meta["part"]["of"], meta["part"]["first_row"]) == (2, 3, 8)
    # Only as this part is its run resumed.
    out = tmp_path / "part.npy"
    with pytest.raises(InputError, match=r"05.jpg: .*stopped at this image"):
        embed(folder, out, part=Part(1, 3), on_error="stop")
    with pytest.raises(InputError, match=r"an unfinished run is there with other settings .*part was"):
        embed(folder, out, part=Part(2, 3))
    assert embed(folder, out, part=Part(1, 3)).images == 8
    assert written(out) == written(parted[0])


def test_what_does_not_join_is_one_line(
    folder: Path, embed: Embed, parted: list[Path], example_files: list[Path], model: Path, tmp_path: Path
) -> None:
    out, other, whole = tmp_path / "out.npy", tmp_path / "other.npy", tmp_path / "whole.npy"
    one, two, three = map(str, parted)

    def refused(places: list[str], message: str) -> None:
        with pytest.raises(InputError, match=message):
            join_parts(places, str(out), quiet=True)
        assert not list(tmp_path.glob("*out.*"))

    refused([], "got none; name all parts")
    refused([one, three], "part 2 of 3 is missing; name each part once")
    refused([one], r"part 2 of 3 is missing \(also 3\)")
    refused([one, two, three, two], "part 2 of 3 is given twice")
    refused([one, two, two], "part 3 of 3 is missing, and part 2 of 3 is given twice; name each part once")
    refused([two, two, two], r"part 1 of 3 is missing \(also 3\), and part 2 of 3 is given twice")
    embed(folder, whole)
    refused([one, str(whole), three], "whole.npy: not a part of a run")
    refused([one, str(tmp_path / "no.npy")], "no.meta.json: no such file")
    embed(folder, other, part=Part(2, 4))
    refused([one, str(other), three], "parts of different runs: of is 3 and 4")
    grown = Path(shutil.copytree(folder, tmp_path / "grown"))
    shutil.copy(example_files[0], grown / "30.jpg")
    embed(grown, other, part=Part(2, 3))
    refused([one, str(other), three], r"different runs: inputs is 30 and 31; list the inputs once")
    with list_inputs([folder]) as inputs:
        scaled = FeatureExtractor.from_pretrained(threads=2, streams=2)
        embed_files(scaled, inputs, other, part=Part(2, 3), shard_rows=4, batch_size=4, restart=True, quiet=True)
    refused([one, str(other), three], r"differ in \w+: .*with the same model and options")
    limited = FeatureExtractor.from_pretrained(model, threads=2, streams=2, max_pixels=1_000_000)
    with list_inputs([folder]) as inputs:
        embed_files(limited, inputs, other, part=Part(2, 3), shard_rows=4, batch_size=4, restart=True, quiet=True)
    refused([one, str(other), three], r"differ in max_pixels: 100000000 and 1000000; embed one of them again")
    damaged = [Path(shutil.copy(file, tmp_path)) for file in parted[1].parent.glob("part-2.*")]
    next(file for file in damaged if file.suffix == ".npy").write_bytes(b"junk")
    refused([one, str(tmp_path / "part-2.npy"), three], "part-2.npy: the sha256 must be .* do not belong together")
    for place in (parted[1], parted[1].with_suffix(".parquet"), parted[1].parent / "x" / ".." / "part-2.npy"):
        (parted[1].parent / "x").mkdir(exist_ok=True)
        with pytest.raises(InputError, match="is also a part, or shares its index; choose another name"):
            join_parts([one, two, three], str(place), quiet=True)
    with list_inputs([example_files[0]]) as inputs:
        embed_files(scaled, inputs, whole, restart=True, quiet=True)
    with pytest.raises(InputError, match=r"whole.npy: has features of the model .*, but the parts of"):
        join_parts([one, two, three], str(whole), quiet=True)
    with pytest.raises(InputError, match="excludes `part`; choose one of them"):
        embed(folder, out, part=Part(1, 3), append=True)


@pytest.mark.parametrize("moved", [0, 1, 2])
def test_joined_files_that_cannot_be_moved_are_kept_and_moved_by_the_next_command(
    moved: int, folder: Path, embed: Embed, parted: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out, parts = tmp_path / "whole.npy", tmp_path / "out.npy", [str(part) for part in parted]
    embed(folder, whole)
    with monkeypatch.context() as patch:
        fill_disk_after(moved, patch)
        said = "cannot be written .*No space left.*; free space or restore the permissions, then repeat the command"
        with pytest.raises(InputError, match=said):
            join_parts(parts, str(out), quiet=True)
        if moved:  # the meta file is in its place, so the output can be read already
            np.testing.assert_array_equal(open_features(str(out)).values, open_features(str(whole)).values)
        with pytest.raises(InputError, match=said):
            join_parts(parts, str(out), quiet=True)
    join_parts(parts, str(out), quiet=True)
    assert written(out) == written(whole)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("text", ["", "3", "0/3", "4/3", "1/0", "-1/3", "1/3/5", "a/b", "1 / 3", "\u0661/\u0663"])
def test_only_parts_that_exist_are_read(text: str) -> None:
    with pytest.raises(ValueError, match="expected I/N with I from 1 to N, such as 3/7"):
        Part.parse(text)
    assert str(Part.parse("3/7")) == "3/7"


def shards_of(out: Path) -> int:
    """Of the unfinished run."""
    return len(list((out.parent / f".{out.name}.shards").glob("*.jsonl")))


@pytest.mark.slow
def test_seven_processes_killed_at_random_join_to_the_bytes_of_one(
    example_files: list[Path], model: Path, tmp_path: Path
) -> None:
    root = tmp_path / "images"
    root.mkdir()
    for number in range(700):
        (root / f"{number:04}.jpg").symlink_to(example_files[number % len(example_files)])
    (root / "0007.jpg").unlink()
    (root / "0007.jpg").write_bytes(b"junk")
    base = [sys.executable, "-m", "robustfeat", "embed", str(root), "--model", str(model), "--threads", "1"]
    base += ["--batch-size", "8", "--shard-rows", "8", "--workers", "1", "--quiet"]
    whole, joined, draw = tmp_path / "whole.npy", tmp_path / "joined.npy", random.Random(0)
    assert subprocess.run([*base, "--out", str(whole)], check=False).returncode == 3
    parts = [tmp_path / f"part-{number}.npy" for number in range(1, 8)]
    kills, left = Counter[int](), set(range(1, 8))
    while left:
        running = {}
        for number in left:
            part = [*base, "--out", str(parts[number - 1]), "--part", f"{number}/7"]
            # Start-up takes most of so short a run: the moment is drawn from the shards that it writes.
            wanted = shards_of(parts[number - 1]) + draw.randint(1, 4)
            running[number] = subprocess.Popen(part, start_new_session=True), wanted
        while running:
            time.sleep(0.001)
            for number, (process, wanted) in list(running.items()):
                if process.poll() is not None:
                    assert process.returncode in {0, 3}
                    left.discard(number)
                    del running[number]
                elif kills[number] < 3 and shards_of(parts[number - 1]) >= wanted:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                    kills[number] += 1
                    del running[number]
    assert kills.total() >= 14
    command = [sys.executable, "-m", "robustfeat", "join", *map(str, parts), "--out", str(joined), "--quiet"]
    assert subprocess.run(command, check=False).returncode == 3
    assert written(joined) == written(whole)
