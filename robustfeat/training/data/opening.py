"""From the DATA of the command line to training and validation images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from robustfeat.errors import DataError
from robustfeat.training.data.folders import (
    UNLABELLED,
    class_folders,
    holds_bare_images,
    open_bare_folder,
    open_folders,
)
from robustfeat.training.data.hub_dataset import fetch_dataset, is_hub_dataset, list_remote_parquet
from robustfeat.training.data.image_set import ImageSet
from robustfeat.training.data.parquet import read_parquet
from robustfeat.training.data.published import open_published
from robustfeat.training.data.row_groups import LocalParquet, ParquetPart
from robustfeat.training.data.split_files import VALIDATION_NAMES, SplitFiles, find_split_files
from robustfeat.training.data.tar_shards import CLASSES_NAME, read_class_names, read_shards

__all__ = ["are_folders_of_images", "open_splits", "open_training_data", "require_place"]

_EXPECTED = (
    "a folder of class folders (CLASS/image.jpg, or train/CLASS/image.jpg), train-*.parquet or train-*.tar files"
)


def open_training_data(
    root: str | Path,
    *,
    val_fraction: float = 0.02,
    seed: int = 0,
    parts: int | None = None,
    stream: bool = False,
    labels: bool = True,
) -> tuple[ImageSet, ImageSet]:
    """The training and validation images under `root`.

    Args:
        root: a folder of class folders, or with `train/` and `val|validation|test/` of them, with `train-*.parquet` and
            `validation-*.parquet` files (columns `image`, `label`), or with `train-*.tar` and `validation-*.tar`
            shards; one that `open_published` knows; or `hf://datasets/ORG/NAME[@REVISION][/FOLDER]`, a dataset of the
            Hub with such files.
        val_fraction: where there is no validation split, this share of the training images, drawn with `seed` and
            evenly over classes; each class keeps one to train on.
        parts: only the first `parts` files of the training split, of Parquet files and shards.
        stream: read the Parquet files of the Hub where they are, and keep nothing here.
        labels: whether labels are needed. Otherwise, a folder may also hold images without class folders, however
            deep; their class is `UNLABELLED`.

    Raises:
        DataError: something is missing. The message says what, and what is accepted.
        HubError: the dataset is not there, or cannot be fetched.
    """
    train, validation = open_splits(root, parts=parts, stream=stream, labels=labels)
    if validation is None:
        held_out = _hold_out(train.labels, val_fraction, seed)
        if not len(held_out):
            raise DataError(
                f"{root}: no validation split, and `val_fraction={val_fraction}` of {len(train)} images in "
                f"{len(train.classes)} classes leaves none, or a class without images",
                fix="move some of each class to val/",
            )
        rest = np.setdiff1d(np.arange(len(train)), held_out)
        remark = f"{root}: has no validation or test split; {len(held_out):,} of its {len(train):,} images are held out"
        validation, train = replace(train.subset(held_out), remarks=(remark,)), train.subset(rest)
    return train, validation


def _hold_out(labels: NDArray[np.int64], share: float, seed: int) -> NDArray[np.int64]:
    """Rows to hold out, ascending; none where the share is not one.

    `serving.heads.fitting.selection.hold_out` is the SVM protocol's, by scikit-learn: with a large
    share it empties classes.
    """
    draw = np.random.default_rng([seed, 0x5EED])
    order = draw.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    first_of_class = np.diff(labels[order], prepend=-1) > 0
    spare = order[~first_of_class]
    if not 0 < share < 1 or not len(spare):
        return np.empty(0, np.int64)
    size = min(max(1, round(share * len(labels))), len(spare))
    # Take evenly spaced rows of the rows sorted by class, so each class has its share.
    places = (np.arange(size) + draw.random()) * len(spare) / size
    return np.sort(spare[places.astype(np.int64)])


def require_place(root: str | Path) -> None:
    """DATA is a folder, or on the Hub.

    Raises:
        DataError: it is a file, is not there, or cannot be read.
    """
    if is_hub_dataset(root):
        return
    try:
        if Path(root).is_dir():
            return
        what = "is a file" if Path(root).exists() else "no such folder"
    except OSError as exc:
        raise DataError(f"{root}: cannot be read ({exc.strerror or exc}); expected {_EXPECTED}") from exc
    raise DataError(f"{root}: {what}; expected {_EXPECTED}")


def are_folders_of_images(root: str | Path, *, labels: bool = True) -> bool:
    """Whether DATA holds class folders, or images without labels where `labels` are not needed, without train/."""
    if is_hub_dataset(root) or (Path(root) / "train").is_dir() or any(Path(root).glob("train-*")):
        return False
    return not labels or len(class_folders(Path(root))) >= 2


def open_splits(
    root: str | Path, *, parts: int | None = None, stream: bool = False, labels: bool = True
) -> tuple[ImageSet, ImageSet | None]:
    """The splits under `root` as they are, with None where there is no validation split; see `open_training_data`."""
    if is_hub_dataset(root):
        return _open_hub_dataset(str(root), parts, stream)
    return _open(Path(root), parts, labels)


def _open(root: Path, parts: int | None, labels: bool) -> tuple[ImageSet, ImageSet | None]:
    require_place(root)
    published = open_published(root)
    if published is not None:
        return published
    if (root / "train").is_dir():
        train = _open_folder(root / "train", labels)
        splits = [root / name for name in VALIDATION_NAMES if (root / name).is_dir()]
        return train, _open_folder(splits[0], labels, train.classes) if splits else None
    files = find_split_files((entry.name for entry in root.iterdir()), str(root), parts)
    if files is None and not labels:
        return _open_folder(root, labels), None
    if files is None:
        found = class_folders(root)
        if len(found) >= 2:
            return open_folders(root), None
        what = (
            f"holds a single class folder with images, {found[0]!r}" if found else "holds no class folders with images"
        )
        raise DataError(
            f"{root}: {what}; expected {_EXPECTED} (docs/training.md)",
            fix="for images without labels, pass a `teacher` and `labels=False`",
        )
    return _open_files(files, root, str(root))


def _open_folder(root: Path, labels: bool, classes: tuple[str, ...] | None = None) -> ImageSet:
    """A split in folders; `classes` are the training split's."""
    if classes is UNLABELLED or (not labels and classes is None and holds_bare_images(root)):
        return open_bare_folder(root)
    return open_folders(root, classes)


