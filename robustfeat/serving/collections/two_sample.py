"""Whether two samples of features come from one distribution: their energy distance, and a permutation test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Comparison", "compare_samples", "distances_between", "energy_distance"]

_BLOCK = 100
"""Permutations that are computed at a time."""


@dataclass(frozen=True)
class Comparison:
    """How far two samples lie from each other.

    Attributes:
        distance: the energy distance as a share of its largest value: 0 where the distributions are the same, 1 where
            each is a single point. It is an unbiased estimate, but never below 0.
        p: the share of random divisions of all rows into two samples that lie at least as far apart. Without a shift
            it is uniform.
        rows: how many rows each sample had.
        permutations: how many divisions were drawn.
    """

    distance: float
    p: float
    rows: tuple[int, int]
    permutations: int


def compare_samples(
    x: NDArray[np.floating],
    y: NDArray[np.floating],
    *,
    permutations: int = 999,
    seed: int = 0,
    advance: Callable[[int], None] = lambda count: None,
) -> Comparison:
    """The energy distance of two samples, and its p-value by permutations.

    Args:
        x, y: (m, D) and (n, D) finite, at least two rows each.
        permutations: divisions to draw. No p-value is below 1 / (permutations + 1).
        seed: of the draw.
        advance: told how many permutations are done.

    Raises:
        ValueError: a sample has fewer than two rows.

    Source: Székely and Rizzo, Journal of Statistical Planning and Inference 2013 (energy statistics and the coefficient
    of inhomogeneity); Phipson and Smyth, 2010 (p-values of permutations that are never 0).
    """
    m, n = len(x), len(y)
    if min(m, n) < 2:
        raise ValueError(f"each sample must have two rows or more; got {m} and {n}")
    pooled = np.concatenate([x, y])
    away = distances_between(pooled, pooled)
    np.fill_diagonal(away, 0.0)
    p = _permute(away, m, permutations, np.random.default_rng(seed), advance)
    return Comparison(max(_share(away, np.full(m, 1 / m)), 0.0), p, (m, n), permutations)


def energy_distance(
    x: NDArray[np.floating], y: NDArray[np.floating], weights: NDArray[np.float64] | None = None
) -> float:
    """`Comparison.distance` as it is estimated, which may be below 0.

    Args:
        x, y: (m, D) and (n, D) finite, at least two rows each.
        weights: (m,) of the rows of `x`, not negative; equal by default.
    """
    pooled = np.concatenate([x, y])
    away = distances_between(pooled, pooled)
    np.fill_diagonal(away, 0.0)
    weights = np.ones(len(x)) if weights is None else weights
    return _share(away, weights / weights.sum())


def _share(away: NDArray[np.float64], weights: NDArray[np.float64]) -> float:
    m, n = len(weights), len(away) - len(weights)
    between = 2 * float((weights @ away[:m, m:]).mean())
    pairs = 1 - float((weights**2).sum())  # the weight of all pairs of different rows
    within = float(weights @ away[:m, :m] @ weights) / pairs + float(away[m:, m:].sum()) / (n * (n - 1))
    return (between - within) / between if between else 0.0


def distances_between(x: NDArray[np.floating], y: NDArray[np.floating]) -> NDArray[np.float64]:
    """(m, n) Euclidean distances between (m, D) and (n, D) rows."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    squares = (x * x).sum(1)[:, None] + (y * y).sum(1)
    squares -= 2 * (x @ y.T)
    return np.asarray(np.sqrt(np.maximum(squares, 0, out=squares), out=squares))


def _permute(
    away: NDArray[np.float64], m: int, permutations: int, draw: np.random.Generator, advance: Callable[[int], None]
) -> float:
    """The share of divisions into m and the other rows that lie at least as far apart as the given one.

    The statistic is a quadratic form: each row weighs 1/m or -1/n by its sample, and distances count negatively.
    """
    count = len(away)
    given = np.where(np.arange(count) < m, 1 / m, -1 / (count - m))
    observed = _energy(away, given[:, None])[0]
    # Divisions that are the given one, with the rows in another order, differ from it by rounding.
    least = observed - 1e-9 * away.mean()
    as_far, done = 1, 0
    while done < permutations:
        weights = draw.permuted(np.tile(given, (min(_BLOCK, permutations - done), 1)), axis=1).T
        as_far += int((_energy(away, weights) >= least).sum())
        done += weights.shape[1]
        advance(weights.shape[1])
    return as_far / (1 + permutations)


def _energy(away: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """(b,) energy distances for (N, b) weights."""
    return np.asarray(-((away @ weights) * weights).sum(0))
