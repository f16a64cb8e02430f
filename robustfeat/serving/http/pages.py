"""Serves the pages for browsers: / to search and teach, and /docs for the API. Neither needs another host."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fastapi import Request
from fastapi.responses import Response

from robustfeat.serving.http.assets import DOCS_POLICY, PAGE_POLICY, Assets
from robustfeat.serving.http.routes import Routes

__all__ = ["add_docs", "add_page"]

_HERE = Path(__file__).parent
_INDEX = "index.html"


def add_docs(routes: Routes) -> None:
    """Adds /docs with Swagger UI, which reads /openapi.json."""
    assets = Assets(_HERE / "swagger", DOCS_POLICY)

    @routes.get("/docs", include_in_schema=False)
    async def docs(request: Request) -> Response:
        return await assets.answer(request, _INDEX)

    @routes.get("/docs/{name}", include_in_schema=False)
    async def part_of_docs(request: Request, name: str) -> Response:
        return await assets.answer(request, name)


def add_page(routes: Routes, visited: Callable[[], None]) -> None:
    """Adds the page at / and its files. `visited` is called when a browser loads its program.

    Load balancers only request /.
    """
    assets = Assets(_HERE / "page", PAGE_POLICY)

    @routes.get("/", include_in_schema=False)
    async def page(request: Request) -> Response:
        return await assets.answer(request, _INDEX)

    @routes.get("/page/{name}", include_in_schema=False)
    async def part_of_page(request: Request, name: str) -> Response:
        if name == "app.js":
            visited()
        return await assets.answer(request, name)
