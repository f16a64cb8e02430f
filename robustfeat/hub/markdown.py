"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

__all__ = ["table"]


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """A line for the columns, which are the keys of the rows, and one for each row; ends with a newline."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, *([str(row.get(column, "")) for column in columns] for row in rows)]
    head, *body = (f"| {' | '.join(map(_cell, line))} |" for line in lines)
    return "\n".join([head, f"|{'---|' * len(columns)}", *body]) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.splitlines()).replace("|", r"\|")
