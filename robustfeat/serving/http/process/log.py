"""Writes logs to stderr, one JSON object per line, without images, vectors or keys."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from typing import Any

from robustfeat.progress import json_line
from robustfeat.serving.http.request_notes import CURRENT

__all__ = ["Log", "adopt_logging"]


class Log:
    """Writes lines.

    Args:
        worker: number of the worker, or name of another process.
        requests: whether to log every request.
        stages: whether to log each stage of the server's life.
    """

    def __init__(self, worker: int | str, *, requests: bool = False, stages: bool = False) -> None:
        self._worker, self.requests, self._stages = worker, requests, stages

    def stage(self, event: str, **more: Any) -> None:
        """Logs an expected stage of the server's life."""
        if self._stages:
            self._write("info", event, more)

    def info(self, event: str, **more: Any) -> None:
        """Logs an event."""
        self._write("info", event, more)

    def error(self, event: str, **more: Any) -> None:
        """Logs an unexpected failure."""
        self._write("error", event, more)

    def _write(self, level: str, event: str, more: dict[str, Any]) -> None:
        now = time.time()
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1000):03}Z"
        request = CURRENT.get()
        about = {} if request is None else {"request_id": request.id}
        line = {"time": stamp, "level": level, "worker": self._worker, "event": event, **about, **more}
        # Write each line at once, so lines of several processes do not mix.
        with contextlib.suppress(OSError):  # a closed log must not stop the server
            os.write(sys.stderr.fileno(), f"{json_line(line, compact=True)}\n".encode())


def adopt_logging(log: Log) -> None:
    """Writes warnings and errors of libraries to a log: errors of uvicorn, warnings of all others."""
    logging.captureWarnings(True)
    for name, level in (("", logging.WARNING), ("uvicorn", logging.ERROR)):
        logger = logging.getLogger(name)
        logger.propagate = False
        logger.handlers[:] = [_Handler(log, level)]
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # it logs what clients send


class _Handler(logging.Handler):
    def __init__(self, log: Log, level: int) -> None:
        super().__init__(level)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        trace = logging.Formatter().formatException(record.exc_info) if record.exc_info else None
        write = self._log.error if record.levelno >= logging.ERROR else self._log.info
        write(record.getMessage(), trace=trace)
