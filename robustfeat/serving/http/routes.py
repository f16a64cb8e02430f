"""Routes that FastAPI documents but does not call, since its own dispatch takes longer than all our code."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.routing import compile_path

from robustfeat.serving.online.errors import ApiError

__all__ = ["Handler", "Routes"]

Handler = Callable[..., Awaitable[Response]]


class Routes:
    """Functions by path and method.

    Args:
        app: the application, which documents them.
    """

    def __init__(self, app: FastAPI) -> None:
        self._app = app
        self._exact: dict[str, dict[str, Handler]] = {}
        self._patterns: dict[str, tuple[re.Pattern[str], dict[str, Handler]]] = {}

    def get(self, path: str, **about: Any) -> Callable[[Handler], Handler]:
        """Adds a function of the request and the parameters in its path; `about` goes to FastAPI's decorator."""
        return self._add("GET", path, about)

    def post(self, path: str, **about: Any) -> Callable[[Handler], Handler]:
        """Adds a function for POST; see `get`."""
        return self._add("POST", path, about)

    def _add(self, method: str, path: str, about: dict[str, Any]) -> Callable[[Handler], Handler]:
        def register(handler: Handler) -> Handler:
            self._app.add_api_route(path, handler, methods=[method], **about)
            if "{" in path:
                self._patterns.setdefault(path, (compile_path(path)[0], {}))[1][method] = handler
            else:
                self._exact.setdefault(path, {})[method] = handler
            return handler

        return register

    async def answer(self, request: Request) -> Response:
        """Calls the function of a request. HEAD calls the function of GET.

        OPTIONS returns the methods of a path or of the server (RFC 9110, 9.3.7), as HAProxy's checks request for /.

        Raises:
            ApiError: 404 or 405, or an error of the function.
        """
        path = request.scope["path"]
        if request.method == "OPTIONS" and path in {"/", "*"}:
            return Response(status_code=204, headers={"allow": "GET, HEAD, OPTIONS, POST"})
        handlers, texts = self._exact.get(path), {}
        if handlers is None:
            found = ((pattern.match(path), known) for pattern, known in self._patterns.values())
            match, handlers = next(((match, known) for match, known in found if match), (None, None))
            if match is None or handlers is None:
                raise ApiError(404, "not_found", f"{path[:100]} is not served; /docs lists what is")
            texts = match.groupdict()
        # The server omits the body of a response to HEAD, which probes use.
        method = "GET" if request.method == "HEAD" else request.method
        allowed = ", ".join([*handlers, *(["HEAD"] if "GET" in handlers else []), "OPTIONS"])
        if method == "OPTIONS":
            return Response(status_code=204, headers={"allow": allowed})
        if method not in handlers:
            raise ApiError(
                405,
                "method_not_allowed",
                f"{path[:100]} takes {', '.join(handlers)}; got {request.method}",
                headers={"allow": allowed},
            )
        return await handlers[method](request, **texts)
