"""An HTTP endpoint: image bytes in, features or a head's answer out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from numpy.typing import NDArray
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect

import robustfeat
from robustfeat.errors import DecodeError
from robustfeat.serving.cpus import available_cpus
from robustfeat.serving.extractor import FeatureExtractor
from robustfeat.serving.heads.head import Head
from robustfeat.serving.heads.identity import ModelIdentity
from robustfeat.serving.heads.predictions import Prediction, answer_of, labels_of

__all__ = ["MAX_BODY_BYTES", "create_app"]

MAX_BODY_BYTES = 32 * 2**20

_IMAGE_BODY = {
    "requestBody": {
        "required": True,
        "description": "The bytes of one image file: JPEG, PNG, WebP, GIF, BMP or TIFF.",
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}


def create_app(
    extractor: FeatureExtractor,
    heads: Mapping[str, Head],
    *,
    model_name: str = "robustfeat",
    max_body_bytes: int = MAX_BODY_BYTES,
) -> FastAPI:
    """The application, for any ASGI server.

    Args:
        extractor: the model.
        heads: by the name under which `/predict/NAME` serves them.
        model_name: what answers call the model.
        max_body_bytes: larger bodies are refused with 413.

    Raises:
        InputError: a head is for another model.
    """
    identity = ModelIdentity.of_extractor(extractor)
    for name, head in heads.items():
        head.require_model(identity, f"--head {name}", "the model served")
    # The model has all processors: one batch at a time. Images are decoded beside it.
    model_thread = ThreadPoolExecutor(1, "model")
    decoders = ThreadPoolExecutor(available_cpus(), "decode")
    about = {"model": model_name, "revision": identity.revision, "precision": identity.precision}

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        side = extractor.config.preprocessing.image_size
        await in_thread(model_thread, extractor.embed_prepared, np.zeros((1, side, side, 3), np.uint8))
        yield
        model_thread.shutdown()
        decoders.shutdown()

    async def features_of(request: Request) -> NDArray[np.float32]:
        body = await _body(request, max_body_bytes)
        try:
            square = await in_thread(decoders, extractor.prepare, body)
        except DecodeError as exc:
            raise HTTPException(422, f"the body is no image that can be read: {exc}") from exc
        features: NDArray[np.float32] = await in_thread(model_thread, extractor.embed_prepared, square[None])
        return features

    app = FastAPI(title="robustfeat", version=robustfeat.__version__, lifespan=lifespan)
    app.add_exception_handler(StarletteHTTPException, _explain)
    app.add_exception_handler(Exception, _explain)

    @app.post("/embed", summary="Features of one image", openapi_extra=_IMAGE_BODY)
    async def embed(request: Request) -> dict[str, Any]:
        features = await features_of(request)
        return {**about, "data": [{"index": 0, "embedding": features[0].tolist()}]}

    @app.post("/predict/{head}", summary="A head's answer for one image", openapi_extra=_IMAGE_BODY)
    async def predict(head: str, request: Request) -> dict[str, Any]:
        if head not in heads:
            raise HTTPException(404, f"no head {head!r} is served; there is {', '.join(heads) or 'none'}")
        chosen = heads[head]
        margins = chosen.margins(await features_of(request))
        shares = chosen.calibrate(margins)[0] if chosen.calibrated else None
        one = Prediction("", labels_of(chosen, chosen.decide(margins)[0]), margins[0], shares)
        answer = answer_of(chosen, one)
        del answer["path"], answer["error"]
        return {**about, "head": head, "data": [{"index": 0, **answer}]}

    @app.get("/health/live", summary="Whether the process answers")
    async def live() -> dict[str, str]:
        return {"status": "live"}

    return app


async def in_thread(pool: ThreadPoolExecutor, function: Any, *arguments: Any) -> Any:
    """Runs a function in a pool, off the event loop."""
    return await asyncio.get_running_loop().run_in_executor(pool, function, *arguments)


async def _body(request: Request, limit: int) -> bytes:
    too_large = HTTPException(413, f"the body must be at most {limit:,} bytes")
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > limit:
        raise too_large
    parts: list[bytes] = []
    size = 0
    try:
        async for part in request.stream():
            size += len(part)
            if size > limit:
                raise too_large
            parts.append(part)
    except ClientDisconnect as exc:
        raise HTTPException(400, "the client left before the end of the body") from exc
    if not size:
        raise HTTPException(422, "the body is empty; expected the bytes of an image file")
    return b"".join(parts)


async def _explain(_: Request, exc: Exception) -> JSONResponse:
    """Errors in the form of OpenAI's, which clients know."""
    status = exc.status_code if isinstance(exc, StarletteHTTPException) else 500
    message = str(exc.detail) if isinstance(exc, StarletteHTTPException) else "internal error"
    headers = exc.headers if isinstance(exc, StarletteHTTPException) else None
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": status}}, status, headers)
