"""Fits heads on few labels, fast enough for a waiting user: C and scaling are fixed, and folds only calibrate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustfeat.serving.heads.features import Features
from robustfeat.serving.heads.fitting.fit import fit_head
from robustfeat.serving.heads.head import Head
from robustfeat.serving.heads.labels.labels import Labels, Unlabelled
from robustfeat.serving.heads.labels.matching import LabelledRows
from robustfeat.serving.identity import ModelIdentity

__all__ = ["fit_few"]

_FEW = 100
_C_OF_FEW, _C_OF_MORE = 1.0, 0.1
"""C with l2 scaling. It is fixed because a selection takes far longer, and few rows cannot choose well. A smaller C
takes less time, which matters with more rows."""


def fit_few(
    values: NDArray[np.float32], labels: Sequence[int], classes: Sequence[str], model: ModelIdentity | None
) -> Head:
    """Fits a linear SVM with probabilities and distances, like `fit_head`.

    Args:
        values: (n, D) float32, finite.
        labels: n indices into `classes`.
        classes: names of the classes. Classes without rows are left out.
        model: the model of the features.

    Raises:
        InputError: all rows are in one class.
    """
    order = sorted({classes[label] for label in labels})
    targets = np.array([order.index(classes[label]) for label in labels], np.int64)
    rows = np.arange(len(values))
    features = Features("the labelled images", values, [str(row) for row in rows], {}, model)
    none = Unlabelled(Labels("the labels", {}))
    labelled = LabelledRows(rows, targets, tuple(order), failed=0, unlabelled=none, missing=())
    settings: dict[str, Any] = {"scalings": ("l2",), "cs": (_C_OF_FEW if len(rows) < _FEW else _C_OF_MORE,)}
    head, _ = fit_head(features, labelled, threads=1, **settings)
    return head
