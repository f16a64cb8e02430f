"""A small map whose every image has a colour of its own, so that a thumbnail tells whose it is."""

from __future__ import annotations

import colorsys
import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from robustfeat.serving.heads.cells import quote_cell
from robustfeat.serving.heads.features import Features, open_features
from robustfeat.serving.maps.building import MapOptions, add_thumbnails, build_map
from robustfeat.serving.maps.colourings import Colouring, categories_of
from robustfeat.serving.maps.document import CollectionMap, write_page
from robustfeat.serving.maps.layers import Layer
from tests.conftest import WriteFeatures

PER_GROUP = 20
GROUPS = ("ant", "bee", "cat")

HOSTILE = {
    0: 'ant/<img src=x onerror="alert(1)">.png',
    1: "ant/</script><script>alert(2)</script>.png",
    2: "ant/line\u2028separator.png",
    3: "ant/byte-\udcff.png",
    4: "ant/=cmd|' calc'!A0,\"quoted\".png",
    5: "ant/é ü 漢字 \U0001f41c.png",
}
"""Rows whose names are unusual; all can be names of files."""


@dataclass(frozen=True)
class Drawn:
    """A page and what is on it; `points` is the same page without thumbnails."""

    page: Path
    points: Path
    shown: CollectionMap
    features: Features
    images: Path


def colour_of(row: int) -> tuple[int, int, int]:
    """The colour of a row's image; any two differ by far more than WebP changes a colour."""
    red, green, blue = colorsys.hsv_to_rgb(row / 60, 0.55 + 0.4 * (row % 2), 0.95 - 0.35 * (row % 3 == 0))
    return round(255 * red), round(255 * green), round(255 * blue)


def path_of(row: int) -> str:
    return HOSTILE.get(row, f"{GROUPS[row // PER_GROUP]}/{row:02}.png")


@pytest.fixture(scope="session")
def collection(tmp_path_factory: pytest.TempPathFactory, write_features: WriteFeatures) -> tuple[Features, Path]:
    """Features of 60 images in three groups, and the folder of the images."""
    root = tmp_path_factory.mktemp("collection")
    rng = np.random.default_rng(0)
    rows = range(PER_GROUP * len(GROUPS))
    centres = np.eye(len(GROUPS), 16) * 4
    values = np.stack([centres[row // PER_GROUP] + rng.normal(0, 0.4, 16) for row in rows]).astype(np.float32)
    images = root / "images"
    for row in rows:
        file = images / path_of(row)
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (160, 120), colour_of(row)).save(str(file), "PNG")
    place = write_features(root / "feats.npy", values, [path_of(row) for row in rows])
    return open_features(str(place)), images


def write_grid(file: Path) -> None:
    """Places such that no point lies over another: a grid of 5 x 4 for each group, side by side and askew."""
    with open(file, "w", encoding="utf-8", errors="surrogateescape", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["path", "x", "y"])
        for row in range(60):
            group, at = divmod(row, PER_GROUP)
            slot = (group + 1) % 3  # the first group, with the unusual names, in the middle
            writer.writerow([quote_cell(path_of(row)), slot * 7 + at % 5, at // 5 + slot * 5 + 0.3 * (at % 2)])


@pytest.fixture(scope="session")
def drawn(collection: tuple[Features, Path], tmp_path_factory: pytest.TempPathFactory) -> Drawn:
    """A page with labels, numbers, clusters, two layers and thumbnails."""
    features, images = collection
    labels = categories_of("label", [GROUPS[row // PER_GROUP] for row in range(60)])
    numbers = Colouring("typicality", np.linspace(0, 1, 60, dtype=np.float32), note="Near 0: unlike.")
    hostile = "<b onmouseover=alert(3)>\u2028\"'&"
    layers = (
        Layer("duplicates", np.array([21, 22, 45], np.int32), np.array([0, 0, 0], np.int32), (hostile, "", "of 21")),
        Layer(hostile, np.array([50], np.int32)),
    )
    folder = tmp_path_factory.mktemp("page")
    layout = folder / "layout.csv"
    write_grid(layout)
    options = MapOptions(clusters=3, layout=str(layout), quiet=True)
    shown = build_map(features, np.arange(60), f"{hostile}{{script}}{{blocks}}", [labels, numbers], layers, options)
    points = folder / "points.html"
    write_page(shown, points)
    shown, missing = add_thumbnails(shown, [str(images)], 10**7, workers=1, quiet=True)
    assert missing == 0
    page = folder / "map.html"
    write_page(shown, page)
    return Drawn(page, points, shown, features, images)
