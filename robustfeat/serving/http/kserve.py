"""The Open Inference Protocol (KServe v2) over REST, for the platforms and clients that speak it."""

from __future__ import annotations

import math
import struct
from typing import Annotated, Any

import numpy as np
import orjson
from fastapi import Path, Request
from fastapi.responses import Response
from numpy.typing import NDArray

import robustfeat
from robustfeat.serving.http.batching import Vector
from robustfeat.serving.http.bodies import base64_bytes, check_form, parse_json, read_body
from robustfeat.serving.http.documents import infer_refusals, json_body
from robustfeat.serving.http.errors import ApiError
from robustfeat.serving.http.routes import Routes
from robustfeat.serving.http.schemas import (
    Health,
    InferInput,
    InferRequest,
    InferResponse,
    ModelMetadata,
    ModelReady,
    ServerMetadata,
)
from robustfeat.serving.http.service import ServedModel, Service

__all__ = ["add_routes"]

_HEADER_LENGTH = "inference-header-content-length"
_BINARY = "application/octet-stream"
_TYPES = {"images": "BYTES", "pixel_values": "FP32"}

_Name = Annotated[str, Path(description="Of those served.")]
_TAGS: list[Any] = ["Open Inference Protocol"]


def add_routes(routes: Routes, service: Service) -> None:
    """/v2."""
    unknown = infer_refusals(400, 401, 404)

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

    infer_responses: dict[int | str, dict[str, Any]] = {
        200: {"content": {_BINARY: {"schema": {"type": "string", "format": "binary"}}}},
        **infer_refusals(400, 401, 404, 408, 413, 415, 422, 429, 503),
    }

    @routes.post(
        "/v2/models/{model}/infer",
        tags=_TAGS,
        summary="Features of images, or of prepared tensors",
        response_model=InferResponse,
        responses=infer_responses,
        openapi_extra=json_body(InferRequest, _BINARY),
    )
    @routes.post(
        "/v2/models/{model}/versions/{version}/infer",
        tags=_TAGS,
        summary="Features from a model's version",
        response_model=InferResponse,
        responses=infer_responses,
        openapi_extra=json_body(InferRequest, _BINARY),
    )
    async def infer(request: Request, model: _Name, version: str | None = None) -> Response:
        """As the protocol's clients expect, one image that cannot be read fails the request."""
        chosen = _find(service, model, version)
        with service.buffered.body() as held:
            body = await read_body(request, held)
            asked, rest = _parse(body, request.headers.get(_HEADER_LENGTH))
            images = _images(asked.inputs[0], rest, chosen, service.limits.items)
            # What is not needed any more is let go before others are waited for.
            body, rest, asked.inputs[0].data = b"", b"", None
            answers = await service.embed(chosen, images, request.scope["state"]["key"])
        for index, answer in enumerate(answers):
            if isinstance(answer, Exception):
                raise answer
            if isinstance(answer, str):
                raise ApiError(422, "unreadable_image", f"{asked.inputs[0].name}[{index}]: {answer}")
            if not np.isfinite(answer).all():
                raise ApiError(422, "bad_request", f"{asked.inputs[0].name}[{index}]: its features are not finite")
        return _answer(asked, chosen, np.stack(answers))  # type: ignore[arg-type]


def _find(service: Service, name: str, version: str | None) -> ServedModel:
    model = service.model(name)
    if version not in {None, model.version}:
        raise ApiError(404, "model_not_found", f"{name} has no version {str(version)[:100]!r}; it has {model.version}")
    return model


def _parse(body: bytes, header_length: str | None) -> tuple[InferRequest, bytes]:
    """The request, and the bytes of the binary extension behind it."""
    length = len(body)
    if header_length is not None:
        if not header_length.isdecimal() or len(header_length) > 12 or int(header_length) > len(body):
            raise ApiError(
                400,
                "bad_request",
                f"Inference-Header-Content-Length must be at most {len(body)}, the body's; got {header_length[:20]}",
            )
        length = int(header_length)
    return check_form(InferRequest, parse_json(body[:length])), body[length:]


