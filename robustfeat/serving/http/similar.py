"""Serves /similar, which finds a collection's images most similar to a request's images."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

import numpy as np
from fastapi import Path, Request
from fastapi.responses import Response
from threadpoolctl import threadpool_limits

from robustfeat.errors import InputError
from robustfeat.serving.collections.directions import Directions
from robustfeat.serving.collections.neighbours import Neighbours, find_neighbours
from robustfeat.serving.heads.features import Features
from robustfeat.serving.http.bodies import images_of, read_body
from robustfeat.serving.http.documents import IMAGE_BODY, refusals
from robustfeat.serving.http.routes import Routes
from robustfeat.serving.http.service import ServedModel, Service
from robustfeat.serving.inputs.sources import path_fields
from robustfeat.serving.online.answers import JSON, Vector, failed_item, json_bytes, require_one
from robustfeat.serving.online.errors import ApiError
from robustfeat.serving.online.schemas import Similar

__all__ = ["ServedCollection", "add_routes", "match_collections", "match_model"]

_MOST = 1000
_DEFAULT = 10
_NUMBER: dict[str, Any] = {
    "name": "k",
    "in": "query",
    "required": False,
    "description": "Images to find per image. A field of the form does the same.",
    "schema": {"type": "integer", "minimum": 1, "maximum": _MOST, "default": _DEFAULT},
}


class ServedCollection:
    """A collection with its model.

    Searches of a worker run one after the other in a thread, since each uses all processors of the worker.

    Args:
        features: the collection.
        model: the model of the features.
        processors: number of threads per search.
    """

    _searches = ThreadPoolExecutor(1, "similar")

    def __init__(self, features: Features, model: ServedModel, processors: int) -> None:
        self.rows, self.model = Directions(features), model
        self._processors = processors

    async def find(self, vectors: Sequence[Vector], k: int) -> Neighbours:
        """The k nearest rows to each vector. If the client disconnects, a waiting search is skipped."""
        return await asyncio.get_running_loop().run_in_executor(self._searches, self._find, vectors, k)

    def _find(self, vectors: Sequence[Vector], k: int) -> Neighbours:
        with threadpool_limits(self._processors):
            return find_neighbours(self.rows, np.stack(vectors), k)


def match_collections(
    collections: Mapping[str, Features], models: Sequence[ServedModel], processors: int
) -> dict[str, ServedCollection]:
    """Matches each collection with its model.

    Raises:
        InputError: no model did.
    """
    return {
        name: ServedCollection(features, match_model(f"the collection {name}", features, models), processors)
        for name, features in collections.items()
    }


def match_model(what: str, features: Features, models: Sequence[ServedModel]) -> ServedModel:
    """The model that made the features; `what` names them.

    Raises:
        InputError: no model did.
    """
    made_by = features.model
    fitting = [model for model in models if made_by and made_by.same_features(model.identity)]
    if made_by and not fitting:
        made_by.require(models[0].identity, what, "the model served")
    if not fitting:
        raise InputError(f"{what}: of an unknown model", fix="embed the images with a model served")
    return fitting[0]


def add_routes(routes: Routes, service: Service, collections: Mapping[str, ServedCollection]) -> None:
    """Adds POST /similar/NAME, if there are collections."""

    @routes.post(
        "/similar/{collection}",
        tags=["images"],
        summary="The images of a collection that are most like images",
        openapi_extra={**IMAGE_BODY, "parameters": [_NUMBER]},
        response_model=Similar,
        responses=refusals(400, 401, 404, 408, 413, 415, 422, 429, 503),
    )
    async def similar(request: Request, collection: Annotated[str, Path(description="Of those served.")]) -> Response:
        """Takes images like /embed. The nearest rows come first, and the smaller row among equal cosines."""
        chosen = _collection(collections, collection)
        key = request.scope["state"]["key"]
        with service.buffered.body(key) as held:
            body = await read_body(request, held)
            images, fields = images_of(request.headers.get("content-type", ""), body, service.limits.max_items)
            k = _number(request.query_params.get("k", fields.get("k")))
            with service.admission.enter(key, len(images)):
                answers = await service.embed_admitted(chosen.model, images, key)
                require_one(answers)
                good = {at: answer.features for at, answer in enumerate(answers) if answer.features is not None}
                found = await chosen.find(list(good.values()), k)
        data = [failed_item(at, answer) for at, answer in enumerate(answers) if at not in good]
        for place, at in enumerate(good):
            data.insert(at, {"index": at, "matches": _matches(chosen.rows.features, found, place)})
        content = {**chosen.model.about, "collection": collection, "data": data}
        return Response(json_bytes(content), media_type=JSON)


def _collection(collections: Mapping[str, ServedCollection], name: str) -> ServedCollection:
    if name not in collections:
        served = ", ".join(collections) or "none"
        raise ApiError(
            404,
            "collection_not_found",
            f"no collection {name[:100]!r} is served; there is {served}",
            param="collection",
        )
    return collections[name]


def _number(text: str | None) -> int:
    if text is None:
        return _DEFAULT
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and 1 <= int(text) <= _MOST):
        raise ApiError(422, "bad_request", f"k must be a number from 1 to {_MOST:,}; got {text[:40]!r}", param="k")
    return int(text)


def _matches(features: Features, found: Neighbours, place: int) -> list[dict[str, Any]]:
    pairs = zip(found.rows[place].tolist(), found.cosines[place].tolist(), strict=True)
    return [{"row": row, **path_fields(features.paths[row]), "cosine": cosine} for row, cosine in pairs if row >= 0]
