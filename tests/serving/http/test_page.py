"""The page at / in a real browser, against a real server."""

from __future__ import annotations

import base64
import csv
import io
import os
import re
import signal
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Locator, Page, Route, expect

from robustfeat import FeatureExtractor
from robustfeat.serving.bulk.embedding import embed_files
from robustfeat.serving.heads.head import Head
from robustfeat.serving.inputs.listing import list_inputs
from tests.browser import require_access, visit
from tests.conftest import EXAMPLES
from tests.serving.http.conftest import Server, serving, wait_until

PHOTOS = sorted(EXAMPLES.glob("*/*.jpg"))
KINDS = {
    "top": {"dress", "longsleeve", "outwear", "shirt", "t-shirt"},
    "bottom": {"pants", "shorts", "skirt"},
    "other": {"hat", "shoes"},
}
HOSTILE = [
    "<img src=x onerror=alert(1)>",
    "\"'`${alert(1)}",
    "=1+1",
    "\u202egnp.exe",
    "x" * 80,
    "</script><svg onload=alert(1)>",
]
SECONDS = 60_000


@pytest.fixture(scope="module")
def plain() -> Iterator[Server]:
    with serving() as server:
        yield server


def opened(browser: Browser, server: Server, **options: Any) -> Any:
    return visit(browser, f"{server.address}/", allowed=(f"{server.address}/",), **options)


def kind_of(name: str) -> str:
    return next(kind for kind, names in KINDS.items() if name.rpartition("/")[2].rpartition("-")[0] in names)


def drop(page: Page, paths: list[Path]) -> None:
    """Drops files and folders as a person does."""
    devtools = page.context.new_cdp_session(page)
    data = {"items": [], "files": [str(path) for path in paths], "dragOperationsMask": 1}
    for step in ("dragEnter", "dragOver", "drop"):
        devtools.send("Input.dispatchDragEvent", {"type": step, "x": 150, "y": 300, "data": data})


def add(page: Page, files: dict[str, bytes], *, copies: int = 1) -> None:
    """Drops files of these names, which no file system need allow; several copies have a number before the name."""
    encoded = [[name, base64.b64encode(data).decode()] for name, data in files.items()]
    page.evaluate(
        """([files, copies]) => {
            const data = new DataTransfer();
            for (const [name, text] of files) {
                const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
                for (let copy = 0; copy < copies; copy += 1) {
                    data.items.add(new File([bytes], copies > 1 ? `${copy}-${name}` : name, { type: "image/jpeg" }));
                }
            }
            dispatchEvent(new DragEvent("drop", { dataTransfer: data, cancelable: true }));
        }""",
        [encoded, copies],
    )


def wait_for_images(page: Page, text: str = "40 images ready.") -> None:
    expect(page.locator("#toast")).to_have_text(text, timeout=SECONDS)


def active(page: Page) -> Locator:
    """The option that the focus is on."""
    return page.locator(f"#{page.locator('#view-images').get_attribute('aria-activedescendant')}")


def tab_to(page: Page, selector: str) -> None:
    """Presses Tab until an element has the focus; each on the way must show that it has it."""
    for _ in range(60):
        page.keyboard.press("Tab")
        at, ring = page.evaluate(
            "[document.activeElement.id || document.activeElement.localName,"
            " getComputedStyle(document.activeElement).outlineStyle]"
        )
        # The images show it by the tile that keys are about.
        assert ring != "none" or at in {"body", "view-images"}, f"{at} does not show that it has the focus"
        if page.locator(selector).evaluate("(found) => found === document.activeElement"):
            return
    raise AssertionError(f"{selector} is not reached by Tab")


def name_classes(page: Page, names: list[str]) -> None:
    tab_to(page, "#new-class-name")
    for name in names:
        page.keyboard.insert_text(name)
        page.keyboard.press("Enter")


def go_to(page: Page, path: str) -> None:
    """Selects an image by arrow keys; the focus is on the images."""
    page.keyboard.press("Home")
    for _ in range(len(PHOTOS)):
        if (active(page).get_attribute("aria-label") or "").startswith(path):
            return
        page.keyboard.press("ArrowRight")
    raise AssertionError(f"{path} is not there")


