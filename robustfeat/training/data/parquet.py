"""Parquet files with the columns `image` and `label`, as Hugging Face `datasets` writes them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from robustfeat.errors import DataError, first_line
from robustfeat.serving.sources import class_names
from robustfeat.training.data.image_set import ImageSet

__all__ = ["ParquetSplit", "read_parquet"]


class _Rows:
    """Image bytes from a column in memory."""

    def __init__(self, chunks: Sequence[Any], places: Sequence[tuple[str, int]]) -> None:
        # One Arrow array a chunk: a lookup by (chunk, row) copies one image, not the column.
        self._chunks = chunks
        self._starts = np.cumsum([0] + [len(chunk) for chunk in chunks])
        self._places = places

    def read(self, index: int) -> bytes:
        chunk = int(np.searchsorted(self._starts, index, side="right")) - 1
        value = self._chunks[chunk][index - int(self._starts[chunk])].as_py()
        return bytes(value or b"")

    def name(self, index: int) -> str:
        file = int(np.searchsorted([start for _, start in self._places], index, side="right")) - 1
        name, start = self._places[file]
        return f"{name} row {index - start}"


@dataclass(frozen=True)
class ParquetSplit:
    """The rows of a split's files.

    Attributes:
        labels: as they stand in the files, numbers or text.
        class_names: from the files' metadata, where they have it.
    """

    files: Sequence[Path]
    source: _Rows
    labels: list[Any]
    class_names: tuple[str, ...] | None

    def to_image_set(self, classes: tuple[str, ...], *, indexed: bool) -> ImageSet:
        """Labels as numbers within `classes`; `indexed`: numbers in the files are such numbers already."""
        own_names = dict(enumerate(self.class_names or classes))
        index = {name: number for number, name in enumerate(classes)}
        numbers = []
        for row, label in enumerate(self.labels):
            try:
                numbers.append(index[own_names[label] if indexed and isinstance(label, int) else str(label)])
            except KeyError:
                raise DataError(
                    f"{self.source.name(row)}: label {label!r} is none of the training split's {len(classes)} classes"
                ) from None
        labels = np.array(numbers, np.int64)
        digest = hashlib.sha256("\n".join(classes).encode())
        digest.update(labels.tobytes())
        for file in self.files:
            digest.update(f"{file.name}\0{file.stat().st_size}\n".encode())
        return ImageSet(classes, labels, self.source, digest.hexdigest())


def read_parquet(files: Sequence[Path]) -> ParquetSplit:
    """The rows of `files`, in order.

    Raises:
        DataError: a file is damaged or has other columns, or a row has no label.
    """
    import pyarrow
    import pyarrow.parquet

    chunks: list[Any] = []
    places: list[tuple[str, int]] = []
    labels: list[Any] = []
    names: tuple[str, ...] | None = None
    for file in files:
        try:
            table = pyarrow.parquet.read_table(file, columns=["image", "label"])
        except (pyarrow.ArrowException, OSError) as exc:
            raise DataError(f"{file}: not a Parquet file with the columns image and label ({first_line(exc)})") from exc
        if set(table.column_names) != {"image", "label"}:
            got = ", ".join(table.column_names) or "others"
            raise DataError(f"{file}: needs the columns image and label; got {got}")
        names = names or class_names(table.schema, "label")
        places.append((file.name, len(labels)))
        for chunk in table.column("image").chunks:
            chunks.append(chunk.field("bytes") if pyarrow.types.is_struct(chunk.type) else chunk)
        labels.extend(table.column("label").to_pylist())
    if not labels:
        raise DataError(f"{files[0]}: holds no rows; expected images and their labels")
    if None in labels:
        raise DataError(f"{files[0].parent}: row {labels.index(None)} has no label; every row needs one")
    return ParquetSplit(files, _Rows(chunks, places), labels, names)
