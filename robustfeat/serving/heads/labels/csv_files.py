"""Reads CSV files of labels from spreadsheets, pandas and R."""

from __future__ import annotations

import codecs
import csv
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from robustfeat.counts import format_count
from robustfeat.errors import InputError
from robustfeat.serving.heads.cells import unquote_cell
from robustfeat.serving.heads.labels.cell import Cell, is_missing, paths_without_names
from robustfeat.serving.inputs.choice import IMAGE_SUFFIXES

__all__ = ["open_text", "read_csv"]

_PATH_COLUMNS = (
    "path", "file", "filename", "file_name", "filepath", "file_path", "image", "image_path", "image_name", "img",
    "img_path",
)  # fmt: skip
_LABEL_COLUMNS = ("label", "labels", "class")
_SEPARATORS = ",;\t"


def read_csv(file: str, label_column: str | None, path_column: str | None, *, in_order: bool = False) -> Iterator[Cell]:
    """Yields the labels of a CSV file, in order.

    Args:
        file: a file with a header; or without one and with two columns, of which the first has names of images.
        label_column, path_column: names in the header; by default common names.
        in_order: whether the file has no column of paths.

    Raises:
        InputError: the file cannot be read, or lacks a column.
    """
    reader: Any = None
    try:
        with open_text(file) as handle:
            table = _find_table(_Headers(file, handle), label_column, path_column, in_order=in_order)
            handle.seek(0)
            reader = csv.reader(handle, delimiter=table.separator, strict=True)
            for row in itertools.islice(reader, table.rows_above, None):
                if not row or not (in_order or any(row)):  # an empty line, or a spreadsheet's empty row
                    continue
                place = f"{file}, line {reader.line_num}"
                if len(row) != table.columns:
                    raise InputError(f"{place}: has {format_count(len(row), 'column')}; expected {table.columns}")
                label = unquote_cell(row[table.label_at])
                path = "" if table.path_at is None else unquote_cell(row[table.path_at])
                yield Cell(place, path, None if is_missing(label) else label)
    except csv.Error as exc:
        what = f"not a CSV file (line {reader.line_num if reader else 1}: {exc})"
        raise InputError(what, argument="labels", value=file) from exc


@contextmanager
def open_text(file: str) -> Iterator[TextIO]:
    """Opens a file of labels in UTF-8 or UTF-16. Names that are not UTF-8 keep their bytes, as in the index.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        with open(file, "rb") as raw:
            encoding = _find_encoding(raw.read(2))
        errors = "surrogateescape" if encoding == "utf-8-sig" else "strict"
        with open(file, encoding=encoding, errors=errors, newline="") as handle:
            yield handle
    except OSError as exc:
        raise InputError(f"cannot be read ({exc.strerror})", argument="labels", value=file) from exc
    except UnicodeDecodeError as exc:
        raise InputError("not text in UTF-8 or UTF-16", argument="labels", value=file) from exc


def _find_encoding(start: bytes) -> str:
    """Detects UTF-16 (Excel's Unicode text) by its mark or the zero byte in its first letter; otherwise UTF-8."""
    if start in {codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE}:
        return "utf-16"
    if len(start) == 2 and 0 in start:
        return "utf-16-be" if start[0] == 0 else "utf-16-le"
    return "utf-8-sig"


class _Headers:
    """The first row of a file, split by each separator.

    Attributes:
        file: the file's name for messages.
        by_separator: the cells by separator; empty if the row cannot be split by it.
        rows_above: number of lines above the header: Excel's line `sep=;`.
    """

    def __init__(self, file: str, handle: TextIO) -> None:
        self.file, self.rows_above = file, 0
        separators = _SEPARATORS
        first = handle.readline().rstrip("\r\n")
        if first[:-1] == "sep=":
            self.rows_above, separators = 1, first[-1]
        self.by_separator: dict[str, list[str]] = {}
        failed: csv.Error | None = None
        for separator in separators:
            handle.seek(0)
            rows = csv.reader(handle, delimiter=separator, strict=True)
            try:
                self.by_separator[separator] = next(itertools.islice(rows, self.rows_above, None), [])
            except csv.Error as exc:
                failed = exc
        if failed and not self.by_separator:
            raise failed

    def find(self, separator: str, wanted: str | None, usual: Sequence[str]) -> int | None:
        """The index of a column: the given name, or else the first common name. None if there is none.

        Raises:
            InputError: several columns have the name.
        """
        names = [name.strip() for name in self.by_separator[separator]]
        for name in usual if wanted is None else [wanted]:
            exact = [at for at, one in enumerate(names) if one == name]
            places = exact or [at for at, one in enumerate(names) if one.lower() == name.lower()]
            if len(places) > 1:
                fix = "give each column its own name"
                raise InputError(f"{self.file}: has {format_count(len(places), 'column')} named {name}", fix=fix)
            if places:
                return places[0]
        return None


@dataclass(frozen=True)
class _Table:
    separator: str
    columns: int
    label_at: int
    path_at: int | None
    rows_above: int


def _find_table(headers: _Headers, label_column: str | None, path_column: str | None, *, in_order: bool) -> _Table:
    found = {
        separator: (
            headers.find(separator, path_column, _PATH_COLUMNS),
            headers.find(separator, label_column, _LABEL_COLUMNS),
        )
        for separator in headers.by_separator
    }
    # Choose the separator with the most known columns, or else the most columns.
    separator = max(found, key=lambda one: (-found[one].count(None), len(headers.by_separator[one])))
    (path_at, label_at), header = found[separator], headers.by_separator[separator]
    if path_at is None and not (in_order or label_column or path_column):
        for one, cells in headers.by_separator.items():
            if len(cells) == 2 and Path(cells[0].strip()).suffix.lower() in IMAGE_SUFFIXES:
                return _Table(one, 2, label_at=1, path_at=0, rows_above=headers.rows_above)
    here = f"{headers.file}: has the columns {', '.join(header)}" if header else f"{headers.file}: is empty"
    if in_order and path_at is not None:
        raise paths_without_names(headers.file, header[path_at].strip())
    if path_column is not None and path_at is None:
        raise InputError(f"{here}; expected {path_column} with the paths", argument="path_column", value=path_column)
    if path_at is None and not in_order:
        fix = f"name it one of {', '.join(_PATH_COLUMNS)}, or pass its name as `path_column=COLUMN`"
        raise InputError(f"{here}; expected a column of paths", fix=fix)
    if label_at is None:
        names = label_column or " or ".join(_LABEL_COLUMNS)
        fix = f"name it as {Path(headers.file).name}:COLUMN" + (", or write a label per line to FILE.txt" * in_order)
        raise InputError(f"{here}; expected {names} for the labels", fix=fix)
    return _Table(separator, len(header), label_at, path_at, headers.rows_above + 1)