def _open_hub_dataset(url: str, parts: int | None, stream: bool) -> tuple[ImageSet, ImageSet | None]:
    if stream:
        return _open_parquet(*list_remote_parquet(url, parts), stream=True)
    fetched = fetch_dataset(url, parts)
    return _open_files(fetched.files, fetched.folder, fetched.place)


def _open_files(files: SplitFiles, folder: Path, place: str) -> tuple[ImageSet, ImageSet | None]:
    """Files in `folder`, which messages call `place`."""
    if files.kind == "tar":
        train, validation = ([folder / name for name in names] for names in (files.train, files.validation))
        return _open_shards(train, validation, read_class_names(folder / CLASSES_NAME))
    return _open_parquet(
        *(
            [LocalParquet(folder / name, f"{place}/{name}") for name in names]
            for names in (files.train, files.validation)
        )
    )


def _open_parquet(
    train: Sequence[ParquetPart], validation: Sequence[ParquetPart], *, stream: bool = False
) -> tuple[ImageSet, ImageSet | None]:
    split = read_parquet(train, stream=stream)
    classes, indexed = split.classes(), split.class_names is not None
    images = split.to_image_set(classes, indexed=indexed)
    held_out = read_parquet(validation, stream=stream) if validation else None
    return images, held_out.to_image_set(classes, indexed=indexed) if held_out else None


def _open_shards(
    train: Sequence[Path], validation: Sequence[Path], names: tuple[str, ...] | None
) -> tuple[ImageSet, ImageSet | None]:
    split = read_shards(train)
    classes, indexed = split.classes(names), names is not None
    images = split.to_image_set(classes, indexed=indexed)
    held_out = read_shards(validation) if validation else None
    return images, held_out.to_image_set(classes, indexed=indexed) if held_out else None
