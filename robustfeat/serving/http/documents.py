"""Completes the OpenAPI document with bodies and errors that FastAPI cannot derive."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from robustfeat.serving.online.schemas import ErrorAnswer, InferError

__all__ = ["ACCEPT", "ACCEPT_HEAD", "IMAGE_BODY", "MODEL", "describe", "infer_refusals", "json_body", "refusals"]

_BINARY = {"type": "string", "format": "binary"}

IMAGE_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "One image file (JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF or HEIC, told by its content), or "
        "several as a form.",
        "content": {
            "application/octet-stream": {"schema": _BINARY},
            "image/*": {"schema": _BINARY},
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {"images": {"type": "array", "minItems": 1, "items": _BINARY}},
                    "required": ["images"],
                }
            },
        },
    }
}

MODEL: dict[str, Any] = {
    "name": "model",
    "in": "query",
    "required": False,
    "description": "Of those served; the first by default.",
    "schema": {"type": "string"},
}
ACCEPT: dict[str, Any] = {
    "name": "accept",
    "in": "header",
    "required": False,
    "description": "What to answer with: JSON, a .npy file, or the bytes of float32, little-endian.",
    "schema": {"type": "string", "enum": ["application/json", "application/x-npy", "application/octet-stream"]},
}

ACCEPT_HEAD: dict[str, Any] = {
    **ACCEPT,
    "description": "What to answer with: JSON, or the folder of the head in a zip file.",
    "schema": {"type": "string", "enum": ["application/json", "application/zip"]},
}

_REASONS = {
    400: "The request is malformed, or its Host is not served.",
    401: "No key, or none of ours.",
    404: "No such model, head or collection.",
    406: "The Accept header admits none of the answers that there are.",
    408: "The body did not arrive in time.",
    413: "The body is too large, or holds too many images.",
    415: "A Content-Encoding or Content-Type that is not read.",
    422: "No image can be read; or in /v1 and /v2, one of them.",
    429: "The key's rate or share is used up.",
    503: "The queue is full, or the answer took too long.",
}
_WAIT = {"Retry-After": {"schema": {"type": "string"}, "description": "Seconds after which to try again."}}
_SCHEMES = {"key": {"type": "http", "scheme": "bearer"}}

_bodies: dict[str, type[BaseModel]] = {}


def refusals(*codes: int, form: type[BaseModel] = ErrorAnswer) -> dict[int | str, dict[str, Any]]:
    """The errors of a route, for FastAPI's `responses`."""
    found: dict[int | str, dict[str, Any]] = {}
    for code in codes:
        found[code] = {"model": form, "description": _REASONS[code]}
        if code in {429, 503}:
            found[code]["headers"] = _WAIT
        if code == 401:
            found[code]["headers"] = {"WWW-Authenticate": {"schema": {"type": "string"}, "description": "Bearer"}}
    return found


def json_body(form: type[BaseModel], *more: str) -> dict[str, Any]:
    """A JSON body that the route reads itself, for FastAPI's `openapi_extra`; `more` adds media types."""
    _bodies[form.__name__] = form
    content: dict[str, Any] = {
        "application/json": {"schema": {"$ref": f"#/components/schemas/{form.__name__}"}},
        **{name: {"schema": _BINARY} for name in more},
    }
    return {"requestBody": {"required": True, "content": content}}


def describe(app: FastAPI, *, keys: bool, names: dict[str, list[str]]) -> None:
    """Completes the document of an application.

    Args:
        app: the application.
        keys: whether the server has keys.
        names: possible values of the parameters `model`, `head`, `collection` and `version`.
    """
    derive = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = derive()
            document["servers"] = [{"url": "."}]  # relative to the document, for any prefix of a proxy
            components = document.setdefault("components", {})
            schemas = components.setdefault("schemas", {})
            for form in _bodies.values():
                schema = form.model_json_schema(ref_template="#/components/schemas/{model}")
                schemas.update(schema.pop("$defs", {}))
                schemas[form.__name__] = schema
            schemas.pop("HTTPValidationError", None)
            schemas.pop("ValidationError", None)
            if keys:
                components["securitySchemes"] = _SCHEMES
            for methods in document["paths"].values():
                for operation in methods.values():
                    if keys and "401" in operation["responses"]:
                        operation["security"] = [{"key": []}]
                    if "HTTPValidationError" in str(operation["responses"].get("422")):
                        del operation["responses"]["422"]  # FastAPI's own error never occurs
                    # One function handles paths with and without a version, so the version is not a query.
                    given = [entry for entry in operation.get("parameters", []) if not _is_unversioned(entry)]
                    operation["parameters"] = given
                    for parameter in given:
                        if names.get(parameter["name"]):
                            parameter["schema"] = {"type": "string", "enum": names[parameter["name"]]}
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _is_unversioned(parameter: dict[str, Any]) -> bool:
    return (parameter["name"], parameter["in"]) == ("version", "query")


def infer_refusals(*codes: int) -> dict[int | str, dict[str, Any]]:
    """The errors of a route, in the format of the Open Inference Protocol."""
    return refusals(*codes, form=InferError)
