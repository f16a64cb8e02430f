"""Converts fitted scikit-learn estimators to the parts of a head, and back."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustfeat.serving.heads.kinds import KINDS, Array, Arrays
from robustfeat.serving.identity import ModelIdentity

__all__ = ["HeadParts", "from_sklearn", "scaler", "to_sklearn"]


@dataclass(frozen=True, eq=False)
class HeadParts:
    """The parts that a head and a fitted estimator share; see the attributes of `Head`."""

    kind: str
    classes: tuple[str | int, ...]
    scaling: str
    arrays: Arrays
    multi_label: bool = False
    model: ModelIdentity | None = None


def scaler(scaling: str) -> Any:
    """The unfitted scikit-learn scaler for one of `SCALINGS`; None for none."""
    from sklearn.preprocessing import Normalizer, StandardScaler

    return {"none": None, "l2": Normalizer(), "standard": StandardScaler()}[scaling]


def from_sklearn(estimator: Any, model: ModelIdentity | None = None) -> HeadParts:
    """Reads the parts of a fitted classifier for `Head.from_sklearn`.

    Args:
        estimator: a classifier, a pipeline or a search.
        model: the model of the features; by default the model of ImageFeatures in the pipeline.

    Raises:
        ValueError: the estimator is not fitted, or a head cannot represent it.
    """
    from sklearn.multiclass import OneVsRestClassifier
    from sklearn.multioutput import MultiOutputClassifier
    from sklearn.utils.validation import check_is_fitted

    from robustfeat.serving.sklearn import ImageFeatures

    estimator = getattr(estimator, "best_estimator_", estimator)
    steps = [step for _, step in estimator.steps] if hasattr(estimator, "steps") else [estimator]
    *before, last = [step for step in steps if step not in (None, "passthrough")]
    for step in (*before, last):
        check_is_fitted(step)
    if before and isinstance(before[0], ImageFeatures):
        images = before.pop(0)
        model = model or images.identity
    scaling, arrays = _read_scaling(before)
    multi_label = isinstance(last, (MultiOutputClassifier, OneVsRestClassifier))
    kind, own = _read_labels(last) if multi_label else _read_classifier(last)
    classes = range(len(last.estimators_)) if multi_label else last.classes_.tolist()
    return HeadParts(kind, tuple(classes), scaling, arrays | own, multi_label, model)


def _read_scaling(before: Sequence[Any]) -> tuple[str, dict[str, Array]]:
    """The scaling of the steps before the classifier, and its arrays."""
    from sklearn.preprocessing import Normalizer, StandardScaler

    if not before:
        return "none", {}
    if len(before) > 1:
        raise ValueError("a head has at most one step before the classifier: StandardScaler or Normalizer")
    step = before[0]
    if isinstance(step, Normalizer) and step.norm == "l2":
        return "l2", {}
    if isinstance(step, StandardScaler):
        size = step.n_features_in_
        return "standard", {
            "scaling.mean": _array(step.mean_) if step.with_mean else np.zeros(size),
            "scaling.scale": _array(step.scale_) if step.with_std else np.ones(size),
        }
    raise ValueError(f"a head cannot use {type(step).__name__}; expected StandardScaler or Normalizer('l2')")


def _read_labels(several: Any) -> tuple[str, dict[str, Array]]:
    """The kind and the arrays of a classifier with several labels per row."""
    from sklearn.multiclass import OneVsRestClassifier

    if isinstance(several, OneVsRestClassifier) and not several.multilabel_:
        raise ValueError("OneVsRestClassifier is supported for several labels per row; use the classifier itself")
    if any(list(one.classes_) != [0, 1] for one in several.estimators_ if hasattr(one, "classes_")):
        raise ValueError("several labels per row must be columns of 0 and 1")
    if isinstance(several, OneVsRestClassifier) and KINDS["nearest-mean"].describes(several.estimators_[0]):
        raise ValueError("OneVsRestClassifier cannot use NearestCentroid's distances; use MultiOutputClassifier")
    parts = [_read_classifier(one) for one in several.estimators_]
    (kind,) = {kind for kind, _ in parts}
    join = np.concatenate if KINDS[kind].linear else np.stack
    return kind, {name: join([own[name] for _, own in parts]) for name in parts[0][1]}


def _read_classifier(classifier: Any) -> tuple[str, dict[str, Array]]:
    """The kind and the arrays of a classifier."""
    name = next((name for name, kind in KINDS.items() if kind.describes(classifier)), None)
    if name is None:
        raise ValueError(
            f"a head cannot use {type(classifier).__name__}; "
            "expected LinearSVC, LogisticRegression, GaussianNB or NearestCentroid"
        )
    if name == "nearest-mean" and (
        classifier.metric != "euclidean" or classifier.shrink_threshold or not _uniform(classifier.class_prior_)
    ):
        raise ValueError("NearestCentroid must be Euclidean, not shrunken, and of uniform priors")
    arrays = {array: _array(getattr(classifier, attribute)) for array, attribute in KINDS[name].attributes.items()}
    if "intercepts" in arrays:  # a single number if it was fitted without an intercept
        arrays["intercepts"] = np.broadcast_to(arrays["intercepts"], len(arrays["coefficients"])).copy()
    return name, arrays


def _uniform(priors: NDArray[Any]) -> bool:
    return bool(np.allclose(priors, priors[0]))


def _array(values: Any) -> Array:
    return np.array(values, np.float64)


def to_sklearn(parts: HeadParts) -> Any:
    """Makes a fitted estimator with the predictions of a head with these parts: a pipeline if the head scales.

    Several labels per row become a MultiOutputClassifier.
    """
    from sklearn.pipeline import make_pipeline

    own = {name: parts.arrays[name] for name in KINDS[parts.kind].shapes}
    classifier = _one_a_label(parts.kind, own) if parts.multi_label else _fitted(parts.kind, own, parts.classes)
    scaling = scaler(parts.scaling)
    if scaling is None:
        return classifier
    scaling.n_features_in_ = classifier.n_features_in_
    if parts.scaling == "standard":
        scaling.mean_, scaling.scale_ = parts.arrays["scaling.mean"].copy(), parts.arrays["scaling.scale"].copy()
        scaling.var_ = scaling.scale_**2
        scaling.n_samples_seen_ = 1
    return make_pipeline(scaling, classifier)


def _fitted(kind: str, arrays: Arrays, classes: Sequence[str | int]) -> Any:
    """A classifier whose fitted attributes are these arrays."""
    names = np.array(classes)
    classifier = KINDS[kind].classifier()
    if kind == "nearest-mean":
        # It needs more rows than classes, so each mean comes twice. Its warning of constant rows is harmless.
        means = arrays["means"]
        with warnings.catch_warnings(), np.errstate(divide="ignore", invalid="ignore"):
            warnings.simplefilter("ignore", UserWarning)
            return classifier.fit(np.concatenate([means, means]), np.concatenate([names, names]))
    for array, attribute in KINDS[kind].attributes.items():
        setattr(classifier, attribute, arrays[array].copy())
    if kind == "naive-bayes":
        classifier.class_count_, classifier.epsilon_ = arrays["priors"].copy(), 0.0
    else:
        classifier.n_iter_ = 1 if kind == "svm" else np.ones(1, np.int32)
    classifier.classes_ = names
    classifier.n_features_in_ = next(iter(arrays.values())).shape[-1]
    return classifier


def _one_a_label(kind: str, arrays: Arrays) -> Any:
    """One classifier per label."""
    from sklearn.multioutput import MultiOutputClassifier

    parts = [
        {name: array[label : label + 1] if KINDS[kind].linear else array[label] for name, array in arrays.items()}
        for label in range(len(next(iter(arrays.values()))))
    ]
    wrapper = MultiOutputClassifier(_fitted(kind, parts[0], (0, 1)))
    wrapper.estimators_ = [_fitted(kind, part, (0, 1)) for part in parts]
    wrapper.classes_ = [part.classes_ for part in wrapper.estimators_]
    wrapper.n_features_in_ = wrapper.estimators_[0].n_features_in_
    return wrapper
