"""Starts TorchServe on a model store, waits until its workers are ready, and ends all its processes."""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from robustfeat.errors import EngineError, InputError
from robustfeat.serving.torchserve.archive import KEYS, PROPERTIES, Addresses
from robustfeat.serving.torchserve.java import find_java
from robustfeat.system import python_command

__all__ = ["TorchServe", "require_torchserve"]

START_S = 120.0
STOP_S = 30.0
_ASK_S = 5.0
_LINES = 200
_LATE_S = 5.0
_SCRATCH = ".torchserve"
_LONGEST = 107 - len("/.ts.sock.65535")


def require_torchserve() -> Path:
    """TorchServe's home folder.

    Raises:
        EngineError: TorchServe, or an undeclared requirement of it, is not installed.
    """
    if sys.version_info >= (3, 14):
        raise EngineError(f"TorchServe needs Python 3.11 to 3.13; this is {platform.python_version()}")
    spec = importlib.util.find_spec("ts")
    home = Path(spec.origin).parents[1] if spec and spec.origin else None
    missing = [name for name in ("torch", "yaml", "psutil") if importlib.util.find_spec(name) is None]
    if home is None or not (home / "ts/frontend/model-server.jar").is_file():
        missing.insert(0, "torchserve")
    if missing or home is None:
        raise EngineError(f"TorchServe needs {', '.join(missing)}", fix="run `pip install 'robustfeat[torchserve]'`")
    return home


