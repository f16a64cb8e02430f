"""Quotes text in CSV files that spreadsheets would run as formulas."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable

__all__ = ["SEPARATOR", "csv_line", "encode_line", "quote_cell", "unquote_cell"]

SEPARATOR = "|"
"""Separates several labels of one image in a cell."""

_FORMULA = re.compile(r"'*[=+\-@\t\r\n]")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def quote_cell(text: str) -> str:
    """Puts a `'` before text that a spreadsheet would run. Numbers stay numbers.

    >>> quote_cell("=cmd|'/C calc'!A0"), quote_cell("-1"), quote_cell("a.jpg")
    ("'=cmd|'/C calc'!A0", '-1', 'a.jpg')
    """
    return f"'{text}" if _FORMULA.match(text) and not _NUMBER.fullmatch(text) else text


def unquote_cell(text: str) -> str:
    """Reverses `quote_cell`.

    >>> unquote_cell("'=x"), unquote_cell("'quoted'")
    ('=x', "'quoted'")
    """
    return text[1:] if text.startswith("'") and _FORMULA.match(text) else text


def csv_line(cells: Iterable[str | int | float]) -> str:
    r"""Makes a line of CSV. `quote_cell` quotes text, and fractions get six digits.

    >>> csv_line(["a.jpg", 3, 0.25])
    'a.jpg,3,0.25\n'
    """
    text = io.StringIO()
    shown = [f"{cell:.6g}" if isinstance(cell, float) else quote_cell(str(cell)) for cell in cells]
    csv.writer(text, lineterminator="\n").writerow(shown)
    return text.getvalue()


def encode_line(line: str) -> bytes:
    """Encodes a line as UTF-8. File names that are not UTF-8 keep their bytes."""
    try:
        return line.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # not a name of a file
        return line.encode("utf-8", "replace")
