"""Draws README's chart, docs/images/speed.svg, from the tables of measured rates in docs/embedding.md.

    python benchmarks/speed_chart.py

Bars are images per second on two cores, at 64 px on the left and at 224 px on the right. The SVG has its own colours
for dark pages.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from html import escape
from pathlib import Path

from robustfeat.palette import BLUE, GREY

DOCS = Path(__file__).parents[1] / "docs"
CHART = DOCS / "images" / "speed.svg"
SIZES = ("64 px", "224 px")
LABELS, BAR, ROW, TOP = 225, 200, 26, 40  # widths of labels and of the longest bar, heights of a row and the headings
PANEL = BAR + 60

_STYLE = f"""\
text {{ font: 13px system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif; fill: #222 }}
.own {{ fill: {BLUE.light} }} .peer {{ fill: {GREY.light} }} text.strong {{ font-weight: 600 }}
@media (prefers-color-scheme: dark) {{ text {{ fill: #e8e8e8 }} \
.own {{ fill: {BLUE.dark} }} .peer {{ fill: {GREY.dark} }} }}"""


@dataclass(frozen=True)
class Program:
    """A program's rates in images/s, one for each of SIZES."""

    name: str
    rates: tuple[int, ...]
    own: bool = False


def cells(text: str, name: str) -> list[str]:
    """The cells of the row with a name.

    Raises:
        LookupError: no row has it, or more than one has.
    """
    rows: list[str] = re.findall(rf"^\| {re.escape(name)} \|(.*)\|$", text, re.MULTILINE)
    if len(rows) != 1:
        raise LookupError(f"docs/embedding.md: expected one row `| {name} |`; got {len(rows)}")
    return [cell.strip() for cell in rows[0].split("|")]


def programs(text: str) -> list[Program]:
    """Ours and others, the fastest first, from the text of docs/embedding.md."""
    text = text.partition("\n## Speed\n")[2].partition("\n## ")[0]
    ours = {"robustfeat, OpenVINO int8": "OpenVINO int8", "robustfeat, defaults": "ONNX Runtime fp32"}
    found = [
        Program(name, tuple(int(cells(text, f"{size}, {row}")[3]) for size in SIZES), own=True)
        for name, row in ours.items()
    ]
    others = {
        "LightlyTrain embed": "LightlyTrain's embed",
        "Pillow + ONNX Runtime loop": "Pillow + ONNX Runtime in one loop",
        "timm loader and model": "timm's loader and model",
        "torch + DataLoader": "torch + torchvision, DataLoader",
    }
    found += [Program(name, tuple(map(int, cells(text, row)))) for name, row in others.items()]
    parallel = tuple(int(cell.split(";")[-1]) for cell in cells(text, "fastembed; with `parallel`"))
    found.append(Program("fastembed, parallel", parallel))
    return sorted(found, key=lambda program: (program.rates, program.own), reverse=True)


def chart(found: list[Program]) -> str:
    """The SVG: a panel for each size, with a bar and its number for each program."""
    lines = []
    for row, program in enumerate(found):
        strong = ' class="strong"' if program.own else ""
        y = TOP + row * ROW + 13
        lines.append(f'<text x="{LABELS - 10}" y="{y + 4}" text-anchor="end"{strong}>{escape(program.name)}</text>')
        for panel, rate in enumerate(program.rates):
            x, longest = LABELS + panel * PANEL, max(other.rates[panel] for other in found)
            length = round(BAR * rate / longest, 1)
            kind = "own" if program.own else "peer"
            lines.append(f'<rect class="{kind}" x="{x}" y="{y - 9}" width="{length}" height="18" rx="2"/>')
            lines.append(f'<text x="{x + length + 6}" y="{y + 4}"{strong}>{rate}</text>')
    for panel, size in enumerate(SIZES):
        lines.append(f'<text x="{LABELS + panel * PANEL}" y="22" class="strong">{size}, images/s</text>')
    width, height = LABELS + len(SIZES) * PANEL, TOP + len(found) * ROW + 8
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img">\n<title>Images per second on two cores</title>\n<style>\n{_STYLE}\n</style>\n'
        + "\n".join(lines)
        + "\n</svg>\n"
    )


def main() -> None:
    CHART.write_text(chart(programs((DOCS / "embedding.md").read_text("utf-8"))), "utf-8")


if __name__ == "__main__":
    main()
