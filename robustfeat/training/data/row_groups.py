"""Parquet files, local or not, and their row groups read on demand: images that do not fit into memory."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from robustfeat.errors import DataError, first_line
from robustfeat.serving.inputs.parquet import encoded_images, image_columns, open_parquet, other_contents
from robustfeat.training.data.order import blocks_at_once

__all__ = ["LocalParquet", "OpenedParquet", "ParquetPart", "RowGroups", "open_part", "read_images"]

MOST_BYTES = 4 * 2**30
"""Most bytes of images in a row group."""

_ROWS_AT_ONCE = 16
"""Each may be an image of hundreds of megabytes."""


class ParquetPart(Protocol):
    """One of a split's Parquet files, local or remote."""

    @property
    def name(self) -> str:
        """Without its folder."""

    @property
    def place(self) -> str:
        """The name in messages."""

    @property
    def size(self) -> int:
        """In bytes."""

    def open(self) -> Any:
        """For pyarrow, at its beginning."""

    def explaining(self) -> AbstractContextManager[None]:
        """Makes the errors of reading it ours."""


@dataclass(frozen=True)
class LocalParquet:
    """A file on this machine.

    Attributes:
        shown: what messages call it; by default its path.
    """

    path: Path
    shown: str = ""

    @property
    def name(self) -> str:
        """See `ParquetPart`, as for all here."""
        return self.path.name

    @property
    def place(self) -> str:  # noqa: D102
        return self.shown or str(self.path)

    @property
    def size(self) -> int:  # noqa: D102
        return self.path.stat().st_size

    def open(self) -> Any:  # noqa: D102
        return open_parquet(str(self.path))

    @contextmanager
    def explaining(self) -> Iterator[None]:  # noqa: D102
        import pyarrow

        try:
            yield
        except (pyarrow.ArrowException, OSError) as exc:
            if found := other_contents(str(self.path)):
                raise DataError(f"{self.place}: not a Parquet file; it is {found[0]}", fix=found[1]) from exc
            raise DataError(
                f"{self.place}: not a Parquet file, or damaged ({first_line(exc)})", fix="copy it again"
            ) from exc


@dataclass(frozen=True)
class OpenedParquet:
    """Facts about an opened file.

    Attributes:
        metadata: pyarrow's; with it, the file's footer need not be read again.
        schema: pyarrow's.
        column: the column of the images' bytes, by pyarrow's name of nested columns.
    """

    part: ParquetPart
    metadata: Any
    schema: Any
    column: str


def open_part(part: ParquetPart, handle: Any) -> tuple[OpenedParquet, Any]:
    """A file, and pyarrow's reader of it; inside `part.explaining()`.

    Raises:
        DataError: the file lacks a column, or the column has no images.
    """
    from pyarrow import parquet

    reader = parquet.ParquetFile(handle, pre_buffer=False)
    schema, rows = reader.schema_arrow, reader.metadata.num_rows
    if rows > part.size:  # just the labels would fill the memory
        raise DataError(
            f"{part.place}: claims {rows:,} rows in {part.size:,} bytes", fix="write it again, each image once"
        )
    if not {"image", "label"} <= set(schema.names):
        got = ", ".join(schema.names) or "none"
        raise DataError(f"{part.place}: needs the columns image and label; got {got}")
    columns = image_columns(schema, nulls=True)
    if "image" not in columns:
        kind = schema.field("image").type
        raise DataError(f"{part.place}: the column image must hold encoded images (bytes); got {kind}")
    return OpenedParquet(part, reader.metadata, schema, columns["image"]), reader


def read_images(
    reader: Any, column: str, groups: Sequence[int], most: int, *, threads: bool = False
) -> list[Any] | None:
    """The images of some row groups, as Arrow arrays, some rows each; None where they are more than `most` bytes.

    Few bytes of Parquet may hold many times as many, whatever the file says of itself.
    """
    held, arrays = 0, []
    # Arrow's threads would compete with the processes that decode.
    for batch in reader.iter_batches(_ROWS_AT_ONCE, row_groups=groups, columns=[column], use_threads=threads):
        array = batch.column(0)
        held += array.nbytes
        if held > most:
            return None
        arrays.append(array)
    return arrays


