"""The browser of the tests sees what a page must not do."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.browser import visit

if TYPE_CHECKING:
    from playwright.sync_api import Browser


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ("<img src='http://127.0.0.1:9/x.png'>", "request: http://127.0.0.1:9/x.png"),
        ("<script>throw new Error('broken')</script>", "error: broken"),
        ("<script>console.warn('odd')</script>", "warning: odd"),
        ("<script>alert('hello')</script>", "dialog: hello"),
    ],
)
def test_a_visit_fails_by_what_the_page_does(browser: Browser, tmp_path: Path, body: str, fault: str) -> None:
    page = tmp_path / "page.html"
    page.write_text(f"<h1>title</h1>{body}")
    with pytest.raises(AssertionError, match=fault), visit(browser, page) as seen:
        assert seen.page.inner_text("h1") == "title"
