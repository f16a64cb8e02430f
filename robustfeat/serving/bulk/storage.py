"""Folders and files that embedding writes, on this machine or in remote storage (by fsspec)."""

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
    """A folder of small files that are written whole or not at all, and stay through a loss of power."""

    def __init__(self, place: str) -> None:
        self.place = Path(place)
        self._lock = FileLock(self.place / "lock")

    def create(self) -> None:
        """Makes the folder, where it is not there, and claims it for this process.

        Raises:
            InputError: another process has it.
        """
        create_folder(self.place)
        if not self._lock.take():
            raise InputError(
                f"{self.place}: another process is writing it{self._lock.holder_note()}",
                fix="wait for it, or stop it",
            )

    def release(self) -> None:
        """Ends the claim of `create`."""
        self._lock.release()

    def names(self) -> set[str]:
        """Files that are complete; none where the folder is missing."""
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
            new.unlink(missing_ok=True)  # a full disk needs the room
            raise
        os.replace(new, self.place / name)
        _sync(self.place)

    def move(self, name: str, target: str) -> None:
        """Makes a file of the folder the file `target`, which may lie in another file system by way of a link."""
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
        """Deletes files, if they are there."""
        for name in names:
            (self.place / name).unlink(missing_ok=True)
        _sync(self.place)

    def remove(self, first: str) -> None:
        """Deletes the folder, `first` (the file without which it means nothing) before all others."""
        (self.place / first).unlink(missing_ok=True)
        if self.place.is_dir():
            _sync(self.place)
        shutil.rmtree(self.place, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Makes renames and deletions in a folder stay through a loss of power; Windows opens no folders."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class RemoteFolder:
    """The same in remote storage, where a put is whole or not at all by itself."""

    def __init__(self, place: str) -> None:
        self.place = place
        self._filesystem, self._path = open_remote(place)

    def create(self) -> None:
        """Makes the folder, for storage that has such."""
        # Not `makedirs`: for S3 it makes the bucket, if need be. What is wrong shows when the first file is written.
        with self._explaining("written"), suppress(OSError):
            self._filesystem.mkdir(self._path, create_parents=False)

    def release(self) -> None:
        """There is no claim on remote storage: two runs at once are the caller's to avoid."""

    def names(self) -> set[str]:
        """Files that are complete; none where the folder is missing."""
        with self._explaining("listed"):
            self._filesystem.invalidate_cache(self._path)
            try:
                self._filesystem.info(self._path)  # or s3fs lists all that lies beside a missing folder
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
        """Makes a file of the folder the file `target`, which appears whole."""
        with self._explaining("written"):
            self._filesystem.cp_file(f"{self._path}/{name}", open_remote(target)[1])
            self._filesystem.rm_file(f"{self._path}/{name}")
            self._filesystem.invalidate_cache()

    def delete(self, *names: str) -> None:
        """Deletes files, if they are there."""
        for name in names:
            with self._explaining("deleted"), suppress(FileNotFoundError):
                self._filesystem.rm_file(f"{self._path}/{name}")

    def remove(self, first: str) -> None:
        """Deletes the folder, `first` (the file without which it means nothing) before all others."""
        with self._explaining("deleted"):
            with suppress(FileNotFoundError):
                self._filesystem.rm_file(f"{self._path}/{first}")
            self._filesystem.invalidate_cache(self._path)
            with suppress(FileNotFoundError):
                self._filesystem.rm(self._path, recursive=True)

    def _explaining(self, what: str) -> AbstractContextManager[None]:
        return _explaining(self.place, what)


def open_folder(place: str) -> LocalFolder | RemoteFolder:
    """A folder by its path or URL; it need not exist."""
    return RemoteFolder(place) if is_remote(place) else LocalFolder(place)


def make_folder(place: str) -> None:
    """Makes a folder for files to be moved to, where storage has folders and this one is not there."""
    if is_remote(place):
        RemoteFolder(place.rstrip("/")).create()
    else:
        Path(place).mkdir(exist_ok=True)


def file_exists(place: str) -> bool:
    """Whether there is such a file."""
    if not is_remote(place):
        return Path(place).is_file()
    filesystem, path = open_remote(place)
    with _explaining(place, "found"):
        filesystem.invalidate_cache()
        try:
            return bool(filesystem.info(path)["type"] == "file")  # `isfile` says no when the network fails
        except FileNotFoundError:
            return False


@contextmanager
def open_input(place: str) -> Iterator[Any]:
    """A file, opened for reading at random."""
    if not is_remote(place):
        with open(place, "rb") as handle:
            yield handle
        return
    filesystem, path = open_remote(place)
    with _explaining(place, "read"), filesystem.open(path, "rb") as handle:
        yield handle


@contextmanager
def open_output(place: str) -> Iterator[Any]:
    """A binary file to write; it appears under its name when the block ends well, and not at all otherwise.

    Raises:
        InputError: it cannot be written.
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
    """Makes every error of remote storage one of ours: each filesystem has its own."""
    try:
        yield
    except (InputError, ValueError, KeyError, TypeError, struct.error):  # what the block made of the bytes
        raise
    except Exception as exc:
        raise InputError(f"{place}: cannot be {what} ({type(exc).__name__}: {first_line(exc)})") from exc
