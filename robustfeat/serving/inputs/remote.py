"""Reads files in remote storage by URL, with fsspec."""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator
from typing import Any

from robustfeat.errors import InputError, first_line

__all__ = ["forbids", "is_remote", "open_remote", "read_remote", "remote_entries"]

_TRIES = 4
_FORBIDDEN = (401, 403)
_MISSING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
_PACKAGES = {"s3": "robustfeat[s3]", "gs": "robustfeat[gs]", "hf": "huggingface_hub"}
_REFUSED_TO_ALL = {"ExpiredToken", "InvalidAccessKeyId", "RequestTimeTooSkewed", "SignatureDoesNotMatch"}


def is_remote(place: str) -> bool:
    """Whether a place is a URL rather than a path."""
    return "://" in place


def open_remote(url: str) -> tuple[Any, str]:
    """The fsspec filesystem of a URL, which fsspec caches, and the path in it.

    Raises:
        InputError: the scheme is unknown, or its package is missing.
    """
    scheme = url.partition("://")[0]
    try:
        import fsspec

        # `url_to_fs` would take :: in the name of a file for a chain of URLs.
        kind = fsspec.get_filesystem_class(scheme)
        return kind(**kind._get_kwargs_from_urls(url)), str(kind._strip_protocol(url))
    except ImportError as exc:
        package = _PACKAGES.get(scheme, "fsspec")
        raise InputError(f"{url}: {first_line(exc)} (pip install '{package}')") from exc
    except ValueError as exc:
        raise InputError(f"{url}: {first_line(exc)}; expected a path, or s3://, gs:// or hf://") from exc
    except Exception as exc:  # some filesystems connect at once, and each raises its own errors
        raise InputError(f"{url}: cannot be reached ({type(exc).__name__}: {first_line(exc)})") from exc


def read_remote(url: str, start: int, end: int, *, whole: bool) -> bytes:
    """Reads bytes `start` to `end` of a file, fewer if it ends earlier.

    Args:
        whole: whether the range is the whole file, which may be empty.

    Raises:
        OSError: the file is missing or may not be read.
        InputError: the storage does not answer.
    """
    filesystem, path = open_remote(url)
    tries = 0
    while True:
        try:
            data: bytes = filesystem.cat_file(path, start=start, end=end)
            return data
        except Exception as exc:  # each filesystem has its own
            if isinstance(exc, MemoryError):
                raise
            if isinstance(exc, _MISSING) and not _refused_to_all(exc):
                reason = "not found" if isinstance(exc, FileNotFoundError) else "cannot be read"
                raise OSError(errno.ENOENT, f"{reason} ({first_line(exc)})") from exc
            if whole and _is_empty(filesystem, path):
                return b""  # storage refuses ranges of an empty file
            # All other errors come from the network.
            tries += 1
            if tries == _TRIES:
                raise InputError(f"{url}: cannot be read ({type(exc).__name__}: {first_line(exc)})") from exc
            time.sleep(2**tries / 4)


def forbids(exc: BaseException) -> str | None:
    """Describes a server's refusal of access; None for other errors.

    HTTP filesystems raise a refusal as a missing file.
    """
    cause = exc.__cause__ or exc
    status = getattr(cause, "status", None) or getattr(getattr(cause, "response", None), "status_code", None)
    return f"the server forbids it, HTTP {status}" if status in _FORBIDDEN else None


def _refused_to_all(exc: Exception) -> bool:
    """Whether S3 refuses the credentials, which affects all images."""
    answer = getattr(exc.__cause__, "response", None)
    return isinstance(answer, dict) and answer.get("Error", {}).get("Code") in _REFUSED_TO_ALL


def _is_empty(filesystem: Any, path: str) -> bool:
    try:
        return bool(filesystem.size(path) == 0)
    except Exception:
        return False


def remote_entries(filesystem: Any, folder: str) -> Iterator[tuple[str, bool]]:
    """Lists a folder: names, and whether each is a folder. Empty for a missing folder.

    fsspec's own `walk` and `glob` silently skip folders that they cannot list.
    """
    try:
        found = filesystem.ls(folder, detail=True)
    except FileNotFoundError:
        return
    for info in found:
        place = info["name"].rstrip("/")
        if place.strip("/") != folder.strip("/"):  # S3 may have an empty object with the folder's name
            yield place.rpartition("/")[2], info["type"] == "directory"
