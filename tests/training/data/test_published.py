"""Data sets as their makers publish them: small ones, written in the same formats."""

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from robustfeat.errors import DataError
from robustfeat.training.data.opening import open_training_data

ROWS = 6


@pytest.fixture
def pixels(example_files: list[Path]) -> np.ndarray:
    """Photographs at 32 px, (36, 32, 32, 3): six for each of six files."""
    squares = [np.asarray(Image.open(file).convert("RGB").resize((32, 32))) for file in example_files[: 6 * ROWS]]
    return np.stack(squares)


def planes(pixels: np.ndarray) -> np.ndarray:
    return pixels.transpose(0, 3, 1, 2).reshape(len(pixels), 3072)


def write_cifar(root: Path, pixels: np.ndarray, *, binary: bool) -> np.ndarray:
    labels = np.arange(len(pixels)) % 10
    for number in range(6):
        part = slice(number * ROWS, (number + 1) * ROWS)
        name = f"data_batch_{number + 1}" if number < 5 else "test_batch"
        if binary:
            records = np.concatenate([labels[part, None].astype(np.uint8), planes(pixels[part])], axis=1)
            (root / f"{name}.bin").write_bytes(records.tobytes())
        else:
            batch = {"batch_label": "one", "labels": labels[part].tolist(), "data": planes(pixels[part])}
            (root / name).write_bytes(pickle.dumps(batch, protocol=2))
    return labels


@pytest.mark.parametrize("binary", [True, False])
def test_cifar_10(tmp_path: Path, pixels: np.ndarray, binary: bool) -> None:
    labels = write_cifar(tmp_path, pixels, binary=binary)
    train, test = open_training_data(tmp_path)
    assert (train.classes[0], train.classes[9]) == ("airplane", "truck")
    np.testing.assert_array_equal(train.labels, labels[:30])
    np.testing.assert_array_equal(test.labels, labels[30:])
    np.testing.assert_array_equal(np.asarray(train.image(17)), pixels[17])
    np.testing.assert_array_equal(np.asarray(test.image(3)), pixels[33])


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path, pixels: np.ndarray) -> None:
    class Attack:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {tmp_path}/ran",)

    write_cifar(tmp_path, pixels, binary=False)
    (tmp_path / "test_batch").write_bytes(pickle.dumps({"labels": Attack(), "data": planes(pixels)}, protocol=2))
    with pytest.raises(DataError, match=r"names (posix|nt)\.system, which no data set needs"):
        open_training_data(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("binary", [True, False])
def test_a_cut_file_is_told(tmp_path: Path, pixels: np.ndarray, binary: bool) -> None:
    write_cifar(tmp_path, pixels, binary=binary)
    file = tmp_path / ("data_batch_3.bin" if binary else "data_batch_3")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"damaged \(.*download and unpack it again"):
        open_training_data(tmp_path)
    file.unlink()
    with pytest.raises(DataError, match=rf"{file.name} is missing; unpack CIFAR-10 whole"):
        open_training_data(tmp_path)


def test_svhn(tmp_path: Path, pixels: np.ndarray) -> None:
    for name, part in (("train", slice(0, 30)), ("test", slice(30, 36))):
        digits = (np.arange(36)[part] % 10 + 1).reshape(-1, 1).astype(np.uint8)  # 1 to 10, and 10 is a zero
        savemat(tmp_path / f"{name}_32x32.mat", {"X": pixels[part].transpose(1, 2, 3, 0), "y": digits})
    train, test = open_training_data(tmp_path)
    assert train.classes == tuple("0123456789")
    assert train.labels[:10].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]
    np.testing.assert_array_equal(np.asarray(train.image(12)), pixels[12])
    np.testing.assert_array_equal(np.asarray(test.image(5)), pixels[35])
    (tmp_path / "test_32x32.mat").unlink()
    with pytest.raises(DataError, match=r"test_32x32\.mat is missing"):
        open_training_data(tmp_path)