class RowGroups:
    """Image bytes, read a row group at a time, which stays until each of its rows was read or others push it out.

    Reads are quick where they follow `epoch_order`, or the rows' own order. Each process holds row groups of its own.

    Args:
        files: in the order of the rows.
        rows: (N,) which of all rows these are, in this order; None for all.
    """

    def __init__(self, files: Sequence[OpenedParquet], rows: NDArray[np.int64] | None = None) -> None:
        self._files, self._rows = files, rows
        counts = [
            (file, group, opened.metadata.row_group(group).num_rows)
            for file, opened in enumerate(files)
            for group in range(opened.metadata.num_row_groups)
        ]
        self._groups = [(file, group) for file, group, count in counts if count]
        self._sizes = np.array([count for *_, count in counts if count], np.int64)
        self.blocks = np.concatenate([[0], np.cumsum(self._sizes)])
        self._uses = self._sizes
        if rows is not None:
            self._uses = np.bincount(self._block_of(rows), minlength=len(self._groups))
        self._process = -1
        self._held: OrderedDict[int, _Held] = OrderedDict()
        self._capacity = 0

    def subset(self, indices: NDArray[np.int64]) -> RowGroups:
        """These rows, in this order."""
        return RowGroups(self._files, indices if self._rows is None else self._rows[indices])

    def read(self, index: int) -> bytes:
        """An image's bytes.

        Raises:
            DataError: the row group cannot be read.
        """
        row = index if self._rows is None else int(self._rows[index])
        block = int(self._block_of(row))
        held = self._hold(block)
        value = held.images[row - int(self.blocks[block])].as_py()
        held.left -= 1
        if held.left <= 0:
            del self._held[block]
        return bytes(value or b"")

    def name(self, index: int) -> str:
        """The file and the row in it."""
        row = index if self._rows is None else int(self._rows[index])
        block = int(self._block_of(row))
        file = self._groups[block][0]
        first = next(number for number, (of, _) in enumerate(self._groups) if of == file)
        return f"{self._files[file].part.name} row {row - int(self.blocks[first])}"

    def _block_of(self, row: Any) -> Any:
        return np.searchsorted(self.blocks, row, side="right") - 1

    def _hold(self, block: int) -> _Held:
        if self._process != os.getpid():  # what a forked worker inherits is of no use to it
            self._process, self._held = os.getpid(), OrderedDict()
            self._capacity = blocks_at_once(int(np.count_nonzero(self._uses)), _workers())
        if block in self._held:
            self._held.move_to_end(block)
        else:
            while len(self._held) >= self._capacity:
                self._held.popitem(last=False)
            self._held[block] = _Held(self._load(block), int(self._uses[block]))
        return self._held[block]

    def _load(self, block: int) -> Any:
        import pyarrow
        from pyarrow import parquet

        file, group = self._groups[block]
        opened = self._files[file]
        with opened.part.explaining(), opened.part.open() as handle:
            reader = parquet.ParquetFile(handle, metadata=opened.metadata, pre_buffer=False)
            arrays = read_images(reader, opened.column, [group], MOST_BYTES)
        if arrays is None:
            raise DataError(
                f"{opened.part.place}: row group {group} holds more than {MOST_BYTES:,} bytes of images",
                fix="write it with fewer rows a group",
            )
        return encoded_images(pyarrow.chunked_array(arrays))


@dataclass
class _Held:
    images: Any  # an Arrow array in chunks
    left: int  # rows not read yet


def _workers() -> int:
    """Number of processes that share the rows."""
    from torch.utils.data import get_worker_info

    about: Callable[[], Any] = get_worker_info
    info = about()
    return info.num_workers if info else 0
