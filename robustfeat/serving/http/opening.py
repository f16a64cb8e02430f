"""Loads the models, heads and collections of a manifest for one worker."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from robustfeat.errors import InputError
from robustfeat.hub.place import Place
from robustfeat.serving.extractor import FeatureExtractor
from robustfeat.serving.http.admission import Admission
from robustfeat.serving.http.manifest import Manifest
from robustfeat.serving.http.options import ServerOptions
from robustfeat.serving.http.process.log import Log
from robustfeat.serving.http.process.metrics import Metrics
from robustfeat.serving.http.process.supervisor import count_places
from robustfeat.serving.http.service import ServedHead, ServedModel, Service, match_heads
from robustfeat.system import available_cpus

if TYPE_CHECKING:
    from robustfeat.serving.engines.options import RunOptions
    from robustfeat.serving.http.similar import ServedCollection

__all__ = ["open_service"]


def open_service(manifest: Manifest, options: ServerOptions, number: int) -> Service:
    """Opens the service of the worker with this number.

    Its `manifest` has the commits and hashes of everything loaded. Another worker with this manifest loads the same, or
    fails.

    Raises:
        RobustFeatError: something cannot be loaded, or does not fit together.
    """
    log = Log(number, requests=options.log_requests, stages=options.log_stages)
    processors = max(1, available_cpus() // options.workers // len(manifest.models))
    metrics = Metrics(number, models=len(manifest.models), heads=len(manifest.heads))
    metrics.add_gauge(metrics.refused, lambda: options.reloads.refused)
    if not metrics.shared:
        log.error("metrics are those of one worker: no space for those of all", folder=tempfile.gettempdir())
    models = {
        name: ServedModel(
            name,
            _load_model(place, options.run, processors),
            options.limits,
            metrics,
            decoders=processors,
            shared=bool(options.keys.names),
        )
        for name, place in manifest.models.items()
    }
    if options.reference is not None:
        from robustfeat.serving.http.drift import watch_drift

        watch_drift(options.reference, models, metrics)
    heads = _load_heads(manifest.heads, models)
    collections, pinned = _load_collections(manifest.collections, models, max(1, available_cpus() // options.workers))
    return Service(
        models,
        heads,
        options.limits,
        options.keys,
        options.hosts,
        Admission(options.limits, options.counts, number, options.workers, count_places(options.workers)),
        metrics,
        log,
        options.workers,
        Manifest(
            {name: _pin_model(place, models[name]) for name, place in manifest.models.items()},
            {name: _pin_head(place, heads[name]) for name, place in manifest.heads.items()},
            pinned,
        ),
        collections=collections,
        page=options.page,
    )


def _load_model(place: Place, run: RunOptions, processors: int) -> FeatureExtractor:
    chosen = replace(run, threads=run.threads or processors, revision=place.revision, config_hash=place.sha256)
    return FeatureExtractor.load(place.name, chosen)


def _pin_model(place: Place, model: ServedModel) -> Place:
    folder = model.extractor.folder
    return replace(place, revision=folder.revision, sha256=folder.config_hash)


def _load_heads(places: Mapping[str, Place], models: Mapping[str, ServedModel]) -> dict[str, ServedHead]:
    if not places:
        return {}
    from robustfeat.serving.heads.head import Head

    heads = {
        name: Head.from_pretrained(place.name, revision=place.revision, sha256=place.sha256)
        for name, place in places.items()
    }
    return match_heads(heads, list(models.values()))


def _pin_head(place: Place, served: ServedHead) -> Place:
    return replace(place, revision=served.head.revision, sha256=served.head.sha256)


def _load_collections(
    places: Mapping[str, Place], models: Mapping[str, ServedModel], processors: int
) -> tuple[dict[str, ServedCollection], dict[str, Place]]:
    """Collections by name, each with its model, and their places with their hashes."""
    if not places:
        return {}, {}
    from robustfeat.serving.heads.features import open_features
    from robustfeat.serving.http.similar import match_collections

    features = {name: open_features(place.name) for name, place in places.items()}
    for name, place in places.items():
        if place.sha256 not in {None, features[name].meta_sha256}:
            raise InputError(f"{place.name}: changed since the server loaded it", fix="reload the server")
    pinned = {name: replace(place, sha256=features[name].meta_sha256) for name, place in places.items()}
    return match_collections(features, list(models.values()), processors), pinned
