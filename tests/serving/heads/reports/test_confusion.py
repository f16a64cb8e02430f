"""The picture of a confusion matrix: its sides, its order, and whether people can read it."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from robustfeat.serving.heads.reports.confusion import draw_confusion, order_by_confusion


def coloured(image: Image.Image, *, blue: bool) -> NDArray[np.int64]:
    """(n, 2) rows and columns of the pixels of right or of wrong cells."""
    red, _, other = np.moveaxis(np.asarray(image).astype(int), 2, 0)
    return np.argwhere((other - red if blue else red - other) > 20)


def ink_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of what is drawn."""
    dark = np.argwhere(np.asarray(image.convert("L")) < 200)
    height, width = dark.max(0) - dark.min(0) + 1
    return int(width), int(height)


def test_rows_are_the_truth_and_columns_the_prediction() -> None:
    # Half of the first class is taken for the second one, never the other way round.
    image = draw_confusion(np.array([[50, 50], [0, 100]]), ["cat", "dog"])
    right, wrong = coloured(image, blue=True), coloured(image, blue=False)
    assert wrong[:, 0].max() < right[:, 0].max()  # in the upper row
    assert wrong[:, 1].min() > right[:, 1].min()  # in the right column
    assert wrong[:, 1].max() == right[:, 1].max()


@pytest.mark.parametrize("classes", [2, 10, 200])
def test_cells_are_coloured_where_the_counts_are(classes: int) -> None:
    image = draw_confusion(np.eye(classes, dtype=np.int64), ["x"] * classes)
    right = coloured(image, blue=True)
    assert not len(coloured(image, blue=False))
    place = right - right.min(0)
    side = (np.ptp(right, axis=0) + 1).mean() / classes
    assert np.abs(place[:, 0] - place[:, 1]).max() < side  # along the diagonal
    assert len(right) > 0.6 * classes * side**2


def test_the_sides_are_named_the_prediction_above_and_the_truth_at_the_left() -> None:
    image = draw_confusion(np.eye(10, dtype=np.int64), list("abcdefghij"))
    font = ImageFont.load_default(16)

    def drawn(text: str) -> tuple[int, int]:
        paper = Image.new("L", (200, 40), "white")
        ImageDraw.Draw(paper).text((100, 20), text, "black", font, "mm")
        return ink_size(paper)

    above = image.crop((0, 0, image.width, 29))
    beside = image.crop((0, 0, 29, image.height - 40)).rotate(-90, expand=True)
    for place, text in ((above, "Predicted class"), (beside, "True class")):
        assert ink_size(place) == pytest.approx(drawn(text), abs=2)


def test_confused_classes_are_neighbours() -> None:
    groups = np.random.default_rng(0).permutation(40).reshape(10, 4)
    confusion = 100 * np.eye(40, dtype=np.int64)
    confusion += np.random.default_rng(1).integers(0, 2, (40, 40))  # now and then any class is taken for any other
    for group in groups:
        confusion[np.ix_(group, group)] += 9
    order = order_by_confusion(confusion)
    assert sorted(order) == list(range(40))
    place = np.argsort(order)
    assert all(np.ptp(place[group]) == 3 for group in groups)


def test_the_worst_pair_is_adjacent_and_without_errors_the_order_stays() -> None:
    confusion = np.eye(6, dtype=np.int64) * 50
    assert order_by_confusion(confusion) == [0, 1, 2, 3, 4, 5]
    confusion[0, 4], confusion[4, 2], confusion[2, 5] = 20, 10, 5
    assert order_by_confusion(confusion) == [0, 4, 2, 5, 1, 3]


def test_names_are_legible_at_a_hundred_classes_and_a_thousand_fit_a_screen() -> None:
    confusion = np.eye(100, dtype=np.int64) * 100
    without = np.asarray(draw_confusion(confusion, [" "] * 100))
    image = draw_confusion(confusion, [f"a class of a long name {number}" for number in range(100)])
    assert image.width < 2200
    names = np.asarray(image.convert("L"))[: image.height - 40, 30:150] < 160
    lines = names.any(1).astype(int)
    written = np.flatnonzero(np.diff(lines) == 1)[-100:]  # each name stands apart from the next one
    assert len(written) == 100
    assert np.diff(written).min() >= 16
    assert without.shape[1] < image.width
    assert max(draw_confusion(np.eye(1000, dtype=np.int64), ["x"] * 1000).size) < 1200


def test_a_name_that_the_font_lacks_is_a_number() -> None:
    confusion = np.eye(2, dtype=np.int64)
    assert draw_confusion(confusion, ["кошка", "собака"]) == draw_confusion(confusion, ["(class 1)", "(class 2)"])
    assert draw_confusion(confusion, ["café", "dog"]) == draw_confusion(confusion, ["cafe", "dog"])
