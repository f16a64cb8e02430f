"""The accuracy of a head on images without labels."""

from __future__ import annotations

import numpy as np

from robustfeat.serving.heads.kinds import Array

__all__ = ["estimate_accuracy"]


def estimate_accuracy(probabilities: Array, shares: Array) -> float:
    """Estimates the share of images whose class is right, from probabilities and the shares of the true classes.

    Each image is given a class, so that the classes have the given shares and the probabilities of the given classes
    are as large as they can be together. Their mean is the estimate. A head that takes most images for one class
    cannot be right more often than that class occurs, which the mean of its largest probabilities does not know.

    Args:
        probabilities: (n, K) calibrated; of many rows pass a sample, since time grows with the cube of n at worst.
        shares: (K,) of the true classes, summing to 1.

    Source: Lu et al., NeurIPS 2023 (confidence optimal transport).
    """
    from scipy.optimize import linear_sum_assignment

    wanted = shares * len(probabilities)
    counts = np.floor(wanted).astype(np.int64)
    short = len(probabilities) - int(counts.sum())
    counts[np.argsort(counts - wanted, kind="stable")[:short]] += 1
    costs = 1 - probabilities[:, np.repeat(np.arange(len(shares)), counts)]
    return 1 - float(costs[linear_sum_assignment(costs)].mean())
