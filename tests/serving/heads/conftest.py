"""Files of features made by hand, as `embed` would write them: 8x8 pixels of scikit-learn's digits as features."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.datasets import load_digits

META = {
    "model": "digits-v1",
    "revision": None,
    "files": {"model.safetensors": "a" * 64},
    "preprocessing_hash": "b" * 64,
    "precision": "fp32",
    "engine": "onnxruntime",
    "decoding": "exact",
}

WriteFeatures = Callable[..., Path]


@pytest.fixture(scope="session")
def digits() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """(1797, 64) float32 in 0 to 16, and the digits that they show."""
    x, y = load_digits(return_X_y=True)
    return x.astype(np.float32), y.astype(np.int64)


@pytest.fixture(scope="session")
def write_features() -> WriteFeatures:
    def write(
        file: Path,
        values: NDArray[np.float32],
        paths: Sequence[str],
        errors: Mapping[int, str] | None = None,
        **meta: Any,
    ) -> Path:
        np.save(file, values)
        records = [
            {"row": row, "path": path, "sha256": "0" * 64, "error": (errors or {}).get(row)}
            for row, path in enumerate(paths)
        ]
        file.with_suffix(".index.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        about = META | {"feature_size": values.shape[1], "images": len(paths)} | meta
        file.with_suffix(".meta.json").write_text(json.dumps(about))
        return file

    return write


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
