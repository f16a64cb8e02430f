"""Outputs appear whole or not at all: written under a temporary name beside the target, then renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from robustfeat.errors import InputError

__all__ = ["new_file", "new_folder", "require_new"]


def _beside(target: Path) -> Path:
    # Always the same name: what a killed process left is overwritten by the next one.
    return target.with_name(f".{target.name}.partial")


def _explain(target: Path, exc: OSError) -> InputError:
    return InputError(
        f"{target}: cannot be written ({exc.strerror or exc}); "
        "nothing was left behind: free space or choose another place, then run again"
    )


@contextmanager
def new_file(target: str | os.PathLike[str]) -> Iterator[Path]:
    """A path to write to; it becomes `target` when the block ends well and vanishes when it does not.

    Raises:
        InputError: the file system refuses (full, read-only, missing folder), or `target` is no regular file.
    """
    target = Path(os.path.realpath(target))  # what a link points to, not the link
    if target.exists() and not target.is_file():
        raise InputError(f"{target}: exists and is not a regular file; choose another place")
    partial = _beside(target)
    try:
        yield partial
        with open(partial, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(partial, target)
    except OSError as exc:
        raise _explain(target, exc) from exc
    finally:
        partial.unlink(missing_ok=True)


def require_new(target: str | os.PathLike[str]) -> None:
    """Asks what `new_folder` will ask, before the work whose result goes there.

    Raises:
        InputError: `target` exists and is not an empty folder.
    """
    target = Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target}: exists already; remove it or choose another place")


@contextmanager
def new_folder(target: str | os.PathLike[str]) -> Iterator[Path]:
    """A fresh folder to fill; it becomes `target` when the block ends well and vanishes when it does not.

    Raises:
        InputError: `target` exists and is not an empty folder, another process is filling it, or the file system
            refuses.
    """
    target = Path(target).absolute()  # so that `.` has a name
    require_new(target)
    partial = _beside(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        claim = _claim(partial, target)
    except OSError as exc:
        raise _explain(target, exc) from exc
    try:
        for entry in partial.iterdir():  # of a killed process
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        yield partial
        if target.is_dir():
            target.rmdir()
        os.replace(partial, target)
    except BaseException as exc:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(exc, OSError):
            raise _explain(target, exc) from exc
        raise
    finally:
        os.close(claim)


def _claim(partial: Path, target: Path) -> int:
    """Makes the folder and locks it until the descriptor is closed."""
    import fcntl

    partial.mkdir(exist_ok=True)
    descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        ours = partial.exists() and os.path.samestat(partial.stat(), os.fstat(descriptor))
    except BlockingIOError:
        ours = False
    if not ours:  # locked, or it got its final name between the two calls
        os.close(descriptor)
        raise InputError(f"{target}: another process is writing it; wait for it, or choose another place")
    return descriptor
