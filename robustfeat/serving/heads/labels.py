"""Labels: read from class folders, CSV or Parquet, and matched with rows of features by path."""

from __future__ import annotations

import codecs
import csv
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from robustfeat.errors import InputError, first_line
from robustfeat.serving.heads.cells import unquote_cell
from robustfeat.serving.heads.features import Features
from robustfeat.serving.inputs.choice import IMAGE_SUFFIXES
from robustfeat.serving.inputs.input_list import InputList
from robustfeat.serving.inputs.parquet import class_names, open_parquet, parquet_path

__all__ = ["SEPARATOR", "LabelledRows", "Labels", "labelled_inputs", "match_labels", "match_paths", "read_labels"]

SEPARATOR = "|"
"""Between several labels of one image in a cell."""

_PATH_COLUMNS = (
    "path", "file", "filename", "file_name", "filepath", "file_path", "image", "image_path", "image_name", "img",
    "img_path",
)  # fmt: skip
_LABEL_COLUMNS = ("label", "labels", "class")
_MISSING = {"NA", "N/A", "#N/A", "<NA>", "NaN", "nan", "NULL", "null"}
"""What R, pandas and databases write where a label is missing."""
_SEPARATORS = ",;\t"
_FILE = re.compile(r"(?P<file>.*\.(?P<kind>csv|parquet))(:(?P<column>.+))?", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True)
class Labels:
    """Labels by path.

    Attributes:
        source: where they come from, for messages.
        by_path: path to labels, one or several; None where the first folder of each path is its label.
        repeated: lines that say once more what another one says.
    """

    source: str
    by_path: Mapping[str, tuple[str, ...]] | None
    repeated: int = 0

    def key(self, path: str) -> str | None:
        """The labelled path that means this image: the same one, or else the only one that is the same text.

        macOS writes é as two characters, other systems as one.
        """
        if self.by_path is None or path in self.by_path:
            return path
        return self._by_form.get(unicodedata.normalize("NFC", path))

    @cached_property
    def _by_form(self) -> dict[str, str]:
        forms = [(unicodedata.normalize("NFC", path), path) for path in self.by_path or ()]
        counts = Counter(form for form, _ in forms)
        return {form: path for form, path in forms if counts[form] == 1}

    def matched(self, paths: Iterable[str]) -> Labels:
        """The same labels, those under the paths of these images that mean one of them in another way.

        A label whose path is none of these means the one image whose path ends it, or that it ends: absolute paths and
        bare names of files are found as long as no other image or label could be meant as well.

        Raises:
            InputError: an image has one label under its own path and another one under such a path.
        """
        if self.by_path is None:
            return self
        keys = {path: self.key(path) for path in paths}
        used = set(keys.values())
        images = _by_name(keys)
        meanings: dict[str, list[str]] = {}  # images, and the labels that mean them by another path
        for name, spare in _by_name(path for path in self.by_path if path not in used).items():
            for path in spare:
                meant = [image for image in images.get(name, ()) if _ends(image, path)]
                if len(meant) == 1:
                    meanings.setdefault(meant[0], []).append(path)
        by_path = dict(self.by_path)
        repeated = self.repeated
        for image, others in meanings.items():
            own = keys[image]
            if own is None and len(others) == 1:
                by_path[image] = by_path.pop(others[0])
            if own is None:
                continue
            for other in others:
                again = by_path.pop(other)
                if again != by_path[own]:
                    one, another = (SEPARATOR.join(labels) for labels in (by_path[own], again))
                    what = f"{self.source}: {own} is labelled {one!r}, and {other} {another!r}"
                    raise InputError(what, fix="leave one")
                repeated += 1
        return replace(self, by_path=by_path, repeated=repeated)

    def of(self, path: str) -> tuple[str, ...] | None:
        """The labels of an image; None where it has none that are known.

        Raises:
            InputError: it should lie in a class folder, and does not.
        """
        if self.by_path is not None:
            key = self.key(path)
            return None if key is None else self.by_path[key]
        folder, slash, rest = path.partition("/")
        if folder.endswith(".tar"):
            folder, slash, rest = rest.partition("/")
        if not slash or not folder or folder.endswith(".parquet"):
            raise InputError(
                f"{path}: lies in no class folder; expected CLASS/NAME within INPUT",
                fix="move it there, or pass a file of labels: `labels=FILE.csv` or `labels=FILE.parquet:COLUMN`",
            )
        return (_checked(folder, path),)


@dataclass(frozen=True, eq=False)
class LabelledRows:
    """Rows of features that have labels.

    Attributes:
        rows: (m,) int64, ascending.
        targets: (m,) int64 into `classes`; with several labels a row (m, K) bool.
        classes: K names, sorted.
        failed: how many labelled rows were left out, their images having failed.
        unlabelled: rows without a label.
        missing: labelled paths that are no row.
        repeated: see `Labels`.
    """

    rows: NDArray[np.int64]
    targets: NDArray[Any]
    classes: tuple[str, ...]
    failed: int
    unlabelled: int
    missing: tuple[str, ...]
    repeated: int = 0

    def summary(self) -> str:
        """One line."""
        parts = [f"{len(self.rows):,} labelled rows of {len(self.classes)} classes"]
        if self.failed:
            parts.append(f"{self.failed:,} more left out because their images failed")
        if self.unlabelled:
            parts.append(f"{self.unlabelled:,} rows without a label")
        if self.repeated:
            parts.append(f"{self.repeated:,} labels given twice")
        if self.missing:
            parts.append(f"{len(self.missing):,} labels without a row, such as {self.missing[0]}")
        return "; ".join(parts)


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


