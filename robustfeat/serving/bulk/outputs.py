"""Opens the files of an output: features, index and meta. They name each other and change together.

The meta file has the sha256 of the others. An output is one file of features with its index, or a dataset of several
such pairs with one meta file. Rows are numbered across files. `commits` explains how the files appear together.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustfeat.counts import format_count
from robustfeat.errors import InputError
from robustfeat.serving.bulk.formats import FORMATS, map_features, read_features
from robustfeat.serving.bulk.job import Places
from robustfeat.serving.bulk.stacked import Rows, StackedRows
from robustfeat.serving.bulk.storage import file_exists, open_input
from robustfeat.serving.identity import ModelIdentity
from robustfeat.serving.inputs.sources import path_of_index
from robustfeat.system import allow_open_files

__all__ = [
    "COMMIT",
    "FILES_KEY",
    "MALFORMED",
    "FileRecord",
    "OpenFile",
    "Output",
    "index_records",
    "open_existing",
    "read_meta",
    "read_records",
]

COMMIT = "commit"
"""File in the folder of shards that marks a complete output, whose files are being moved to their places."""

FILES_KEY = "feature_files"
"""Key of a meta file with the list of a dataset's files."""

MALFORMED = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)
"""Errors from reading a meta file or an index that `embed` did not write."""


@dataclass(frozen=True)
class FileRecord:
    """One file of features and its index, as listed in the meta file.

    Attributes:
        rows: number of rows.
        failed: number of failed rows, which are NaN.
        features_sha256, index_sha256: hashes of the two files; None in outputs of version 0.1.
    """

    rows: int
    failed: int
    features_sha256: str | None
    index_sha256: str | None


@dataclass(frozen=True)
class OpenFile:
    """One file of features and its index, opened for random access."""

    features: Any
    index: Any
    rows: int


@dataclass(frozen=True)
class Output:
    """An open, complete output. Its files belong together, even if another process replaces them now.

    Attributes:
        places: the places of its files.
        files: the files, several for a dataset.
        meta: the contents of the meta file.
        meta_sha256: sha256 of the meta file, which identifies an output.
        model: the model of the features.
        rows: number of rows of all files.
    """

    places: Places
    files: Sequence[OpenFile]
    meta: Mapping[str, Any]
    meta_sha256: str
    model: ModelIdentity
    rows: int

    def index_lines(self, first_file: int = 0) -> Iterator[bytes]:
        """Yields the lines of the index of all files from `first_file` on."""
        for file in self.files[first_file:]:
            file.index.seek(0)
            yield from file.index

    def features(self, first_file: int = 0) -> Iterator[NDArray[np.float32]]:
        """Yields all features of the files from `first_file` on, in blocks.

        Raises:
            InputError: a file cannot be read, or has other contents.
        """
        for number, file in enumerate(self.files[first_file:], first_file):
            place = self.places.file("features", number)
            yield from read_features(file.features, place, self.places.suffix, self.model.feature_size, file.rows)

    def map_features(self) -> Rows:
        """Maps all features, (rows, D) float32, to memory; see `formats.map_features`.

        Raises:
            InputError: see `formats.map_features`.
        """
        parts = [
            map_features(
                file.features, self.places.file("features", at), self.places.suffix, self.model.feature_size, file.rows
            )
            for at, file in enumerate(self.files)
            if file.rows or len(self.files) == 1
        ]
        return parts[0] if len(parts) == 1 else StackedRows(parts)


@contextmanager
def open_existing(places: Places) -> Iterator[Output]:
    """Opens the output at `places` for the block.

    Raises:
        InputError: a file is missing or damaged, or the files do not belong together.
    """
    last = None
    while True:
        with ExitStack() as stack:
            try:
                output = _open(places, stack)
            except InputError as exc:
                # Another process may have moved files between two steps, but hardly twice with the same error.
                if str(exc) == last:
                    raise
                last = str(exc)
                continue
            yield output
            return


