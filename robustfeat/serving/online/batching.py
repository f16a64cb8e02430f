"""Embeds the images of many requests, with decoders and a model that takes batches.

A batch forms only while the model runs the previous one, so a lone image never waits. Keys take turns in every queue,
so a long queue of one key delays the others by one image only. For decoders, the key with the least used time is next,
and large images occupy at most half of the decoders.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from queue import SimpleQueue
from typing import Generic, Protocol, TypeVar

from robustfeat.errors import NotFiniteError
from robustfeat.hub.preprocessing import normalise
from robustfeat.serving.decoding.loop_pool import LoopDecoderPool
from robustfeat.serving.decoding.process import DecoderLostError
from robustfeat.serving.decoding.worker import LARGE
from robustfeat.serving.extractor import FeatureExtractor
from robustfeat.serving.online.answers import Answer, Vector
from robustfeat.serving.online.timeline import Timeline

__all__ = ["BatchMetrics", "Batcher", "FairQueue"]

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")

_Lane = tuple[str, bool]

_DECODED_AT_ONCE = 4
_SENT_AT_ONCE = 2**17
"""Most images, and bytes of them, that a decoder takes in one message."""

_LEAST_S = 0.001
"""Initial cost of an image for its key. The rest is charged after decoding."""

_JOIN_S = 5.0


class BatchMetrics(Protocol):
    """Receives the measurements of a `Batcher`, for example `metrics.ModelMetrics`."""

    def add_queue(self, length: Callable[[], float]) -> None:
        """Registers a function that returns the number of waiting images."""

    def decoded(self, waited_s: float, seconds: float) -> None:
        """Counts a decoder's result: the wait of its first image, and the decoder's time."""

    def ran(self, seconds: float, count: int) -> None:
        """Counts a batch of `count` images and the model's time."""


class FairQueue(Generic[K, T]):
    """A queue per key. The key that has used least since it arrived is next.

    Args:
        unit: initial cost of an item for its key.
    """

    def __init__(self, unit: float = 1.0) -> None:
        self._queues: dict[K, deque[T]] = {}
        self._used: dict[K, float] = {}
        self._unit, self._least = unit, 0.0
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def put(self, key: K, item: T, *, first: bool = False) -> None:
        """Adds an item to the end of the queue of `key`, or returns it to the start."""
        if key not in self._queues:
            # An absent key must not accumulate turns.
            self._queues[key], self._used[key] = deque(), max(self._least, self._used.get(key, 0.0))
        queue = self._queues[key]
        (queue.appendleft if first else queue.append)(item)
        self._size += 1

    def next_key(self, barred: Callable[[K], bool] = lambda key: False) -> K | None:
        """The next key that is not barred, or None."""
        return min((key for key in self._queues if not barred(key)), key=self._used.__getitem__, default=None)

    def take(self, key: K | None = None) -> T:
        """Takes the next item, of `key` or of the next key. Raises IndexError if there is none."""
        key = self.next_key() if key is None else key
        if key is None:
            raise IndexError("the queue is empty")
        queue = self._queues[key]
        item = queue.popleft()
        self._size -= 1
        if not queue:
            del self._queues[key]
        self._least = max(self._least, self._used[key])
        self.charge(key, self._unit)
        return item

    def charge(self, key: K, cost: float) -> None:
        """Charges `key` for use."""
        self._used[key] += cost


_PENDING = Answer(problem="not decoded yet")


class _Request:
    """The images of one request and their results."""

    __slots__ = ("answers", "future", "key", "left", "timeline")

    def __init__(self, key: str, count: int, timeline: Timeline | None) -> None:
        self.key, self.left, self.timeline = key, count, timeline
        self.answers: list[Answer] = [_PENDING] * count
        self.future: asyncio.Future[list[Answer]] = asyncio.get_running_loop().create_future()


class _Item:
    __slots__ = ("crashes", "image", "index", "large", "place", "request", "since")

    def __init__(self, request: _Request, index: int, image: bytes | Vector, since: float) -> None:
        self.request, self.index, self.image, self.since = request, index, image, since
        self.place = -1
        self.crashes = 0
        self.large = False

    @property
    def lane(self) -> _Lane:
        """The queue for a decoder. A key's large images have a separate one."""
        return self.request.key, self.large

    def answer(self, answer: Answer) -> None:
        request = self.request
        request.answers[self.index] = answer
        request.left -= 1
        if not request.left and not request.future.done():  # the client may have disconnected
            request.future.set_result(request.answers)


