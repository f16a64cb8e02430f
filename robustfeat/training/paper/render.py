"""Tables and figures as files: CSV, Markdown, PNG, SVG, and one HTML page that needs no other file."""

from __future__ import annotations

import csv
import html
import io
import textwrap
from collections.abc import Sequence
from pathlib import Path

from robustfeat.files import new_file
from robustfeat.hub.markdown import table
from robustfeat.training.evaluation.figures import draw
from robustfeat.training.paper.exhibit import Exhibit

__all__ = ["markdown", "write_exhibit", "write_page"]

_STYLE = """:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; display: block; overflow-x: auto; }
th, td { border: 1px solid #8888; padding: .25rem .6rem; text-align: left; white-space: nowrap; }
svg { max-width: 100%; height: auto; }"""


def markdown(exhibit: Exhibit) -> str:
    """Heading, table and notes, the latter in lines of up to 100 characters."""
    notes = [textwrap.fill(note, 100, break_on_hyphens=False) for note in exhibit.notes]
    return "\n".join([f"### {exhibit.title}", "", table(exhibit.rows), *notes]).rstrip() + "\n"


def write_exhibit(exhibit: Exhibit, folder: Path) -> list[Path]:
    """Writes NAME.csv and NAME.md, and for figures NAME.png and NAME.svg; returns them."""
    folder.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.DictWriter(text, exhibit.columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(exhibit.rows)
    contents: dict[str, bytes] = {"csv": text.getvalue().encode(), "md": markdown(exhibit).encode()}
    if exhibit.panels:
        contents |= {"png": draw(exhibit.panels, "png", exhibit.name), "svg": exhibit.svg}
    files = []
    for kind, content in contents.items():
        files.append(folder / f"{exhibit.name}.{kind}")
        with new_file(files[-1]) as partial:
            partial.write_bytes(content)
    return files


def write_page(exhibits: Sequence[Exhibit], file: Path, title: str, remarks: Sequence[str] = ()) -> None:
    """All of them on one page, below the remarks; pictures are part of it."""
    parts = []
    for exhibit in exhibits:
        keys = exhibit.columns
        cells = [keys, *([str(row.get(key, "")) for key in keys] for row in exhibit.rows)]
        lines = [
            "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in line) + "</tr>"
            for tag, line in zip(["th"] + ["td"] * len(exhibit.rows), cells, strict=True)
        ]
        picture = ""
        if exhibit.panels:
            drawn = exhibit.svg.decode()
            picture = drawn[drawn.index("<svg") :]  # without the XML header, which HTML does not have
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in exhibit.notes)
        parts.append(
            f'<section id="{exhibit.name}"><h2>{html.escape(exhibit.title)}</h2>{picture}'
            f"<table>{''.join(lines)}</table>{notes}</section>"
        )
    listed = f"<ul>{''.join(f'<li>{html.escape(line)}</li>' for line in remarks)}</ul>" if remarks else ""
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style><h1>{html.escape(title)}</h1>{listed}{''.join(parts)}</html>\n"
    )
    with new_file(file) as partial:
        partial.write_text(page, "utf-8")
