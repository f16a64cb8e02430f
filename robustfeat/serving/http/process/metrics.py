"""What /metrics tells, counted over all workers.

Labels take few values, whatever clients send: the models, routes and heads that are served, status codes that we
answer with, reasons from `errors.ApiError`'s fixed set, and the names of `MOST_KEYS` keys.
"""

from __future__ import annotations

import os
import platform
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import prometheus_client
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Gauge, Histogram, generate_latest, values
from prometheus_client.metrics_core import Metric
from prometheus_client.multiprocess import MultiProcessCollector

import robustfeat
from robustfeat.errors import InputError
from robustfeat.files import new_file, reserve_space
from robustfeat.system import anonymous_bytes, child_processes

if TYPE_CHECKING:
    from robustfeat.serving.http.drift import DriftWindow

__all__ = ["CONTENT_TYPE", "MOST_KEYS", "Metrics", "ModelMetrics"]

CONTENT_TYPE = CONTENT_TYPE_LATEST

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_FILE_BYTES, _NAME_BYTES = 2**19, 2**14
"""More than the numbers of a server, and of a model or head, take in a file."""

MOST_KEYS = 64
"""Names of keys that are counted, in the order of their first requests. All others are counted as `other`."""

_NO_NUMBERS = (8).to_bytes(4, sys.byteorder) + bytes(4)
"""A file without numbers: how many bytes are used, and padding (`prometheus_client.mmap_dict`)."""

