"""The kinds of heads and how each computes; the scalings of features before them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["KINDS", "SCALINGS", "Array", "Arrays"]

Array = NDArray[np.float64]
Arrays = Mapping[str, Array]

SCALINGS: dict[str, tuple[str, ...]] = {"none": (), "l2": (), "standard": ("scaling.mean", "scaling.scale")}
"""What is done to features first, and the (D,) arrays that it needs."""


def _linear(arrays: Arrays, x: Array) -> Array:
    margins: Array = x @ arrays["coefficients"].T + arrays["intercepts"]
    return margins


def _naive_bayes(arrays: Arrays, x: Array) -> Array:
    """Logarithm of p(x, class) of independent Gaussians."""
    columns = [
        np.log(prior) - 0.5 * np.log(2 * np.pi * variance).sum() - 0.5 * ((x - mean) ** 2 / variance).sum(1)
        for mean, variance, prior in zip(arrays["means"], arrays["variances"], arrays["priors"], strict=True)
    ]
    return np.stack(columns, 1)


def _nearest_mean(arrays: Arrays, x: Array) -> Array:
    """Minus the squared distance."""
    return np.stack([-((x - mean) ** 2).sum(1) for mean in arrays["means"]], 1)


@dataclass(frozen=True)
class Kind:
    """How a kind of head computes.

    Attributes:
        shapes: its arrays; `K` stands for the classes, `D` for the features.
        margins: arrays and scaled (n, D) to (n, K), or to (n, 1) for two classes with one row of coefficients.
        linear: one row of coefficients parts two classes; otherwise each class has an entry.
    """

    shapes: Mapping[str, tuple[str, ...]]
    margins: Callable[[Arrays, Array], Array]
    linear: bool


_COEFFICIENTS = {"coefficients": ("K", "D"), "intercepts": ("K",)}
KINDS = {
    "svm": Kind(_COEFFICIENTS, _linear, True),
    "logistic": Kind(_COEFFICIENTS, _linear, True),
    "naive-bayes": Kind({"means": ("K", "D"), "variances": ("K", "D"), "priors": ("K",)}, _naive_bayes, False),
    "nearest-mean": Kind({"means": ("K", "D")}, _nearest_mean, False),
}
"""Linear SVM, logistic regression, Gaussian naive Bayes and nearest class mean."""
