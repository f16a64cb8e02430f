"""The images of many requests become features: decoders, and a model that takes batches of decoded images.

A batch forms only while the model is busy with the one before: a lone image never waits. Keys take turns wherever
images wait, so that a long queue of one key delays the others by one image and not by the whole queue.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from functools import partial
from queue import SimpleQueue
from typing import Generic, Protocol, TypeVar

import numpy as np

from robustfeat.hub.preprocessing import normalise
from robustfeat.serving.decoding.loop_pool import LoopDecoderPool
from robustfeat.serving.decoding.process import DecoderLostError
from robustfeat.serving.extractor import FeatureExtractor
from robustfeat.serving.online.answers import Answer, Vector

__all__ = ["BatchMetrics", "Batcher", "FairQueue"]

T = TypeVar("T")

_DECODED_AT_ONCE = 4
_SENT_AT_ONCE = 2**17
"""Images, and about how many bytes of them, that a decoder takes together where more wait: fewer messages."""


_JOIN_S = 5.0


class BatchMetrics(Protocol):
    """Takes the numbers of a `Batcher`; `metrics.ModelMetrics` is one."""

    def add_queue(self, length: Callable[[], float]) -> None:
        """Registers a function that gives the number of waiting images."""

    def decoded(self, waited_s: float, seconds: float) -> None:
        """Counts a decoder's answer: how long its first image had waited, and the decoder's time."""

    def ran(self, seconds: float, count: int) -> None:
        """Counts a batch of `count` images and the model's time."""


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
    """The images of one request and their answers."""

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


class Batcher:
    """Decoders and a model for the requests of one event loop; use it in a `with` block.

    The model runs in a thread; everything else runs on the loop.

    Args:
        extractor: the model.
        metrics: takes the numbers.
        max_pixels: larger images are refused.
        decode_timeout_s: for one image.
        decoders: number of decoder processes.
        batch_size: largest batch, in images.
    """

    def __init__(
        self,
        extractor: FeatureExtractor,
        metrics: BatchMetrics,
        *,
        max_pixels: int,
        decode_timeout_s: float,
        decoders: int,
        batch_size: int,
    ) -> None:
        self._contract, self._run_engine = extractor.config.preprocessing, extractor.engine.run
        self._metrics = metrics
        self._batch_size = batch_size
        # Squares wait there for the model; when none is free, the decoders wait.
        places = 2 * batch_size + decoders * _DECODED_AT_ONCE
        self._places = deque(range(places))
        self._decoders = LoopDecoderPool(
            self._contract,
            scaled=extractor.decoding == "scaled",
            workers=decoders,
            places=places,
            max_pixels=max_pixels,
            deadline_s=decode_timeout_s,
            on_idle=self._feed,
        )
        self._waiting: FairQueue[_Item] = FairQueue()
        self._ready: FairQueue[_Item] = FairQueue()
        metrics.add_queue(lambda: len(self._waiting) + len(self._ready))
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
        """Connects the decoders to the running loop."""
        self._loop = asyncio.get_running_loop()
        self._decoders.attach()

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
            # The client has left: images that are not decoded yet are dropped when their turn comes.
            if request.future.cancel() or request.future.cancelled():
                for item in items:
                    if isinstance(item.image, bytes):
                        item.image = b""

    def _feed(self) -> None:
        """Gives work to an idle model, and then to idle decoders: images dropped on the way free places."""
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
        while self._waiting and self._places and self._decoders.idle:
            self._decode()

    def _decode(self) -> None:
        """Gives waiting images to an idle decoder."""
        share = len(self._waiting) // self._decoders.workers
        count = min(_DECODED_AT_ONCE, max(1, share), len(self._places))
        items: list[_Item] = []
        images: list[bytes] = []
        size = 0
        while len(items) < count and self._waiting and size < _SENT_AT_ONCE:
            item = self._waiting.take()
            if item.request.future.cancelled():
                continue
            assert isinstance(item.image, bytes)
            item.place = self._places.popleft()
            items.append(item)
            images.append(item.image)
            size += len(item.image)
        if items:
            done = partial(self._decoded, items, time.perf_counter())
            self._decoders.submit(images, [item.place for item in items], done)

    def _decoded(self, items: Sequence[_Item], began: float, outcome: Sequence[str | None] | DecoderLostError) -> None:
        """Takes the outcome of images that a decoder had."""
        if isinstance(outcome, DecoderLostError):
            self._retry(items, outcome)
            return
        self._metrics.decoded(began - items[0].since, time.perf_counter() - began)
        for item, error in zip(items, outcome, strict=True):
            if error is None:
                item.image = b""
                self._ready.put(item.request.key, item)
            else:
                self._free(item)
                item.answer(Answer(problem=error))

    def _retry(self, items: Sequence[_Item], lost: DecoderLostError) -> None:
        """Decodes images again whose decoder was lost, but for the image at fault when it is given up."""
        for offset, item in enumerate(items):
            self._free(item)
            item.crashes += offset == lost.offset
            if offset == lost.offset and lost.gives_up(item.crashes):
                item.answer(Answer(problem=lost.reason))
            else:
                self._waiting.put(item.request.key, item)

    def _free(self, item: _Item) -> None:
        if item.place >= 0:
            self._places.append(item.place)
            item.place = -1

    def _run_model(self) -> None:
        while (batch := self._batches.get()) is not None:
            began = time.perf_counter()
            answers = self._infer(batch)
            self._metrics.ran(time.perf_counter() - began, len(batch))
            with contextlib.suppress(RuntimeError):  # the loop is closed, and all its requests with it
                assert self._loop is not None
                self._loop.call_soon_threadsafe(self._finish, batch, answers)

    def _finish(self, batch: Sequence[_Item], answers: Sequence[Answer]) -> None:
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
            # Only the images at fault fail, not the whole batch.
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
