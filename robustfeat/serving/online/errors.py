"""The errors that clients see, in the two forms that their protocols know."""

from __future__ import annotations

import math
from typing import Any

import orjson

__all__ = ["ApiError", "error_answer", "failure_object", "problem_object", "timed_out"]

_TYPES = {401: "authentication_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A refusal.

    Attributes:
        status: of HTTP.
        message: one sentence: what was expected, what arrived, what to do.
        code: for programs, and the `reason` of the metrics; one of a fixed set.
        retry_after_s: when it is worth trying again.
        param: the part of the request that is at fault.
        close: whether the rest of the request is not read, and the connection ends.
        data: further entries of the answer, beside the error.
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
    """The error of a request whose answer is not there in time."""
    message = f"no answer within {seconds:g} s; try again later, or send less"
    return ApiError(503, "timeout", message, retry_after_s=1)


def error_answer(exc: ApiError, path: str) -> bytes:
    """The body: OpenAI's error object, or under /v2 the Open Inference Protocol's string."""
    if path == "/v2" or path.startswith("/v2/"):
        return orjson.dumps({"error": exc.message})
    kind = _TYPES.get(exc.status, "invalid_request_error" if exc.status < 500 else "server_error")
    about = {"message": exc.message, "type": kind, "param": exc.param, "code": exc.code}
    return orjson.dumps({"error": about, **exc.data}, option=orjson.OPT_SERIALIZE_NUMPY)


def problem_object(problem: str) -> dict[str, Any]:
    """The error object of one image that cannot be read."""
    return {"message": problem, "type": "invalid_request_error", "param": None, "code": "unreadable_image"}


def failure_object() -> dict[str, Any]:
    """The error object of one image that the model failed on."""
    return {"message": "the model failed; try again", "type": "server_error", "param": None, "code": "internal"}
