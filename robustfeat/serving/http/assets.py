"""Serves the files of the server's own pages: the page at / and the API's documentation at /docs."""

from __future__ import annotations

import gzip
import hashlib
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from fastapi import Request
from fastapi.responses import Response
from starlette.concurrency import run_in_threadpool

from robustfeat.serving.online.errors import ApiError

__all__ = ["DOCS_POLICY", "PAGE_POLICY", "Assets"]

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
DOCS_POLICY = _POLICY
PAGE_POLICY = f"{_POLICY}; require-trusted-types-for 'script'; trusted-types 'none'"
"""Prevents text in names of files and classes from becoming HTML or a script."""

_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_COMPRESSED = ".gz"


@dataclass(frozen=True)
class _Asset:
    """A file, possibly compressed.

    Attributes:
        name: name without the suffix of the compression.
        data: the shipped bytes.
        compressed: whether the bytes are gzip.
    """

    name: str
    data: bytes
    compressed: bool

    @property
    def media_type(self) -> str:
        return _TYPES[Path(self.name).suffix]

    @cached_property
    def tag(self) -> str:
        tag = f'"{hashlib.sha256(self.data).hexdigest()[:32]}"'
        return f"W/{tag}" if self.compressed else tag  # plain and compressed bytes differ


class Assets:
    """The files of a folder, in memory.

    Args:
        folder: the folder. Files of types that pages do not use are ignored.
        policy: the Content-Security-Policy of all files.
    """

    def __init__(self, folder: Path, policy: str) -> None:
        self._policy = policy
        self._assets: dict[str, _Asset] = {}
        for file in sorted(folder.iterdir()):
            name = file.name.removesuffix(_COMPRESSED)
            if Path(name).suffix in _TYPES:
                self._assets[name] = _Asset(name, file.read_bytes(), compressed=name != file.name)

    async def answer(self, request: Request, name: str) -> Response:
        """A file, or 304 if the client has it.

        A browser checks its copy each time, so an update never mixes old and new scripts.

        Raises:
            ApiError: 404.
        """
        asset = self._assets.get(name)
        if asset is None:
            raise ApiError(404, "not_found", f"{request.scope['path'][:100]} is not served; /docs lists what is")
        headers = {
            "cache-control": "no-cache",
            "content-security-policy": self._policy,
            "cross-origin-opener-policy": "same-origin",
            "cross-origin-resource-policy": "same-origin",
            "etag": asset.tag,
            "referrer-policy": "no-referrer",
            "x-content-type-options": "nosniff",
        }
        if asset.compressed:
            headers["vary"] = "accept-encoding"
        if _is_known(asset.tag, request.headers.get("if-none-match", "")):
            return Response(status_code=304, headers=headers)
        body = asset.data
        if asset.compressed and _takes_gzip(request.headers.get("accept-encoding", "")):
            headers["content-encoding"] = "gzip"
        elif asset.compressed:
            body = await run_in_threadpool(gzip.decompress, body)
        return Response(body, media_type=asset.media_type, headers=headers)


def _is_known(tag: str, given: str) -> bool:
    """Whether an If-None-Match header names a file, also by a weak tag."""
    known = {entry.strip().removeprefix("W/") for entry in given[:4096].split(",")}
    return given.strip() == "*" or tag.removeprefix("W/") in known


def _takes_gzip(accepted: str) -> bool:
    return re.search(r"\bgzip\b(?!\s*;\s*q=0(\.0*)?\s*(,|$))", accepted[:4096].lower()) is not None
