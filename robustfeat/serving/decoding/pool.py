"""Runs decoder processes for bulk embedding. A thread per process sends tasks and waits for results."""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from types import TracebackType
from typing import Any

from robustfeat.errors import EngineError, InputError
from robustfeat.hub.preprocessing import MAX_PIXELS, Preprocessing
from robustfeat.serving.decoding.process import Decoder, DecoderLostError, Decoders
from robustfeat.serving.decoding.worker import Decoded, Task

__all__ = ["DEADLINE_S", "DecoderPool"]

DEADLINE_S = 60.0
"""Time limit to read and decode an image. A slower image is a failed row."""


class DecoderPool:
    """Decodes rows in `workers` decoder processes. Use it in a `with` block.

    Args:
        contract, scaled, workers, places, max_pixels: see `Decoders`.
        deadline_s: see `DEADLINE_S`.

    Attributes:
        squares: see `Decoders`.
    """

    def __init__(
        self,
        contract: Preprocessing,
        *,
        scaled: bool,
        workers: int,
        places: int,
        max_pixels: int = MAX_PIXELS,
        deadline_s: float = DEADLINE_S,
    ) -> None:
        self._decoders = Decoders(contract, scaled=scaled, workers=workers, places=places, max_pixels=max_pixels)
        self.squares = self._decoders.squares
        self._deadline_s = deadline_s
        self._numbers = iter(range(workers))
        self._own = _ThreadDecoder()
        self._threads = ThreadPoolExecutor(workers, "decoder")

    def __enter__(self) -> DecoderPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._decoders.kill()
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._decoders.close()

    def submit(self, task: Task) -> Future[Decoded]:
        """Decodes a task and fills `squares` from `Task.place` on, with zeros for failed images.

        The future raises InputError if the run cannot continue, and EngineError if no decoder can be started.
        """
        return self._threads.submit(self._run, task)

    def _run(self, task: Task) -> Decoded:
        crashes: Counter[int] = Counter()
        while True:
            try:
                answer = self._decode(task)
            except DecoderLostError as lost:
                crashes[lost.offset] += 1
                if lost.gives_up(crashes[lost.offset]):
                    task = replace(task, lost={**task.lost, lost.offset: lost.reason})
                continue
            if answer.stopped is not None:
                raise InputError(answer.stopped)
            return answer

    def _decode(self, task: Task) -> Decoded:
        """The result from this thread's decoder, started if needed. Raises DecoderLostError if the decoder ends."""
        decoder = self._own.decoder or self._start()
        decoder.send(task)
        answer: Decoded = self._receive(decoder)
        return answer

    def _start(self) -> Decoder:
        if self._own.number is None:
            self._own.number = next(self._numbers)
        decoder = self._own.decoder = self._decoders.start(self._own.number)
        try:
            self._receive(decoder)
        except DecoderLostError as lost:
            killed = lost.reason.endswith("(signal 9)")
            fix = "see the system's log: it may be short of memory" if killed else "see the messages above"
            raise EngineError(f"a decoder process could not be started ({lost.reason})", fix=fix) from None
        return decoder

    def _receive(self, decoder: Decoder) -> Any:
        """The next message of this thread's decoder. Raises DecoderLostError if it ends or exceeds its deadline."""
        pause = min(1.0, self._deadline_s / 4)
        try:
            while not decoder.poll(pause):
                decoder.check(pause, self._deadline_s)
            return decoder.receive()
        except DecoderLostError:
            decoder.close()
            self._own.decoder = None
            if self._decoders.closed:
                raise InputError("the decoders were stopped") from None
            raise


class _ThreadDecoder(threading.local):
    """A thread's decoder, and the decoder's number."""

    number: int | None = None
    decoder: Decoder | None = None
