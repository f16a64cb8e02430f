"""Rows of a list of inputs in parts for one decoder each, with what this process reads of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from robustfeat.serving.inputs.parquet import ParquetSources
from robustfeat.serving.inputs.sources import ImageSource

__all__ = ["PartReader", "size_of"]

_PARQUET_MARK = b',"parquet",'
_PART_BYTES = 2**24


class PartReader:
    """Cuts lines into parts, and reads those of Parquet files.

    Rows of Parquet files are read here, once and in order; decoders would each read whole row groups. They may be
    large, so that fewer of them are a part.
    """

    def __init__(self) -> None:
        self._parquet = ParquetSources()

    def parts(self, lines: Sequence[bytes], part: int) -> Iterator[tuple[list[bytes], list[bytes | str | None] | None]]:
        """Neighbouring rows, at most `part` of them at a time, and `Task.data` of them.

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
    """Bytes of the encoded images in `Task.data`."""
    return sum(len(image) for image in data or () if isinstance(image, bytes))
