"""Builds the application: its routes, requests and replies.

Every request takes four steps. Its body is read (`bodies`), its images are extracted and embedded (`service`,
`batching`), and the reply is made in the client's format. `openai` and `kserve` have the formats of two protocols.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from fastapi import FastAPI, Path, Request
from fastapi.responses import Response
from starlette.concurrency import run_in_threadpool

import robustfeat
from robustfeat.hub.preprocessing import readable_formats
from robustfeat.serving.http import kserve, openai, teach
from robustfeat.serving.http.bodies import images_of, read_body
from robustfeat.serving.http.documents import ACCEPT, IMAGE_BODY, MODEL, describe, refusals
from robustfeat.serving.http.gate import Gate
from robustfeat.serving.http.pages import add_docs, add_page
from robustfeat.serving.http.process.fitter import Fitter
from robustfeat.serving.http.process.metrics import CONTENT_TYPE
from robustfeat.serving.http.request_notes import CURRENT
from robustfeat.serving.http.routes import Routes
from robustfeat.serving.http.service import ServedHead, ServedModel, Service
from robustfeat.serving.online.answers import (
    BINARY_HEADERS,
    JSON,
    NPY,
    RAW,
    VECTOR_TYPES,
    Answer,
    choose_type,
    failed_item,
    json_bytes,
    require_one,
    vectors_reply,
)
from robustfeat.serving.online.schemas import Embeddings, Health, Info, Predictions

if TYPE_CHECKING:  # heads import further libraries
    from robustfeat.serving.heads.head import Head

__all__ = ["create_app"]

_VECTORS = {"schema": {"type": "string", "format": "binary"}}


def create_app(service: Service) -> Gate:
    """Builds the application for any ASGI server."""
    app = FastAPI(
        title="robustfeat",
        version=robustfeat.__version__,
        summary="Image features and heads' answers.",
        docs_url=None,  # our own page loads nothing from other hosts
        redoc_url=None,
    )
    routes = Routes(app)
    _add_embed(routes, service)
    _add_predict(routes, service)
    _add_health(routes, service)
    _add_reports(routes, service)
    openai.add_routes(routes, service)
    kserve.add_routes(routes, service)
    if service.collections:
        from robustfeat.serving.http import similar  # imports the libraries of collections

        similar.add_routes(routes, service, service.collections)
    add_docs(routes)
    if service.page:
        fitter = Fitter()
        add_page(routes, fitter.prepare)
        teach.add_routes(routes, service, fitter)
    names = {
        "model": list(service.models),
        "head": list(service.heads),
        "collection": list(service.collections),
        "version": sorted({model.version for model in service.models.values()}),
    }
    describe(app, keys=bool(service.keys.names), names=names)
    return Gate(app, routes, service)


def _add_embed(routes: Routes, service: Service) -> None:
    @routes.post(
        "/embed",
        tags=["images"],
        summary="Features of images",
        openapi_extra={**IMAGE_BODY, "parameters": [MODEL, ACCEPT]},
        response_model=Embeddings,
        responses={
            200: {
                "description": "A vector for each image that could be read, and an error for each that could not. "
                "In the binary forms the rows of the latter are NaN, and X-Robustfeat-Failed lists them.",
                "content": {NPY: _VECTORS, RAW: _VECTORS},
                "headers": {
                    f"X-Robustfeat-{name}": {"schema": {"type": "string"}, "description": text}
                    for name, text in BINARY_HEADERS.items()
                },
            },
            **refusals(400, 401, 404, 406, 408, 413, 415, 422, 429, 503),
        },
    )
    async def embed(request: Request) -> Response:
        """One image as the body, or many as multipart/form-data: parts named `images`, or any files, in order."""
        kind = choose_type(request.headers.get("accept", ""), VECTOR_TYPES)
        served, answers = await _embed(service, request, request.query_params.get("model"))
        reply = vectors_reply(served, answers, kind)
        return Response(reply.body, media_type=reply.media_type, headers=reply.headers)


def _add_predict(routes: Routes, service: Service) -> None:
    @routes.post(
        "/predict/{head}",
        tags=["images"],
        summary="A head's answers for images",
        openapi_extra=IMAGE_BODY,
        response_model=Predictions,
        responses=refusals(400, 401, 404, 408, 413, 415, 422, 429, 503),
    )
    async def predict(request: Request, head: Annotated[str, Path(description="Of those served.")]) -> Response:
        """Takes images like /embed."""
        chosen = service.head(head)
        if (notes := CURRENT.get()) is not None:
            notes.head = head
        served, answers = await _embed(service, request, chosen.model.name)
        service.metrics.head_images(head, sum(answer.features is not None for answer in answers))
        return _json({**served.about, "head": head, "data": _predictions(chosen.head, answers)})


def _add_health(routes: Routes, service: Service) -> None:
    @routes.get("/health/live", tags=["health"], response_model=Health, summary="Whether the process answers")
    async def live(_: Request) -> Response:
        return _json({"status": "live"})

    @routes.get(
        "/health/ready",
        tags=["health"],
        response_model=Health,
        summary="Whether images are embedded",
        responses={503: {"model": Health, "description": "Not now: it starts, stops, or its model does not answer."}},
    )
    async def ready(_: Request) -> Response:
        """Ready: an image was embedded, from its bytes to its features, within the last minute."""
        if service.ready:
            return _json({"status": "ready"})
        return _json({"status": "draining" if service.draining else "not ready"}, 503)


def _add_reports(routes: Routes, service: Service) -> None:
    @routes.get(
        "/info", tags=["health"], response_model=Info, responses=refusals(401), summary="What is served, and the limits"
    )
    async def info(_: Request) -> Response:
        return _json(_info(service))

    @routes.get(
        "/metrics",
        tags=["health"],
        summary="Prometheus metrics of all workers",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    async def metrics(_: Request) -> Response:
        service.metrics.count()
        # Read the files of all workers in a thread, since it takes milliseconds.
        return Response(await run_in_threadpool(service.metrics.exposition), media_type=CONTENT_TYPE)


async def _embed(service: Service, request: Request, model: str | None) -> tuple[ServedModel, list[Answer]]:
    """The result of each image of a request. At least one has features."""
    chosen = service.model(model)
    key = request.scope["state"]["key"]
    with service.buffered.body(key) as held:
        body = await read_body(request, held)
        images, fields = images_of(request.headers.get("content-type", ""), body, service.limits.max_items)
        if model is None and "model" in fields:
            chosen = service.model(fields["model"])
        answers = await service.embed(chosen, images, key)
    require_one(answers)
    return chosen, answers


def _predictions(head: Head, answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """The entries of a reply: a head's prediction for each image with features."""
    from robustfeat.serving.heads.predictions import answer_of, predict

    good = {at: answer.features for at, answer in enumerate(answers) if answer.features is not None}
    predictions = predict(head, np.stack(list(good.values())), [""] * len(good), probabilities=head.calibrated)
    data = [failed_item(at, answer) for at, answer in enumerate(answers)]
    for at, prediction in zip(good, predictions, strict=True):
        entry = answer_of(head, prediction)
        del entry["path"], entry["error"]
        data[at] = {"index": at, **entry}
    return data


