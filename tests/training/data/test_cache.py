"""The decoded cache, and batches cropped at once: against Pillow and against batches that decode."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from robustfeat.errors import DataError, InputError
from robustfeat.system import available_memory
from robustfeat.training.data import cache as cache_module
from robustfeat.training.data.batches import EpochPlan, TrainingBatches, load_batches
from robustfeat.training.data.cache import CachedSet, build_cache, cached_batches, require_room
from robustfeat.training.data.crops import crop_boxes, crop_squares
from robustfeat.training.data.image_set import ImageSet
from robustfeat.training.data.opening import open_training_data

CPU = torch.device("cpu")


@pytest.mark.parametrize(("size", "side"), [(64, 64), (64, 48), (100, 64), (40, 64)])
def test_crops_of_a_batch_are_pillows(size: int, side: int, examples: Path) -> None:
    photographs = [
        np.asarray(Image.open(f).convert("RGB").resize((size, size))) for f in sorted(examples.rglob("*.jpg"))
    ]
    rng = np.random.default_rng(0)
    boxes = crop_boxes(rng.random((40, 4)), np.full((40, 2), size), 0.08)
    flips = rng.random(40) < 0.5
    ours = crop_squares(
        torch.from_numpy(np.stack(photographs)), torch.from_numpy(boxes / size), torch.from_numpy(flips), side
    )
    worst = []
    for row, (photograph, (left, top, w, h)) in enumerate(zip(photographs, boxes, strict=True)):
        image = Image.fromarray(photograph)
        square = np.asarray(image.resize((side, side), Image.Resampling.BILINEAR, (left, top, left + w, top + h)))
        expected = square[:, ::-1] if flips[row] else square
        worst.append(np.abs(ours[row].permute(1, 2, 0).numpy() - expected.astype(float)))
    assert np.max(worst) <= 1
    assert np.mean(np.stack(worst) > 0) < 0.02


def test_boxes_keep_to_area_ratio_and_image() -> None:
    rng = np.random.default_rng(1)
    sizes = rng.integers(50, 500, (2000, 2))
    left, top, w, h = crop_boxes(rng.random((2000, 4)), sizes, 0.25).T
    assert (left >= 0).all()
    assert (top >= 0).all()
    assert (left + w <= sizes[:, 0] + 1e-9).all()
    assert (top + h <= sizes[:, 1] + 1e-9).all()
    area = w * h / sizes.prod(1)
    uncut = (w < sizes[:, 0]) & (h < sizes[:, 1])
    assert (area[uncut] >= 0.25 - 1e-9).all()
    assert (area <= 1 + 1e-9).all()
    assert ((w / h)[uncut] >= 0.75 - 1e-9).all()
    assert ((w / h)[uncut] <= 4 / 3 + 1e-9).all()


def batches(data: ImageSet, side: int = 24, epoch: int = 0) -> TrainingBatches:
    return TrainingBatches(data, side, EpochPlan(data, 6, seed=1, epoch=epoch))


@pytest.fixture
def train(dataset: Path) -> ImageSet:
    """30 images of 40 px."""
    return open_training_data(dataset)[0]


@pytest.mark.parametrize("kind", ["ram", "file"])
def test_a_cache_at_the_images_own_size_gives_the_batches_that_decoding_gives(
    train: ImageSet, tmp_path: Path, kind: str
) -> None:
    cached = build_cache(train, 40, "ram" if kind == "ram" else str(tmp_path / "c"), device=CPU, quiet=True)
    assert cached.fingerprint == train.fingerprint
    for ours, decoded in zip(load_batches(batches(cached), 1), load_batches(batches(train), 0), strict=True):
        assert torch.equal(ours.images, decoded.images)
        assert torch.equal(ours.labels, decoded.labels)


def test_whole_squares_are_cropped_to_the_same_batches(train: ImageSet) -> None:
    """The way of a GPU, on the CPU: squares and boxes instead of crops."""
    cached = build_cache(train, 40, "ram", device=CPU, quiet=True)
    plan = batches(cached).plan
    for ours, decoded in zip(cached_batches(cached, plan, range(5), CPU), load_batches(batches(train), 0), strict=True):
        assert torch.equal(ours.labels, decoded.labels)
        difference = (ours.pixels(CPU, 24) - decoded.images).abs()
        assert float(difference.max()) <= 1
        assert float((difference > 0).float().mean()) < 0.02


def test_a_cache_keeps_the_proportions_of_wide_images(tmp_path: Path) -> None:
    """A disc in an image of 120 x 60 is a disc in the crops, though the cache holds a square."""
    root = tmp_path / "train" / "a"
    root.mkdir(parents=True)
    y, x = np.mgrid[:60, :120]
    disc = (((x - 60) ** 2 + (y - 30) ** 2) < 20**2).astype(np.uint8)[..., None] * np.full(3, 255, np.uint8)
    for number in range(6):
        Image.fromarray(disc).save(root / f"{number}.png")
    shutil.copytree(tmp_path / "train", tmp_path / "val")
    train = open_training_data(tmp_path)[0]
    cached = build_cache(train, 64, "ram", device=CPU, quiet=True)
    assert cached.original_sizes(np.array([0])).tolist() == [[120, 60]]
    arguments = {"seed": 0, "epoch": 0, "min_crop_area": 0.45}
    decoded = TrainingBatches(train, 32, EpochPlan(train, 6, **arguments))[0].images.float()  # type: ignore[arg-type]
    ours = TrainingBatches(cached, 32, EpochPlan(cached, 6, **arguments))[0].images.float()  # type: ignore[arg-type]
    assert float((decoded - ours).abs().mean()) < 6
    whole = next(cached_batches(cached, EpochPlan(cached, 6, **arguments), range(1), CPU))  # type: ignore[arg-type]
    assert float((decoded - whole.pixels(CPU, 32)).abs().mean()) < 6


def test_bad_images_are_left_out_by_name_from_the_cache_too(dataset: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(dataset, tmp_path / "data"))
    victim = next((root / "train" / "hat").iterdir())
    victim.write_bytes(b"junk")
    train = open_training_data(root)[0]
    for place in ("ram", str(tmp_path / "cache"), str(tmp_path / "cache")):
        cached = build_cache(train, 40, place, device=CPU, quiet=True)
        assert len(cached.bad) == 1
        plain = [batch for batch in load_batches(batches(cached), 0) if batch.failures]
        whole = [b for b in cached_batches(cached, batches(cached).plan, range(5), CPU) if b.failures]
        assert len(plain) == len(whole) == 1
        assert plain[0].failures == whole[0].failures
        assert plain[0].failures[0].startswith(f"hat/{victim.name}: ")
        assert len(plain[0].labels) == len(whole[0].labels) == len(whole[0].images) == 5


def test_a_file_that_a_kill_left_half_filled_is_filled_up(
    train: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten of thirty images were there: they are kept, not decoded again."""
    monkeypatch.setattr(cache_module, "_BLOCK_BYTES", 0)  # 16 rows a block
    whole = build_cache(train, 40, "ram", device=CPU, quiet=True)

    class KilledError(Exception):
        pass

    blocks = cache_module._decode

    def one_block(*arguments: Any) -> Iterator[Any]:
        yield from islice(blocks(*arguments), 1)
        raise KilledError

    monkeypatch.setattr(cache_module, "_decode", one_block)
    with pytest.raises(KilledError):
        build_cache(train, 40, str(tmp_path), device=CPU, quiet=True)
    state = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert state["done"] == 16
    asked = []

    def recorded(*arguments: Any) -> Iterator[Any]:
        asked.append(arguments[3])
        return blocks(*arguments)

    monkeypatch.setattr(cache_module, "_decode", recorded)
    cached = build_cache(train, 40, str(tmp_path), device=CPU, quiet=True)
    assert asked == [16]
    assert torch.equal(cached.squares, whole.squares)
    np.testing.assert_array_equal(cached.sizes, whole.sizes)
    build_cache(train, 40, str(tmp_path), device=CPU, quiet=True)
    assert asked == [16], "a full one is used as it is"


