"""People with any kind of colour blindness tell the colours of maps and figures apart."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from skimage.color import deltaE_ciede2000, rgb2lab

from robustfeat.palette import BLUE, CATEGORIES, ORANGE, SCALE, SERIES

# Machado, Oliveira and Fernandes, 2009, severity 1: applied to linear RGB.
VISION = {
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}
PAGES = {"light": (251, 251, 250), "dark": (20, 23, 26)}


def seen(colours: np.ndarray, vision: str) -> np.ndarray:
    """(n, 3) values up to 255 as Lab, as someone sees them."""
    shares = colours / 255
    linear = np.where(shares <= 0.04045, shares / 12.92, ((shares + 0.055) / 1.055) ** 2.4)
    light = np.clip(linear @ np.array(VISION[vision]).T, 0, 1)
    shown = np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)
    return np.asarray(rgb2lab(shown[None])[0])


def numbers(colour: str) -> list[int]:
    return [int(colour[at : at + 2], 16) for at in (1, 3, 5)]


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize("page", PAGES)
def test_any_two_colours_differ_and_none_is_lost_on_the_page(page: str, vision: str) -> None:
    assert least_difference([*map(numbers, getattr(CATEGORIES, page)), PAGES[page]], vision) > 15
    assert least_difference([*map(numbers, (getattr(BLUE, page), getattr(ORANGE, page))), PAGES[page]], vision) > 25


@pytest.mark.parametrize("vision", VISION)
def test_any_two_lines_of_a_figure_differ(vision: str) -> None:
    assert least_difference([*map(numbers, SERIES), (255, 255, 255)], vision) > 9


def least_difference(colours: Sequence[Sequence[int]], vision: str) -> float:
    """The smallest CIEDE2000 of any two."""
    pairs = np.array(list(itertools.combinations(seen(np.array(colours), vision), 2)))
    return float(deltaE_ciede2000(pairs[:, 0], pairs[:, 1]).min())  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize("page", PAGES)
def test_the_scale_goes_from_dark_to_light_for_everyone(page: str, vision: str) -> None:
    lightness = seen(np.array(getattr(SCALE, page)), vision)[:, 0]
    assert (np.diff(lightness) > 3).all()
