"""Real servers, each in a process of its own."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import ArrayLike
from PIL import Image

from robustfeat import FeatureExtractor
from tests.command_server import CommandServer, ForkedCommand
from tests.conftest import ROOT

START_S = 60


class Answer:
    """Status, headers (lower-case names) and body."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status = response.status
        self.headers = {name.lower(): value for name, value in response.getheaders()}
        self.body = response.read()

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Server:
    """`robustfeat serve` with some options, until it is stopped.

    Args:
        options: of the command.
        forked_from: forks the process; without it a new interpreter is started.
        constants: values of constants of modules, by their full names, in a fork.
        environment: additions to the environment.
    """

    arguments: tuple[str, ...] = ("serve", "--port", "0")

    def __init__(
        self,
        *options: object,
        forked_from: CommandServer | None = None,
        constants: Mapping[str, object] | None = None,
        **environment: str,
    ) -> None:
        arguments = [*self.arguments, *map(str, options)]
        variables = {**os.environ, **environment}
        reading, writing = os.pipe()
        self.process: ForkedCommand | subprocess.Popen[bytes]
        if forked_from is None:
            assert not constants
            command = [sys.executable, "-m", "robustfeat", *arguments]
            self.process = subprocess.Popen(command, stderr=writing, cwd=ROOT, env=variables)
        else:
            self.process = forked_from.start(arguments, variables, stderr=writing, constants=constants)
        os.close(writing)
        self._stderr = open(reading)  # noqa: SIM115 - as long as the process writes
        self.headers: dict[str, str] = {}  # of every request
        self.said: list[str] = []
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        assert self._ready.wait(START_S), "".join(self.said)
        found = re.search(r"http://(?:127\.0\.0\.1|\[::\]):(\d+)", "".join(self.said))
        assert found, "".join(self.said)
        self.port = int(found[1])
        self.address = found[0]

    def _read(self) -> None:
        with self._stderr:
            for line in self._stderr:
                self.said.append(line)
                if "serving at" in line:
                    self._ready.set()
        self._ready.set()

    def ask(self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            connection.request(method, path, body, {**self.headers, **(headers or {})})
            return Answer(connection.getresponse())

    def get(self, path: str, **headers: str) -> Answer:
        return self.ask("GET", path, headers=headers)

    def post(self, path: str, body: bytes | dict[str, Any] | list[Any], **headers: str) -> Answer:
        if not isinstance(body, bytes):
            body, headers = json.dumps(body).encode(), {"content-type": "application/json", **headers}
        return self.ask("POST", path, body, {name.replace("_", "-"): value for name, value in headers.items()})

    def form(self, path: str, images: list[bytes], **headers: str) -> Answer:
        body, kind = form_of(images)
        return self.post(path, body, content_type=kind, **headers)

    def workers(self) -> list[int]:
        return children(self.process.pid)

    def metric(self, name: str) -> float:
        """The sum over all labels."""
        lines = self.get("/metrics").body.decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if re.match(rf"{name}(\{{|\s)", line))

    def logged(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.said if line.startswith("{")]

    def stop(self, name: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(name)
        code = self.process.wait(60)
        self._reader.join(10)
        return code


class Load:
    """Four clients that ask without a pause, each its own photograph, and check what they get."""

    def __init__(self, server: Server, photos: list[bytes], extractor: FeatureExtractor) -> None:
        self.server = server
        self.expected = extractor.embed(photos[:4])
        self.good, self.lost = [0] * 4, [0] * 4
        self.wrong: list[tuple[int, bytes]] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(at, photos[at])) for at in range(4)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        wait_until(lambda: min(self.good) > 2)
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self, at: int, photo: bytes) -> None:
        while not self._stop.is_set():
            try:
                answer = self.server.post("/embed", photo)
            except (OSError, http.client.HTTPException):
                self.lost[at] += 1
                continue
            found = answer.json["data"][0].get("embedding") if answer.status == 200 else None
            if found is not None and np.allclose(found, self.expected[at], rtol=1e-4, atol=1e-5):
                self.good[at] += 1
            else:
                self.wrong.append((answer.status, answer.body[:500]))

    def goes_on(self) -> None:
        before = list(self.good)
        wait_until(lambda: all(now > then + 5 for now, then in zip(self.good, before, strict=True)))


def slow_picture() -> bytes:
    """A small JPEG that takes many seconds to decode: its last scan comes again and again."""
    file = io.BytesIO()
    Image.new("L", (2000, 2000)).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * 10_000


def children(pid: int) -> list[int]:
    found: list[int] = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += map(int, file.read_text().split())
    return found


def blank_webp(width: int, height: int) -> bytes:
    """A file of some 30 bytes that holds so many pixels, all of one colour."""
    file = io.BytesIO()
    Image.new("RGB", (1, 1)).save(file, "webp", lossless=True)
    data = bytearray(file.getvalue())
    at = data.index(b"VP8L") + 9  # behind the chunk's size and its signature: 14 bits each, less one
    size = int.from_bytes(data[at : at + 4], "little") >> 28 << 28 | (height - 1) << 14 | (width - 1)
    data[at : at + 4] = size.to_bytes(4, "little")
    return bytes(data)


def anonymous_mib(pid: int) -> float:
    """Memory of a process and all below it."""
    try:
        found = re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    except OSError:  # it has ended
        return 0.0
    return int(found[1]) / 1024 + sum(map(anonymous_mib, children(pid))) if found else 0.0


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.02)


def head_of(body: bytes) -> bytes:
    return f"POST /embed HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()


def all_of(client: socket.socket) -> bytes:
    return b"".join(iter(lambda: client.recv(4096), b""))


def assert_close(found: ArrayLike, expected: ArrayLike) -> None:
    """The same features, up to the rounding of batches of other sizes."""
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=1e-4, atol=1e-5)


def form_of(images: list[bytes]) -> tuple[bytes, str]:
    parts = [
        b'--cut\r\nContent-Disposition: form-data; name="images"; filename="%d.jpg"\r\n\r\n%s\r\n' % (number, image)
        for number, image in enumerate(images)
    ]
    return b"".join(parts) + b"--cut--\r\n", "multipart/form-data; boundary=cut"


@contextlib.contextmanager
def serving(
    *options: object, new: bool = False, constants: Mapping[str, object] | None = None, **environment: str
) -> Iterator[Server]:
    """A server as a fork of a prepared process, in a session of its own, or as a `new` interpreter."""
    server = Server(*options, forked_from=None if new else _prepared[0], constants=constants, **environment)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.stop()
        assert "Traceback" not in "".join(server.said), "".join(server.said)


_prepared: list[CommandServer] = []


@pytest.fixture(scope="session", autouse=True)
def prepared(commands: CommandServer) -> None:
    """`serving` forks its servers from the process that forks commands, which starts at first use."""
    _prepared.append(commands)


@pytest.fixture(scope="session")
def server(clothes: Path, model: Path) -> Iterator[Server]:
    """Two models and a head."""
    with serving(
        "--model", "robustfeat=builtin", "--model", f"small={model}", "--head", f"clothes={clothes}", new=True
    ) as running:
        yield running
