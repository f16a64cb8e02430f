"""Starts, watches and ends decoder processes, and shares memory with them.

Two pools use these processes: `pool.DecoderPool` with threads, for bulk embedding, and `loop_pool.LoopDecoderPool` with
an event loop, for serving. The pools of `multiprocessing` are unsuitable: one dead worker breaks the whole pool, and
they cannot distinguish a hung worker from a slow one.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
import threading
from concurrent.futures import Executor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustfeat.errors import EngineError, InputError
from robustfeat.hub.preprocessing import MAX_PIXELS, Preprocessing
from robustfeat.serving.decoding.thread import DecoderThread
from robustfeat.serving.decoding.worker import READY, ImageDecoder, Images, SharedSquares, Task
from robustfeat.system import INHERITS, anonymous_memory, python_command

__all__ = ["Decoder", "DecoderLostError", "Decoders"]

_START_DEADLINE_S = 60.0
_TRIES = 2
_FIXES = {
    errno.ENOMEM: "free memory",
    errno.EAGAIN: "raise the limit of processes (ulimit -u, or the container's limit)",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "raise the system's limit of open files",
}


class DecoderLostError(Exception):
    """A decoder process has ended or was killed at its deadline.

    Attributes:
        offset: the offset of the current image in the task.
        reason: the error of that image, if it fails for good.
        tries: number of decoders that the image may lose; None if the image is not the cause.
    """

    def __init__(self, offset: int, reason: str, *, tries: int | None) -> None:
        super().__init__(reason)
        self.offset, self.reason, self.tries = offset, reason, tries

    def gives_up(self, crashes: int) -> bool:
        """Whether the image fails for good after losing this many decoders.

        A crash may be an accident, such as a shortage of memory, so an image gets a second try.
        """
        return self.tries is not None and crashes >= self.tries


class Decoder:
    """A decoder process at the other end of a pipe. It takes one task at a time.

    Args:
        process: the process, or the thread in its place.
        connection: this end of the pipe.
        progress: its row of `SharedSquares.progress`.
        mailbox: its row of `SharedSquares.mailboxes`.

    Attributes:
        ready: whether the process has reported that it accepts tasks.
    """

    def __init__(
        self,
        process: subprocess.Popen[bytes] | DecoderThread,
        connection: Connection,
        progress: NDArray[np.int64],
        mailbox: NDArray[np.uint8],
    ) -> None:
        self.process, self.mailbox = process, mailbox.data
        self.ready = False
        self._connection, self._progress = connection, progress
        self._writing = threading.Lock()
        self._seen, self._waited_s = -1, 0.0

    def fileno(self) -> int:
        """The pipe's descriptor. It is readable when `receive` does not block."""
        return self._connection.fileno()

    def send(self, task: Task | Images, executor: Executor | None = None) -> None:
        """Gives the process a task.

        Args:
            task: the task.
            executor: writes the task. Without one this call writes it, and blocks while the pipe is full.
        """
        self._progress[:] = 0
        self._seen, self._waited_s = -1, 0.0
        if executor is None:
            self._write(task)
        else:
            executor.submit(self._write, task)

    def poll(self, seconds: float) -> bool:
        """Waits for a message. Returns whether `receive` would not block."""
        try:
            return self._connection.poll(seconds)
        except OSError:
            return True  # `receive` reports it

    def receive(self) -> Any:
        """The result of the last task, or None when the process reports that it is ready.

        Raises:
            DecoderLostError: the process has ended.
        """
        try:
            message = self._connection.recv()
        except (EOFError, OSError):
            raise self._lost(f"the decoder crashed ({self.kill()})", tries=_TRIES) from None
        self._seen, self._waited_s = -1, 0.0
        if not self.ready:
            self.ready = message == READY
            return None
        return message

    def check(self, passed_s: float, deadline_s: float) -> None:
        """Counts time without progress. Call it regularly while the process starts or has a task.

        Callers pass their waiting time instead of a clock's, so a suspended system does not count as delay.

        Args:
            passed_s: time since the last call.
            deadline_s: time limit per image.

        Raises:
            DecoderLostError: the deadline has passed, and the process was killed.
        """
        if isinstance(self.process, DecoderThread):
            # It cannot be ended, and would write its square into another image's place.
            if self.process.returncode is not None:
                raise self._lost("the decoder was stopped", tries=None)
            return
        count = int(self._progress[1])
        if count != self._seen:
            self._seen, self._waited_s = count, 0.0
            return
        self._waited_s += passed_s
        if self._waited_s >= (deadline_s if self.ready else _START_DEADLINE_S):
            tries = None if self._stopped() else 1
            self.kill()
            raise self._lost(f"took longer than {deadline_s:g} s to read and decode", tries=tries)

    def kill(self) -> str:
        """Ends the process. Returns how it ended, if it had ended by itself."""
        self.process.kill()
        code = self.process.wait()
        return f"signal {-code}" if code < 0 else f"exit code {code}"

    def close(self) -> None:
        """Ends the process and closes the pipe."""
        self.kill()
        # A thread that still writes fails at once without a reader. Do not close its descriptor under it, since the
        # number may soon belong to another connection.
        with self._writing:
            self._connection.close()

    def _write(self, task: Task | Images) -> None:
        with self._writing:
            try:
                self._connection.send(task)
            except OSError:
                self.process.kill()  # `receive` reports it

    def _stopped(self) -> bool:
        """Whether somebody else has stopped the process. False if the system does not report it."""
        assert not isinstance(self.process, DecoderThread)
        try:
            state = Path(f"/proc/{self.process.pid}/stat").read_text("latin-1").rpartition(")")[2].split()[0]
        except OSError:
            return False
        return state in {"T", "t"}

    def _lost(self, reason: str, *, tries: int | None) -> DecoderLostError:
        return DecoderLostError(int(self._progress[0]), reason, tries=tries)


