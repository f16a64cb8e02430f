"""A map in a real browser."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from robustfeat.palette import CATEGORIES
from robustfeat.serving.heads.labels.reading import read_labels
from robustfeat.serving.inputs.listing import list_inputs
from tests.browser import Visit, require_access, visit
from tests.serving.maps.conftest import GROUPS, PER_GROUP, Drawn, colour_of, path_of

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page


@pytest.fixture(
    params=[(1440, False), (1440, True), (375, False), (375, True)], ids=["wide", "wide-dark", "phone", "phone-dark"]
)
def opened(request: pytest.FixtureRequest, browser: Browser, drawn: Drawn) -> Iterator[Visit]:
    """The page on both widths, light and dark."""
    width, dark = request.param
    with visit(browser, drawn.points, width=width, height=800, dark=dark) as seen:
        yield seen


@pytest.fixture
def page(browser: Browser, drawn: Drawn) -> Iterator[Page]:
    with visit(browser, drawn.page) as seen:
        yield seen.page


def place(page: Page, row: int) -> tuple[float, float]:
    x, y = page.evaluate("row => robustfeatMap.place(row)", row)
    return float(x), float(y)


def ask(page: Page, name: str) -> Any:
    return page.evaluate(f"robustfeatMap.{name}()")


def picture(page: Page) -> Image.Image:
    """What is on the screen, after the next frame."""
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    return Image.open(io.BytesIO(page.screenshot())).convert("RGB")


def near(found: Any, wanted: tuple[int, int, int], tolerance: int = 12) -> bool:
    return max(abs(int(one) - other) for one, other in zip(found, wanted, strict=True)) <= tolerance


def rgb(text: str) -> tuple[int, int, int]:
    return int(text[1:3], 16), int(text[3:5], 16), int(text[5:7], 16)


def shown_rows(page: Page) -> list[int]:
    """Rows that are neither hidden nor faint."""
    found: list[int] = page.evaluate(
        "Array.from({ length: 60 }, (_, row) => row).filter(r => robustfeatMap.tone(r) === 2)"
    )
    return found


def colour_at(page: Page, row: int) -> Any:
    x, y = place(page, row)
    return picture(page).getpixel((round(x), round(y)))


def swatch(page: Page, at: int) -> tuple[int, int, int]:
    text = page.locator("#legend .swatch").nth(at).evaluate("each => getComputedStyle(each).backgroundColor")
    red, green, blue = (int(part) for part in text[4:-1].split(","))
    return red, green, blue


def lasso_around(page: Page, rows: range, *, margin: float = 14) -> None:
    """Draws a rectangle around the places of rows."""
    places = np.array([place(page, row) for row in rows])
    (left, top), (right, bottom) = places.min(0) - margin, places.max(0) + margin
    page.mouse.move(left, top)
    page.mouse.down()
    for x, y in ((right, top), (right, bottom), (left, bottom), (left, top + 2)):
        page.mouse.move(x, y, steps=4)
    page.mouse.up()


def test_points_have_the_colours_of_the_legend_at_every_width_and_in_the_dark(opened: Visit) -> None:
    page = opened.page
    page.locator("#names").evaluate("each => each.click()")
    screen = picture(page)
    for row in range(60):
        x, y = place(page, row)
        assert near(screen.getpixel((round(x), round(y))), swatch(page, row // PER_GROUP)), row
    colours = {swatch(page, at) for at in range(3)}
    dark = page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    assert colours <= {rgb(colour) for colour in (CATEGORIES.dark if dark else CATEGORIES.light)}
    assert len(colours) == 3
    assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]  # type: ignore[index]


def test_axe_finds_nothing_serious(opened: Visit) -> None:
    page = opened.page
    if page.is_visible("#sheet"):
        page.click("#sheet")
    page.click("summary")
    page.locator("#map").press("ArrowRight")
    page.locator("#map").press("Enter")
    require_access(page)
    page.select_option("#colouring", label="typicality")
    require_access(page)


def test_the_phones_sheet_opens_and_holds_the_legend(browser: Browser, drawn: Drawn) -> None:
    with visit(browser, drawn.points, width=375, height=800, has_touch=True) as seen:
        page = seen.page
        assert not page.is_visible("#legend")
        page.tap("#sheet")
        assert page.is_visible("#legend")
        assert page.get_attribute("#sheet", "aria-expanded") == "true"
        box = page.locator("#panel").bounding_box()
        assert box is not None
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 375
        page.tap("#sheet")
        picture(page)  # in the next frame the map fills the place of the sheet
        page.touchscreen.tap(*place(page, 33))
        assert page.inner_text("#card .path") == path_of(33)


def test_hover_shows_the_thumbnail_and_the_path(page: Page) -> None:
    for row in (0, 1, 2, 3, 4, 5, 30, 59):
        page.mouse.move(2, 700)
        page.mouse.move(*place(page, row))
        assert ask(page, "current") == row
        page.wait_for_timeout(100)  # the sheet is decoded for the first one
        box = page.locator("#card canvas").bounding_box()
        assert box is not None
        middle = (round(box["x"] + box["width"] / 2), round(box["y"] + box["height"] / 2))
        assert near(picture(page).getpixel(middle), colour_of(row), 16), row
        wanted = path_of(row).replace("\udcff", "\ufffd")
        assert page.locator("#card .path bdi").text_content() == wanted
    page.mouse.move(2, 700)
    assert not page.is_visible("#card")


def test_thumbnails_appear_when_zoomed_in_and_with_their_key(page: Page) -> None:
    assert page.locator("#thumbnails").is_checked() is False
    row = 40
    page.mouse.move(*place(page, row))
    for _ in range(12):
        page.mouse.wheel(0, -200)
    page.mouse.move(2, 790)
    page.wait_for_timeout(300)  # the sheet is being decoded
    assert ask(page, "thumbnails") >= 50
    assert near(colour_at(page, row), colour_of(row), 16)
    page.keyboard.press("Escape")
    page.focus("#map")
    page.keyboard.press("0")
    page.keyboard.press("t")
    assert page.locator("#thumbnails").is_checked()
    assert ask(page, "thumbnails") >= 3


def test_a_lasso_selects_what_it_holds_and_saves_its_paths(page: Page, drawn: Drawn, tmp_path: Path) -> None:
    page.click("#lasso")
    lasso_around(page, range(PER_GROUP))
    assert ask(page, "selected") == list(range(PER_GROUP))
    assert page.inner_text("#selected") == "20 images"
    with page.expect_download() as waiting:
        page.click("#save-paths")
    saved = tmp_path / "selection.txt"
    waiting.value.save_as(saved)
    names = [line.decode("utf-8", "surrogateescape") for line in saved.read_bytes().split(b"\n")]
    assert names == [*map(path_of, range(PER_GROUP)), ""]
    # The list is what `embed --files-from` takes.
    listed = tmp_path / "list.txt"
    listed.write_bytes(b"".join(bytes(drawn.images) + b"/" + line + b"\n" for line in saved.read_bytes().splitlines()))
    with list_inputs([], files_from=listed) as found:
        assert [Path(image.file).exists() for image in found] == [True] * PER_GROUP
    with page.expect_download() as waiting:
        page.click("#save-csv")
    table = tmp_path / "selection.csv"
    waiting.value.save_as(table)
    with open(table, encoding="utf-8", errors="surrogateescape", newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert [row["label"] for row in rows] == ["ant"] * PER_GROUP
    assert "\n'=cmd" not in table.read_text("utf-8", "surrogateescape")
    labels = read_labels([f"{table}:label"])
    assert {path: labels.of(path) for path in map(path_of, range(PER_GROUP))} == {
        path_of(row): ("ant",) for row in range(PER_GROUP)
    }


def test_shift_draws_a_lasso_and_adds_in_the_mode(page: Page) -> None:
    page.keyboard.down("Shift")
    lasso_around(page, range(20, 40))
    page.keyboard.up("Shift")
    assert ask(page, "selected") == list(range(20, 40))
    page.click("#lasso")
    page.keyboard.down("Shift")
    lasso_around(page, range(20))
    page.keyboard.up("Shift")
    assert ask(page, "selected") == list(range(40))
    page.click("#clear")
    assert ask(page, "selected") == []
    assert page.is_disabled("#save-csv")


def test_the_legend_hides_and_shows_groups_with_their_counts(browser: Browser, drawn: Drawn) -> None:
    with visit(browser, drawn.points) as seen:
        toggle_groups(seen.page)


def toggle_groups(page: Page) -> None:
    counts = page.locator("#legend .count").all_inner_texts()
    names = page.locator("#legend bdi").all_inner_texts()
    assert (names, counts) == (list(GROUPS), ["20", "20", "20"])
    page.locator("#names").evaluate("each => each.click()")
    row = 25
    before = colour_at(page, row)
    page.locator("#legend li").nth(1).locator("label").click()
    page.mouse.move(2, 700)
    assert [page.evaluate("row => robustfeatMap.tone(row)", other) for other in (0, 20, 39, 40)] == [2, 0, 0, 2]
    assert not near(colour_at(page, row), before)
    page.click("#lasso")
    lasso_around(page, range(20, 40))
    assert ask(page, "selected") == []
    page.locator("#legend li").nth(2).hover()
    page.locator("#legend li").nth(2).get_by_role("button").click()
    page.mouse.move(2, 700)
    assert [page.evaluate("row => robustfeatMap.tone(row)", other) for other in (0, 20, 40)] == [0, 0, 2]
    page.click("#invert")
    assert [page.evaluate("row => robustfeatMap.tone(row)", other) for other in (0, 20, 40)] == [2, 2, 0]
    page.click("#all")
    assert [page.evaluate("row => robustfeatMap.tone(row)", other) for other in (0, 20, 40)] == [2, 2, 2]


def test_numbers_have_a_scale_and_a_range(page: Page) -> None:
    page.select_option("#colouring", label="typicality")
    assert page.is_visible("#scale")
    assert not page.is_visible("#legend")
    page.locator("#least").fill("50")
    shown = [page.evaluate("row => robustfeatMap.tone(row)", row) for row in range(60)]
    assert shown == [0] * 30 + [2] * 30
    page.select_option("#colouring", label="cluster")
    assert page.locator("#legend li").count() >= 2


def test_layers_and_search_make_the_others_faint(page: Page) -> None:
    page.locator("#layers li").nth(0).locator("label").click()
    assert shown_rows(page) == [21, 22, 45]
    page.locator("#layers li").nth(0).get_by_role("button").click()
    assert ask(page, "selected") == [21, 22, 45]
    page.locator("#layers li").nth(0).locator("label").click()
    page.fill("#search", "BEE/2")
    assert page.inner_text("#found").startswith("10 found")
    assert shown_rows(page) == list(range(20, 30))
    page.press("#search", "Enter")
    assert ask(page, "current") == 20
    assert page.inner_text("#card .path") == "bee/20.png"
    page.click("#take-found")
    assert ask(page, "selected") == list(range(20, 30))


def test_everything_works_by_keyboard(page: Page) -> None:
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "map"
    page.keyboard.press("ArrowRight")
    first = ask(page, "current")
    assert first >= 0
    page.keyboard.press("ArrowLeft")
    second = ask(page, "current")
    assert second != first
    assert place(page, second)[0] < place(page, first)[0]
    page.keyboard.press("Enter")
    assert ask(page, "selected") == [second]
    assert "selected" in page.inner_text("#said")
    assert path_of(second).replace("\udcff", "\ufffd").split("/")[0] in page.inner_text("#said")
    page.keyboard.press("Escape")
    assert ask(page, "selected") == []
    page.keyboard.press("a")
    assert len(ask(page, "selected")) == 60
    before = place(page, 0)
    page.keyboard.press("Shift+ArrowRight")
    assert place(page, 0)[0] == pytest.approx(before[0] - 80, abs=1)
    page.keyboard.press("0")
    assert place(page, 0) == pytest.approx(before, abs=1)
    page.keyboard.press("l")
    assert page.get_attribute("#lasso", "aria-pressed") == "true"
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "search"
    page.keyboard.type("cat")
    assert page.inner_text("#found").startswith("20 found")
    page.keyboard.press("Escape")
    page.locator("#legend input").nth(0).focus()
    page.keyboard.press("Space")
    assert page.evaluate("robustfeatMap.tone(0)") == 0


def test_names_of_strangers_do_nothing(page: Page, drawn: Drawn) -> None:
    page.locator("#layers li").nth(0).locator("label").click()
    page.mouse.move(*place(page, 21))
    for row in range(6):
        page.mouse.move(*place(page, row))
    text = page.locator("h1").text_content() or ""
    assert text.startswith("<b onmouseover=alert(3)>\u2028")
    assert text.endswith("{script}{blocks}")
    assert page.title() == drawn.shown.title.replace("\u2028", page.title()[24])
    assert page.locator("b, img, #card script, h1 *").count() == 0
    assert drawn.page.read_bytes().count("\u2028".encode()) <= 1  # in <title>, where it is text


def test_the_policy_stops_what_is_not_of_the_page(browser: Browser, drawn: Drawn) -> None:
    with pytest.raises(AssertionError, match="Content Security Policy"), visit(browser, drawn.page) as seen:
        ran = seen.page.evaluate(
            "async () => { const block = document.createElement('script'); block.textContent = 'window.ran = 1';"
            " document.body.append(block); const image = new Image(); image.src = 'https://example.org/x.png';"
            " try { await fetch('https://example.org/'); return 'fetched'; }"
            " catch { return window.ran || 'stopped'; } }"
        )
        assert ran == "stopped"
        assert not [fault for fault in seen.faults if fault.startswith("request") and "example.org/x" not in fault]


def test_a_page_without_thumbnails_or_groups_works(browser: Browser, drawn: Drawn, tmp_path: Path) -> None:
    from dataclasses import replace

    from robustfeat.serving.maps.colourings import categories_of
    from robustfeat.serving.maps.document import write_page

    for count in (1, 2):
        bare = replace(
            drawn.shown,
            paths=drawn.shown.paths[:count],
            places=drawn.shown.places[:count],
            colourings=(categories_of("", [None] * count),),
            layers=(),
            sprites=None,
        )
        write_page(bare, tmp_path / "bare.html")
        with visit(browser, tmp_path / "bare.html") as seen:
            seen.page.focus("#map")
            seen.page.keyboard.press("ArrowRight")
            seen.page.keyboard.press("Enter")
            assert len(ask(seen.page, "selected")) == 1
            assert not seen.page.is_visible("#thumbnails")
            assert not seen.page.is_visible("#layers")
