"""Counts agree with their nouns."""

from __future__ import annotations

import pytest

from robustfeat.counts import format_count


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((1, "image"), "1 image"),
        ((0, "image"), "0 images"),
        ((1234, "labelled row"), "1,234 labelled rows"),
        ((1, "class"), "1 class"),
        ((2, "class"), "2 classes"),
        ((1, "label is", "labels are"), "1 label is"),
        ((2, "exact copy", "exact copies"), "2 exact copies"),
    ],
)
def test_the_noun_is_singular_only_after_1(arguments: tuple[int, str], expected: str) -> None:
    assert format_count(*arguments) == expected
