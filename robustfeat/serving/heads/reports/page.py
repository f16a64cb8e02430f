"""Renders a report as one self-contained HTML file: numbers, pictures and example images."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np

from robustfeat.counts import format_count
from robustfeat.palette import BLUE, ORANGE
from robustfeat.serving.heads.reports.answers import Answers
from robustfeat.serving.heads.reports.reliability import Reliability, draw_reliability, uncalibrated
from robustfeat.serving.heads.reports.report import Report
from robustfeat.serving.inputs.sources import printable

__all__ = ["SETTINGS_NOTE", "Thumbnails", "draw_page"]

SETTINGS_NOTE = (
    "All settings that were tried. The interval is for one setting. The best of many scores is partly luck, so new "
    "images may score lower."
)

Thumbnails = Callable[[Collection[str]], Mapping[str, bytes]]
"""WebP files by path, of images that can be read."""

_SHOWN = 24

_COLOURS = f"""
:root {{ --blue: {BLUE.light}; --orange: {ORANGE.light}; }}
@media (prefers-color-scheme: dark) {{ :root {{ --blue: {BLUE.dark}; --orange: {ORANGE.dark}; }} }}"""

_STYLE = """
:root { color-scheme: light dark; --ink: #222; --paper: #fff; --faint: #666; --line: #ddd; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e8; --paper: #16181b; --faint: #a5a5a5; --line: #3a3d42; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 76rem;
  margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; } p { margin: .3rem 0; }
