"""The shares of classes among unlabelled images."""

from __future__ import annotations

import numpy as np

from robustfeat.serving.heads.kinds import Array

__all__ = ["fit_shares"]

_TOLERANCE, _MOST_ROUNDS = 1e-6, 1000


def fit_shares(posteriors: Array, prior: Array, *, least: float = 0.0) -> Array:
    """The shares under which unlabelled examples are most likely, if only the shares differ from those of training.

    Args:
        posteriors: (n, K), each example's probabilities of the classes, by a classifier whose training examples had
            the shares `prior`.
        prior: (K,), positive.
        least: what every class gets at least, before that makes the sum 1.

    Returns:
        (K,), summing to 1.

    Source: Saerens, Latinne and Decaestecker, Neural Computation 2002, Eq. 2.9 (EM).
    """
    ratios, shares = posteriors / prior, prior
    for _ in range(_MOST_ROUNDS):
        weighted = ratios * shares
        new = (weighted / weighted.sum(1, keepdims=True)).mean(0)
        change, shares = np.abs(new - shares).max(), new
        if change < _TOLERANCE:
            break
    shares = np.maximum(shares, least)
    result: Array = shares / shares.sum()
    return result
