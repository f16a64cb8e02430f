"""Text in CSV files that spreadsheets would run as formulas."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable

__all__ = ["SEPARATOR", "csv_line", "encode_line", "quote_cell", "unquote_cell"]

SEPARATOR = "|"
"""Between several labels of one image in a cell."""

_FORMULA = re.compile(r"'*[=+\-@\t\r\n]")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def quote_cell(text: str) -> str:
    """The text behind a `'` where a spreadsheet would run it; numbers stay numbers.

    >>> quote_cell("=cmd|'/C calc'!A0"), quote_cell("-1"), quote_cell("a.jpg")
    ("'=cmd|'/C calc'!A0", '-1', 'a.jpg')
    """
    return f"'{text}" if _FORMULA.match(text) and not _NUMBER.fullmatch(text) else text


def unquote_cell(text: str) -> str:
    """The inverse of `quote_cell`.

    >>> unquote_cell("'=x"), unquote_cell("'quoted'")
    ('=x', "'quoted'")
    """
    return text[1:] if text.startswith("'") and _FORMULA.match(text) else text


def csv_line(cells: Iterable[str | int | float]) -> str:
    r"""A line of CSV. Texts stand as `quote_cell` gives them, fractions with six digits.

    >>> csv_line(["a.jpg", 3, 0.25])
    'a.jpg,3,0.25\n'
    """
    text = io.StringIO()
    shown = [f"{cell:.6g}" if isinstance(cell, float) else quote_cell(str(cell)) for cell in cells]
    csv.writer(text, lineterminator="\n").writerow(shown)
    return text.getvalue()


def encode_line(line: str) -> bytes:
    """UTF-8; names of files that are not UTF-8 keep their bytes."""
    try:
        return line.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # no name of a file
        return line.encode("utf-8", "replace")
