"""How far the latest images of a server lie from a reference, for /metrics."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from threadpoolctl import threadpool_limits

from robustfeat.serving.collections.drift import ATYPICAL, Reference, draw_rows
from robustfeat.serving.collections.two_sample import Comparison
from robustfeat.serving.heads.features import Features, open_features
from robustfeat.serving.http.process.metrics import Metrics
from robustfeat.serving.http.service import ServedModel
from robustfeat.serving.http.similar import match_model
from robustfeat.serving.online.answers import Vector

__all__ = ["DriftWindow", "watch_drift"]

_WINDOW = 500
_LEAST_IMAGES = 50
"""Fewer are compared with nothing."""

_PAUSE_S = 60.0
"""Between two comparisons, each of which takes 0.2 s of processor time."""

ALPHA = 0.01


class DriftWindow:
    """The latest images that a model embedded, and how far they lie from a reference.

    Args:
        features: the reference; a sample of it is kept.

    Attributes:
        distance: see `Comparison`; 0 before the first comparison.
        shifted: whether the p-value is below `ALPHA`.
        atypical: the share of atypical images.
        images: how many images were compared.
    """

    def __init__(self, features: Features) -> None:
        rows = draw_rows(features, _WINDOW, np.random.default_rng(0))
        self._reference = Reference(features.take(rows))
        self._latest: deque[Vector] = deque(maxlen=_WINDOW)
        self._fresh, self._compared_s = 0, -np.inf
        self._thread = ThreadPoolExecutor(1, "drift")
        self._running: Future[tuple[Comparison, float]] | None = None
        self.distance, self.shifted, self.atypical, self.images = 0.0, False, 0.0, 0

    def add(self, vectors: Iterable[Vector]) -> None:
        """Takes the features of further images."""
        for vector in vectors:
            self._latest.append(vector)
            self._fresh += 1

    def refresh(self) -> None:
        """Starts a comparison in a thread if there is something to compare, and takes the result of the last one."""
        if self._running is not None:
            if not self._running.done():
                return
            found, self.atypical = self._running.result()
            self.distance, self.shifted, self.images = found.distance, found.p < ALPHA, found.rows[1]
            self._running = None
        now = time.monotonic()
        if self._fresh and len(self._latest) >= _LEAST_IMAGES and now - self._compared_s >= _PAUSE_S:
            self._fresh, self._compared_s = 0, now
            self._running = self._thread.submit(self._compare, np.stack(self._latest))

    def _compare(self, values: Vector) -> tuple[Comparison, float]:
        with threadpool_limits(1):  # requests need the other processors
            typicality = self._reference.typicality(self._reference.distances(values))
            return self._reference.compare(values), float((typicality < ATYPICAL).mean())


def watch_drift(place: str, models: Mapping[str, ServedModel], metrics: Metrics) -> None:
    """Compares what a model embeds with features of it, and adds that to the metrics.

    Raises:
        InputError: no model served made the features, or they cannot be read.
    """
    features = open_features(place)
    model = match_model("the reference", features, list(models.values()))
    window = model.window = DriftWindow(features)
    metrics.add_drift(model.name, window)
