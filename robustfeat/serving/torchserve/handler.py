"""Handles requests inside a worker of TorchServe. `archive` packs it with the model and the needed modules.

TorchServe passes a batch of requests and expects as many responses. A request is one image, a form of several images,
or a request of the Open Inference Protocol. All images go to one `Batcher`, so a bad image only fails itself, even if
it crashes or hangs a decoder. Responses have the formats of `robustfeat serve`.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from http import HTTPStatus
from pathlib import Path
from typing import Any

import orjson

from robustfeat.errors import EngineError, RobustFeatError
from robustfeat.hub.folder import ModelFolder
from robustfeat.serving.engines.options import RunOptions
from robustfeat.serving.extractor import FeatureExtractor
from robustfeat.serving.online.answers import (
    JSON,
    VECTOR_TYPES,
    Answer,
    NamedModel,
    Reply,
    Vector,
    choose_type,
    require_one,
    vectors_reply,
)
from robustfeat.serving.online.batching import Batcher
from robustfeat.serving.online.errors import ApiError, error_answer, timed_out
from robustfeat.serving.online.infer import HEADER_LENGTH, infer_images, infer_reply, parse_infer
from robustfeat.serving.verify import golden_answers
from robustfeat.system import available_cpus

__all__ = ["MODEL_FOLDER", "SETTINGS", "Handler", "Settings", "handle", "visible_gpu"]

MODEL_FOLDER = "model"
"""Folder of the model in an archive."""

SETTINGS = "robustfeat"
"""The key of `Settings` in TorchServe's model-config.yaml."""

_IMAGE_PARTS = {"body", "data", "image", "images"}


@dataclass(frozen=True)
class Settings:
    """How to serve an archive's model.

    Attributes:
        options: how to run it. The revision is the commit on the Hub in the archive.
        workers: number of workers that share the machine's processors.
        max_items, max_body_bytes, max_pixels: most images per request, largest request body, and largest image.
        timeout_s: longest time from a worker's receipt of a request to its response.
        decode_timeout_s: time limit to decode one image.
    """

    options: RunOptions
    workers: int
    max_items: int
    max_body_bytes: int
    max_pixels: int
    timeout_s: float
    decode_timeout_s: float

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Settings:
        """Reverses `dataclasses.asdict`."""
        return cls(**{**data, "options": RunOptions(**data["options"])})


@dataclass(frozen=True)
class _ParsedRequest:
    """A request's images, and the function that makes the reply of their results."""

    images: Sequence[bytes | Vector]
    reply: Callable[[Sequence[Answer]], Reply]


class _NoMetrics:
    """`BatchMetrics` that count nothing, since TorchServe has its own metrics."""

    def add_queue(self, length: Callable[[], float]) -> None:
        pass

    def decoded(self, waited_s: float, seconds: float) -> None:
        pass

    def ran(self, seconds: float, count: int) -> None:
        pass


class Handler:
    """A worker's model, ready for requests.

    Args:
        folder: the model.
        name: the served name.
        settings: how to serve it.

    Raises:
        RobustFeatError: the model cannot be loaded, or does not reproduce its golden features.
    """

    def __init__(self, folder: ModelFolder, name: str, settings: Settings) -> None:
        processors, options = max(1, available_cpus() // settings.workers), settings.options
        folder.revision = options.revision
        extractor = FeatureExtractor.open(folder, replace(options, threads=options.threads or processors))
        self.model = NamedModel(name, extractor)
        self._settings = settings
        self._batcher = Batcher(
            extractor,
            _NoMetrics(),
            max_pixels=settings.max_pixels,
            decode_timeout_s=settings.decode_timeout_s,
            decoders=processors,
            batch_size=extractor.batch_size,
        )
        self._batcher.__enter__()  # open until TorchServe ends this process and its decoders
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="loop", daemon=True).start()
        self._loop.call_soon_threadsafe(self._batcher.attach)
        self._check()

    def answer(self, requests: Sequence[Mapping[str, Any]], context: Any) -> list[bytes]:
        """Handles a batch of requests. Status, type and headers of each response go to TorchServe's `context`.

        Args:
            requests: the parts of each by name: `body`, or the parts of a form.
            context: the context of TorchServe.
        """
        asked = [self._take(request, context.get_all_request_header(at)) for at, request in enumerate(requests)]
        answers = self._embed([[] if isinstance(request, Exception) else request.images for request in asked])
        bodies = []
        for at, (request, found) in enumerate(zip(asked, answers, strict=True)):
            try:
                for outcome in (request, found):
                    if isinstance(outcome, Exception):
                        raise outcome
                reply = request.reply(found)  # type: ignore[union-attr, arg-type]
            except Exception as exc:
                bodies.append(_refuse(exc, at, context))
                continue
            context.set_response_content_type(at, reply.media_type)
            for name, text in reply.headers.items():
                context.set_response_header(at, name, text)
            bodies.append(reply.body)
        every = [answer for found in answers if not isinstance(found, Exception) for answer in found]
        good = sum(answer.features is not None for answer in every)
        _count(context, {"good": good, "failed": len(every) - good})
        return bodies

    def _check(self) -> None:
        """Embeds the golden images in the same way as a client's images."""
        images, expected = golden_answers(self.model.extractor)
        (answers,) = self._embed([images])
        if isinstance(answers, Exception):
            raise EngineError(f"the golden images were not embedded ({answers})")
        for answer, right in zip(answers, expected, strict=True):
            self.model.require_golden(answer, right)

    def _embed(self, groups: Sequence[Sequence[bytes | Vector]]) -> list[list[Answer] | ApiError]:
        """Embeds several requests, whose images share batches and take turns, or times them out."""

        async def embed_group(number: int, group: Sequence[bytes | Vector]) -> list[Answer] | ApiError:
            if not group:
                return []
            try:
                return await asyncio.wait_for(self._batcher.embed(group, str(number)), self._settings.timeout_s)
            except TimeoutError:
                return timed_out(self._settings.timeout_s)

        async def embed() -> list[list[Answer] | ApiError]:
            return await asyncio.gather(*(embed_group(number, group) for number, group in enumerate(groups)))

        return asyncio.run_coroutine_threadsafe(embed(), self._loop).result()

    def _take(self, parts: Mapping[str, Any], headers: Mapping[str, Any]) -> _ParsedRequest | Exception:
        try:
            return self._parse(parts, {name.lower(): value for name, value in headers.items()})
        except Exception as exc:  # an error must fail only its own request
            return exc

    def _parse(self, parts: Mapping[str, Any], headers: Mapping[str, Any]) -> _ParsedRequest:
        body = parts.get("body")
        kind = str(headers.get("content-type", "")).partition(";")[0].strip().lower()
        if body is not None and (HEADER_LENGTH in headers or kind == JSON):
            most = self._settings.max_items
            asked, rest = parse_infer(_bytes(body), headers.get(HEADER_LENGTH))
            images = infer_images(asked.inputs[0], rest, self.model, most)
            return _ParsedRequest(images, lambda answers: infer_reply(asked, self.model, answers))
        form = choose_type(str(headers.get("accept", "")), VECTOR_TYPES)
        found = [_bytes(part) for name, part in parts.items() if _is_image(name, headers)]
        if not any(found):
            raise ApiError(422, "no_image", "no image came; send one as the body, or several as a form's files")
        if len(found) > self._settings.max_items:
            message = f"the request has more than {self._settings.max_items:,} images; send less at once"
            raise ApiError(413, "too_many_images", message)

        def reply(answers: Sequence[Answer]) -> Reply:
            require_one(answers)
            return vectors_reply(self.model, answers, form)

        return _ParsedRequest(found, reply)


