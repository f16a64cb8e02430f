"""Calibrates probabilities from margins on held-out rows."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from robustfeat.serving.heads.kinds import Array
from robustfeat.serving.heads.probabilities import sigmoid, softmax

__all__ = ["calibrate"]

_LEAST, _MOST = 1e-3, 1e2
"""Bounds of the scale, for margins of deviation 1. Without a bound, rows without an error would make it infinite."""

_TOLERANCE = 1e-8
_STEPS = 100


def calibrate(margins: Array, targets: NDArray[np.generic]) -> dict[str, Array]:
    """Fits the scale and offset that turn margins into logits.

    Several classes share one temperature (softmax; Guo et al., ICML 2017), which suits few rows. A single margin, of
    two classes or of one label, gets its own sigmoid (Platt, 1999, with his targets, which keep probabilities away from
    0 and 1).

    Args:
        margins: (m, K) from `Head.raw_margins`, or (m, 1) for two classes.
        targets: (m,) int64, or (m, K) bool.

    Returns:
        `calibration.scale` and `calibration.offset`, each (K,) or (1,).
    """
    columns = margins.shape[1]
    if targets.ndim == 1 and columns > 1:
        scale, offset = np.full(columns, _temperature(margins, targets.astype(np.int64))), np.zeros(columns)
    else:
        answers = targets.reshape(len(targets), -1).astype(bool)
        scale, offset = np.array([_platt(margins[:, at], answers[:, at]) for at in range(columns)]).T
    return {"calibration.scale": np.ascontiguousarray(scale), "calibration.offset": np.ascontiguousarray(offset)}


def _temperature(margins: Array, targets: NDArray[np.int64]) -> float:
    spread = float(margins.std()) or 1.0
    unit = margins / spread
    right = unit[np.arange(len(unit)), targets].mean()

    def slopes(scale: float) -> tuple[float, float]:
        """The first and second derivative of the loss, which is convex."""
        shares = softmax(scale * unit)
        means = (shares * unit).sum(1)
        return float(means.mean() - right), float(((shares * unit**2).sum(1) - means**2).mean())

    return _root(slopes) / spread


def _root(slopes: Callable[[float], tuple[float, float]]) -> float:
    """The minimum of a convex loss between `_LEAST` and `_MOST`, by Newton's method or bisection."""
    low, high, at = _LEAST, _MOST, 1.0
    for _ in range(_STEPS):
        slope, bend = slopes(at)
        low, high = (low, at) if slope > 0 else (at, high)
        step = at - slope / bend if bend > 0 else math.inf
        there = step if low < step < high else math.sqrt(low * high)
        if abs(there - at) < _TOLERANCE * at:
            return there
        at = there
    return at


def _platt(margins: Array, answers: NDArray[np.bool_]) -> tuple[float, float]:
    spread = float(margins.std()) or 1.0
    positive, negative = int(answers.sum()), int((~answers).sum())
    wanted = np.where(answers, (positive + 1) / (positive + 2), 1 / (negative + 2))
    inputs = np.stack([margins / spread, np.ones(len(margins))], 1)
    scale, offset = _fit_logistic(inputs, wanted, np.array([1.0, 0.0]))
    bounded = min(max(scale, _LEAST), _MOST)
    if bounded != scale:  # the loss is convex, so its minimum within the bounds is on this bound
        given = bounded * inputs[:, 0]
        (offset,) = _fit_logistic(inputs[:, 1:], wanted, np.array([offset]), given)
    return float(bounded / spread), float(offset)


def _fit_logistic(inputs: Array, wanted: Array, weights: Array, given: Array | float = 0.0) -> Array:
    """Fits sigmoid(inputs @ weights + given) to shares by Newton's method.

    Args:
        inputs: (m, p).
        wanted: (m,) shares inside (0, 1), so a minimum exists.
        weights: (p,) initial weights.
        given: (m,) fixed part of the logits.
    """

    def loss(weights: Array) -> float:
        logits = inputs @ weights + given
        return float(np.mean(np.logaddexp(0, logits) - wanted * logits))

    value = loss(weights)
    for _ in range(_STEPS):
        shares = sigmoid(inputs @ weights + given)
        slope = inputs.T @ (shares - wanted) / len(inputs)
        hessian = (inputs * (shares * (1 - shares))[:, None]).T @ inputs / len(inputs)
        step = np.linalg.solve(hessian + 1e-12 * np.eye(len(weights)), slope)
        while (there := loss(weights - step)) > value and np.abs(step).max() > _TOLERANCE:
            step = step / 2
        if there > value or slope @ step < _TOLERANCE**2:
            break
        weights, value = weights - step, there
    return weights
