"""The stack on which a thread handles signals, kept from OpenVINO."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["keep_signal_stack"]


class _Stack(ctypes.Structure):
    """`stack_t` of Linux: see `man 2 sigaltstack`."""

    _fields_ = (("ss_sp", ctypes.c_void_p), ("ss_flags", ctypes.c_int), ("ss_size", ctypes.c_size_t))


@contextmanager
def keep_signal_stack() -> Iterator[None]:
    """This thread has the same alternate stack for signals after the block as before it.

    OpenVINO's plugin for processors sets one when it is loaded. It unmaps the stack when it ends, and takes it from the
    thread only if the same thread ends the plugin and no other plugin was loaded later. Otherwise the next signal that
    Python handles in this thread (SIGTERM, SIGINT, SIGCHLD) ends the process by SIGSEGV. A stack that the plugin no
    longer finds in use is unmapped and nothing else.

    Source: `SigAltStackSetup` in OpenVINO 2026.4, src/plugins/intel_cpu.
    """
    if sys.platform != "linux":
        yield
        return
    libc, kept = ctypes.CDLL(None), _Stack()
    libc.sigaltstack(None, ctypes.byref(kept))
    try:
        yield
    finally:
        libc.sigaltstack(ctypes.byref(kept), None)
