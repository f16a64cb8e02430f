"""What is known of a request while it is answered, for its log line and for errors in between."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass

from robustfeat.serving.online.timeline import Timeline

__all__ = ["CURRENT", "RequestNotes"]


@dataclass(slots=True)
class RequestNotes:
    """Notes on one request.

    Attributes:
        id: the client's X-Request-ID, or a new one.
        model: that embedded its images; None before.
        head: that answered; None without one.
        images: how many images it has, as soon as they are known.
        timeline: when they pass each stage, where requests are traced.
    """

    id: str
    model: str | None = None
    head: str | None = None
    images: int = 0
    timeline: Timeline | None = None


CURRENT: ContextVar[RequestNotes | None] = ContextVar("request", default=None)
"""The notes of the request that the running task answers."""
