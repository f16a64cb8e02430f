"""The process that a user starts: it forks workers, replaces dead ones, and stops all of them.

It imports no library, so a fork takes an instant and copies no thread.
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

from robustfeat.system import die_with_parent

__all__ = ["HEALTHY", "HEARTBEAT_S", "Supervisor"]

HEALTHY = b"."
"""A worker's report, sent every `HEARTBEAT_S`: it embedded an image within the last minute."""

HEARTBEAT_S = 5.0
_SILENCE_S = 60.0
"""A healthy worker that stops to report is replaced after this time: two minutes after its last image."""

_LOADING_S = 600.0
"""A replacement must be healthy within this time. The first worker has no limit: it may download the model."""

_GRACE_S = 5.0
_STEADY_S = 10.0
_LONGEST_PAUSE_S = 30.0
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@dataclass
class _Worker:
    number: int
    pid: int
    pipe: int
    started: float
    silent_s: float = 0.0
    healthy: bool = False


class Supervisor:
    """Keeps workers running.

    Args:
        listener: the socket that all workers accept connections from.
        run: runs worker `number` in its own process, with a pipe to report to; an exception ends the process.
        workers: number of workers.
        drain_s: grace period for requests in flight on shutdown.
        announce: called once, when the first worker is healthy.
        refresh: called about twice a second; new workers inherit its results.
        log: logs an event and its details.
    """

    def __init__(
        self,
        listener: socket.socket,
        run: Callable[[int, int], None],
        *,
        workers: int,
        drain_s: float,
        announce: Callable[[], None],
        refresh: Callable[[], None],
        log: Callable[..., None],
    ) -> None:
        self._listener, self._run, self._count, self._drain_s = listener, run, workers, drain_s
        self._announce, self._refresh, self._log = announce, refresh, log
        self._workers: dict[int, _Worker] = {}
        self._due: dict[int, float] = {}
        self._pauses = dict.fromkeys(range(workers), 0.0)
        self._stopping = self._announced = self._forced = False
        self._signals: list[float] = []
        self._deadline = float("inf")

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
            # The handler only notes the signal, which may come between any two steps; the loop below acts on it.
            signal.signal(name, lambda *_: self._signals.append(time.monotonic()))
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self._due[0] = 0.0  # the others when it is ready, so that what cannot be served is said once
        try:
            checked = time.monotonic()
            while self._workers or (self._due and not self._stopping):
                self._refresh()
                Path(directory).mkdir(exist_ok=True)  # something may have swept it away
                self._stop_on_signal()
                self._start_due()
                pipes = {worker.pipe: worker for worker in self._workers.values()}
                for pipe in select.select([woken, *pipes], [], [], 0.5)[0]:
                    if pipe in pipes:
                        self._read_report(pipes[pipe])
                    else:
                        os.read(woken, 4096)
                # Time is counted in rounds: nobody is silent while the whole system is suspended.
                now = time.monotonic()
                passed, checked = min(1.0, now - checked), now
                for worker in list(self._workers.values()):
                    worker.silent_s += passed
                    code = self._check(worker)
                    if code is not None:
                        return code
            return 1 if self._forced else 0
        finally:
            if os.getpid() == parent:
                signal.set_wakeup_fd(-1)
                shutil.rmtree(directory, ignore_errors=True)

    def _stop_on_signal(self) -> None:
        if not self._signals:
            return
        if not self._stopping:
            self._stopping = True
            self._deadline = time.monotonic() + self._drain_s + _GRACE_S
            self._listener.close()
            for worker in self._workers.values():
                os.kill(worker.pid, signal.SIGTERM)
        elif (
            self._signals[-1] > self._signals[0] + 1
        ):  # at once it is the same signal, to this process and to its group
            self._deadline = 0.0

    def _start_due(self) -> None:
        if self._stopping:
            return
        for number in [number for number, due in self._due.items() if due <= time.monotonic()]:
            del self._due[number]
            self._fork(number)

    def _fork(self, number: int) -> None:
        ours, theirs = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        # A signal between the fork and the child's own handlers would be lost to the child.
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        supervisor = os.getpid()
        pid = os.fork()
        if pid:
            self._workers[number] = _Worker(number, pid, ours, time.monotonic())
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            os.close(theirs)
            os.set_blocking(ours, False)
            return
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C reaches all; the supervisor decides
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        die_with_parent(signal.SIGTERM, supervisor)  # also while it loads, for as long as that may take
        for pipe in [ours, *(worker.pipe for worker in self._workers.values())]:
            os.close(pipe)
        self._run(number, theirs)
        raise SystemExit(0)

    def _read_report(self, worker: _Worker) -> None:
        try:
            report = os.read(worker.pipe, 4096)
        except BlockingIOError:
            return
        if HEALTHY in report:
            worker.healthy, worker.silent_s = True, 0.0
        if worker.healthy and not self._announced and not self._stopping:
            self._announced = True
            self._announce()
            self._due |= dict.fromkeys(set(range(self._count)) - set(self._workers), 0.0)

    def _check(self, worker: _Worker) -> int | None:
        """Replaces a worker that has ended or does not answer; the exit code, if the server cannot start at all."""
        now = time.monotonic()
        pid, status = os.waitpid(worker.pid, os.WNOHANG)
        if not pid:
            limit = _SILENCE_S if worker.healthy else _LOADING_S if self._announced else float("inf")
            if worker.silent_s > limit and not self._stopping:
                self._log("worker killed", number=worker.number, why=f"not well for {limit:g} s")
                os.kill(worker.pid, signal.SIGKILL)
                worker.silent_s = 0.0
            elif now > self._deadline:
                self._forced = True
                os.kill(worker.pid, signal.SIGKILL)
            return None
        os.close(worker.pipe)
        del self._workers[worker.number]
        if self._stopping:
            return None
        code = os.waitstatus_to_exitcode(status)
        if not self._announced:
            return code if code > 0 else 1
        steady = now - worker.started > _STEADY_S
        before = self._pauses[worker.number]
        pause = self._pauses[worker.number] = 0.0 if steady else min(_LONGEST_PAUSE_S, max(1.0, 2 * before))
        self._due[worker.number] = now + pause
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        self._log("worker ended", number=worker.number, how=how, next_in_s=pause)
        return None