class TorchServe:
    """TorchServe in its own process group.

    Args:
        store: the model store with config.properties. Tokens and logs go there, too.
        name: name of the model.
        addresses: the addresses in config.properties.
        workers: number of workers that must be ready.

    Raises:
        EngineError: TorchServe or Java is missing.
        InputError: an address is not free.
    """

    def __init__(self, store: Path, name: str, addresses: Addresses, workers: int) -> None:
        self._store, self._name, self._addresses, self._workers = store, name, addresses, workers
        self._home, self._java = require_torchserve(), find_java()
        for host, port in addresses.all:
            _require_free(host, port)
        self._said: deque[str] = deque(maxlen=_LINES)
        self._stopping = False
        self._process: subprocess.Popen[str] | None = None

    def run(self, announce: Callable[[], None]) -> None:
        """Starts TorchServe, calls `announce` when its workers are ready, and returns after SIGTERM or SIGINT.

        Raises:
            EngineError: a worker cannot start, or TorchServe ended by itself.
        """
        keys = self._store / KEYS
        keys.unlink(missing_ok=True)  # left by a killed TorchServe
        with _scratch(self._store) as scratch, self._signals():
            self._process = self._start(scratch)
            reader = threading.Thread(target=self._read, args=(self._process,), daemon=True)
            reader.start()
            try:
                if self._wait_until_ready(keys):
                    announce()
                    self._process.wait()
                    reader.join(_ASK_S)
                if not self._stopping:
                    code = self._process.wait()
                    how = f"signal {-code}" if code < 0 else f"exit code {code}: {self._reason()}"
                    raise EngineError(f"TorchServe ended by itself ({how})", fix=self._see_logs)
            finally:
                self._end()
                keys.unlink(missing_ok=True)

    @property
    def _see_logs(self) -> str:
        return f"see its logs in {self._store / 'logs'}"

    def _start(self, scratch: Path) -> subprocess.Popen[str]:
        # The new process sets its parent-death signal and becomes Java, so TorchServe ends even if this one is killed.
        code = (
            "import os, signal, sys; from robustfeat.system import die_with_parent; "
            f"die_with_parent(signal.SIGTERM, {os.getpid()}); os.execv(sys.argv[1], sys.argv[1:])"
        )
        command = [
            *python_command(code),
            self._java.path,
            f"-Dmodel_server_home={self._home}",
            f"-Djava.io.tmpdir={scratch}",
            *("-cp", str(self._home / "ts/frontend/*")),
            "org.pytorch.serve.ModelServer",
            *("--python", sys.executable),
            *("-f", str(self._store.absolute() / PROPERTIES)),
            *("-s", str(self._store.absolute())),
            "-ncs",  # do not write a snapshot, which the next start would read
        ]
        # Both variables would take precedence over our file.
        environment = {name: text for name, text in os.environ.items() if name not in {"TS_CONFIG_FILE", "TEMP"}}
        return subprocess.Popen(
            command,
            cwd=self._store,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )

    def _read(self, process: subprocess.Popen[str]) -> None:
        """Keeps the last lines of the output. The log files have all of it."""
        assert process.stdout
        for line in process.stdout:
            self._said.append(line.rstrip("\n"))

    def _wait_until_ready(self, keys: Path) -> bool:
        """Waits until TorchServe is ready. Returns False if it ended before, or is about to end."""
        assert self._process
        end = time.monotonic() + START_S
        while self._process.poll() is None and not self._stopping:
            if self._ready(keys):
                return True
            if any("WORKER_STOPPED" in line for line in list(self._said)):
                late = time.monotonic() + _LATE_S
                while not self._errors(own=True) and time.monotonic() < late:
                    time.sleep(0.1)  # the worker's own output arrives by another pipe, and later
                raise EngineError(f"a worker of TorchServe cannot start ({self._reason()})", fix=self._see_logs)
            if time.monotonic() > end:
                raise EngineError(f"TorchServe's workers were not ready within {START_S:g} s", fix=self._see_logs)
            time.sleep(0.1)
        return False

    def _ready(self, keys: Path) -> bool:
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError, http.client.HTTPException):
            token = json.loads(keys.read_text("utf-8"))["management"]["key"]
            connection = http.client.HTTPConnection("127.0.0.1", self._addresses.management, timeout=_ASK_S)
            with contextlib.closing(connection):
                connection.request("GET", f"/models/{self._name}", headers={"Authorization": f"Bearer {token}"})
                workers = json.loads(connection.getresponse().read())[0]["workers"]
            return len(workers) >= self._workers and all(worker["status"] == "READY" for worker in workers)
        return False

    def _reason(self) -> str:
        """The last error in the output, or else the last line."""
        errors = self._errors(own=True) or self._errors(own=False)
        if errors:
            return errors[-1].removeprefix("RuntimeError: robustfeat: ")[:300]
        said = [line.strip() for line in list(self._said) if line.strip()] or ["it printed nothing"]
        return said[-1][:300]

    def _errors(self, *, own: bool) -> list[str]:
        """Lines that name an exception of the worker or of TorchServe."""
        said = [line.strip() for line in list(self._said)]
        lines = [line.partition("MODEL_LOG - ")[2] for line in said] if own else said
        errors = [line for line in lines if re.match(r"[\w.]+(Error|Exception): ", line)]
        # TorchServe adds its own error, "500 - Unknown exception", after a handler's.
        return [line for line in errors if not re.match(r"RuntimeError: \d+ - ", line)]

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        def stop(number: int, frame: FrameType | None) -> None:
            if not self._stopping and self._process:
                self._process.terminate()
                late.start()
            self._stopping = True

        late = threading.Timer(STOP_S, self._kill)
        before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            late.cancel()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _end(self) -> None:
        """Ends TorchServe and all its processes."""
        assert self._process
        if self._process.poll() is None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_S)
        self._kill()
        self._process.wait()

    def _kill(self) -> None:
        assert self._process
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)


@contextlib.contextmanager
def _scratch(store: Path) -> Iterator[Path]:
    """Makes a folder for the workers' sockets and the unpacked archive, not shared with another TorchServe."""
    place = store.absolute() / _SCRATCH
    if len(os.fsencode(place)) > _LONGEST:  # too long for the path of a socket
        with tempfile.TemporaryDirectory(prefix="robustfeat-") as elsewhere:
            yield Path(elsewhere)
        return
    shutil.rmtree(place, ignore_errors=True)  # left by a killed TorchServe
    place.mkdir()
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _require_free(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as exc:
            raise InputError(
                f"{host}:{port}: {exc.strerror}; TorchServe takes five ports from `port` on",
                fix="choose another `port`",
            ) from exc
