"""Runs decoder processes for serving. An event loop sends them images and reads their results."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from robustfeat.errors import RobustFeatError
from robustfeat.hub.preprocessing import Preprocessing
from robustfeat.serving.decoding.process import Decoder, DecoderLostError, Decoders
from robustfeat.serving.decoding.worker import MAILBOX_BYTES, Images
from robustfeat.system import INHERITS

__all__ = ["Done", "LoopDecoderPool"]

Done = Callable[[Sequence[str | None] | DecoderLostError], None]
"""Callback for the result of `Images`: the error of each image, or the loss of the decoder."""

_CHECK_S = 1.0
_RESTART_PAUSE_S = 1.0


class _Slot:
    """A decoder's number, its current process, and the callback of its task."""

    def __init__(self, number: int, decoder: Decoder) -> None:
        self.number = number
        self.decoder: Decoder | None = decoder
        self.done: Done | None = None

    @property
    def idle(self) -> bool:
        return self.done is None and self.decoder is not None and self.decoder.ready


class LoopDecoderPool:
    """Decodes images in `workers` decoder processes. All calls and callbacks run on one event loop.

    Args:
        contract, scaled, workers, places: see `Decoders`.
        max_pixels: largest accepted image.
        deadline_s: time limit per image.
        on_idle: called when a decoder may have become idle.

    Attributes:
        workers: number of decoders.
        squares: see `Decoders`.
    """

    def __init__(
        self,
        contract: Preprocessing,
        *,
        scaled: bool,
        workers: int,
        places: int,
        max_pixels: int,
        deadline_s: float,
        on_idle: Callable[[], None],
    ) -> None:
        self.workers = workers
        self._max_pixels, self._deadline_s, self._on_idle = max_pixels, deadline_s, on_idle
        self._decoders = Decoders(contract, scaled=scaled, workers=workers, places=places, max_pixels=max_pixels)
        self.squares = self._decoders.squares
        self._slots = [_Slot(number, self._decoders.start(number)) for number in range(workers)]
        # Images larger than the mailbox go through the pipe, only as fast as the decoder reads.
        self._writers = ThreadPoolExecutor(workers, "decoder-pipe")
        self._loop: asyncio.AbstractEventLoop | None = None

    def close(self) -> None:
        """Ends all processes."""
        self._decoders.close()
        self._writers.shutdown(wait=False, cancel_futures=True)

    def attach(self) -> None:
        """Starts to read results on the running loop."""
        self._loop = asyncio.get_running_loop()
        for slot in self._slots:
            self._listen(self._loop, slot)
        self._loop.call_later(self._pause_s, self._check, self._loop)

    @property
    def idle(self) -> bool:
        """Whether a decoder is free."""
        return any(slot.idle for slot in self._slots)

    def submit(self, images: Sequence[bytes], places: Sequence[int], done: Done, *, large: bool = False) -> None:
        """Gives images to a free decoder.

        Args:
            images: encoded images.
            places: the index in `squares` for each image.
            done: called once with the result.
            large: see `Images`.
        """
        slot = next(slot for slot in self._slots if slot.idle)
        assert slot.decoder is not None
        slot.done = done
        sizes = [len(image) for image in images]
        size = sum(sizes)
        if size <= MAILBOX_BYTES:
            slot.decoder.mailbox[:size] = b"".join(images)
            slot.decoder.send(Images(None, sizes, places, self._max_pixels, large))
        else:
            slot.decoder.send(Images(images, sizes, places, self._max_pixels, large), self._writers)

    @property
    def _pause_s(self) -> float:
        return min(_CHECK_S, self._deadline_s / 4)

    def _listen(self, loop: asyncio.AbstractEventLoop, slot: _Slot) -> None:
        assert slot.decoder is not None
        pipe = slot.decoder.fileno()
        loop.add_reader(pipe, self._read, loop, slot, slot.decoder)
        if INHERITS:  # uvloop makes it non-blocking, which would lose half a message
            os.set_blocking(pipe, True)

    def _read(self, loop: asyncio.AbstractEventLoop, slot: _Slot, decoder: Decoder) -> None:
        try:
            errors = decoder.receive()
        except DecoderLostError as lost:
            self._replace(loop, slot, decoder, lost)
            return
        done, slot.done = slot.done, None
        if done is not None:
            done(errors)
        self._on_idle()

    def _check(self, loop: asyncio.AbstractEventLoop) -> None:
        """Ends decoders without progress."""
        if self._decoders.closed:
            return
        for slot in self._slots:
            if slot.decoder is not None and not slot.idle:
                try:
                    slot.decoder.check(self._pause_s, self._deadline_s)
                except DecoderLostError as lost:
                    self._replace(loop, slot, slot.decoder, lost)
        loop.call_later(self._pause_s, self._check, loop)

    def _replace(self, loop: asyncio.AbstractEventLoop, slot: _Slot, decoder: Decoder, lost: DecoderLostError) -> None:
        loop.remove_reader(decoder.fileno())
        decoder.close()
        slot.decoder = None
        if self._decoders.closed:
            return
        # A process that ends before it is ready will do so again. A pause leaves time for requests.
        loop.call_later(0.0 if decoder.ready else _RESTART_PAUSE_S, self._start, loop, slot)
        done, slot.done = slot.done, None
        if done is not None:
            done(lost)
        self._on_idle()

    def _start(self, loop: asyncio.AbstractEventLoop, slot: _Slot) -> None:
        if self._decoders.closed:
            return
        try:
            slot.decoder = self._decoders.start(slot.number)
        except RobustFeatError:
            loop.call_later(_RESTART_PAUSE_S, self._start, loop, slot)
            return
        self._listen(loop, slot)
