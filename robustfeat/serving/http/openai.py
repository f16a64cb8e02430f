"""Serves OpenAI's embeddings API, with images instead of texts."""

from __future__ import annotations

import base64
from typing import Any, NoReturn

from fastapi import Request
from fastapi.responses import Response

from robustfeat.serving.http.bodies import read_body
from robustfeat.serving.http.documents import json_body, refusals
from robustfeat.serving.http.routes import Routes
from robustfeat.serving.http.service import Service
from robustfeat.serving.online.answers import JSON, Vector, json_bytes
from robustfeat.serving.online.content import check_form, data_of_uri, parse_json
from robustfeat.serving.online.errors import ApiError
from robustfeat.serving.online.schemas import ModelList, OpenAIEmbeddings, OpenAIRequest

__all__ = ["add_routes"]

_TAGS: list[Any] = ["OpenAI's protocol"]


def add_routes(routes: Routes, service: Service) -> None:
    """Adds the routes under /v1."""

    @routes.post(
        "/v1/embeddings",
        tags=_TAGS,
        summary="Features of images as data URIs",
        openapi_extra=json_body(OpenAIRequest),
        response_model=OpenAIEmbeddings,
        responses=refusals(400, 401, 404, 408, 413, 415, 422, 429, 503),
    )
    async def embeddings(request: Request) -> Response:
        """One unreadable image fails the whole request, as OpenAI's clients expect."""
        key = request.scope["state"]["key"]
        with service.buffered.body(key) as held:
            body = await read_body(request, held)
            asked, inputs = _parse(body, service.limits.max_items)
            model = service.model(asked.model)
            size = model.extractor.feature_size
            if asked.dimensions not in {None, size}:
                raise ApiError(
                    422, "dimensions", f"the model gives {size} dimensions; leave dimensions out", param="dimensions"
                )
            if not inputs:
                raise ApiError(422, "no_image", "input is empty; send an image or more", param="input")
            images = []
            for index, text in enumerate(inputs):
                try:
                    images.append(data_of_uri(text))
                except ValueError as exc:
                    _refuse(index, str(exc))
            # Free unneeded memory before waiting for others.
            body, asked.input = b"", ""
            inputs.clear()
            answers = await service.embed(model, images, key)
        as_text = asked.encoding_format == "base64"
        data = []
        for index, answer in enumerate(answers):
            if answer.failure is not None:
                raise answer.failure
            if answer.features is None:
                _refuse(index, str(answer.problem))
            embedding = _base64(answer.features) if as_text else answer.features
            data.append({"object": "embedding", "index": index, "embedding": embedding})
        usage = {"prompt_tokens": 0, "total_tokens": 0}
        content = {"object": "list", "data": data, **model.about, "usage": usage}
        return Response(json_bytes(content), media_type=JSON)

    @routes.get("/v1/models", tags=_TAGS, summary="The models", response_model=ModelList, responses=refusals(401))
    async def models(_: Request) -> Response:
        entries = [{"id": name, "object": "model", "created": 0, "owned_by": "robustfeat"} for name in service.models]
        return Response(json_bytes({"object": "list", "data": entries}), media_type=JSON)


def _parse(body: bytes, most: int) -> tuple[OpenAIRequest, list[str]]:
    """Parses the request, with its images as texts."""
    content = parse_json(body)
    texts = content.get("input") if isinstance(content, dict) else None
    if isinstance(texts, list):
        # Check by hand, so errors name the length of a long list, and the number of a wrong entry.
        if len(texts) > most:
            raise ApiError(
                413, "too_many_images", f"input has {len(texts):,} images; send at most {most:,} at once", param="input"
            )
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                _refuse(index, "expected a data URI as text")
    asked = check_form(OpenAIRequest, content)
    return asked, asked.input if isinstance(asked.input, list) else [asked.input]


def _refuse(index: int, reason: str) -> NoReturn:
    raise ApiError(422, "unreadable_image", f"input[{index}]: {reason}", param=f"input[{index}]")


def _base64(vector: Vector) -> str:
    return base64.b64encode(vector.astype("<f4", copy=False).tobytes()).decode()
