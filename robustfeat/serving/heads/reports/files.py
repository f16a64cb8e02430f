"""Writes a report as report.md, report.html, confusion.png and suspects.csv."""

from __future__ import annotations

from pathlib import Path

from robustfeat.files import new_folder
from robustfeat.hub.markdown import table
from robustfeat.serving.heads.cells import encode_line
from robustfeat.serving.heads.reports.answers import suspects_csv, suspects_text
from robustfeat.serving.heads.reports.page import SETTINGS_NOTE, Thumbnails, draw_page
from robustfeat.serving.heads.reports.report import Report

__all__ = ["save_report", "write_report"]


def save_report(report: Report, target: str | Path, title: str, thumbnails: Thumbnails | None = None) -> None:
    """Writes the files to a new folder (see `write_report`).

    Raises:
        InputError: the folder exists or cannot be written.
    """
    with new_folder(target) as folder:
        write_report(report, folder, title, thumbnails)


def write_report(report: Report, folder: Path, title: str, thumbnails: Thumbnails | None = None) -> None:
    """Writes report.md, report.html and confusion.png, and suspects.csv for held-out rows, to an existing folder.

    `thumbnails` reads the images on the page.
    """
    text = report.to_markdown(title) + "\n"
    if report.answers and report.unseen:
        text += "\n" + suspects_text(report.answers)
        (folder / "suspects.csv").write_bytes(encode_line(suspects_csv(report.answers)))
    if report.settings:
        text += f"\n{SETTINGS_NOTE}\n\n{table(report.settings)}"
    (folder / "report.md").write_text(text, "utf-8")
    (folder / "report.html").write_text(draw_page(report, title, thumbnails), "utf-8")
    picture = report.picture
    if picture is not None:
        picture.save(folder / "confusion.png")
