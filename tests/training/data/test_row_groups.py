"""Parquet files that are not loaded: row groups come as they are needed, once, and with the same images."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from robustfeat.errors import DataError
from robustfeat.training.data import parquet, row_groups
from robustfeat.training.data.batches import EpochPlan, TrainingBatches, load_batches
from robustfeat.training.data.image_set import ImageSet
from robustfeat.training.data.opening import open_training_data
from robustfeat.training.data.row_groups import LocalParquet, RowGroups
from tests.training.data.test_batches import jpeg, value_of

ROWS, GROUP, GROUPS = 1200, 4, 300
IMAGES = [jpeg(value) for value in range(256)]


def write(file: Path, values: list[int], *, group: int = GROUP, struct: bool = True) -> None:
    images = [IMAGES[value % 256] for value in values]
    column = pa.array([{"bytes": image, "path": None} for image in images] if struct else images)
    table = pa.table({"path": [f"{value}.png" for value in values], "image": column, "label": values})
    pq.write_table(table, file, row_group_size=group)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Row i holds image i % 256 and label i: two files, 300 row groups."""
    root = tmp_path_factory.mktemp("parquet")
    write(root / "train-0.parquet", list(range(500)))
    write(root / "train-1.parquet", list(range(500, ROWS)))
    write(root / "validation-0.parquet", list(range(40)), struct=False)
    return root


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "LARGE_BYTES", 1000)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Gets a line, the process and the file, each time that one is opened."""
    log, original = tmp_path / "opened", LocalParquet.open

    def record(self: LocalParquet) -> object:
        with log.open("a") as handle:
            handle.write(f"{os.getpid()} {self.name}\n")
        return original(self)

    log.touch()
    monkeypatch.setattr(LocalParquet, "open", record)
    return log


def values(data: ImageSet, rows: list[int]) -> list[int]:
    return [value_of(data, row) for row in rows]


def test_large_files_give_what_small_ones_give(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = open_training_data(root)
    monkeypatch.setattr(parquet, "LARGE_BYTES", 1000)
    large = open_training_data(root)
    for a, b in zip(small, large, strict=True):
        assert isinstance(b.source, RowGroups)
        assert a.blocks is None
        assert (a.fingerprint, a.classes) == (b.fingerprint, b.classes)
        np.testing.assert_array_equal(a.labels, b.labels)
        rows = np.random.default_rng(0).integers(0, len(a), 40).tolist()
        assert [a.source.read(row) for row in rows] == [b.source.read(row) for row in rows]
        assert [a.source.name(row) for row in rows] == [b.source.name(row) for row in rows]
    assert large[0].blocks is not None
    assert large[0].blocks.tolist() == list(range(0, ROWS + 1, GROUP))


def test_images_that_few_bytes_blow_up_are_not_held(
    tmp_path: Path, example_files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    image = example_files[0].read_bytes()
    table = pa.table({"image": [image + bytes(2**20)] * 60, "label": ["a", "b"] * 30})
    pq.write_table(table, tmp_path / "train-0.parquet", row_group_size=20)
    whole, _ = open_training_data(tmp_path, val_fraction=0.1)
    assert whole.blocks is None
    monkeypatch.setattr(parquet, "LARGE_BYTES", 2 * (tmp_path / "train-0.parquet").stat().st_size)
    train, _ = open_training_data(tmp_path, val_fraction=0.1)
    assert train.blocks is not None
    assert train.source.read(0) == whole.source.read(0)
    monkeypatch.setattr(row_groups, "MOST_BYTES", 2**24)
    train, _ = open_training_data(tmp_path, val_fraction=0.1)
    with pytest.raises(DataError, match=r"row group 0 holds more than 16,777,216 bytes of images; write it with fewer"):
        train.image(0)


def test_more_rows_than_bytes_are_refused(tmp_path: Path) -> None:
    table = pa.table({"image": pa.nulls(100_000, pa.binary()), "label": pa.array([1] * 100_000)})
    pq.write_table(table, tmp_path / "train-0.parquet")
    with pytest.raises(DataError, match=r"train-0\.parquet: claims 100,000 rows in [0-9,]+ bytes; write it again"):
        open_training_data(tmp_path)


@pytest.mark.usefixtures("large")
def test_an_epoch_reads_each_row_group_once(root: Path, opened: Path) -> None:
    train, _ = open_training_data(root)
    opened.write_text("")
    batches = TrainingBatches(train, 16, EpochPlan(train, 20, seed=1, epoch=0))
    seen: list[int] = []
    for step in range(len(batches)):
        seen += batches[step].labels.tolist()
    assert sorted(seen) == list(range(ROWS))
    reads = len(opened.read_text().splitlines())
    assert GROUPS <= reads <= GROUPS + 16


@pytest.mark.usefixtures("large")
def test_workers_read_row_groups_of_their_own(root: Path, opened: Path) -> None:
    train, _ = open_training_data(root)
    alone = TrainingBatches(train, 16, EpochPlan(train, 20, seed=1, epoch=0))[7]
    opened.write_text("")
    made = list(load_batches(TrainingBatches(train, 16, EpochPlan(train, 20, seed=1, epoch=0)), 2))
    assert made[7].images.equal(alone.images)
    assert sorted(int(label) for batch in made for label in batch.labels) == list(range(ROWS))
    lines = opened.read_text().splitlines()
    readers = Counter(line.split()[0] for line in lines)
    assert len(readers) == 2
    assert len(lines) <= GROUPS + 16


@pytest.mark.usefixtures("large")
def test_what_is_held_is_let_go(root: Path) -> None:
    """Also where rows were held out, so that no row group is ever read to its end."""
    train, _ = open_training_data(root)
    for data in (train, train.subset(np.delete(np.arange(ROWS), np.arange(0, ROWS, 17)))):
        source = data.source
        assert isinstance(source, RowGroups)
        batches = TrainingBatches(data, 16, EpochPlan(data, 20, seed=1, epoch=0))
        most = 0
        for step in range(len(batches)):
            batches[step]
            most = max(most, len(source._held))
        assert most <= 16 * 20
        assert len(source._held) < 25
    assert source is not train.source


@pytest.mark.usefixtures("large")
def test_rows_in_any_order_are_right_though_slow(root: Path, opened: Path) -> None:
    train, _ = open_training_data(root)
    reverse = train.subset(np.arange(ROWS)[::-1].copy())
    assert reverse.blocks is None
    assert values(reverse, [0, 1, 1199]) == [1199 % 256, 1198 % 256, 0]
    train.source.read(5)
    before = len(opened.read_text().splitlines())
    assert isinstance(train.source, RowGroups)
    train.source._capacity = 1
    for row in (0, 100, 0, 100):
        assert values(train, [row]) == [row]
    assert len(opened.read_text().splitlines()) - before == 4


@pytest.mark.usefixtures("large")
def test_held_out_rows_keep_blocks(tmp_path: Path) -> None:
    write(tmp_path / "train-0.parquet", [row // 2 for row in range(200)])
    train, validation = open_training_data(tmp_path, val_fraction=0.1)
    assert (len(train), len(validation)) == (180, 20)
    for data in (train, validation):
        assert data.blocks is not None
        assert data.blocks[-1] == len(data)
        assert values(data, list(range(len(data)))) == data.labels.tolist()
        for start, stop in zip(data.blocks, data.blocks[1:], strict=False):
            assert len({2 * int(label) // GROUP for label in data.labels[start:stop]}) == 1


@pytest.mark.usefixtures("large")
def test_empty_row_groups_and_files(tmp_path: Path) -> None:
    write(tmp_path / "train-0.parquet", [])
    write(tmp_path / "train-1.parquet", [1, 2, 3])
    write(tmp_path / "test-0.parquet", [1])
    train, _ = open_training_data(tmp_path)
    assert train.blocks is not None
    assert train.blocks.tolist() == [0, 3]
    assert train.source.name(2) == "train-1.parquet row 2"


@pytest.mark.usefixtures("large")
def test_a_damaged_row_group_stops_with_its_file(root: Path, tmp_path: Path) -> None:
    file = tmp_path / "train-0.parquet"
    write(file, list(range(256)))
    write(tmp_path / "test-0.parquet", [1])
    train, _ = open_training_data(tmp_path)
    data = file.read_bytes()
    file.write_bytes(b"\xff" * 2000 + data[2000:])
    with pytest.raises(DataError, match=r"train-0\.parquet: not a Parquet file, or damaged"):
        train.image(0)
    with pytest.raises(DataError, match=r"^\S*train-0\.parquet: not a Parquet file, or damaged [^\n]*$"):
        list(load_batches(TrainingBatches(train, 16, EpochPlan(train, 8, seed=1, epoch=0)), 1))


@pytest.mark.parametrize("limit", [0, 10**9])
def test_columns_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(parquet, "LARGE_BYTES", limit)
    pq.write_table(pa.table({"img": [b"x"], "label": [0]}), tmp_path / "train-0.parquet")
    with pytest.raises(DataError, match=r"needs the columns image and label; got img, label$"):
        open_training_data(tmp_path)
    pq.write_table(pa.table({"image": ["x"], "label": [0]}), tmp_path / "train-0.parquet")
    with pytest.raises(DataError, match=r"the column image must hold encoded images \(bytes\); got string"):
        open_training_data(tmp_path)


def test_names_that_are_numbers_are_sorted_as_numbers(tmp_path: Path) -> None:
    from tests.training.data.test_batches import write_parquet

    write_parquet(tmp_path / "train-0.parquet", [0, 1, 2], [0, 1, 2], ["0", "10", "2"])
    write_parquet(tmp_path / "test-0.parquet", [3, 4], ["10", "2"])
    train, test = open_training_data(tmp_path)
    assert (train.classes, train.labels.tolist()) == (("0", "2", "10"), [0, 2, 1])
    assert test.labels.tolist() == [2, 1]
    write_parquet(tmp_path / "train-0.parquet", [0, 1, 2], ["10", "2", "9"])
    assert open_training_data(tmp_path)[0].classes == ("2", "9", "10")
