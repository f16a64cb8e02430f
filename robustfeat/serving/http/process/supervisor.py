"""The process that a user starts: it forks workers, replaces dead ones, and stops all of them.

It imports no library, so a fork takes an instant and copies no thread. Windows cannot fork. There, this process is the
only worker, and nothing is reloaded.

Workers belong to generations. The first worker of a generation turns names into commits and hashes, and reports them.
All other workers of that generation load exactly these. A reload starts a worker of a new generation beside the old
ones. If it ends, nothing has changed. Once it is healthy, workers of the new generation replace the old ones one by
one.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robustfeat.errors import InputError, RobustFeatError
from robustfeat.serving.http.process.log import Log
from robustfeat.serving.http.process.reloads import Reloads
from robustfeat.system import INHERITS, die_with_parent

__all__ = ["CLOSED", "HEALTHY", "HEARTBEAT_S", "LOADED", "RETIRE", "Start", "Supervisor", "count_places", "report_line"]

HEALTHY = "healthy"
"""A worker's report, sent every `HEARTBEAT_S`: it embedded an image within the last minute."""

LOADED = "loaded"
"""The first report of a worker, with what it serves."""

CLOSED = "closed"
"""The report of a worker that accepts no more connections."""

_FAILED = "failed"
"""The last report of a worker that ends with an error of ours."""

HEARTBEAT_S = 5.0
_SILENCE_S = 60.0
"""A healthy worker that stops to report is replaced after this time: two minutes after its last image."""

_LOADING_S = 600.0
"""Limit for a replacement to become healthy. The first of a generation has none, because it may download the model."""

_GRACE_S = 5.0
_STEADY_S = 10.0
_LONGEST_PAUSE_S = 30.0
# Windows has no SIGHUP and no SIGUSR1. Nothing reloads there.
_SIGNALS = (signal.SIGTERM, signal.SIGINT, getattr(signal, "SIGHUP", signal.SIGTERM))
RETIRE = getattr(signal, "SIGUSR1", signal.SIGTERM)
"""Lets a worker answer its requests and end, while other workers accept new ones."""


def count_places(workers: int) -> int:
    """How many workers may exist at a time: old ones that end, the new ones in their places, and one that is tried."""
    return 2 * workers + 1


def report_line(kind: str, value: Any = None) -> bytes:
    """A worker's report: a line with its kind and a value."""
    return f"{json.dumps([kind, value])}\n".encode()


@dataclass(frozen=True)
class Start:
    """What a worker is started with.

    Attributes:
        number: its number, below `count_places`.
        report: the pipe for its reports.
        loaded: what the other workers of its generation serve, as the first one reported it; None for that one.
        tried: whether it is the first of a reload, and must check its models before it serves.
    """

    number: int
    report: int
    loaded: Any
    tried: bool


@dataclass
class _Worker:
    number: int
    generation: int
    pid: int
    pipe: int
    started: float
    silent_s: float = 0.0
    healthy: bool = False
    loaded: Any = None
    closed: bool = False
    failure: str | None = None
    unread: bytes = b""
    ends_by: float = float("inf")
    """When it is killed: set when it is asked to end."""

    @property
    def ending(self) -> bool:
        return self.ends_by < float("inf")


