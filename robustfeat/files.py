"""Writes outputs that appear whole or not at all: under a temporary name beside the target, then renamed.

Locks keep two processes from writing the same output.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from robustfeat.errors import InputError

try:
    import fcntl
except ImportError:  # Windows: nothing is locked there
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "START_OVER",
    "FileLock",
    "create_file",
    "create_folder",
    "lock_inherited",
    "new_file",
    "new_folder",
    "require_new",
    "reserve_space",
    "resolve_link",
    "take_turn",
]

START_OVER = "partial files were removed: free space or choose another place, then run again"
"""The fix after an output could not be written and its partial files were removed."""

_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EACCES}
"""Errors of file systems without locks, and for a lock file that a killed process of another user left."""

_NO_LINKS = getattr(os, "O_NOFOLLOW", 0)  # Windows has no such flag


def _beside(target: Path) -> Path:
    # The name is always the same, so the next process removes the files of a killed one.
    return target.with_name(f".{target.name}.partial")


def create_file(path: Path) -> BinaryIO:
    """Creates a file for writing and replaces any other of its name. A link is replaced, not followed.

    In a shared folder, somebody may have planted a link so that another file is overwritten.

    Raises:
        OSError: the file system refuses.
    """
    path.unlink(missing_ok=True)
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_LINKS, 0o666), "wb")


def create_folder(path: Path) -> None:
    """Creates a folder if it is missing. A link of its name is removed, not followed.

    Raises:
        OSError: the file system refuses.
    """
    if path.is_symlink():
        path.unlink()
    path.mkdir(exist_ok=True)


def _refusal(target: Path, exc: OSError, fix: str = "free space or choose another place, then run again") -> InputError:
    return InputError(f"{target}: cannot be written ({exc.strerror or exc})", fix=fix)


@contextmanager
def new_file(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a path to write to. It becomes `target` if the block succeeds, and is removed if it fails.

    Processes that write one target take turns.

    Raises:
        InputError: the file system refuses (full, read-only, missing folder), or `target` is not a regular file.
    """
    try:
        target = resolve_link(target)
    except OSError as exc:
        raise InputError(f"{target}: {exc.strerror}", fix="choose another place") from exc
    if target.exists() and not target.is_file():
        raise InputError(f"{target}: exists and is not a regular file", fix="choose another place")
    partial = _beside(target)
    with take_turn(target):
        try:
            create_file(partial).close()
            yield partial
            with open(partial, "r+b") as handle:  # Windows flushes no file that is opened for reading
                os.fsync(handle.fileno())
            os.replace(partial, target)
        except BaseException as exc:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            if isinstance(exc, OSError):
                raise _refusal(target, exc) from exc
            raise


@contextmanager
def take_turn(target: str | os.PathLike[str]) -> Iterator[None]:
    """Lets one process at a time run the block for `target`. Other processes wait.

    Each `new_file` has such a turn, so code in its block reads the target as the process before left it. A turn locks
    `.NAME.lock` beside the target, which exists only meanwhile. Where the file system has no locks, nobody waits.

    Raises:
        InputError: the lock file cannot be created.
    """
    target = Path(target)
    place = target.with_name(f".{target.name}.lock")
    lock = FileLock(place)
    try:
        lock.take(on_wait=lambda: None)
    except OSError as exc:
        if exc.errno not in _NO_LOCKS:
            raise _refusal(target, exc) from exc
        if exc.errno != errno.EACCES:
            place.unlink(missing_ok=True)
    try:
        yield
    finally:
        if lock.is_held:
            with suppress(OSError):
                place.unlink(missing_ok=True)  # the next process in line finds out, and locks a new file
            lock.release()


def resolve_link(target: str | os.PathLike[str]) -> Path:
    """The file that a new file replaces: the target of a link rather than the link.

    Raises:
        OSError: the link is another user's, in a folder that everybody may write to, so it may point to one of our
            files. Linux does not follow such links either (`fs.protected_symlinks`).
    """
    path = Path(target)
    if path.is_symlink():
        link, folder = path.lstat(), path.parent.stat()
        is_shared = folder.st_mode & stat.S_ISVTX and folder.st_mode & stat.S_IWOTH
        if is_shared and link.st_uid not in {os.geteuid(), folder.st_uid}:
            raise OSError(errno.EACCES, "a link that another user created")
    return Path(os.path.realpath(path))


def require_new(target: str | os.PathLike[str]) -> None:
    """Makes the checks of `new_folder` before long work whose result goes there.

    Raises:
        InputError: `target` exists and is not an empty folder.
    """
    target = Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target}: exists already", fix="remove it or choose another place")