def test_a_kill_right_after_the_file_was_made_again_leaves_no_black_images(
    train: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = build_cache(train, 40, str(tmp_path), device=CPU, quiet=True)
    next(tmp_path.glob("*.u8")).unlink()
    decode = cache_module._decode
    monkeypatch.setattr(cache_module, "_decode", lambda *arguments: iter(()))  # as if it had been killed there
    build_cache(train, 40, str(tmp_path), device=CPU, quiet=True)
    monkeypatch.setattr(cache_module, "_decode", decode)
    assert torch.equal(build_cache(train, 40, str(tmp_path), device=CPU, quiet=True).squares, whole.squares)


@pytest.mark.parametrize(
    "change",
    [
        {"done": "abc"},
        {"done": None},
        {"done": 29.5},
        {"done": -5},
        {"done": 31},
        {"bad": []},
        {"bad": {"99": "x"}},
        None,
    ],
)
def test_a_damaged_cache_is_filled_again(train: ImageSet, tmp_path: Path, change: dict[str, object] | None) -> None:
    whole = build_cache(train, 40, str(tmp_path), device=CPU, quiet=True).squares.clone()
    state, file = next(tmp_path.glob("*.json")), next(tmp_path.glob("*.u8"))
    if change is None:
        file.write_bytes(bytes(file.stat().st_size))
    else:
        state.write_text(json.dumps(json.loads(state.read_text()) | change))
    again = build_cache(train, 40, str(tmp_path), device=CPU, quiet=True)
    assert torch.equal(again.squares, whole)
    assert not again.bad


def test_ranks_that_share_memory_need_room_for_each(train: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "available_memory", lambda: 300_000)  # 30 x 40 x 40 x 3 is 144,000
    require_room(train, 40, "ram", device=CPU)
    with pytest.raises(DataError, match=r"and 0\.0 GB are free"):
        require_room(train, 40, "ram", device=CPU, processes=2)


def test_a_file_is_not_taken_for_other_data_or_another_size(dataset: Path, tmp_path: Path) -> None:
    cache, root = tmp_path / "cache", Path(shutil.copytree(dataset, tmp_path / "data"))
    build_cache(open_training_data(root)[0], 40, str(cache), device=CPU, quiet=True)
    build_cache(open_training_data(root)[0], 32, str(cache), device=CPU, quiet=True)
    next((root / "train" / "hat").iterdir()).unlink()
    assert len(build_cache(open_training_data(root)[0], 40, str(cache), device=CPU, quiet=True)) == 29
    assert len(list(cache.glob("*.u8"))) == 3
    for file in cache.glob("*.u8"):
        file.write_bytes(file.read_bytes()[:-1])  # damaged: made anew
    again: CachedSet = build_cache(open_training_data(root)[0], 40, str(cache), device=CPU, quiet=True)
    assert torch.equal(
        again.squares, build_cache(open_training_data(root)[0], 40, "ram", device=CPU, quiet=True).squares
    )


def test_transparent_images_are_cached_as_the_contract_sees_them(dataset: Path, tmp_path: Path) -> None:
    cache, root = tmp_path / "cache", Path(shutil.copytree(dataset, tmp_path / "data"))
    file = next((root / "train" / "hat").iterdir())
    Image.new("RGBA", (40, 40), (10, 20, 30, 1)).save(file)
    train = open_training_data(root)[0]
    row = int(np.flatnonzero([train.source.name(row).endswith(file.name) for row in range(len(train))])[0])
    for place in ("ram", str(cache)):
        kept = {v: build_cache(train.decoded_by(v), 40, place, device=CPU, quiet=True).squares[row] for v in (1, 2)}
        assert kept[1].reshape(-1, 3).unique(dim=0).tolist() == [[10, 20, 30]]
        assert kept[2].min() == 254
    assert len(list(cache.glob("*.u8"))) == 2


@pytest.mark.parametrize("place", ["ram", "folder"])
def test_too_little_room_is_said_before_anything_is_decoded(
    train: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.setattr(cache_module, "available_memory", lambda: 100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(9**9, 9**9, 100_000))
    monkeypatch.setattr(cache_module, "_decode", lambda *arguments: pytest.fail("decoded"))
    folder = str(tmp_path / "cache")
    with pytest.raises(
        DataError, match=r"30 images of 40 px needs 0\.0 GB .* and 0\.0 GB are free; pass `cache=FOLDER`"
    ):
        if place == "ram":
            require_room(train, 40, "ram", device=CPU)
        else:
            build_cache(train, 40, folder, device=CPU, quiet=True)
    assert not list(tmp_path.rglob("*.u8"))


def test_what_is_no_place_for_a_cache_is_said(train: ImageSet, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cache=device: training runs on the CPU; pass `cache=ram` or a folder"):
        require_room(train, 40, "device", device=CPU)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file: cannot be written \(File exists\)"):
        build_cache(train, 40, str(tmp_path / "file"), device=CPU, quiet=True)


def test_memory_is_the_hosts_and_at_most_what_the_cgroups_grant(tmp_path: Path) -> None:
    meminfo, group = tmp_path / "meminfo", tmp_path / "cgroup"
    meminfo.write_text("MemTotal: 100 kB\nMemAvailable:  50 kB\n")
    group.mkdir()
    nowhere = tmp_path / "none"
    assert available_memory(group, nowhere, meminfo) == 50 * 1024
    (group / "memory.max").write_text("40960\n")
    (group / "memory.current").write_text("30000\n")
    assert available_memory(group, nowhere, meminfo) == 10960
    (group / "memory.stat").write_text("anon 20000\ninactive_file 5000\n")
    assert available_memory(group, nowhere, meminfo) == 15960
    (group / "memory.max").write_text("max\n")
    assert available_memory(group, nowhere, meminfo) == 50 * 1024
    assert available_memory(group, nowhere, nowhere) is None
