"""Defines `Head`, a classifier of features. Its folder has only numbers and names, nothing to execute.

    head.json          classes, kind, scaling, selection, model, scores
    head.safetensors   coefficients or means, scaling, calibration and distances, all float64

`hub.head_folder` ties both files together.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustfeat.errors import HeadError, InputError, first_line
from robustfeat.files import new_folder
from robustfeat.hub.head_folder import HEAD, TENSORS, HeadFolder, about_sha256, resolve_head
from robustfeat.hub.remote import HubAccess
from robustfeat.serving.bulk.stacked import Rows, StackedRows
from robustfeat.serving.heads import convert
from robustfeat.serving.heads.distance import DISTANCE_ARRAYS, distance_shapes, measure_typicality
from robustfeat.serving.heads.features import CHUNK_ROWS, Features
from robustfeat.serving.heads.kinds import KINDS, SCALINGS, Array
from robustfeat.serving.heads.probabilities import sigmoid, softmax
from robustfeat.serving.identity import ModelIdentity

__all__ = ["Head"]

_LEAST, _MOST = 1e-60, 1e60
"""Bounds of a head's numbers. Margins of any float32 features are then finite, even for squares over variances."""

_CALIBRATION = ("calibration.scale", "calibration.offset")


@dataclass(frozen=True, eq=False)
class Head(convert.HeadParts):
    """A classifier of features.

    With several labels per row, a linear kind has one row of coefficients per label. Other kinds have arrays with an
    additional axis, (K, 2, ...), for rows without and with the label.

    Attributes:
        kind: one of `KINDS`.
        classes: K names or numbers.
        scaling: one of `SCALINGS`.
        arrays: float64 arrays by name, for the kind and the scaling, and optionally for calibration and distances.
        multi_label: whether a row may have several labels, or none.
        model: the model of the features; None if unknown, and then it is not checked.
        selection: how C and scaling were chosen.
        scores: measured scores.
        sha256: sha256 of a loaded head.json, which pins both files.
        revision: the commit on the Hub of a head from there.

    Raises:
        ValueError: the parts do not fit together.
    """

    selection: Mapping[str, Any] = field(default_factory=dict)
    scores: Mapping[str, Any] = field(default_factory=dict)
    sha256: str | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be {', '.join(KINDS)}; got {self.kind!r}")
        if self.scaling not in SCALINGS:
            raise ValueError(f"scaling must be {', '.join(SCALINGS)}; got {self.scaling!r}")
        count = len(self.classes)
        if count < (1 if self.multi_label else 2) or len(set(self.classes)) != count:
            raise ValueError(f"classes must be at least two, and different; got {list(self.classes)[:10]}")
        if {type(name) for name in self.classes} not in ({str}, {int}) or any(
            isinstance(name, int) and abs(name) >= 2**63 for name in self.classes
        ):
            raise ValueError("classes must be all text or all whole numbers; name others by classes=[...]")
        for name in self.classes:
            if not _is_utf8(str(name)):
                raise ValueError(f"the class {name!r} cannot be written as UTF-8")
        self._check_arrays()
        if self.model is not None and self.model.feature_size != self.feature_size:
            raise ValueError(f"the model has {self.model.feature_size} features, but the arrays {self.feature_size}")

    def _check_arrays(self) -> None:
        kind, count = KINDS[self.kind], len(self.classes)
        if any(array.ndim == 0 for array in self.arrays.values()):
            raise ValueError("arrays must have rows; got a number")
        allowed = {*kind.shapes, *SCALINGS[self.scaling]}
        for optional in (_CALIBRATION, DISTANCE_ARRAYS):
            if set(optional) & set(self.arrays):
                allowed |= set(optional)
        if set(self.arrays) != allowed:
            raise ValueError(
                f"a {self.kind} head with {self.scaling} scaling has {sorted(allowed)}; got {sorted(self.arrays)}"
            )
        rows = 1 if kind.linear and count == 2 and not self.multi_label else count
        for name, shape in kind.shapes.items():
            leading = [rows, 2] if self.multi_label and not kind.linear else [rows]
            self._require(name, (*leading, *(self.feature_size for axis in shape if axis == "D")))
        for name in SCALINGS[self.scaling]:
            self._require(name, (self.feature_size,))
        for name in set(_CALIBRATION) & set(self.arrays):
            self._require(name, (rows,))
        if self.tells_typicality:
            for name, lengths in distance_shapes(self.arrays, self.feature_size, count).items():
                self._require(name, lengths)

    def _require(self, name: str, shape: tuple[int, ...]) -> None:
        array = self.arrays[name]
        if array.shape != shape or array.dtype != np.float64 or not np.isfinite(array).all():
            raise ValueError(f"{name} must be {shape} finite float64; got {array.shape} {array.dtype}")
        size = np.abs(array)
        if (size > _MOST).any():
            raise ValueError(f"{name} must have numbers up to {_MOST:g}; got {size.max():g}")
        if name in {"variances", "priors", "scaling.scale", "distance.floor"} and not (array >= _LEAST).all():
            raise ValueError(f"{name} must be above zero, at least {_LEAST:g}")

    @classmethod
    def from_sklearn(
        cls,
        estimator: Any,
        *,
        model: ModelIdentity | None = None,
        classes: Sequence[str | int] | None = None,
        **about: Any,
    ) -> Head:
        """Converts a fitted scikit-learn classifier to a head.

        Args:
            estimator: LinearSVC, LogisticRegression, GaussianNB or NearestCentroid (Euclidean, not shrunken). For
                several labels per row, one of these in MultiOutputClassifier, or one of the first three in
                OneVsRestClassifier. In a pipeline, StandardScaler or Normalizer may precede it, and ImageFeatures may
                precede those. A search with `best_estimator_` is accepted, too.
            model: the model of the features; by default the model of ImageFeatures. Without one, nothing is checked.
            classes: names for the estimator's classes, in their order.
            about: other attributes of the head.

        Raises:
            ValueError: the estimator is not supported or not fitted.
        """
        parts = convert.from_sklearn(estimator, model)
        named = {} if classes is None else {"classes": tuple(classes)}
        return cls(**(vars(parts) | named | about))

    def to_sklearn(self) -> Any:
        """Converts the head to a fitted scikit-learn estimator with the same predictions: a pipeline if it scales.

        The result has no calibration. Several labels per row become a MultiOutputClassifier.
        """
        return convert.to_sklearn(self)

    @property
    def feature_size(self) -> int:
        """D, the length of a feature vector."""
        return int(self.arrays["coefficients" if KINDS[self.kind].linear else "means"].shape[-1])

    def scale(self, features: NDArray[Any]) -> Array:
        """Scales (n, D) features for the classifier, as float64."""
        x = np.asarray(features, np.float64)
        if self.scaling == "l2":
            norms = np.sqrt(np.einsum("ij,ij->i", x, x))
            return x / np.where(norms == 0, 1.0, norms)[:, None]
        if self.scaling == "standard":
            return (x - self.arrays["scaling.mean"]) / self.arrays["scaling.scale"]
        return x

    def margins(self, features: Rows | Features, rows: NDArray[np.int64] | None = None) -> Array:
        """Computes the margin of each class.

        Args:
            features: (n, D) float, or `Features`, whose model is checked.
            rows: (m,) rows to use, for features on disk; by default all.

        Returns:
            (n, K) or (m, K). A row's class has the largest margin; with several labels, all margins above zero count.
            Two classes of a linear kind have margins -m and m.

        Raises:
            InputError: the features belong to another model.
            ValueError: the features have another shape or are not finite.
        """
        return self.both(self.raw_margins(features, rows))

    def both(self, margins: Array) -> Array:
        """Converts `raw_margins` to `margins`."""
        if margins.shape[1] == 1 and not self.multi_label:
            return np.concatenate([-margins, margins], 1)
        return margins

    def raw_margins(self, features: Rows | Features, rows: NDArray[np.int64] | None = None) -> Array:
        """Like `margins`, but (n, 1) for two classes of a linear kind."""
        values = self._values(features)
        count = len(values) if rows is None else len(rows)
        if not count:
            return np.empty((0, len(self.arrays[next(iter(KINDS[self.kind].shapes))])))
        parts = []
        for start in range(0, count, CHUNK_ROWS):
            chunk = slice(start, start + CHUNK_ROWS)
            parts.append(self._raw_margins(values[chunk if rows is None else rows[chunk]]))
        return np.concatenate(parts)

    def _values(self, features: Rows | Features) -> Rows:
        if isinstance(features, Features):
            self.require_features(features, "this head")
            return features.values
        values = features if isinstance(features, StackedRows) else np.asarray(features)
        if values.ndim != 2 or values.shape[1] != self.feature_size:
            raise ValueError(f"features must be (n, {self.feature_size}); got {values.shape}")
        return values

    def takes(self, model: ModelIdentity) -> bool:
        """Whether the head accepts this model's features. A head of an unknown model only checks their size."""
        return model.feature_size == self.feature_size if self.model is None else self.model.same_features(model)

    def require_model(self, model: ModelIdentity, mine: str, theirs: str) -> None:
        """Refuses another model.

        Raises:
            InputError: the models differ. The message names both.
        """
        own = self.model.source if self.model and self.model.source != model.source else None
        named = f"`model={own}`" if own else "`model`"
        fix = f"pass the model that the head was fitted with as {named}, or fit a head with the other one"
        if self.model is not None:
            self.model.require(model, mine, theirs, fix)
        elif model.feature_size != self.feature_size:
            what = f"takes {self.feature_size} features of an unknown model, but {theirs} has {model.feature_size}"
            raise InputError(f"{mine}: {what} of {model.name}", fix=fix)

    def require_features(self, features: Features, mine: str) -> None:
        """Refuses features of another model, or of an unknown model with another length.

        Raises:
            InputError: the features do not fit. The message names both.
        """
        fix = "embed the images with the head's model, or fit a head on these features"
        if self.model is not None and features.model is not None:
            self.model.require(features.model, mine, features.place, fix)
        elif (length := features.values.shape[1]) != self.feature_size:
            raise InputError(f"{mine}: takes {self.feature_size} features, but {features.place} has {length}", fix=fix)

    def _raw_margins(self, features: NDArray[Any]) -> Array:
        x = self.scale(features)
        if not np.isfinite(x).all():
            raise ValueError("features must be finite; leave out failed rows")
        margins = KINDS[self.kind].margins
        if self.multi_label and not KINDS[self.kind].linear:
            names = list(KINDS[self.kind].shapes)
            pairs = [
                margins({name: self.arrays[name][label] for name in names}, x) for label in range(len(self.classes))
            ]
            return np.stack([pair[:, 1] - pair[:, 0] for pair in pairs], 1)
        return margins(self.arrays, x)

    def predict(self, features: Rows | Features, rows: NDArray[np.int64] | None = None) -> NDArray[Any]:
        """Predicts the class of each row, (n,), or with several labels (n, K) bool. See `margins`."""
        return self.decide(self.margins(features, rows))

    def decide(self, margins: Array) -> NDArray[Any]:
        """Derives predictions from `margins`."""
        if self.multi_label:
            return np.asarray(margins > 0)
        chosen: NDArray[Any] = np.array(self.classes)[margins.argmax(1)]
        return chosen

    def probabilities(self, features: Rows | Features) -> Array:
        """Calibrated probabilities, (n, K). Rows sum to 1, except with several labels per row.

        Raises:
            InputError, ValueError: see `margins`.
            HeadError: the head has no calibration.
        """
        return self.calibrate(self.margins(features))

    @property
    def calibrated(self) -> bool:
        """Whether the head has probabilities."""
        return "calibration.scale" in self.arrays

    def require_calibration(self) -> None:
        """Refuses a head without probabilities.

        Raises:
            HeadError: there are none.
        """
        if not self.calibrated:
            raise HeadError(
                "this head has no probabilities: they need held-out rows, but svm fit had a single row per class, or "
                "another program made the head",
                fix="fit it with more labels",
            )

    def calibrate(self, margins: Array) -> Array:
        """Derives probabilities from `margins`.

        Raises:
            HeadError: the head has no calibration.
        """
        self.require_calibration()
        scale, offset = self.arrays["calibration.scale"], self.arrays["calibration.offset"]
        if self.multi_label:
            return sigmoid(margins * scale + offset)
        if len(scale) == 1:
            second = sigmoid(margins[:, 1] * scale + offset)
            return np.stack([1 - second, second], 1)
        return softmax(margins * scale + offset)

    @property
    def tells_typicality(self) -> bool:
        """Whether the head has distances for typicality."""
        return bool(set(DISTANCE_ARRAYS) & set(self.arrays))

    @property
    def least_typicality(self) -> float:
        """The smallest possible typicality, which depends on the number of held-out rows.

        Raises:
            HeadError: the head has no distances.
        """
        self.require_typicality()
        return 1 / (1 + len(self.arrays["distance.unseen"]))

    def typicality(self, features: Rows | Features) -> Array:
        """Typicality of rows among images of the classes, (n,); see `measure_typicality`.

        Raises:
            InputError, ValueError: see `margins`.
            HeadError: the head has no distances.
        """
        self.require_typicality()
        values = self._values(features)
        starts = range(0, max(len(values), 1), CHUNK_ROWS)
        return np.concatenate([measure_typicality(self.arrays, values[at : at + CHUNK_ROWS]) for at in starts])

    def require_typicality(self) -> None:
        """Refuses a head without distances.

        Raises:
            HeadError: there are none.
        """
        if not self.tells_typicality:
            raise HeadError(
                "this head cannot detect images of other classes: an earlier version or another program made it, or "
                "every class had a single row",
                fix="fit it again",
            )

    def certainty(self, margins: Array) -> Array:
        """Certainty, (n,): the largest margin minus the second; with several labels, the smallest absolute margin."""
        if self.multi_label:
            distance: Array = np.abs(margins).min(1)
            return distance
        top = np.partition(margins, -2, axis=1)
        gap: Array = top[:, -1] - top[:, -2]
        return gap

    def save(self, target: str | os.PathLike[str]) -> None:
        """Writes the head to a new folder.

        Raises:
            InputError: the folder exists or cannot be written.
        """
        with new_folder(target) as folder:
            self.write(folder)

    def write(self, folder: Path) -> None:
        """Writes the two files to a folder."""
        for name, data in self.to_files().items():
            (folder / name).write_bytes(data)

    def to_files(self) -> dict[str, bytes]:
        """The contents of the two files, by name."""
        from safetensors.numpy import save

        about = {
            "format_version": 2 if self.tells_typicality else 1,
            "kind": self.kind,
            "classes": list(self.classes),
            "multi_label": self.multi_label,
            "scaling": self.scaling,
            "feature_size": self.feature_size,
            "model": self.model.to_head() if self.model else None,
            "selection": dict(self.selection),
            "scores": dict(self.scores),
        }
        arrays = {name: np.ascontiguousarray(array) for name, array in self.arrays.items()}
        data = save(arrays, metadata={"head_sha256": about_sha256(about)})
        about[f"{TENSORS}_sha256"] = hashlib.sha256(data).hexdigest()
        text = json.dumps(about, indent=2, ensure_ascii=False) + "\n"
        return {TENSORS: data, HEAD: text.encode()}

    @classmethod
    def load(cls, place: str | os.PathLike[str]) -> Head:
        """Reads a head's folder.

        Raises:
            HeadError: the head is missing, damaged, altered or of a newer format.
        """
        return cls.of_folder(HeadFolder(place))

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        revision: str | None = None,
        sha256: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        endpoint: str | None = None,
    ) -> Head:
        """Loads a head from a folder or the Hub.

        Args:
            name: a folder from svm fit, or ORG/NAME on the Hub.
            revision: a branch, tag or commit on the Hub; main by default. A cached commit needs no network request.
            sha256: the expected sha256 of head.json, which pins both files; `robustfeat info` prints it.
            token: a token for the Hub; by default the token of `hf auth login` or HF_TOKEN. False sends none.
            cache_dir: folder of the downloads; by default the cache of the Hub's libraries.
            local_files_only: use only the cache, without network requests, as HF_HUB_OFFLINE=1 does.
            endpoint: the address of a mirror or a private Hub; by default HF_ENDPOINT or huggingface.co.

        Raises:
            HeadError: the head is missing, damaged, altered or of a newer format.
            HubError: the head is not in the cache, and the Hub refuses, fails or cannot be reached.
        """
        access = HubAccess(token=token, cache_dir=cache_dir, local_files_only=local_files_only, endpoint=endpoint)
        return cls.of_folder(resolve_head(name, revision=revision, sha256=sha256, access=access))

    @classmethod
    def of_folder(cls, folder: HeadFolder) -> Head:
        """Reads the head in an open folder.

        Raises:
            HeadError: the files do not describe a head.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load

        about = folder.about
        try:
            if not isinstance(about["classes"], list) or not isinstance(about["multi_label"], bool):
                raise ValueError("classes must be a list, multi_label true or false")
            if not isinstance(about["selection"], dict) or not isinstance(about["scores"], dict):
                raise ValueError("selection and scores must be objects")
            return cls(
                kind=about["kind"],
                classes=tuple(about["classes"]),
                scaling=about["scaling"],
                arrays=load(folder.files[TENSORS]),
                multi_label=about["multi_label"],
                model=ModelIdentity.of_head(about["model"]) if about["model"] else None,
                selection=about["selection"],
                scores=about["scores"],
                sha256=folder.sha256,
                revision=folder.revision,
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as exc:
            raise HeadError(f"{folder.path}: not a valid head ({first_line(exc)})", fix="copy or fit it again") from exc


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