def read_meta(places: Places) -> tuple[dict[str, Any], ModelIdentity, int, str]:
    """Reads only the meta file: its content, the model, the number of rows, and its sha256.

    Raises:
        InputError: the meta file is missing or damaged.
    """
    with _open_current(places, "meta") as handle:
        data = handle.read()
    try:
        meta = json.loads(data)
        model, rows = ModelIdentity.of_meta(meta), int(meta["images"])
        if rows < 0:
            raise ValueError(f"images is {rows}")
        if (listed := sum(record.rows for record in read_records(meta))) != rows:
            raise ValueError(f"images is {rows}, its files have {listed}")
        if places.is_dataset and meta["format"] not in FORMATS:
            raise ValueError(f"format is {meta['format']}")
    except MALFORMED as exc:
        raise InputError(f"{places.meta}: not what robustfeat embed writes ({exc!r})") from exc
    return meta, model, rows, hashlib.sha256(data).hexdigest()


def read_records(meta: Mapping[str, Any]) -> list[FileRecord]:
    """The files in a meta file."""
    # Version 0.1 wrote no hashes, so only the number of rows can be checked.
    keys = ("features_sha256", "index_sha256")
    if FILES_KEY not in meta:
        return [FileRecord(int(meta["images"]), int(meta.get("failed", 0)), *map(meta.get, keys))]
    return [
        FileRecord(int(one["rows"]), int(one["failed"]), *(str(one[key]) for key in keys)) for one in meta[FILES_KEY]
    ]


def _open(places: Places, stack: ExitStack) -> Output:
    meta, model, rows, meta_sha256 = read_meta(places)
    records = read_records(meta)
    if places.is_dataset:
        places = places.with_suffix(meta["format"])
        allow_open_files(4 * len(records))
    files = []
    for number, record in enumerate(records):
        expected = {"features": record.features_sha256, "index": record.index_sha256}
        handles = {}
        for kind, sha256 in expected.items():
            handles[kind] = handle = stack.enter_context(_open_current(places, kind, number))
            if sha256 is not None and (found := hashlib.file_digest(handle, "sha256").hexdigest()) != sha256:
                raise InputError(
                    f"{places.file(kind, number)}: the sha256 must be {str(sha256)[:12]}... as in {places.meta}; got "
                    f"{found[:12]}...; the files do not belong together",
                    fix="embed the images again",
                )
            handle.seek(0)
        files.append(OpenFile(handles["features"], handles["index"], record.rows))
    return Output(places, files, meta, meta_sha256, model, rows)


@contextmanager
def _open_current(places: Places, kind: str, number: int = 0) -> Iterator[Any]:
    """Opens one of the files at its place, or in the folder of shards if it has not been moved yet."""
    staged = f"{places.shards}/{places.staged(kind, number)}"
    place = staged if _committed(places) and file_exists(staged) else places.file(kind, number)
    if not file_exists(place):
        named = f"{Path(places.features).name} with its index and meta files beside it"
        if places.is_dataset:
            named = "a folder with files of features, their index files, and a meta file"
        raise InputError(f"{place}: no such file; expected the output of robustfeat embed: {named}")
    with ExitStack() as stack:
        try:
            handle = stack.enter_context(open_input(place))
        except FileNotFoundError as exc:
            raise InputError(f"{place}: was moved or deleted") from exc
        yield handle


def _committed(places: Places) -> bool:
    return file_exists(f"{places.shards}/{COMMIT}")


def index_records(output: Output) -> Iterator[dict[str, Any]]:
    """Yields the parsed lines of the index.

    Raises:
        InputError: a line is damaged or belongs to another row, or the number of lines and rows differ.
    """
    shown = output.places.index
    row = -1
    for row, line in enumerate(output.index_lines()):
        try:
            record = json.loads(line)
            path_of_index(record)
            if record["row"] != row:
                raise ValueError(f"row {record['row']} in line {row + 1}")
            record["error"]
        except MALFORMED as exc:
            raise InputError(f"{shown}: not what robustfeat embed writes ({exc})") from exc
        yield record
    if row + 1 != output.rows:
        raise InputError(
            f"{shown}: has {format_count(row + 1, 'row')}, but {output.places.meta} has {output.rows:,}; "
            "the files do not belong together",
            fix="embed the images again",
        )
