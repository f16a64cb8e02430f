"""Renders tables in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

__all__ = ["cell", "columns", "table"]


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """Renders rows as a table with empty cells for missing values. It ends with a newline."""
    names = columns(rows)
    lines = [names, *([str(row.get(name, "")) for name in names] for row in rows)]
    head, *body = (f"| {' | '.join(map(cell, line))} |" for line in lines)
    return "\n".join([head, f"|{'---|' * len(names)}", *body]) + "\n"


def columns(rows: Sequence[Mapping[str, object]]) -> list[str]:
    """All keys of the rows, in the order of their first occurrence."""
    return list(dict.fromkeys(key for row in rows for key in row))


def cell(text: str) -> str:
    """Escapes text for a cell, so it starts no HTML tag, link or image."""
    return " ".join(text.splitlines()).replace("|", r"\|").replace("<", "&lt;").replace("](", r"]\(")
