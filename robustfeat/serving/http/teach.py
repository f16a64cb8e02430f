"""Serves /teach, which fits a head on labelled features. The server keeps neither, so any worker can respond."""

from __future__ import annotations

import unicodedata

import numpy as np
import orjson
from fastapi import Request
from fastapi.responses import Response

from robustfeat.serving.http.bodies import read_body
from robustfeat.serving.http.documents import ACCEPT_HEAD, json_body, refusals
from robustfeat.serving.http.process.fitter import Fitter
from robustfeat.serving.http.routes import Routes
from robustfeat.serving.http.service import ServedModel, Service
from robustfeat.serving.online.answers import JSON, ZIP, Vector, choose_type, json_bytes
from robustfeat.serving.online.content import base64_bytes, check_form, parse_json
from robustfeat.serving.online.errors import ApiError
from robustfeat.serving.online.schemas import TaughtHead, TeachRequest

__all__ = ["add_routes"]

_NAME_CHARACTERS = 200


def add_routes(routes: Routes, service: Service, fitter: Fitter) -> None:
    """Adds /teach."""

    @routes.post(
        "/teach",
        tags=["heads"],
        summary="A head for labelled features",
        openapi_extra={**json_body(TeachRequest), "parameters": [ACCEPT_HEAD]},
        response_model=TaughtHead,
        responses={
            200: {"content": {ZIP: {"schema": {"type": "string", "format": "binary"}}}},
            **refusals(400, 401, 404, 406, 408, 413, 415, 422, 429, 503),
        },
    )
    async def teach(request: Request) -> Response:
        """A linear SVM: its numbers, or as application/zip a folder that the server can serve."""
        kind = choose_type(request.headers.get("accept", ""), (JSON, ZIP))
        key = request.scope["state"]["key"]
        with service.buffered.body(key) as held:
            asked = check_form(TeachRequest, parse_json(await read_body(request, held)))
            model = service.model(asked.model)
            values = _checked(asked, model)
            rows = {"labels": asked.labels, "classes": asked.classes, "model": model.identity.to_head()}
            with service.admission.enter(key, 1):
                answer = await fitter.fit(
                    {**rows, "archive": kind == ZIP, "name": asked.name}, values.tobytes(), key.name
                )
        if kind == ZIP:
            return Response(
                answer, media_type=ZIP, headers={"content-disposition": f'attachment; filename="{asked.name}.zip"'}
            )
        return Response(json_bytes({**model.about, **orjson.loads(answer)}), media_type=JSON)


def _checked(asked: TeachRequest, model: ServedModel) -> Vector:
    """Checks the rows of a request, (n, D) float32.

    Raises:
        ApiError: 422 with the error.
    """
    for number, name in enumerate(asked.classes):
        controls = any(unicodedata.category(character) == "Cc" for character in name)
        if not 1 <= len(name) <= _NAME_CHARACTERS or controls or not name.strip():
            what = f"must have 1 to {_NAME_CHARACTERS} characters, and no control characters"
            raise _refusal(f"classes.{number}", f"{what}; got {len(name):,} characters: {name[:40]!r}")
    if len(set(asked.classes)) < len(asked.classes):
        raise _refusal("classes", "must be different from each other")
    count, size = len(asked.labels), model.extractor.feature_size
    outside = next((label for label in asked.labels if not 0 <= label < len(asked.classes)), None)
    if outside is not None:
        raise _refusal("labels", f"must be from 0 to {len(asked.classes) - 1}; got {outside}")
    if len(set(asked.labels)) < 2:
        raise _refusal("labels", f"must be of two classes or more; all are of {asked.classes[asked.labels[0]]!r}")
    expected = 4 * count * size
    data = b""
    try:
        if len(asked.features) < 2 * expected:  # with line breaks; decoding more would delay other requests
            data = base64_bytes(asked.features)
    except ValueError:
        raise _refusal("features", "must be base64 of float32") from None
    if len(data) != expected:
        got = len(data) or len(asked.features) * 3 // 4
        raise _refusal("features", f"must be {count:,} rows of {size:,} float32, {expected:,} bytes; got {got:,}")
    values = np.frombuffer(data, "<f4").reshape(count, size)
    bad = np.flatnonzero(~np.isfinite(values).all(1))
    if len(bad):
        raise _refusal("features", f"must be finite; row {bad[0]} is not")
    return values


def _refusal(place: str, message: str) -> ApiError:
    return ApiError(422, "bad_request", f"{place}: {message}", param=place)
