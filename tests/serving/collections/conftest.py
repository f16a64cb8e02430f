"""Features made from arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from numpy.typing import NDArray

from robustfeat import Features

FeaturesOf = Callable[..., Features]


@pytest.fixture(scope="session")
def features_of() -> FeaturesOf:
    """Makes features of an array, (n, D), and the numbers of the rows that failed."""

    def make(values: NDArray[Any], failed: tuple[int, ...] = ()) -> Features:
        paths = [f"{row}.jpg" for row in range(len(values))]
        return Features("feats.npy", values, paths, dict.fromkeys(failed, "damaged"), None)

    return make
