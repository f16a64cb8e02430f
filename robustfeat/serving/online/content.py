"""Parses requests: JSON in an expected form, and images inside it as text."""

from __future__ import annotations

import binascii
from contextlib import suppress
from typing import Any, TypeVar

import orjson
from pydantic import BaseModel, ValidationError

from robustfeat.serving.online.errors import ApiError

__all__ = ["base64_bytes", "check_form", "data_of_uri", "parse_json"]

F = TypeVar("F", bound=BaseModel)

_JSON_PARTS = 100_000
_JSON_VALUES = 1_000_000
_ESCAPED = {"%2B": "+", "%2F": "/", "%3D": "=", "%0A": "", "%0D": "", "%20": ""}
_ESCAPES = 1_000_000
_ALPHABET = bytes.maketrans(b"-_", b"+/")


def parse_json(body: bytes) -> Any:
    """Parses a JSON body.

    Raises:
        ApiError: 400 if the body is not JSON, or 422 if it has more parts than any valid request.
    """
    if body.count(b"[") + body.count(b"{") > _JSON_PARTS:
        raise ApiError(422, "bad_request", f"the request has more than {_JSON_PARTS:,} lists and objects; send less")
    # Parsing millions of small values would block other requests for seconds.
    if body.count(b",") > _JSON_VALUES:
        raise ApiError(422, "bad_request", f"the request has more than {_JSON_VALUES:,} values; send less")
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as exc:
        raise ApiError(400, "bad_json", f"the request is not JSON ({exc})") from None


def check_form(form: type[F], content: Any) -> F:
    """Checks content against a schema.

    Raises:
        ApiError: 422 with the first wrong part.
    """
    try:
        return form.model_validate(content)
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"])) or "the request"
        raise ApiError(422, "bad_request", f"{place}: {first['msg']}", param=place) from None


def data_of_uri(text: str) -> bytes:
    """The bytes in a data URI, data:[TYPE];base64,DATA.

    Raises:
        ValueError: the text is not such a URI. The message says what it is.
    """
    head, comma, data = text.partition(",")
    if not comma or not head.lower().startswith("data:"):
        if head.lower().startswith(("http:", "https:")):
            raise ValueError("URLs are not fetched; send the image itself as data:image/jpeg;base64,...")
        raise ValueError("expected a data URI, data:image/jpeg;base64,...")
    if not head.lower().endswith(";base64"):
        raise ValueError("the data URI must be base64: data:image/jpeg;base64,...")
    if 0 < data.count("%") < _ESCAPES:  # URIs may escape characters
        for escaped, plain in _ESCAPED.items():
            data = data.replace(escaped, plain).replace(escaped.lower(), plain)
    return base64_bytes(data)


def base64_bytes(text: str) -> bytes:
    """Decodes base64, also with line breaks, without padding, or in the alphabet for URLs.

    Raises:
        ValueError: the text is not base64.
    """
    try:
        data = text.encode("ascii")
        with suppress(binascii.Error):
            return binascii.a2b_base64(data, strict_mode=True)
        data = data.translate(_ALPHABET, b" \t\n\f\r")
        data = data.removesuffix(b"=").removesuffix(b"=")
        return binascii.a2b_base64(data + b"=" * (-len(data) % 4), strict_mode=True)
    except (binascii.Error, UnicodeEncodeError):
        raise ValueError("not base64") from None
