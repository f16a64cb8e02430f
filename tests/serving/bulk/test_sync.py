"""`sync` leaves the output that embedding all inputs anew would leave, and embeds only what it must."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from robustfeat import FeatureExtractor
from robustfeat.errors import InputError
from robustfeat.serving.bulk.commits import NewOutput
from robustfeat.serving.bulk.embedding import embed_files
from robustfeat.serving.bulk.shards import write_shards
from robustfeat.serving.heads.features import open_features
from robustfeat.serving.inputs.listing import list_inputs
from tests.serving.bulk.conftest import Embed, fill_disk_after


@pytest.fixture
def folder(example_files: list[Path], tmp_path: Path) -> Path:
    """Ten photographs, two of them the same, and a file that is none."""
    root = tmp_path / "images"
    root.mkdir()
    for number in range(9):
        shutil.copy(example_files[number], root / f"{number}.jpg")
    shutil.copy(example_files[0], root / "zero again.jpg")
    (root / "broken.jpg").write_bytes(b"\xff\xd8\xff junk")
    return root


def change(root: Path, example_files: list[Path]) -> None:
    """One file vanishes, one changes, two change places, one moves, two are new and one of these fails."""
    (root / "0.jpg").unlink()
    shutil.copy(example_files[20], root / "1.jpg")
    (root / "2.jpg").rename(root / "x")
    (root / "3.jpg").rename(root / "2.jpg")
    (root / "x").rename(root / "3.jpg")
    (root / "deep").mkdir()
    (root / "4.jpg").rename(root / "deep" / "renamed.jpg")
    shutil.copy(example_files[21], root / "new.jpg")
    (root / "new and broken.jpg").write_bytes(b"")


def contents(out: Path) -> tuple[np.ndarray, bytes, dict[str, Any]]:
    features = np.array(open_features(str(out)).values)
    meta = json.loads(out.with_suffix(".meta.json").read_text())
    decided = ("timing", "features_sha256", "inputs_sha256")  # last bits depend on an image's neighbours in a batch
    return features, out.with_suffix(".index.jsonl").read_bytes(), {k: v for k, v in meta.items() if k not in decided}


@pytest.mark.parametrize("suffix", [".npy", ".safetensors", ".parquet"])
def test_a_synced_output_is_the_one_of_a_fresh_run(
    suffix: str, folder: Path, embed: Embed, example_files: list[Path], tmp_path: Path
) -> None:
    out, fresh = tmp_path / f"feats{suffix}", tmp_path / f"fresh{suffix}"
    first = embed(folder, out, sync=True)
    assert (first.images, first.failed, first.known) == (11, 1, 0)  # nothing was there yet
    change(folder, example_files)
    result = embed(folder, out, sync=True)
    # Ten good images before: one vanished and one changed. The broken one is tried again.
    assert (result.images, result.failed, result.known) == (12, 2, 8)
    embed(folder, fresh)
    synced, anew = contents(out), contents(fresh)
    np.testing.assert_allclose(synced[0], anew[0], atol=2e-6)
    assert synced[1:] == anew[1:]


def test_only_new_bytes_are_embedded(
    folder: Path, embed: Embed, example_files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "feats.npy"
    seen: list[str] = []
    embed(folder, out)
    change(folder, example_files)

    def watched(pipeline: Any, inputs: Any, *args: Any, **options: Any) -> Any:
        seen.extend(image.path for image in inputs)
        return write_shards(pipeline, inputs, *args, **options)

    monkeypatch.setattr("robustfeat.serving.bulk.embedding.write_shards", watched)
    embed(folder, out, sync=True)
    assert seen == ["1.jpg", "broken.jpg", "new and broken.jpg", "new.jpg"]


def test_an_output_in_step_is_not_written_again(folder: Path, embed: Embed, tmp_path: Path) -> None:
    out = tmp_path / "feats.npy"
    (folder / "broken.jpg").unlink()
    embed(folder, out)
    files = [out, out.with_suffix(".index.jsonl"), out.with_suffix(".meta.json")]
    stamps = [file.stat().st_mtime_ns for file in files]
    result = embed(folder, out, sync=True)
    assert (result.images, result.known) == (10, 10)
    assert [file.stat().st_mtime_ns for file in files] == stamps
    (folder / "0.jpg").rename(folder / "renamed.jpg")  # no image is new, and the index still changes
    assert embed(folder, out, sync=True).known == 10
    assert "renamed.jpg" in out.with_suffix(".index.jsonl").read_text()
    assert sorted(entry.name for entry in tmp_path.glob("*feats*")) == sorted(file.name for file in files)


def test_a_sync_that_was_stopped_resumes(folder: Path, embed: Embed, example_files: list[Path], tmp_path: Path) -> None:
    out, other = tmp_path / "feats.npy", tmp_path / "other.npy"
    for place in (out, other):
        embed(folder, place)
    change(folder, example_files)
    before = contents(out)
    with pytest.raises(InputError, match="stopped at this image"):
        embed(folder, out, sync=True, batch_size=1, shard_rows=1, on_error="stop")
    np.testing.assert_array_equal(contents(out)[0], before[0])  # the old output stays until the new one is whole
    assert len(list((tmp_path / ".feats.npy.shards").glob("*.jsonl"))) == 1
    with pytest.raises(InputError, match="first_row was 0, now 11"):
        embed(folder, out, append=True, batch_size=1, shard_rows=1)
    for place in (out, other):
        embed(folder, place, sync=True, batch_size=1, shard_rows=1)
    assert out.read_bytes() == other.read_bytes()
    assert contents(out)[1:] == contents(other)[1:]
    assert not list(tmp_path.glob(".*"))


def test_members_of_archives_and_rows_of_parquet_stay_in_step(
    embed: Embed, example_files: list[Path], tmp_path: Path
) -> None:
    def images(numbers: range) -> list[bytes]:
        return [example_files[number].read_bytes() for number in numbers]

    def tar(place: Path, numbers: range) -> None:
        with tarfile.open(place, "w") as archive:
            for number, data in zip(numbers, images(numbers), strict=True):
                member = tarfile.TarInfo(f"{number}.jpg")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))

    def table(place: Path, numbers: range) -> None:
        parquet.write_table(pyarrow.table({"image": images(numbers)}), place)

    for write, name in ((tar, "a.tar"), (table, "a.parquet")):
        place, out, fresh = tmp_path / name, tmp_path / f"{name}.npy", tmp_path / f"{name}.fresh.npy"
        write(place, range(8))
        embed(place, out)
        write(place, range(3, 10))
        assert embed(place, out, sync=True).known == 5
        embed(place, fresh)
        np.testing.assert_allclose(np.load(out), np.load(fresh), atol=2e-6)
        assert contents(out)[1:] == contents(fresh)[1:]


def test_all_images_may_vanish_and_return(folder: Path, embed: Embed, tmp_path: Path) -> None:
    out, away = tmp_path / "feats.npy", tmp_path / "away"
    embed(folder, out)
    folder.rename(away)
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "only.png")
    result = embed(folder, out, sync=True)
    assert (result.images, result.known) == (1, 0)
    (folder / "only.png").unlink()
    folder.rmdir()
    away.rename(folder)
    assert embed(folder, out, sync=True).images == 11


def test_what_cannot_be_synced_is_refused_and_kept(
    folder: Path, embed: Embed, example_files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "feats.npy"
    embed(folder, out)
    with pytest.raises(InputError, match="append=True: excludes `sync`; choose one of them"):
        embed(folder, out, append=True, sync=True)
    other = FeatureExtractor.from_pretrained(threads=2, streams=2)
    with list_inputs([folder]) as inputs, pytest.raises(InputError, match=r"sync=True: .* use the same model"):
        embed_files(other, inputs, out, sync=True, quiet=True)
    # A hash that is none is no reason to stop: the image is embedded again.
    index, meta = out.with_suffix(".index.jsonl"), out.with_suffix(".meta.json")
    records = [json.loads(line) for line in index.read_text().splitlines()]
    records[2]["sha256"], records[3]["sha256"] = "xy", 7
    index.write_text("".join(json.dumps(record) + "\n" for record in records))
    meta.write_text(json.dumps({k: v for k, v in json.loads(meta.read_text()).items() if not k.endswith("_sha256")}))
    assert embed(folder, out, sync=True).known == 8
    shutil.copy(example_files[30], folder / "new.jpg")
    commit = NewOutput.commit

    def late(self: NewOutput, *args: Any, **options: Any) -> None:
        meta.write_text(json.dumps(json.loads(meta.read_text()) | {"timing": {}}))
        commit(self, *args, **options)

    monkeypatch.setattr(NewOutput, "commit", late)
    with pytest.raises(InputError, match="another process has changed it; repeat the command"):
        embed(folder, out, sync=True)


@pytest.mark.parametrize("moved", [0, 1, 2])
@pytest.mark.parametrize("new", [False, True])
def test_synced_files_that_cannot_be_moved_are_kept_and_moved_by_the_next_command(
    moved: int,
    new: bool,
    folder: Path,
    embed: Embed,
    example_files: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without a new image, the run has no shard that would be a reason to keep its folder."""
    out, fresh = tmp_path / "feats.npy", tmp_path / "fresh.npy"
    (folder / "broken.jpg").unlink()  # it would be tried again each time
    embed(folder, out)
    (folder / "0.jpg").unlink()
    if new:
        shutil.copy(example_files[30], folder / "new.jpg")
    embed(folder, fresh)
    with monkeypatch.context() as patch:
        fill_disk_after(moved, patch)
        with pytest.raises(InputError, match=r"cannot be written \(No space left on device\).*repeat the command"):
            embed(folder, out, sync=True)
    if moved:
        np.testing.assert_allclose(open_features(str(out)).values, open_features(str(fresh)).values, atol=2e-6)
    result = embed(folder, out, sync=True)
    assert (result.images, result.known) == (9 + new, 9 + new)  # nothing was left to do
    synced, anew = contents(out), contents(fresh)
    np.testing.assert_allclose(synced[0], anew[0], atol=2e-6)
    assert synced[1:] == anew[1:]
    assert not [file.name for file in tmp_path.iterdir() if file.name.startswith(".")]
