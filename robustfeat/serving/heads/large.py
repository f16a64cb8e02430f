"""Fitting on features that do not fit in memory: passes over a memory-mapped file.

Linear kinds minimise the same functions as scikit-learn's LinearSVC and LogisticRegression do, by SciPy's L-BFGS, whose
every step is one pass. The variables are preconditioned by the features' second moments: without that, hundreds of
passes are needed where tens are enough.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from robustfeat.progress import Progress
from robustfeat.serving.heads.convert import scaler
from robustfeat.serving.heads.head import Head
from robustfeat.serving.heads.kinds import KINDS, Array

__all__ = ["LargeSet"]

_T = TypeVar("_T")

_ROWS = 8192
_MAX_PASSES = 500


class LargeSet:
    """Labelled rows on disk.

    Args:
        values: (n, D) features, memory-mapped.
        rows: (m,) int64, ascending: those with labels.
        targets: (m,) int64, or (m, K) bool.
        kind: one of `KINDS`.
        threads: processors.
        progress: shows the passes.
    """

    workers = 1  # a fit has all processors

    def __init__(
        self,
        values: NDArray[Any],
        rows: NDArray[np.int64],
        targets: NDArray[Any],
        kind: str,
        threads: int = 1,
        progress: Progress | None = None,
    ) -> None:
        self._values, self._rows, self._targets, self._kind = values, rows, targets, kind
        self._threads, self._progress = threads, progress
        self._multi_label = targets.ndim == 2
        self._classes = targets.shape[1] if self._multi_label else int(targets.max()) + 1
        self._view: _View | None = None
        self._last: Array | None = None

    def fit(self, scaling: str, c: float | None, places: NDArray[np.int64]) -> tuple[Head, bool]:
        """A head, its classes numbered, and whether the solver converged."""
        from threadpoolctl import threadpool_limits

        places = np.sort(places)
        with threadpool_limits(1):  # the threads are ours, a chunk each
            if self._view is None or not self._view.shows(scaling, places):
                self._view = _View(self._values, self._rows, places, scaling, self._threads)
            arrays, converged = (
                self._fit_linear(self._view, float(c or 1.0))
                if KINDS[self._kind].linear
                else (self._fit_means(self._view), True)
            )
        arrays = self._view.arrays | arrays
        return Head(self._kind, tuple(range(self._classes)), scaling, arrays, multi_label=self._multi_label), converged

    def _fit_means(self, view: _View) -> dict[str, Array]:
        """Means, variances and shares, of the classes, or of the rows without and with each label."""
        groups = self._classes * (2 if self._multi_label else 1)
        size = self._values.shape[1]
        count, first, second = np.zeros(groups), np.zeros((groups, size)), np.zeros((groups, size))

        def sums(part: slice) -> tuple[Array, Array, Array]:
            x, member = view.scaled(part), self._members(self._targets[view.places[part]])
            return member.sum(0), member.T @ x, member.T @ x**2

        for more in view.map(sums):
            count, first, second = count + more[0], first + more[1], second + more[2]
        means = first / count[:, None]
        overall = first[: groups if not self._multi_label else 2].sum(0) / len(view.places)
        total = second[: groups if not self._multi_label else 2].sum(0) / len(view.places) - overall**2
        # As GaussianNB(var_smoothing=1e-9) has it.
        variances = np.maximum(second / count[:, None] - means**2, 0) + 1e-9 * total.max()
        shape = (self._classes, 2) if self._multi_label else (self._classes,)
        found = {
            "means": means.reshape(*shape, size),
            "variances": variances.reshape(*shape, size),
            "priors": (count / len(view.places)).reshape(shape),
        }
        return {name: found[name] for name in KINDS[self._kind].shapes}

    def _members(self, targets: NDArray[Any]) -> Array:
        if self._multi_label:
            return np.stack([~targets, targets], 2).reshape(len(targets), -1).astype(np.float64)
        members: Array = np.eye(self._classes)[targets]
        return members

    def _fit_linear(self, view: _View, c: float) -> tuple[dict[str, Array], bool]:
        from scipy.linalg import cholesky, solve_triangular
        from scipy.optimize import minimize

        size = self._values.shape[1] + 1
        outputs = 1 if self._classes == 2 and not self._multi_label else self._classes
        softmax = self._kind == "logistic" and outputs > 1 and not self._multi_label
        # liblinear's intercept is the weight of a feature that is always 1, and shrunk like the others.
        shrunk = np.ones(size)
        shrunk[-1] = float(self._kind == "svm")
        curvature = 1.0 if self._kind == "svm" else 0.25
        lower = cholesky(np.eye(size) + c * curvature * view.moments(), lower=True)
        inverse = solve_triangular(lower, np.eye(size), lower=True)
        passes = 0

        def objective(flat: Array) -> tuple[float, Array]:
            nonlocal passes
            passes += 1
            weights = flat.reshape(outputs, size) @ inverse
            raw_weights = view.to_raw(weights)

            def terms(part: slice) -> tuple[float, Array]:
                x, targets = view.raw(part), self._targets[view.places[part]]
                margins = (x @ raw_weights[:, :-1].T) * view.factors(part) + raw_weights[:, -1]
                own, slope = _loss(self._kind, margins, targets, softmax=softmax)
                gradient = np.empty_like(weights)
                gradient[:, :-1] = (slope * view.factors(part)).T @ x
                gradient[:, -1] = slope.sum(0)
                return own, gradient

            loss, gradient = 0.0, np.zeros_like(weights)
            for own, more in view.map(terms):
                loss, gradient = loss + own, gradient + more
            if self._progress:
                self._progress.advance(0, f"C {c:g}, {view.scaling} scaling, pass {passes}")
            value = c * loss + 0.5 * float((shrunk * weights**2).sum())
            return value, ((c * view.from_raw(gradient) + shrunk * weights) @ inverse.T).reshape(-1)

        # From the minimum for the C before, if there was one: every start leads to the one minimum.
        start = np.zeros((outputs, size)) if self._last is None else self._last @ lower
        found = minimize(
            objective,
            start.reshape(-1),
            jac=True,
            method="L-BFGS-B",
            options={"maxfun": _MAX_PASSES, "maxiter": _MAX_PASSES, "maxcor": 20, "ftol": 1e-10, "gtol": 1e-6},
        )
        self._last = weights = found.x.reshape(outputs, size) @ inverse
        return {
            "coefficients": np.ascontiguousarray(weights[:, :-1]),
            "intercepts": np.ascontiguousarray(weights[:, -1]),
        }, bool(found.success)


class _View:
    """Some rows, as a scaling shows them.

    Scaling x is f (x - mean) / scale, with a factor f a row. It is applied to weights and gradients, which are small,
    rather than to the rows.

    Attributes:
        scaling: one of `SCALINGS`.
        places: (m,) int64, ascending, of the labelled rows.
        arrays: what a head needs to know of the scaling.
    """

    def __init__(
        self, values: NDArray[Any], rows: NDArray[np.int64], places: NDArray[np.int64], scaling: str, threads: int
    ) -> None:
        self.scaling, self.places = scaling, places
        self._values, self._rows, self._threads = values, rows[places], threads
        size = values.shape[1]
        self._mean, self._scale = np.zeros(size), np.ones(size)
        self._factors = np.ones((len(places), 1))
        self.arrays: dict[str, Array] = {}
        self._moments: Array | None = None
        if scaling == "standard":
            standard = scaler(scaling)
            for part in self._parts():
                standard.partial_fit(self.raw(part))
            self._mean, self._scale = standard.mean_, standard.scale_
            self.arrays = {"scaling.mean": self._mean, "scaling.scale": self._scale}
        elif scaling == "l2":
            norms = np.concatenate(list(self.map(lambda part: np.linalg.norm(self.raw(part), axis=1))))
            self._factors = 1 / np.where(norms == 0, 1.0, norms)[:, None]

    def shows(self, scaling: str, places: NDArray[np.int64]) -> bool:
        """Whether it is a view of these rows, scaled like this."""
        return self.scaling == scaling and np.array_equal(self.places, places)

    def map(self, function: Callable[[slice], _T]) -> Iterator[_T]:
        """Calls `function` with each part of the places, several at once; results come in order."""
        with ThreadPoolExecutor(self._threads) as pool:
            yield from pool.map(function, self._parts())

    def _parts(self) -> list[slice]:
        return [slice(start, start + _ROWS) for start in range(0, len(self.places), _ROWS)]

    def raw(self, part: slice) -> Array:
        """(n, D) float64, as they are in the file."""
        return self._values[self._rows[part]].astype(np.float64)

    def factors(self, part: slice) -> Array:
        """(n, 1)."""
        return self._factors[part]

    def scaled(self, part: slice) -> Array:
        """(n, D) float64."""
        scaled: Array = (self.raw(part) - self._mean) / self._scale * self.factors(part)
        return scaled

    def moments(self) -> Array:
        """The sum over rows of (x, 1)(x, 1)^T, (D+1, D+1), of scaled x."""
        if self._moments is None:

            def products(part: slice) -> Array:
                padded = np.pad(self.scaled(part), ((0, 0), (0, 1)), constant_values=1.0)
                outer: Array = padded.T @ padded
                return outer

            size = self._values.shape[1] + 1
            self._moments = sum(self.map(products), np.zeros((size, size)))
        return self._moments

    def to_raw(self, weights: Array) -> Array:
        """(outputs, D+1) weights of scaled x to those of raw x; where there are factors, the mean is zero."""
        raw = weights.copy()
        raw[:, :-1] /= self._scale
        raw[:, -1] -= raw[:, :-1] @ self._mean
        return raw

    def from_raw(self, gradient: Array) -> Array:
        """The gradient by raw weights to that by weights of scaled x: the transpose of `to_raw`."""
        scaled = gradient.copy()
        scaled[:, :-1] -= np.outer(gradient[:, -1], self._mean)
        scaled[:, :-1] /= self._scale
        return scaled


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
