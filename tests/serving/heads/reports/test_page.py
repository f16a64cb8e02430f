"""report.html: one file, nothing to run, the images to look at, and whether probabilities hold."""

from __future__ import annotations

import base64
import html
import io
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.calibration import calibration_curve
from sklearn.linear_model import LogisticRegression

from robustfeat.serving.decoding import process
from robustfeat.serving.heads.reports.answers import Answers
from robustfeat.serving.heads.reports.page import draw_page
from robustfeat.serving.heads.reports.reliability import Reliability, uncalibrated
from robustfeat.serving.heads.reports.report import Report
from robustfeat.serving.heads.reports.thumbnails import read_thumbnails
from tests.conftest import EXAMPLES
from tests.serving.decoding.test_odd_images import TRAPPED_DECODER, TRAPS


def answers_of(count: int = 60, classes: tuple[str, ...] = ("cat", "dog", "<b>eel</b>")) -> Answers:
    draw = np.random.default_rng(0)
    targets = draw.integers(0, len(classes), count)
    margins = draw.normal(size=(count, len(classes))) + 2 * np.eye(len(classes))[targets]
    shares = np.exp(3 * margins) / np.exp(3 * margins).sum(1, keepdims=True)
    names = [f"{classes[target]}/{row}.jpg" for row, target in enumerate(targets)]
    return Answers(names, classes, targets, shares.argmax(1), margins, shares, np.ptp(margins, axis=1))


