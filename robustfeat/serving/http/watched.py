"""Small text files that a running server reads again when they change."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from robustfeat.system import NOT_BLOCKING

__all__ = ["WatchedFile", "read_text", "stamp"]

_MOST_BYTES = 2**20


class WatchedFile:
    """Detects changes of a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known = self._seen = self._look()

    def changed(self) -> bool:
        """Whether the file has changed since this was last true, and is the same as at the previous call.

        So a file that is still being written does not count as changed.
        """
        before, self._seen = self._seen, self._look()
        if self._seen == self._known or self._seen != before:
            return False
        self._known = self._seen
        return True

    def _look(self) -> tuple[int, ...]:
        try:
            return stamp(self._path)
        except OSError:
            return ()


def stamp(path: Path) -> tuple[int, ...]:
    """A value that changes when a file is written or replaced.

    Raises:
        OSError: the file does not exist.
    """
    found = path.stat()
    return found.st_mtime_ns, found.st_size, found.st_ino


def read_text(path: Path) -> str:
    """Reads a text file, without ever waiting for it.

    Raises:
        OSError: no file, a pipe or device, or more than 1 MiB.
        UnicodeDecodeError: its bytes are no UTF-8.
    """
    descriptor = os.open(path, os.O_RDONLY | NOT_BLOCKING)
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "not a regular file")
        data = os.read(descriptor, _MOST_BYTES + 1)
    finally:
        os.close(descriptor)
    if len(data) > _MOST_BYTES:
        raise OSError(errno.EFBIG, f"larger than {_MOST_BYTES:,} bytes")
    return data.decode()
