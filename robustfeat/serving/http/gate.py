"""Checks every request's host, key and room before the application, and counts it afterwards.

Refusals are cheap, so an overloaded server spends its time on accepted requests.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import re
import time
import traceback
from functools import lru_cache
from typing import Any

from fastapi import FastAPI, Request
from starlette.types import Message, Receive, Scope, Send

from robustfeat.serving.http.bodies import too_large
from robustfeat.serving.http.keys import ANYONE, Key
from robustfeat.serving.http.request_notes import CURRENT, RequestNotes
from robustfeat.serving.http.routes import Routes
from robustfeat.serving.http.service import Service
from robustfeat.serving.online.errors import ApiError, error_answer, timed_out
from robustfeat.serving.online.timeline import Timeline

__all__ = ["ON_DISCONNECT", "Gate", "host_allowed"]

_ID = re.compile(rb"[A-Za-z0-9._:/+=-]{1,128}")
_ANY_KEY = re.compile(r"/(health/.*|v2/health/.*|metrics|docs(/.*)?|openapi\.json|page/.*)?")
_WORK = re.compile(r"/(embed|predict/[^/]*|similar/[^/]*|teach|v1/embeddings|v2/models/.*/infer)")
_ROUTES = (
    "/", "/embed", "/predict", "/similar", "/teach", "/v1", "/v2", "/health", "/info", "/metrics", "/page", "/docs",
    "/openapi.json",
)  # fmt: skip
_DOCUMENT = "/openapi.json"

ON_DISCONNECT = "robustfeat.disconnect"
"""Key in a request's scope of the function to call when the client disconnects."""

Headers = dict[bytes, bytes]