_handler: Handler | None = None


def handle(requests: Sequence[Mapping[str, Any]] | None, context: Any) -> list[bytes] | None:
    """The entry point for TorchServe, called once without requests to load the model, then once per batch."""
    global _handler  # noqa: PLW0603 - TorchServe keeps no object of ours
    if requests is not None and _handler is not None:
        return _handler.answer(requests, context)
    properties, config = context.system_properties, context.model_yaml_config
    if properties.get("gpu_id") is not None:  # before the engine finds its GPU
        os.environ["CUDA_VISIBLE_DEVICES"] = visible_gpu(properties["gpu_id"], os.environ.get("CUDA_VISIBLE_DEVICES"))
    _keep_parts()
    try:
        folder = ModelFolder(Path(properties["model_dir"], MODEL_FOLDER))
        _handler = Handler(folder, context.model_name, Settings.from_dict(config[SETTINGS]))
    except RobustFeatError as exc:
        raise RuntimeError(f"robustfeat: {exc}") from exc  # TorchServe reports this error
    return None


def visible_gpu(number: int, visible: str | None) -> str:
    """The value of CUDA_VISIBLE_DEVICES for a GPU, by TorchServe's number among the visible ones."""
    listed = [entry.strip() for entry in (visible or "").split(",") if entry.strip()]
    return listed[number % len(listed)] if listed else str(number)


def _keep_parts() -> None:
    """Lets parts of a form share a name. TorchServe keeps parts by name, so only the last one would remain."""
    from ts.service import Service

    original = Service.retrieve_data_for_inference

    def retrieve(batch: Sequence[dict[str, Any]]) -> Any:
        for request in batch:
            seen: Counter[str] = Counter()
            for part in request["parameters"]:
                seen[part["name"]] += 1
                if seen[part["name"]] > 1:
                    part["name"] += f"#{seen[part['name']]}"
        return original(batch)

    Service.retrieve_data_for_inference = staticmethod(retrieve)


def _is_image(name: str, headers: Mapping[str, Any]) -> bool:
    """Whether a part is a file, or has a name for images. Other fields are ignored."""
    about = headers.get(name.lower())
    return name.partition("#")[0] in _IMAGE_PARTS or (isinstance(about, dict) and bool(about.get("content-type")))


def _bytes(part: Any) -> bytes:
    """A part's bytes as sent. By default, TorchServe converts text and JSON to Python objects."""
    if isinstance(part, (bytes, bytearray)):
        return bytes(part)
    return part.encode() if isinstance(part, str) else orjson.dumps(part)


def _refuse(exc: Exception, at: int, context: Any) -> bytes:
    """The error of request `at`, in the format of its protocol."""
    if not isinstance(exc, ApiError):
        traceback.print_exception(exc, file=sys.stdout)  # to TorchServe's log
        exc = ApiError(500, "internal", "the model failed; try again")
    context.set_response_status(exc.status, HTTPStatus(exc.status).phrase, at)
    context.set_response_content_type(at, JSON)
    for name, text in exc.headers.items():
        context.set_response_header(at, name, text)
    # TorchServe passes the path only for its own routes.
    headers = context.get_all_request_header(at)
    return error_answer(exc, "/predictions" if "url_path" in headers else "/v2")


def _count(context: Any, numbers: Mapping[str, int]) -> None:
    from ts.metrics.dimension import Dimension

    for outcome, number in numbers.items():
        if number:
            context.metrics.add_counter("robustfeat_images", number, dimensions=[Dimension("outcome", outcome)])