_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The metrics of one worker, added up over all workers when they are asked for.

    Args:
        worker: its number. The one that takes a dead worker's place goes on with its counts.
        models, heads: how many are counted.

    Attributes:
        ready: the gauge of workers that are ready.
        refused: the gauge of whether the last reload was refused.
        shared: whether there is space for the files in which workers share their numbers. Without it each answers
            with its own.
    """

    def __init__(self, worker: int, models: int = 1, heads: int = 0) -> None:
        self.shared = _reserve(Path(os.environ["PROMETHEUS_MULTIPROC_DIR"]), worker, models + heads)
        # Files named by the worker's number: a process that dies leaves none behind.
        values.ValueClass = values.MultiProcessValue(lambda: worker) if self.shared else values.MutexValue
        own = self._own = CollectorRegistry()
        self._requests = prometheus_client.Counter(
            "robustfeat_requests", "Requests by route and status.", ["route", "status"], registry=own
        )
        self._seconds = Histogram(
            "robustfeat_request_seconds",
            "From a request's head to its answer, of requests that reached a model.",
            registry=own,
            buckets=_SECONDS,
        )
        self._errors = prometheus_client.Counter(
            "robustfeat_errors", "Requests and images that failed, by reason.", ["reason"], registry=own
        )
        self._in_flight = Gauge(
            "robustfeat_in_flight_requests", "Requests at hand.", registry=own, multiprocess_mode="livesum"
        )
        self.ready = Gauge(
            "robustfeat_ready_workers",
            "Workers that embedded an image within the last minute.",
            registry=own,
            multiprocess_mode="livesum",
        )
        self._items = prometheus_client.Counter(
            "robustfeat_images", "Images by model and outcome.", ["model", "outcome"], registry=own
        )
        self._queue = Gauge(
            "robustfeat_queue_images",
            "Images that wait for a decoder or the model.",
            ["model"],
            registry=own,
            multiprocess_mode="livesum",
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
        self._predicted = prometheus_client.Counter(
            "robustfeat_head_images", "Images that a head answered for.", ["head"], registry=own
        )
        self._key_requests = prometheus_client.Counter(
            "robustfeat_key_requests", "Requests by key and status.", ["key", "status"], registry=own
        )
        self._key_images = prometheus_client.Counter(
            "robustfeat_key_images", "Images that were let in, by key.", ["key"], registry=own
        )
        self._capacity = Gauge(
            "robustfeat_batch_capacity_images",
            "The largest batch of a model.",
            ["model"],
            registry=own,
            multiprocess_mode="livemax",
        )
        self._add_process(own)
        # Requests store their numbers here instead of waiting for the shared files.
        self._noted: deque[tuple[Callable[[float], None], float]] = deque()
        self._added: Counter[Callable[[float], None]] = Counter()
        self.note = self._noted.append
        self.gauges: list[tuple[Gauge, Callable[[], float]]] = []
        self.in_flight = 0
        self.add_gauge(self._in_flight, lambda: self.in_flight)
        # `labels` takes a lock and checks, so request each combination only once.
        self._count = cache(lambda route, status: self._requests.labels(route, str(status)).inc)
        self._failed = cache(lambda reason: self._errors.labels(reason).inc)
        self._of_head = cache(lambda head: self._predicted.labels(head).inc)
        self._of_key = cache(lambda key, status: self._key_requests.labels(key, str(status)).inc)
        self._images_of_key = cache(lambda key: self._key_images.labels(key).inc)
        self._keys: set[str] = set()

    def _add_process(self, own: CollectorRegistry) -> None:
        """Adds facts about the process."""
        build = Gauge(
            "robustfeat_build_info",
            "The version of the server; 1.",
            ["version", "python"],
            registry=own,
            multiprocess_mode="livemax",
        )
        build.labels(robustfeat.__version__, platform.python_version()).set(1)
        self._memory = Gauge(
            "robustfeat_memory_bytes",
            "Anonymous memory of workers and decoders.",
            ["process"],
            registry=own,
            multiprocess_mode="livesum",
        )
        self._loaded = {
            "model": Gauge(
                "robustfeat_model_info",
                "A model that is served; 1.",
                ["model", "name", "revision", "config_hash", "engine", "precision", "device"],
                registry=own,
                multiprocess_mode="livemax",
            ),
            "head": Gauge(
                "robustfeat_head_info",
                "A head that is served; 1.",
                ["head", "model", "revision", "sha256"],
                registry=own,
                multiprocess_mode="livemax",
            ),
        }
        self.refused = Gauge(
            "robustfeat_last_reload_refused",
            "Whether the last reload was refused.",
            registry=own,
            multiprocess_mode="livemax",
        )

    def loaded(self, kind: str, **about: str | None) -> None:
        """Registers a served model or head; `about` has the labels."""
        self._loaded[kind].labels(**{name: value or "" for name, value in about.items()}).set(1)

    def measure_memory(self) -> None:
        """Measures the memory of this worker and its decoders, about 0.1 ms each."""
        self._memory.labels("worker").set(anonymous_bytes(os.getpid()))
        self._memory.labels("decoders").set(sum(map(anonymous_bytes, child_processes(os.getpid()))))

    def add_gauge(self, gauge: Gauge, read: Callable[[], float]) -> None:
        """Registers a function that returns a gauge's value whenever the numbers are counted."""
        self.gauges.append((gauge, read))
        gauge.set(0)

    def add_drift(self, model: str, window: DriftWindow) -> None:
        """Adds what is known of a model's drift. Of several workers, the largest numbers count."""

        def distance() -> float:
            window.refresh()
            return window.distance

        for name, text, read in (
            ("distance", "Energy distance between the latest images and the reference, 0 to 1.", distance),
            ("shifted", "Whether the latest images differ from the reference.", lambda: window.shifted),
            ("atypical_share", "The share of atypical images, 0.05 without a shift.", lambda: window.atypical),
            ("window_images", "Images that were compared with the reference.", lambda: window.images),
        ):
            gauge = Gauge(f"robustfeat_drift_{name}", text, ["model"], registry=self._own, multiprocess_mode="livemax")
            self.add_gauge(gauge.labels(model), read)

    def request(self, route: str, status: int) -> None:
        """Counts a response."""
        self._added[self._count(route, status)] += 1

    def add(self, counter: Callable[[float], None], number: int) -> None:
        """Adds to a counter."""
        self._added[counter] += number

    def seconds(self, value: float) -> None:
        """Counts the time of a request."""
        self.note((self._seconds.observe, value))

    def error(self, reason: str, count: int = 1) -> None:
        """Counts a failure."""
        self._added[self._failed(reason)] += count

    def head_images(self, head: str, count: int) -> None:
        """Counts images for a head."""
        self._added[self._of_head(head)] += count

    def key_request(self, key: str, status: int) -> None:
        """Counts the response to a request with a key."""
        self._added[self._of_key(self._known(key), status)] += 1

    def key_images(self, key: str, count: int) -> None:
        """Counts admitted images of a key."""
        self._added[self._images_of_key(self._known(key))] += count

    def _known(self, key: str) -> str:
        if key not in self._keys and len(self._keys) >= MOST_KEYS:
            return "other"
        self._keys.add(key)
        return key

    def count(self) -> None:
        """Counts the stored numbers. Call it ten times a second, on the loop."""
        for _ in range(len(self._noted)):
            observe, seconds = self._noted.popleft()
            observe(seconds)
        for add, number in self._added.items():
            add(number)
        self._added.clear()
        for gauge, read in self.gauges:
            gauge.set(read())

    def of_model(self, name: str) -> ModelMetrics:
        """The metrics of one model."""
        return ModelMetrics(self, name)

    def exposition(self) -> bytes:
        """The metrics of all workers in Prometheus' text format, as of each worker's last count."""
        if not self.shared:
            return generate_latest(self._own)
        registry = CollectorRegistry()
        registry.register(_AllWorkers(Path(os.environ["PROMETHEUS_MULTIPROC_DIR"])))
        return generate_latest(registry)


