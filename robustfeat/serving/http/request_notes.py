"""Notes on a request in progress, for its log line and for errors."""

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
        model: the model that embedded its images, once known.
        head: the head; None without one.
        images: number of images, once known.
        timeline: times of its images' stages, if requests are traced.
    """

    id: str
    model: str | None = None
    head: str | None = None
    images: int = 0
    timeline: Timeline | None = None


CURRENT: ContextVar[RequestNotes | None] = ContextVar("request", default=None)
"""The notes of the running task's request."""
