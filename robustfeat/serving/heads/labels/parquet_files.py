"""Reads Parquet files of labels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from robustfeat.errors import InputError, first_line
from robustfeat.serving.heads.labels.cell import Cell, paths_without_names
from robustfeat.serving.inputs.parquet import class_names, open_parquet, parquet_path

__all__ = ["read_parquet"]


def read_parquet(
    file: str, label_column: str | None, path_column: str | None, *, in_order: bool = False
) -> Iterator[Cell]:
    """Yields the labels of a Parquet file, in order.

    Args:
        file: a local or remote file.
        label_column: the column of labels, which must be given.
        path_column: the column of paths, by default `path`. A file without it, or with images in a column `image`,
            labels its own rows by the paths that `embed` gives them.
        in_order: whether the file has no paths, or only those that `embed` gives its rows.

    Raises:
        InputError: the file cannot be read, or lacks a column.
    """
    from pyarrow import parquet

    if label_column is None:
        raise InputError(f"name the column of labels, as {file}:COLUMN", argument="labels", value=file)
    try:
        with open_parquet(file) as handle:
            found = parquet.ParquetFile(handle)
            columns = found.schema_arrow.names
            for column in (label_column, path_column):
                if column is not None and column not in columns:
                    raise InputError(f"{file}: has no column {column!r}; it has {', '.join(columns)}")
            names = class_names(found.schema_arrow, label_column)
            if path_column is None and "path" in columns and "image" not in columns:
                path_column = "path"
            if in_order and path_column is not None:
                raise paths_without_names(file, path_column)
            row = 0
            for batch in found.iter_batches(columns=[one for one in (path_column, label_column) if one is not None]):
                values = batch.to_pydict()
                for at, value in enumerate(values[label_column]):
                    place = f"{file}, row {row}"
                    path = parquet_path(Path(file).name, row) if path_column is None else values[path_column][at]
                    yield Cell(place, "" if path is None else str(path), _named(value, names, place))
                    row += 1
    except InputError:
        raise
    except Exception as exc:  # Arrow and each filesystem raise their own errors
        raise InputError(f"cannot be read ({first_line(exc)})", argument="labels", value=file) from exc


def _named(cell: Any, names: tuple[str, ...] | None, place: str) -> Any:
    """The name of a class number. Hugging Face marks a missing label by -1."""
    if isinstance(cell, list):
        return [_named(one, names, place) for one in cell]
    if names is None or not isinstance(cell, int):
        return cell
    if not -1 <= cell < len(names):
        raise InputError(f"{place}: label {cell} is not one of the {len(names)} classes in the file")
    return names[cell] if cell >= 0 else None
