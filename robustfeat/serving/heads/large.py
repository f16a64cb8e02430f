"""Fitting on features that do not fit in memory: passes over a memory-mapped file.

Linear kinds minimise the same functions as scikit-learn's LinearSVC and LogisticRegression do, by SciPy's L-BFGS, whose
every step is one pass. The variables are preconditioned by the features' second moments: without that, hundreds of
passes are needed where tens are enough.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustfeat.progress import Progress
from robustfeat.serving.heads.head import KINDS, Array, Head

__all__ = ["LargeSet"]

_ROWS = 16_384
_MAX_PASSES = 500


class LargeSet:
    """Labelled rows on disk.

    Args:
        values: (n, D) features, memory-mapped.
        rows: (m,) int64, ascending: those with labels.
        targets: (m,) int64, or (m, K) bool.
        kind: one of `KINDS`.
        progress: shows the passes.
    """

    workers = 1  # BLAS has all processors

    def __init__(
        self,
        values: NDArray[Any],
        rows: NDArray[np.int64],
        targets: NDArray[Any],
        kind: str,
        progress: Progress | None = None,
    ) -> None:
        self._values, self._rows, self._targets, self._kind = values, rows, targets, kind
        self._progress = progress
        self._multi_label = targets.ndim == 2
        self._classes = targets.shape[1] if self._multi_label else int(targets.max()) + 1
        self._scaled: tuple[Any, dict[str, Array], Array] | None = None
        self._last: tuple[Any, Array] | None = None

    def fit(self, scaling: str, c: float | None, places: NDArray[np.int64]) -> tuple[Head, bool]:
        """A head, its classes numbered, and whether the solver converged."""
        places = np.sort(places)
        scaler = _Scaling(scaling, self, places)
        if KINDS[self._kind].linear:
            arrays, converged = self._fit_linear(scaler, float(c or 1.0), places)
        else:
            arrays, converged = self._fit_means(scaler, places), True
        return (
            Head(
                self._kind, tuple(range(self._classes)), scaling, scaler.arrays | arrays, multi_label=self._multi_label
            ),
            converged,
        )

    def chunks(self, places: NDArray[np.int64]) -> Iterator[tuple[Array, NDArray[Any]]]:
        """The features at these places, as float64, with their targets; `places` is ascending."""
        for start in range(0, len(places), _ROWS):
            part = places[start : start + _ROWS]
            yield np.asarray(self._values[self._rows[part]], np.float64), self._targets[part]

    def _fit_means(self, scaler: _Scaling, places: NDArray[np.int64]) -> dict[str, Array]:
        """Means, variances and shares, of the classes, or of the rows without and with each label."""
        groups = self._classes * (2 if self._multi_label else 1)
        size = self._values.shape[1]
        count, first, second = np.zeros(groups), np.zeros((groups, size)), np.zeros((groups, size))
        for raw, targets in self.chunks(places):
            x = scaler(raw)
            member = self._members(targets)
            count += member.sum(0)
            first += member.T @ x
            second += member.T @ x**2
        means = first / count[:, None]
        overall = first[: groups if not self._multi_label else 2].sum(0) / len(places)
        total = second[: groups if not self._multi_label else 2].sum(0) / len(places) - overall**2
        # As GaussianNB(var_smoothing=1e-9) has it.
        variances = np.maximum(second / count[:, None] - means**2, 0) + 1e-9 * total.max()
        shape = (self._classes, 2) if self._multi_label else (self._classes,)
        found = {
            "means": means.reshape(*shape, size),
            "variances": variances.reshape(*shape, size),
            "priors": (count / len(places)).reshape(shape),
        }
        return {name: found[name] for name in KINDS[self._kind].shapes}

    def _members(self, targets: NDArray[Any]) -> Array:
        if self._multi_label:
            return np.stack([~targets, targets], 2).reshape(len(targets), -1).astype(np.float64)
        members: Array = np.eye(self._classes)[targets]
        return members

    def _fit_linear(self, scaler: _Scaling, c: float, places: NDArray[np.int64]) -> tuple[dict[str, Array], bool]:
        from scipy.linalg import cholesky, solve_triangular
        from scipy.optimize import minimize

        size = self._values.shape[1] + 1
        outputs = 1 if self._classes == 2 and not self._multi_label else self._classes
        softmax = self._kind == "logistic" and outputs > 1 and not self._multi_label
        # liblinear's intercept is the weight of a feature that is always 1, and shrunk like the others.
        shrunk = np.ones(size)
        shrunk[-1] = float(self._kind == "svm")
        curvature = 1.0 if self._kind == "svm" else 0.25
        key = (scaler.name, len(places))
        if self._scaled is None or self._scaled[0] != key:
            moments = np.zeros((size, size))
            for x, _ in self.chunks(places):
                padded = _pad(scaler(x))
                moments += padded.T @ padded
            self._scaled = (key, scaler.arrays, moments)
        lower = cholesky(np.eye(size) + c * curvature * self._scaled[2], lower=True)
        inverse = solve_triangular(lower, np.eye(size), lower=True)
        passes = 0

        def objective(flat: Array) -> tuple[float, Array]:
            nonlocal passes
            passes += 1
            weights = flat.reshape(outputs, size) @ inverse
            loss, gradient = 0.0, np.zeros_like(weights)
            for x, targets in self.chunks(places):
                padded = _pad(scaler(x))
                own, slope = _loss(self._kind, padded @ weights.T, targets, softmax=softmax)
                loss += own
                gradient += slope.T @ padded
            if self._progress:
                self._progress.advance(0, f"C {c:g}, {scaler.name} scaling, pass {passes}")
            value = c * loss + 0.5 * float((shrunk * weights**2).sum())
            return value, ((c * gradient + shrunk * weights) @ inverse.T).reshape(-1)

        start = np.zeros((outputs, size))
        if self._last is not None and self._last[0] == key:
            start = self._last[1] @ lower  # the minimum for the C before
        found = minimize(
            objective,
            start.reshape(-1),
            jac=True,
            method="L-BFGS-B",
            options={"maxfun": _MAX_PASSES, "maxiter": _MAX_PASSES, "maxcor": 20, "ftol": 1e-10, "gtol": 1e-6},
        )
        weights = found.x.reshape(outputs, size) @ inverse
        self._last = (key, weights)
        return {
            "coefficients": np.ascontiguousarray(weights[:, :-1]),
            "intercepts": np.ascontiguousarray(weights[:, -1]),
        }, bool(found.success)


class _Scaling:
    """What is done to features first, learnt from the rows at `places`."""

    def __init__(self, name: str, data: LargeSet, places: NDArray[np.int64]) -> None:
        from sklearn.preprocessing import Normalizer, StandardScaler

        self.name = name
        self.arrays: dict[str, Array] = {}
        self._step = {"none": None, "l2": Normalizer(), "standard": StandardScaler()}[name]
        if name == "standard":
            for x, _ in data.chunks(places):
                self._step.partial_fit(x)
            self.arrays = {"scaling.mean": self._step.mean_, "scaling.scale": self._step.scale_}

    def __call__(self, x: Array) -> Array:
        return x if self._step is None else np.asarray(self._step.transform(x))


def _pad(x: Array) -> Array:
    return np.concatenate([x, np.ones((len(x), 1))], 1)


def _loss(kind: str, margins: Array, targets: NDArray[Any], *, softmax: bool) -> tuple[float, Array]:
    """The sum over rows, and its slope by `margins`, (m, outputs)."""
    from scipy.special import expit, logsumexp

    if softmax:
        total = logsumexp(margins, axis=1, keepdims=True)
        slope = np.exp(margins - total)
        rows = np.arange(len(targets))
        slope[rows, targets] -= 1
        return float(total.sum() - margins[rows, targets].sum()), slope
    if targets.ndim == 2:
        signs = np.where(targets, 1.0, -1.0)
    elif margins.shape[1] == 1:
        signs = np.where(targets == 1, 1.0, -1.0)[:, None]
    else:
        signs = np.full(margins.shape, -1.0)
        signs[np.arange(len(targets)), targets] = 1.0
    if kind == "svm":
        slack = np.maximum(0, 1 - signs * margins)
        return float((slack**2).sum()), -2 * signs * slack
    return float(np.logaddexp(0, -signs * margins).sum()), -signs * expit(-signs * margins)
