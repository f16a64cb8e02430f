"""Differences between methods: over seeds, over test images, and what both say together (docs/protocol.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Comparison", "compare"]

_LEVEL = 0.95
_RESAMPLES = 10_000


@dataclass(frozen=True)
class Comparison:
    """A method against a baseline, in shares of the test images.

    Attributes:
        difference: difference of the mean accuracies over the seeds.
        over_seeds: Student's t interval of the differences of runs with the same seed; None for one seed.
        over_images: paired bootstrap interval over the test images.
        mark: holds (both above 0), fails (both below) or undecided.
    """

    difference: float
    over_seeds: tuple[float, float] | None
    over_images: tuple[float, float]
    mark: str


def compare(right: Sequence[NDArray[Any]], baseline: Sequence[NDArray[Any]], *, seed: int = 0) -> Comparison:
    """Compares.

    Args:
        right, baseline: for each seed, in the same order, (m,) bool: which test images each method tells; or the share
            of tries at which it tells them.
        seed: random seed of the bootstrap.
    """
    from scipy.stats import t

    gains = np.stack(right).astype(np.float64) - np.stack(baseline)
    by_seed, by_image = gains.mean(1), gains.mean(0)
    difference, count = float(gains.mean()), len(by_seed)
    over_seeds = None
    if count > 1:
        half = float(t.ppf((1 + _LEVEL) / 2, count - 1) * by_seed.std(ddof=1) / np.sqrt(count))
        over_seeds = (difference - half, difference + half)
    over_images = _bootstrap(by_image, seed)
    mark = "undecided"
    if over_seeds is not None:
        if min(*over_seeds, *over_images) > 0:
            mark = "holds"
        elif max(*over_seeds, *over_images) < 0:
            mark = "fails"
    return Comparison(difference, over_seeds, over_images, mark)


def _bootstrap(values: NDArray[np.float64], seed: int) -> tuple[float, float]:
    """Percentile interval of the mean. Resampling rows is drawing how often each distinct value occurs."""
    distinct, counts = np.unique(values, return_counts=True)
    draws = np.random.default_rng(seed).multinomial(len(values), counts / len(values), _RESAMPLES)
    means = draws @ distinct / len(values)
    low, high = np.quantile(means, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return float(low), float(high)
