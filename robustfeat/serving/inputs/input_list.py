"""Keeps a list of inputs of any length on disk."""

from __future__ import annotations

import hashlib
import heapq
import itertools
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import IO

from robustfeat.serving.inputs.choice import Choice
from robustfeat.serving.inputs.sources import ImageSource

__all__ = ["InputList"]

_SORT_ROWS = 20_000
_MERGE_RUNS = 64
_OFFSET_EVERY = 4096


class InputList:
    """The images to embed, one per line in an unnamed temporary file. Close it, or use it in a `with` block.

    Attributes:
        choice: the choice of files, with the number of skipped files.
        folder: folder of the temporary file; None for the system's default.
        sha256: sha256 of the list. Equal lists have equal hashes.

    Args:
        choice: the choice used for folders and archives.
        folder: see Attributes.
    """

    def __init__(
        self, images: Iterable[ImageSource] = (), *, choice: Choice | None = None, folder: Path | None = None
    ) -> None:
        self.choice = choice or Choice()
        self._count = 0
        self._digest = hashlib.sha256()
        self._offsets: list[int] = []
        self.folder = folder
        self._file: IO[bytes] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - it lives as long as the list
        for image in images:
            self.append(image)

    def __len__(self) -> int:
        return self._count

    def __enter__(self) -> InputList:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Frees the disk space."""
        self._file.close()

    def another(self) -> InputList:
        """Makes an empty list for some of these inputs."""
        return InputList(choice=self.choice, folder=self.folder)

    @property
    def left_out(self) -> dict[str, int]:
        """Number of skipped files, by kind; see `Choice`."""
        return dict(sorted(self.choice.left_out.items()))

    @property
    def sha256(self) -> str:
        """The sha256 of the list, 64 hex digits."""
        return self._digest.hexdigest()

    def append(self, image: ImageSource) -> None:
        """Adds a row at the end."""
        self.append_line(image.to_line())

    def append_line(self, line: bytes) -> None:
        """Adds a row, given as a line of `lines`, at the end."""
        if self._count % _OFFSET_EVERY == 0:
            self._offsets.append(self._file.seek(0, os.SEEK_END))
        self._digest.update(line)
        self._file.write(line)
        self._count += 1

    def lines(self, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        """Yields rows `start` to `stop` as lines of `ImageSource.to_line`. Only one iterator may run at a time."""
        stop = self._count if stop is None else min(stop, self._count)
        if start >= stop:
            return
        self._file.seek(self._offsets[start // _OFFSET_EVERY])
        yield from itertools.islice(self._file, start % _OFFSET_EVERY, start % _OFFSET_EVERY + stop - start)

    def __iter__(self) -> Iterator[ImageSource]:
        return map(ImageSource.from_line, self.lines())

    def extend_sorted(self, images: Iterable[ImageSource]) -> None:
        """Appends rows in the byte order of their paths by a merge sort on disk, with `_SORT_ROWS` rows in memory."""

        def key(image: ImageSource) -> bytes:
            return os.fsencode(image.path)

        images = iter(images)
        first = sorted(itertools.islice(images, _SORT_ROWS), key=key)
        if len(first) < _SORT_ROWS:
            for image in first:
                self.append(image)
            return
        runs = [InputList(first, folder=self.folder)]
        del first
        try:
            while chunk := sorted(itertools.islice(images, _SORT_ROWS), key=key):
                runs.append(InputList(chunk, folder=self.folder))
                if len(runs) == _MERGE_RUNS:
                    merged = InputList(heapq.merge(*runs, key=key), folder=self.folder)
                    for run in runs:
                        run.close()
                    runs = [merged]
            for image in heapq.merge(*runs, key=key):
                self.append(image)
        finally:
            for run in runs:
                run.close()
