"""Who may come in now: each key's rate and part of the queue, and the queue's end.

The counts lie in memory that all workers of a server share, so that a share means the server's, whichever worker a
connection reaches.
"""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from robustfeat.serving.http.errors import ApiError
from robustfeat.serving.http.keys import Key
from robustfeat.serving.http.limits import Limits

__all__ = ["Admission"]

_SLOTS = 1024
_BURST_S = 1.0


def _slot(workers: int) -> np.dtype[np.void]:
    return np.dtype([("key", "<u8"), ("tokens", "<f8"), ("stamp", "<f8"), ("inside", "<i8", (workers,))])


class Admission:
    """The door of one worker.

    Args:
        limits: of the images in a request and in the queue.
        memory: the descriptor of an empty file that all workers inherit.
        worker: its number, from 0.
        workers: how many there are.
    """

    def __init__(self, limits: Limits, memory: int, worker: int, workers: int) -> None:
        self._limits, self._memory, self._worker, self._workers = limits, memory, worker, workers
        kind = _slot(workers)
        os.truncate(memory, _SLOTS * kind.itemsize)
        self._slots = np.frombuffer(mmap.mmap(memory, _SLOTS * kind.itemsize), kind)
        self._places: dict[str, int] = {}
        self._inside: Counter[str] = Counter()
        self._total = 0
        self._names = 1
        with self._locked():
            self._slots["inside"][:, worker] = 0  # what a process with this number left when it died

    def share_among(self, names: int) -> None:
        """Tells how many keys there are: each without a share of its own has an equal part of the queue."""
        self._names = max(1, names)

    def check(self, key: Key) -> None:
        """Refuses a request that has no chance, before its body is read.

        Raises:
            ApiError: 429 or 503, as `enter` does.
        """
        with self._locked():
            self._refuse(key, 1)

    @contextmanager
    def enter(self, key: Key, items: int) -> Iterator[None]:
        """Admits so many images for the time of the block.

        Raises:
            ApiError: 413 for too many images, 429 beyond the key's share, 503 when the queue is full.
        """
        if items > self._limits.items:
            raise ApiError(
                413, "too_many_images", f"the request has {items:,} images; send at most {self._limits.items:,} at once"
            )
        with self._locked():
            place = self._refuse(key, items)
            if key.rate is not None:
                self._slots["tokens"][place] -= items
            self._slots["inside"][place, self._worker] += items
            self._inside[key.name] += items
            self._total += items
        try:
            yield
        finally:
            with self._locked():
                self._slots["inside"][place, self._worker] -= items
                self._inside[key.name] -= items
                self._total -= items

    def _refuse(self, key: Key, items: int) -> int:
        """Raises what `enter` raises; returns the key's slot."""
        place = self._place(key)
        slot = self._slots[place]
        if key.rate is not None:
            # Tokens, one an image: `rate` come each second, and as many as one request may need are kept.
            now = time.monotonic()
            most = max(key.rate * _BURST_S, self._limits.items)
            tokens = most if not slot["stamp"] else min(most, slot["tokens"] + (now - slot["stamp"]) * key.rate)
            slot["tokens"], slot["stamp"] = tokens, now
            if tokens < items:
                raise ApiError(
                    429,
                    "rate_exceeded",
                    f"the key {key.name} may send {key.rate:g} images a second; wait and try again",
                    retry_after_s=(items - tokens) / key.rate,
                )
        capacity = self._limits.queue * self._workers
        share = key.concurrency or max(self._limits.items, capacity // self._names)
        inside = int(slot["inside"].sum())
        # A request larger than the share comes in alone, or it never would.
        if inside and inside + items > share:
            if key.name and share < capacity:
                raise ApiError(
                    429,
                    "share_exceeded",
                    f"the key {key.name} has {inside} images at hand, and its share is {share}; wait for their answers",
                    retry_after_s=1,
                )
        elif not self._inside[key.name] and key.name:
            return place  # whoever has nothing in the queue is not kept out by those who fill it
        if self._total + items > self._limits.queue:
            raise ApiError(503, "queue_full", "all places in the queue are taken; try again soon", retry_after_s=1)
        return place

    def _place(self, key: Key) -> int:
        if key.name not in self._places:
            name = int.from_bytes(hashlib.sha256(key.name.encode()).digest()[:8], "little") | 1
            taken = self._slots["key"]
            start = name % _SLOTS
            free = (at % _SLOTS for at in range(start, start + _SLOTS) if taken[at % _SLOTS] in {0, name})
            self._places[key.name] = place = next(free, start)  # more keys than slots share one
            taken[place] = name
        return self._places[key.name]

    @contextmanager
    def _locked(self) -> Iterator[None]:
        # A lock that the system gives back when a process dies with it.
        fcntl.lockf(self._memory, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.lockf(self._memory, fcntl.LOCK_UN)
