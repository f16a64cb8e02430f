"""The models and heads of a worker, and the state that its requests share."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from robustfeat.errors import InputError
from robustfeat.serving.extractor import FeatureExtractor
from robustfeat.serving.http.admission import Admission
from robustfeat.serving.http.bodies import Buffered
from robustfeat.serving.http.keys import Key, KeyRing
from robustfeat.serving.http.limits import Limits
from robustfeat.serving.http.manifest import Manifest
from robustfeat.serving.http.process.log import Log
from robustfeat.serving.http.process.metrics import Metrics, ModelMetrics
from robustfeat.serving.http.request_notes import CURRENT
from robustfeat.serving.online.answers import Answer, NamedModel, Vector
from robustfeat.serving.online.batching import Batcher
from robustfeat.serving.online.errors import ApiError
from robustfeat.serving.online.timeline import Timeline
from robustfeat.serving.verify import golden_answers

if TYPE_CHECKING:  # these import further libraries
    from robustfeat.serving.heads.head import Head
    from robustfeat.serving.http.drift import DriftWindow
    from robustfeat.serving.http.process.tracing import Tracer
    from robustfeat.serving.http.similar import ServedCollection

__all__ = ["READY_S", "ServedHead", "ServedModel", "Service", "match_heads"]

READY_S = 60.0
"""A worker is ready if it embedded an image within this time."""

PROBE_S = 20.0
"""Idle time after which the server embeds a golden image."""

_SHARED_BATCH = 8
_SHARED_DECODERS = 2
"""With keys there are two decoders, so one stays free while the other decodes a slow image."""


class ServedModel(NamedModel):
    """A running model.

    Args:
        name, extractor: see `NamedModel`.
        limits, metrics: limits and metrics of the server.
        decoders: number of decoder processes; at least two with keys.
        shared: whether there are keys. Batches are then small, since the next key waits for the running batch.

    Attributes:
        batch_size: largest batch, in images.
        window: compares its images with a reference, if there is one.
        last_good: time of the last embedded image, from `time.monotonic`; initially minus infinity.
    """

    def __init__(
        self,
        name: str,
        extractor: FeatureExtractor,
        limits: Limits,
        metrics: Metrics,
        *,
        decoders: int,
        shared: bool,
    ) -> None:
        super().__init__(name, extractor)
        self._metrics: ModelMetrics = metrics.of_model(name)
        self.batch_size = min(extractor.batch_size, _SHARED_BATCH) if shared else extractor.batch_size
        self._metrics.set_capacity(self.batch_size)
        self._batcher = Batcher(
            extractor,
            self._metrics,
            max_pixels=limits.max_pixels,
            decode_timeout_s=limits.decode_timeout_s,
            decoders=max(_SHARED_DECODERS, decoders) if shared else decoders,
            batch_size=self.batch_size,
        )
        self._golden = golden_answers(extractor)
        self.last_good = float("-inf")
        self.window: DriftWindow | None = None

    def __enter__(self) -> ServedModel:
        self._batcher.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._batcher.__exit__(*exc)

    def attach(self) -> None:
        """See `Batcher.attach`."""
        self._batcher.attach()

    @property
    def ready(self) -> bool:
        """Whether it embedded an image within the last minute."""
        return time.monotonic() - self.last_good < READY_S

    async def embed(self, images: Sequence[bytes | Vector], key: Key, timeline: Timeline | None = None) -> list[Answer]:
        """Calls `Batcher.embed`, and counts the images."""
        answers = await self._batcher.embed(images, key.name, timeline)
        good = sum(answer.features is not None for answer in answers)
        # A prepared tensor does not test the decoders.
        if any(a.features is not None and isinstance(i, bytes) for a, i in zip(answers, images, strict=True)):
            self.last_good = time.monotonic()
        self._metrics.answered(good, len(answers) - good)
        if self.window is not None:
            self.window.add(answer.features for answer in answers if answer.features is not None)
        return answers

    async def probe(self, count: int = 1) -> None:
        """Embeds at most `count` golden images in the same way as a client's images.

        Raises:
            EngineError: an image was not embedded, or has other features.
        """
        images, expected = self._golden
        answers = await self._batcher.embed(images[:count], "")
        for answer, features in zip(answers, expected, strict=False):
            self.require_golden(answer, features)
        self.last_good = time.monotonic()

    async def check(self) -> None:
        """Calls `probe` for all golden images."""
        await self.probe(len(self._golden[0]))


@dataclass(frozen=True)
class ServedHead:
    """A head with its name and its model."""

    name: str
    head: Head
    model: ServedModel


@dataclass
class Service:
    """The models and heads of a worker, and the state that its requests share.

    Attributes:
        models: by name; the first is the default.
        heads: by name.
        limits: limits of requests.
        keys: the accepted keys.
        hosts: accepted names in the Host header; see `gate.host_allowed`.
        admission, buffered, metrics, log: state shared by all requests.
        workers: number of workers of the server.
        manifest: everything that it serves, with commits and hashes.
        collections: collections by name.
        page: whether to serve the page at / and its routes.
        draining: whether the server is stopping.
        tracer: records requests, if they are traced.
    """

    models: dict[str, ServedModel]
    heads: dict[str, ServedHead]
    limits: Limits
    keys: KeyRing
    hosts: Sequence[str]
    admission: Admission
    metrics: Metrics
    log: Log
    workers: int
    manifest: Manifest
    collections: Mapping[str, ServedCollection] = field(default_factory=dict)
    page: bool = True
    draining: bool = False
    tracer: Tracer | None = None
    buffered: Buffered = field(init=False)

    def __post_init__(self) -> None:
        self.buffered = Buffered(self.limits)
        self.metrics.add_gauge(self.metrics.ready, lambda: self.ready)
        for name, model in self.models.items():
            about = model.identity.values("name", "revision", "engine", "precision", "device")
            self.metrics.loaded("model", model=name, config_hash=model.extractor.folder.config_hash, **about)
        for name, one in self.heads.items():
            self.metrics.loaded(
                "head", head=name, model=one.model.name, revision=one.head.revision, sha256=one.head.sha256
            )
        self.share_among_keys()

    def share_among_keys(self) -> None:
        """Sets the number of keys that share the queue and the memory for bodies."""
        for shared in (self.admission, self.buffered):
            shared.share_among(len(self.keys.names))

    @property
    def ready(self) -> bool:
        """Whether every model embedded an image within the last minute, and new requests are accepted."""
        return not self.draining and all(model.ready for model in self.models.values())

    def model(self, name: str | None) -> ServedModel:
        """The model of a name, by default the first.

        Raises:
            ApiError: 404. The message lists the served names.
        """
        if name is None:
            return next(iter(self.models.values()))
        if name not in self.models:
            served = ", ".join(self.models)
            raise ApiError(
                404, "model_not_found", f"no model {name[:100]!r} is served; there is {served}", param="model"
            )
        return self.models[name]

    def head(self, name: str) -> ServedHead:
        """The head of a name.

        Raises:
            ApiError: 404. The message lists the served names.
        """
        if name not in self.heads:
            served = ", ".join(self.heads) or "none"
            raise ApiError(404, "head_not_found", f"no head {name[:100]!r} is served; there is {served}", param="head")
        return self.heads[name]

    async def embed(self, model: ServedModel, images: Sequence[bytes | Vector], key: Key) -> list[Answer]:
        """Embeds images within the key's share of the server.

        Returns:
            See `Batcher.embed`.

        Raises:
            ApiError: 413, 429 or 503.
        """
        with self.admission.enter(key, len(images)):
            return await self.embed_admitted(model, images, key)

    async def embed_admitted(self, model: ServedModel, images: Sequence[bytes | Vector], key: Key) -> list[Answer]:
        """Embeds images that `admission` has admitted."""
        notes = CURRENT.get()
        if notes is not None:
            notes.model, notes.images = model.name, len(images)
        answers = await model.embed(images, key, notes.timeline if notes is not None else None)
        if key.name:
            self.metrics.key_images(key.name, len(images))
        unreadable = sum(answer.problem is not None for answer in answers)
        if unreadable:
            self.metrics.error("unreadable_image", unreadable)
        failures = [answer.failure for answer in answers if answer.failure is not None]
        if failures:
            self.metrics.error("internal", len(failures))
            self.log.error("the model failed", images=len(failures), of=len(answers), error=repr(failures[0]))
        return answers

    async def maintain(self) -> None:
        """Embeds a golden image while idle, counts metrics, and reads changed keys. It never returns."""
        keys_error = probe_error = ""
        while True:
            for model in self.models.values():
                if time.monotonic() - model.last_good > PROBE_S:
                    try:
                        await asyncio.wait_for(model.probe(), self.limits.timeout_s)
                    except Exception as exc:
                        if repr(exc) != probe_error:
                            probe_error = repr(exc)
                            self.log.error("probe failed", error=str(exc) or type(exc).__name__)
            for _ in range(10):  # in small steps, since requests wait for it
                await asyncio.sleep(0.1)
                self.metrics.count()
            self.metrics.measure_memory()
            try:
                if self.keys.refresh():
                    self.share_among_keys()
                    self.log.info("keys read again", keys=len(self.keys.names))
                keys_error = ""
            except InputError as exc:
                if str(exc) != keys_error:
                    keys_error = str(exc)
                    self.log.error("keys left as they were", error=keys_error)


def match_heads(heads: dict[str, Head], models: Sequence[ServedModel]) -> dict[str, ServedHead]:
    """Matches each head with its model.

    Raises:
        InputError: no model fits.
    """
    matched = {}
    for name, head in heads.items():
        fitting = [model for model in models if head.takes(model.identity)]
        if not fitting:
            head.require_model(models[0].identity, f"the head {name}", "the model served")
        matched[name] = ServedHead(name, head, fitting[0])
    return matched
