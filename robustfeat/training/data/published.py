"""Data sets in the form in which their makers publish them: CIFAR-10, SVHN, Stanford Online Products, Tiny ImageNet."""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from robustfeat.errors import DataError, first_line
from robustfeat.serving.inputs.listing import list_folder
from robustfeat.training.data.folders import ImageFiles, open_folders
from robustfeat.training.data.image_set import ImageSet

__all__ = ["open_published"]

_CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_CIFAR_RECORD = 1 + 3072
_ANNOTATIONS = "val_annotations.txt"


def open_published(root: Path) -> tuple[ImageSet, ImageSet] | None:
    """The two splits of a folder that was unpacked as it came; None where it is none of these.

    - CIFAR-10: `data_batch_1` to `5` and `test_batch`, of the Python or the binary version;
    - SVHN, cropped digits: `train_32x32.mat` and `test_32x32.mat`;
    - Stanford Online Products: `Ebay_train.txt` and `Ebay_test.txt`, by super class;
    - Tiny ImageNet: `train/WNID/images/` and `val/val_annotations.txt`.

    Raises:
        DataError: a file is missing or damaged.
    """
    for marker, opened in (
        ("data_batch_1", _open_cifar_python),
        ("data_batch_1.bin", _open_cifar_binary),
        ("train_32x32.mat", _open_svhn),
        ("Ebay_train.txt", _open_products),
        (f"val/{_ANNOTATIONS}", _open_tiny_imagenet),
    ):
        # Tiny ImageNet's list stays behind where somebody has sorted the images into class folders.
        if (root / marker).is_file() and (opened is not _open_tiny_imagenet or (root / "val" / "images").is_dir()):
            try:
                return opened(root)
            except DataError:
                raise
            except Exception as exc:  # damaged files raise almost anything
                raise DataError(f"{root}: damaged ({first_line(exc)})", fix="download and unpack it again") from exc
    return None


class _Pixels:
    """Encodes an array of images as PNG files, without loss."""

    def __init__(self, pixels: NDArray[np.uint8], place: str) -> None:
        self._pixels, self._place = pixels, place

    def read(self, index: int) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(self._pixels[index]).save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()

    def name(self, index: int) -> str:
        return f"{self._place} image {index}"


def _of_pixels(classes: tuple[str, ...], labels: Any, pixels: NDArray[np.uint8], place: Path) -> ImageSet:
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3:
        raise DataError(
            f"{place}: expected images of three channels and whole numbers from 0 to 255 (uint8); got {pixels.dtype} "
            f"{pixels.shape}"
        )
    numbers = np.asarray(labels, np.int64)
    if numbers.shape != pixels.shape[:1] or not len(numbers) or not 0 <= numbers.min() <= numbers.max() < len(classes):
        raise DataError(f"{place}: damaged (labels do not fit the images)", fix="download and unpack it again")
    digest = hashlib.sha256(repr(classes).encode() + numbers.tobytes())
    digest.update(pixels.tobytes())
    return ImageSet(classes, numbers, _Pixels(pixels, str(place)), digest.hexdigest())