class Gate:
    """The ASGI application.

    Args:
        app: serves the OpenAPI document.
        routes: serves the rest.
        service: keys, limits, counts.
    """

    def __init__(self, app: FastAPI, routes: Routes, service: Service) -> None:
        self.app, self._routes, self._service = app, routes, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = time.perf_counter()
        service, path = self._service, scope["path"]
        headers: Headers = dict(scope["headers"])
        given = headers.get(b"x-request-id")
        request_id = given if given and _ID.fullmatch(given) else os.urandom(16).hex().encode()
        traced = service.tracer is not None and not _ANY_KEY.fullmatch(path)
        notes = RequestNotes(request_id.decode(), timeline=Timeline() if traced else None)
        CURRENT.set(notes)
        status = 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"].append((b"x-request-id", request_id))
            await send(message)

        task = asyncio.current_task()
        assert task is not None
        state = scope.setdefault("state", {})
        state["key"] = ANYONE
        disconnected = False

        def disconnect() -> None:
            nonlocal disconnected
            disconnected = True
            task.cancel()

        scope[ON_DISCONNECT] = disconnect
        service.metrics.in_flight += 1
        refusal = None
        try:
            try:
                await self._answer(scope, receive, answer, headers)
            except ApiError as exc:
                refusal = exc
            except Exception:
                service.log.error("internal error", trace=traceback.format_exc())
                refusal = _internal()
            if refusal is not None and status == 0:
                await self._refuse(refusal, path, scope["method"], answer)
        except asyncio.CancelledError:
            if status == 0 and not disconnected:  # the grace period is over
                stopping = ApiError(503, "stopping", "the server is being stopped; ask again", retry_after_s=1)
                await self._refuse(stopping, path, scope["method"], answer)
            status = status or 499
        finally:
            del scope[ON_DISCONNECT]
            self._finish(scope, status, began, notes, refusal)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, headers: Headers) -> None:
        path, state = scope["path"], scope["state"]
        deadline = asyncio.timeout(self._service.limits.timeout_s)
        try:
            async with deadline:
                self._check_host(scope, headers)
                key = state["key"] = self._key(path, headers)
                if scope["method"] == "POST" and _WORK.fullmatch(path):
                    self._check_room(headers, key)
                if path == _DOCUMENT:
                    await self.app(scope, receive, send)
                    return
                response = await self._routes.answer(Request(scope, receive))
        except TimeoutError:
            if not deadline.expired():
                raise
            raise _too_late(self._service, state) from None
        await response(scope, receive, send)

    def _finish(self, scope: Scope, status: int, began: float, notes: RequestNotes, refusal: ApiError | None) -> None:
        service, path = self._service, scope["path"]
        seconds = time.perf_counter() - began
        service.metrics.in_flight -= 1
        route = next((known for known in _ROUTES if path == known or path.startswith(f"{known}/")), "other")
        service.metrics.request(route, status)
        key = scope["state"]["key"].name
        if key:
            service.metrics.key_request(key, status)
        if status == 200 and scope["method"] == "POST":
            service.metrics.seconds(seconds)
        trace = self._trace(scope, status, route, began, notes, refusal)
        if service.log.requests:
            service.log.info(
                "request",
                method=scope["method"],
                path=path[:200],
                status=status,
                code=refusal.code if refusal else None,
                milliseconds=round(1000 * seconds, 2),
                model=notes.model,
                head=notes.head,
                images=notes.images,
                key=key or None,
                client=scope["client"][0] if scope.get("client") else None,
                **trace,
            )

    def _trace(
        self, scope: Scope, status: int, route: str, began: float, notes: RequestNotes, refusal: ApiError | None
    ) -> dict[str, str]:
        """Records a traced request, and returns the id of its trace for the log."""
        if self._service.tracer is None or notes.timeline is None:
            return {}
        attributes = {
            "http.request.method": scope["method"],
            "http.route": route,
            "url.path": scope["path"][:200],
            "http.response.status_code": status,
            "client.address": scope["client"][0] if scope.get("client") else None,
            "robustfeat.request_id": notes.id,
            "robustfeat.model": notes.model,
            "robustfeat.head": notes.head,
            "robustfeat.images": notes.images,
            "robustfeat.key": scope["state"]["key"].name or None,
        }
        failure = (refusal.code if refusal else str(status)) if status >= 500 else None
        name = f"{scope['method']} {route}"
        headers = dict(scope["headers"])
        return {"trace_id": self._service.tracer.record(name, began, attributes, notes.timeline, headers, failure)}

    def _check_host(self, scope: Scope, headers: Headers) -> None:
        if scope["http_version"] == "1.0" and b"host" not in headers:
            return  # only probes omit it: a browser, which another site's page could abuse, always sends one
        if sum(name == b"host" for name, _ in scope["headers"]) > 1:
            raise ApiError(400, "host", "the request has more than one Host header; send one", close=True)
        host = headers.get(b"host", b"").decode("latin-1")
        if not host_allowed(host, tuple(self._service.hosts)):
            # The text speaks to the operator and is part of an HTTP answer, so it names the command's option.
            raise ApiError(
                400,
                "host",
                f"Host {host[:100]!r} is not served; start the server with --allowed-host for it, or let the proxy "
                "pass on the client's host (nginx: proxy_set_header Host $host)",
                close=True,
            )

    def _key(self, path: str, headers: Headers) -> Key:
        if _ANY_KEY.fullmatch(path):
            return ANYONE
        authorization = headers.get(b"authorization")
        key = self._service.keys.find(None if authorization is None else authorization.decode("latin-1"))
        if key is None:
            what = "the key is not known" if authorization else "a key is needed"
            raise ApiError(
                401,
                "invalid_api_key" if authorization else "missing_api_key",
                f"{what}; send Authorization: Bearer KEY",
                headers={"www-authenticate": "Bearer"},
                close=True,
            )
        return key

    def _check_room(self, headers: Headers, key: Key) -> None:
        """Refuses a request without room before its body is read."""
        declared = headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self._service.limits.max_body_bytes:
            raise too_large(self._service.limits)
        self._service.admission.check(key)

    async def _refuse(self, exc: ApiError, path: str, method: str, send: Send) -> None:
        self._service.metrics.error(exc.code)
        body = error_answer(exc, path)
        headers = [(name.encode(), value.encode("latin-1", "replace")) for name, value in exc.headers.items()]
        headers += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": exc.status, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if method == "HEAD" else body})


def _too_late(service: Service, state: dict[str, Any]) -> ApiError:
    seconds = service.limits.timeout_s
    if state.get("uploading"):
        message = f"the body did not arrive within {seconds:g} s; send less at once"
        return ApiError(408, "upload_timeout", message, close=True)
    return timed_out(seconds)


def _internal() -> ApiError:
    return ApiError(500, "internal", "internal error; the server's log has it under this request's X-Request-ID")


@lru_cache(256)
def host_allowed(host: str, allowed: tuple[str, ...]) -> bool:
    """Whether a Host header is one of ours: an address, a name in `allowed`, or one that ends like `*.name` there.

    Addresses are: a page on another site can make a browser ask for its own name at our address, but not for ours.
    """
    name = host.rpartition(":")[0] if re.search(r":\d+$", host) and not host.endswith("]") else host
    name = name.lower().rstrip(".")
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return any(entry in {"*", name} or (entry.startswith("*.") and name.endswith(entry[1:])) for entry in allowed)
    return True
