"""The kinds of heads, how each computes, and what scikit-learn has for it; the scalings of features before them."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

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
    """How a kind of head computes, and scikit-learn's classifier of this kind.

    Attributes:
        shapes: its arrays; `K` stands for the classes, `D` for the features.
        margins: arrays and scaled (n, D) to (n, K), or to (n, 1) for two classes with one row of coefficients.
        linear: one row of coefficients parts two classes; otherwise each class has an entry.
        classifier_class: the module and the name of scikit-learn's class.
        attributes: the attribute of a fitted classifier that holds each array.
        settings: the arguments with which heads are fitted.
    """

    shapes: Mapping[str, tuple[str, ...]]
    margins: Callable[[Arrays, Array], Array]
    linear: bool
    classifier_class: str
    attributes: Mapping[str, str]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def describes(self, classifier: Any) -> bool:
        """Whether a scikit-learn classifier is of this kind."""
        return isinstance(classifier, pkgutil.resolve_name(self.classifier_class))

    def classifier(self, **settings: Any) -> Any:
        """A new scikit-learn classifier of this kind; `settings` are added to the kind's own."""
        return pkgutil.resolve_name(self.classifier_class)(**{**self.settings, **settings})


_COEFFICIENTS = {"coefficients": ("K", "D"), "intercepts": ("K",)}
_OF_LINEAR = {"coefficients": "coef_", "intercepts": "intercept_"}
KINDS = {
    "svm": Kind(_COEFFICIENTS, _linear, True, "sklearn.svm:LinearSVC", _OF_LINEAR, {"dual": False}),
    "logistic": Kind(
        _COEFFICIENTS, _linear, True, "sklearn.linear_model:LogisticRegression", _OF_LINEAR, {"max_iter": 1000}
    ),
    "naive-bayes": Kind(
        {"means": ("K", "D"), "variances": ("K", "D"), "priors": ("K",)},
        _naive_bayes,
        False,
        "sklearn.naive_bayes:GaussianNB",
        {"means": "theta_", "variances": "var_", "priors": "class_prior_"},
    ),
    "nearest-mean": Kind(
        {"means": ("K", "D")}, _nearest_mean, False, "sklearn.neighbors:NearestCentroid", {"means": "centroids_"}
    ),
}
"""Linear SVM, logistic regression, Gaussian naive Bayes and nearest class mean."""
