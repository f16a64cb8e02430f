"""Serves the Open Inference Protocol (KServe v2) over REST."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from typing import Annotated, Any, TypeVar

from fastapi import Path, Request
from fastapi.responses import Response

import robustfeat
from robustfeat.serving.http.bodies import read_body
from robustfeat.serving.http.documents import infer_refusals, json_body
from robustfeat.serving.http.routes import Routes
from robustfeat.serving.http.service import ServedModel, Service
from robustfeat.serving.online.answers import JSON, RAW, json_bytes
from robustfeat.serving.online.errors import ApiError
from robustfeat.serving.online.infer import HEADER_LENGTH, infer_images_in_turns, infer_reply, parse_infer_in_turns
from robustfeat.serving.online.schemas import (
    Health,
    InferRequest,
    InferResponse,
    ModelMetadata,
    ModelReady,
    ServerMetadata,
)

__all__ = ["add_routes"]

Result = TypeVar("Result")
_Name = Annotated[str, Path(description="Of those served.")]
_TAGS: list[Any] = ["Open Inference Protocol"]


def add_routes(routes: Routes, service: Service) -> None:
    """Adds the routes under /v2."""
    _add_server(routes, service)
    _add_models(routes, service)
    _add_infer(routes, service)


def _add_server(routes: Routes, service: Service) -> None:
    @routes.get("/v2", tags=_TAGS, summary="The server", response_model=ServerMetadata, responses=infer_refusals(401))
    async def server(_: Request) -> Response:
        extensions = ["binary_tensor_data"]
        return _json({"name": "robustfeat", "version": robustfeat.__version__, "extensions": extensions})

    @routes.get("/v2/health/live", tags=_TAGS, summary="Whether the process answers", response_model=Health)
    async def live(_: Request) -> Response:
        return _json({"status": "live"})

    @routes.get(
        "/v2/health/ready",
        tags=_TAGS,
        summary="Whether images are embedded",
        response_model=Health,
        responses={503: {"model": Health, "description": "Not now."}},
    )
    async def ready(_: Request) -> Response:
        status = "ready" if service.ready else "not ready"
        return _json({"status": status}, 200 if service.ready else 503)


def _add_models(routes: Routes, service: Service) -> None:
    unknown = infer_refusals(400, 401, 404)

    @routes.get("/v2/models/{model}", tags=_TAGS, summary="A model", response_model=ModelMetadata, responses=unknown)
    @routes.get(
        "/v2/models/{model}/versions/{version}",
        tags=_TAGS,
        summary="A model's version",
        response_model=ModelMetadata,
        responses=unknown,
    )
    async def metadata(_: Request, model: _Name, version: str | None = None) -> Response:
        chosen = _find(service, model, version)
        side, size = chosen.extractor.config.preprocessing.image_size, chosen.extractor.feature_size
        about = {
            "name": chosen.name,
            "versions": [chosen.version],
            "platform": f"{chosen.extractor.engine.name}_{chosen.extractor.precision}",
            "inputs": [
                {"name": "images", "datatype": "BYTES", "shape": [-1]},
                {"name": "pixel_values", "datatype": "FP32", "shape": [-1, 3, side, side]},
            ],
            "outputs": [{"name": "features", "datatype": "FP32", "shape": [-1, size]}],
        }
        return _json(about)

    ready_responses = {**unknown, 503: {"model": ModelReady, "description": "Not now."}}

    @routes.get(
        "/v2/models/{model}/ready",
        tags=_TAGS,
        summary="Whether a model answers",
        response_model=ModelReady,
        responses=ready_responses,
    )
    @routes.get(
        "/v2/models/{model}/versions/{version}/ready",
        tags=_TAGS,
        summary="Whether a model's version answers",
        response_model=ModelReady,
        responses=ready_responses,
    )
    async def model_ready(_: Request, model: _Name, version: str | None = None) -> Response:
        chosen = _find(service, model, version)
        answers = chosen.ready and not service.draining
        return _json({"name": chosen.name, "ready": answers}, 200 if answers else 503)


def _add_infer(routes: Routes, service: Service) -> None:
    infer_responses: dict[int | str, dict[str, Any]] = {
        200: {"content": {RAW: {"schema": {"type": "string", "format": "binary"}}}},
        **infer_refusals(400, 401, 404, 408, 413, 415, 422, 429, 503),
    }

    @routes.post(
        "/v2/models/{model}/infer",
        tags=_TAGS,
        summary="Features of images, or of prepared tensors",
        response_model=InferResponse,
        responses=infer_responses,
        openapi_extra=json_body(InferRequest, RAW),
    )
    @routes.post(
        "/v2/models/{model}/versions/{version}/infer",
        tags=_TAGS,
        summary="Features from a model's version",
        response_model=InferResponse,
        responses=infer_responses,
        openapi_extra=json_body(InferRequest, RAW),
    )
    async def infer(request: Request, model: _Name, version: str | None = None) -> Response:
        """One unreadable image fails the whole request, as the protocol's clients expect."""
        chosen = _find(service, model, version)
        key = request.scope["state"]["key"]
        with service.buffered.body(key) as held:
            body = await read_body(request, held)
            asked, rest = await _in_turns(parse_infer_in_turns(body, request.headers.get(HEADER_LENGTH)))
            images = await _in_turns(infer_images_in_turns(asked.inputs[0], rest, chosen, service.limits.max_items))
            # Free unneeded memory before waiting for others.
            body, rest, asked.inputs[0].data = b"", b"", None
            answers = await service.embed(chosen, images, key)
        reply = infer_reply(asked, chosen, answers)
        return Response(reply.body, media_type=reply.media_type, headers=reply.headers)


async def _in_turns(steps: Generator[None, None, Result]) -> Result:
    """Runs a generator, lets other requests run at each yield, and returns its result."""
    while True:
        try:
            next(steps)
        except StopIteration as done:
            result: Result = done.value
            return result
        await asyncio.sleep(0)


def _find(service: Service, name: str, version: str | None) -> ServedModel:
    model = service.model(name)
    if version not in {None, model.version}:
        raise ApiError(404, "model_not_found", f"{name} has no version {str(version)[:100]!r}; it has {model.version}")
    return model


def _json(content: dict[str, Any], status: int = 200) -> Response:
    return Response(json_bytes(content), status, media_type=JSON)
