"""Logs: one JSON object a line, to stderr. Never of images, vectors or keys."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from typing import Any

from robustfeat.progress import json_line

__all__ = ["Log"]


class Log:
    """Writes lines.

    Args:
        worker: who writes: a worker's number, or another process's name.
        requests: whether there is a line for every request, too.
    """

    def __init__(self, worker: int | str, *, requests: bool = False) -> None:
        self._worker, self.requests = worker, requests

    def info(self, event: str, **more: Any) -> None:
        """Something happened."""
        self._write("info", event, more)

    def error(self, event: str, **more: Any) -> None:
        """Something failed that should not have."""
        self._write("error", event, more)

    def _write(self, level: str, event: str, more: dict[str, Any]) -> None:
        now = time.time()
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1000):03}Z"
        line = {"time": stamp, "level": level, "worker": self._worker, "event": event, **more}
        # One write a line: lines of several processes do not mix.
        with contextlib.suppress(OSError):  # nobody reads: no reason to stop serving
            os.write(sys.stderr.fileno(), f"{json_line(line, compact=True)}\n".encode())
