"""Locks by which several processes part the work on one report."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from robustfeat.errors import InputError
from robustfeat.files import FileLock

__all__ = ["BusyError", "Locks"]


class BusyError(Exception):
    """Another process is at work on this part of the report."""


class Locks:
    """Files that the kernel locks, and frees when their process ends.

    Args:
        folder: folder of the files, created on demand.
        say: prints a message before a wait.

    Attributes:
        wait: for other processes to come to their end; otherwise `BusyError` is raised.
    """

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self._folder, self._say = folder, say
        self.wait = True

    @contextmanager
    def held(self, name: str, *, always_wait: bool = False) -> Iterator[None]:
        """Keeps other processes from what has this name.

        Raises:
            BusyError: another process has it, and neither `wait` nor `always_wait` is set.
            InputError: the file system does not keep locks.
        """
        file = self._folder / f"{name}.lock"
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
        except OSError as exc:
            raise InputError(f"{file}: cannot be made ({exc.strerror})", fix="choose another `out`") from exc

        def say() -> None:
            self._say(f"waiting for another process, which is at work on {name}")

        lock = FileLock(file)
        try:
            taken = lock.take(on_wait=say if self.wait or always_wait else None)
        except OSError as exc:
            what = f"{file}: cannot be locked ({exc.strerror})"
            raise InputError(what, fix="choose an `out` on a local disk") from exc
        if not taken:
            raise BusyError(name)
        try:
            yield
        finally:
            lock.release()
