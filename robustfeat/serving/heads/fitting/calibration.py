"""Probabilities from margins, calibrated on held-out rows."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from robustfeat.serving.heads.kinds import Array

__all__ = ["calibrate"]


def calibrate(margins: Array, targets: NDArray[np.generic]) -> dict[str, Array]:
    """The scale and offset that make margins logits.

    Several classes share one temperature (softmax; Guo et al., ICML 2017), which few rows can bear; a margin that
    stands alone, of two classes or of one of several labels, gets a sigmoid of its own (Platt, 1999, with his targets,
    which keep probabilities off 0 and 1).

    Args:
        margins: (m, K) of `Head.raw_margins`, or (m, 1) for two classes.
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
    from scipy.optimize import minimize_scalar
    from scipy.special import logsumexp

    spread = float(margins.std()) or 1.0
    unit = margins / spread
    right = unit[np.arange(len(unit)), targets]

    def loss(log_scale: float) -> float:
        scale = np.exp(log_scale)
        return float(np.mean(logsumexp(scale * unit, axis=1) - scale * right))

    # Bounded: rows that are all right would want no temperature at all.
    found = minimize_scalar(loss, bounds=(np.log(1e-3), np.log(1e2)), method="bounded")
    return float(np.exp(found.x) / spread)


def _platt(margins: Array, answers: NDArray[np.bool_]) -> tuple[float, float]:
    from scipy.optimize import minimize
    from scipy.special import expit

    spread = float(margins.std()) or 1.0
    unit = margins / spread
    positive, negative = int(answers.sum()), int((~answers).sum())
    wanted = np.where(answers, (positive + 1) / (positive + 2), 1 / (negative + 2))

    def loss(parameters: Array) -> tuple[float, Array]:
        logits = parameters[0] * unit + parameters[1]
        slope = expit(logits) - wanted
        value = np.mean(np.logaddexp(0, logits) - wanted * logits)
        return float(value), np.array([np.mean(slope * unit), np.mean(slope)])

    found = minimize(loss, np.array([1.0, 0.0]), jac=True, method="L-BFGS-B", bounds=[(1e-3, 1e2), (None, None)])
    return float(found.x[0] / spread), float(found.x[1])
