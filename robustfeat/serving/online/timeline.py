"""Records when the images of a request pass the stages of a `Batcher`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["Timeline"]


@dataclass(slots=True)
class Timeline:
    """Times of a request's images, from `time.perf_counter`. None for stages that no image has reached.

    Attributes:
        queued: when the images were queued.
        decoding: when a decoder took the first image.
        decoded_first, decoded: when the first and the last image were decoded.
        running: when the model started with the first image.
        done: when the model finished the last image.
    """

    queued: float | None = None
    decoding: float | None = None
    decoded_first: float | None = None
    decoded: float | None = None
    running: float | None = None
    done: float | None = None

    def note_decoded(self, began: float, ended: float) -> None:
        """Records that a decoder worked on an image from `began` to `ended`."""
        if self.decoding is None or began < self.decoding:
            self.decoding = began
        if self.decoded_first is None:
            self.decoded_first = ended
        self.decoded = ended

    def note_run(self, began: float, ended: float) -> None:
        """Records that the model ran a batch with an image from `began` to `ended`."""
        if self.running is None:
            self.running = began
        self.done = ended

    def stages(self) -> Iterator[tuple[str, float, float]]:
        """The stages reached, with their start and end. Stages of several images may overlap."""
        stages = {
            "decoder queue": (self.queued, self.decoding),
            "decode": (self.decoding, self.decoded),
            "model queue": (self.decoded_first or self.queued, self.running),
            "predict": (self.running, self.done),
        }
        for name, (began, ended) in stages.items():
            if began is not None and ended is not None:
                yield name, began, ended