def _refused(exc: OSError) -> EngineError:
    """The error when the system refuses to start a process."""
    number = exc.errno or 0
    fix = _FIXES.get(number, f"check that {sys.executable} can run")
    return EngineError(f"a decoder process could not be started ({exc.strerror})", fix=fix)


def _pair() -> tuple[Connection, Connection]:
    """Two ends of a pipe: sockets, because event loops of Windows watch nothing else."""
    ends = socket.socketpair()
    for end in ends:
        end.setblocking(True)
    return Connection(ends[0].detach()), Connection(ends[1].detach())


class Decoders:
    """Decoder processes, and the memory shared with them.

    Args:
        contract: the preprocessing.
        scaled: see `prepare_square`.
        workers: number of processes.
        places: number of squares in the memory.
        max_pixels: largest accepted image.

    Attributes:
        squares: (places, S, S, 3) uint8.
        progress, mailboxes: (workers, 2) int64 and (workers, MAILBOX_BYTES) uint8, see `worker.SharedSquares`.
    """

    def __init__(
        self, contract: Preprocessing, *, scaled: bool, workers: int, places: int, max_pixels: int = MAX_PIXELS
    ) -> None:
        self._contract, self._scaled, self._workers, self._places = contract, scaled, workers, places
        self._max_pixels = max_pixels
        self._memory = anonymous_memory()
        shared = self._shared = SharedSquares(self._memory, workers, places, contract.image_size)
        self.squares: NDArray[np.uint8] = shared.squares
        self.progress: NDArray[np.int64] = shared.progress
        self.mailboxes: NDArray[np.uint8] = shared.mailboxes
        self._lock = threading.Lock()
        self._started: set[Decoder] = set()
        self.closed = False

    def start(self, number: int) -> Decoder:
        """Starts a process at index `number`. Its first message reports that it is ready.

        Raises:
            InputError: the decoders were stopped.
            EngineError: the system refuses another process.
        """
        with self._lock:
            if self.closed:
                raise InputError("the decoders were stopped")
            try:
                ours, theirs = _pair()
            except OSError as exc:
                raise _refused(exc) from exc
            try:
                process = self._start(number, theirs)
            except OSError as exc:
                ours.close()
                raise _refused(exc) from exc
            decoder = Decoder(process, ours, self.progress[number], self.mailboxes[number])
            self._started = {known for known in self._started if known.process.returncode is None} | {decoder}
            return decoder

    def _start(self, number: int, pipe: Connection) -> subprocess.Popen[bytes] | DecoderThread:
        """A process, or a thread where processes inherit nothing; it has `pipe` from now on."""
        if not INHERITS:
            own = ImageDecoder(self._shared, number, self._contract, self._scaled, self._max_pixels)
            return DecoderThread(pipe, own)
        contract = json.dumps(self._contract.to_dict())
        places = (number, self._workers, self._places)
        options = (contract, self._scaled, self._max_pixels)
        arguments = (os.getpid(), pipe.fileno(), self._memory, *places, *options)
        code = f"from robustfeat.serving.decoding.worker import serve; serve(*{arguments!r})"
        with pipe:
            return subprocess.Popen(
                python_command(code),
                stdin=subprocess.DEVNULL,
                # It multiplies no matrices, and each thread of NumPy's library would only hold memory.
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
                pass_fds=(pipe.fileno(), self._memory),
            )

    def kill(self) -> None:
        """Ends all processes, and refuses to start more."""
        with self._lock:
            self.closed = True
            for decoder in self._started:
                decoder.process.kill()

    def close(self) -> None:
        """Ends all processes and frees the memory."""
        self.kill()
        for decoder in self._started:
            decoder.process.wait()
        os.close(self._memory)
