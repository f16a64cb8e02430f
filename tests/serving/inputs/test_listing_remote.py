"""What remote storage says when it is listed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from robustfeat.errors import InputError
from robustfeat.serving.inputs.listing import list_inputs


@pytest.fixture
def forbidding() -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(403)

        def do_HEAD(self) -> None:
            self.do_GET()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_server_that_forbids_is_told_from_a_missing_folder(forbidding: str) -> None:
    pytest.importorskip("aiohttp")
    with pytest.raises(InputError, match=r"cannot be listed \(the server forbids it, HTTP 403\)"):
        list_inputs([f"{forbidding}/a"])


def test_storage_that_cannot_be_reached_is_told_from_a_full_disk() -> None:
    with pytest.raises(InputError, match=r"^ftp://127\.0\.0\.1:1/a: cannot be reached \(ConnectionRefusedError"):
        list_inputs(["ftp://127.0.0.1:1/a"])