class _ArraysOnly(pickle.Unpickler):
    """Reads dictionaries, lists, numbers, text and NumPy arrays; whatever would run code is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):
            import codecs

            return codecs.encode
        if (module.replace("numpy._core", "numpy.core"), name) == ("numpy.core.multiarray", "_reconstruct"):
            from numpy._core.multiarray import _reconstruct

            return _reconstruct
        if module == "numpy" and name in {"ndarray", "dtype"}:
            return getattr(np, name)
        raise DataError(f"a file names {module}.{name}, which no data set needs", fix="do not use it")


def _cifar(root: Path, suffix: str, read: Any) -> tuple[ImageSet, ImageSet]:
    splits = []
    for names in ([f"data_batch_{number}{suffix}" for number in range(1, 6)], [f"test_batch{suffix}"]):
        missing = [name for name in names if not (root / name).is_file()]
        if missing:
            raise DataError(f"{root}: {missing[0]} is missing", fix="unpack CIFAR-10 whole")
        labels, pixels = zip(*(read(root / name) for name in names), strict=True)
        # Planes of red, green and blue, each row after row.
        images = np.concatenate(pixels).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        splits.append(_of_pixels(_CIFAR_CLASSES, np.concatenate(labels), np.ascontiguousarray(images), root / names[0]))
    return splits[0], splits[1]


def _open_cifar_python(root: Path) -> tuple[ImageSet, ImageSet]:
    def read(file: Path) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        with open(file, "rb") as handle:
            batch = _ArraysOnly(handle, encoding="latin1").load()
        return np.asarray(batch["labels"], np.int64), np.asarray(batch["data"])

    return _cifar(root, "", read)


def _open_cifar_binary(root: Path) -> tuple[ImageSet, ImageSet]:
    def read(file: Path) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        records = np.fromfile(file, np.uint8).reshape(-1, _CIFAR_RECORD)
        return records[:, 0].astype(np.int64), records[:, 1:]

    return _cifar(root, ".bin", read)


def _open_svhn(root: Path) -> tuple[ImageSet, ImageSet]:
    from scipy.io import loadmat

    def read(name: str) -> ImageSet:
        if not (root / name).is_file():
            raise DataError(f"{root}: {name} is missing; SVHN's cropped digits have train_32x32.mat and test_32x32.mat")
        data = loadmat(root / name)
        pixels = np.ascontiguousarray(data["X"].transpose(3, 0, 1, 2))
        written = data["y"].reshape(-1)
        if (other := written[~np.isin(written, range(11))]).size:
            raise DataError(f"{root / name}: labels must be whole numbers from 0 to 10; got {other[0]}")
        digits = written.astype(np.int64) % 10  # a zero is written as class 10
        return _of_pixels(tuple("0123456789"), digits, pixels, root / name)

    return read("train_32x32.mat"), read("test_32x32.mat")


def _open_products(root: Path) -> tuple[ImageSet, ImageSet]:
    def rows(name: str) -> list[str]:
        if not (root / name).is_file():
            raise DataError(f"{root}: {name} is missing; Stanford Online Products has Ebay_train.txt and Ebay_test.txt")
        lines = (root / name).read_text("utf-8").splitlines()
        if not lines or lines[0].split() != ["image_id", "class_id", "super_class_id", "path"]:
            raise DataError(f"{root / name}: the first line must be image_id class_id super_class_id path")
        return [line.split(maxsplit=3)[3] for line in lines[1:] if line.strip()]

    def split(name: str, classes: tuple[str, ...] | None) -> ImageSet:
        paths = rows(name)
        names = [path.partition("/")[0].removesuffix("_final") for path in paths]
        return _of_files(root, paths, names, classes or tuple(sorted(set(names))))

    train = split("Ebay_train.txt", None)
    return train, split("Ebay_test.txt", train.classes)


def _open_tiny_imagenet(root: Path) -> tuple[ImageSet, ImageSet]:
    train = replace(open_folders(root / "train"), remarks=())  # each class has a list of boxes beside its images
    lines = (root / "val" / _ANNOTATIONS).read_text("utf-8").splitlines()
    pairs = [line.split("\t")[:2] for line in lines if line.strip()]
    paths = [f"val/images/{name}" for name, _ in pairs]
    if unnamed := set(_image_names(root / "val" / "images")) - {name for name, _ in pairs}:
        raise DataError(
            f"{root / 'val' / _ANNOTATIONS}: tells no class of {min(unnamed)} and {len(unnamed) - 1:,} other images",
            fix="download and unpack it again, or remove them",
        )
    return train, _of_files(root, paths, [wnid for _, wnid in pairs], train.classes)


def _image_names(folder: Path) -> list[str]:
    return [image.path for image in list_folder(folder)[0]]


def _of_files(root: Path, paths: Sequence[str], names: Sequence[str], classes: tuple[str, ...]) -> ImageSet:
    index = {name: number for number, name in enumerate(classes)}
    unknown = sorted(set(names) - set(index))
    if unknown:
        raise DataError(f"{root}: class {unknown[0]!r} is not in the training split", fix="remove it or add it there")
    digest = hashlib.sha256("\n".join(classes).encode())
    for path in paths:
        file = root / path
        digest.update(f"{path}\0{file.stat().st_size if file.exists() else -1}\n".encode(errors="surrogateescape"))
    labels = np.array([index[name] for name in names], np.int64)
    digest.update(labels.tobytes())  # paths may not show a change of labels
    return ImageSet(classes, labels, ImageFiles(root, paths), digest.hexdigest())