def wait_for_fit(page: Page, labels: int) -> None:
    expect(page.locator("#fit-state")).to_contain_text(f"Fitted on {labels} labels", timeout=SECONDS)


def predictions(page: Page) -> dict[str, dict[str, str]]:
    """The rows of the table that the page offers, by path."""
    tab_to(page, "#download-csv")
    with page.expect_download() as download:
        page.keyboard.press("Enter")
    text = Path(download.value.path()).read_text("utf-8")
    return {row["path"]: row for row in csv.DictReader(io.StringIO(text))}


@pytest.mark.parametrize(("width", "dark"), [(1440, False), (375, True)])
def test_a_classifier_is_taught_by_keyboard_and_served(
    browser: Browser, plain: Server, tmp_path: Path, width: int, dark: bool
) -> None:
    with opened(browser, plain, width=width, height=812, dark=dark, accept_downloads=True) as seen:
        page: Page = seen.page
        # From the start: a browser that is told late, on a loaded machine, would show a dialog of its own.
        page.on("filechooser", lambda chooser: chooser.set_files(PHOTOS))
        expect(page.locator("#model")).to_have_text("robustfeat · 512 features")
        tab_to(page, "#choose")
        page.keyboard.press("Enter")
        wait_for_images(page)
        name_classes(page, list(KINDS))
        tab_to(page, "#view-images")
        labelled: dict[str, str] = {}
        for number, kind in enumerate(KINDS, 1):
            for photo in [photo for photo in PHOTOS if kind_of(photo.name) == kind][::2][:4]:
                go_to(page, photo.name)
                page.keyboard.press(str(number))
                labelled[photo.name] = kind
        assert len(labelled) == 12
        wait_for_fit(page, 12)
        wrong = [path for path, row in predictions(page).items() if row["prediction"] != kind_of(path)]
        wrong = [path for path in wrong if path not in labelled][:2]
        assert len(wrong) == 2
        tab_to(page, "#view-images")
        for path in wrong:
            go_to(page, path)
            page.keyboard.press(str(1 + list(KINDS).index(kind_of(path))))
            labelled[path] = kind_of(path)
        wait_for_fit(page, 14)
        page.keyboard.press("Control+z")
        wait_for_fit(page, 13)
        page.keyboard.press("Control+Shift+z")
        wait_for_fit(page, 14)
        told = predictions(page)
        assert {path: row["label"] for path, row in told.items() if row["label"]} == labelled
        tab_to(page, "#download-head")
        with page.expect_download() as download:
            page.keyboard.press("Enter")
        assert download.value.suggested_filename == "head.zip"
        with zipfile.ZipFile(download.value.path()) as archive:
            archive.extractall(tmp_path)
    assert sorted(file.name for file in (tmp_path / "head").iterdir()) == ["head.json", "head.safetensors"]
    with serving("--head", f"head={tmp_path / 'head'}") as server:
        for photo in PHOTOS:
            (answer,) = server.post("/predict/head", photo.read_bytes()).json["data"]
            row = told[photo.name]
            assert answer["prediction"] == row["prediction"]
            for name, share in answer["probabilities"].items():
                assert float(row[f"probability:{name}"]) == pytest.approx(share, abs=1e-4)


@pytest.mark.parametrize(("width", "dark"), [(1440, False), (1440, True), (375, False), (375, True)])
def test_axe_finds_nothing_serious(browser: Browser, plain: Server, width: int, dark: bool) -> None:
    with opened(browser, plain, width=width, height=812, dark=dark, reduced_motion="reduce") as seen:
        page: Page = seen.page
        expect(page.locator("#model")).to_be_visible()
        require_access(page)
        add(page, {photo.name: photo.read_bytes() for photo in PHOTOS[:12]} | {"broken.jpg": b"no image"})
        wait_for_images(page, "12 images ready, 1 failed.")
        for name in ("first", "second", "third"):
            page.fill("#new-class-name", name)
            page.keyboard.press("Enter")
        require_access(page)
        page.focus("#view-images")
        for key in "1122":
            page.keyboard.press(key)
        wait_for_fit(page, 4)
        for view in ("images", "map", "matrix"):
            page.click(f"[data-view={view}]")
            require_access(page)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.click("#help-open")
        require_access(page)
        page.keyboard.press("Escape")
        page.click("#clear")
        require_access(page)
        page.click("#confirm-yes")
        expect(page.locator("#welcome")).to_be_visible()


