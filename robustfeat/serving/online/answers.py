"""Results of a request's images, and replies made of them, for HTTP and TorchServe."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from robustfeat.errors import EngineError
from robustfeat.serving.extractor import FeatureExtractor
from robustfeat.serving.online.errors import ApiError, failure_object, problem_object
from robustfeat.serving.verify import compare

__all__ = [
    "BINARY_HEADERS",
    "JSON",
    "NPY",
    "RAW",
    "VECTOR_TYPES",
    "ZIP",
    "Answer",
    "NamedModel",
    "Reply",
    "Vector",
    "choose_type",
    "failed_item",
    "json_bytes",
    "require_one",
    "vectors_reply",
]

Vector = NDArray[np.float32]

JSON, NPY, RAW = "application/json", "application/x-npy", "application/octet-stream"
VECTOR_TYPES = (JSON, NPY, RAW)
ZIP = "application/zip"

_ACCEPT_CHARACTERS = 4096
"""Longest accepted Accept header, in characters. A longer one takes longer to parse than an image."""

BINARY_HEADERS = {
    "Model": "The name of the model.",
    "Revision": "Its commit on the Hub, if there is one.",
    "Precision": "fp32, fp16, bf16 or int8.",
    "Shape": "Rows and columns, as 3,512.",
    "Failed": "Numbers of the failed rows, as 0,2. Their values are NaN.",
}


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """The result of one image. Exactly one attribute is set.

    Attributes:
        features: (D,) float32.
        problem: why the image cannot be read, a client's error.
        failure: the exception of a server's error.
    """

    features: Vector | None = None
    problem: str | None = None
    failure: Exception | None = None

    @property
    def error(self) -> str:
        """The problem or the failure as text. Empty for features."""
        return repr(self.failure) if self.failure is not None else self.problem or ""


class NamedModel:
    """A model under its served name.

    Attributes:
        name: the served name.
        extractor: the model.
        identity: the model's identity, and how it runs.
        about: facts in every reply.
        version: the folder's version, for the Open Inference Protocol.
    """

    def __init__(self, name: str, extractor: FeatureExtractor) -> None:
        self.name, self.extractor, self.version = name, extractor, extractor.folder.version
        self.identity = extractor.identity
        self.about = {"model": name, **self.identity.values("revision", "precision")}

    def require_golden(self, answer: Answer, expected: Vector) -> None:
        """Refuses a wrong result for a golden image, whose features are `expected`, (D,).

        Raises:
            EngineError: the result has no features, or others.
        """
        if answer.features is None:
            raise EngineError(f"{self.name}: a golden image was not embedded ({answer.error})")
        way = self.identity.values("engine", "precision", "decoding")
        check = compare(answer.features[None], expected[None], **way)
        if check.short:
            raise EngineError(
                f"{self.name}: the cosine to a golden image's features must be {check.needed}; got {check.cosine:.4f}"
            )


@dataclass(frozen=True)
class Reply:
    """A reply of status 200."""

    body: bytes
    media_type: str
    headers: dict[str, str] = field(default_factory=dict)


def vectors_reply(model: NamedModel, answers: Sequence[Answer], kind: str) -> Reply:
    """Makes a reply with the features of a request's images, and an error or a row of NaN per failed image.

    Args:
        model: the model of the features.
        answers: the results of the images.
        kind: the media type, one of `VECTOR_TYPES`.
    """
    if kind == JSON:
        data = [
            {"index": at, "embedding": answer.features} if answer.features is not None else failed_item(at, answer)
            for at, answer in enumerate(answers)
        ]
        return Reply(json_bytes({**model.about, "data": data}), JSON)
    values = np.full((len(answers), model.extractor.feature_size), np.nan, "<f4")
    failed = []
    for at, answer in enumerate(answers):
        if answer.features is not None:
            values[at] = answer.features
        else:
            failed.append(str(at))
    about = {
        "Model": model.name,
        "Revision": model.about["revision"] or "",
        "Precision": model.extractor.precision,
        "Shape": f"{values.shape[0]},{values.shape[1]}",
        "Failed": ",".join(failed),
    }
    headers = {f"x-robustfeat-{name.lower()}": text for name, text in about.items() if text}
    if kind == RAW:
        return Reply(values.tobytes(), RAW, headers)
    file = io.BytesIO()
    np.save(file, values)
    return Reply(file.getvalue(), NPY, headers)


def require_one(answers: Sequence[Answer]) -> None:
    """Refuses a request without any features.

    Raises:
        ApiError: 422 with the reason per image. A server's error is raised as it is.
    """
    if any(answer.features is not None for answer in answers):
        return
    for answer in answers:
        if answer.failure is not None:
            raise answer.failure
    what = "the body is no image that can be read" if len(answers) == 1 else "none of the images can be read"
    data = [failed_item(at, answer) for at, answer in enumerate(answers)]
    raise ApiError(422, "unreadable_image", f"{what}: {answers[0].problem}", param="images", data={"data": data})


def failed_item(index: int, answer: Answer) -> dict[str, Any]:
    """The entry of a reply for image `index`, which failed."""
    if answer.failure is not None:
        return {"index": index, "error": failure_object()}
    return {"index": index, "error": problem_object(str(answer.problem))}


def json_bytes(content: dict[str, Any]) -> bytes:
    """Encodes a value as JSON, including arrays."""
    return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)


def choose_type(accept: str, offered: tuple[str, ...]) -> str:
    """Chooses the media type that the Accept header prefers, the first among equals.

    Raises:
        ApiError: 406 with the available types.
    """
    if accept in {"", "*/*"}:
        return offered[0]
    qualities: dict[str, float] = {}
    for entry in accept[:_ACCEPT_CHARACTERS].split(","):
        name, *options = (word.strip().lower() for word in entry.split(";"))
        found = [option.partition("=")[2] for option in options if option.startswith("q=")]
        try:
            qualities[name] = float(found[0]) if found else 1.0
        except ValueError:
            qualities[name] = 0.0
    best, best_quality = "", 0.0
    for kind in offered:
        main = kind.partition("/")[0]
        quality = next((qualities[name] for name in (kind, f"{main}/*", "*/*") if name in qualities), 0.0)
        if quality > best_quality:
            best, best_quality = kind, quality
    if not best:
        raise ApiError(406, "not_acceptable", f"Accept: {accept[:80]}: answers are {', '.join(offered)}")
    return best
