"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

__all__ = ["cell", "columns", "table"]


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """A line for the columns and one for each row, where those that are missing are empty; ends with a newline."""
    names = columns(rows)
    lines = [names, *([str(row.get(name, "")) for name in names] for row in rows)]
    head, *body = (f"| {' | '.join(map(cell, line))} |" for line in lines)
    return "\n".join([head, f"|{'---|' * len(names)}", *body]) + "\n"


def columns(rows: Sequence[Mapping[str, object]]) -> list[str]:
    """The keys of the rows together, in the order in which they first occur."""
    return list(dict.fromkeys(key for row in rows for key in row))


def cell(text: str) -> str:
    """Text that stays in its cell: no tag of HTML, link or image begins in it."""
    return " ".join(text.splitlines()).replace("|", r"\|").replace("<", "&lt;").replace("](", r"]\(")
