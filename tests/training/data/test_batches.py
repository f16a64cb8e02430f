from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from torch.utils.data import Dataset

from robustfeat.errors import DataError, DecodeError, InputError
from robustfeat.hub.preprocessing import Preprocessing
from robustfeat.training.data.batches import Batch, EpochPlan, EvaluationBatches, TrainingBatches, load_batches
from robustfeat.training.data.image_set import ImageSet
from robustfeat.training.data.opening import are_folders_of_images, open_training_data, require_place
from robustfeat.training.loop.trainer import train as train_run
from robustfeat.training.recipe import Recipe


def jpeg(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 20), (value, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def value_of(data: ImageSet, row: int) -> int:
    """What `jpeg` was given for this row's image."""
    pixel = data.image(row).getpixel((0, 0))
    assert isinstance(pixel, tuple)
    return pixel[0]


def write_parquet(file: Path, values: list[int], labels: Sequence[object], names: list[str] | None = None) -> None:
    images = pa.array([{"bytes": jpeg(value), "path": None} for value in values])
    table = pa.table({"image": images, "label": labels})
    if names:
        features = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    pq.write_table(table, file)


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    write_parquet(tmp_path / "train-00000-of-00002.parquet", [0, 10, 20], [0, 1, 0], ["cat", "dog"])
    write_parquet(tmp_path / "train-00001-of-00002.parquet", [30, 40], [1, 1], ["cat", "dog"])
    write_parquet(tmp_path / "validation-00000-of-00001.parquet", [50], [1], ["cat", "dog"])
    return tmp_path


def test_parquet_rows_keep_their_order_across_files(parquet: Path) -> None:
    train, validation = open_training_data(parquet)
    assert train.classes == ("cat", "dog")
    assert train.labels.tolist() == [0, 1, 0, 1, 1]
    assert [value_of(train, row) for row in range(5)] == [0, 10, 20, 30, 40]
    assert validation.labels.tolist() == [1]
    assert train.source.name(3) == "train-00001-of-00002.parquet row 0"


def test_parts_limits_the_files(parquet: Path) -> None:
    assert len(open_training_data(parquet, parts=1)[0]) == 3


def test_parquet_with_text_labels(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-0.parquet", [0, 1, 2], ["pear", "apple", "pear"])
    write_parquet(tmp_path / "test-0.parquet", [3], ["pear"])
    train, validation = open_training_data(tmp_path)
    assert (train.classes, train.labels.tolist()) == (("apple", "pear"), [1, 0, 1])
    assert validation.labels.tolist() == [1]


def test_numbers_without_names_mean_the_same_in_both_splits(tmp_path: Path) -> None:
    """Labels 1 to 3: a validation split that holds only 1 and 2 must not take them for positions."""
    write_parquet(tmp_path / "train-0.parquet", [0, 1, 2], [3, 1, 2])
    write_parquet(tmp_path / "validation-0.parquet", [3, 4], [1, 2])
    train, validation = open_training_data(tmp_path)
    assert (train.classes, train.labels.tolist()) == (("1", "2", "3"), [2, 0, 1])
    assert validation.labels.tolist() == [0, 1]


def test_names_in_another_order_are_matched_by_name(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-0.parquet", [0, 1], [0, 1], ["cat", "dog"])
    write_parquet(tmp_path / "validation-0.parquet", [2], [0], ["dog", "cat"])
    assert open_training_data(tmp_path)[1].labels.tolist() == [1]


def test_files_of_one_split_name_their_classes_alike(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-0.parquet", [0, 1], [0, 1], ["cat", "dog"])
    write_parquet(tmp_path / "train-1.parquet", [2], [0], ["dog", "cat"])
    with pytest.raises(DataError, match=r"train-1\.parquet: its class names are not those of train-0\.parquet"):
        open_training_data(tmp_path)


@pytest.mark.parametrize(
    ("label", "message"), [(7, ": label 7 is none of"), (-1, r" has no label \(-1\); every row needs one")]
)
def test_a_label_outside_the_names_is_named(tmp_path: Path, label: int, message: str) -> None:
    write_parquet(tmp_path / "train-0.parquet", [0, 1, 2], [0, 1, label], ["cat", "dog"])
    with pytest.raises(DataError, match=rf"train-0\.parquet row 2{message}"):
        open_training_data(tmp_path)


@pytest.mark.parametrize("labels", [[0.0, float("nan")], ["cat", ""], [[0], [1]], [b"cat", b"dog"]])
def test_what_names_no_class_is_no_label(tmp_path: Path, labels: list[object]) -> None:
    pq.write_table(pa.table({"image": [jpeg(0), jpeg(1)], "label": labels}), tmp_path / "train-0.parquet")
    with pytest.raises(DataError, match=r"train-0\.parquet row [01] has no label"):
        open_training_data(tmp_path)


def test_two_classes_of_one_name_are_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-0.parquet", [0, 1, 2], [0, 1, 2], ["cat", "dog", "cat"])
    with pytest.raises(DataError, match=r"train-0\.parquet: two of its classes are called 'cat'"):
        open_training_data(tmp_path)


def test_what_is_left_out_is_remarked(dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(dataset / "train", tmp_path / "train")
    assert open_training_data(tmp_path)[0].remarks == ()
    for number, file in enumerate(sorted((tmp_path / "train").glob("*/*"))[:4]):
        file.rename(file.with_suffix(".psd") if number % 2 else tmp_path / "train" / f"{number}.jpg")
    (tmp_path / "train" / "._hidden.png").touch()
    (tmp_path / "train" / "hat" / "._hidden.png").touch()
    train, held_out = open_training_data(tmp_path, val_fraction=0.1)
    assert train.remarks[0].startswith(f"{tmp_path / 'train'}: files left out: 4 (")
    assert held_out.remarks == (f"{tmp_path}: has no validation or test split; 3 of its 26 images are held out",)
    assert train.subset(np.arange(3)).remarks == train.remarks


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"picture": [b"x"], "label": [0]}, "needs the columns image and label|not a Parquet file with the columns"),
        ({"image": [b"x"], "label": [None]}, "row 0 has no label"),
        ({"image": [], "label": []}, "holds no rows"),
    ],
)
def test_bad_parquet_is_explained(tmp_path: Path, columns: dict[str, list[object]], message: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "train-0.parquet")
    with pytest.raises(DataError, match=message):
        open_training_data(tmp_path)


def test_a_file_that_is_not_parquet_is_explained(tmp_path: Path) -> None:
    (tmp_path / "train-0.parquet").write_text("junk")
    with pytest.raises(DataError, match="not a Parquet file"):
        open_training_data(tmp_path)


def test_class_folders(dataset: Path) -> None:
    train, validation = open_training_data(dataset)
    assert len(train.classes) == 10
    assert (len(train), len(validation)) == (30, 10)
    assert np.bincount(train.labels).tolist() == [3] * 10


def test_class_folders_may_be_the_data_themselves(dataset: Path, tmp_path: Path) -> None:
    train, held_out = open_training_data(dataset / "train", val_fraction=0.2)
    assert (len(train), len(held_out)) == (24, 6)
    assert train.classes == open_training_data(dataset)[0].classes
    (tmp_path / "photos").mkdir()
    shutil.copytree(dataset / "train" / "hat", tmp_path / "photos" / "hat")  # a folder of photographs is no data set
    with pytest.raises(
        DataError, match="holds a single class folder with images, 'hat'; expected a folder of class folders"
    ):
        open_training_data(tmp_path / "photos")
    with pytest.raises(DataError, match="hat: holds no class folders with images; expected a folder of class folders"):
        open_training_data(tmp_path / "photos" / "hat")
    with pytest.raises(DataError, match=r"hat-\d\.png: is a file; expected a folder of class folders"):
        open_training_data(next((tmp_path / "photos" / "hat").iterdir()))
    assert not are_folders_of_images(tmp_path / "photos")


def test_a_run_may_not_lie_among_the_classes(dataset: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    shutil.copytree(dataset / "train", photos)
    recipe = Recipe(concepts="classes", batch_size=6, image_sizes=((0, 32),), validation_size=32, epochs=1)
    with pytest.raises(InputError, match="lies in the training data, where it would be taken for a class"):
        train_run(photos, recipe, photos / "run", workers=0, quiet=True)
    assert not (photos / "run").exists()
    assert not are_folders_of_images(dataset)


def test_a_class_that_training_lacks_is_named(dataset: Path, tmp_path: Path) -> None:
    for split, name in (("train", "a"), ("val", "b")):
        (tmp_path / split / name).mkdir(parents=True)
        (tmp_path / split / name / "x.png").write_bytes(jpeg(0))
    with pytest.raises(DataError, match="class 'b' is not in the training split"):
        open_training_data(tmp_path)


def test_without_validation_a_seeded_share_is_held_out(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-0.parquet", list(range(100)), [row % 4 for row in range(100)])
    train, validation = open_training_data(tmp_path, val_fraction=0.1, seed=3)
    again = open_training_data(tmp_path, val_fraction=0.1, seed=3)
    assert (len(train), len(validation)) == (90, 10)
    assert again[1].fingerprint == validation.fingerprint

    def values(data: ImageSet) -> set[int]:
        return {value_of(data, row) for row in range(len(data))}

    assert values(train) | values(validation) == set(range(100))
    assert open_training_data(tmp_path, val_fraction=0.1, seed=4)[1].fingerprint != validation.fingerprint


def test_the_held_out_share_is_one_of_each_class(tmp_path: Path) -> None:
    labels = [0] * 60 + [1] * 30 + [2] * 10 + [3]
    write_parquet(tmp_path / "train-0.parquet", list(range(len(labels))), labels)
    drawn = set()
    for seed in range(5):
        train, validation = open_training_data(tmp_path, val_fraction=0.1, seed=seed)
        held_out, left = (np.bincount(split.labels, minlength=4) for split in (validation, train))
        assert held_out.sum() == 10
        assert (np.abs(held_out - [6, 3, 1, 0]) <= 1).all()
        assert (held_out + left).tolist() == [60, 30, 10, 1]
        assert left[3] == 1  # nothing could tell a class that training lacks
        drawn.add(validation.fingerprint)
    assert len(drawn) == 5


def test_every_class_keeps_an_image_to_train_on(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-0.parquet", list(range(8)), [0, 1] * 4)
    train, _ = open_training_data(tmp_path, val_fraction=0.99)
    assert sorted(train.labels) == [0, 1]
    write_parquet(tmp_path / "train-0.parquet", [0, 1], [0, 1])
    with pytest.raises(DataError, match="leaves none"):
        open_training_data(tmp_path, val_fraction=0.5)


def test_a_class_folder_may_have_any_name_and_a_pipe_is_no_image(tmp_path: Path) -> None:
    folder = tmp_path / "train" / os.fsdecode(b"caf\xe9")
    folder.mkdir(parents=True)
    for number in range(3):
        (folder / f"{number}.png").write_bytes(jpeg(number))
    (tmp_path / "val").mkdir()
    shutil.copytree(folder, tmp_path / "val" / folder.name)
    os.mkfifo(folder / "pipe.png")
    train, _ = open_training_data(tmp_path)
    failures = []
    for row in range(len(train)):
        try:
            train.image(row)
        except DecodeError as exc:
            failures.append(str(exc))
    assert len(train) == 4
    assert [line.rpartition("/")[2] for line in failures] == ["pipe.png: not a regular file"]


def test_a_file_that_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "train" / name).mkdir(parents=True)
        (tmp_path / "train" / name / "0.png").write_bytes(jpeg(0))
        (tmp_path / "train" / name / "1.png").write_bytes(jpeg(1))
    os.truncate(tmp_path / "train" / "b" / "1.png", 2**40)  # without blocks on the disk
    train, _ = open_training_data(tmp_path, val_fraction=0.3)
    with pytest.raises(DecodeError, match=r"b/1\.png: over the limit of 536,870,912 bytes"):
        for row in range(len(train)):
            train.image(row)


def test_fingerprint_changes_with_the_data(parquet: Path) -> None:
    before = open_training_data(parquet)[0].fingerprint
    assert open_training_data(parquet)[0].fingerprint == before
    write_parquet(parquet / "train-00001-of-00002.parquet", [30, 40], [1, 0], ["cat", "dog"])
    assert open_training_data(parquet)[0].fingerprint != before


def test_training_batches_do_not_depend_on_workers_or_start(dataset: Path) -> None:
    train, _ = open_training_data(dataset)
    batches = TrainingBatches(train, 24, EpochPlan(train, 6, seed=1, epoch=2))
    alone = list(load_batches(batches, 0))
    workers = list(load_batches(batches, 2))
    later = list(load_batches(batches, 1, range(3, 5)))
    assert len(alone) == len(workers) == 5
    for a, b in zip(alone, workers, strict=True):
        assert a.images.equal(b.images)
        assert a.labels.equal(b.labels)
    assert later[0].images.equal(alone[3].images)
    assert alone[0].images.shape == (6, 3, 24, 24)


def test_an_epoch_shows_each_image_once_and_the_next_in_another_order(dataset: Path) -> None:
    train, _ = open_training_data(dataset)
    orders = [EpochPlan(train, 6, seed=1, epoch=epoch).order.tolist() for epoch in (0, 1)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(30))
    assert orders[0] != orders[1]


def test_crops_are_flipped_for_half_of_the_images(tmp_path: Path) -> None:
    """An image whose brightness rises to the right shows in each crop whether it was flipped."""
    root = tmp_path / "train" / "a"
    root.mkdir(parents=True)
    gradient = Image.linear_gradient("L").rotate(90).convert("RGB")
    for number in range(200):
        gradient.save(root / f"{number}.png")
    (tmp_path / "val" / "a").mkdir(parents=True)
    gradient.save(tmp_path / "val" / "a" / "x.png")
    train, _ = open_training_data(tmp_path)
    batch = TrainingBatches(train, 16, EpochPlan(train, 200, seed=0, epoch=0))[0]
    rising = (batch.images[:, 0, 8, -1].int() > batch.images[:, 0, 8, 0].int()).float().mean()
    assert 0.4 < float(rising) < 0.6
    spread = batch.images[:, 0, 8].float()
    assert float((spread.amax(1) - spread.amin(1)).std()) > 10  # crops of many sizes


def test_a_damaged_image_leaves_its_neighbours_as_they_are(dataset: Path, tmp_path: Path) -> None:

    root = Path(shutil.copytree(dataset, tmp_path / "data"))
    train, _ = open_training_data(root)
    batches = TrainingBatches(train, 24, EpochPlan(train, 6, seed=1, epoch=0))
    whole = batches[0]
    victim = int(batches.plan.order[2])
    (root / "train" / train.source.name(victim)).write_bytes(b"junk")
    broken = batches[0]
    assert len(broken.labels) == 5
    assert train.source.name(victim) in broken.failures[0]
    assert broken.images.equal(whole.images[[0, 1, 3, 4, 5]])
    with pytest.raises(DecodeError, match="not an image"):
        train.image(victim)


def test_evaluation_batches_are_the_serving_squares(dataset: Path) -> None:
    from robustfeat.hub.preprocessing import decode, resize_and_crop

    contract = Preprocessing(32, 0.875)
    _, validation = open_training_data(dataset)
    batch = EvaluationBatches(validation, 256, contract)[0]
    for row in range(len(validation)):
        expected = resize_and_crop(decode(validation.source.read(row)), contract)
        np.testing.assert_array_equal(batch.images[row].permute(1, 2, 0).numpy(), expected)


class Refusing(Dataset[Batch]):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, number: int) -> Batch:
        raise InputError("expected\nless", argument="cache", value="ram", fix="pass `cache_px=0`")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_a_worker_keeps_its_parts(workers: int) -> None:
    with pytest.raises(InputError) as caught:
        list(load_batches(Refusing(), workers))
    error = caught.value
    assert (error.what, error.argument, error.value, error.fix) == (
        "expected\nless",
        "cache",
        "ram",
        "pass `cache_px=0`",
    )


def test_data_that_cannot_be_looked_at_are_refused() -> None:
    place = "x" * 300
    with pytest.raises(DataError, match=f"{place}: cannot be read"):
        require_place(place)