class Supervisor:
    """Keeps workers running.

    Args:
        listener: the socket that all workers accept connections from.
        run: runs a worker in its own process; an exception ends the process.
        workers: number of workers.
        drain_s: grace period for requests in flight on shutdown.
        retire_s: the same for a worker whose place another one has taken.
        announce: called with the loaded manifest when the first worker is healthy, and when a reload is done.
        refresh: called about twice a second; new workers inherit its results. Whether to reload.
        explain: an error as one line.
        forget: called with the number of a worker that has ended.
        reloads: is told whether the last reload was refused.

    Raises:
        InputError: several workers where nothing forks.
    """

    def __init__(
        self,
        listener: socket.socket,
        run: Callable[[Start], None],
        *,
        workers: int,
        drain_s: float,
        retire_s: float,
        announce: Callable[[Any], None],
        refresh: Callable[[], bool],
        explain: Callable[[RobustFeatError], str],
        forget: Callable[[int], None],
        reloads: Reloads,
        log: Log,
    ) -> None:
        if workers > 1 and not INHERITS:
            raise InputError("this system cannot fork; expected 1", argument="workers", value=workers)
        self._listener, self._run, self._count = listener, run, workers
        self._drain_s, self._retire_s = drain_s, retire_s
        self._announce, self._refresh, self._explain = announce, refresh, explain
        self._forget, self._reloads, self._log = forget, reloads, log
        self._workers: dict[int, _Worker] = {}
        self._due: dict[int, float] = {}
        self._pauses: dict[int, float] = {}
        self._generation = self._newest = 0
        self._reload_due = 0.0
        self._loaded: Any = None
        self._stopping = self._started = self._forced = self._reload = self._news = False
        self._signals: list[float] = []
        self._directory = Path()

    def serve(self) -> int:
        """Serves until SIGTERM or SIGINT; the exit code. In a worker it raises SystemExit, or what `run` raises."""
        parent = os.getpid()
        self._directory = Path(tempfile.mkdtemp(prefix="robustfeat-metrics-"))
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(self._directory)
        if not INHERITS:
            return self._serve_here()
        woken, wake = os.pipe()
        for end in (woken, wake):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        self._handle_signals()
        try:
            checked = time.monotonic()
            while self._workers or not self._stopping:
                self._reload = self._refresh() or self._reload
                self._directory.mkdir(exist_ok=True)  # something may have swept it away
                self._stop_on_signal()
                self._start_workers()
                pipes = {worker.pipe: worker for worker in self._workers.values()}
                for pipe in select.select([woken, *pipes], [], [], 0.5)[0]:
                    if pipe in pipes:
                        self._read_reports(pipes[pipe])
                    else:
                        os.read(woken, 4096)
                self._tell_news()
                # Time is counted in rounds: nobody is silent while the whole system is suspended.
                now = time.monotonic()
                passed, checked = min(1.0, now - checked), now
                for worker in list(self._workers.values()):
                    worker.silent_s += passed
                    code = self._check(worker)
                    if code is not None:
                        return code
            code = 1 if self._forced else 0
            self._log.stage("drained", exit_code=code)
            return code
        finally:
            if os.getpid() == parent:
                signal.set_wakeup_fd(-1)
                shutil.rmtree(self._directory, ignore_errors=True)

    def _serve_here(self) -> int:
        """Runs the only worker in this process until it is stopped. It removes the folder of metrics."""
        ours, theirs = os.pipe()

        def follow() -> None:
            with os.fdopen(ours) as reports:
                for kind, value in map(json.loads, reports):
                    if kind == LOADED:
                        self._loaded = value
                    elif kind == HEALTHY and not self._started:
                        self._started = True
                        self._announce(self._loaded)

        threading.Thread(target=follow, daemon=True).start()
        self._run(Start(0, theirs, None, tried=False))
        self._log.stage("drained", exit_code=0)
        return 0

    def _handle_signals(self) -> None:
        """Notes signals, which may come between any two steps; the loop acts on them."""

        def stop(*_: object) -> None:
            self._signals.append(time.monotonic())

        # SIGHUP asks for a reload; it also comes when the terminal of a server is closed, which ends the server.
        of_terminal = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN and _has_terminal()

        def hang_up(*_: object) -> None:
            if of_terminal and not _has_terminal():
                stop()
            else:
                self._reload = True

        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGINT, stop)
        signal.signal(signal.SIGHUP, hang_up)
        signal.signal(signal.SIGCHLD, lambda *_: None)

    def _stop_on_signal(self) -> None:
        if not self._signals:
            return
        if not self._stopping:
            self._stopping = True
            self._log.stage("draining", seconds=self._drain_s)
            self._listener.close()
            for worker in self._workers.values():
                worker.ends_by = time.monotonic() + self._drain_s + _GRACE_S
                os.kill(worker.pid, signal.SIGTERM)
        elif (
            self._signals[-1] > self._signals[0] + 1
        ):  # at once it is the same signal, to this process and to its group
            for worker in self._workers.values():
                worker.ends_by = 0.0

    def _start_workers(self) -> None:
        """Starts workers that are missing and due, and the first one of a reload."""
        if self._stopping:
            return
        current = [worker for worker in self._workers.values() if worker.generation == self._generation]
        current = [worker for worker in current if not worker.ending]
        # The first of a generation goes ahead, and those that take the places of others come one after the other.
        singly = self._loaded is None or any(self._outdated())
        loading = sum(not worker.healthy for worker in current)
        missing = self._count - len(current) - len(self._due)
        if singly:
            missing = min(missing, 1 - loading - len(self._due))
        self._due |= dict.fromkeys(self._free_numbers()[: max(0, missing)], 0.0)
        for number in [number for number, due in self._due.items() if due <= time.monotonic()]:
            if self._loaded is None and loading:
                break
            del self._due[number]
            loading += 1
            self._fork(number, self._generation, self._loaded)
        self._try_reload()

    def _try_reload(self) -> None:
        free = self._free_numbers()
        if not (self._reload and self._started and free) or any(self._outdated()):
            return
        if time.monotonic() < self._reload_due:
            return
        self._reload = False
        for worker in self._workers.values():
            if worker.generation > self._generation and not worker.ending:  # its names may mean something else by now
                worker.ends_by = 0.0
        self._newest += 1
        self._log.info("reload started")
        self._fork(free[0], self._newest, None)

    def _outdated(self) -> Iterator[_Worker]:
        """Workers of the generation before, whose places are not taken yet."""
        return (one for one in self._workers.values() if one.generation < self._generation and not one.ending)

    def _free_numbers(self) -> list[int]:
        return [one for one in range(count_places(self._count)) if one not in self._workers and one not in self._due]

    def _fork(self, number: int, generation: int, loaded: Any) -> None:
        try:
            ours, theirs = os.pipe()
        except OSError as exc:
            self._postpone(number, generation, exc)
            return
        sys.stdout.flush()
        sys.stderr.flush()
        # A signal between the fork and the child's own handlers would be lost to the child.
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        supervisor = os.getpid()
        try:
            pid = os.fork()
        except OSError as exc:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            os.close(ours)
            os.close(theirs)
            self._postpone(number, generation, exc)
            return
        if pid:
            self._workers[number] = _Worker(number, generation, pid, ours, time.monotonic())
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            os.close(theirs)
            os.set_blocking(ours, False)
            return
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for name in (signal.SIGINT, signal.SIGHUP):  # a terminal sends them to all; the supervisor decides
            signal.signal(name, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        die_with_parent(signal.SIGTERM, supervisor)  # also while it loads, for as long as that may take
        for pipe in [ours, *(worker.pipe for worker in self._workers.values())]:
            os.close(pipe)
        try:
            self._run(Start(number, theirs, loaded, tried=generation > self._generation))
        except RobustFeatError as exc:
            if not self._started:
                raise
            os.set_blocking(theirs, True)
            os.write(theirs, report_line(_FAILED, self._explain(exc)))
            raise SystemExit(exc.exit_code) from None
        except Exception:
            if not self._started:
                raise
            self._log.error("worker failed", number=number, trace=traceback.format_exc())
            raise SystemExit(1) from None
        raise SystemExit(0)

    def _postpone(self, number: int, generation: int, exc: OSError) -> None:
        """Makes a worker due later, because the system has no process, memory or file for it now."""
        pause = self._lengthen_pause(number)
        if generation > self._generation:
            self._reload, self._reload_due = True, time.monotonic() + pause
        else:
            self._due[number] = time.monotonic() + pause
        self._log.error("worker not started", number=number, error=exc.strerror, next_in_s=pause)

    def _lengthen_pause(self, number: int) -> float:
        """The pause before the next worker of a number. It doubles with each failure."""
        self._pauses[number] = min(_LONGEST_PAUSE_S, max(1.0, 2 * self._pauses.get(number, 0.0)))
        return self._pauses[number]

    def _read_reports(self, worker: _Worker) -> None:
        try:
            worker.unread += os.read(worker.pipe, 2**16)
        except BlockingIOError:
            return
        *lines, worker.unread = worker.unread.split(b"\n")
        for kind, value in map(json.loads, lines):
            if kind == LOADED:
                worker.loaded = value
            elif kind == CLOSED:
                worker.closed = True
            elif kind == _FAILED:
                worker.failure = value
            elif kind == HEALTHY:
                worker.silent_s = 0.0
                if not worker.healthy and not self._stopping and not worker.ending:
                    worker.healthy = True
                    self._welcome(worker)

    def _welcome(self, worker: _Worker) -> None:
        """Takes a worker among those that serve, when it is healthy for the first time."""
        if worker.generation > self._generation:
            self._generation, self._loaded, self._reloads.refused = worker.generation, None, False
            self._due.clear()
        if self._loaded is None:
            self._loaded, self._news, self._started = worker.loaded, True, True
        old = next(self._outdated(), None)
        if old is not None:
            old.ends_by = time.monotonic() + self._retire_s
            os.kill(old.pid, RETIRE)

    def _tell_news(self) -> None:
        """Announces a new generation once no older worker takes requests."""
        others = (one for one in self._workers.values() if one.generation < self._generation and not one.closed)
        if self._news and not self._stopping and not any(others):
            self._news = False
            self._announce(self._loaded)

    def _check(self, worker: _Worker) -> int | None:
        """Replaces a worker that has ended or does not answer; the exit code, if the server cannot start at all."""
        now = time.monotonic()
        pid, status = os.waitpid(worker.pid, os.WNOHANG)
        if not pid:
            first = not self._started or worker.generation > self._generation
            limit = _SILENCE_S if worker.healthy else float("inf") if first else _LOADING_S
            if worker.silent_s > limit and not worker.ending:
                self._log.error("worker killed", number=worker.number, why=f"not well for {limit:g} s")
                os.kill(worker.pid, signal.SIGKILL)
                worker.silent_s = 0.0
            elif now > worker.ends_by:
                self._forced = self._forced or self._stopping
                os.kill(worker.pid, signal.SIGKILL)
            return None
        self._read_reports(worker)
        os.close(worker.pipe)
        del self._workers[worker.number]
        self._forget(worker.number)
        for file in self._directory.glob(f"gauge_live*_{worker.number}.db"):  # what it said of itself
            with suppress(OSError):
                file.unlink()
        if self._stopping or worker.ending:
            return None
        code = os.waitstatus_to_exitcode(status)
        if not self._started:
            return code if code > 0 else 1
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        if worker.generation > self._generation:
            self._reloads.refused = True
            self._log.error("reload refused", error=worker.failure or f"the worker that was tried ended by {how}")
        else:
            self._replace(worker, how)
        return None

    def _replace(self, worker: _Worker, how: str) -> None:
        """Makes another worker due in the place of one that has ended."""
        now = time.monotonic()
        pause = 0.0
        if worker.generation == self._generation:
            if now - worker.started > _STEADY_S:
                self._pauses[worker.number] = 0.0
            else:
                pause = self._lengthen_pause(worker.number)
            self._due[worker.number] = now + pause
            # What cannot be loaded again, such as a changed folder, is looked up anew once nobody serves the old one.
            if not worker.healthy and not any(other.healthy for other in self._workers.values()):
                self._loaded = None
        reason = {"error": worker.failure} if worker.failure else {}
        self._log.error("worker ended", number=worker.number, how=how, next_in_s=pause, **reason)


def _has_terminal() -> bool:
    """Whether this process has a terminal that can be opened."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True
