"""From the DATA of the command line to training and validation images."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from robustfeat.errors import DataError
from robustfeat.training.data.folders import open_folders
from robustfeat.training.data.image_set import ImageSet
from robustfeat.training.data.parquet import read_parquet
from robustfeat.training.data.row_groups import LocalParquet

__all__ = ["open_training_data"]

_VALIDATION_NAMES = ("val", "validation", "test")


def open_training_data(
    root: str | Path, *, val_fraction: float = 0.02, seed: int = 0, parts: int | None = None
) -> tuple[ImageSet, ImageSet]:
    """The training and validation images under `root`.

    Args:
        root: a folder with `train/` and `val|validation|test/` of class folders, or with `train-*.parquet` and
            `validation-*.parquet` files (columns `image`, `label`).
        val_fraction: where there is no validation split, this share of the training images, drawn with `seed`.
        parts: only the first `parts` Parquet files of the training split.

    Raises:
        DataError: with what is missing and what would do.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; expected a folder with train/ class folders or train-*.parquet files")
    if (root / "train").is_dir():
        train = open_folders(root / "train")
        splits = [root / name for name in _VALIDATION_NAMES if (root / name).is_dir()]
        validation = open_folders(splits[0], train.classes) if splits else None
    else:
        files = sorted(root.glob("train-*.parquet"))
        if not files:
            raise DataError(
                f"{root}: holds neither train/ with class folders nor train-*.parquet files; see docs/training.md"
            )
        table = read_parquet([LocalParquet(file) for file in files[:parts]])
        names = table.classes()
        train = table.to_image_set(names, indexed=table.class_names is not None)
        found = [sorted(root.glob(f"{name}-*.parquet")) for name in _VALIDATION_NAMES]
        held_out = next((read_parquet([LocalParquet(file) for file in files]) for files in found if files), None)
        validation = held_out.to_image_set(names, indexed=table.class_names is not None) if held_out else None
    if validation is None:
        order = np.random.default_rng([seed, 0x5EED]).permutation(len(train))
        size = max(1, round(val_fraction * len(train)))
        if not 0 < val_fraction < 1 or size >= len(train):
            raise DataError(
                f"{root}: no validation split, and --val-fraction {val_fraction} of {len(train)} images leaves none"
            )
        validation, train = train.subset(np.sort(order[:size])), train.subset(np.sort(order[size:]))
    return train, validation
