"""Folders and files that embedding writes, local or remote (by fsspec)."""

from __future__ import annotations

import errno
import os
import shutil
import struct
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

from robustfeat.errors import InputError, first_line
from robustfeat.files import FileLock, create_file, create_folder, new_file, resolve_link
from robustfeat.serving.inputs.remote import is_remote, open_remote

__all__ = ["LocalFolder", "RemoteFolder", "file_exists", "make_folder", "open_folder", "open_input", "open_output"]


class LocalFolder:
    """A folder of small files that are written whole or not at all, and survive a loss of power."""

    def __init__(self, place: str) -> None:
        self.place = Path(place)
        self._lock = FileLock(self.place / "lock")

    def create(self) -> None:
        """Creates the folder if it is missing, and claims it for this process.

        Raises:
            InputError: another process has claimed it.
        """
        create_folder(self.place)
        if not self._lock.take():
            raise InputError(
                f"{self.place}: another process is writing it{self._lock.holder_note()}",
                fix="wait for it, or stop it",
            )

    def release(self) -> None:
        """Releases the claim of `create`."""
        self._lock.release()

    def names(self) -> set[str]:
        """Complete files; empty if the folder is missing."""
        try:
            return {file.name for file in self.place.iterdir() if file.suffix != ".new"}
        except FileNotFoundError:
            return set()

    def read(self, name: str) -> bytes:
        """A file's bytes."""
        return (self.place / name).read_bytes()

    def write(self, name: str, *parts: bytes | memoryview) -> None:
        """Makes or replaces a file."""
        new = self.place / f"{name}.new"
        try:
            with create_file(new) as handle:
                handle.writelines(parts)
                handle.flush()
                os.fsync(handle.fileno())
        except OSError:
            new.unlink(missing_ok=True)  # frees space on a full disk
            raise
        os.replace(new, self.place / name)
        _sync(self.place)

    def move(self, name: str, target: str) -> None:
        """Moves a file of the folder to `target`, which may be on another file system behind a link."""
        source, real = self.place / name, resolve_link(target)
        try:
            os.replace(source, real)
        except OSError as exc:
            if exc.errno != errno.EXDEV:
                raise
            with new_file(real) as partial:
                shutil.copyfile(source, partial)
            source.unlink()
        _sync(real.parent)

    def delete(self, *names: str) -> None:
        """Deletes files if they exist."""
        for name in names:
            (self.place / name).unlink(missing_ok=True)
        _sync(self.place)

    def remove(self, first: str) -> None:
        """Deletes the folder, first the file `first`, without which the rest is ignored."""
        (self.place / first).unlink(missing_ok=True)
        if self.place.is_dir():
            _sync(self.place)
        shutil.rmtree(self.place, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Makes renames and deletions in a folder survive a loss of power. Windows cannot open folders."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class RemoteFolder:
    """A folder in remote storage, where a put is atomic."""

    def __init__(self, place: str) -> None:
        self.place = place
        self._filesystem, self._path = open_remote(place)

    def create(self) -> None:
        """Creates the folder, if the storage has folders."""
        # `makedirs` would create a missing bucket on S3. Errors show when the first file is written.
        with self._explaining("written"), suppress(OSError):
            self._filesystem.mkdir(self._path, create_parents=False)

    def release(self) -> None:
        """Does nothing, since remote storage has no claims. The caller must avoid simultaneous runs."""

    def names(self) -> set[str]:
        """Complete files; empty if the folder is missing."""
        with self._explaining("listed"):
            self._filesystem.invalidate_cache(self._path)
            try:
                self._filesystem.info(self._path)  # otherwise s3fs lists everything beside a missing folder
                return {entry.rstrip("/").rpartition("/")[2] for entry in self._filesystem.ls(self._path, detail=False)}
            except FileNotFoundError:
                return set()

    def read(self, name: str) -> bytes:
        """A file's bytes."""
        with self._explaining("read"):
            data: bytes = self._filesystem.cat_file(f"{self._path}/{name}")
        return data

    def write(self, name: str, *parts: bytes | memoryview) -> None:
        """Makes or replaces a file."""
        with self._explaining("written"):
            self._filesystem.pipe_file(f"{self._path}/{name}", b"".join(parts))

    def move(self, name: str, target: str) -> None:
        """Moves a file of the folder to `target`, which appears whole."""
        with self._explaining("written"):
            self._filesystem.cp_file(f"{self._path}/{name}", open_remote(target)[1])
            self._filesystem.rm_file(f"{self._path}/{name}")
            self._filesystem.invalidate_cache()

    def delete(self, *names: str) -> None:
        """Deletes files if they exist."""
        for name in names:
            with self._explaining("deleted"), suppress(FileNotFoundError):
                self._filesystem.rm_file(f"{self._path}/{name}")

    def remove(self, first: str) -> None:
        """Deletes the folder, first the file `first`, without which the rest is ignored."""
        with self._explaining("deleted"):
            with suppress(FileNotFoundError):
                self._filesystem.rm_file(f"{self._path}/{first}")
            self._filesystem.invalidate_cache(self._path)
            with suppress(FileNotFoundError):
                self._filesystem.rm(self._path, recursive=True)

    def _explaining(self, what: str) -> AbstractContextManager[None]:
        return _explaining(self.place, what)


def open_folder(place: str) -> LocalFolder | RemoteFolder:
    """Opens a folder by its path or URL. It need not exist."""
    return RemoteFolder(place) if is_remote(place) else LocalFolder(place)


def make_folder(place: str) -> None:
    """Creates a folder to move files to, if the storage has folders and it is missing."""
    if is_remote(place):
        RemoteFolder(place.rstrip("/")).create()
    else:
        Path(place).mkdir(exist_ok=True)


def file_exists(place: str) -> bool:
    """Whether a file exists."""
    if not is_remote(place):
        return Path(place).is_file()
    filesystem, path = open_remote(place)
    with _explaining(place, "found"):
        filesystem.invalidate_cache()
        try:
            return bool(filesystem.info(path)["type"] == "file")  # `isfile` returns False when the network fails
        except FileNotFoundError:
            return False


@contextmanager
def open_input(place: str) -> Iterator[Any]:
    """Opens a file for random access."""
    if not is_remote(place):
        with open(place, "rb") as handle:
            yield handle
        return
    filesystem, path = open_remote(place)
    with _explaining(place, "read"), filesystem.open(path, "rb") as handle:
        yield handle


@contextmanager
def open_output(place: str) -> Iterator[Any]:
    """Opens a binary file for writing. It appears under its name only if the block succeeds.

    Raises:
        InputError: the file cannot be written.
    """
    if not is_remote(place):
        with new_file(place) as partial, open(partial, "wb") as handle:
            yield handle
        return
    filesystem, path = open_remote(place)
    with _explaining(place, "written"):
        handle = filesystem.open(path, "wb", autocommit=False)
        try:
            yield handle
            handle.close()
            handle.commit()
        except BaseException:
            handle.discard()
            raise


@contextmanager
def _explaining(place: str, what: str) -> Iterator[None]:
    """Converts errors of remote storage to `InputError`, since each filesystem raises its own."""
    try:
        yield
    except (InputError, ValueError, KeyError, TypeError, struct.error):  # raised by the block itself
        raise
    except Exception as exc:
        raise InputError(f"{place}: cannot be {what} ({type(exc).__name__}: {first_line(exc)})") from exc
