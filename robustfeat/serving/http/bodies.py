"""Reads request bodies within limits, and parses them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from robustfeat.serving.http.keys import Key
from robustfeat.serving.http.limits import Limits
from robustfeat.serving.online.errors import ApiError

__all__ = ["Buffered", "images_of", "read_body", "too_large"]

_FIELDS = 64
_HEADER_CHARACTERS = 1024
_OPTIONS = 300
"""Most semicolons in the header of a part. File names may contain some."""
_FILE_NAMES = {"images", "image", "files", "file"}
_TEXT = (b"{", b"[", b'"', b"data:")
_DELIMITERS = 10_000
"""Most places in a body that look like a boundary. The parser takes microseconds for each, even inside an image."""


class Buffered:
    """Counts the buffered bytes of bodies, in total and per key.

    Args:
        limits: limits of one body and of all.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits, self.bytes = limits, 0
        self._by_key: Counter[str] = Counter()
        self._share = limits.buffered_bytes

    def share_among(self, names: int) -> None:
        """Sets the number of keys. A key below an equal part, or with less than one body, is never refused."""
        self._share = max(self._limits.max_body_bytes, self._limits.buffered_bytes // max(1, names))

    @contextmanager
    def body(self, key: Key) -> Iterator[_Held]:
        """Counts one body for the duration of the block."""
        held = _Held(self, key, self._limits)
        try:
            yield held
        finally:
            self._count(key, -held.size)

    def _count(self, key: Key, count: int) -> bool:
        """Counts bytes. Returns whether they are accepted."""
        self.bytes += count
        self._by_key[key.name] += count
        if not self._by_key[key.name]:
            del self._by_key[key.name]
        own = bool(key.name) and self._by_key[key.name] <= self._share
        return own or self.bytes <= self._limits.buffered_bytes


class _Held:
    def __init__(self, all_bodies: Buffered, key: Key, limits: Limits) -> None:
        self._all, self._key, self._limits, self.size = all_bodies, key, limits, 0

    def grow(self, count: int) -> None:
        self.size += count
        welcome = self._all._count(self._key, count)
        if self.size > self._limits.max_body_bytes:
            raise too_large(self._limits)
        if not welcome:
            raise ApiError(
                503, "too_many_bytes", "too much is being uploaded at once; try again soon", retry_after_s=1, close=True
            )


def too_large(limits: Limits) -> ApiError:
    """The error of a body beyond its limit."""
    return ApiError(
        413, "body_too_large", f"the body must be at most {limits.max_body_bytes:,} bytes; send less at once"
    )


async def read_body(request: Request, held: _Held) -> bytes:
    """Reads the whole body.

    Raises:
        ApiError: 400, 411 to 415 or 503.
    """
    coding = request.headers.get("content-encoding", "identity")
    if coding.lower() not in {"identity", ""}:
        raise ApiError(
            415, "content_encoding", f"Content-Encoding {coding[:40]} is not read; send the body as it is", close=True
        )
    state = request.scope["state"]
    state["uploading"] = True
    parts: list[bytes] = []
    more = True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ApiError(400, "disconnected", "the client left before the end of the body", close=True)
        more, part = message.get("more_body", False), message.get("body", b"")
        held.grow(len(part))
        parts.append(part)
    state["uploading"] = False
    return parts[0] if len(parts) == 1 else b"".join(parts)


def images_of(content_type: str, body: bytes, most: int) -> tuple[list[bytes], dict[str, str]]:
    """Parses the images in a body, and the text fields.

    Args:
        content_type: multipart/form-data, or another type for a body that is one image.
        body: the whole body.
        most: most images per request.

    Raises:
        ApiError: 400 for a damaged body, 413 for too many images, 422 without an image.
    """
    if content_type.partition(";")[0].strip(" \t").lower() != "multipart/form-data":
        if not body:
            raise ApiError(422, "no_image", "the body is empty; expected the bytes of an image file")
        if body[:64].lstrip().startswith(_TEXT):
            raise ApiError(
                422,
                "unreadable_image",
                "the body is JSON or a data URI; send an image file as it is, or JSON to /v1/embeddings or /v2",
                param="images",
            )
        return [body], {}
    if len(content_type) > _HEADER_CHARACTERS:
        raise ApiError(400, "bad_multipart", f"the Content-Type has more than {_HEADER_CHARACTERS:,} characters")
    _, options = parse_options_header(content_type)
    if not options.get(b"boundary"):
        raise ApiError(
            400, "bad_multipart", "multipart/form-data without a boundary; let the HTTP library set the header"
        )
    if body.count(b"\r\n--" + options[b"boundary"]) > _DELIMITERS:
        raise ApiError(400, "bad_multipart", f"the boundary is in the multipart body more than {_DELIMITERS:,} times")
    form = _Form(most)
    try:
        parser = MultipartParser(options[b"boundary"], form.callbacks())
        parser.write(body)
        parser.finalize()
    except FormParserError as exc:
        raise ApiError(400, "bad_multipart", f"the multipart body cannot be read ({exc})") from exc
    if not form.ended:
        raise ApiError(400, "bad_multipart", "the multipart body ends before its last boundary")
    if not form.images:
        raise ApiError(422, "no_image", "no image in the form; add files as parts named images", param="images")
    return form.images, form.fields


class _Form:
    """Collects the parts of a form.

    Files are images, and so are parts with a name for images or a type other than text. Other parts are fields.
    """

    def __init__(self, most: int) -> None:
        self.images: list[bytes] = []
        self.fields: dict[str, str] = {}
        self.ended = False
        self._most, self._parts = most, 0

    def callbacks(self) -> Any:
        return {
            "on_part_begin": self._begin,
            "on_header_field": lambda data, start, end: self._field.extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
            "on_header_end": self._header,
            "on_headers_finished": self._headers,
            "on_part_data": lambda data, start, end: self._data.append(data[start:end]),
            "on_part_end": self._end,
            "on_end": self._finish,
        }

    def _begin(self) -> None:
        self._field, self._value = bytearray(), bytearray()
        self._headers_of_part: dict[str, str] = {}
        self._data: list[bytes] = []

    def _header(self) -> None:
        self._headers_of_part[self._field.decode("latin-1").lower()] = self._value.decode("latin-1")
        self._field, self._value = bytearray(), bytearray()

    def _headers(self) -> None:
        disposition = self._headers_of_part.get("content-disposition", "")
        if disposition.count(";") > _OPTIONS:
            raise ApiError(400, "bad_multipart", f"a Content-Disposition has more than {_OPTIONS} semicolons")
        _, self._options = parse_options_header(disposition)
        # RFC 7578 forbids `filename*` in forms, so the options lack it, but some clients send only that.
        named = b"filename" in self._options or re.search(r"(?i);\s*filename\*\s*=", disposition) is not None
        kind = self._headers_of_part.get("content-type", "text/plain").lower()
        self._is_file = named or not kind.startswith(("text/", "application/json"))

    def _end(self) -> None:
        name = self._options.get(b"name", b"").decode("utf-8", "replace")
        data = b"".join(self._data)
        if self._is_file or name.removesuffix("[]") in _FILE_NAMES:
            self.images.append(data)
        else:
            self.fields[name[:64]] = data[:256].decode("utf-8", "replace")
        self._parts += 1
        # Refuse at once, since parsing the rest would take longer than everything else.
        if len(self.images) > self._most:
            raise ApiError(
                413, "too_many_images", f"the request has more than {self._most:,} images; send less at once"
            )
        if len(self.fields) > _FIELDS:
            raise ApiError(422, "bad_request", f"the form has more than {_FIELDS} fields; send images and a model")
        if self._parts > self._most + _FIELDS:  # parts may share a name or have none
            raise ApiError(
                422, "bad_request", f"the form has more than {self._most + _FIELDS} parts; send images and a model"
            )

    def _finish(self) -> None:
        self.ended = True