class Page(HTMLParser):
    """Tags, attributes, and the text below each heading."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.sections: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        self._open.append(tag)

    def handle_data(self, data: str) -> None:
        if self._open[-1:] == ["h2"]:
            self.sections[data] = []
        elif self.sections and data.strip():
            self.sections[list(self.sections)[-1]].append(data)

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass


def test_a_page_needs_no_other_file_and_runs_nothing() -> None:
    text = draw_page(Report.of_answers(answers_of(), unseen=True), "held out")
    page = Page(text)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "form", "a"}
    assert all(value.startswith("data:image/") for _, more in page.tags if (value := more.get("src")))
    assert not any(name.startswith("on") or name == "href" for _, more in page.tags for name in more)
    policy = next(more["content"] for tag, more in page.tags if more.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert "://" not in text
    assert "<b>eel" not in text
    images = ["Labels that are probably wrong", "Wrong", "Least certain", "Most certain"]
    assert list(page.sections) == [*images, "Confusion", "Calibration", "Classes"]


def test_images_are_at_most_24_of_a_group_and_in_order() -> None:
    answers = answers_of(1500)
    asked: set[str] = set()
    pixel = io.BytesIO()
    Image.new("RGB", (4, 4)).save(pixel, "WEBP")

    def read(paths: object) -> dict[str, bytes]:
        assert isinstance(paths, set)
        asked.update(paths)
        return dict.fromkeys(paths, pixel.getvalue())

    text = draw_page(Report.of_answers(answers, unseen=True), "held out", read)
    sections = {
        name: re.findall(r'class="note"><bdi>([^<]+)</bdi>', body.split("<h2>")[0])
        for name, body in re.findall(r"<h2>([^<]+)</h2>(.*?)(?=<h2>|</body>)", text, re.DOTALL)
    }
    assert answers.confidence is not None
    names = [html.escape(path) for path in answers.paths]
    sure = dict(zip(names, answers.confidence, strict=True))
    right = dict(zip(sure, answers.right, strict=True))
    for name, expected in [
        ("Wrong", sorted((path for path in sure if not right[path]), key=lambda path: -sure[path])),
        ("Most certain", sorted((path for path in sure if right[path]), key=lambda path: -sure[path])),
        ("Least certain", sorted(sure, key=lambda path: sure[path])),
    ]:
        assert len(sections[name]) == 24
        assert [sure[path] for path in sections[name]] == [sure[path] for path in expected[:24]]
        assert {right[path] for path in sections[name]} <= {right[path] for path in expected}
    shown = sections["Labels that are probably wrong"]
    assert len(shown) == min(24, len(answers.suspects)) > 5
    assert not any(right[path] for path in shown)
    assert text.count("data:image/webp") == sum(map(len, (sections[name] for name in list(sections)[:4])))
    assert len(asked) <= 96
    assert "Check these labels." in text  # all rows of a report are labelled


def test_images_that_are_gone_are_named_and_a_line_says_so() -> None:
    report = Report.of_answers(answers_of())
    assert "The images have no picture" in draw_page(report, "score")
    text = draw_page(report, "score", lambda paths: {})
    assert "The images have no picture: only their features were given, or they could" in text
    assert "cat/" in text
    assert "data:image/webp" not in text
    assert "Labels that are probably wrong" not in text  # the rows may have been fitted


def test_thumbnails_are_small_and_those_of_their_paths(tmp_path: Path) -> None:
    shutil.copytree(EXAMPLES / "hat", tmp_path / "in" / "hat")
    (tmp_path / "in" / "hat" / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    Image.new("RGB", (900, 30), "red").save(tmp_path / "in" / "wide.png")
    wanted = ["hat/hat-1.jpg", "hat/broken.jpg", "wide.png", "none.jpg"]
    found = read_thumbnails([str(tmp_path / "in")], wanted)
    assert set(found) == {"hat/hat-1.jpg", "wide.png"}
    with Image.open(io.BytesIO(found["wide.png"])) as image:
        assert (image.format, image.size) == ("WEBP", (144, 5))
        assert image.convert("RGB").getpixel((70, 2)) == pytest.approx((255, 0, 0), abs=12)
    with Image.open(io.BytesIO(found["hat/hat-1.jpg"])) as small, Image.open(EXAMPLES / "hat/hat-1.jpg") as large:
        alike = np.asarray(large.convert("RGB").resize(small.size), float) - np.asarray(small.convert("RGB"), float)
        assert np.abs(alike).mean() < 8
    assert len(found["hat/hat-1.jpg"]) < 10_000
    assert read_thumbnails([str(tmp_path / "moved")], wanted) == {}
    assert read_thumbnails(["-"], wanted) == {}


@pytest.mark.parametrize("trap", ["segfault.png", "exit.png"])
def test_an_image_that_crashes_its_decoder_costs_only_its_thumbnail(
    trap: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = TRAPPED_DECODER.format(flag="")

    def start(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        trapped = command[-1].replace("from robustfeat", f"exec({code!r}); from robustfeat", 1)
        return subprocess.Popen([*command[:-1], trapped], **options)

    monkeypatch.setattr(process, "subprocess", SimpleNamespace(Popen=start, DEVNULL=subprocess.DEVNULL))
    for name in ("a.png", "b.png", "c.png"):
        Image.new("RGB", (200, 100), "red").save(tmp_path / name)
    with open(tmp_path / "b.png", "ab") as handle:
        handle.write(b"TRAP:" + TRAPS[trap][0].encode())
    assert set(read_thumbnails([str(tmp_path)], ["a.png", "b.png", "c.png"])) == {"a.png", "c.png"}


def test_the_page_holds_the_picture_and_several_labels_have_none() -> None:
    answers = answers_of()
    text = draw_page(Report.of_answers(answers), "score")
    encoded = re.search(r'src="data:image/png;base64,([^"]+)"', text)
    assert encoded
    with Image.open(io.BytesIO(base64.b64decode(encoded[1]))) as image:
        assert image.convert("RGB") == Report.of_answers(answers).picture
    several = np.eye(3, dtype=bool)[answers.targets]
    assert answers.probabilities is not None
    guessed = answers.probabilities > 0.5
    guessed[answers.certainty.argmin()] = False
    text = draw_page(Report.of_answers(replace(answers, targets=several, predicted=guessed)), "score")
    assert "data:image/png" not in text
    assert "no label" in text


@pytest.mark.parametrize("classes", [2, 5])
def test_bins_and_error_are_those_of_scikit_learn(classes: int) -> None:
    draw = np.random.default_rng(1)
    targets = draw.integers(0, classes, 2000)
    probabilities = draw.dirichlet(np.ones(classes), 2000)
    probabilities[np.arange(2000), targets] += draw.random(2000)
    probabilities /= probabilities.sum(1, keepdims=True)
    found = Reliability.of(probabilities, targets)
    sure, right = probabilities.max(1), probabilities.argmax(1) == targets
    accuracy, confidence = calibration_curve(right, sure, n_bins=10)
    np.testing.assert_allclose(found.accuracy, accuracy)
    np.testing.assert_allclose(found.confidence, confidence)
    rows = np.histogram(sure, np.linspace(0, 1, 11))[0]
    assert found.error == pytest.approx(np.average(np.abs(accuracy - confidence), weights=rows[rows > 0]))


def test_probabilities_before_calibration_are_those_of_logistic_regression() -> None:
    draw = np.random.default_rng(0)
    x = draw.normal(size=(90, 4))
    for classes in (2, 3):
        fitted = LogisticRegression().fit(x, np.arange(90) % classes)
        margins = fitted.decision_function(x)
        both = np.stack([-margins, margins], 1) if classes == 2 else margins
        np.testing.assert_allclose(uncalibrated(both, multi_label=False), fitted.predict_proba(x))
