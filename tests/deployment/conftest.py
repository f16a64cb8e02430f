"""A server that the tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.command_server import CommandServer
from tests.serving.http.conftest import Server


@pytest.fixture(scope="session")
def photos(example_files: list[Path]) -> list[bytes]:
    return [file.read_bytes() for file in example_files[::5]]


@pytest.fixture(scope="session")
def server(commands: CommandServer, photos: list[bytes]) -> Iterator[Server]:
    """One that has answered, and failed."""
    started = Server("--allowed-host", "*", forked_from=commands)
    started.form("/embed", [photos[0], b"no image"])
    started.post("/embed", b"no image")
    started.get("/info")
    yield started
    assert started.stop() == 0
