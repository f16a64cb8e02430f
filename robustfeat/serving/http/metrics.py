"""What /metrics tells, counted over all workers.

Labels take few values, whatever clients send: the models, routes and heads that are served, status codes that we
answer with, and reasons from `errors.ApiError`'s fixed set.
"""

from __future__ import annotations

import os
from functools import cache

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest, values
from prometheus_client.multiprocess import MultiProcessCollector

__all__ = ["CONTENT_TYPE", "Metrics", "ModelMetrics"]

CONTENT_TYPE = CONTENT_TYPE_LATEST

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The metrics of one worker, added up over all workers when they are asked for.

    Args:
        worker: its number. The one that takes a dead worker's place goes on with its counts.
    """

    def __init__(self, worker: int) -> None:
        # Files in PROMETHEUS_MULTIPROC_DIR, named by the worker's number: a process that dies leaves none behind.
        values.ValueClass = values.MultiProcessValue(lambda: worker)  # type: ignore[no-untyped-call]
        own = CollectorRegistry()
        self._requests = Counter(
            "robustfeat_requests", "Requests by route and status.", ["route", "status"], registry=own
        )
        self._seconds = Histogram(
            "robustfeat_request_seconds",
            "From a request's head to its answer, of requests that reached a model.",
            registry=own,
            buckets=_SECONDS,
        )
        self._errors = Counter(
            "robustfeat_errors", "Requests and images that failed, by reason.", ["reason"], registry=own
        )
        self._in_flight = Gauge(
            "robustfeat_in_flight_requests", "Requests at hand.", registry=own, multiprocess_mode="sum"
        )
        self._items = Counter("robustfeat_images", "Images by model and outcome.", ["model", "outcome"], registry=own)
        self._queue = Gauge(
            "robustfeat_queue_images",
            "Images that wait for a decoder or the model.",
            ["model"],
            registry=own,
            multiprocess_mode="sum",
        )
        timed = {
            "queue": "Waiting for a decoder, of the first image of each hand-out.",
            "decode": "A decoder's time for the images that it took together, the way there and back included.",
            "model": "The model's time for a batch.",
        }
        self._timed = {
            name: Histogram(f"robustfeat_{name}_seconds", text, ["model"], registry=own, buckets=_SECONDS)
            for name, text in timed.items()
        }
        self._sizes = Histogram(
            "robustfeat_batch_images", "Images in a batch.", ["model"], registry=own, buckets=_SIZES
        )
        self._in_flight.set(0)
        self.in_flight = self._in_flight
        # `labels` takes a lock and checks; each combination is asked for once.
        self._count = cache(lambda route, status: self._requests.labels(route, str(status)))
        self._failed = cache(self._errors.labels)

    def request(self, route: str, status: int) -> None:
        """Counts an answer."""
        self._count(route, status).inc()

    def seconds(self, value: float) -> None:
        """Counts the time of a request."""
        self._seconds.observe(value)

    def error(self, reason: str, count: int = 1) -> None:
        """Counts what failed."""
        self._failed(reason).inc(count)

    def of_model(self, name: str) -> ModelMetrics:
        """Those of one model."""
        return ModelMetrics(self, name)

    def exposition(self) -> bytes:
        """Of all workers, in Prometheus' text format."""
        registry = CollectorRegistry()
        MultiProcessCollector(registry, os.environ["PROMETHEUS_MULTIPROC_DIR"])  # type: ignore[no-untyped-call]
        return generate_latest(registry)


class ModelMetrics:
    """What is counted of one model.

    Attributes:
        queue: how many images wait.
    """

    def __init__(self, metrics: Metrics, name: str) -> None:
        self.queue = metrics._queue.labels(name)
        self.queue.set(0)
        self._queued, self._decode, self._model = (histogram.labels(name) for histogram in metrics._timed.values())
        self._sizes = metrics._sizes.labels(name)
        self._good, self._bad = (metrics._items.labels(name, outcome) for outcome in ("good", "failed"))

    def decoded(self, seconds: float, count: int, waited: float) -> None:
        """Counts images that a decoder has answered."""
        self._decode.observe(seconds)
        self._queued.observe(waited)

    def ran(self, seconds: float, count: int) -> None:
        """Counts a batch."""
        self._model.observe(seconds)
        self._sizes.observe(count)

    def answered(self, good: int, bad: int) -> None:
        """Counts the images of a request."""
        if good:
            self._good.inc(good)
        if bad:
            self._bad.inc(bad)
