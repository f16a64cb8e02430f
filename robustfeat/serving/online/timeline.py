"""When the images of a request passed the stages of a `Batcher`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["Timeline"]


@dataclass(slots=True)
class Timeline:
    """Times of a request's images, by `time.perf_counter`; None where no image has come so far.

    Attributes:
        queued: when they began to wait.
        decoding: when a decoder took the first one.
        decoded_first, decoded: when the first one and the last one were decoded.
        running: when the model began with the first one.
        done: when the model had finished the last one.
    """

    queued: float | None = None
    decoding: float | None = None
    decoded_first: float | None = None
    decoded: float | None = None
    running: float | None = None
    done: float | None = None

    def note_decoded(self, began: float, ended: float) -> None:
        """A decoder had an image from `began` to `ended`."""
        if self.decoding is None or began < self.decoding:
            self.decoding = began
        if self.decoded_first is None:
            self.decoded_first = ended
        self.decoded = ended

    def note_run(self, began: float, ended: float) -> None:
        """The model had a batch with an image from `began` to `ended`."""
        if self.running is None:
            self.running = began
        self.done = ended

    def stages(self) -> Iterator[tuple[str, float, float]]:
        """The stages that the images reached, with their begin and end. Those of several images may overlap."""
        stages = {
            "decoder queue": (self.queued, self.decoding),
            "decode": (self.decoding, self.decoded),
            "model queue": (self.decoded_first or self.queued, self.running),
            "predict": (self.running, self.done),
        }
        for name, (began, ended) in stages.items():
            if began is not None and ended is not None:
                yield name, began, ended
