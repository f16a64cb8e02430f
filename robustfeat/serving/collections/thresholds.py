"""From which cosine on images are near-duplicates, where nobody says."""

from __future__ import annotations

import numpy as np

from robustfeat.serving.collections.directions import to_units
from robustfeat.serving.heads.features import Features

__all__ = ["default_threshold"]

_MEASURED = {"robustfeat-resnet18-tiny-v1": 0.95}
"""By the model's name, as benchmarks/duplicates.py measured them."""

_SHARE = 0.07
"""For other models: the distance between duplicates, as a share of the distance between usual images of a collection.

Distances are 1 minus the cosine. It is the share that the measured threshold has on its photographs.
"""

_SAMPLE_ROWS = 1000


def default_threshold(features: Features) -> tuple[float, str]:
    """The threshold for a collection, and where it is from, in words.

    Models differ in how alike they see usual images. Where the model has no measured threshold, the mean cosine
    between rows of the collection tells.
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
