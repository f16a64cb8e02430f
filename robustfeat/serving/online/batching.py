"""From the images of many requests to vectors: decoders, and a model that takes what is ready.

A batch forms only while the model is busy with the one before: a lone image never waits for company. Keys take turns
wherever images wait, so that a long queue of one delays the others by one image, not by the queue.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Generic, Protocol, TypeVar

import numpy as np

from robustfeat.errors import RobustFeatError
from robustfeat.hub.preprocessing import normalise
from robustfeat.serving.decoding.pool import START_DEADLINE_S, TRIES, Decoder, Decoders, crashed, too_slow
from robustfeat.serving.decoding.worker import MAILBOX_BYTES, Images
from robustfeat.serving.extractor import FeatureExtractor
from robustfeat.serving.online.answers import Answer, Vector

__all__ = ["Batcher", "FairQueue", "Watch"]

T = TypeVar("T")

_DECODED_AT_ONCE = 4
_SENT_AT_ONCE = 2**17
"""Images, and about how many bytes of them, that a decoder takes together where more wait: fewer messages."""


_LOOK_S = 1.0
_PAUSE_S = 1.0
_JOIN_S = 5.0


class Watch(Protocol):
    """Who counts what a `Batcher` does; `metrics.ModelMetrics` is one."""

    def watch_queue(self, read: Callable[[], float]) -> None:
        """`read` tells how many images wait."""

    def decoded(self, waited: float, seconds: float) -> None:
        """A decoder took `seconds` for images of which the first had waited."""

    def ran(self, seconds: float, count: int) -> None:
        """The model took `seconds` for a batch of `count`."""


class FairQueue(Generic[T]):
    """First in, first out for each key; the keys take turns."""

    def __init__(self) -> None:
        self._queues: OrderedDict[str, deque[T]] = OrderedDict()
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def put(self, key: str, item: T) -> None:
        """Appends to the queue of `key`."""
        self._queues.setdefault(key, deque()).append(item)
        self._size += 1

    def take(self) -> T:
        """The next item; IndexError without one."""
        if not self._size:
            raise IndexError("the queue is empty")
        key, queue = next(iter(self._queues.items()))
        item = queue.popleft()
        self._size -= 1
        if queue:
            self._queues.move_to_end(key)
        else:
            del self._queues[key]
        return item


_PENDING = Answer(problem="not decoded yet")


class _Request:
    """The images of one request and what became of them."""

    __slots__ = ("answers", "future", "key", "left")

    def __init__(self, key: str, count: int) -> None:
        self.key, self.left = key, count
        self.answers: list[Answer] = [_PENDING] * count
        self.future: asyncio.Future[list[Answer]] = asyncio.get_running_loop().create_future()


class _Item:
    __slots__ = ("crashes", "image", "index", "place", "request", "since")

    def __init__(self, request: _Request, index: int, image: bytes | Vector, since: float) -> None:
        self.request, self.index, self.image, self.since = request, index, image, since
        self.place = -1
        self.crashes = 0

    def answer(self, answer: Answer) -> None:
        request = self.request
        request.answers[self.index] = answer
        request.left -= 1
        if not request.left and not request.future.done():  # its client may have left
            request.future.set_result(request.answers)


class _Seat:
    """A decoder's place: the process that sits there now, and what it is at."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.ready = False
        self.items: list[_Item] = []
        self.began = 0.0
        self.seen, self.waited = -1, 0.0
        self.sending: asyncio.Future[None] | None = None


