"""Decoder processes: they turn rows of an input list into squares, in parallel and without risk to the parent.

Each is a process of its own with a pipe, and a deadline for every image. `multiprocessing`'s pools will not do: one
dead worker breaks them all, and a hung one cannot be told from a slow one.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import threading
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from robustfeat.errors import EngineError, InputError
from robustfeat.hub.preprocessing import Preprocessing
from robustfeat.serving.decoding.worker import Decoded, SharedSquares, Task
from robustfeat.system import python_command

__all__ = ["DEADLINE_S", "START_DEADLINE_S", "TRIES", "Decoder", "DecoderPool", "Decoders", "crashed", "too_slow"]

DEADLINE_S = 60.0
"""An image that takes longer to read and decode is a failed row."""

START_DEADLINE_S = 60.0

TRIES = 2
"""How often an image may bring down a decoder before it is given up."""


class Decoder:
    """A decoder process, at one end of a pipe.

    Attributes:
        number: its line in `Decoders.progress`.
        process: itself.
        connection: takes `decoder.Task` and `decoder.Images`, and gives "ready" once, then their answers.
    """

    def __init__(self, number: int, process: subprocess.Popen[bytes], connection: Connection) -> None:
        self.number, self.process, self.connection = number, process, connection

    def kill(self) -> str:
        """Ends it; how it ended, if it had not been running any more."""
        self.process.kill()
        code = self.process.wait()
        return f"signal {-code}" if code < 0 else f"exit code {code}"

    def stop(self) -> str:
        """The same, and closes the pipe, to which nobody may be writing."""
        how = self.kill()
        self.connection.close()
        return how


class Decoders:
    """Decoder processes and the memory that they share with this one.

    Args:
        contract: what they decode to.
        scaled: see `prepare_square`.
        workers: how many there may be at once.
        places: squares that the memory holds.

    Attributes:
        squares: (places, S, S, 3) uint8.
        progress, mailboxes: (workers, 2) int64 and (workers, MAILBOX_BYTES) uint8, see `decoder.SharedSquares`.
    """

    def __init__(self, contract: Preprocessing, *, scaled: bool, workers: int, places: int) -> None:
        self._contract, self._scaled, self._workers, self._places = contract, scaled, workers, places
        side = contract.image_size
        # Memory without a name: nothing stays behind, however this process ends.
        self._memory = _anonymous_memory()
        shared = SharedSquares(self._memory, workers, places, side)
        self.squares: NDArray[np.uint8] = shared.squares
        self.progress: NDArray[np.int64] = shared.progress
        self.mailboxes: NDArray[np.uint8] = shared.mailboxes
        self._lock = threading.Lock()
        self._started: set[Decoder] = set()
        self.closed = False

    def start(self, number: int) -> Decoder:
        """A new process in place `number`, which will say when it is ready.

        Raises:
            InputError: they were stopped.
            EngineError: it cannot be started.
        """
        with self._lock:
            if self.closed:
                raise InputError("the decoders were stopped")
            try:
                ours, theirs = Pipe()
            except OSError as exc:
                raise EngineError(f"a decoder process could not be started ({exc.strerror})") from exc
            contract = json.dumps(self._contract.to_dict())
            arguments = (theirs.fileno(), self._memory, number, self._workers, self._places, contract)
            code = f"from robustfeat.serving.decoding.worker import serve; serve(*{arguments!r}, {self._scaled!r})"
            try:
                process = subprocess.Popen(
                    python_command(code),
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
            decoder = Decoder(number, process, ours)
            self._started = {known for known in self._started if known.process.returncode is None} | {decoder}
            return decoder

    def kill(self) -> None:
        """Ends all processes; no more can be started."""
        with self._lock:
            self.closed = True
            for decoder in self._started:
                decoder.process.kill()

    def close(self) -> None:
        """The same, and frees what they used."""
        self.kill()
        for decoder in self._started:
            decoder.process.wait()
        os.close(self._memory)


class DecoderPool:
    """`workers` decoder processes at work on rows; use it in a `with` block.

    Args:
        contract, scaled, workers, places: see `Decoders`.
        deadline_s: see `DEADLINE_S`.

    Attributes:
        squares: see `Decoders`.
    """

    def __init__(
        self, contract: Preprocessing, *, scaled: bool, workers: int, places: int, deadline_s: float = DEADLINE_S
    ) -> None:
        self._decoders = Decoders(contract, scaled=scaled, workers=workers, places=places)
        self.squares = self._decoders.squares
        self._deadline_s = deadline_s
        self._numbers = iter(range(workers))
        self._own = threading.local()
        # One thread for each process: it sends, waits and, if need be, kills.
        self._threads = ThreadPoolExecutor(workers, "decoder")

    def __enter__(self) -> DecoderPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._decoders.kill()
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._decoders.close()

    def submit(self, task: Task) -> Future[Decoded]:
        """Decodes a task; the squares of `Task.place` and onwards are then filled (failed ones with zeros).

        The result raises InputError where the run cannot go on, and EngineError where no decoder can be started.
        """
        return self._threads.submit(self._run, task)

    def _run(self, task: Task) -> Decoded:
        crashes: Counter[int] = Counter()
        while True:
            answer = self._ask(task)
            if isinstance(answer, Decoded):
                if answer.stopped is not None:
                    raise InputError(answer.stopped)
                return answer
            offset, reason, final = answer
            crashes[offset] += 1
            # A crash may be an accident (the kernel was short of memory): the image gets a second chance.
            if final or crashes[offset] == TRIES:
                task = replace(task, lost={**task.lost, offset: reason})

    def _ask(self, task: Task) -> Decoded | tuple[int, str, bool]:
        """The answer of this thread's decoder; or the offset that it failed at, why, and whether to give up on it."""
        if getattr(self._own, "decoder", None) is None:
            self._start()
        connection = self._own.decoder.connection
        progress = self._decoders.progress[self._own.number]
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
                    return int(progress[0]), too_slow(self._deadline_s), True
            answer: Decoded = connection.recv()
            return answer
        except (EOFError, OSError):
            how = self._stop()
            if self._decoders.closed:
                raise InputError("the decoders were stopped") from None
            return int(progress[0]), crashed(how), False

    def _start(self) -> None:
        if not hasattr(self._own, "number"):
            self._own.number = next(self._numbers)
        self._own.decoder = self._decoders.start(self._own.number)
        if not _says_ready(self._own.decoder.connection):
            self._stop()
            if self._decoders.closed:
                raise InputError("the decoders were stopped")
            raise EngineError("a decoder process could not be started; check the memory and the messages above")

    def _stop(self) -> str:
        how: str = self._own.decoder.stop()
        self._own.decoder = None
        return how


def too_slow(deadline_s: float) -> str:
    """Why an image failed whose decoder was killed."""
    return f"took longer than {deadline_s:g} s to read and decode"


def crashed(how: str) -> str:
    """Why an image failed whose decoder died."""
    return f"the decoder crashed ({how})"


def _says_ready(connection: Connection) -> bool:
    try:
        return connection.poll(START_DEADLINE_S) and connection.recv() == "ready"
    except (EOFError, OSError):
        return False


def _anonymous_memory() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("robustfeat-squares")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
