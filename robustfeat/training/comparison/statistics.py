"""Differences between methods: over seeds, over test images, and corrected for their number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Comparison",
    "Difference",
    "compare",
    "dunnett",
    "equivalence_mark",
    "holm",
    "image_interval",
    "paired",
    "pooled",
]

_LEVEL = 0.95
_RESAMPLES = 10_000
_POINTS = 200  # per dimension of Dunnett's integral
_NORMAL_RANGE = 8.0
_TAIL = 1e-12

Interval = tuple[float, float]


@dataclass(frozen=True)
class Difference:
    """A method's mean accuracy minus a baseline's, in shares.

    Attributes:
        mean: the difference.
        interval: 95 % interval; None where no deviation is known.
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
    estimates, degrees = _estimates(accuracies, baseline)
    return {method: _student(mean, error, degrees) for method, (mean, error, _) in estimates.items()}


def dunnett(
    accuracies: Mapping[str, Sequence[float]], baseline: str, comparisons: int | None = None
) -> dict[str, Difference]:
    """Each method minus the baseline, with 95 % intervals that hold together for all comparisons.

    The deviation is pooled as by `pooled`. The p-values are adjusted for all comparisons, too.

    Args:
        accuracies: of each method's runs, in any order.
        baseline: a method of these.
        comparisons: planned number; by default the methods here. Absent ones count as methods with the same number of
            runs as the baseline.

    Source: Dunnett, JASA 1955.
    """
    estimates, degrees = _estimates(accuracies, baseline)
    loadings = [loading for _, _, loading in estimates.values()]
    loadings += [float(np.sqrt(0.5))] * ((comparisons or 0) - len(loadings))
    found = {}
    for method, (mean, error, _) in estimates.items():
        if not degrees:
            found[method] = Difference(mean, None, None)
            continue
        half = _dunnett_limit(loadings, degrees) * error
        p = 1 - _dunnett_share(abs(mean) / error, loadings, degrees) if error else float(mean == 0)
        found[method] = Difference(mean, (mean - half, mean + half), min(1.0, max(0.0, p)))
    return found


def _estimates(
    accuracies: Mapping[str, Sequence[float]], baseline: str
) -> tuple[dict[str, tuple[float, float, float]], int]:
    """By method its difference, the standard error, and the root of n / (n + n of the baseline); degrees of freedom."""
    groups = {method: np.asarray(values, np.float64) for method, values in accuracies.items()}
    degrees = sum(len(values) - 1 for values in groups.values())
    squares = sum(float(((values - values.mean()) ** 2).sum()) for values in groups.values())
    deviation = np.sqrt(squares / degrees) if degrees else 0.0
    base = groups[baseline]
    estimates = {
        method: (
            float(values.mean() - base.mean()),
            float(deviation * np.sqrt(1 / len(values) + 1 / len(base))),
            float(np.sqrt(len(values) / (len(values) + len(base)))),
        )
        for method, values in groups.items()
        if method != baseline
    }
    return estimates, degrees


def _dunnett_share(limit: float, loadings: Sequence[float], degrees: int) -> float:
    """Probability that no |t| exceeds the limit if no method differs from the baseline.

    The t have the baseline's normal z, whose part in each is its loading, and the deviation s in common. Given both,
    they are independent. The sum over z and s is by Gauss and Legendre.
    """
    from scipy.special import ndtr
    from scipy.stats import chi, norm

    points, weights = np.polynomial.legendre.leggauss(_POINTS)
    z = _NORMAL_RANGE * points
    of_z = _NORMAL_RANGE * weights * norm.pdf(z)
    low, high = chi.ppf(_TAIL, degrees), chi.isf(_TAIL, degrees)
    root = low + (high - low) * (points + 1) / 2
    of_s = (high - low) / 2 * weights * chi.pdf(root, degrees)
    bound = limit * root[:, None] / np.sqrt(degrees)
    inside = np.ones((_POINTS, _POINTS))
    for loading in loadings:
        rest = np.sqrt(1 - loading**2)
        inside *= ndtr((bound - loading * z) / rest) - ndtr((-bound - loading * z) / rest)
    return float(of_s @ inside @ of_z)


def _dunnett_limit(loadings: Sequence[float], degrees: int) -> float:
    """The |t| that none exceeds with a probability of 95 %. It lies between Student's and Bonferroni's."""
    from scipy.optimize import brentq
    from scipy.stats import t

    student, bonferroni = (float(t.isf((1 - _LEVEL) / 2 / count, degrees)) for count in (1, len(loadings)))
    if len(loadings) == 1:
        return student
    return float(brentq(lambda limit: _dunnett_share(limit, loadings, degrees) - _LEVEL, student, bonferroni))


def equivalence_mark(interval: Interval | None, margin: float) -> str:
    """What a difference's interval says of it.

    Args:
        interval: of the difference.
        margin: largest difference, on both sides, that does not matter.

    Returns:
        equivalent (within the margin on both sides), holds (above 0), fails (below 0), or undecided. An interval within
        the margin that excludes 0 has both marks.
    """
    if interval is None:
        return "undecided"
    marks = ["holds" if interval[0] > 0 else "fails"] if interval[0] > 0 or interval[1] < 0 else []
    if -margin < interval[0] and interval[1] < margin:
        marks.append("equivalent")
    return ", ".join(marks) or "undecided"


def _student(mean: float, error: float, degrees: int) -> Difference:
    from scipy.stats import t

    if not degrees:
        return Difference(mean, None, None)
    half = float(t.ppf((1 + _LEVEL) / 2, degrees) * error)
    p = float(2 * t.sf(abs(mean) / error, degrees)) if error else float(mean == 0)
    return Difference(mean, (mean - half, mean + half), p)


def holm(p_values: Sequence[float], comparisons: int | None = None) -> list[float]:
    """P-values that hold together for all of a family.

    Args:
        p_values: of the family.
        comparisons: planned size of the family; by default the p-values here. Absent ones count as 1.

    Source: Holm, Scandinavian Journal of Statistics 1979.
    """
    p = np.asarray(p_values, np.float64)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    factors = max(len(p), comparisons or 0) - np.arange(len(p))
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * factors))
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
