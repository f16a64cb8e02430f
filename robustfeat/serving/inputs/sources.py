"""Where the bytes of an image lie, and how they are read: files and members of tar archives, local or remote."""

from __future__ import annotations

import base64
import errno
import json
import os
import stat
from dataclasses import astuple, dataclass
from typing import Any

from robustfeat.serving.inputs.remote import is_remote, read_remote

__all__ = ["MAX_FILE_BYTES", "ImageSource", "index_line", "path_fields", "path_of_index", "printable"]

MAX_FILE_BYTES = 512 * 2**20
"""Files of more bytes are failed rows; so is one that never ends."""


@dataclass(frozen=True, slots=True)
class ImageSource:
    """One row of the output.

    Attributes:
        path: what the index calls it, POSIX; names that are not UTF-8 hold their bytes as lone surrogates
            (`os.fsdecode`).
        file: the file that holds it: an absolute path, or a URL of fsspec.
        kind: file, tar, parquet, or `failed`, then `detail` says why.
        at, size: tar: where its bytes lie; parquet: `at` is the row.
        detail: parquet: the column.
    """

    path: str
    file: str
    kind: str = "file"
    at: int = 0
    size: int = 0
    detail: str = ""

    def to_line(self) -> bytes:
        """One line of ASCII JSON."""
        return json.dumps(astuple(self), separators=(",", ":")).encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> ImageSource:
        """The inverse of `to_line`."""
        return cls(*json.loads(line))

    def index_fields(self) -> dict[str, str]:
        """`path`, and `path_bytes` (base64) where the name is not UTF-8."""
        return path_fields(self.path)

    def read(self) -> bytes:
        """The image file's bytes. Rows of Parquet files come from `ParquetSources` instead.

        Raises:
            OSError: it cannot be read, is no regular file (a pipe or a device might never end) or is too large.
            InputError: remote storage does not answer.
        """
        if self.kind == "failed":
            raise OSError(errno.EINVAL, self.detail)
        if self.kind == "tar" and self.size > MAX_FILE_BYTES:
            raise _too_large()
        if is_remote(self.file):
            return self._read_remote()
        # O_NONBLOCK: opening a pipe would wait for its writer.
        try:
            descriptor = os.open(self.file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as exc:
            if exc.errno == errno.ENXIO:  # a socket
                raise OSError(errno.EINVAL, "not a regular file") from exc
            raise
        with open(descriptor, "rb", buffering=0) as handle:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EINVAL, "not a regular file")
            if self.kind == "tar":
                data = os.pread(descriptor, self.size, self.at)
                if len(data) < self.size:
                    raise OSError(errno.EIO, "the archive ends before this member does")
                return data
            if status.st_size > MAX_FILE_BYTES:
                raise _too_large()
            # Files of /proc have no size and some of them no end.
            data = handle.read(status.st_size) if status.st_size else b""
            rest = handle.read(MAX_FILE_BYTES + 1 - len(data)) if len(data) == status.st_size else b""
            if len(rest) + len(data) > MAX_FILE_BYTES:
                raise _too_large()
            return data + rest if rest else data

    def _read_remote(self) -> bytes:
        if self.kind == "tar" and not self.size:
            return b""  # storage takes an empty range for the whole archive
        start, end = (self.at, self.at + self.size) if self.kind == "tar" else (0, MAX_FILE_BYTES + 1)
        data = read_remote(self.file, start, end, whole=self.kind == "file")
        if len(data) > MAX_FILE_BYTES:
            raise _too_large()
        if self.kind == "tar" and len(data) < self.size:
            raise OSError(errno.EIO, "the archive ends before this member does")
        return data


def path_fields(path: str) -> dict[str, str]:
    """A path as JSON holds it: `path`, and `path_bytes` (base64) where the name is not UTF-8."""
    try:
        raw = os.fsencode(path)
    except UnicodeEncodeError:  # no name of a file
        return {"path": printable(path)}
    try:
        return {"path": raw.decode("utf-8")}
    except UnicodeDecodeError:
        return {"path": raw.decode("utf-8", "replace"), "path_bytes": base64.b64encode(raw).decode("ascii")}


def index_line(row: int, image: ImageSource, sha256: str | None, error: str | None) -> str:
    """A line of the index: `row`, the path, `sha256` of the bytes that were read, and why the image failed."""
    record = {"row": row, **image.index_fields(), "sha256": sha256, "error": error}
    return json.dumps(record, ensure_ascii=False) + "\n"


def path_of_index(record: dict[str, Any]) -> str:
    """The inverse of `ImageSource.index_fields`: the path of a line of the index."""
    raw = record.get("path_bytes")
    if not isinstance(record["path"], str):
        raise TypeError(f"path {record['path']!r}")
    return record["path"] if raw is None else os.fsdecode(base64.b64decode(raw))


def printable(path: str) -> str:
    """A path as text that can be written: bytes that are not UTF-8 become U+FFFD, as in the index."""
    try:
        return os.fsencode(path).decode("utf-8", "replace")
    except UnicodeEncodeError:
        return path.encode("utf-8", "replace").decode()


def _too_large() -> OSError:
    return OSError(errno.EFBIG, f"over the limit of {MAX_FILE_BYTES:,} bytes")
