"""A real TorchServe."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from robustfeat.errors import EngineError
from robustfeat.serving.torchserve.java import find_java
from tests.conftest import shared_folder
from tests.serving.http.conftest import Answer, Server, alive, children


def why_not() -> str:
    """Why TorchServe does not run here; empty if it does."""
    if sys.version_info >= (3, 14):
        return "TorchServe has no version for this Python"
    try:
        find_java()
    except EngineError as exc:
        return str(exc)
    return ""


class TorchServer(Server):
    """`robustfeat torchserve --run`, until it is stopped."""

    arguments = ("torchserve",)

    def __init__(self, store: Path, *options: object) -> None:
        self.store = store
        super().__init__(*options, "--out", store, "--port", free_ports(5), "--run")

    def ask(self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> Answer:
        return super().ask(method, path, body, {"authorization": f"Bearer {self.key('inference')}", **(headers or {})})

    def manage(self, method: str, path: str, key: str = "management") -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port + 1, timeout=60)
        with contextlib.closing(connection):
            connection.request(method, path, headers={"authorization": f"Bearer {self.key(key)}"})
            return Answer(connection.getresponse())

    def metrics(self) -> str:
        connection = http.client.HTTPConnection("127.0.0.1", self.port + 2, timeout=60)
        with contextlib.closing(connection):
            connection.request("GET", "/metrics")
            return Answer(connection.getresponse()).body.decode()

    def key(self, name: str) -> str:
        return str(json.loads((self.store / "key_file.json").read_text())[name]["key"])

    def processes(self) -> list[int]:
        """Of all generations: Java, its workers, their decoders."""
        found = [self.process.pid]
        for pid in found:
            found += children(pid)
        return found

    def log(self) -> str:
        return (self.store / "logs" / "model_log.log").read_text()


def free_ports(count: int) -> int:
    """The first of so many neighbours that are free."""
    for first in range(20_000, 30_000, count):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                probe = stack.enter_context(socket.socket())
                probe.bind(("127.0.0.1", port))
            return first
    raise AssertionError("no free ports")


@contextlib.contextmanager
def torchserving(store: Path, *options: object) -> Iterator[TorchServer]:
    server = TorchServer(store, *options)
    try:
        yield server
    finally:
        every = server.processes()
        if server.process.poll() is None:
            server.stop()
        assert not any(map(alive, every))


@pytest.fixture(scope="session")
def torchserver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchServer]:
    """Requests wait a moment for others, so that what is sent together makes one batch."""
    # Its tests go to one worker: a second server could take the same ports.
    (shared_folder(tmp_path_factory) / "torchserver").mkdir(parents=True)
    store = tmp_path_factory.mktemp("torchserve") / "store"
    with torchserving(store, "--batch-size", 8, "--batch-delay", 150, "--max-items", 4, "--token-life", 90) as server:
        yield server


@pytest.fixture(scope="session")
def photos(example_files: list[Path]) -> list[bytes]:
    return [file.read_bytes() for file in example_files[::5]]
