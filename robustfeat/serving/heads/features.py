"""Opens features with the names of their rows, from files or by embedding images."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustfeat.counts import format_count
from robustfeat.errors import InputError, first_line
from robustfeat.serving.bulk.formats import FORMATS
from robustfeat.serving.bulk.index_paths import IndexPaths
from robustfeat.serving.bulk.job import Places, holds_dataset
from robustfeat.serving.bulk.outputs import Output, index_records, open_existing
from robustfeat.serving.bulk.stacked import Rows
from robustfeat.serving.bulk.storage import file_exists
from robustfeat.serving.extractor import FeatureExtractor
from robustfeat.serving.identity import ModelIdentity
from robustfeat.serving.inputs.input_list import InputList
from robustfeat.serving.inputs.sources import printable

__all__ = [
    "CHUNK_ROWS",
    "Features",
    "Rows",
    "count_unnamed_rows",
    "embed_features",
    "is_feature_file",
    "load",
    "open_array",
    "open_features",
    "row_name",
]

CHUNK_ROWS = 4096
"""Rows in memory at a time."""


@dataclass(frozen=True, eq=False)
class Features:
    """The rows of a file of features.

    Attributes:
        place: the file's name for messages.
        values: (n, D) float32, memory-mapped, with NaN for failed rows. A foreign array may have another float type.
            Several files give a `StackedRows`, which takes slices and row numbers like an array.
        paths: n names, as in the index.
        errors: errors of failed rows, by row.
        model: the model of the features; None for a foreign array.
        hashes: (n, 32) uint8, the sha256 of each image file, zeros for unreadable files; None for a foreign array.
        meta_sha256: sha256 of the meta file, which identifies an output; None for a foreign array.
    """

    place: str
    values: Rows
    paths: Sequence[str]
    errors: dict[int, str]
    model: ModelIdentity | None
    hashes: NDArray[np.uint8] | None = None
    meta_sha256: str | None = None

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def good(self) -> NDArray[np.bool_]:
        """(n,) bool: rows of images that did not fail. They are finite."""
        mask = np.ones(len(self), bool)
        mask[list(self.errors)] = False
        return mask

    def chunks(self) -> Iterator[tuple[range, NDArray[np.float32]]]:
        """Yields all rows in blocks.

        Raises:
            InputError: a row is not finite, but has no error in the index.
        """
        for start in range(0, len(self), CHUNK_ROWS):
            rows = range(start, min(start + CHUNK_ROWS, len(self)))
            values = self.values[rows.start : rows.stop]
            self._require_finite(rows, values)
            yield rows, values

    def take(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Some rows, by their numbers.

        Raises:
            InputError: as `chunks`.
        """
        values = self.values[rows]
        self._require_finite(rows.tolist(), values)
        return values

    def check(self) -> None:
        """Reads all rows once.

        Raises:
            InputError: see `chunks`.
        """
        for _ in self.chunks():
            pass

    def _require_finite(self, rows: Sequence[int], values: NDArray[np.float32]) -> None:
        for place in np.flatnonzero(~np.isfinite(values).all(1)):
            row = rows[int(place)]
            if row not in self.errors:
                raise InputError(
                    f"{self.place}: row {row} ({self.paths[row]}) is not finite, but has no error in the index",
                    fix="embed the images again",
                )


def is_feature_file(place: str) -> bool:
    """Whether an argument names features rather than images. A Parquet file or a folder may have either."""
    if holds_dataset(place):
        return True
    suffix = Path(place).suffix
    if suffix not in FORMATS:
        return False
    return suffix != ".parquet" or file_exists(Places.of(place).meta)


def load(place: str | os.PathLike[str]) -> Features:
    """Opens the output of `embed`: features, the names of their rows, and the failed rows.

    Args:
        place: a .npy, .parquet or .safetensors file, with its index and meta file beside it, or a folder of such files
            that `embed` wrote; or its URL, which for a folder ends in a slash.

    Raises:
        InputError: a file is missing, or the files do not belong together.
    """
    return open_features(os.fspath(place))


def open_features(place: str) -> Features:
    """Opens the output of `embed`, with the index and the meta file beside it.

    Raises:
        InputError: a file is missing, or the files do not belong together.
    """
    places = Places.of(place, argument=None)
    with open_existing(places) as output:
        errors: dict[int, str] = {}
        hashes = np.zeros((output.rows, 32), np.uint8)
        for row, record in enumerate(index_records(output)):
            _note_hash(hashes, row, record.get("sha256"), places.index)
            if record["error"] is not None:
                errors[row] = str(record["error"])
        paths = IndexPaths([file.index for file in output.files], places.index)
        if places.suffix == ".parquet" and not places.is_dataset and "features_sha256" not in output.meta:
            _require_own_paths(output, paths)
        values = output.map_features()
    return Features(places.features, values, paths, errors, output.model, hashes, output.meta_sha256)