.note { color: var(--faint); } .numbers { display: flex; flex-wrap: wrap; gap: .5rem 2rem; padding: 0; margin: 0; }
.numbers div { display: flex; flex-direction: column-reverse; } .numbers dt { color: var(--faint); }
.numbers dd { margin: 0; font-size: 1.5rem; }
.wide { overflow-x: auto; } .wide > img { background: #fff; display: block; }
table { border-collapse: collapse; } th, td { padding: .2rem .7rem; border-bottom: 1px solid var(--line);
  text-align: right; } th:first-child, td:first-child { text-align: left; }
.images { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: 1rem .8rem; }
figure { margin: 0; font-size: .85rem; line-height: 1.35; overflow-wrap: anywhere; }
figure img { width: 100%; height: 9rem; object-fit: contain; background: var(--line); display: block; }
figcaption b { font-weight: 600; } .wrong b { color: var(--orange); }
.reliability { width: 20rem; max-width: 100%; font-size: 12px; fill: var(--ink); }
.reliability rect { fill: none; stroke: var(--line); } .reliability line { stroke: var(--faint);
  stroke-dasharray: 4 4; } polyline { fill: none; stroke-width: 2; }
.before { stroke: var(--orange); } .after { stroke: var(--blue); }
circle.before { fill: var(--paper); } circle.after { fill: var(--blue); }
"""


def draw_page(report: Report, title: str, thumbnails: Thumbnails | None = None) -> str:
    """Renders the page.

    Args:
        report: a report, with or without answers.
        title: the title of the page.
        thumbnails: reads the images on the page.
    """
    low, high = report.interval
    numbers = {
        "accuracy": f"{report.accuracy:.4f}",
        "95 % interval": f"{low:.3f} to {high:.3f}",
        "balanced accuracy": f"{report.balanced_accuracy:.4f}",
        "macro F1": f"{report.macro_f1:.4f}",
        "rows": f"{report.rows:,}",
    }
    parts = [
        f"<h1>{_text(title.capitalize())}</h1>",
        '<dl class="numbers">'
        + "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in numbers.items())
        + "</dl>",
    ]
    if report.absent:
        names = _text(", ".join(report.absent))
        count = format_count(len(report.absent), "class")
        parts.append(f'<p class="note">Balanced accuracy and macro F1 leave out {count} without rows: {names}</p>')
    if report.answers:
        parts += _draw_images(report, report.answers, thumbnails)
    picture = report.picture
    if picture is not None:
        written = io.BytesIO()
        picture.save(written, "PNG", optimize=True)
        parts.append(
            "<h2>Confusion</h2><p>Rows are true classes, columns are predicted classes.</p>"
            f'<div class="wide">{_image("image/png", written.getvalue(), "Confusion matrix", picture.size)}</div>'
        )
    if report.answers and report.answers.probabilities is not None:
        parts.append(_draw_calibration(report.answers, unseen=report.unseen))
    parts.append(_draw_classes(report))
    if report.settings:
        lines = [list(row.values()) for row in report.settings]
        parts.append(f"<h2>Settings</h2><p>{SETTINGS_NOTE}</p>{_draw_table(list(report.settings[0]), lines)}")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_COLOURS}{_STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _draw_images(report: Report, answers: Answers, thumbnails: Thumbnails | None) -> list[str]:
    groups = _choose(answers, unseen=report.unseen)
    chosen = {answers.paths[at] for _, _, rows in groups for at in rows}
    found = thumbnails(chosen) if thumbnails else {}
    parts = []
    if len(found) < len(chosen):
        which = f"{len(chosen) - len(found)} of {format_count(len(chosen), 'image')}" if found else "The images"
        parts.append(
            f'<p class="note">{which} have no picture: only their features were given, or they could not be '
            "read again.</p>"
        )
    for name, note, rows in groups:
        shown = "".join(_draw_row(answers, at, found) for at in rows) if rows else ""
        parts.append(
            f"<h2>{name}</h2><p>{note}</p>" + (f'<div class="images">{shown}</div>' if shown else "<p>None.</p>")
        )
    return parts


def _choose(answers: Answers, *, unseen: bool) -> list[tuple[str, str, Sequence[int]]]:
    """Names, notes and rows of the groups of images."""
    confidence = answers.confidence
    surely = np.argsort(-(answers.certainty if confidence is None else confidence), kind="stable")
    wrong = surely[~answers.right[surely]]
    right = surely[answers.right[surely]]
    groups: list[tuple[str, str, Sequence[int]]] = []
    if unseen and confidence is not None:
        labels = format_count(len(answers.suspects), "label")
        note = f"{labels}, listed in suspects.csv. Each is less than 1/20 as probable as the prediction."
        groups.append(("Labels that are probably wrong", note, answers.suspects[:_SHOWN]))
    return [
        *groups,
        ("Wrong", f"{format_count(len(wrong), 'row')}, the most certain first.", wrong[:_SHOWN].tolist()),
        ("Least certain", "Check these labels.", surely[::-1][:_SHOWN].tolist()),
        ("Most certain", "Right predictions with the largest certainty.", right[:_SHOWN].tolist()),
    ]


def _draw_row(answers: Answers, at: int, found: Mapping[str, bytes]) -> str:
    path, given, answer = answers.paths[at], answers.given(at) or "no label", answers.answer(at) or "no label"
    picture = _image("image/webp", found[path], "") if path in found else ""
    confidence = answers.confidence
    sure = "" if confidence is None else f", {confidence[at]:.0%}"
    same = bool(answers.right[at])
    said = f"<b>{_text(answer)}</b>{sure}" + ("" if same else f"<br>label: {_text(given)}")
    kind = "" if same else ' class="wrong"'
    return f'<figure{kind}>{picture}<figcaption>{said}<br><span class="note">{_text(path)}</span></figcaption></figure>'


def _draw_calibration(answers: Answers, *, unseen: bool) -> str:
    assert answers.probabilities is not None
    raw = uncalibrated(answers.margins, multi_label=answers.targets.ndim == 2)
    before = Reliability.of(raw, answers.targets)
    after = Reliability.of(answers.probabilities, answers.targets)
    fitted = " The calibration was fitted to these rows." if unseen else ""
    return (
        "<h2>Calibration</h2><p>80 % of predictions with a confidence of 0.8 should be right. Expected calibration "
        f"error: <b>{before.error:.4f}</b> before (orange, hollow), <b>{after.error:.4f}</b> after (blue).{fitted}</p>"
        + draw_reliability(before, after)
    )


def _draw_classes(report: Report) -> str:
    lines = [
        [one.name, f"{one.rows:,}", f"{one.precision:.4f}", f"{one.recall:.4f}", f"{one.f1:.4f}"]
        for one in report.classes
    ]
    return f"<h2>Classes</h2>{_draw_table(['class', 'rows', 'precision', 'recall', 'F1'], lines)}"


def _draw_table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    def line(kind: str, cells: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{kind}>{_text(cell)}</{kind}>" for cell in cells) + "</tr>"

    return f'<div class="wide"><table>{line("th", head)}{"".join(line("td", cells) for cells in lines)}</table></div>'


def _image(kind: str, data: bytes, name: str, size: tuple[int, int] | None = None) -> str:
    sides = f' width="{size[0]}" height="{size[1]}"' if size else ""
    return f'<img alt="{name}"{sides} src="data:{kind};base64,{base64.b64encode(data).decode()}">'


def _text(text: str) -> str:
    """Escapes text for HTML and isolates its text direction."""
    return f"<bdi>{html.escape(printable(text))}</bdi>"
