"""A loopback stand-in for the Hugging Face Hub: the part of its API that reads the files of one dataset."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

__all__ = ["serve_dataset"]

_COMMIT = "c0ffee" + "0" * 34
_PAGE = 3  # entries in an answer, so that every longer folder takes several


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, root: Path, repo: str, requests: list[str], *args: Any) -> None:
        self._root, self._repo, self._requests = root, repo, requests
        super().__init__(*args)

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._file()

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        self._requests.append(f"{self.command} {unquote(url.path)}")
        api = f"/api/datasets/{self._repo}"
        if url.path.startswith(f"/datasets/{self._repo}/resolve/main/"):
            self._file()
        elif url.path in {api, f"{api}/revision/main"}:
            self._answer({"id": self._repo, "sha": _COMMIT, "private": False, "tags": [], "siblings": []})
        elif url.path == f"{api}/tree/main" or url.path.startswith(f"{api}/tree/main/"):
            self._tree(unquote(url.path.removeprefix(f"{api}/tree/main")).strip("/"), parse_qs(url.query))
        else:
            self._refuse("RepoNotFound")

    def do_POST(self) -> None:
        wanted = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())["paths"]
        found = [self._root / path for path in wanted if (self._root / path).exists()]
        self._answer([self._entry(path) for path in found])

    def _tree(self, folder: str, query: dict[str, list[str]]) -> None:
        place = self._root / folder
        if not place.is_dir():
            self._refuse("EntryNotFound")
            return
        deep = query.get("recursive", ["false"])[0].lower() == "true"
        paths = sorted(place.rglob("*") if deep else place.iterdir())
        first = int(query.get("cursor", ["0"])[0])
        headers = {}
        if first + _PAGE < len(paths):
            base = f"http://{self.headers['Host']}{urlsplit(self.path).path}"
            recursive = f"recursive={'true' if deep else 'false'}"
            headers["Link"] = f'<{base}?{recursive}&cursor={first + _PAGE}>; rel="next"'
        self._answer([self._entry(path) for path in paths[first : first + _PAGE]], headers)

    def _entry(self, path: Path) -> dict[str, Any]:
        name = path.relative_to(self._root).as_posix()
        if path.is_dir():
            return {"type": "directory", "oid": "0" * 40, "size": 0, "path": name}
        data = path.read_bytes()
        return {"type": "file", "oid": hashlib.sha1(data).hexdigest(), "size": len(data), "path": name}

    def _file(self) -> None:
        name = unquote(urlsplit(self.path).path.removeprefix(f"/datasets/{self._repo}/resolve/main/"))
        if not (self._root / name).is_file():
            self._refuse("EntryNotFound")
            return
        data = (self._root / name).read_bytes()
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": _COMMIT, "Accept-Ranges": "bytes"}
        status = HTTPStatus.OK
        if wanted := self.headers.get("Range"):
            start, _, end = wanted.removeprefix("bytes=").partition("-")
            last = min(int(end or len(data)), len(data) - 1)
            headers["Content-Range"] = f"bytes {start}-{last}/{len(data)}"
            data, status = data[int(start) : last + 1], HTTPStatus.PARTIAL_CONTENT
        self._send(status, data, headers)

    def _answer(self, value: object, headers: dict[str, str] | None = None) -> None:
        self._send(HTTPStatus.OK, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _refuse(self, code: str) -> None:
        self._send(HTTPStatus.NOT_FOUND, b"{}", {"X-Error-Code": code, "Content-Type": "application/json"})

    def _send(self, status: HTTPStatus, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@contextmanager
def serve_dataset(root: Path, repo: str) -> Iterator[tuple[str, list[str]]]:
    """Serves the files under `root` as the dataset `repo`; gives the value for HF_ENDPOINT and the GETs so far."""
    requests: list[str] = []
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, root, repo, requests)) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", requests
        finally:
            server.shutdown()
            thread.join()
