"""Colours of a map, for light and dark pages."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CATEGORIES", "SCALE", "Categories", "Scale"]

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Categories:
    """Colours of categories, as `#rrggbb`."""

    light: tuple[str, ...]
    dark: tuple[str, ...]


@dataclass(frozen=True)
class Scale:
    """Colours of numbers from low to high, as red, green and blue up to 255. Other values are interpolated."""

    light: tuple[Colour, ...]
    dark: tuple[Colour, ...]


CATEGORIES = Categories(
    light=("#4a4ad7", "#b3b52e", "#a2030e", "#329360", "#bb77a0", "#92b7fe", "#84345e"),
    dark=("#909fff", "#e2e587", "#db300c", "#099069", "#fe8aa7", "#85f2fe", "#976796"),
)
"""Seven colours from a search for the largest difference of any two, for normal vision, protanopia, deuteranopia and
tritanopia (Machado et al., 2009). CIEDE2000 is at least 15."""

SCALE = Scale(
    light=(
        (0, 34, 78),
        (18, 53, 112),
        (60, 74, 108),
        (88, 94, 109),
        (114, 114, 116),
        (140, 136, 120),
        (167, 157, 115),
        (197, 181, 104),
        (229, 207, 82),
    ),
    dark=(
        (67, 78, 108),
        (90, 95, 110),
        (111, 112, 115),
        (132, 130, 121),
        (155, 148, 118),
        (180, 167, 111),
        (205, 187, 99),
        (231, 209, 80),
        (254, 232, 56),
    ),
)
"""Cividis (Nunez et al., 2018) without the end that is too close to the page's colour."""
