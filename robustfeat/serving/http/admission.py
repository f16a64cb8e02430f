"""Admits requests within each key's rate and share of the queue, and within the queue's limit.

All workers of a server share the counts in memory, so a share applies to the whole server, whichever worker a
connection reaches.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from robustfeat.files import lock_inherited
from robustfeat.serving.http.keys import Key
from robustfeat.serving.http.limits import Limits
from robustfeat.serving.online.errors import ApiError

__all__ = ["Admission", "forget_worker"]

_SLOTS = 1024
_BURST_S = 0.25


def forget_worker(memory: int, worker: int, places: int) -> None:
    """Takes the images of a dead worker out of the shares of all keys.

    Nothing is locked. Only the worker itself writes these counts, and a stopped process may hold the lock.

    Args:
        memory, worker, places: as in `Admission`.
    """
    if size := os.fstat(memory).st_size:
        counts = memoryview(mmap.mmap(memory, size)).cast("q")
        for place in range(0, len(counts), 3 + places):
            counts[place + 3 + worker] = 0


class Admission:
    """The admission control of one worker.

    Args:
        limits: limits of the images in a request and in the queue.
        memory: the descriptor of an empty file that all workers inherit.
        worker: number of the worker, from 0.
        workers: number of workers. A key's share applies to the queues of all.
        places: number of possible worker numbers, more than `workers` in a server that reloads.
    """

    def __init__(self, limits: Limits, memory: int, worker: int, workers: int, places: int | None = None) -> None:
        self._limits, self._memory, self._worker, self._workers = limits, memory, worker, workers
        # A slot has numbers of 8 bytes: the name's hash, tokens, the time of their count, and each worker's images.
        self._words = 3 + (places or workers)
        size = 8 * _SLOTS * self._words
        os.truncate(memory, size)
        # Two views of the same memory, as floats and as integers.
        shared = memoryview(mmap.mmap(memory, size))
        self._floats, self._counts = shared.cast("d"), shared.cast("q")
        self._places: dict[str, int] = {}
        self._inside: Counter[str] = Counter()
        self._total = 0
        self._names = 1
        forget_worker(memory, worker, places or workers)  # a dead process with this number

    def share_among(self, names: int) -> None:
        """Sets the number of keys. Each key without its own share gets an equal part of the queue."""
        self._names = max(1, names)

    def check(self, key: Key) -> None:
        """Refuses a request that would be refused later, before its body is read.

        Raises:
            ApiError: 429 or 503, see `enter`.
        """
        with self._locked() if key.name else nullcontext():
            self._refuse(key, 1)

    @contextmanager
    def enter(self, key: Key, items: int) -> Iterator[None]:
        """Admits images for the duration of the block.

        Raises:
            ApiError: 413 for too many images, 429 beyond the key's share, 503 when the queue is full.
        """
        if items > self._limits.max_items:
            raise ApiError(
                413,
                "too_many_images",
                f"the request has {items:,} images; send at most {self._limits.max_items:,} at once",
            )
        # Without keys, this process has all the counts.
        locked = self._locked if key.name else nullcontext
        with locked():
            place = self._refuse(key, items)
            if key.rate is not None:
                self._floats[place + 1] -= items
            self._counts[place + 3 + self._worker] += items
            self._inside[key.name] += items
            self._total += items
        try:
            yield
        finally:
            with locked():
                self._counts[place + 3 + self._worker] -= items
                self._inside[key.name] -= items
                self._total -= items

    def _refuse(self, key: Key, items: int) -> int:
        """Raises the errors of `enter`, or returns the position of the key's slot."""
        place = self._place(key)
        if key.name:
            self._refuse_key(key, items, place)
            if not self._inside[key.name]:
                return place  # a key without images in the queue is not blocked by keys that fill it
        if self._total + items > self._limits.max_queue:
            raise ApiError(503, "queue_full", "all places in the queue are taken; try again soon", retry_after_s=1)
        return place

    def _refuse_key(self, key: Key, items: int, place: int) -> None:
        if key.rate is not None:
            # A token is one image. `rate` tokens arrive per second, and a short burst is kept. A larger request may
            # leave a debt, which gives the same rate without saving tokens for a burst.
            now, before = time.monotonic(), self._floats[place + 2]
            most = max(1.0, key.rate * _BURST_S)
            tokens = min(most, self._floats[place + 1] + (now - before) * key.rate) if before else most
            self._floats[place + 1], self._floats[place + 2] = tokens, now
            needed = min(items, most)
            if tokens < needed:
                raise ApiError(
                    429,
                    "rate_exceeded",
                    f"the key {key.name} may send {key.rate:g} images a second; wait and try again",
                    retry_after_s=(needed - tokens) / key.rate,
                )
        inside = sum(self._counts[place + 3 : place + self._words])
        share = key.concurrency or max(self._limits.max_items, self._limits.max_queue * self._workers // self._names)
        # A request larger than the share is only admitted by itself.
        if inside and inside + items > share:
            raise ApiError(
                429,
                "share_exceeded",
                f"the key {key.name} has {inside} images at hand, and its share is {share}; wait for their answers",
                retry_after_s=1,
            )

    def _place(self, key: Key) -> int:
        if key.name not in self._places:
            # The hash has 63 bits and is never zero, which marks a free slot.
            name = int.from_bytes(hashlib.sha256(key.name.encode()).digest()[:8], "little") >> 1 | 1
            slots = [(name + step) % _SLOTS * self._words for step in range(_SLOTS)]
            # If there are more keys than slots, they share one.
            place = next((slot for slot in slots if self._counts[slot] in {0, name}), slots[0])
            self._counts[place] = name
            self._places[key.name] = place
        return self._places[key.name]

    def _locked(self) -> AbstractContextManager[None]:
        return lock_inherited(self._memory)
