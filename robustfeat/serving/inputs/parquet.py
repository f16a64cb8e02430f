"""Finds the image column of Parquet files and reads rows in order."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from typing import Any

from robustfeat.errors import InputError, first_line
from robustfeat.hub.image_files import name_contents
from robustfeat.serving.inputs.remote import is_remote, open_remote
from robustfeat.serving.inputs.sources import MAX_FILE_BYTES, ImageSource

__all__ = [
    "ParquetImages",
    "ParquetSources",
    "class_names",
    "encoded_images",
    "find_images",
    "image_columns",
    "open_parquet",
    "other_contents",
    "parquet_path",
]


def parquet_path(name: str, row: int) -> str:
    """The path of a Parquet row in the index.

    With nine digits, the byte order of the paths is the order of the rows.
    """
    return f"{name}/{row:09}"


def image_columns(schema: Any, *, nulls: bool = False) -> dict[str, str]:
    """Columns of encoded images by name, each with pyarrow's name of the bytes inside it.

    Images are a binary column, or a struct with a binary field `bytes` as Hugging Face writes it.

    Args:
        nulls: also accept columns of only nulls, whose type is unknown.
    """
    from pyarrow import types

    found = {}
    for field in schema:
        kind, path = field.type, field.name
        if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            kind, path = kind.field("bytes").type, f"{field.name}.bytes"
        if types.is_dictionary(kind):
            kind = kind.value_type
        binary = types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)
        if binary or (nulls and types.is_null(kind)):
            found[field.name] = path
    return found


def encoded_images(values: Any) -> Any:
    """The bytes of an Arrow array of images, which may be structs."""
    from pyarrow import compute, types

    return compute.struct_field(values, "bytes") if types.is_struct(values.type) else values


def class_names(schema: Any, column: str) -> tuple[str, ...] | None:
    """The class names of a column of numbers, which Hugging Face `datasets` stores in the schema's metadata."""
    raw = (schema.metadata or {}).get(b"huggingface")
    try:
        kind = json.loads(raw or b"{}")["info"]["features"][column]
        names = kind.get("feature", kind).get("names")  # the column has lists of classes, or one class per row
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        return None
    is_text = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return tuple(names) if names and is_text else None


def find_images(file: str, column: str | None) -> tuple[str, int]:
    """Finds the column of encoded images and the number of rows; see `image_columns`.

    Raises:
        InputError: the file cannot be read, claims more rows than bytes, has no such column, or has several and none
            was named.
    """
    from pyarrow import parquet

    try:
        with open_parquet(file) as handle:
            found = parquet.ParquetFile(handle)
            schema, rows = found.schema_arrow, int(found.metadata.num_rows)
            size = int(handle.seek(0, os.SEEK_END))
    except InputError:
        raise
    except Exception as exc:  # each filesystem has its own
        if found := other_contents(file):
            raise InputError(f"{file}: not a Parquet file; it is {found[0]}", fix=found[1]) from exc
        raise InputError(f"{file}: not a readable Parquet file ({first_line(exc)})") from exc
    if rows > size:  # a list of that many inputs would fill the disk
        raise InputError(f"{file}: claims {rows:,} rows in {size:,} bytes", fix="write it again, each image once")
    names = list(image_columns(schema))
    if column is None and len(names) > 1 and "image" in names:
        column = "image"
    if column is None and len(names) == 1:
        column = names[0]
    if column not in names:
        wanted = f"no column {column!r} of image bytes" if column else "no single column of image bytes"
        columns = ", ".join(names) or "none"
        fix = f"name one as {os.path.basename(file)}:COLUMN"
        if not names:
            fix = "write the images' bytes into it, or list their paths in a file and pass that as `files_from`"
        raise InputError(f"{file}: has {wanted}; it has {columns}", fix=fix)
    return str(column), rows


def other_contents(file: str) -> tuple[str, str] | None:
    """The type of a file that is not Parquet and how to convert it, if its first bytes identify it."""
    try:
        with open_parquet(file) as handle:
            head = handle.read(1024)
            return None if head.startswith(b"PAR1") else name_contents(head)
    except Exception:  # each filesystem has its own
        return None


def open_parquet(file: str) -> Any:
    """Opens a local or remote Parquet file for pyarrow."""
    import pyarrow

    if is_remote(file):
        filesystem, path = open_remote(file)
        return filesystem.open(path, "rb")
    return pyarrow.OSFile(file, "rb")


class ParquetImages:
    """Reads rows of one Parquet file in ascending order, one at a time: few bytes may expand to many large rows."""

    _SKIPPED_ROWS = 640
    """Distance of a row from the last one beyond which reading restarts at its row group."""

    def __init__(self, file: str, column: str) -> None:
        self.file, self.column = file, column
        self._rows: Iterator[Any] | None = None
        self._next = 0

    def read(self, row: int) -> bytes | str:
        """The encoded image of a row, or the reason why it has none.

        Raises:
            InputError: the file cannot be read, or no longer.
        """
        try:
            if self._rows is None or not 0 <= row - self._next < self._SKIPPED_ROWS:
                self._rows, self._next = self._from(row), row
            for _ in range(self._next, row):
                next(self._rows)
            self._next = row + 1
            return _image_of(next(self._rows)[0])
        except InputError:
            raise
        except Exception as exc:  # each filesystem has its own
            raise InputError(f"{self.file}: cannot be read ({first_line(exc)})") from exc

    def _from(self, row: int) -> Iterator[Any]:
        """Yields Arrow arrays of one row each."""
        from pyarrow import parquet

        with open_parquet(self.file) as handle:
            file = parquet.ParquetFile(handle, pre_buffer=False)
            group, first = 0, 0
            while row >= first + file.metadata.row_group(group).num_rows:
                first += file.metadata.row_group(group).num_rows
                group += 1
            groups = list(range(group, file.metadata.num_row_groups))
            batches = file.iter_batches(1, row_groups=groups, columns=[self.column])
            yield from (batch.column(0) for batch in itertools.islice(batches, row - first, None))


class ParquetSources:
    """Reads inputs that are rows of Parquet files. It is fast for rows in the order of a file."""

    def __init__(self) -> None:
        self._images: ParquetImages | None = None

    def read(self, source: ImageSource) -> bytes | str:
        """The encoded image, or the reason why there is none; see `ParquetImages.read`."""
        if self._images is None or (self._images.file, self._images.column) != (source.file, source.detail):
            self._images = ParquetImages(source.file, source.detail)
        return self._images.read(source.at)


def _image_of(cell: Any) -> bytes | str:
    """The image in an Arrow value of an image column, or the reason why there is none."""
    from pyarrow import types

    value, path = cell, None
    if types.is_struct(cell.type):
        value = cell["bytes"] if cell.is_valid else None
        path = cell["path"].as_py() if cell.is_valid and cell.type.get_field_index("path") >= 0 else None
    if value is not None and types.is_dictionary(value.type):
        value = value.value
    if value is None or not value.is_valid:
        where = f"the path {path!r} and no bytes; write the images into the file" if path else "no image"
        return f"the row holds {where}"
    content = value.as_buffer()  # Arrow's own memory, copied only if it is not too large
    if len(content) > MAX_FILE_BYTES:
        return f"over the limit of {MAX_FILE_BYTES:,} bytes"
    return bytes(content)
