"""From which cosine on images are near-duplicates, where nobody says."""

from __future__ import annotations

import numpy as np

from robustfeat.serving.collections.directions import to_units
from robustfeat.serving.heads.features import Features

__all__ = ["default_threshold"]

_SHARE = 0.05

_MEASURED = {"robustfeat-resnet18-tiny-v1": 0.97}
"""By model; benchmarks/duplicates.py measured them."""

_SAMPLE_ROWS = 1000


def default_threshold(features: Features) -> tuple[float, str]:
    """The threshold for a collection, and where it is from."""
    name = features.model.name if features.model else None
    if name in _MEASURED:
        return _MEASURED[name], f"measured for {name}"
    rows = np.flatnonzero(features.good)
    rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), _SAMPLE_ROWS)).astype(np.int64)]
    mean = to_units(np.asarray(features.values[rows])).mean(0)
    usual = float(mean @ mean)
    return 1 - _SHARE * (1 - usual), f"by the mean cosine of the collection, {usual:.3f}"