class Batcher:
    """Decoders and a model for the requests of one event loop. Use it in a `with` block.

    The model runs in a thread, everything else on the loop.

    Args:
        extractor: the model.
        metrics: receives measurements.
        max_pixels: largest accepted image.
        decode_timeout_s: time limit to decode one image.
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
        self._contract, self._engine = extractor.config.preprocessing, extractor.engine
        self._metrics = metrics
        self._batch_size = batch_size
        # Squares wait here for the model. If none is free, the decoders wait.
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
        self._waiting: FairQueue[_Lane, _Item] = FairQueue(_LEAST_S)
        self._large = 0
        self._ready: FairQueue[str, _Item] = FairQueue()
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

    async def embed(
        self, images: Sequence[bytes | Vector], key: str = "", timeline: Timeline | None = None
    ) -> list[Answer]:
        """Embeds images.

        Args:
            images: bytes of image files, or network inputs, (3, S, S) float32.
            key: the key to charge.
            timeline: records when the images pass each stage.

        Returns:
            One result per image.
        """
        request = _Request(key, len(images), timeline)
        now = time.perf_counter()
        if timeline is not None:
            timeline.queued = now
        items = [_Item(request, index, image, now) for index, image in enumerate(images)]
        for item in items:
            if isinstance(item.image, bytes):
                self._waiting.put(item.lane, item)
            else:
                self._ready.put(key, item)
        self._feed()
        try:
            return await request.future
        finally:
            # The client has disconnected. Images that are not decoded yet are dropped in their turn.
            if request.future.cancel() or request.future.cancelled():
                for item in items:
                    if isinstance(item.image, bytes):
                        item.image = b""

    def _feed(self) -> None:
        """Gives work to an idle model, then to idle decoders, since dropped images free squares."""
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
        while self._waiting and self._places and self._decoders.idle and self._decode():
            pass

    def _decode(self) -> bool:
        """Gives waiting images to an idle decoder. Returns whether there were any."""
        share = len(self._waiting) // self._decoders.workers
        count = min(_DECODED_AT_ONCE, max(1, share), len(self._places))
        items: list[_Item] = []
        images: list[bytes] = []
        size = 0
        large = False
        while len(items) < count and size < _SENT_AT_ONCE and not large:
            lane = self._waiting.next_key(self._barred)
            if lane is None or (items and lane[1]):
                break
            item = self._waiting.take(lane)
            if item.request.future.cancelled():
                continue
            assert isinstance(item.image, bytes)
            item.place = self._places.popleft()
            items.append(item)
            images.append(item.image)
            size += len(item.image)
            large = item.large
        if items:
            self._large += large
            done = partial(self._decoded, items, time.perf_counter(), large)
            self._decoders.submit(images, [item.place for item in items], done, large=large)
        return bool(items)

    def _barred(self, lane: _Lane) -> bool:
        """Whether a queue waits because it already has its share of the decoders."""
        return lane[1] and self._large >= max(1, self._decoders.workers // 2)

    def _decoded(
        self, items: Sequence[_Item], began: float, large: bool, outcome: Sequence[str | None] | DecoderLostError
    ) -> None:
        """Takes the results of a decoder's images."""
        self._large -= large
        now = time.perf_counter()
        seconds = now - began
        if isinstance(outcome, DecoderLostError):
            self._waiting.charge(items[outcome.offset].lane, seconds)
            self._retry(items, outcome)
            return
        self._metrics.decoded(began - items[0].since, seconds)
        for item, error in zip(items, outcome, strict=False):
            self._waiting.charge(item.lane, seconds / len(outcome))
            if item.request.timeline is not None:
                item.request.timeline.note_decoded(began, now)
            if error is None:
                item.image = b""
                self._ready.put(item.request.key, item)
                continue
            self._free(item)
            if error == LARGE:
                item.large = True
                self._waiting.put(item.lane, item)
            else:
                item.answer(Answer(problem=error))
        for item in reversed(items[len(outcome) :]):
            self._free(item)
            self._waiting.put(item.lane, item, first=True)

    def _retry(self, items: Sequence[_Item], lost: DecoderLostError) -> None:
        """Queues the images of a lost decoder again, except the image at fault once it has failed for good."""
        for offset, item in enumerate(items):
            self._free(item)
            item.crashes += offset == lost.offset
            if offset == lost.offset and lost.gives_up(item.crashes):
                item.answer(Answer(problem=lost.reason))
            else:
                self._waiting.put(item.lane, item)

    def _free(self, item: _Item) -> None:
        if item.place >= 0:
            self._places.append(item.place)
            item.place = -1

    def _run_model(self) -> None:
        while (batch := self._batches.get()) is not None:
            began = time.perf_counter()
            answers = self._infer(batch)
            ended = time.perf_counter()
            self._metrics.ran(ended - began, len(batch))
            with contextlib.suppress(RuntimeError):  # the loop and its requests are closed
                assert self._loop is not None
                self._loop.call_soon_threadsafe(self._finish, batch, answers, began, ended)

    def _finish(self, batch: Sequence[_Item], answers: Sequence[Answer], began: float, ended: float) -> None:
        self._busy = False
        for item in batch:
            self._free(item)
        self._feed()
        for item, answer in zip(batch, answers, strict=True):
            if item.request.timeline is not None:
                item.request.timeline.note_run(began, ended)
            item.answer(answer)

    def _infer(self, batch: Sequence[_Item]) -> Sequence[Answer]:
        try:
            return [Answer(features=row) for row in self._engine.run(self._input(batch))]
        except Exception as exc:
            if len(batch) == 1:
                if isinstance(exc, NotFiniteError) and not isinstance(batch[0].image, bytes):
                    return [Answer(problem="its features are not finite")]  # the client prepared the tensor
                return [Answer(failure=exc)]
            # Run the images one by one, so only those at fault fail.
            return [answer for item in batch for answer in self._infer([item])]

    def _input(self, batch: Sequence[_Item]) -> Vector:
        """(n, 3, S, S) float32, in the order of the batch."""
        side = self._contract.image_size
        decoded = [at for at, item in enumerate(batch) if item.place >= 0]
        squares = self._decoders.squares[[batch[at].place for at in decoded]]
        values = self._engine.new_input((len(batch), 3, side, side))
        if len(decoded) == len(batch):
            return normalise(squares, self._contract, out=values)
        values[decoded] = normalise(squares, self._contract)
        for at, item in enumerate(batch):
            if item.place < 0:
                values[at] = item.image
        return values
