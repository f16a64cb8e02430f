"""A process that has imported the heavy libraries, and forks one process for each command.

A command needs up to 8 s of a core for its imports (torch, torchvision, scikit-learn), and most tests of the command
line need little else. The fork is a process like any other: signals, exit codes, environment and streams are its own.
A new interpreter runs what only a new interpreter reads (`PYTHONPATH`, `OMP_NUM_THREADS`): see `serves`.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import gc
import importlib
import json
import os
import pkgutil
import resource
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import types
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

__all__ = ["CommandServer", "ForkedCommand"]

# Heavy libraries. Robustfeat's own modules come after them.
PRELOADED = (
    "sklearn.svm",
    "torch",
    "torchvision",
    "torch.onnx",
    "onnx",
    "onnxscript",
    "pyarrow.parquet",
    "pyarrow.dataset",
    "fastapi",
    "uvicorn.protocols.http.httptools_impl",
    "orjson",
    "matplotlib.pyplot",
    "torch.utils.tensorboard",
    "huggingface_hub.file_download",
    "huggingface_hub.hf_api",
    "onnxruntime",
    "openvino",
)
# The HTTP server's metrics read the environment at import, and what `constants` changes comes before the
# modules that use it.
_LEFT_OUT = (
    "robustfeat.__main__",
    "robustfeat.serving.http",
    "robustfeat.serving.torchserve",
    "robustfeat.training",
)
# The Hub's client reads the environment at import: a command imports it anew, and finds what it imports in memory.
FORGOTTEN = "huggingface_hub"
# Read when an interpreter or a library starts.
_EARLY = (
    "PYTHON",
    "LD_",
    "FSSPEC_",
    "OMP_",
    "OPENBLAS_",
    "MKL_",
    "KMP_",
    "GOTO_",
    "MALLOC_",
    "GLIBC_",
    "CUDA_",
    "MPL",
    "ORT_",
)


# Draws a picture at the end of each training, which takes half a second of a core. Few tests look at it.
_CURVES = "robustfeat.training.loop.curves"


class ForkedCommand:
    """A command that runs, in a session of its own; the part of `subprocess.Popen` that the tests need."""

    def __init__(self, connection: socket.socket, *files: IO[bytes]) -> None:
        self._connection = connection
        self._answers = connection.makefile("r")
        self._files = files
        self.pid = int(self._answers.readline())
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code, or None while the command runs."""
        if self.returncode is None and select.select([self._connection], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, negative for a signal.

        Raises:
            TimeoutError: after `timeout` seconds.
        """
        if self.returncode is None:
            self._connection.settimeout(timeout)
            self.returncode = int(self._answers.readline())
            self._answers.close()
            self._connection.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Sends it to the command alone."""
        os.kill(self.pid, number)

    def texts(self) -> list[str]:
        """What stands on stdout and on stderr, unless stderr went elsewhere."""
        texts = []
        for file in self._files:
            file.seek(0)
            texts.append(file.read().decode())
            file.close()
        return texts

    def communicate(self, timeout: float | None = None) -> list[str]:
        """Waits, and gives stdout and stderr."""
        self.wait(timeout)
        return self.texts()


class CommandServer:
    """Runs `python -m robustfeat ARGUMENTS` in forks of one prepared process, which starts at first use.

    All servers of one `folder`, one for each worker of pytest, share the process. It ends with the last of them.
    """

    def __init__(self, root: Path, folder: Path) -> None:
        self._root = root
        self._folder = folder
        self._alive: int | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def serves(self, environment: Mapping[str, str] | None) -> bool:
        """Whether a fork sees this environment as a new process would."""

        def early(of: Mapping[str, str]) -> dict[str, str]:
            return {name: value for name, value in of.items() if name.startswith(_EARLY)}

        return environment is None or early(environment) == early(os.environ)

    def run(
        self,
        arguments: Sequence[str],
        env: Mapping[str, str] | None = None,
        file_bytes: int | None = None,
        *,
        code: str | None = None,
        cwd: Path | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Like `subprocess.run(..., capture_output=True, text=True)`; the arguments are those of `start`."""
        command = self.start(arguments, env, file_bytes, code=code, cwd=cwd)
        return subprocess.CompletedProcess(list(arguments), command.wait(), *command.texts())

    def start(
        self,
        arguments: Sequence[str],
        env: Mapping[str, str] | None = None,
        file_bytes: int | None = None,
        *,
        stderr: int | None = None,
        constants: Mapping[str, object] | None = None,
        curves: bool = False,
        code: str | None = None,
        cwd: Path | None = None,
    ) -> ForkedCommand:
        """Like `subprocess.Popen(..., start_new_session=True)`.

        Args:
            arguments, env: of the command.
            file_bytes: the most that it can write to a file.
            stderr: a descriptor to write errors to, in place of a file that `texts` reads.
            constants: values of constants of modules by their full names, in this command and its forks.
            curves: draw curves.png at the end of a training.
            code: runs this, as `python -c` does, in place of the command line.
            cwd: the working directory, by default the root.
        """
        request = {
            "arguments": list(arguments),
            "env": dict(os.environ if env is None else env),
            "file_bytes": file_bytes,
            "constants": dict(constants or {}),
            "curves": curves,
            "code": code,
            "cwd": str(cwd or self._root),
        }
        data = json.dumps(request).encode()
        kept = [tempfile.TemporaryFile() for _ in range(2 if stderr is None else 1)]  # noqa: SIM115
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(self._address())
        with open(os.devnull, "rb") as nothing:
            files = [nothing.fileno(), kept[0].fileno(), kept[1].fileno() if stderr is None else stderr]
            socket.send_fds(connection, [len(data).to_bytes(4, "big")], files)
        connection.sendall(data)
        return ForkedCommand(connection, *kept)

    def close(self) -> None:
        """Lets the process end; who started it waits for the others."""
        if self._alive is not None:
            os.close(self._alive)
        if self._process is not None:
            self._process.wait()

    def _address(self) -> str:
        pipe, address = self._folder / "alive", self._folder / "address"
        with self._lock:
            if self._alive is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                with locked(self._folder):
                    if not address.exists():
                        self._process = self._start(pipe, address)
                    self._alive = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        return address.read_text()

    def _start(self, pipe: Path, address: Path) -> subprocess.Popen[bytes]:
        """The process. It runs until nobody has the pipe open for writing."""
        pipe.unlink(missing_ok=True)
        os.mkfifo(pipe)
        reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        name = str(Path(tempfile.mkdtemp(prefix="robustfeat-commands-")) / "socket")  # 107 bytes at most
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(name)
            listener.listen()
            process = subprocess.Popen(
                [sys.executable, __file__, str(listener.fileno()), str(self._folder)],
                cwd=self._root,
                stdin=reader,
                stdout=subprocess.DEVNULL,
                pass_fds=[listener.fileno()],
            )
        os.close(reader)
        address.write_text(name)
        return process


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the lock of `folder`, which one process has at a time."""
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _end_if_unused(folder: Path) -> None:
    """Ends this process if nobody has opened the pipe since."""
    with locked(folder):
        if select.select([0], [], [], 0)[0]:
            address = folder / "address"
            shutil.rmtree(Path(address.read_text()).parent)
            address.unlink()
            os._exit(0)


def _preload() -> None:
    """Imports what commands need, and leaves no trace of it that a new process would not have."""
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # its thread would not be in a fork, which would wait for it
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # as robustfeat imports openvino
    for name in PRELOADED:
        importlib.import_module(name)
    import robustfeat

    for module in pkgutil.walk_packages(robustfeat.__path__, "robustfeat."):
        if not module.name.startswith(_LEFT_OUT):
            importlib.import_module(module.name)
    for name in [name for name in sys.modules if name.partition(".")[0] == FORGOTTEN]:
        del sys.modules[name]
    for finalizer in list(weakref.finalize._registry):  # type: ignore[attr-defined]
        finalizer.atexit = False  # PyTorch takes thousands of operators down
    gc.freeze()  # a collection would copy every page that a fork shares


def _serve(listener: socket.socket, folder: Path) -> dict[str, Any]:
    """Returns the request in each process that is to run a command, never in the server."""
    listener.settimeout(None)
    ended, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    running: dict[int, socket.socket] = {}
    watched: list[socket.socket | int] = [listener, ended, 0]
    while True:
        ready, _, _ = select.select(watched, [], [])
        if 0 in ready:  # all tests are over
            _end_if_unused(folder)
        if ended in ready:
            os.read(ended, 1 << 10)
            _report(running)
        if listener not in ready:
            continue
        connection, _ = listener.accept()
        request, files = _receive(connection)
        pid = os.fork()
        if not pid:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for other in (listener, connection, *running.values()):
                other.close()
            os.close(ended)
            os.close(wake)
            _become(request, files)
            return request
        for file in files:
            os.close(file)
        running[pid] = connection
        connection.sendall(f"{pid}\n".encode())


def _report(running: dict[int, socket.socket]) -> None:
    """Tells the exit codes of the commands that have ended."""
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        with running.pop(pid) as connection, contextlib.suppress(BrokenPipeError):  # nobody waits for it
            connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())


def _receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    head, files, _, _ = socket.recv_fds(connection, 4, 3)
    data = b""
    while len(data) < int.from_bytes(head, "big"):
        data += connection.recv(1 << 20)
    return json.loads(data), files


def _become(request: dict[str, Any], files: list[int]) -> None:
    """Gives this process what is the command's own."""
    os.setsid()
    for target, file in enumerate(files):
        os.dup2(file, target)
        os.close(file)
    # The old one remembers whether it was a file or a pipe.
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    if request["file_bytes"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_bytes"], request["file_bytes"]))
    for name, value in request["constants"].items():
        module, _, constant = name.rpartition(".")
        assert hasattr(importlib.import_module(module), constant), name
        setattr(importlib.import_module(module), constant, value)
    if not request["curves"]:
        stand_in = types.ModuleType(_CURVES)
        stand_in.draw_curves = lambda folder, concepts: None  # type: ignore[attr-defined]
        sys.modules[_CURVES] = stand_in


def _execute(request: dict[str, Any]) -> None:
    """Runs the command in the place of the main module."""
    if request["code"] is None:
        sys.argv[1:] = request["arguments"]
        runpy.run_module("robustfeat", run_name="__main__", alter_sys=True)
    else:
        sys.argv[:] = ["-c", *request["arguments"]]
        sys.path[0] = ""
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(request["code"], "<string>", "exec"), main.__dict__)


def _leave(code: int) -> None:
    """Does what an interpreter does at its end, but takes no libraries down, which needs half a second."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    sys.path[0] = str(Path.cwd())  # as `python -m` does
    _preload()
    wanted = _serve(socket.socket(fileno=int(sys.argv[1])), Path(sys.argv[2]))
    try:
        _execute(wanted)
    except SystemExit as exc:
        if not isinstance(exc.code, int):
            raise
        _leave(exc.code)
    except Exception:
        traceback.print_exc()
        _leave(1)
    _leave(0)
