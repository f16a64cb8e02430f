"""Labels from class folders, CSV and Parquet files."""

from __future__ import annotations

import codecs
import csv
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from robustfeat.errors import InputError, first_line
from robustfeat.serving.heads.cells import SEPARATOR, unquote_cell
from robustfeat.serving.heads.labels.labels import Labels, check_label
from robustfeat.serving.inputs.choice import IMAGE_SUFFIXES
from robustfeat.serving.inputs.parquet import class_names, open_parquet, parquet_path

__all__ = ["read_labels"]

_PATH_COLUMNS = (
    "path", "file", "filename", "file_name", "filepath", "file_path", "image", "image_path", "image_name", "img",
    "img_path",
)  # fmt: skip
_LABEL_COLUMNS = ("label", "labels", "class")
_MISSING = {"NA", "N/A", "#N/A", "<NA>", "NaN", "nan", "NULL", "null"}
"""What R, pandas and databases write where a label is missing."""
_SEPARATORS = ",;\t"
_FILE = re.compile(r"(?P<file>.*\.(?P<kind>csv|parquet))(:(?P<column>.+))?", re.IGNORECASE | re.DOTALL)


def read_labels(labels: Sequence[str], *, multi_label: bool = False) -> Labels:
    """Labels from `folder`, FILE.csv, FILE.csv:COLUMN or FILE.parquet:COLUMN.

    A CSV file has a header with a column for the path (path, filename, image_path and the like) and one for the label
    (label, labels, class or COLUMN), or no header and two columns. Commas, semicolons or tabs separate its columns; it
    is UTF-8 or UTF-16. A Parquet file has a column `path`; one without it labels its own rows, by the paths that
    `embed` gives them. Rows without a label, or with NA or NaN in a CSV file, are unlabelled.

    Args:
        labels: one of these, or several files.
        multi_label: an image may have several labels: `cat|dog`, a list in Parquet, or several rows. A row with an
            empty label is then an image that has none of them.

    Raises:
        InputError: a file cannot be read, or labels a path twice.
    """
    if list(labels) == ["folder"]:
        if multi_label:
            raise InputError(
                "gives one label an image; several need a .csv or .parquet file", argument="labels", value="folder"
            )
        return Labels("folder", None)
    found: dict[str, tuple[str, ...]] = {}
    repeated = 0
    for source in labels:
        match = _FILE.fullmatch(source)
        if match is None:
            raise InputError(
                "expected folder, FILE.csv, FILE.csv:COLUMN or FILE.parquet:COLUMN", argument="labels", value=source
            )
        read = _read_csv if match["kind"].lower() == "csv" else _read_parquet
        for place, path, cell in read(match["file"], match["column"]):
            own = _split(cell, place, multi_label=multi_label)
            if own is None:
                continue
            if found.get(path) == own:
                repeated += 1
            elif path in found and not multi_label:
                raise InputError(
                    f"{place}: {path} is labelled a second time ({own[0]!r}, and {found[path][0]!r} before)",
                    fix="leave one, or pass `multi_label=True`",
                )
            found[path] = tuple(sorted({*found.get(path, ()), *own}))
    if not found:
        raise InputError("holds no labels", argument="labels", value=", ".join(labels))
    return Labels(", ".join(labels), found, repeated)


def _split(cell: Any, place: str, *, multi_label: bool) -> tuple[str, ...] | None:
    if isinstance(cell, list):
        if not multi_label:
            raise InputError(f"{place}: holds a list of labels", fix="pass `multi_label=True`")
        return tuple(check_label(str(label), place) for label in cell if label is not None)
    if cell is None or cell != cell:  # noqa: PLR0124 - NaN
        return None
    if isinstance(cell, (bytes, dict)):
        raise InputError(f"{place}: a label must be text or a number; got {type(cell).__name__}")
    text = check_label(str(cell), place).strip()
    if multi_label:
        return tuple(part.strip() for part in text.split(SEPARATOR) if part.strip())
    return (text,) if text else None


