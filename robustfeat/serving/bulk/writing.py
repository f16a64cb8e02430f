"""Writes the files of an output in order from blocks of rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from robustfeat.errors import InputError
from robustfeat.serving.bulk.commits import NewOutput
from robustfeat.serving.bulk.formats import FORMATS, Block
from robustfeat.serving.bulk.job import Places
from robustfeat.serving.bulk.outputs import FileRecord, Output, read_meta
from robustfeat.serving.bulk.storage import LocalFolder, RemoteFolder, file_exists

__all__ = ["ROWS_PER_FILE", "OutputWriter", "cut_files"]

ROWS_PER_FILE = 2**20
"""Default rows per file of a dataset: 2 GiB with 512 features."""


def cut_files(places: Places, rows_per_file: int | None, shard_rows: int) -> int | None:
    """Rows per file of an output, rounded up to whole shards; None for an output of one file.

    Args:
        places: the places of the output.
        rows_per_file: rows per file; None for the existing dataset's number, or `ROWS_PER_FILE`.
        shard_rows: rows per shard.

    Raises:
        InputError: a number is given for an output of one file.
    """
    if not places.is_dataset:
        if rows_per_file:
            what = f"is for a folder of several files; {places.features} is one file"
            fix = f"name it {places.features}/, or leave this out"
            raise InputError(what, argument="rows_per_file", value=rows_per_file, fix=fix)
        return None
    if rows_per_file is None and file_exists(places.meta):
        rows_per_file = read_meta(places)[0].get("rows_per_file")
    return -(-(rows_per_file or ROWS_PER_FILE) // shard_rows) * shard_rows


class OutputWriter:
    """Writes an output into a run's claimed folder of shards, and then to its place.

    Files that an earlier run completed are not written again.

    Args:
        places: the places of the output.
        folder: the folder of shards.
        images: number of rows of the output.
        meta: the meta file's entries about the run. `rows_per_file` says where a dataset is cut.
        kept: the first files of the existing output, which stay.
    """

    def __init__(
        self,
        places: Places,
        folder: LocalFolder | RemoteFolder,
        images: int,
        meta: Mapping[str, Any],
        kept: Sequence[FileRecord] = (),
    ) -> None:
        self._places, self._images, self._meta = places, images, meta
        self._output = NewOutput(places, folder)
        self._rows_per_file = int(meta.get("rows_per_file") or max(images, 1))
        self._records = [*kept, *self._output.completed(len(kept))]

    @property
    def rows(self) -> int:
        """Number of rows written."""
        return sum(record.rows for record in self._records)

    @property
    def next_rows(self) -> range | None:
        """The rows of the next file to write; None if all are written."""
        first = len(self._records) * self._rows_per_file
        if self._records and first >= self._images:
            return None
        return range(first, min(first + self._rows_per_file, self._images))

    def write(self, blocks: Iterable[Block]) -> None:
        """Writes the next file from its rows."""
        rows, number, failed = self.next_rows, len(self._records), 0
        assert rows is not None
        with self._output.open("index", number) as index, self._output.open("features", number) as features:

            def written() -> Iterator[Block]:
                nonlocal failed
                for block in blocks:
                    failed += block.index.count(b"\n") - block.index.count(b'"error": null}\n')
                    index.write(block.index)
                    yield block

            about = {key: str(self._meta[key]) for key in ("model", "precision", "engine", "preprocessing_hash")}
            shape = (len(rows), self._meta["feature_size"])
            FORMATS[self._places.suffix].write(features, shape, about, written())
        hashes = (file.sha256.hexdigest() for file in (features, index))
        record = FileRecord(len(rows), failed, *hashes)
        self._output.complete(number, record)
        self._records.append(record)

    def commit(self, counts: Mapping[str, Any], *, after: Output | None = None) -> int:
        """Moves all files to their places.

        Args:
            counts: the last entries of the meta file.
            after: the output that this one continues.

        Returns:
            The number of failed rows.

        Raises:
            InputError: another process has changed `after`.
        """
        failed = sum(record.failed for record in self._records)
        meta = {**self._meta, "images": self._images, "failed": failed, **counts}
        self._output.commit(meta, self._records, after=after)
        return failed
