"""Parquet files with the columns `image` and `label`, as Hugging Face `datasets` writes them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustfeat.errors import DataError
from robustfeat.serving.inputs.parquet import class_names, encoded_images
from robustfeat.training.data.image_set import ImageSet, Source, sort_classes
from robustfeat.training.data.row_groups import OpenedParquet, ParquetPart, RowGroups, open_part, read_images

__all__ = ["LARGE_BYTES", "ParquetSplit", "read_parquet"]

LARGE_BYTES = 4 * 2**30
"""A split whose files have more bytes, or whose images take half as much again, stays where it is; a smaller one is
held in memory."""

_FOOTERS_AT_ONCE = 16


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
        labels: labels from the files, numbers or text.
        class_names: from the files' metadata, where they have it.
        blocks: see `ImageSet`.
    """

    files: Sequence[ParquetPart]
    source: Source
    labels: list[Any]
    class_names: tuple[str, ...] | None
    blocks: NDArray[np.int64] | None = None

    def classes(self) -> tuple[str, ...]:
        """The class names: from the metadata, in its order unless they are numbers, or the labels themselves."""
        names = self.class_names
        if names is None:
            return sort_classes(self.labels)
        # Folders named 0 to 999 are written in the order of the text: 0, 1, 10, 100.
        return sort_classes(names) if all(str(name).isdecimal() for name in names) else names

    def to_image_set(self, classes: tuple[str, ...], *, indexed: bool) -> ImageSet:
        """Labels as numbers within `classes`; `indexed`: numbers in the files are positions in the metadata's names."""
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
            digest.update(f"{file.name}\0{file.size}\n".encode())
        return ImageSet(classes, labels, self.source, digest.hexdigest(), self.blocks)


def read_parquet(files: Sequence[ParquetPart], *, stream: bool = False) -> ParquetSplit:
    """The rows of `files`, in order: their labels, and where their images are.

    Args:
        files: the files of one split.
        stream: leave the images where they are, however few they are.

    Raises:
        DataError: a file is damaged or has other columns, or a row has no label.
        HubError: a file of the Hub cannot be read.
    """
    on_demand = stream or sum(file.size for file in files) > LARGE_BYTES

    def read(part: ParquetPart) -> tuple[OpenedParquet, list[Any]]:
        with part.explaining(), part.open() as handle:
            opened, reader = open_part(part, handle)
            return opened, reader.read(columns=["label"]).column(0).to_pylist()

    if on_demand:  # a network takes its time to answer for each
        with ThreadPoolExecutor(_FOOTERS_AT_ONCE) as pool:
            parts = list(pool.map(read, files))
    else:
        parts = [read(file) for file in files]
    chunks = None if on_demand else _read_all([opened for opened, _ in parts])
    labels: list[Any] = []
    places: list[tuple[str, int]] = []
    for opened, own in parts:
        places.append((opened.part.name, len(labels)))
        labels += own
    if not labels:
        raise DataError(f"{files[0].place}: holds no rows; expected images and their labels")
    names = _class_names([opened for opened, _ in parts])
    source: Source
    if chunks is None:
        source = groups = RowGroups([opened for opened, _ in parts])
        blocks = groups.blocks
    else:
        source, blocks = _Rows(chunks, places), None
    for row, label in enumerate(labels):
        if not _names_a_class(label):
            raise DataError(
                f"{source.name(row)} has no label ({label!r})", fix="every row needs one, text or a number from 0"
            )
    return ParquetSplit(files, source, labels, names, blocks)


def _read_all(parts: Sequence[OpenedParquet]) -> list[Any] | None:
    """The images of all rows, as Arrow arrays; None where they take more memory than a split may."""
    from pyarrow import parquet

    left, chunks = LARGE_BYTES + LARGE_BYTES // 2, []
    for opened in parts:
        with opened.part.explaining(), opened.part.open() as handle:
            reader = parquet.ParquetFile(handle, metadata=opened.metadata, pre_buffer=False)
            arrays = read_images(reader, opened.column, range(reader.num_row_groups), left, threads=True)
        if arrays is None:
            return None
        left -= sum(array.nbytes for array in arrays)
        chunks += [encoded_images(array) for array in arrays]
    return chunks


def _names_a_class(label: Any) -> bool:
    """Whether it is text or a number from 0: -1 stands for none in published sets, and NaN in tables."""
    return bool(label) if isinstance(label, str) else isinstance(label, int | float) and label >= 0


def _class_names(parts: Sequence[OpenedParquet]) -> tuple[str, ...] | None:
    """The names that the parts give to their labels; None where none of them does."""
    named = [(part.part.name, names) for part in parts if (names := class_names(part.schema, "label"))]
    for file, names in named[1:]:
        if names != named[0][1]:
            raise DataError(
                f"{file}: its class names are not those of {named[0][0]}, or in another order; the same number would "
                "mean two classes",
                fix="write both with the same names",
            )
    if not named:
        return None
    file, names = named[0]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise DataError(f"{file}: two of its classes are called {repeated!r}", fix="give each a name of its own")
    return names
