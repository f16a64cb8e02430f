"""Where the bytes of an image lie, and how they are read: files, members of tar archives, rows of Parquet files."""

from __future__ import annotations

import base64
import errno
import json
import os
import stat
import time
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from typing import Any

from robustfeat.errors import InputError, first_line

__all__ = [
    "MAX_FILE_BYTES",
    "ImageSource",
    "ParquetImages",
    "class_names",
    "image_column",
    "is_remote",
    "open_parquet",
    "open_remote",
    "parquet_path",
    "path_of_index",
    "printable",
]

MAX_FILE_BYTES = 512 * 2**20
"""Files of more bytes are failed rows; so is one that never ends."""

_REMOTE_TRIES = 4
_MISSING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
_PACKAGES = {"s3": "robustfeat[s3]", "gs": "robustfeat[gs]", "hf": "huggingface_hub"}
_REFUSED_TO_ALL = {"ExpiredToken", "InvalidAccessKeyId", "RequestTimeTooSkewed", "SignatureDoesNotMatch"}


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
        raw = os.fsencode(self.path)
        try:
            return {"path": raw.decode("utf-8")}
        except UnicodeDecodeError:
            return {"path": raw.decode("utf-8", "replace"), "path_bytes": base64.b64encode(raw).decode("ascii")}

    def read(self) -> bytes:
        """The image file's bytes. Rows of Parquet files come from `ParquetImages` instead.

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
        filesystem, path = open_remote(self.file)
        for attempt in range(_REMOTE_TRIES):
            try:
                data: bytes = filesystem.cat_file(path, start=start, end=end)
                break
            except Exception as exc:  # each filesystem has its own
                if isinstance(exc, MemoryError):
                    raise
                if isinstance(exc, _MISSING) and not _refused_to_all(exc):
                    reason = "not found" if isinstance(exc, FileNotFoundError) else "cannot be read"
                    raise OSError(errno.ENOENT, f"{reason} ({first_line(exc)})") from exc
                if self.kind == "file" and _is_empty(filesystem, path):
                    return b""  # of which there is no range
                # All that is left is the network's fault.
                if attempt == _REMOTE_TRIES - 1:
                    raise InputError(f"{self.file}: cannot be read ({type(exc).__name__}: {first_line(exc)})") from exc
                time.sleep(2**attempt / 2)
        if len(data) > MAX_FILE_BYTES:
            raise _too_large()
        if self.kind == "tar" and len(data) < self.size:
            raise OSError(errno.EIO, "the archive ends before this member does")
        return data


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


def parquet_path(name: str, row: int) -> str:
    """What the index calls a row of a Parquet file.

    Nine digits: the byte order of the paths is then the order of the rows.
    """
    return f"{name}/{row:09}"


def class_names(schema: Any, column: str) -> tuple[str, ...] | None:
    """The class names of a column of numbers, which Hugging Face `datasets` keeps in the schema's metadata."""
    raw = (schema.metadata or {}).get(b"huggingface")
    try:
        kind = json.loads(raw or b"{}")["info"]["features"][column]
        names = kind.get("feature", kind).get("names")  # a list of classes, or one
    except (AttributeError, KeyError, TypeError, ValueError):
        return None
    return tuple(names) if names else None


def _refused_to_all(exc: Exception) -> bool:
    """Whether it is the credentials that S3 refuses, which is no image's fault."""
    answer = getattr(exc.__cause__, "response", None)
    return isinstance(answer, dict) and answer.get("Error", {}).get("Code") in _REFUSED_TO_ALL


def _is_empty(filesystem: Any, path: str) -> bool:
    try:
        return bool(filesystem.size(path) == 0)
    except Exception:
        return False


def _too_large() -> OSError:
    return OSError(errno.EFBIG, f"over the limit of {MAX_FILE_BYTES:,} bytes")


def is_remote(place: str) -> bool:
    """Whether that is a URL rather than a path."""
    return "://" in place


