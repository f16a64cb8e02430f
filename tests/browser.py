"""A real browser for the pages that we write: Debian's Chromium, driven by Playwright."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import axe_playwright_python
from playwright.sync_api import Browser, ConsoleMessage, Dialog, Page, Request, sync_playwright

__all__ = ["Visit", "find_browser", "open_browser", "require_access", "visit"]


@dataclass
class Visit:
    """A page in a browser, and what must not happen on it.

    Attributes:
        page: Playwright's page.
        allowed: prefixes of the addresses that the page may ask for.
        faults: errors of scripts and of the console, and requests to other addresses.
    """

    page: Page
    allowed: tuple[str, ...]
    faults: list[str] = field(default_factory=list)

    def watch(self) -> None:
        """Collects faults from now on."""
        self.page.on("pageerror", lambda error: self.faults.append(f"error: {error}"))
        self.page.on("console", self._hear)
        self.page.on("request", self._ask)
        self.page.on("dialog", self._dismiss)

    def _hear(self, message: ConsoleMessage) -> None:
        if message.type in {"error", "warning"}:
            self.faults.append(f"{message.type}: {message.text}")

    def _dismiss(self, dialog: Dialog) -> None:
        """Of an `alert` that a hostile name brings about."""
        self.faults.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def _ask(self, request: Request) -> None:
        if not request.url.startswith((*self.allowed, "data:", "blob:")):
            self.faults.append(f"request: {request.url[:200]}")


def find_browser() -> str | None:
    """Where Chromium lies; None where it is not installed."""
    found = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
    return next(filter(None, found), None)


@contextmanager
def open_browser() -> Iterator[Browser]:
    """Starts Chromium for the block."""
    with sync_playwright() as playwright:
        # Root may not use the sandbox. The pages are ours, and speak to nobody.
        browser = playwright.chromium.launch(executable_path=find_browser(), args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def visit(
    browser: Browser,
    place: str | Path,
    *,
    allowed: tuple[str, ...] = (),
    width: int = 1440,
    height: int = 900,
    dark: bool = False,
    **context: Any,
) -> Iterator[Visit]:
    """Opens a page for the block; the block fails if the page has faults.

    Args:
        browser: from `open_browser`.
        place: a file, or a URL.
        allowed: see `Visit`; the page itself is always allowed.
        width, height: of the window, in CSS pixels.
        dark: whether the user prefers dark pages.
        context: further arguments of Playwright's `new_context`.
    """
    url = place.absolute().as_uri() if isinstance(place, Path) else place
    opened = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light", **context
    )
    try:
        seen = Visit(opened.new_page(), (url, *allowed))
        seen.watch()
        seen.page.goto(url)
        yield seen
        assert not seen.faults, "\n".join(seen.faults)
    finally:
        opened.close()


def require_access(page: Page) -> None:
    """Fails where axe-core finds a serious fault of accessibility."""
    axe = Path(axe_playwright_python.__file__).parent / "axe.min.js"
    page.evaluate(axe.read_text("utf-8"))
    found = page.evaluate("axe.run(document, { resultTypes: ['violations'] })")
    serious = [
        f"{one['id']}: {node['html'][:150]} {node['failureSummary'][:200]}"
        for one in found["violations"]
        if one["impact"] in {"serious", "critical"}
        for node in one["nodes"]
    ]
    assert not serious, "\n".join(serious)
    assert found["passes"] is not None
