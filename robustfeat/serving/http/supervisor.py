"""The process that a user starts: it forks workers, puts new ones in the place of dead ones, and stops them.

It imports no library, so that it forks in an instant, from a process without threads.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["HEARTBEAT_S", "ILL", "READY", "WELL", "Supervisor"]

READY, WELL, ILL = b"r", b".", b"n"
"""What a worker tells: it embedded its first image; it did so within the last minute; it did not."""

HEARTBEAT_S = 5.0
_SILENCE_S = 120.0
"""A worker that was ready and is not any more, or says nothing, for so long is replaced."""

_GRACE_S = 5.0
_STEADY_S = 10.0
_LONGEST_PAUSE_S = 30.0
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@dataclass
class _Worker:
    number: int
    pid: int
    pipe: int
    born: float
    well: float
    ready: bool = False


class Supervisor:
    """Keeps workers at work.

    Args:
        listener: where connections come from; all workers take from it.
        run: runs worker `number` in its own process, with a pipe to report to; what it raises ends that process.
        workers: how many.
        drain_s: how long requests at hand have when the server is stopped.
        announce: called once, when the first worker is ready.
        look: called about twice a second, and what it keeps is what new workers find.
        say: logs an event and its details.
    """

    def __init__(
        self,
        listener: socket.socket,
        run: Callable[[int, int], None],
        *,
        workers: int,
        drain_s: float,
        announce: Callable[[], None],
        look: Callable[[], None],
        say: Callable[..., None],
    ) -> None:
        self._listener, self._run, self._count, self._drain_s = listener, run, workers, drain_s
        self._announce, self._look, self._say = announce, look, say
        self._workers: dict[int, _Worker] = {}
        self._due: dict[int, float] = {}
        self._pauses = dict.fromkeys(range(workers), 0.0)
        self._stopping = self._announced = False
        self._asked = self._deadline = float("inf")

    def serve(self) -> int:
        """Serves until SIGTERM or SIGINT; the exit code. In a worker it raises SystemExit, or what `run` raises."""
        parent = os.getpid()
        directory = tempfile.mkdtemp(prefix="robustfeat-metrics-")
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = directory
        woken, wake = os.pipe()
        for end in (woken, wake):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, self._stop)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self._due[0] = 0.0  # the others when it is ready, so that what cannot be served is said once
        try:
            while self._workers or self._due:
                self._look()
                Path(directory).mkdir(exist_ok=True)  # something may have swept it away
                self._start_due()
                pipes = {worker.pipe: worker for worker in self._workers.values()}
                for pipe in select.select([woken, *pipes], [], [], 0.5)[0]:
                    if pipe in pipes:
                        self._hear(pipes[pipe])
                    else:
                        os.read(woken, 4096)
                for worker in list(self._workers.values()):
                    code = self._look_after(worker)
                    if code is not None:
                        return code
            return 0 if time.monotonic() < self._deadline else 1
        finally:
            if os.getpid() == parent:
                signal.set_wakeup_fd(-1)
                shutil.rmtree(directory, ignore_errors=True)

    def _stop(self, *_: object) -> None:
        now = time.monotonic()
        if self._stopping:
            # Asked again. At once it is the same signal, sent to this process and to its group.
            if now > self._asked + 1:
                for worker in self._workers.values():
                    os.kill(worker.pid, signal.SIGKILL)
            return
        self._stopping, self._asked = True, now
        self._deadline = now + self._drain_s + _GRACE_S
        self._due.clear()
        self._listener.close()
        for worker in self._workers.values():
            os.kill(worker.pid, signal.SIGTERM)

    def _start_due(self) -> None:
        for number in [number for number, due in self._due.items() if due <= time.monotonic()]:
            if not self._stopping:
                del self._due[number]
                self._fork(number)

    def _fork(self, number: int) -> None:
        ours, theirs = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        # A signal between the fork and the child's own handlers would be lost to the child.
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        pid = os.fork()
        if pid:
            self._workers[number] = _Worker(number, pid, ours, time.monotonic(), time.monotonic())
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            os.close(theirs)
            os.set_blocking(ours, False)
            return
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C reaches all; the supervisor decides
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        for pipe in [ours, *(worker.pipe for worker in self._workers.values())]:
            os.close(pipe)
        self._run(number, theirs)
        raise SystemExit(0)

    def _hear(self, worker: _Worker) -> None:
        try:
            told = os.read(worker.pipe, 4096)
        except BlockingIOError:
            return
        if READY in told or WELL in told:
            worker.ready, worker.well = True, time.monotonic()
        if worker.ready and not self._announced:
            self._announced = True
            self._announce()
            self._due |= dict.fromkeys(set(range(self._count)) - set(self._workers), 0.0)

    def _look_after(self, worker: _Worker) -> int | None:
        """Replaces a worker that has ended or does not answer; the exit code, if the server cannot start at all."""
        now = time.monotonic()
        pid, status = os.waitpid(worker.pid, os.WNOHANG)
        if not pid:
            silent = worker.ready and now - worker.well > _SILENCE_S
            if silent and not self._stopping:
                self._say("worker killed", number=worker.number, why=f"not well for {_SILENCE_S:g} s")
            if silent or now > self._deadline:
                os.kill(worker.pid, signal.SIGKILL)
                worker.well = now
            return None
        os.close(worker.pipe)
        del self._workers[worker.number]
        if self._stopping:
            return None
        code = os.waitstatus_to_exitcode(status)
        if not self._announced:
            return code if code > 0 else 1
        steady = now - worker.born > _STEADY_S
        before = self._pauses[worker.number]
        pause = self._pauses[worker.number] = 0.0 if steady else min(_LONGEST_PAUSE_S, max(1.0, 2 * before))
        self._due[worker.number] = now + pause
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        self._say("worker ended", number=worker.number, how=how, next_in_s=pause)
        return None
