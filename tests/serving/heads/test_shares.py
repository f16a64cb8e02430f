"""Shares of classes by EM, against a simulation and SciPy's optimiser."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from robustfeat.serving.heads.shares import fit_shares

Array = NDArray[np.float64]


def simulate(shares: Sequence[float], examples: int) -> tuple[Array, Array]:
    """(n, K) true posteriors of examples with these shares, by a classifier that knew others, and those (K,)."""
    prior, rng = np.array([0.2, 0.5, 0.3]), np.random.default_rng(0)
    x = rng.normal(np.array([-1.0, 0.5, 1.0])[rng.choice(3, examples, p=shares)], 1.0)
    likelihoods = np.exp(-0.5 * (x[:, None] - np.array([-1.0, 0.5, 1.0])) ** 2)
    return likelihoods * prior / (likelihoods * prior).sum(1, keepdims=True), prior


def test_em_finds_simulated_shares_where_the_mean_does_not() -> None:
    shares = np.array([0.7, 0.05, 0.25])
    posteriors, prior = simulate(shares.tolist(), 4000)
    assert np.abs(fit_shares(posteriors, prior) - shares).max() < 0.05
    assert np.abs(posteriors.mean(0) - shares).max() > 0.15


def test_em_ends_at_the_largest_likelihood() -> None:
    """By SciPy's constrained optimiser."""
    posteriors, prior = simulate([0.4, 0.4, 0.2], 300)
    best = minimize(
        lambda shares: -np.log((posteriors / prior) @ shares).mean(),
        prior,
        bounds=[(1e-9, 1)] * 3,
        constraints={"type": "eq", "fun": lambda shares: shares.sum() - 1},
        options={"ftol": 1e-12},
    )
    np.testing.assert_allclose(fit_shares(posteriors, prior), best.x, atol=1e-3)


def test_no_class_gets_less_than_it_must() -> None:
    posteriors = np.tile([0.9999, 0.00005, 0.00005], (50, 1))
    expected = np.array([1, 0.03, 0.03]) / 1.06
    np.testing.assert_allclose(fit_shares(posteriors, np.full(3, 1 / 3), least=0.03), expected, atol=1e-6)
