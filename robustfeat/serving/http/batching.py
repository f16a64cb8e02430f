"""From the images of many requests to vectors: decoders, and a model that takes what is ready.

A batch forms only while the model is busy with the one before: a lone image never waits for company. Keys take turns
wherever images wait, so that a long queue of one delays the others by one image, not by the queue.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from itertools import groupby
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from robustfeat.errors import EngineError
from robustfeat.hub.preprocessing import normalise
from robustfeat.serving.cpus import available_cpus
from robustfeat.serving.decoder import Images
from robustfeat.serving.decoders import DecoderPool
from robustfeat.serving.extractor import FeatureExtractor
from robustfeat.serving.http.limits import Limits
from robustfeat.serving.http.metrics import ModelMetrics

__all__ = ["Answer", "Batcher", "FairQueue"]

Vector = NDArray[np.float32]
Answer = Vector | str | Exception
T = TypeVar("T")

_DECODED_AT_ONCE = 4
"""Images that a decoder takes together where more wait: fewer messages, and no later answers while all are busy."""


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


class _Request:
    """The images of one request and what became of them."""

    __slots__ = ("answers", "future", "key", "left", "loop")

    def __init__(self, key: str, count: int) -> None:
        self.key, self.left = key, count
        self.answers: list[Answer] = [""] * count
        self.loop = asyncio.get_running_loop()
        self.future: asyncio.Future[list[Answer]] = self.loop.create_future()

    def resolve(self) -> None:
        if not self.future.done():  # its client may have left
            self.future.set_result(self.answers)


class _Item:
    __slots__ = ("image", "index", "place", "request", "since")

    def __init__(self, request: _Request, index: int, image: bytes | Vector, since: float) -> None:
        self.request, self.index, self.image, self.since = request, index, image, since
        self.place = -1


class Batcher:
    """Decoders and a model, at work for many requests; use it in a `with` block.

    Args:
        extractor: the model.
        limits: of pixels and of the time to decode an image.
        watch: what is counted.
        decoders: processes; by default what the cgroup grants.
    """

    def __init__(
        self, extractor: FeatureExtractor, limits: Limits, watch: ModelMetrics, *, decoders: int | None = None
    ) -> None:
        self.extractor = extractor
        self._contract, self._run_engine = extractor.config.preprocessing, extractor.engine.run
        self._max_pixels, self._watch = limits.pixels, watch
        self._batch_size = extractor.batch_size
        self._idle = decoders or available_cpus()
        # Squares wait there for the model; decoders that are ahead of it wait for places.
        places = 2 * self._batch_size + self._idle * _DECODED_AT_ONCE
        self._places = deque(range(places))
        self._pool = DecoderPool(
            self._contract,
            scaled=extractor.decoding == "scaled",
            workers=self._idle,
            places=places,
            deadline_s=limits.decode_timeout_s,
        )
        self._waiting: FairQueue[_Item] = FairQueue()
        self._ready: FairQueue[_Item] = FairQueue()
        watch.watch_queue(lambda: len(self._waiting) + len(self._ready))
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run_model, name="model", daemon=True)

    def __enter__(self) -> Batcher:
        for _ in range(self._idle):
            self._pool.decode(Images((), (), self._max_pixels, {}))  # starts its process
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._pool.__exit__(None, None, None)
        self._thread.join()

    async def embed(self, images: Sequence[bytes | Vector], key: str = "") -> list[Answer]:
        """Features of images.

        Args:
            images: each the bytes of an image file, or the network's input, (3, S, S) float32.
            key: whose turn it is.

        Returns:
            For each its (D,) float32, the reason why it cannot be read, or the exception of a failure of ours.
        """
        request = _Request(key, len(images))
        now = time.perf_counter()
        items = [_Item(request, index, image, now) for index, image in enumerate(images)]
        with self._changed:
            for item in items:
                (self._waiting if isinstance(item.image, bytes) else self._ready).put(key, item)
            self._feed_decoders()
            if self._ready:
                self._changed.notify()
        try:
            return await request.future
        finally:
            # Where nobody waits any more, what has not begun is dropped as its turn comes.
            request.future.cancel()

    def _feed_decoders(self) -> None:
        """Gives waiting images to idle decoders; call it with the lock."""
        while self._idle and self._waiting and self._places and not self._closed:
            count = min(_DECODED_AT_ONCE, max(1, len(self._waiting) // self._idle), len(self._places))
            items: list[_Item] = []
            while len(items) < count and self._waiting:
                item = self._waiting.take()
                if not item.request.future.cancelled():
                    item.place = self._places.popleft()
                    items.append(item)
            if items:
                self._idle -= 1
                data = [item.image for item in items if isinstance(item.image, bytes)]
                places = [item.place for item in items]
                decoded = self._pool.decode(Images(data, places, self._max_pixels, {}))
                decoded.add_done_callback(partial(self._decoded, items, time.perf_counter()))

    def _decoded(self, items: Sequence[_Item], began: float, decoded: Future[tuple[str | None, ...]]) -> None:
        failure = decoded.exception() if not decoded.cancelled() else None
        errors = [None] * len(items) if failure or decoded.cancelled() else decoded.result()
        self._watch.decoded(began - items[0].since, time.perf_counter() - began)
        finished: list[_Request] = []
        with self._changed:
            self._idle += 1
            for item, error in zip(items, errors, strict=True):
                item.image = b""
                if error is None and failure is None:
                    self._ready.put(item.request.key, item)
                    continue
                self._places.append(item.place)
                _answer(item, error or _failure(failure), finished)
            self._feed_decoders()
            if self._ready:
                self._changed.notify()
        _resolve(finished)

    def _run_model(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._ready or self._closed)
                if self._closed:
                    return
                batch: list[_Item] = []
                while len(batch) < self._batch_size and self._ready:
                    item = self._ready.take()
                    if item.request.future.cancelled():
                        self._free(item)
                    else:
                        batch.append(item)
                self._feed_decoders()
            if not batch:
                continue
            began = time.perf_counter()
            answers = self._infer(batch)
            self._watch.ran(time.perf_counter() - began, len(batch))
            finished: list[_Request] = []
            with self._changed:
                for item, answer in zip(batch, answers, strict=True):
                    self._free(item)
                    _answer(item, answer, finished)
                self._feed_decoders()
            _resolve(finished)

    def _free(self, item: _Item) -> None:
        if item.place >= 0:
            self._places.append(item.place)

    def _infer(self, batch: Sequence[_Item]) -> Sequence[Answer]:
        try:
            return list(self._run_engine(self._input(batch)))
        except Exception as exc:
            if len(batch) == 1:
                return [_failure(exc)]
            # Whatever it is, it costs the images that have it, not their neighbours.
            return [answer for item in batch for answer in self._infer([item])]

    def _input(self, batch: Sequence[_Item]) -> Vector:
        """(n, 3, S, S) float32, in the order of the batch."""
        side = self._contract.image_size
        squares = [at for at, item in enumerate(batch) if item.place >= 0]
        places = [batch[at].place for at in squares]
        if len(squares) == len(batch):
            return normalise(self._pool.squares[places], self._contract)
        values = np.empty((len(batch), 3, side, side), np.float32)
        values[squares] = normalise(self._pool.squares[places], self._contract)
        for at, item in enumerate(batch):
            if item.place < 0:
                values[at] = item.image
        return values


def _answer(item: _Item, answer: Answer, finished: list[_Request]) -> None:
    request = item.request
    request.answers[item.index] = answer
    request.left -= 1
    if not request.left:
        finished.append(request)


def _resolve(finished: Sequence[_Request]) -> None:
    for loop, requests in groupby(finished, lambda request: request.loop):
        ready = list(requests)
        with suppress(RuntimeError):  # the loop is closed, and with it all who waited
            loop.call_soon_threadsafe(lambda ready=ready: [request.resolve() for request in ready])


def _failure(exc: BaseException | None) -> Exception:
    return exc if isinstance(exc, Exception) else EngineError("the server is being stopped")