def _reserve(folder: Path, worker: int, names: int) -> bool:
    """Reserves the disk space of a worker's files. Returns whether there is enough.

    The files are memory-mapped, and a full disk would end the process instead of raising an error. Other workers read
    the folder at any time, so a file gets its place when it is complete. Without enough space nothing changes.
    """
    files = [folder / f"{kind}_{worker}.db" for kind in ("counter", "histogram", "gauge_livesum", "gauge_livemax")]
    try:
        with ExitStack() as renamed_together:
            for file in files:
                # An earlier worker of this number left its counts.
                used = _bytes_used(file)
                counts = file.read_bytes()[:used] if used else _NO_NUMBERS
                with open(renamed_together.enter_context(new_file(file)), "r+b") as opened:
                    opened.write(counts)
                    opened.flush()
                    reserve_space(opened, len(counts) + _FILE_BYTES + names * _NAME_BYTES)
    except (OSError, InputError):
        return False
    return True


def _bytes_used(file: Path) -> int:
    """The bytes of a file that have numbers. 0 for a file that is missing, incomplete or damaged."""
    try:
        with file.open("rb") as opened:
            used = int.from_bytes(opened.read(len(_NO_NUMBERS))[:4], sys.byteorder)
            return used if used <= os.fstat(opened.fileno()).st_size else 0
    except OSError:
        return 0


class _AllWorkers:
    """Collects the numbers of all workers from the complete files in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def collect(self) -> Iterable[Metric]:
        """The metrics, added up."""
        files = [str(file) for file in sorted(self._folder.glob("*.db")) if _bytes_used(file)]
        metrics: Iterable[Metric] = MultiProcessCollector.merge(files)
        return metrics


class ModelMetrics:
    """The metrics of one model, from any thread."""

    def __init__(self, metrics: Metrics, name: str) -> None:
        self._metrics, self._name = metrics, name
        self._note = metrics.note
        self._queued, self._decode, self._model = (
            histogram.labels(name).observe for histogram in metrics._timed.values()
        )
        self._sizes = metrics._sizes.labels(name).observe
        self._good, self._failed = (metrics._items.labels(name, outcome).inc for outcome in ("good", "failed"))

    def set_capacity(self, images: int) -> None:
        """Sets the size of the largest batch."""
        self._metrics._capacity.labels(self._name).set(images)

    def add_queue(self, length: Callable[[], float]) -> None:
        """Registers a function that returns the number of waiting images."""
        self._metrics.add_gauge(self._metrics._queue.labels(self._name), length)

    def decoded(self, waited_s: float, seconds: float) -> None:
        """Counts a decoder's result: the wait of its first image, and the decoder's time."""
        self._note((self._queued, waited_s))
        self._note((self._decode, seconds))

    def ran(self, seconds: float, count: int) -> None:
        """Counts a batch."""
        self._note((self._model, seconds))
        self._note((self._sizes, count))

    def answered(self, good: int, failed: int) -> None:
        """Counts the images of a request."""
        self._metrics.add(self._good, good)
        self._metrics.add(self._failed, failed)
