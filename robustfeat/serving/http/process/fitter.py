"""Runs a process in which a worker fits heads for the page, one at a time, within a time limit.

The process starts with the first fit and ends after some idle time. It keeps nothing between fits.
"""

from __future__ import annotations

import asyncio
import json
import os
from asyncio.subprocess import PIPE, Process
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from robustfeat.serving.http.process.fitter_program import DONE, HEADER_BYTES, answer
from robustfeat.serving.online.errors import ApiError
from robustfeat.system import INHERITS, python_command

__all__ = ["Fitter"]

DEADLINE_S = 20.0
IDLE_S = 300.0
_START_S = 60.0

_TRIES = 2
_WAITING = 8
_WAITING_OF_KEY = 2


class Fitter:
    """Fits heads. All calls are on one event loop."""

    def __init__(self) -> None:
        self._process: Process | None = None
        self._turn = asyncio.Lock()
        self._waiting: Counter[str] = Counter()
        self._ending: asyncio.TimerHandle | None = None
        self._preparing: asyncio.Task[None] | None = None

    def prepare(self) -> None:
        """Starts the process before the first fit. It ends after the same idle time as after a fit."""
        if INHERITS and self._preparing is None and self._process is None:
            self._preparing = asyncio.create_task(self._prepare())

    async def _prepare(self) -> None:
        with suppress(OSError, EOFError):  # the first fit reports it
            async with self._turn:
                await self._ensure()
                self._rest()
        self._preparing = None

    async def _ensure(self) -> Process:
        if self._ending is not None:
            self._ending.cancel()
        if self._process is None or self._process.returncode is not None:
            self._process = await _start()
        return self._process

    def _rest(self) -> None:
        """Ends the process unless a fit arrives in time."""
        self._ending = asyncio.get_running_loop().call_later(IDLE_S, self.close)

    async def fit(self, asked: Mapping[str, Any], rows: bytes, key: str) -> bytes:
        """The response of the process.

        Args:
            asked, rows: see `fitter_program`.
            key: the client's key; empty without keys.

        Raises:
            ApiError: 422 if the rows cannot be fitted; 429 or 503 if too many fits wait.
        """
        if key and self._waiting[key] >= _WAITING_OF_KEY:
            message = f"the key {key} has {_WAITING_OF_KEY} fits at hand; wait for their answers"
            raise ApiError(429, "share_exceeded", message, retry_after_s=1)
        if self._waiting.total() >= _WAITING:
            raise ApiError(503, "queue_full", "too many heads are being fitted; try again soon", retry_after_s=1)
        self._waiting[key] += 1
        try:
            await self._turn.acquire()
        except BaseException:  # a waiting client that disconnects leaves the queue
            self._leave(key)
            raise
        # A running fit is finished even if its client disconnects, since a new process would cost more.
        task = asyncio.create_task(self._fit(asked, rows, key))
        task.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody may await it
        return await asyncio.shield(task)

    def _leave(self, key: str) -> None:
        self._waiting[key] -= 1
        if not self._waiting[key]:
            del self._waiting[key]

    async def _fit(self, asked: Mapping[str, Any], rows: bytes, key: str) -> bytes:
        """Takes a turn, and releases it."""
        try:
            state, data = await self._exchange(json.dumps(asked).encode(), rows)
            self._rest()
        finally:
            self._turn.release()
            self._leave(key)
        if state != DONE:
            raise ApiError(422, "bad_request", data.decode())
        return data

    async def _exchange(self, text: bytes, rows: bytes) -> tuple[int, bytes]:
        """The response of the process. A new process gets a second try, since the old one may just have ended."""
        if not INHERITS:  # event loops of Windows that watch pipes start no processes
            return await asyncio.to_thread(answer, text, rows)
        message = len(text).to_bytes(4, "little") + len(rows).to_bytes(4, "little") + text + rows
        for _ in range(_TRIES):
            try:
                process = await self._ensure()
            except (OSError, EOFError):  # a TimeoutError is an OSError
                continue
            try:
                stdin, stdout = process.stdin, process.stdout
                assert stdin is not None
                assert stdout is not None
                async with asyncio.timeout(DEADLINE_S):
                    stdin.write(message)
                    await stdin.drain()
                    header = await stdout.readexactly(HEADER_BYTES)
                    data = await stdout.readexactly(int.from_bytes(header[4:], "little"))
                return int.from_bytes(header[:4], "little"), data
            except TimeoutError:
                self.close()
                refusal = f"the fit took longer than {DEADLINE_S:g} s; send fewer rows or classes"
                raise ApiError(422, "fit_timeout", refusal) from None
            except (OSError, EOFError, RuntimeError):  # RuntimeError: uvloop's, of a pipe that is closed
                self.close()
            except BaseException:
                self.close()  # half an exchange
                raise
        raise ApiError(503, "fit_failed", "the process that fits heads has ended; try again", retry_after_s=1)

    def close(self) -> None:
        """Ends the process."""
        process, self._process = self._process, None
        if process is not None:
            with suppress(ProcessLookupError):
                process.kill()


async def _start() -> Process:
    """Starts a process that takes requests.

    Raises:
        OSError, EOFError, TimeoutError: the system refuses it, or it does not start in time.
    """
    code = f"from robustfeat.serving.http.process.fitter_program import serve; serve({os.getpid()})"
    # Use one thread: a fit of few rows gains nothing from more, and images need the processors.
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    process = await asyncio.create_subprocess_exec(*python_command(code), stdin=PIPE, stdout=PIPE, env=environment)
    try:
        assert process.stdout is not None
        async with asyncio.timeout(_START_S):
            await process.stdout.readexactly(HEADER_BYTES)
    except BaseException:
        with suppress(ProcessLookupError):
            process.kill()
        raise
    return process
