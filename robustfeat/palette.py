"""Colours of all figures, maps and reports. People with any colour blindness can tell them apart."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["BLUE", "CATEGORIES", "GREY", "ORANGE", "SCALE", "SERIES", "Categories", "Scale", "Shade", "rgb"]

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Shade:
    """A colour on light and on dark pages, as `#rrggbb`."""

    light: str
    dark: str


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


BLUE, ORANGE = Shade("#0072b2", "#56b4e9"), Shade("#d55e00", "#e69f00")
"""For two things that are opposites: right and wrong, after and before, ours and others."""

GREY = Shade("#9a9fa6", "#777c84")
"""For all that is compared with."""

SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Lines on white paper, in this order. They and the colours above are Okabe and Ito's palette (2008), without the
yellow, which is too light for lines."""

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


def rgb(colour: str) -> Colour:
    """Red, green and blue of `#rrggbb`.

    >>> rgb("#0072b2")
    (0, 114, 178)
    """
    red, green, blue = bytes.fromhex(colour[1:])
    return red, green, blue
