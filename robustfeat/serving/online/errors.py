"""The errors that clients see, in the formats of both protocols."""

from __future__ import annotations

import math
from typing import Any

import orjson

__all__ = ["ApiError", "error_answer", "failure_object", "problem_object", "timed_out"]

_TYPES = {401: "authentication_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An error response.

    Attributes:
        status: the HTTP status.
        message: one sentence: what was expected, what arrived, what to do.
        code: one of a fixed set, for programs and for the `reason` of the metrics.
        retry_after_s: time after which a retry may succeed.
        param: the wrong part of the request.
        close: whether to close the connection without reading the rest of the request.
        data: additional entries of the response.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        retry_after_s: float | None = None,
        param: str | None = None,
        close: bool = False,
        headers: dict[str, str] | None = None,
        data: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.param = status, code, message, param
        self.data = data or {}
        self.headers = dict(headers or {})
        if retry_after_s is not None:
            self.headers["retry-after"] = str(max(1, math.ceil(retry_after_s)))
        if close:
            self.headers["connection"] = "close"


def timed_out(seconds: float) -> ApiError:
    """The error of a request that timed out."""
    message = f"no answer within {seconds:g} s; try again later, or send less"
    return ApiError(503, "timeout", message, retry_after_s=1)


def error_answer(exc: ApiError, path: str) -> bytes:
    """The response body: OpenAI's error object, or under /v2 the Open Inference Protocol's string."""
    if path == "/v2" or path.startswith("/v2/"):
        return orjson.dumps({"error": exc.message})
    kind = _TYPES.get(exc.status, "invalid_request_error" if exc.status < 500 else "server_error")
    about = {"message": exc.message, "type": kind, "param": exc.param, "code": exc.code}
    return orjson.dumps({"error": about, **exc.data}, option=orjson.OPT_SERIALIZE_NUMPY)


def problem_object(problem: str) -> dict[str, Any]:
    """The error object of an unreadable image."""
    return {"message": problem, "type": "invalid_request_error", "param": None, "code": "unreadable_image"}


def failure_object() -> dict[str, Any]:
    """The error object of an image for which the model failed."""
    return {"message": "the model failed; try again", "type": "server_error", "param": None, "code": "internal"}