def _json(content: dict[str, Any], status: int = 200) -> Response:
    return Response(json_bytes(content), status, media_type=JSON)


def _head_info(served: ServedHead) -> dict[str, Any]:
    head = served.head
    return {
        "name": served.name,
        "model": served.model.name,
        "classes": list(head.classes),
        **{name: getattr(head, name) for name in ("kind", "multi_label", "revision", "sha256")},
        "probabilities": head.calibrated,
        "typicality": head.tells_typicality,
    }


def _info(service: Service) -> dict[str, Any]:
    limits = service.limits
    return {
        "version": robustfeat.__version__,
        "models": [
            {
                "name": name,
                "model": model.identity.name,
                **model.identity.values("revision", "precision", "engine", "device", "decoding", "feature_size"),
                "image_size": model.extractor.config.preprocessing.image_size,
                **model.identity.values("weights_sha256", "preprocessing_hash", "pooling"),
                "config_hash": model.extractor.folder.config_hash,
                "batch_size": model.batch_size,
            }
            for name, model in service.models.items()
        ],
        "heads": [_head_info(served) for served in service.heads.values()],
        "collections": [
            {"name": name, "model": one.model.name, "rows": len(one.rows)} for name, one in service.collections.items()
        ],
        "limits": {
            "body_bytes": limits.max_body_bytes,
            "pixels": limits.max_pixels,
            "items": limits.max_items,
            "queue": limits.max_queue,
            "timeout_s": limits.timeout_s,
            "decode_timeout_s": limits.decode_timeout_s,
            "connections": limits.max_connections,
        },
        "formats": list(readable_formats()),
        "workers": service.workers,
    }