def _images(given: InferInput, rest: bytes, model: ServedModel, most: int) -> list[bytes | Vector]:
    if _TYPES[given.name] != given.datatype:
        raise ApiError(422, "bad_request", f"{given.name} must be {_TYPES[given.name]}; got {given.datatype}")
    if min(given.shape) < 1:
        raise ApiError(422, "no_image", f"{given.name}: the shape {given.shape} holds nothing; send an image or more")
    side = model.extractor.config.preprocessing.image_size
    if given.name == "pixel_values" and given.shape[1:] != [3, side, side]:
        raise ApiError(422, "bad_request", f"pixel_values must be (n, 3, {side}, {side}); got {given.shape}")
    count = given.shape[0] if given.name == "pixel_values" else math.prod(given.shape)
    if count > most:
        raise ApiError(413, "too_many_images", f"{given.name} has {count:,} images; send at most {most:,} at once")
    size = given.parameters.binary_data_size
    if size is None:
        if given.data is None:
            raise ApiError(422, "bad_request", f"{given.name}: neither data nor binary_data_size is given")
        values: Any = _encoded(given, given.data) if given.name == "images" else _numbers(given, given.data)
    else:
        if given.data is not None or size != len(rest):
            raise ApiError(
                422,
                "bad_request",
                f"{given.name}: binary_data_size is {size}, and {len(rest)} bytes follow the request",
            )
        values = _split(given, rest) if given.name == "images" else _floats(given, rest)
    if given.name == "images":
        if len(values) != count:
            raise ApiError(422, "bad_request", f"images: the shape promises {count}, there are {len(values)}")
        return list(values)
    for index, value in enumerate(values):
        if not np.isfinite(value).all():
            raise ApiError(422, "bad_request", f"pixel_values[{index}]: not finite")
    return list(values)


def _encoded(given: InferInput, data: Any) -> list[bytes]:
    flat = [entry for row in data for entry in (row if isinstance(row, list) else [row])]
    images = []
    for index, entry in enumerate(flat):
        try:
            if not isinstance(entry, str):
                raise ValueError("expected base64 text")
            images.append(base64_bytes(entry))
        except ValueError as exc:
            raise ApiError(422, "unreadable_image", f"{given.name}[{index}]: {exc}") from None
    return images


def _numbers(given: InferInput, data: Any) -> NDArray[np.float32]:
    try:
        values = np.asarray(data)
        flat = values.ndim == 1 and values.size == math.prod(given.shape)
        if values.dtype.kind not in "iuf" or not (flat or list(values.shape) == given.shape):
            raise ValueError
        with np.errstate(over="ignore"):  # what float32 cannot hold is told below
            return values.astype(np.float32).reshape(given.shape)
    except (ValueError, TypeError, OverflowError):
        raise ApiError(
            422,
            "bad_request",
            f"pixel_values: data must hold {math.prod(given.shape):,} numbers for its shape {given.shape}",
        ) from None


def _split(given: InferInput, rest: bytes) -> list[bytes]:
    """BYTES of the binary extension: each after its length, 4 bytes, little-endian."""
    images: list[bytes] = []
    at = 0
    while at < len(rest):
        (size,) = struct.unpack_from("<I", rest, at) if at + 4 <= len(rest) else (len(rest),)
        at += 4
        if at + size > len(rest):
            raise ApiError(422, "bad_request", f"{given.name}[{len(images)}]: ends before its length")
        images.append(rest[at : at + size])
        at += size
    return images


def _floats(given: InferInput, rest: bytes) -> NDArray[np.float32]:
    if len(rest) != 4 * math.prod(given.shape):
        raise ApiError(
            422,
            "bad_request",
            f"pixel_values: {4 * math.prod(given.shape):,} bytes for its shape {given.shape}; got {len(rest):,}",
        )
    return np.frombuffer(rest, "<f4").reshape(given.shape).astype(np.float32, copy=False)


def _answer(asked: InferRequest, model: ServedModel, features: NDArray[np.float32]) -> Response:
    output: dict[str, Any] = {"name": "features", "datatype": "FP32", "shape": list(features.shape)}
    wanted = asked.outputs[0].parameters.binary_data if asked.outputs else None
    binary = asked.parameters.binary_data_output is True if wanted is None else wanted
    raw = features.astype("<f4", copy=False).tobytes() if binary else b""
    if binary:
        output["parameters"] = {"binary_data_size": len(raw)}
    else:
        output["data"] = features.ravel()
    about = {name: value for name, value in model.about.items() if name != "model" and value is not None}
    content = {"model_name": model.name, "model_version": model.version, "parameters": about, "outputs": [output]}
    if asked.id is not None:
        content["id"] = asked.id
    head = orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
    if not binary:
        return Response(head, media_type="application/json")
    return Response(head + raw, media_type=_BINARY, headers={_HEADER_LENGTH: str(len(head))})


def _json(content: dict[str, Any], status: int = 200) -> Response:
    return Response(orjson.dumps(content), status, media_type="application/json")
