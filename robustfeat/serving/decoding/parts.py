"""Cuts a list of inputs into parts for decoders, and reads rows of Parquet files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from robustfeat.serving.inputs.parquet import ParquetSources
from robustfeat.serving.inputs.sources import ImageSource

__all__ = ["PartReader", "size_of"]

_PARQUET_MARK = b',"parquet",'
_PART_BYTES = 2**24


class PartReader:
    """Cuts lines into parts, and reads rows of Parquet files.

    Parquet rows are read here, once and in order, since each decoder would read whole row groups. Large rows make
    smaller parts.
    """

    def __init__(self) -> None:
        self._parquet = ParquetSources()

    def parts(self, lines: Sequence[bytes], part: int) -> Iterator[tuple[list[bytes], list[bytes | str | None] | None]]:
        """Yields parts of at most `part` consecutive rows, with their `Task.data`.

        Raises:
            InputError: a Parquet file or remote storage cannot be read.
        """
        if not any(_PARQUET_MARK in line for line in lines):
            yield from ((list(lines[start : start + part]), None) for start in range(0, len(lines), part))
            return
        rows: list[bytes] = []
        data: list[bytes | str | None] = []
        size = 0
        for line in lines:
            rows.append(line)
            source = ImageSource.from_line(line)
            data.append(self._parquet.read(source) if source.kind == "parquet" else None)
            size += size_of(data[-1:])
            if len(rows) == part or size >= _PART_BYTES:
                yield rows, data
                rows, data, size = [], [], 0
        if rows:
            yield rows, data


def size_of(data: Sequence[bytes | str | None] | None) -> int:
    """Size of the encoded images in `Task.data`, in bytes."""
    return sum(len(image) for image in data or () if isinstance(image, bytes))
