"""Differences between methods: over seeds, over test images, and corrected for their number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Comparison", "Difference", "compare", "holm", "image_interval", "paired", "pooled"]

_LEVEL = 0.95
_RESAMPLES = 10_000

Interval = tuple[float, float]


@dataclass(frozen=True)
class Difference:
    """A method's mean accuracy minus a baseline's, in shares.

    Attributes:
        mean: the difference.
        interval: Student's 95 % interval; None where no deviation is known.
        p: two-sided p-value of a difference of 0; None where no deviation is known.
    """

    mean: float
    interval: Interval | None
    p: float | None


@dataclass(frozen=True)
class Comparison:
    """A method against a baseline, in shares of the test images, as docs/protocol.md marks it.

    Attributes:
        difference: of the mean accuracies over the seeds.
        over_seeds: Student's t interval of the differences of runs with the same seed; None for one seed.
        over_images: paired bootstrap interval over the test images.
        mark: holds (both above 0), fails (both below) or undecided.
    """

    difference: float
    over_seeds: Interval | None
    over_images: Interval
    mark: str


def paired(values: Sequence[float], baseline: Sequence[float]) -> Difference:
    """The difference of runs with the same seed, with n - 1 degrees of freedom.

    Args:
        values, baseline: accuracies, in the same order of seeds.
    """
    gains = np.asarray(values, np.float64) - np.asarray(baseline, np.float64)
    count = len(gains)
    error = float(gains.std(ddof=1) / np.sqrt(count)) if count > 1 else 0.0
    return _student(float(gains.mean()), error, count - 1)


def pooled(accuracies: Mapping[str, Sequence[float]], baseline: str) -> dict[str, Difference]:
    """Each method minus the baseline, with one deviation over seeds that is pooled over all methods.

    It assumes that all methods vary equally from seed to seed. The degrees of freedom are the runs minus the methods.

    Args:
        accuracies: of each method's runs, in any order.
        baseline: a method of these.

    Source: the error of a one-way analysis of variance, as in Dunnett, JASA 1955.
    """
    groups = {method: np.asarray(values, np.float64) for method, values in accuracies.items()}
    degrees = sum(len(values) - 1 for values in groups.values())
    squares = sum(float(((values - values.mean()) ** 2).sum()) for values in groups.values())
    deviation = np.sqrt(squares / degrees) if degrees else 0.0
    base = groups[baseline]
    return {
        method: _student(
            float(values.mean() - base.mean()), float(deviation * np.sqrt(1 / len(values) + 1 / len(base))), degrees
        )
        for method, values in groups.items()
        if method != baseline
    }


def _student(mean: float, error: float, degrees: int) -> Difference:
    from scipy.stats import t

    if not degrees:
        return Difference(mean, None, None)
    half = float(t.ppf((1 + _LEVEL) / 2, degrees) * error)
    p = float(2 * t.sf(abs(mean) / error, degrees)) if error else float(mean == 0)
    return Difference(mean, (mean - half, mean + half), p)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values that hold together for all of a family.

    Source: Holm, Scandinavian Journal of Statistics 1979.
    """
    p = np.asarray(p_values, np.float64)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return [float(value) for value in adjusted]


def compare(right: Sequence[NDArray[Any]], baseline: Sequence[NDArray[Any]], *, seed: int = 0) -> Comparison:
    """Compares as docs/protocol.md says.

    Args:
        right, baseline: for each seed, in the same order, (m,) bool: which test images each method tells; or the share
            of tries at which it tells them.
        seed: of the bootstrap.
    """
    over_seeds = paired(*([float(one.mean()) for one in runs] for runs in (right, baseline)))
    over_images = image_interval(right, baseline, seed=seed)
    mark = "undecided"
    if over_seeds.interval is not None:
        if min(*over_seeds.interval, *over_images) > 0:
            mark = "holds"
        elif max(*over_seeds.interval, *over_images) < 0:
            mark = "fails"
    return Comparison(over_seeds.mean, over_seeds.interval, over_images, mark)


def image_interval(right: Sequence[NDArray[Any]], baseline: Sequence[NDArray[Any]], *, seed: int = 0) -> Interval:
    """Paired bootstrap over the test images of the difference of mean accuracies over the runs.

    Args:
        right, baseline: see `compare`; the numbers of runs may differ.
        seed: of the bootstrap.
    """
    if len(right) == len(baseline):
        by_image = (np.stack(right).astype(np.float64) - np.stack(baseline)).mean(0)
    else:
        by_image = np.stack(right).mean(0) - np.stack(baseline).mean(0)
    return _bootstrap(by_image, seed)


def _bootstrap(values: NDArray[np.float64], seed: int) -> Interval:
    """Percentile interval of the mean. Resampling rows is drawing how often each distinct value occurs."""
    distinct, counts = np.unique(values, return_counts=True)
    draws = np.random.default_rng(seed).multinomial(len(values), counts / len(values), _RESAMPLES)
    means = draws @ distinct / len(values)
    low, high = np.quantile(means, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return float(low), float(high)
