"""Chooses the default cosine of near-duplicates."""

from __future__ import annotations

import numpy as np

from robustfeat.serving.collections.directions import to_units
from robustfeat.serving.heads.features import Features

__all__ = ["default_threshold"]

_MEASURED = {"robustfeat-lite0-v1": 0.88, "robustfeat-resnet18-tiny-v1": 0.95}
"""Thresholds by the model's name, measured by benchmarks/duplicates.py."""

_SHARE = 0.07
"""For other models, the distance of duplicates as a share of the mean distance in the collection.

A distance is 1 minus the cosine. The share comes from the threshold of robustfeat-resnet18-tiny-v1 and its photographs.
"""

_SAMPLE_ROWS = 1000


def default_threshold(features: Features) -> tuple[float, str]:
    """The threshold for a collection, and its origin as text.

    Models differ in the cosines of unrelated images. For a model without a measured threshold, it follows from the mean
    cosine between rows of the collection.
    """
    name = features.model.name if features.model else None
    if name in _MEASURED:
        return _MEASURED[name], f"measured for {name}"
    rows = np.flatnonzero(features.good)
    if not len(rows):
        return 1.0, "no rows"
    rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), _SAMPLE_ROWS)).astype(np.int64)]
    mean = to_units(np.asarray(features.values[rows])).mean(0)
    usual = float(mean @ mean)
    return round(1 - _SHARE * (1 - usual), 4), f"a rule for models without a measured one; mean cosine {usual:.3f}"
