"""What a server accepts."""

from __future__ import annotations

from dataclasses import dataclass, fields

from robustfeat.errors import InputError

__all__ = ["Limits"]


@dataclass(frozen=True)
class Limits:
    """Bounds of what a request may ask, and of what waits at once in a worker.

    Attributes:
        body_bytes: of a request's body; more is 413.
        pixels: of an image; more is that image's error, from its header.
        items: images in a request; more is 413.
        queue: images that are admitted at once; with more, requests get 503.
        timeout_s: from a request's first line to its answer; later it is 503, or 408 while its body is on its way.
        decode_timeout_s: for one image; one that takes longer is that image's error.
        connections: open at once; more get 503 and are closed.
    """

    body_bytes: int
    pixels: int
    items: int
    queue: int
    timeout_s: float
    decode_timeout_s: float
    connections: int

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) <= 0:
                raise InputError(f"{field.name} must be positive; got {getattr(self, field.name)}")
        if self.items > self.queue:
            raise InputError(
                f"a request may hold {self.items} images, but only {self.queue} may wait: raise --max-queue"
            )

    @property
    def buffered_bytes(self) -> int:
        """Bytes of bodies held at once; with more, requests get 503."""
        return 16 * self.body_bytes
