"""Draws a confusion matrix."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from robustfeat.palette import BLUE, ORANGE, rgb

__all__ = ["draw_confusion", "order_by_confusion"]

_NAMED_CLASSES = 150
"""Most classes whose names are drawn. With more, the cells are too small."""
_LONGEST_NAME = 24

_RIGHT, _WRONG = rgb(BLUE.light), rgb(ORANGE.light)
_INK, _LINES = (34, 34, 34), (216, 216, 216)

_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

_NOTE = "Blue: right. Orange: wrong. Darker: a larger share of the row. Confused classes are neighbours."


def order_by_confusion(confusion: NDArray[np.int64]) -> list[int]:
    """Orders classes so that confused ones are neighbours, by single linkage of the confused share.

    Args:
        confusion: (K, K), rows by label.

    Returns:
        A permutation of 0 to K - 1. Classes that are never confused keep their order.
    """
    shares = confusion / np.maximum(1, confusion.sum(1, keepdims=True))
    either = np.triu(shares + shares.T, 1)
    first, second = np.nonzero(either)
    chains = {one: [one] for one in range(len(confusion))}
    for at in np.argsort(-either[first, second], kind="stable"):
        left, right = int(first[at]), int(second[at])
        before, after = chains[left], chains[right]
        if before is after:
            continue
        # Each chain reverses if its class is nearer to the inner end.
        if before.index(left) < len(before) // 2:
            before.reverse()
        if after.index(right) > (len(after) - 1) // 2:
            after.reverse()
        before += after
        chains |= dict.fromkeys(after, before)
    unique = {id(chain): chain for chain in chains.values()}
    return [one for chain in unique.values() for one in (chain if chain[0] < chain[-1] else chain[::-1])]


def draw_confusion(confusion: NDArray[np.int64], classes: Sequence[str]) -> Image.Image:
    """Draws counts with one row per true class and one column per predicted class, as `order_by_confusion` orders them.

    Args:
        confusion: (K, K), rows by label.
        classes: K names. Above 150, no names are drawn. A name in letters that the font lacks becomes `(class N)`, its
            line in report.md.
    """
    order = order_by_confusion(confusion)
    ordered = confusion[np.ix_(order, order)]
    count = len(order)
    named = count <= _NAMED_CLASSES
    size = max(18, 44 - count // 2) if named else max(1, 1500 // count)
    font = ImageFont.load_default(13 if count <= 40 else 12)
    names = [_name_of(one, classes[one], font) if named else "" for one in order]
    widest = max(int(font.getlength(name)) for name in names) + 12
    title = ImageFont.load_default(16)
    left = top = 30 + widest  # room for the side's name and the names of its classes
    side = count * size
    width = max(left + side + 14, 12 + int(font.getlength(_NOTE)) + 12)
    image = Image.new("RGB", (width, top + side + 40), "white")
    draw = ImageDraw.Draw(image)
    _draw_cells(draw, ordered, (left, top), size)
    for at, name in enumerate(names):
        middle = at * size + size / 2
        draw.text((left - 6, top + middle), name, _INK, font, "rm")
        _draw_upwards(image, name, (left + middle, top - 6), font, widest)
    draw.text((left + min(side, width - left) / 2, 16), "Predicted class", _INK, title, "mm")
    standing = Image.new("RGB", (int(title.getlength("True class")) + 4, 26), "white")
    ImageDraw.Draw(standing).text((standing.width / 2, 13), "True class", _INK, title, "mm")
    standing = standing.rotate(90, expand=True)
    image.paste(standing, (4, max(0, int(top + side / 2 - standing.height / 2))))
    draw.text((12, top + side + 20), _NOTE, _INK, font, "lm")
    return image


def _draw_cells(draw: ImageDraw.ImageDraw, ordered: NDArray[np.int64], corner: tuple[int, int], size: int) -> None:
    left, top = corner
    side = len(ordered) * size
    shares = ordered / np.maximum(1, ordered.sum(1, keepdims=True))
    if size >= 12:
        for line in range(0, side + 1, size):
            draw.line((left + line, top, left + line, top + side), _LINES)
            draw.line((left, top + line, left + side, top + line), _LINES)
    for row, column in np.argwhere(ordered):
        # Use the square root, since few errors among many rows would be too pale.
        strength = 0.12 + 0.88 * float(np.sqrt(shares[row, column]))
        colour = _mix(_RIGHT if row == column else _WRONG, strength)
        x, y = left + column * size, top + row * size
        gap = int(size >= 12)
        draw.rectangle((x + gap, y + gap, x + size - 1, y + size - 1), colour)
        if size >= 12:
            text = _short_count(int(ordered[row, column]))
            ink = "white" if strength > 0.7 else _INK
            draw.text((x + size / 2, y + size / 2), text, ink, _fitting(text, size - 3), "mm")
    draw.rectangle((left, top, left + side, top + side), outline="gray")


def _draw_upwards(
    image: Image.Image,
    text: str,
    foot: tuple[float, float],
    font: _Font,
    longest: int,
) -> None:
    lying = Image.new("RGB", (longest, 18), "white")
    ImageDraw.Draw(lying).text((0, 9), text, _INK, font, "lm")
    image.paste(lying.rotate(90, expand=True), (int(foot[0] - 9), int(foot[1]) - longest))


def _mix(colour: tuple[int, int, int], strength: float) -> tuple[int, int, int]:
    """Mixes a colour with white."""
    red, green, blue = (round(255 - strength * (255 - part)) for part in colour)
    return red, green, blue


def _fitting(text: str, width: int) -> _Font:
    for size in (12, 11, 10, 9, 8):
        font = ImageFont.load_default(size)
        if font.getlength(text) <= width:
            break
    return font


def _short_count(number: int) -> str:
    """A count in at most four characters.

    >>> _short_count(999), _short_count(1234), _short_count(45_600)
    ('999', '1.2k', '46k')
    """
    if number < 1000:
        return str(number)
    return f"{number / 1000:.1f}k" if number < 9950 else f"{number / 1000:.0f}k"


def _shorten(name: str) -> str:
    one = " ".join(name.split())
    half = _LONGEST_NAME // 2
    return one if len(one) <= _LONGEST_NAME else f"{one[:half]}…{one[1 - half :]}"  # names often differ at the end


def _name_of(number: int, name: str, font: _Font) -> str:
    """The name in letters of the font (é becomes e), or its line in the table of report.md."""
    missing = bytes(font.getmask("\uffff"))

    def has(letter: str) -> bool:
        return letter.isspace() or bytes(font.getmask(letter)) != missing

    letters = [letter if has(letter) else unicodedata.normalize("NFKD", letter)[0] for letter in _shorten(name)]
    return "".join(letters) if letters and all(map(has, letters)) else f"(class {number + 1})"