def test_stanford_online_products(tmp_path: Path, example_files: list[Path]) -> None:
    for name, files in (("train", example_files[:8]), ("test", example_files[8:12])):
        lines = ["image_id class_id super_class_id path"]
        for number, file in enumerate(files):
            kind = ("chair", "kettle")[number % 2]
            target = tmp_path / f"{kind}_final" / f"{number}_{name}.JPG"
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(file.read_bytes())
            lines.append(f"{number + 1} {number // 2 + 1} {number % 2 + 1} {target.relative_to(tmp_path)}")
        (tmp_path / f"Ebay_{name}.txt").write_text("\n".join(lines) + "\n")
    train, test = open_training_data(tmp_path)
    assert train.classes == test.classes == ("chair", "kettle")
    assert (train.labels.tolist(), test.labels.tolist()) == ([0, 1] * 4, [0, 1] * 2)
    assert train.source.read(3) == example_files[3].read_bytes()
    assert train.source.name(3) == "kettle_final/3_train.JPG"
    (tmp_path / "Ebay_test.txt").write_text("image path\n")
    with pytest.raises(DataError, match=r"Ebay_test\.txt: the first line must be image_id class_id"):
        open_training_data(tmp_path)


def test_tiny_imagenet(tmp_path: Path, example_files: list[Path]) -> None:
    wnids = ("n01443537", "n02099601")
    for number, file in enumerate(example_files[:6]):
        folder = tmp_path / "train" / wnids[number % 2] / "images"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.JPEG").write_bytes(file.read_bytes())
        (folder.parent / "boxes.txt").write_text("0.JPEG\t0\t0\t9\t9\n")
    (tmp_path / "val" / "images").mkdir(parents=True)
    lines = []
    for number, file in enumerate(example_files[6:9]):
        (tmp_path / "val" / "images" / f"val_{number}.JPEG").write_bytes(file.read_bytes())
        lines.append(f"val_{number}.JPEG\t{wnids[(number + 1) % 2]}\t0\t0\t9\t9")
    for name in (".DS_Store", "Thumbs.db", "._val_0.JPEG"):  # what systems leave there
        (tmp_path / "val" / "images" / name).write_bytes(b"no image")
    (tmp_path / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    train, test = open_training_data(tmp_path)
    assert (train.classes, len(train), train.remarks) == (wnids, 6, ())
    assert test.labels.tolist() == [1, 0, 1]
    assert test.source.read(2) == example_files[8].read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"X": np.float64}, r"expected images of three channels .*uint8\); got float64 \(4, 32, 32, 3\)"),
        ({"y": [1, 2, 3, 103]}, "labels must be whole numbers from 0 to 10; got 103"),
        ({"y": [1, 2, 3, 1.5]}, "labels must be whole numbers from 0 to 10; got 1.5"),
        ({"y": [1, 2, 3, np.nan]}, "labels must be whole numbers from 0 to 10; got nan"),
    ],
)
def test_svhn_of_other_numbers_is_refused(
    tmp_path: Path, pixels: np.ndarray, change: dict[str, Any], message: str
) -> None:
    whole = {"X": pixels[:4].transpose(1, 2, 3, 0), "y": np.array([[1], [2], [3], [10]])}
    savemat(tmp_path / "test_32x32.mat", whole)
    if "X" in change:
        savemat(tmp_path / "train_32x32.mat", {**whole, "X": whole["X"].astype(change["X"])})
    else:
        savemat(tmp_path / "train_32x32.mat", {**whole, "y": np.array(change["y"])[:, None]})
    with pytest.raises(DataError, match=rf"train_32x32\.mat: {message}"):
        open_training_data(tmp_path)


def test_cifar_of_fractions_is_refused(tmp_path: Path, pixels: np.ndarray) -> None:
    write_cifar(tmp_path, pixels / 255, binary=False)
    with pytest.raises(DataError, match="expected images of three channels"):
        open_training_data(tmp_path)


def test_images_that_the_annotations_leave_out_are_named(tmp_path: Path, example_files: list[Path]) -> None:
    for name in ("train/n01443537/a.jpg", "train/n01629819/a.jpg", "val/images/a.jpg", "val/images/b.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(example_files[0].read_bytes())
    (tmp_path / "val" / "val_annotations.txt").write_text("a.jpg\tn01443537\t0\t0\t62\t57\n")
    with pytest.raises(DataError, match=r"val_annotations\.txt: tells no class of b\.jpg and 0 other images"):
        open_training_data(tmp_path)