class Batcher:
    """Decoders and a model, at work for many requests of one event loop; use it in a `with` block.

    All that happens here happens on the loop, but for the model, which has a thread.

    Args:
        extractor: the model.
        max_pixels: larger images are refused.
        decode_timeout_s: for an image.
        watch: what is counted.
        decoders: processes.
        batch_size: images that the model takes at once, at most.
    """

    def __init__(
        self,
        extractor: FeatureExtractor,
        watch: Watch,
        *,
        max_pixels: int,
        decode_timeout_s: float,
        decoders: int,
        batch_size: int,
    ) -> None:
        self._contract, self._run_engine = extractor.config.preprocessing, extractor.engine.run
        self._watch = watch
        self._max_pixels, self._decode_timeout_s = max_pixels, decode_timeout_s
        self._batch_size = batch_size
        # Squares wait there for the model; decoders that are ahead of it wait for places.
        places = 2 * batch_size + decoders * _DECODED_AT_ONCE
        self._places = deque(range(places))
        scaled = extractor.decoding == "scaled"
        self._decoders = Decoders(self._contract, scaled=scaled, workers=decoders, places=places)
        self._seats = [_Seat(self._decoders.start(number)) for number in range(decoders)]
        self._waiting: FairQueue[_Item] = FairQueue()
        self._ready: FairQueue[_Item] = FairQueue()
        watch.watch_queue(lambda: len(self._waiting) + len(self._ready))
        self._batches: SimpleQueue[list[_Item] | None] = SimpleQueue()
        self._busy = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run_model, name="model", daemon=True)

    def __enter__(self) -> Batcher:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._batches.put(None)
        self._decoders.close()
        self._thread.join(_JOIN_S)

    def attach(self) -> None:
        """Begins to listen to the decoders, on the running loop."""
        self._loop = asyncio.get_running_loop()
        for seat in self._seats:
            self._listen(seat)
        self._loop.call_later(_LOOK_S, self._look)

    async def embed(self, images: Sequence[bytes | Vector], key: str = "") -> list[Answer]:
        """Features of images.

        Args:
            images: each the bytes of an image file, or the network's input, (3, S, S) float32.
            key: whose turn it is.

        Returns:
            One for each image.
        """
        request = _Request(key, len(images))
        now = time.perf_counter()
        items = [_Item(request, index, image, now) for index, image in enumerate(images)]
        for item in items:
            (self._waiting if isinstance(item.image, bytes) else self._ready).put(key, item)
        self._feed()
        try:
            return await request.future
        finally:
            # Where nobody waits any more, what has not begun is dropped as its turn comes.
            if request.future.cancel() or request.future.cancelled():
                for item in items:
                    if isinstance(item.image, bytes):
                        item.image = b""

    def _feed(self) -> None:
        """Gives work to whoever is idle: first to the model, since dropped images make room for the decoders."""
        if self._ready and not self._busy:
            batch: list[_Item] = []
            while len(batch) < self._batch_size and self._ready:
                item = self._ready.take()
                if item.request.future.cancelled():
                    self._free(item)
                else:
                    batch.append(item)
            if batch:
                self._busy = True
                self._batches.put(batch)
        for seat in self._seats:
            if not self._waiting or not self._places:
                break
            if seat.ready and not seat.items:
                self._decode(seat)

    def _decode(self, seat: _Seat) -> None:
        """Hands waiting images to an idle decoder."""
        count = min(_DECODED_AT_ONCE, max(1, len(self._waiting) // len(self._seats)), len(self._places))
        size = 0
        while len(seat.items) < count and self._waiting and size < _SENT_AT_ONCE:
            item = self._waiting.take()
            if item.request.future.cancelled():
                continue
            item.place = self._places.popleft()
            seat.items.append(item)
            size += len(item.image)
        if not seat.items:
            return
        seat.began, seat.seen, seat.waited = time.perf_counter(), -1, 0.0
        self._decoders.progress[seat.decoder.number] = 0
        data = [item.image for item in seat.items if isinstance(item.image, bytes)]
        fits = size <= MAILBOX_BYTES
        places = [item.place for item in seat.items]
        task = Images(None if fits else data, [len(image) for image in data], places, self._max_pixels)
        if fits:
            self._decoders.mailboxes[seat.decoder.number].data[:size] = b"".join(data)
            _send(seat.decoder.connection, task)
        elif self._loop is not None:
            # By a thread, since the pipe takes it only as the decoder reads.
            seat.sending = self._loop.run_in_executor(None, _send, seat.decoder.connection, task)

    def _hear(self, seat: _Seat) -> None:
        """A decoder has said something, or its end of the pipe is closed."""
        try:
            said = seat.decoder.connection.recv()
        except (EOFError, OSError):
            self._replace(seat)
            return
        if not seat.ready:
            seat.ready = True
        else:
            items, seat.items = seat.items, []
            self._watch.decoded(seat.began - items[0].since, time.perf_counter() - seat.began)
            for item, error in zip(items, said, strict=True):
                if error is None:
                    item.image = b""
                    self._ready.put(item.request.key, item)
                else:
                    self._free(item)
                    item.answer(Answer(problem=error))
        self._feed()

    def _look(self) -> None:
        """Ends decoders that stand still. Time is counted in looks: while everything is suspended, nobody is late."""
        if self._loop is None or self._decoders.closed:
            return
        pause = min(_LOOK_S, self._decode_timeout_s / 4)
        for seat in self._seats:
            seen = int(self._decoders.progress[seat.decoder.number, 1])
            if seat.seen != seen or (seat.ready and not seat.items):
                seat.seen, seat.waited = seen, 0.0
                continue
            seat.waited += pause
            if seat.waited >= (self._decode_timeout_s if seat.ready else START_DEADLINE_S):
                self._replace(seat, too_slow(self._decode_timeout_s))
        self._loop.call_later(pause, self._look)

    def _replace(self, seat: _Seat, reason: str | None = None) -> None:
        """Puts a new process on a seat; the image that its old one was at may fail, all others are decoded again."""
        if self._loop is None or self._decoders.closed:
            return
        at = int(self._decoders.progress[seat.decoder.number, 0])
        self._loop.remove_reader(seat.decoder.connection.fileno())
        how, pipe = seat.decoder.kill(), seat.decoder.connection
        # Not while a thread writes to it: its descriptor may soon be another connection's.
        if seat.sending is None or seat.sending.done():
            pipe.close()
        else:
            seat.sending.add_done_callback(lambda _: pipe.close())
        items, seat.items = seat.items, []
        was_ready, seat.ready = seat.ready, False
        for offset, item in enumerate(items):
            self._free(item)
            item.crashes += offset == at
            # A crash may be an accident (the kernel was short of memory): the image gets a second chance.
            if offset == at and (reason is not None or item.crashes == TRIES):
                item.answer(Answer(problem=reason or crashed(how)))
            else:
                self._waiting.put(item.request.key, item)
        # One that dies before it is ready will do so again: not at once, or nothing else would be done here.
        self._loop.call_later(0.0 if was_ready else _PAUSE_S, self._reseat, seat)
        self._feed()

    def _reseat(self, seat: _Seat) -> None:
        if self._loop is None or self._decoders.closed:
            return
        seat.waited = 0.0
        try:
            seat.decoder = self._decoders.start(seat.decoder.number)
        except RobustFeatError:
            self._loop.call_later(_PAUSE_S, self._reseat, seat)
            return
        self._listen(seat)

    def _listen(self, seat: _Seat) -> None:
        assert self._loop is not None
        pipe = seat.decoder.connection.fileno()
        self._loop.add_reader(pipe, self._hear, seat)
        os.set_blocking(pipe, True)  # uvloop makes it otherwise, and half a message would be lost

    def _free(self, item: _Item) -> None:
        if item.place >= 0:
            self._places.append(item.place)
            item.place = -1

    def _run_model(self) -> None:
        while (batch := self._batches.get()) is not None:
            began = time.perf_counter()
            answers = self._infer(batch)
            self._watch.ran(time.perf_counter() - began, len(batch))
            with contextlib.suppress(RuntimeError):  # the loop is closed, and with it all who waited
                assert self._loop is not None
                self._loop.call_soon_threadsafe(self._take, batch, answers)

    def _take(self, batch: Sequence[_Item], answers: Sequence[Answer]) -> None:
        self._busy = False
        for item in batch:
            self._free(item)
        self._feed()
        for item, answer in zip(batch, answers, strict=True):
            item.answer(answer)

    def _infer(self, batch: Sequence[_Item]) -> Sequence[Answer]:
        try:
            return [Answer(features=row) for row in self._run_engine(self._input(batch))]
        except Exception as exc:
            if len(batch) == 1:
                return [Answer(failure=exc)]
            # Whatever it is, it costs the images that have it, not their neighbours.
            return [answer for item in batch for answer in self._infer([item])]

    def _input(self, batch: Sequence[_Item]) -> Vector:
        """(n, 3, S, S) float32, in the order of the batch."""
        side = self._contract.image_size
        decoded = [at for at, item in enumerate(batch) if item.place >= 0]
        squares = self._decoders.squares[[batch[at].place for at in decoded]]
        if len(decoded) == len(batch):
            return normalise(squares, self._contract)
        values = np.empty((len(batch), 3, side, side), np.float32)
        values[decoded] = normalise(squares, self._contract)
        for at, item in enumerate(batch):
            if item.place < 0:
                values[at] = item.image
        return values


def _send(connection: Connection, task: Images) -> None:
    with contextlib.suppress(OSError):  # it has died; its end of the pipe tells
        connection.send(task)
