"""Limits of a server."""

from __future__ import annotations

from dataclasses import dataclass, fields

from robustfeat.errors import InputError

__all__ = ["Limits"]


@dataclass(frozen=True)
class Limits:
    """Limits of one request and of one worker.

    Attributes:
        max_body_bytes: largest body; a larger one gets 413.
        max_pixels: largest image; a larger one is refused by its header.
        max_items: most images per request; more get 413.
        max_queue: most images in a worker at a time; further requests get 503.
        timeout_s: longest time from a request's first line to its response; then 503, or 408 while the body arrives.
        decode_timeout_s: longest time to decode one image; then the image is refused.
        max_connections: most open connections; more get 503 and are closed.

    Raises:
        InputError: a limit is not positive, or the largest request does not fit into the queue.
    """

    max_body_bytes: int
    max_pixels: int
    max_items: int
    max_queue: int
    timeout_s: float
    decode_timeout_s: float
    max_connections: int

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value <= 0:
                raise InputError("expected more than 0", argument=field.name, value=value)
        if self.max_items > self.max_queue:
            raise InputError(
                f"a request may hold {self.max_items} images, but only {self.max_queue} may wait",
                fix="raise `max_queue`, or lower `max_items`",
            )

    @property
    def buffered_bytes(self) -> int:
        """Most buffered bytes of bodies. Beyond it requests get 503, except from keys that use little."""
        return 16 * self.max_body_bytes
