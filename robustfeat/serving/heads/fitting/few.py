"""Heads from a handful of labels, for somebody who waits: C and scaling are fixed, and folds only calibrate."""

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
"""Fixed, with l2 scaling: a selection takes far longer, and a handful of rows is too few to choose by. The smaller C
needs less time, which matters with more rows."""


def fit_few(
    values: NDArray[np.float32], labels: Sequence[int], classes: Sequence[str], model: ModelIdentity | None
) -> Head:
    """A linear SVM with probabilities and distances, as `fit_head` makes it.

    Args:
        values: (n, D) float32, finite.
        labels: n numbers into `classes`.
        classes: names; those without a row are left out.
        model: what made the features.

    Raises:
        InputError: all rows are of one class.
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
