"""Locates and reads the bytes of images: files and members of tar archives, local or remote."""

from __future__ import annotations

import base64
import errno
import json
import os
import stat
from dataclasses import astuple, dataclass
from typing import Any

from robustfeat.serving.inputs.remote import is_remote, read_remote
from robustfeat.system import NOT_BLOCKING

__all__ = ["MAX_FILE_BYTES", "ImageSource", "index_line", "path_fields", "path_of_index", "printable"]

MAX_FILE_BYTES = 512 * 2**20
"""Largest accepted file. A larger or endless file is a failed row."""


@dataclass(frozen=True, slots=True)
class ImageSource:
    """The source of one row.

    Attributes:
        path: POSIX path in the index. Bytes that are not UTF-8 are lone surrogates (`os.fsdecode`).
        file: the file with the image: an absolute path, or a URL of fsspec.
        kind: file, tar or parquet; or `failed`, with the reason in `detail`.
        at, size: position and size of a tar member's bytes. For Parquet, `at` is the row.
        detail: the column, for Parquet.
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
        """Reverses `to_line`."""
        return cls(*json.loads(line))

    def index_fields(self) -> dict[str, str]:
        """`path`, and `path_bytes` (base64) if the name is not UTF-8."""
        return path_fields(self.path)

    def read(self) -> bytes:
        """Reads the image file's bytes. `ParquetSources` reads rows of Parquet files instead.

        Raises:
            OSError: the file cannot be read, is too large, or is not regular (a pipe or device might never end).
            InputError: remote storage does not answer.
        """
        if self.kind == "failed":
            raise OSError(errno.EINVAL, self.detail)
        if self.kind == "tar" and self.size > MAX_FILE_BYTES:
            raise _too_large()
        if is_remote(self.file):
            return self._read_remote()
        # Without NOT_BLOCKING, opening a pipe would wait for its writer.
        try:
            descriptor = os.open(self.file, os.O_RDONLY | NOT_BLOCKING)
        except OSError as exc:
            if exc.errno == errno.ENXIO:  # a socket
                raise OSError(errno.EINVAL, "not a regular file") from exc
            raise
        with open(descriptor, "rb", buffering=0) as handle:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EINVAL, "not a regular file")
            if self.kind == "tar":
                handle.seek(self.at)
                data = handle.read(self.size)
                if len(data) < self.size:
                    raise OSError(errno.EIO, "the archive ends before this member does")
                return data
            if status.st_size > MAX_FILE_BYTES:
                raise _too_large()
            # Files of /proc have no size, and some have no end.
            data = handle.read(status.st_size) if status.st_size else b""
            rest = handle.read(MAX_FILE_BYTES + 1 - len(data)) if len(data) == status.st_size else b""
            if len(rest) + len(data) > MAX_FILE_BYTES:
                raise _too_large()
            return data + rest if rest else data

    def _read_remote(self) -> bytes:
        if self.kind == "tar" and not self.size:
            return b""  # storage treats an empty range as the whole archive
        start, end = (self.at, self.at + self.size) if self.kind == "tar" else (0, MAX_FILE_BYTES + 1)
        data = read_remote(self.file, start, end, whole=self.kind == "file")
        if len(data) > MAX_FILE_BYTES:
            raise _too_large()
        if self.kind == "tar" and len(data) < self.size:
            raise OSError(errno.EIO, "the archive ends before this member does")
        return data


def path_fields(path: str) -> dict[str, str]:
    """A path as JSON fields: `path`, and `path_bytes` (base64) if the name is not UTF-8."""
    try:
        raw = os.fsencode(path)
    except UnicodeEncodeError:  # not a name of a file
        return {"path": printable(path)}
    try:
        return {"path": raw.decode("utf-8")}
    except UnicodeDecodeError:
        return {"path": raw.decode("utf-8", "replace"), "path_bytes": base64.b64encode(raw).decode("ascii")}


def index_line(row: int, image: ImageSource, sha256: str | None, error: str | None) -> str:
    """A line of the index: `row`, the path, `sha256` of the bytes, and the error of a failed image."""
    record = {"row": row, **image.index_fields(), "sha256": sha256, "error": error}
    return json.dumps(record, ensure_ascii=False) + "\n"


def path_of_index(record: dict[str, Any]) -> str:
    """Reverses `ImageSource.index_fields`: the path of a line of the index."""
    raw = record.get("path_bytes")
    if not isinstance(record["path"], str):
        raise TypeError(f"path {record['path']!r}")
    return record["path"] if raw is None else os.fsdecode(base64.b64decode(raw))


def printable(path: str) -> str:
    """Makes a path writable as UTF-8: other bytes become U+FFFD, as in the index."""
    try:
        return os.fsencode(path).decode("utf-8", "replace")
    except UnicodeEncodeError:
        return path.encode("utf-8", "replace").decode()


def _too_large() -> OSError:
    return OSError(errno.EFBIG, f"over the limit of {MAX_FILE_BYTES:,} bytes")
