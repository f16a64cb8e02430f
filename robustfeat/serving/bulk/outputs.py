"""The files of an output, opened for reading: features, index and meta. They name each other and change as one.

The meta file holds the sha256 of the others. An output is one file of features with its index, or a dataset of several
such pairs with one meta file; rows are numbered through. `commits` says how the files appear together.
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
"""The file in the folder of shards that says that a new output is complete and being moved to its place."""

FILES_KEY = "feature_files"
"""Of a meta file: what lists the files of a dataset."""

MALFORMED = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)
"""What reading a meta file or an index raises where `embed` did not write it."""


@dataclass(frozen=True)
class FileRecord:
    """One file of features and its index, as the meta file lists them.

    Attributes:
        rows: in them.
        failed: how many of those are NaN.
        features_sha256, index_sha256: of the two files; None in outputs of version 0.1.
    """

    rows: int
    failed: int
    features_sha256: str | None
    index_sha256: str | None


@dataclass(frozen=True)
class OpenFile:
    """One file of features and its index, opened for reading at random."""

    features: Any
    index: Any
    rows: int


@dataclass(frozen=True)
class Output:
    """A complete output, opened: its files belong together, also if another process replaces them now.

    Attributes:
        places: where it lies.
        files: of a dataset several.
        meta: the contents of the meta file.
        meta_sha256: its hash, which tells outputs apart.
        model: what made the features.
        rows: of all files.
    """

    places: Places
    files: Sequence[OpenFile]
    meta: Mapping[str, Any]
    meta_sha256: str
    model: ModelIdentity
    rows: int

    def index_lines(self, first_file: int = 0) -> Iterator[bytes]:
        """The lines of the index, of all files from `first_file` on."""
        for file in self.files[first_file:]:
            file.index.seek(0)
            yield from file.index

    def features(self, first_file: int = 0) -> Iterator[NDArray[np.float32]]:
        """All features in order, in blocks, of all files from `first_file` on.

        Raises:
            InputError: a file cannot be read, or holds something else.
        """
        for number, file in enumerate(self.files[first_file:], first_file):
            place = self.places.file("features", number)
            yield from read_features(file.features, place, self.places.suffix, self.model.feature_size, file.rows)

    def map_features(self) -> Rows:
        """All features, (rows, D) float32, memory-mapped as `formats.map_features` does.

        Raises:
            InputError: as there.
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
                # Another process may have moved files between two steps, but not twice with the same error.
                if str(exc) == last:
                    raise
                last = str(exc)
                continue
            yield output
            return


def read_meta(places: Places) -> tuple[dict[str, Any], ModelIdentity, int, str]:
    """The meta file alone: its content, what made the features, their rows, and its sha256.

    Raises:
        InputError: it is missing or damaged.
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
    """The files that a meta file lists."""
    # Version 0.1 wrote no hashes: the numbers of rows have to do.
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
                    f"{places.file(kind, number)}: its sha256 is {found[:12]}..., {places.meta} says "
                    f"{str(sha256)[:12]}...; the files do not belong together",
                    fix="embed the images again",
                )
            handle.seek(0)
        files.append(OpenFile(handles["features"], handles["index"], record.rows))
    return Output(places, files, meta, meta_sha256, model, rows)


@contextmanager
def _open_current(places: Places, kind: str, number: int = 0) -> Iterator[Any]:
    """Opens one of the files: at its place, or in the folder of shards where it is not moved yet."""
    staged = f"{places.shards}/{places.staged(kind, number)}"
    place = staged if _committed(places) and file_exists(staged) else places.file(kind, number)
    if not file_exists(place):
        named = f"{Path(places.features).name} with its index and meta files beside it"
        if places.is_dataset:
            named = "a folder with files of features, their index files, and a meta file"
        raise InputError(f"{place}: no such file; expected what robustfeat embed writes: {named}")
    with ExitStack() as stack:
        try:
            handle = stack.enter_context(open_input(place))
        except FileNotFoundError as exc:
            raise InputError(f"{place}: was moved or deleted") from exc
        yield handle


def _committed(places: Places) -> bool:
    return file_exists(f"{places.shards}/{COMMIT}")


def index_records(output: Output) -> Iterator[dict[str, Any]]:
    """The lines of the index, from its start.

    Raises:
        InputError: a line is damaged or belongs to another row, or there are not as many as rows.
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
            f"{shown}: has {row + 1:,} rows, {output.places.meta} says {output.rows:,}; "
            "the files do not belong together",
            fix="embed the images again",
        )
