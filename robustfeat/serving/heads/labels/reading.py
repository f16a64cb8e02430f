"""Reads labels from class folders, CSV and Parquet files, and lists in row order."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from robustfeat.counts import format_count
from robustfeat.errors import InputError, first_line
from robustfeat.serving.heads.cells import SEPARATOR
from robustfeat.serving.heads.features import row_name
from robustfeat.serving.heads.labels.cell import Cell, is_missing
from robustfeat.serving.heads.labels.csv_files import open_text, read_csv
from robustfeat.serving.heads.labels.labels import Labels, check_label
from robustfeat.serving.heads.labels.parquet_files import read_parquet

__all__ = ["label_file", "read_labels"]

_FILE = re.compile(r"(?P<file>.*\.(?P<kind>csv|tsv|parquet|txt|npy))(:(?P<column>.+))?", re.IGNORECASE | re.DOTALL)


def read_labels(
    labels: Sequence[str], *, multi_label: bool = False, path_column: str | None = None, rows: int | None = None
) -> Labels:
    """Reads labels from `folder`, FILE.csv, FILE.csv:COLUMN or FILE.parquet:COLUMN.

    A CSV file has a header with a column of paths (path, filename, image_path and similar, or `path_column`) and a
    column of labels (label, labels, class or COLUMN), or no header and two columns. It is UTF-8 or UTF-16, separated by
    commas, semicolons or tabs. A Parquet file has a column `path`, or else labels its own rows by the paths that
    `embed` gives them. Rows without a label, or with NA or NaN in a CSV file, are unlabelled.

    Labels of rows without names are in row order: FILE.csv or FILE.parquet:COLUMN without paths, one label per line in
    FILE.txt, or an array in FILE.npy.

    Args:
        labels: one of these, or several files.
        multi_label: whether an image may have several labels: `cat|dog`, a list in Parquet, or several rows. An empty
            label then means an image without any.
        path_column: the column of paths, if it has another name.
        rows: number of rows without names.

    Raises:
        InputError: a file cannot be read or labels a path twice, or the number of labels and rows differ.
    """
    if list(labels) == ["folder"]:
        return _folders(multi_label=multi_label, path_column=path_column, rows=rows)
    found: dict[str, tuple[str, ...]] = {}
    repeated = count = 0
    for source in labels:
        for cell in _read(source, path_column, in_order=rows is not None):
            path = cell.path.removeprefix("./") if rows is None else row_name(count)
            count += 1
            own = _split(cell.value, cell.place, multi_label=multi_label)
            if own is None:
                continue
            if found.get(path) == own:
                repeated += 1
            elif path in found and not multi_label:
                raise InputError(
                    f"{cell.place}: {path} is labelled a second time ({own[0]!r}, and {found[path][0]!r} before)",
                    fix="leave one, or pass `multi_label=True`",
                )
            found[path] = tuple(sorted({*found.get(path, ()), *own}))
    names = ", ".join(labels)
    if rows is not None and count != rows:
        had = format_count(count, "label")
        what = f"has {had} and no paths; expected one label for each of the {rows:,} rows, in order"
        raise InputError(what, argument="labels", value=names, fix="write NA where a label is missing")
    if not found:
        raise InputError("contains no labels", argument="labels", value=names)
    return Labels(names, found, repeated)


def label_file(source: str) -> str:
    """The file in a source of labels, without its column. For example, `labels.csv:colour` gives labels.csv."""
    match = _FILE.fullmatch(source)
    return match["file"] if match else source


def _folders(*, multi_label: bool, path_column: str | None, rows: int | None) -> Labels:
    if multi_label:
        what = "gives one label per image; several need a .csv or .parquet file"
        raise InputError(what, argument="labels", value="folder")
    if path_column is not None:
        raise InputError("needs a file of labels", argument="path_column", value=path_column, fix="leave it out")
    if rows is not None:
        fix = "pass the path of each row as `names=FILE`, or a file of labels in row order"
        raise InputError("the rows have no paths", argument="labels", value="folder", fix=fix)
    return Labels("folder", None)


def _read(source: str, path_column: str | None, *, in_order: bool) -> Iterator[Cell]:
    match = _FILE.fullmatch(source)
    kind = match["kind"].lower() if match else ""
    if match and kind in {"csv", "tsv"}:
        return read_csv(match["file"], match["column"], path_column, in_order=in_order)
    if match and kind == "parquet":
        return read_parquet(match["file"], match["column"], path_column, in_order=in_order)
    if match and in_order and match["column"] is None:
        return _read_lines(source) if kind == "txt" else _read_array(source)
    expected = "folder, FILE.csv, FILE.csv:COLUMN or FILE.parquet:COLUMN"
    if in_order:
        files = "FILE.csv, FILE.csv:COLUMN, FILE.parquet:COLUMN, FILE.txt or FILE.npy"
        expected = f"labels in the order of the rows, which have no names: {files}"
    raise InputError(f"expected {expected}", argument="labels", value=source)


def _read_lines(file: str) -> Iterator[Cell]:
    """Reads one label per line. An empty line is a row without a label."""
    with open_text(file) as handle:
        for number, line in enumerate(handle, 1):
            text = line.strip()
            yield Cell(f"{file}, line {number}", "", None if is_missing(text) else text)


def _read_array(file: str) -> Iterator[Cell]:
    """Reads one label per element. Numbers become text."""
    try:
        values = np.load(file, allow_pickle=False)
    except Exception as exc:  # NumPy parses the header as Python source, so errors have no common base
        raise InputError(f"{file}: not a .npy file of labels ({first_line(exc)})") from exc
    if not isinstance(values, np.ndarray) or values.ndim != 1 or values.dtype.kind not in "biufU":
        found = f"{values.shape} {values.dtype}" if isinstance(values, np.ndarray) else "an archive of arrays"
        raise InputError(f"{file}: must have an (n,) array of text or numbers; got {found}")
    return (Cell(f"{file}, row {row}", "", value) for row, value in enumerate(values.tolist()))


def _split(cell: Any, place: str, *, multi_label: bool) -> tuple[str, ...] | None:
    if isinstance(cell, list):
        if not multi_label:
            raise InputError(f"{place}: has a list of labels", fix="pass `multi_label=True`")
        return tuple(check_label(str(label), place) for label in cell if label is not None)
    if cell is None or cell != cell:  # noqa: PLR0124 - NaN
        return None
    if isinstance(cell, (bytes, dict)):
        raise InputError(f"{place}: a label must be text or a number; got {type(cell).__name__}")
    text = check_label(str(cell), place).strip()
    if multi_label:
        return tuple(part.strip() for part in text.split(SEPARATOR) if part.strip())
    return (text,) if text else None