def open_remote(url: str) -> tuple[Any, str]:
    """The filesystem of a URL, by fsspec (which caches them), and the path in it.

    Raises:
        InputError: the scheme is unknown, or its package is missing.
    """
    scheme = url.partition("://")[0]
    try:
        import fsspec

        # Not `url_to_fs`, which takes :: in the name of a file for a chain of URLs.
        kind = fsspec.get_filesystem_class(scheme)
        return kind(**kind._get_kwargs_from_urls(url)), str(kind._strip_protocol(url))
    except ImportError as exc:
        package = _PACKAGES.get(scheme, "fsspec")
        raise InputError(f"{url}: {first_line(exc)} (pip install '{package}')") from exc
    except ValueError as exc:
        raise InputError(f"{url}: {first_line(exc)}; expected a path, or s3://, gs:// or hf://") from exc


class ParquetImages:
    """Reads rows of one Parquet file in ascending order, keeping one batch of rows in memory."""

    _ROWS = 64

    def __init__(self, file: str, column: str) -> None:
        self.file, self.column = file, column
        self._rows: Iterator[bytes | None] | None = None
        self._next = 0

    def read(self, row: int) -> bytes | None:
        """The encoded image of that row; None where it holds none.

        Raises:
            InputError: the file cannot be read (any longer).
        """
        try:
            if self._rows is None or not 0 <= row - self._next < 10 * self._ROWS:
                self._rows, self._next = self._from(row), row
            for _ in range(self._next, row):
                next(self._rows)
            self._next = row + 1
            return next(self._rows)
        except InputError:
            raise
        except Exception as exc:  # each filesystem has its own
            raise InputError(f"{self.file}: cannot be read ({first_line(exc)})") from exc

    def _from(self, row: int) -> Iterator[bytes | None]:
        import pyarrow
        from pyarrow import compute, parquet

        with open_parquet(self.file) as handle:
            file = parquet.ParquetFile(handle, pre_buffer=False)
            group, first = 0, 0
            while row >= first + file.metadata.row_group(group).num_rows:
                first += file.metadata.row_group(group).num_rows
                group += 1
            groups = list(range(group, file.metadata.num_row_groups))
            skip = row - first
            for batch in file.iter_batches(self._ROWS, row_groups=groups, columns=[self.column]):
                values = batch.column(0)
                if pyarrow.types.is_struct(values.type):
                    values = compute.struct_field(values, "bytes")
                for value in values[skip:]:
                    yield value.as_py()
                skip = max(0, skip - len(values))


def image_column(file: str, column: str | None) -> tuple[str, int]:
    """The column of a Parquet file that holds encoded images, and the number of rows.

    Images are a binary column, or a struct with a binary field `bytes` as Hugging Face writes them.

    Raises:
        InputError: the file cannot be read, has no such column, or has several and none was named.
    """
    from pyarrow import parquet, types

    def holds_images(field: Any) -> bool:
        kind = field.type
        if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            kind = kind.field("bytes").type
        return bool(types.is_binary(kind) or types.is_large_binary(kind))

    try:
        with open_parquet(file) as handle:
            found = parquet.ParquetFile(handle)
            schema, rows = found.schema_arrow, found.metadata.num_rows
    except InputError:
        raise
    except Exception as exc:  # each filesystem has its own
        raise InputError(f"{file}: not a readable Parquet file ({first_line(exc)})") from exc
    names = [field.name for field in schema if holds_images(field)]
    if column is None and len(names) > 1 and "image" in names:
        column = "image"
    if column is None and len(names) == 1:
        column = names[0]
    if column not in names:
        wanted = f"no column {column!r} of image bytes" if column else "no single column of image bytes"
        columns = ", ".join(names) or "none"
        raise InputError(f"{file}: has {wanted}; it has {columns}: name one as {os.path.basename(file)}:COLUMN")
    return str(column), int(rows)


def open_parquet(file: str) -> Any:
    """A Parquet file, opened for pyarrow, local or remote."""
    import pyarrow

    if is_remote(file):
        filesystem, path = open_remote(file)
        return filesystem.open(path, "rb")
    return pyarrow.OSFile(file, "rb")
