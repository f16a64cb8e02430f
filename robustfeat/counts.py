"""Formats counts with their nouns."""

from __future__ import annotations

__all__ = ["format_count"]


def format_count(number: int, noun: str, plural: str = "") -> str:
    """Formats a number with its noun, which is plural unless the number is 1.

    Args:
        number: the count.
        noun: the singular.
        plural: the plural; by default the singular with an s, or es after s and x.

    >>> format_count(1, "image"), format_count(1200, "image"), format_count(0, "class")
    ('1 image', '1,200 images', '0 classes')
    """
    plural = plural or noun + ("es" if noun.endswith(("s", "x")) else "s")
    return f"{number:,} {noun if number == 1 else plural}"
