"""Parts of a training set, drawn once and written as Parquet files that training reads like any other data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustfeat.errors import DataError, DecodeError
from robustfeat.files import new_folder
from robustfeat.training.concepts import ConceptMap
from robustfeat.training.data.image_set import ImageSet

__all__ = ["draw_by_concept", "same_origin", "write_subset"]

_ORIGIN = "origin.json"
_ROWS_A_GROUP = 1000


def draw_by_concept(
    labels: NDArray[np.int64], concepts: ConceptMap, shares: Mapping[str, float], size: int, seed: int = 0
) -> NDArray[np.int64]:
    """Rows in which each concept has a given share, evenly over its classes.

    Args:
        labels: (N,) class numbers.
        concepts: concepts of the classes.
        shares: by concept; those of concepts that have examples here are normalised to sum to 1.
        size: number of rows.
        seed: random seed of the draw.

    Returns:
        About `size` row numbers (each class has a whole number), ascending.

    Raises:
        DataError: a class has too few images.
    """
    rng = np.random.default_rng(seed)
    total = sum(shares[name] for name in concepts.names)
    rows: list[NDArray[np.int64]] = []
    for number, name in enumerate(concepts.names):
        classes = np.flatnonzero((concepts.of_class == number) & (concepts.class_counts > 0))
        each = round(size * shares[name] / total / len(classes))
        for one in classes:
            own = np.flatnonzero(labels == one)
            if each > len(own):
                raise DataError(
                    f"a class of {name} has {len(own)} images and {each} are needed for {size:,} with these shares"
                )
            rows.append(rng.choice(own, each, replace=False))
    return np.sort(np.concatenate(rows))


def write_subset(
    train: ImageSet, rows: NDArray[np.int64], validation: ImageSet, folder: Path, origin: Mapping[str, Any]
) -> None:
    """Writes these rows, and the whole validation split, as a folder that `robustfeat train` takes as DATA.

    Args:
        train: where the rows are taken from, in their order.
        rows: their numbers.
        validation: the other split.
        folder: appears whole or not at all.
        origin: plain data about the source and the draw; see `same_origin`.

    Raises:
        DecodeError: naming an image that cannot be read; each run would leave it out.
    """
    with new_folder(folder) as partial:
        (partial / _ORIGIN).write_text(json.dumps(origin, indent=1) + "\n", "utf-8")
        _write(train, rows, partial / "train-00000-of-00001.parquet")
        _write(validation, np.arange(len(validation)), partial / "validation-00000-of-00001.parquet")


def same_origin(folder: Path, origin: Mapping[str, Any]) -> bool:
    """Whether a folder of `write_subset` has this origin."""
    try:
        told = json.loads((folder / _ORIGIN).read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return bool(told == json.loads(json.dumps(origin)))


def _write(images: ImageSet, rows: NDArray[np.int64], file: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    column = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    # Write the class names as Hugging Face `datasets` does, so they come back with the numbers.
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": list(images.classes)}}
    schema = pa.schema(
        [("image", column), ("label", pa.int64())],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    with parquet.ParquetWriter(file, schema) as writer:
        for start in range(0, len(rows), _ROWS_A_GROUP):
            part = rows[start : start + _ROWS_A_GROUP]
            values = [{"bytes": _content(images, int(row)), "path": None} for row in part]
            writer.write_table(pa.table({"image": values, "label": images.labels[part]}, schema))


def _content(images: ImageSet, row: int) -> bytes:
    try:
        images.image(row)  # each run would leave out what cannot be decoded
        return images.read(row)
    except DecodeError as exc:
        raise DecodeError(str(exc), fix="repair or remove it") from exc
