"""Synchronises an output with its inputs. Known images keep their features, and new ones are embedded.

The index has the sha256 of each image's bytes. So a changed file is embedded again, but a moved or renamed one is not.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import IO

import numpy as np
from numpy.typing import NDArray

from robustfeat.progress import Progress
from robustfeat.serving.bulk.appending import open_to_continue, output_exists
from robustfeat.serving.bulk.formats import Block
from robustfeat.serving.bulk.job import Places
from robustfeat.serving.bulk.outputs import Output, index_records
from robustfeat.serving.bulk.plan import Fresh, Plan
from robustfeat.serving.bulk.stacked import Rows
from robustfeat.serving.identity import ModelIdentity
from robustfeat.serving.inputs.input_list import InputList
from robustfeat.serving.inputs.parquet import ParquetSources
from robustfeat.serving.inputs.sources import ImageSource, index_line

__all__ = ["plan_sync"]

_READERS = 8
_BLOCK_ROWS = 4096
_FRESH = -1


@dataclass(frozen=True, kw_only=True)
class _Sync(Plan):
    """An output in the order of its inputs.

    Attributes:
        rows: (n,) int64: each input's row in `existing`, or `_FRESH`.
        kept: the index lines of the inputs that have a row, in order.
    """

    existing: Output
    rows: NDArray[np.int64]
    kept: IO[bytes]

    @property
    def images(self) -> int:
        return len(self.rows)

    @property
    def unchanged(self) -> bool:
        if len(self.fresh) or len(self.rows) != self.existing.rows:
            return False
        self.kept.seek(0)
        return all(old == new for old, new in zip(self.existing.index_lines(), self.kept, strict=True))

    def blocks(self, fresh: Fresh, start: int) -> Iterator[Block]:
        there = self.existing
        size = there.model.feature_size
        known: Rows = there.map_features() if there.rows else np.empty((0, size), np.float32)
        before = int((self.rows[:start] == _FRESH).sum())
        embedded = (
            (vector, line)
            for block in fresh(before)
            for vector, line in zip(block.features, block.index.splitlines(keepends=True), strict=True)
        )
        self.kept.seek(0)
        for _ in range(start - before):
            self.kept.readline()
        for first in range(start, len(self.rows), _BLOCK_ROWS):
            rows = self.rows[first : first + _BLOCK_ROWS]
            features = np.empty((len(rows), size), np.float32)
            features[rows >= 0] = known[rows[rows >= 0]]
            index = []
            for offset, row in enumerate(rows):
                if row == _FRESH:
                    features[offset], line = next(embedded)
                    line = b'{"row": %d' % (first + offset) + line[line.index(b",") :]
                else:
                    line = self.kept.readline()
                index.append(line)
            yield Block(features, b"".join(index))


@contextmanager
def plan_sync(inputs: InputList, places: Places, model: ModelIdentity, *, quiet: bool = False) -> Iterator[Plan]:
    """Opens the output to synchronise with `inputs`. Without an output, all inputs are embedded.

    Every input is read and hashed. Failed rows are tried again.

    Raises:
        InputError: the output is damaged, or another model or other options made it; an archive cannot be read.
    """
    if not output_exists(places):
        yield Plan(inputs)
        return
    with (
        open_to_continue(places, model, "sync") as existing,
        inputs.another() as fresh,
        tempfile.TemporaryFile(dir=inputs.folder) as kept,
    ):
        known = _KnownImages(existing)
        rows = np.empty(len(inputs), np.int64)
        progress = Progress("compare", len(inputs), quiet=quiet)
        with closing(_hashed(inputs)) as images:
            for number, (image, sha256) in enumerate(images):
                rows[number] = row = known.take(sha256)
                if row == _FRESH:
                    fresh.append(image)
                else:
                    kept.write(index_line(number, image, sha256, None).encode())
                progress.advance(1)
        progress.finish(f"{len(fresh):,} to embed")
        yield _Sync(fresh, known=len(inputs) - len(fresh), existing=existing, rows=rows, kept=kept)


class _KnownImages:
    """The images whose features an output has, by the sha256 of their bytes."""

    def __init__(self, output: Output) -> None:
        self._row: dict[bytes, int] = {}
        self._next = np.full(output.rows, _FRESH)
        last: dict[bytes, int] = {}
        for record in index_records(output):
            key, row = _key(record["sha256"]), record["row"]
            if record["error"] is None and key:
                if key in last:
                    self._next[last[key]] = row
                self._row.setdefault(key, row)
                last[key] = row

    def take(self, sha256: str | None) -> int:
        """A row with the features of these bytes, or `_FRESH`.

        Equal images get their rows in turn, so unchanged inputs keep their order.
        """
        key = _key(sha256)
        row = self._row.get(key, _FRESH)
        if row != _FRESH and self._next[row] != _FRESH:
            self._row[key] = int(self._next[row])
        return row


def _key(sha256: str | None) -> bytes:
    """Half of a hash; empty for none."""
    try:
        return bytes.fromhex(sha256 or "")[:16]
    except (ValueError, TypeError):  # the index is damaged, so embed the image again
        return b""


def _hashed(inputs: InputList) -> Generator[tuple[ImageSource, str | None]]:
    """Yields each input with the sha256 of its bytes; None for unreadable ones."""
    parquet = ParquetSources()
    coming: deque[tuple[ImageSource, Future[str | None] | str | None]] = deque()

    def first() -> tuple[ImageSource, str | None]:
        image, digest = coming.popleft()
        return image, digest.result() if isinstance(digest, Future) else digest

    with ThreadPoolExecutor(_READERS) as readers:
        for image in inputs:
            if image.kind == "parquet":
                data = parquet.read(image)
                coming.append((image, hashlib.sha256(data).hexdigest() if isinstance(data, bytes) else None))
            else:
                coming.append((image, readers.submit(_sha256, image)))
            if len(coming) > 4 * _READERS:
                yield first()
        while coming:
            yield first()


def _sha256(image: ImageSource) -> str | None:
    try:
        return hashlib.sha256(image.read()).hexdigest()
    except (OSError, ValueError, MemoryError):  # the decoder reads it again and reports the error
        return None
