"""Heads from fitted scikit-learn estimators, and back."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustfeat.serving.heads.fitting import scaler
from robustfeat.serving.heads.head import Head
from robustfeat.serving.heads.kinds import KINDS
from robustfeat.serving.identity import ModelIdentity

__all__ = ["from_sklearn", "to_sklearn"]


def from_sklearn(
    estimator: Any,
    *,
    model: ModelIdentity | None = None,
    classes: Sequence[str | int] | None = None,
    **about: Any,
) -> Head:
    """A fitted scikit-learn classifier as a head.

    Args:
        estimator: LinearSVC, LogisticRegression, GaussianNB or NearestCentroid (Euclidean, not shrunken); for several
            labels a row one of these in MultiOutputClassifier, or the first three in OneVsRestClassifier; alone or in
            a pipeline behind StandardScaler or Normalizer, and behind ImageFeatures before that; or a search with
            `best_estimator_`.
        model: what made the features; that of ImageFeatures is known. A head that does not know it checks nothing.
        classes: names for the estimator's own classes, in their order.
        about: further fields of `Head`.

    Raises:
        ValueError: it is something else, or not fitted.
    """
    from sklearn.multiclass import OneVsRestClassifier
    from sklearn.multioutput import MultiOutputClassifier
    from sklearn.neighbors import NearestCentroid
    from sklearn.preprocessing import Normalizer, StandardScaler
    from sklearn.utils.validation import check_is_fitted

    from robustfeat.serving.sklearn import ImageFeatures

    estimator = getattr(estimator, "best_estimator_", estimator)
    steps = [step for _, step in estimator.steps] if hasattr(estimator, "steps") else [estimator]
    *before, last = [step for step in steps if step not in (None, "passthrough")]
    for step in (*before, last):
        check_is_fitted(step)
    if before and isinstance(before[0], ImageFeatures):
        taken = before.pop(0)
        model = model or taken.identity
    scaling, arrays = "none", {}
    if len(before) > 1:
        raise ValueError("a head has one step before the classifier at most: StandardScaler or Normalizer")
    if before and isinstance(before[0], Normalizer) and before[0].norm == "l2":
        scaling = "l2"
    elif before and isinstance(before[0], StandardScaler):
        scaler = before[0]
        scaling = "standard"
        size = scaler.n_features_in_
        arrays["scaling.mean"] = _array(scaler.mean_) if scaler.with_mean else np.zeros(size)
        arrays["scaling.scale"] = _array(scaler.scale_) if scaler.with_std else np.ones(size)
    elif before:
        raise ValueError(f"a head cannot hold {type(before[0]).__name__}; expected StandardScaler or Normalizer('l2')")
    multi_label = isinstance(last, (MultiOutputClassifier, OneVsRestClassifier))
    if multi_label:
        if isinstance(last, OneVsRestClassifier) and not last.multilabel_:
            raise ValueError("OneVsRestClassifier is taken for several labels a row alone; use the classifier itself")
        if any(list(one.classes_) != [0, 1] for one in last.estimators_ if hasattr(one, "classes_")):
            raise ValueError("several labels a row must be columns of 0 and 1")
        if isinstance(last, OneVsRestClassifier) and isinstance(last.estimators_[0], NearestCentroid):
            raise ValueError(
                "OneVsRestClassifier cannot tell by NearestCentroid's distances; use MultiOutputClassifier"
            )
        parts = [_arrays_of(one) for one in last.estimators_]
        (kind,) = {kind for kind, _ in parts}
        linear = KINDS[kind].linear
        arrays |= {
            name: np.concatenate([own[name] for _, own in parts])
            if linear
            else np.stack([own[name] for _, own in parts])
            for name in parts[0][1]
        }
        own_classes = list(range(len(parts)))
    else:
        kind, own = _arrays_of(last)
        arrays |= own
        own_classes = last.classes_.tolist()
    return Head(
        kind=kind,
        classes=tuple(own_classes if classes is None else classes),
        scaling=scaling,
        arrays=arrays,
        multi_label=multi_label,
        model=model,
        **about,
    )


def _arrays_of(classifier: Any) -> tuple[str, dict[str, NDArray[np.float64]]]:
    from sklearn.linear_model import LogisticRegression
    from sklearn.naive_bayes import GaussianNB
    from sklearn.neighbors import NearestCentroid
    from sklearn.svm import LinearSVC

    if isinstance(classifier, (LinearSVC, LogisticRegression)):
        kind = "svm" if isinstance(classifier, LinearSVC) else "logistic"
        rows = len(classifier.coef_)
        intercepts = np.broadcast_to(_array(classifier.intercept_), rows).copy()  # a number without an intercept
        return kind, {"coefficients": _array(classifier.coef_), "intercepts": intercepts}
    if isinstance(classifier, GaussianNB):
        return "naive-bayes", {
            "means": _array(classifier.theta_),
            "variances": _array(classifier.var_),
            "priors": _array(classifier.class_prior_),
        }
    if isinstance(classifier, NearestCentroid):
        if classifier.metric != "euclidean" or classifier.shrink_threshold or not _uniform(classifier.class_prior_):
            raise ValueError("NearestCentroid must be Euclidean, not shrunken, and of uniform priors")
        return "nearest-mean", {"means": _array(classifier.centroids_)}
    raise ValueError(
        f"a head cannot hold {type(classifier).__name__}; "
        "expected LinearSVC, LogisticRegression, GaussianNB or NearestCentroid"
    )


def _uniform(priors: NDArray[Any]) -> bool:
    return bool(np.allclose(priors, priors[0]))


def _array(values: Any) -> NDArray[np.float64]:
    return np.array(values, np.float64)


def to_sklearn(head: Head) -> Any:
    """A head as a fitted scikit-learn estimator with the same predictions: a pipeline, where it scales.

    Calibration is left behind. Several labels a row become a MultiOutputClassifier.
    """
    from sklearn.pipeline import make_pipeline

    arrays, size = head.arrays, head.feature_size
    own = {name: arrays[name] for name in KINDS[head.kind].shapes}
    classifier = _one_a_label(head.kind, own) if head.multi_label else _classifier(head.kind, own, head.classes)
    scaling = scaler(head.scaling)
    if scaling is None:
        return classifier
    scaling.n_features_in_ = size
    if head.scaling == "standard":
        scaling.mean_, scaling.scale_ = arrays["scaling.mean"].copy(), arrays["scaling.scale"].copy()
        scaling.var_ = scaling.scale_**2
        scaling.n_samples_seen_ = 1
    return make_pipeline(scaling, classifier)


def _classifier(kind: str, arrays: dict[str, NDArray[np.float64]], classes: Sequence[str | int]) -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.naive_bayes import GaussianNB
    from sklearn.neighbors import NearestCentroid
    from sklearn.svm import LinearSVC

    names = np.array(classes)
    if kind in {"svm", "logistic"}:
        classifier = LinearSVC(dual=False) if kind == "svm" else LogisticRegression()
        classifier.coef_, classifier.intercept_ = arrays["coefficients"].copy(), arrays["intercepts"].copy()
        classifier.n_iter_ = 1 if kind == "svm" else np.ones(1, np.int32)
    elif kind == "naive-bayes":
        classifier = GaussianNB()
        classifier.theta_, classifier.var_ = arrays["means"].copy(), arrays["variances"].copy()
        classifier.class_prior_ = arrays["priors"].copy()
        classifier.class_count_, classifier.epsilon_ = arrays["priors"].copy(), 0.0
    else:
        # Twice each mean: it wants more rows than classes. It warns that they do not vary, which its `predict` ignores.
        means = arrays["means"]
        with warnings.catch_warnings(), np.errstate(divide="ignore", invalid="ignore"):
            warnings.simplefilter("ignore", UserWarning)
            return NearestCentroid().fit(np.concatenate([means, means]), np.concatenate([names, names]))
    classifier.classes_ = names
    classifier.n_features_in_ = next(iter(arrays.values())).shape[-1]
    return classifier


def _one_a_label(kind: str, arrays: dict[str, NDArray[np.float64]]) -> Any:
    from sklearn.multioutput import MultiOutputClassifier

    parts = [
        {name: array[label : label + 1] if KINDS[kind].linear else array[label] for name, array in arrays.items()}
        for label in range(len(next(iter(arrays.values()))))
    ]
    wrapper = MultiOutputClassifier(_classifier(kind, parts[0], (0, 1)))
    wrapper.estimators_ = [_classifier(kind, part, (0, 1)) for part in parts]
    wrapper.classes_ = [part.classes_ for part in wrapper.estimators_]
    wrapper.n_features_in_ = wrapper.estimators_[0].n_features_in_
    return wrapper