@contextmanager
def new_folder(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a new folder to fill. It becomes `target` if the block succeeds, and is removed if it fails.

    Raises:
        InputError: `target` exists and is not an empty folder, another process is filling it, or the file system
            refuses.
    """
    target = Path(target).absolute()  # `.` has no name otherwise
    require_new(target)
    partial = _beside(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        create_folder(partial)
        lock = FileLock(partial)
        taken = lock.take()
    except OSError as exc:
        raise _refusal(target, exc, START_OVER) from exc
    if not taken:
        raise InputError(
            f"{target}: another process is writing it{lock.holder_note()}", fix="wait for it, or choose another place"
        )
    try:
        for entry in partial.iterdir():  # left by a killed process
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        yield partial
        if target.is_dir():
            target.rmdir()
        os.replace(partial, target)
    except BaseException as exc:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(exc, OSError):
            raise _refusal(target, exc, START_OVER) from exc
        raise
    finally:
        lock.release()


def reserve_space(file: BinaryIO, size: int) -> None:
    """Lets a file have at least `size` bytes, and takes their space on the disk where the system can.

    A full disk is then an error now. Under a memory map it would be a signal.

    Raises:
        OSError: the disk is full.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
    elif os.fstat(file.fileno()).st_size < size:  # macOS, Windows
        os.truncate(file.fileno(), size)


class FileLock:
    """An exclusive lock on a file or a folder, held by one process at a time.

    The kernel releases it when its process ends, even by a kill. Forked children do not keep it. `take` takes the lock
    and `release` releases it. On Windows nothing is locked, and `take` always succeeds.

    Args:
        path: an existing folder, or a file. A missing file is created and kept; a link is replaced by a file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self._descriptor: int | None = None

    def take(self, *, on_wait: Callable[[], None] | None = None) -> bool:
        """Takes the lock. Returns False if another process holds it or has just renamed or removed the locked file.

        Args:
            on_wait: called before waiting for the holder. With it, `take` waits and always succeeds; without it,
                `take` does not wait.

        Raises:
            OSError: the path cannot be opened, or its file system has no locks.
        """
        if fcntl is None:
            return True
        self.release()
        flags = os.O_RDWR | os.O_CREAT | _NO_LINKS
        if self._path.is_dir():
            flags = os.O_RDONLY | os.O_DIRECTORY
        elif self._path.is_symlink():  # opening it could lock or create another user's file
            self._path.unlink(missing_ok=True)
        # The holder may remove or replace the file during the wait. Then lock the new file.
        while not self._try(flags, on_wait):
            if on_wait is None:
                return False
        return True

    def _try(self, flags: int, on_wait: Callable[[], None] | None) -> bool:
        descriptor = os.open(self._path, flags, 0o666)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if on_wait is None:
                    return False
                on_wait()
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            with suppress(FileNotFoundError):
                if os.path.samestat(self._path.stat(), os.fstat(descriptor)):
                    self._descriptor = descriptor
                    _held.add(self)
            return self._descriptor is not None
        finally:
            if self._descriptor is None:
                os.close(descriptor)

    @property
    def is_held(self) -> bool:
        """Whether this process holds the lock. Always False on Windows."""
        return self._descriptor is not None

    def release(self) -> None:
        """Releases the lock if it is held."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
            _held.discard(self)

    def holder_note(self) -> str:
        """Names the holder for a message, as ` (process 4711)`. Empty if the system does not know it."""
        with suppress(OSError, ValueError):
            status = self._path.stat()
            place = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
            for line in Path("/proc/locks").read_text().splitlines():
                # The format is NUMBER: FLOCK ADVISORY WRITE PROCESS MAJOR:MINOR:INODE START END.
                _, kind, _, _, process, where, *_ = line.split()
                if kind == "FLOCK" and where == place and int(process) > 0:
                    return f" (process {process})"
        return ""


_held: set[FileLock] = set()


def _release_in_child() -> None:
    # A child that outlives its parent would keep the lock. The parent's own descriptor stays open.
    for lock in list(_held):
        lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_release_in_child)


@contextmanager
def lock_inherited(descriptor: int) -> Iterator[None]:
    """Waits for and holds a lock on a file whose descriptor several processes inherited.

    A `FileLock` would not work here, since processes that share a descriptor share its `flock`. On Windows no process
    inherits a descriptor, and nothing is locked.
    """
    if fcntl is None:
        yield
        return
    fcntl.lockf(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.lockf(descriptor, fcntl.LOCK_UN)
