"""Parses requests and makes replies of the Open Inference Protocol, without a server."""

from __future__ import annotations

import math
import struct
from collections.abc import Generator, Sequence
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from robustfeat.serving.online.answers import JSON, RAW, Answer, NamedModel, Reply, Vector, json_bytes
from robustfeat.serving.online.content import base64_bytes, check_form, parse_json
from robustfeat.serving.online.errors import ApiError
from robustfeat.serving.online.numbers import LongArray, finish, set_aside_in_turns
from robustfeat.serving.online.schemas import InferInput, InferRequest

__all__ = [
    "HEADER_LENGTH",
    "infer_images",
    "infer_images_in_turns",
    "infer_reply",
    "parse_infer",
    "parse_infer_in_turns",
]

HEADER_LENGTH = "inference-header-content-length"
_TYPES = {"images": "BYTES", "pixel_values": "FP32"}


def parse_infer(body: bytes, header_length: str | None) -> tuple[InferRequest, bytes]:
    """Runs `parse_infer_in_turns` without pauses."""
    return finish(parse_infer_in_turns(body, header_length))


def parse_infer_in_turns(body: bytes, header_length: str | None) -> Generator[None, None, tuple[InferRequest, bytes]]:
    """Parses a request and the bytes of its binary extension. Yields so that other requests get a turn.

    Args:
        body: the whole body.
        header_length: length of the JSON part, if the binary extension is used.

    Raises:
        ApiError: 400 or 422.
    """
    asked_of, rest = body, b""
    if header_length is not None:
        if not header_length.isdecimal() or len(header_length) > 12 or int(header_length) > len(body):
            raise ApiError(
                400,
                "bad_request",
                f"Inference-Header-Content-Length must be at most {len(body)}, the body's; got {header_length[:20]}",
            )
        asked_of, rest = body[: int(header_length)], body[int(header_length) :]
    aside = yield from set_aside_in_turns(asked_of)
    if aside is None:
        return check_form(InferRequest, parse_json(asked_of)), rest
    shortened, token, array = aside
    asked = check_form(InferRequest, parse_json(shortened))
    if asked.inputs[0].data != [token]:
        raise ApiError(422, "bad_request", "a long list of numbers must be the data of inputs[0]")
    asked.inputs[0].data = [array]
    return asked, rest


def infer_images(given: InferInput, rest: bytes, model: NamedModel, most: int) -> list[bytes | Vector]:
    """Runs `infer_images_in_turns` without pauses."""
    return finish(infer_images_in_turns(given, rest, model, most))


def infer_images_in_turns(
    given: InferInput, rest: bytes, model: NamedModel, most: int
) -> Generator[None, None, list[bytes | Vector]]:
    """The images of a request's input, for `Batcher.embed`. Yields so that other requests get a turn.

    Args:
        given: the input.
        rest: the bytes of the binary extension.
        model: the model to embed them.
        most: most images per request.

    Raises:
        ApiError: 413 or 422.
    """
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
    size = given.parameters.binary_data_size if given.parameters else None
    if size is None:
        if given.data is None:
            raise ApiError(422, "bad_request", f"{given.name}: neither data nor binary_data_size is given")
        values: Any = _encoded(given, given.data) if given.name == "images" else (yield from _numbers(given))
    else:
        if given.data is not None or size != len(rest):
            raise ApiError(
                422,
                "bad_request",
                f"{given.name}: binary_data_size is {size}, and {len(rest)} bytes follow the request",
            )
        values = _split(given, rest, most) if given.name == "images" else _floats(given, rest)
    if given.name == "images":
        if len(values) != count:
            _refuse_count(given, len(values))
        return list(values)
    for index, value in enumerate(values):
        if not np.isfinite(value).all():
            raise ApiError(422, "bad_request", f"pixel_values[{index}]: not finite")
    return list(values)


def _refuse_count(given: InferInput, count: int) -> NoReturn:
    promised = math.prod(given.shape)
    raise ApiError(422, "bad_request", f"{given.name}: the shape promises {promised}, there are {count}")


def _encoded(given: InferInput, data: Any) -> list[bytes]:
    flat = [entry for row in data for entry in (row if isinstance(row, list) else [row])]
    if len(flat) != math.prod(given.shape):
        _refuse_count(given, len(flat))
    images = []
    for index, entry in enumerate(flat):
        try:
            if not isinstance(entry, str):
                raise ValueError("expected base64 text")
            images.append(base64_bytes(entry))
        except ValueError as exc:
            raise ApiError(422, "unreadable_image", f"{given.name}[{index}]: {exc}") from None
    return images


def _numbers(given: InferInput) -> Generator[None, None, NDArray[np.float32]]:
    try:
        if given.data is not None and len(given.data) == 1 and isinstance(given.data[0], LongArray):
            return (yield from given.data[0].read(given.shape))
        values = np.asarray(given.data)
        flat = values.ndim == 1 and values.size == math.prod(given.shape)
        if values.dtype.kind not in "iuf" or not (flat or list(values.shape) == given.shape):
            raise ValueError
        with np.errstate(over="ignore"):  # numbers beyond float32 are reported below
            return values.astype(np.float32).reshape(given.shape)
    except (ValueError, TypeError, OverflowError):
        raise ApiError(
            422,
            "bad_request",
            f"pixel_values: data must hold {math.prod(given.shape):,} numbers for its shape {given.shape}",
        ) from None


def _split(given: InferInput, rest: bytes, most: int) -> list[bytes]:
    """Splits BYTES of the binary extension, each preceded by its length, 4 bytes, little-endian."""
    images: list[bytes] = []
    at = 0
    while at < len(rest):
        (size,) = struct.unpack_from("<I", rest, at) if at + 4 <= len(rest) else (len(rest),)
        at += 4
        if at + size > len(rest):
            raise ApiError(422, "bad_request", f"{given.name}[{len(images)}]: ends before its length")
        if len(images) == most:
            raise ApiError(413, "too_many_images", f"{given.name} has more than {most:,} images; send less at once")
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


def infer_reply(asked: InferRequest, model: NamedModel, answers: Sequence[Answer]) -> Reply:
    """Makes a reply with the features of a request's images.

    Raises:
        ApiError: 422. One unreadable image fails the whole request, as the protocol's clients expect.
        Exception: a server's error, as it is.
    """
    name = asked.inputs[0].name
    rows: list[Vector] = []
    for index, answer in enumerate(answers):
        if answer.failure is not None:
            raise answer.failure
        if answer.features is None:
            code = "bad_request" if name == "pixel_values" else "unreadable_image"
            raise ApiError(422, code, f"{name}[{index}]: {answer.problem}")
        rows.append(answer.features)
    features = np.stack(rows)
    output: dict[str, Any] = {"name": "features", "datatype": "FP32", "shape": list(features.shape)}
    wanted = asked.outputs[0].parameters if asked.outputs else None
    binary = bool(asked.parameters and asked.parameters.binary_data_output)
    if wanted is not None and wanted.binary_data is not None:
        binary = wanted.binary_data
    raw = features.astype("<f4", copy=False).tobytes() if binary else b""
    if binary:
        output["parameters"] = {"binary_data_size": len(raw)}
    else:
        output["data"] = features.ravel()
    about = {name: value for name, value in model.about.items() if name != "model" and value is not None}
    content = {"model_name": model.name, "model_version": model.version, "parameters": about, "outputs": [output]}
    if asked.id is not None:
        content["id"] = asked.id
    head = json_bytes(content)
    if not binary:
        return Reply(head, JSON)
    return Reply(head + raw, RAW, {HEADER_LENGTH: str(len(head))})
