"""Processes that end when the one that started them does."""

from __future__ import annotations

import ctypes
import os
import signal
from contextlib import suppress

__all__ = ["die_with_parent"]

_PR_SET_PDEATHSIG = 1


def die_with_parent(number: signal.Signals) -> None:
    """Lets this process, and what it becomes by `exec`, get a signal when its parent ends, where the system can."""
    parent = os.getppid()
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        os._exit(1)