def _by_name(paths: Iterable[str]) -> dict[str, list[str]]:
    """Paths by the name of the file, as `_plain` writes it."""
    named: dict[str, list[str]] = {}
    for path in dict.fromkeys(paths):
        named.setdefault(_plain(path).rpartition("/")[2], []).append(path)
    return named


def _ends(path: str, other: str) -> bool:
    """Whether one path is the end of the other."""
    one, another = f"/{_plain(path)}", f"/{_plain(other)}"
    return one.endswith(another) or another.endswith(one)


def _plain(path: str) -> str:
    """In one Unicode form, and with slashes where Windows wrote the others."""
    return unicodedata.normalize("NFC", path).replace("\\", "/")


def _split(cell: Any, place: str, *, multi_label: bool) -> tuple[str, ...] | None:
    if isinstance(cell, list):
        if not multi_label:
            raise InputError(f"{place}: holds a list of labels", fix="pass `multi_label=True`")
        return tuple(_checked(str(label), place) for label in cell if label is not None)
    if cell is None or cell != cell:  # noqa: PLR0124 - NaN
        return None
    if isinstance(cell, (bytes, dict)):
        raise InputError(f"{place}: a label must be text or a number; got {type(cell).__name__}")
    text = _checked(str(cell), place).strip()
    if multi_label:
        return tuple(part.strip() for part in text.split(SEPARATOR) if part.strip())
    return (text,) if text else None


def _checked(label: str, place: str) -> str:
    try:
        label.encode()
    except UnicodeEncodeError:
        raise InputError(f"{place}: the label {label!r} is not UTF-8", fix="write it in that encoding") from None
    return unicodedata.normalize("NFC", label)


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


def match_labels(
    features: Features, labels: Labels, *, multi_label: bool = False, classes: Sequence[str] | None = None
) -> LabelledRows:
    """`match_paths` of features, which are read once to see that they are finite.

    Raises:
        InputError: as there, and where a row is not finite.
    """
    found = match_paths(
        features.place, features.paths, labels, errors=features.errors, multi_label=multi_label, classes=classes
    )
    features.check()
    return found


def match_paths(
    place: str,
    paths: Sequence[str],
    labels: Labels,
    *,
    errors: Mapping[int, str] | None = None,
    multi_label: bool = False,
    classes: Sequence[str] | None = None,
) -> LabelledRows:
    """Finds the rows that have labels.

    Args:
        place: what they are rows of, for messages.
        paths: of the rows.
        labels: from `read_labels`.
        errors: the rows that failed.
        multi_label: as there.
        classes: the only ones allowed; by default those that occur.

    Raises:
        InputError: a labelled path stands in two rows, no labelled row is left, or a label is unknown.
    """
    labels = labels.matched(paths)
    rows: list[int] = []
    kept: list[tuple[str, ...]] = []
    failed = unlabelled = 0
    seen: dict[str, int] = {}
    for row, path in enumerate(paths):
        found = labels.of(path)
        if found is None:
            unlabelled += 1
            continue
        key = str(labels.key(path))
        if key in seen:
            raise InputError(
                f"{place}: rows {seen[key]} and {row} have the same path, {path}, so that a label could mean either",
                fix="embed one folder above both",
            )
        seen[key] = row
        if row in (errors or {}):
            failed += 1
        else:
            rows.append(row)
            kept.append(found)
    if not rows:
        if failed:
            raise InputError(f"{place}: all {failed:,} labelled images failed", fix="see their errors")
        there = next(iter(labels.by_path or ()), "")
        raise InputError(
            f"none of its {len(labels.by_path or ()):,} paths is one of the {len(paths):,} rows of {place} "
            f"(there {there!r}, here {paths[0]!r})",
            argument="labels",
            value=labels.source,
            fix="write the paths as the index has them, or such that each means one image alone",
        )
    names = tuple(classes) if classes is not None else tuple(sorted({label for found in kept for label in found}))
    index = {name: number for number, name in enumerate(names)}

    def number(label: str, row: int) -> int:
        if label not in index:
            listed = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
            raise InputError(
                f"{paths[row]} is labelled {label!r}, which is none of the head's {len(names)} classes ({listed})",
                argument="labels",
                value=labels.source,
            )
        return index[label]

    targets: NDArray[Any]
    if multi_label:
        targets = np.zeros((len(rows), len(names)), bool)
        for at, found in enumerate(kept):
            targets[at, [number(label, rows[at]) for label in found]] = True
    else:
        targets = np.array([number(found[0], row) for found, row in zip(kept, rows, strict=True)], np.int64)
    missing = tuple(path for path in labels.by_path or () if path not in seen)
    return LabelledRows(np.array(rows, np.int64), targets, names, failed, unlabelled, missing, labels.repeated)


def labelled_inputs(inputs: InputList, labels: Labels) -> InputList:
    """The images that have labels."""
    labels = labels.matched(image.path for image in inputs)
    return InputList(image for image in inputs if labels.of(image.path) is not None)