def test_folders_are_dropped_and_looked_through(browser: Browser, plain: Server, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    with opened(browser, plain) as seen:
        page: Page = seen.page
        expect(page.locator("#model")).to_be_visible()
        drop(page, [EXAMPLES / "hat", EXAMPLES / "shoes", tmp_path / "notes.txt"])
        expect(page.locator("#toast")).to_have_text("1 file left out: no images.")
        wait_for_images(page, "8 images ready.")
        page.focus("#view-images")
        page.keyboard.press("Home")
        assert active(page).get_attribute("aria-label") == "hat/hat-1.jpg"
        drop(page, [EXAMPLES / "hat"])
        expect(page.locator("#toast")).to_have_text("4 images are here already.")


def test_names_of_files_and_classes_are_only_text(browser: Browser, plain: Server, tmp_path: Path) -> None:
    data = PHOTOS[0].read_bytes()
    with opened(browser, plain, accept_downloads=True) as seen:
        page: Page = seen.page
        expect(page.locator("#model")).to_be_visible()
        add(page, {f"{name}-{number}.jpg": data + bytes(number) for number, name in enumerate(HOSTILE * 2)})
        add(page, {"y" * 5000 + ".jpg": data + b"long"})
        wait_for_images(page, "13 images ready.")
        for name in HOSTILE:
            page.fill("#new-class-name", name)
            page.keyboard.press("Enter")
        page.focus("#view-images")
        for number in range(12):
            page.keyboard.press(str(1 + number % 6))
        wait_for_fit(page, 12)
        for view in ("map", "matrix", "images"):
            page.click(f"[data-view={view}]")
        shown = page.locator("#classes .text").all_text_contents()
        assert shown == [name.replace("\u202e", "\ufffd") for name in HOSTILE]  # nothing looks like another name
        page.fill("#head-name", "../../<b>\u202eend")
        with page.expect_download() as download:
            page.click("#download-head")
        assert re.fullmatch(r"[A-Za-z0-9][\w.-]*\.zip", download.value.suggested_filename)
        with zipfile.ZipFile(download.value.path()) as archive:
            assert all(
                re.fullmatch(r"[A-Za-z0-9][\w.-]*/head\.(json|safetensors)", name) for name in archive.namelist()
            )
            archive.extractall(tmp_path)
        rows = predictions(page)
    (folder,) = tmp_path.iterdir()
    assert Head.load(folder).classes == tuple(sorted(HOSTILE))
    assert {row["label"] for row in rows.values()} == {
        *(f"'{name}" if name[0] == "=" else name for name in HOSTILE),
        "",
    }
    assert all(path[0] not in "=+-@" for path in rows)


def test_ten_thousand_files_leave_the_page_quick(browser: Browser, plain: Server) -> None:
    with opened(browser, plain) as seen:
        page: Page = seen.page
        expect(page.locator("#model")).to_be_visible()
        add(page, {"photo.jpg": PHOTOS[0].read_bytes()}, copies=10_000)
        expect(page.locator("#count")).to_have_text("10,000 images", timeout=SECONDS)
        expect(page.locator("#progress-text")).to_contain_text("of 10,000 images")
        page.focus("#view-images")
        page.keyboard.press("End")
        assert active(page).get_attribute("aria-posinset") == "10000"
        assert page.locator(".tile").count() < 150
        page.click("#cancel")
        expect(page.locator("#progress")).to_be_hidden()
        expect(page.locator("#retry")).to_contain_text("again")


def test_a_corrupt_image_costs_itself(browser: Browser, plain: Server) -> None:
    with opened(browser, plain) as seen:
        page: Page = seen.page
        expect(page.locator("#model")).to_be_visible()
        good = {photo.name: photo.read_bytes() for photo in PHOTOS[:3]}
        add(page, {**good, "cut.jpg": PHOTOS[4].read_bytes()[:500], "empty.jpg": b""})
        wait_for_images(page, "3 images ready, 2 failed.")
        page.focus("#view-images")
        page.select_option("#filter", "failed")
        labels = page.locator(".tile").evaluate_all("(tiles) => tiles.map((tile) => tile.ariaLabel)")
        assert any(label.startswith("cut.jpg, failed: ") for label in labels)
        assert "empty.jpg, failed: the file is empty" in labels


def test_a_key_is_asked_for_and_its_rate_is_kept(browser: Browser, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("page a-key-of-the-page rate=20\n")
    with serving("--keys", keys) as server, opened(browser, server) as seen:
        page: Page = seen.page
        page.fill("#key", "a-wrong-key")
        page.keyboard.press("Enter")
        expect(page.locator("#key-error")).to_be_visible()
        page.fill("#key", "a-key-of-the-page")
        page.keyboard.press("Enter")
        expect(page.locator("#model")).to_be_visible()
        add(page, {photo.name: photo.read_bytes() for photo in PHOTOS})
        wait_for_images(page)
        assert server.metric("robustfeat_errors_total") >= 3
        page.reload()
        expect(page.locator("#model")).to_be_visible()  # without being asked again
        refusals = [fault for fault in seen.faults if re.search(r"status of (401|429)", fault)]
        assert {re.findall(r"\d+", fault.partition("status of")[2])[0] for fault in refusals} == {"401", "429"}
        seen.faults[:] = [fault for fault in seen.faults if fault not in refusals]


def test_a_full_queue_and_a_killed_worker_are_tried_again(browser: Browser) -> None:
    with serving("--max-queue", 16, "--max-items", 16) as server, opened(browser, server) as seen:
        page: Page = seen.page
        expect(page.locator("#model")).to_be_visible()
        add(
            page,
            {f"{number}-{photo.name}": photo.read_bytes() + bytes(number) for number in range(4) for photo in PHOTOS},
        )
        (worker,) = server.workers()
        wait_until(lambda: server.metric("robustfeat_images_total") > 20)
        os.kill(worker, signal.SIGKILL)
        wait_for_images(page, "160 images ready.")
        assert server.workers() != [worker]
        for name in ("one", "two"):
            page.fill("#new-class-name", name)
            page.keyboard.press("Enter")
        page.focus("#view-images")
        page.keyboard.press("1")
        (worker,) = server.workers()
        os.kill(worker, signal.SIGKILL)
        page.keyboard.press("2")
        wait_for_fit(page, 2)  # nothing was lost with the worker
        passing = [fault for fault in seen.faults if re.search(r"status of 503|ERR_|Failed to load", fault)]
        seen.faults[:] = [fault for fault in seen.faults if fault not in passing]


def test_the_documentation_of_the_api_needs_no_other_host(browser: Browser, plain: Server) -> None:
    with visit(browser, f"{plain.address}/docs", allowed=(f"{plain.address}/",)) as seen:
        expect(seen.page.locator("#swagger-ui .opblock-summary-path").first).to_be_visible(timeout=SECONDS)
        expect(seen.page.locator(".opblock", has_text="/teach")).to_be_visible()


def test_classes_are_corrected_by_mouse_and_undone(browser: Browser, plain: Server) -> None:
    with opened(browser, plain) as seen:
        page: Page = seen.page
        expect(page.locator("#model")).to_be_visible()
        add(page, {photo.name: photo.read_bytes() for photo in PHOTOS[:10]})
        wait_for_images(page, "10 images ready.")
        for name in ("first", "second"):
            page.fill("#new-class-name", name)
            page.click("#new-class button")
        page.fill("#new-class-name", "first")
        page.click("#new-class button")
        expect(page.locator("#toast")).to_have_text("There is a class of the name first already.")
        page.click(".tile:has-text('dress-1')")
        page.click(".tile:has-text('dress-3')", modifiers=["Shift"])
        page.click(".assign >> nth=0")
        page.click(".tile:has-text('hat-1')")
        page.click(".assign >> nth=1")
        wait_for_fit(page, 4)
        page.click("#next")
        page.click("#accept")
        wait_for_fit(page, 5)
        page.click("[aria-label='Rename second']")
        page.keyboard.insert_text("ha")
        add(page, {PHOTOS[10].name: PHOTOS[10].read_bytes()})
        wait_for_images(page, "11 images ready.")  # meanwhile the name stays in work
        page.keyboard.insert_text("ts")
        page.keyboard.press("Enter")
        expect(page.locator("#classes .text")).to_have_text(["first", "hats"])
        expect(page.locator("#classes input")).to_have_count(0)
        page.click("[aria-label='Remove hats']")
        expect(page.locator("#results")).to_be_hidden()
        page.click("#undo")
        wait_for_fit(page, 5)
        page.click("#undo")
        expect(page.locator("#classes .text")).to_have_text(["first", "second"])
        page.click("#undo")
        wait_for_fit(page, 4)
        page.click("#redo")
        wait_for_fit(page, 5)


def test_a_pasted_image_is_found_in_a_collection_of_the_server(browser: Browser, tmp_path: Path) -> None:
    with list_inputs([EXAMPLES]) as inputs:
        extractor = FeatureExtractor.from_pretrained(threads=1, streams=1)
        embed_files(extractor, inputs, str(tmp_path / "clothes.npy"), quiet=True)
    with serving("--collection", tmp_path / "clothes.npy") as server, opened(browser, server) as seen:
        page: Page = seen.page
        expect(page.locator("#model")).to_be_visible()
        page.evaluate(
            """(text) => {
                const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
                const data = new DataTransfer();
                data.items.add(new File([bytes], "image.png", { type: "image/png" }));
                document.dispatchEvent(new ClipboardEvent("paste", { clipboardData: data, cancelable: true }));
            }""",
            base64.b64encode(PHOTOS[4].read_bytes()).decode(),
        )
        wait_for_images(page, "1 image ready.")
        page.click(".tile:has-text('pasted-1.png')")
        page.select_option("#collection", "clothes")
        found = page.locator("#neighbours li")
        expect(found).to_have_count(8)
        expect(found.first).to_have_text(f"hat/{PHOTOS[4].name}1.00")
        asked: list[str] = []
        ended: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.on("requestfailed", lambda request: ended.append(request.url))
        page.route("**/similar/**", lambda route: len(asked) == 1 or route.continue_())  # the first hangs
        for name in ("first", "second"):
            page.fill("#new-class-name", name)
            page.keyboard.press("Enter")
        page.click(".assign >> nth=0")
        expect(page.locator("#selected-state")).to_have_text("Labelled first.")
        page.click(".tile")
        page.evaluate("0")  # after the requests of what was done before
        assert not asked
        page.select_option("#collection", "")
        page.select_option("#collection", "clothes")
        page.select_option("#collection", "")
        expect(page.locator("#neighbours li")).to_have_count(0)
        page.select_option("#collection", "clothes")
        expect(found).to_have_count(8)
        assert len(asked) == 2
        assert ended == asked[:1]


def test_later_images_and_other_models_keep_the_labels(browser: Browser, model: Path) -> None:
    with (
        serving("--model", "robustfeat=builtin", "--model", f"small={model}") as server,
        opened(browser, server) as seen,
    ):
        page: Page = seen.page
        expect(page.locator("#model-choice")).to_be_visible()
        add(page, {photo.name: photo.read_bytes() for photo in PHOTOS[:8]})
        wait_for_images(page, "8 images ready.")
        for name in ("first", "second"):
            page.fill("#new-class-name", name)
            page.keyboard.press("Enter")
        page.focus("#view-images")
        for key in "1122":
            page.keyboard.press(key)
        wait_for_fit(page, 4)
        add(page, {photo.name: photo.read_bytes() for photo in PHOTOS[8:12]})
        wait_for_images(page, "12 images ready.")
        predicted = page.locator(".tile[aria-label*=', predicted ']")
        expect(predicted).to_have_count(8)
        texts = "(tiles) => tiles.map((tile) => tile.textContent)"
        before = predicted.evaluate_all(texts)
        page.select_option("#model-choice", "small")
        wait_until(lambda: len(after := predicted.evaluate_all(texts)) == 8 and after != before)
        wait_for_fit(page, 4)
        assert page.locator(".tile.labelled").count() == 4


def test_another_model_is_chosen_while_images_are_embedded(browser: Browser, model: Path) -> None:
    with (
        serving("--model", "robustfeat=builtin", "--model", f"small={model}") as server,
        opened(browser, server) as seen,
    ):
        page: Page = seen.page
        expect(page.locator("#model-choice")).to_be_visible()
        hanging: list[Route] = []
        page.route(
            "**/embed?*",
            lambda route: hanging.append(route) if "robustfeat" in route.request.url else route.continue_(),
        )
        add(page, {photo.name: photo.read_bytes() for photo in PHOTOS})
        expect(page.locator("#progress-text")).to_have_text("Embedding 0 of 40 images")
        wait_until(lambda: page.evaluate("1") and len(hanging) == 2)
        page.select_option("#model-choice", "small")
        wait_for_images(page)


def test_images_that_were_cancelled_are_good_once_they_succeed(browser: Browser, plain: Server) -> None:
    with opened(browser, plain, accept_downloads=True) as seen:
        page: Page = seen.page
        expect(page.locator("#model")).to_be_visible()
        hanging: list[Route] = []
        page.route("**/embed?*", lambda route: route.continue_() if len(hanging) == 2 else hanging.append(route))
        add(page, {photo.name: photo.read_bytes() for photo in PHOTOS})
        wait_until(lambda: page.evaluate("1") and len(hanging) == 2)
        page.click("#cancel")
        expect(page.locator(".tile[title$=': cancelled']")).to_have_count(page.locator(".tile").count())
        page.click("#retry")
        wait_for_images(page)
        expect(page.locator(".tile[title$='.jpg']")).to_have_count(page.locator(".tile").count())
        for name in ("first", "second"):
            page.fill("#new-class-name", name)
            page.keyboard.press("Enter")
        page.focus("#view-images")
        for key in "12":
            page.keyboard.press(key)
        wait_for_fit(page, 2)
        assert {row["error"] for row in predictions(page).values()} == {""}


def test_no_image_is_lost_when_a_halved_batch_finds_the_server_busy(browser: Browser, plain: Server) -> None:
    with opened(browser, plain) as seen:
        page: Page = seen.page
        expect(page.locator("#model")).to_be_visible()
        routes: list[Route] = []

        def forward(route: Route) -> None:
            """A proxy: the first batch is too large for it, its first half finds it busy with the second batch."""
            routes.append(route)
            if len(routes) == 1:
                route.fulfill(status=413)
            elif len(routes) == 3:
                route.fulfill(status=503)
                page.wait_for_timeout(0)
                routes[1].continue_()
            elif len(routes) > 3:
                route.continue_()

        page.route("**/embed?*", forward)
        add(page, {photo.name: photo.read_bytes() for photo in PHOTOS})
        wait_for_images(page)
        assert len(seen.faults) == 2
        assert all(re.search(r"status of (413|503)", fault) for fault in seen.faults)
        seen.faults.clear()


def test_a_thumbnail_in_the_making_is_forgotten_with_its_image(browser: Browser, plain: Server) -> None:
    with opened(browser, plain) as seen:
        widths = seen.page.evaluate(
            """async () => {
                const { forgetThumbnails, thumbnail } = await import("/page/thumbnails.js");
                const file = (width) => new OffscreenCanvas(width, 8).getContext("2d").canvas.convertToBlob();
                const [before, after] = [await file(20), await file(30)].map((file) => ({ id: 0, file }));
                const held = Promise.withResolvers();
                const dropped = Promise.withResolvers();
                const [decode, revoke] = [createImageBitmap, URL.revokeObjectURL];
                let decoded = 0;
                window.createImageBitmap = async (...given) => {
                    decoded += 1;
                    if (given[0] === before.file) await held.promise;
                    return decode(...given);
                };
                URL.revokeObjectURL = (url) => { revoke.call(URL, url); dropped.resolve(); };
                const width = (image) => new Promise((then) => thumbnail(image, (found) => then(found.bitmap.width)));
                thumbnail(before, dropped.resolve);
                forgetThumbnails();
                const found = await Promise.all([width(after), width(after)]);
                held.resolve();
                await dropped.promise;
                return [...found, await width(after), decoded];
            }"""
        )
        assert widths == [30, 30, 30, 2]
