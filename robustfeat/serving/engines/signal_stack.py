"""Protects a thread's signal stack from OpenVINO."""

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
    """Restores this thread's alternate signal stack after the block.

    OpenVINO's plugin for processors sets a stack when it loads. It unmaps the stack when it ends, but removes it from
    the thread only if the same thread ends the plugin and no other plugin was loaded later. Otherwise the next signal
    that Python handles in this thread (SIGTERM, SIGINT, SIGCHLD) ends the process by SIGSEGV. If the thread does not
    use the stack, the plugin only unmaps it.

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
