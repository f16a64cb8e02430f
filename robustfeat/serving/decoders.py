"""Decoder processes: they turn rows of an input list into squares, in parallel and without risk to the parent.

Each is a process of its own with a pipe, and a deadline for every image. `multiprocessing`'s pools will not do: one
dead worker breaks them all, and a hung one cannot be told from a slow one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustfeat.errors import EngineError, InputError
from robustfeat.hub.preprocessing import Preprocessing
from robustfeat.serving.decoder import Decoded, Images, SharedSquares, Task

__all__ = ["DEADLINE_S", "DecoderPool"]

DEADLINE_S = 60.0
"""An image that takes longer to read and decode is a failed row."""

_START_DEADLINE_S = 60.0
_TRIES = 2


@dataclass(frozen=True)
class _Lost:
    """A decoder was lost at an offset of its task; `final` if the image shall have no second chance."""

    offset: int
    reason: str
    final: bool


class DecoderPool:
    """`workers` decoder processes; use it in a `with` block.

    Args:
        contract: what they decode to.
        scaled: see `prepare_square`.
        workers: how many.
        places: squares that the shared memory holds.
        deadline_s: see `DEADLINE_S`.

    Attributes:
        squares: (places, S, S, 3) uint8, shared.
    """

    def __init__(
        self, contract: Preprocessing, *, scaled: bool, workers: int, places: int, deadline_s: float = DEADLINE_S
    ) -> None:
        self._contract, self._scaled, self._workers, self._places = contract, scaled, workers, places
        self._deadline_s = deadline_s
        side = contract.image_size
        # Memory without a name: nothing stays behind, however this process ends.
        self._memory = _anonymous_memory(workers * 16 + places * side * side * 3)
        self._shared = SharedSquares(self._memory, workers, places, side)
        self.squares: NDArray[np.uint8] = self._shared.squares
        self._numbers = iter(range(workers))
        self._lock = threading.Lock()
        self._own = threading.local()
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._closed = False
        # One thread for each process: it sends, waits and, if need be, kills.
        self._threads = ThreadPoolExecutor(workers, "decoder")

    def __enter__(self) -> DecoderPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._closed = True
            for process in self._processes:
                process.kill()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for process in self._processes:
            process.wait()
        os.close(self._memory)

    def submit(self, task: Task) -> Future[Decoded]:
        """Decodes a task; the squares of `Task.place` and onwards are then filled (failed ones with zeros).

        The result raises InputError where the run cannot go on, and EngineError where no decoder can be started.
        """
        return self._threads.submit(self._run_rows, task)

    def decode(self, images: Images) -> Future[tuple[str | None, ...]]:
        """Decodes images; the result is the error of each, None where its square is filled.

        The result raises EngineError where no decoder can be started, InputError where they were stopped.
        """
        return self._threads.submit(self._run, images)

    def _run_rows(self, task: Task) -> Decoded:
        answer: Decoded = self._run(task)
        if answer.stopped is not None:
            raise InputError(answer.stopped)
        return answer

    def _run(self, task: Task | Images) -> Any:
        crashes: Counter[int] = Counter()
        while True:
            answer = self._ask(task)
            if not isinstance(answer, _Lost):
                return answer
            crashes[answer.offset] += 1
            # A crash may be an accident (the kernel was short of memory): the image gets a second chance.
            if answer.final or crashes[answer.offset] == _TRIES:
                task = replace(task, lost={**task.lost, answer.offset: answer.reason})

    def _ask(self, task: Task | Images) -> Any:
        """What this thread's decoder answers, or where it was lost."""
        if getattr(self._own, "process", None) is None:
            self._start()
        process, connection = self._own.process, self._own.connection
        progress = self._shared.progress[self._own.number]
        progress[:] = 0
        try:
            connection.send(task)
            # Time is counted in looks, not read off a clock: while everything is suspended, nobody is late.
            seen, waited, pause = -1, 0.0, min(1.0, self._deadline_s / 4)
            while not connection.poll(pause):
                waited += pause
                if progress[1] != seen:
                    seen, waited = int(progress[1]), 0.0
                elif waited >= self._deadline_s:
                    self._stop()
                    reason = f"took longer than {self._deadline_s:g} s to read and decode"
                    return _Lost(int(progress[0]), reason, final=True)
            return connection.recv()
        except (EOFError, OSError):
            self._stop()
            if self._closed:
                raise InputError("the decoders were stopped") from None
            code = process.returncode
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            return _Lost(int(progress[0]), f"the decoder crashed ({how})", final=False)

    def _start(self) -> None:
        with self._lock:
            if self._closed:
                raise InputError("the decoders were stopped")
            if not hasattr(self._own, "number"):
                self._own.number = next(self._numbers)
            ours, theirs = Pipe()
            contract = json.dumps(self._contract.to_dict())
            arguments = (theirs.fileno(), self._memory, self._own.number, self._workers, self._places, contract)
            # The parent's own search path: a module of the same name in the current folder must not come first.
            code = (
                f"import sys; sys.path[:] = {sys.path!r}; from robustfeat.serving.decoder import serve; "
                f"serve(*{arguments!r}, {self._scaled!r})"
            )
            try:
                self._own.process = subprocess.Popen(
                    [sys.executable, "-P", "-c", code],
                    stdin=subprocess.DEVNULL,
                    # It multiplies no matrices; each thread of NumPy's library would hold memory.
                    env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
                    pass_fds=(theirs.fileno(), self._memory),
                )
            except OSError as exc:
                ours.close()
                raise EngineError(f"a decoder process could not be started ({exc.strerror}); free memory") from exc
            finally:
                theirs.close()
            self._own.connection = ours
            self._processes.add(self._own.process)
        if not _says_ready(ours):
            self._stop()
            if self._closed:
                raise InputError("the decoders were stopped")
            raise EngineError("a decoder process could not be started; check the memory and the messages above")

    def _stop(self) -> None:
        process: subprocess.Popen[bytes] = self._own.process
        process.kill()
        process.wait()
        self._own.connection.close()
        self._own.process = None
        with self._lock:
            self._processes.discard(process)


def _says_ready(connection: Connection) -> bool:
    try:
        return connection.poll(_START_DEADLINE_S) and connection.recv() == "ready"
    except (EOFError, OSError):
        return False


def _anonymous_memory(size: int) -> int:
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("robustfeat-squares")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.truncate(descriptor, size)
    return descriptor
