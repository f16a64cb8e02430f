"""Processes of our own: programs in Python that this one starts, and that end when it does."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from contextlib import suppress

__all__ = ["die_with_parent", "python_command"]

_PR_SET_PDEATHSIG = 1


def python_command(code: str, *arguments: str) -> list[str]:
    """The command line that runs `code`, with this process's search path for modules."""
    return [sys.executable, "-P", "-c", f"import sys; sys.path[:] = {sys.path!r}\n{code}", *arguments]


def die_with_parent(number: signal.Signals) -> None:
    """Lets this process, and what it becomes by `exec`, get a signal when its parent ends, where the system can."""
    parent = os.getppid()
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        os._exit(1)