def _note_hash(hashes: NDArray[np.uint8], row: int, sha256: Any, index: str) -> None:
    if sha256 is None or row >= len(hashes):  # the index's reader refuses too many rows
        return
    try:
        hashes[row] = np.frombuffer(bytes.fromhex(sha256), np.uint8)
    except (TypeError, ValueError) as exc:
        raise InputError(f"{index}: not what robustfeat embed writes (the sha256 of row {row}: {exc})") from exc


def row_name(row: int) -> str:
    """The name of a row without a path."""
    return str(row)


def count_unnamed_rows(place: str) -> int | None:
    """The number of rows of a .npy file without index and meta file; None for other files.

    Raises:
        InputError: the file cannot be read.
    """
    file = Path(place)
    if file.suffix != ".npy" or not file.is_file():
        return None
    places = Places.of(place)
    if Path(places.index).exists() or Path(places.meta).exists():
        return None
    return len(_map_array(place))


def open_array(place: str, names: str | None = None) -> Features:
    """Opens features that another program wrote.

    Args:
        place: a .npy file with an (n, D) array of floats. Rows that are not finite count as failed.
        names: a UTF-8 text file with the path of each row, one per line. Without it, rows are named by their number,
            from 0.

    Raises:
        InputError: a file cannot be read, or the files do not belong together.
    """
    values = _map_array(place)
    paths = list(map(row_name, range(len(values)))) if names is None else _read_names(names, place, len(values))
    errors: dict[int, str] = {}
    for start in range(0, len(values), CHUNK_ROWS):
        bad = np.flatnonzero(~np.isfinite(values[start : start + CHUNK_ROWS]).all(1))
        errors |= {start + int(row): "not finite" for row in bad}
    return Features(place, values, paths, errors, None)


def _map_array(place: str) -> NDArray[Any]:
    try:
        values = np.load(place, mmap_mode="r", allow_pickle=False)
    except Exception as exc:  # NumPy parses the header as Python source, so errors have no common base
        raise InputError(f"{place}: not a .npy file of numbers ({first_line(exc)})") from exc
    if not isinstance(values, np.ndarray) or values.ndim != 2 or values.dtype.kind != "f" or not values.size:
        found = f"{values.shape} {values.dtype}" if isinstance(values, np.ndarray) else "an archive of arrays"
        raise InputError(f"{place}: must have an (n, D) array of floats; got {found}")
    return values


def _read_names(names: str, place: str, rows: int) -> list[str]:
    try:
        text = Path(names).read_text("utf-8-sig", errors="surrogateescape")
    except OSError as exc:
        raise InputError(f"cannot be read ({exc.strerror})", argument="names", value=names) from exc
    # `splitlines` would also split at other characters, which names may contain.
    paths = text.removesuffix("\n").split("\n") if text else []
    if len(paths) != rows:
        what = f"has {format_count(len(paths), 'line')}; expected the paths of the {rows:,} rows of {place}"
        raise InputError(what, argument="names", value=names)
    return paths


def _require_own_paths(output: Output, paths: Sequence[str]) -> None:
    """Compares a Parquet file's own paths with the index, since a file of version 0.1 may have been sorted."""
    from pyarrow import parquet

    row, places = 0, output.places
    try:
        for batch in parquet.ParquetFile(output.files[0].features).iter_batches(columns=["path"]):
            for path in batch.column(0).to_pylist():
                if row >= len(paths) or path != printable(paths[row]):
                    raise InputError(
                        f"{places.features}: its row {row} is {path}, but another image in {places.index}; "
                        "the files do not belong together",
                        fix="embed the images again",
                    )
                row += 1
    except (OSError, ValueError, LookupError) as exc:
        raise InputError(f"{places.features}: not the features that its meta file describes ({exc})") from exc


def embed_features(extractor: FeatureExtractor, inputs: InputList, *, quiet: bool = False, **options: Any) -> Features:
    """Embeds images to a temporary file, which vanishes with the features. `options` go to `embed_files`."""
    from robustfeat.serving.bulk.embedding import embed_files

    with tempfile.TemporaryDirectory(prefix="robustfeat-") as scratch:
        out = str(Path(scratch) / "images.npy")
        embed_files(extractor, inputs, out, quiet=quiet, **options)
        # The mapping keeps the bytes after the name is removed.
        opened = open_features(out)
    return replace(opened, place="the images")
