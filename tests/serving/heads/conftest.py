"""8x8 pixels of scikit-learn's digits as features."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from tests.conftest import WriteFeatures


@pytest.fixture(scope="session")
def digits() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """(1797, 64) float32 in 0 to 16, and the digits that they show."""
    x, y = load_digits(return_X_y=True)
    return x.astype(np.float32), y.astype(np.int64)


@pytest.fixture
def digit_files(
    tmp_path: Path, digits: tuple[NDArray[np.float32], NDArray[np.int64]], write_features: WriteFeatures
) -> Path:
    """A folder with train.npy (1,200 rows), test.npy (597) and labels.csv for both."""
    x, y = digits
    names = [f"{row % 7}/{row:04}.png" for row in range(len(x))]
    write_features(tmp_path / "train.npy", x[:1200], names[:1200])
    write_features(tmp_path / "test.npy", x[1200:], names[1200:])
    lines = [f"{name},digit {label}\n" for name, label in zip(names, y, strict=True)]
    (tmp_path / "labels.csv").write_text("path,label\n" + "".join(reversed(lines)))
    return tmp_path