def _read_csv(file: str, column: str | None) -> Iterator[tuple[str, str, Any]]:
    reader: Any = None
    try:
        with _open_text(file) as handle:
            separator = _separator(handle.readline())
            handle.seek(0)
            reader = csv.reader(handle, delimiter=separator, strict=True)
            first: list[str] = next(reader, [])
            names = [name.strip().lower() for name in first]
            path_at = next((names.index(name) for name in _PATH_COLUMNS if name in names), None)
            if column is not None:
                label_at = first.index(column) if column in first else None
            else:
                label_at = next((names.index(name) for name in _LABEL_COLUMNS if name in names), None)
            rows: Iterable[list[str]] = reader
            if path_at is None and column is None and len(first) == 2 and _is_image_name(first[0]):
                path_at, label_at, rows = 0, 1, _chain(first, reader)
            if path_at is None or label_at is None:
                raise _missing_column(file, first, column, path=path_at is None)
            for row in rows:
                if not row:
                    continue
                place = f"{file}, line {reader.line_num}"
                if len(row) != len(first):
                    raise InputError(f"{place}: has {len(row)} columns; expected {len(first)}")
                label = unquote_cell(row[label_at])
                yield place, unquote_cell(row[path_at]).removeprefix("./"), None if label in _MISSING else label
    except OSError as exc:
        raise InputError(f"cannot be read ({exc.strerror})", argument="labels", value=file) from exc
    except UnicodeDecodeError as exc:
        raise InputError("not text in UTF-8 or UTF-16", argument="labels", value=file) from exc
    except csv.Error as exc:
        what = f"not a CSV file (line {reader.line_num if reader else 1}: {exc})"
        raise InputError(what, argument="labels", value=file) from exc


def _open_text(file: str) -> TextIO:
    """A CSV file. Names that are not UTF-8 keep their bytes, as in the index."""
    with open(file, "rb") as handle:
        mark = handle.read(2)
    if mark in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):  # of Excel's "Unicode text"
        return open(file, encoding="utf-16", newline="")
    return open(file, encoding="utf-8-sig", errors="surrogateescape", newline="")


def _separator(header: str) -> str:
    """What parts the columns of a header: the one that gives most of them."""
    return max(_SEPARATORS, key=lambda mark: len(next(csv.reader([header], delimiter=mark), [])))


def _missing_column(file: str, found: Sequence[str], column: str | None, *, path: bool) -> InputError:
    here = f"{file}: has the columns {', '.join(found)}" if found else f"{file}: is empty"
    if path:
        return InputError(f"{here}; expected one with paths", fix=f"name it one of {', '.join(_PATH_COLUMNS)}")
    names = column or " or ".join(_LABEL_COLUMNS)
    return InputError(f"{here}; expected {names} for the labels", fix=f"name it as {Path(file).name}:COLUMN")


def _chain(first: list[str], rest: Iterator[list[str]]) -> Iterator[list[str]]:
    yield first
    yield from rest


def _is_image_name(name: str) -> bool:
    return Path(name.strip()).suffix.lower() in IMAGE_SUFFIXES


def _read_parquet(file: str, column: str | None) -> Iterator[tuple[str, str, Any]]:
    from pyarrow import parquet

    if column is None:
        raise InputError(f"name the column of labels, as {file}:COLUMN", argument="labels", value=file)
    try:
        with open_parquet(file) as handle:
            found = parquet.ParquetFile(handle)
            if column not in found.schema_arrow.names:
                raise InputError(f"{file}: has no column {column!r}; it has {', '.join(found.schema_arrow.names)}")
            names = class_names(found.schema_arrow, column)
            own = "image" in found.schema_arrow.names  # images and their labels in one file
            columns = [column] if own or "path" not in found.schema_arrow.names else ["path", column]
            row = 0
            for batch in found.iter_batches(columns=columns):
                values = batch.to_pydict()
                for at, cell in enumerate(values[column]):
                    path = values["path"][at] if "path" in values else parquet_path(Path(file).name, row)
                    place = f"{file}, row {row}"
                    yield place, str(path).removeprefix("./"), _named(cell, names, place)
                    row += 1
    except InputError:
        raise
    except Exception as exc:  # Arrow has its own, and so has each filesystem
        raise InputError(f"cannot be read ({first_line(exc)})", argument="labels", value=file) from exc


def _named(cell: Any, names: tuple[str, ...] | None, place: str) -> Any:
    """A class number by its name. Hugging Face marks a missing label by -1."""
    if isinstance(cell, list):
        return [_named(one, names, place) for one in cell]
    if names is None or not isinstance(cell, int):
        return cell
    if not -1 <= cell < len(names):
        raise InputError(f"{place}: label {cell} is none of the {len(names)} classes that the file names")
    return names[cell] if cell >= 0 else None
