"""Defines the kinds of heads, their scikit-learn counterparts, and the scalings of features."""

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
"""Scalings of features, and the (D,) arrays that they need."""


def _linear(arrays: Arrays, x: Array) -> Array:
    margins: Array = x @ arrays["coefficients"].T + arrays["intercepts"]
    return margins


def _naive_bayes(arrays: Arrays, x: Array) -> Array:
    """The logarithm of p(x, class) for independent Gaussians."""
    columns = [
        np.log(prior) - 0.5 * np.log(2 * np.pi * variance).sum() - 0.5 * ((x - mean) ** 2 / variance).sum(1)
        for mean, variance, prior in zip(arrays["means"], arrays["variances"], arrays["priors"], strict=True)
    ]
    return np.stack(columns, 1)


def _nearest_mean(arrays: Arrays, x: Array) -> Array:
    """The negative squared distance."""
    return np.stack([-((x - mean) ** 2).sum(1) for mean in arrays["means"]], 1)


@dataclass(frozen=True)
class Kind:
    """How a kind of head computes, and its scikit-learn classifier.

    Attributes:
        shapes: shapes of its arrays, with `K` classes and `D` features.
        margins: computes (n, K) from arrays and scaled (n, D), or (n, 1) for two classes of a linear kind.
        linear: whether two classes have one row of coefficients. Otherwise each class has a row.
        classifier_class: the module and the name of scikit-learn's class.
        attributes: attributes of a fitted classifier, by array.
        settings: the arguments for fitting.
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
        """Makes a scikit-learn classifier of this kind; `settings` are added to the kind's own."""
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
