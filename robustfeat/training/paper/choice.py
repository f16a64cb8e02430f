"""The choice of tau and lambda by folds: the value nearest to ERM within one standard error of the best."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["FoldMeans", "choose_within_one_error"]


@dataclass(frozen=True)
class FoldMeans:
    """Scores of a value by folds.

    Attributes:
        folds: for each fold the mean over targets and seeds, in shares.
    """

    folds: tuple[float, ...]

    @classmethod
    def of(cls, runs: Sequence[Sequence[float]]) -> FoldMeans:
        """Means over runs and targets, each with its scores by fold. The same number of folds is needed."""
        return cls(tuple(np.mean(np.array(runs, float), axis=0).tolist()))

    @property
    def mean(self) -> float:
        """Mean of all folds."""
        return float(np.mean(self.folds))

    @property
    def error(self) -> float:
        """Standard error of the mean over the folds; 0 for one fold."""
        return float(np.std(self.folds, ddof=1) / np.sqrt(len(self.folds))) if len(self.folds) > 1 else 0.0


def choose_within_one_error(tried: Mapping[float, FoldMeans], nearest: Callable[[Sequence[float]], float]) -> float:
    """The value nearest to ERM whose mean is at most one standard error of the best below the best.

    Args:
        tried: scores by value, at least one.
        nearest: gives the value nearest to ERM among several, `min` for tau and `max` for lambda.

    Source: Breiman et al., Classification and Regression Trees, 1984.
    """
    best = max(tried.values(), key=lambda scores: scores.mean)
    return nearest([value for value, scores in tried.items() if scores.mean >= best.mean - best.error])
