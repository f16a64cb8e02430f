"""What keeps an adversary near its reference: closed forms, numeric maxima, and the ascent over many batches."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.optimize import brentq, minimize

from robustfeat.errors import InputError
from robustfeat.training.divergences import DIVERGENCES
from robustfeat.training.hrrl import ConceptAdversary
from robustfeat.training.objective import create_objective
from robustfeat.training.recipe import Recipe
from tests.training.test_objective import CONCEPTS

NAMES = ["l2", "chi2", "kl"]
Q0 = np.array([0.02, 0.08, 0.3, 0.6])
COUNTS = torch.tensor([20, 80, 300, 600])
Vector = NDArray[np.float64]


def closed_form(name: str, values: Vector, reference: Vector) -> Vector:
    """The q on the simplex that maximises q values - D(q || reference)."""
    if name == "kl":
        weights: Vector = reference * np.exp(values - values.max())
        return weights / weights.sum()

    def shares(nu: float) -> Vector:
        scale = reference if name == "chi2" else 1.0
        found: Vector = np.maximum(0, reference + scale * (values - nu))
        return found

    bound = 1 + np.abs(values).max() + 1 / reference.min()
    return shares(float(brentq(lambda nu: shares(nu).sum() - 1, -bound, bound, xtol=1e-14)))


def divergence(name: str, q: Vector, reference: Vector) -> float:
    if name == "kl":
        return float((q * np.log(np.maximum(q, 1e-30) / reference)).sum())
    return float(((q - reference) ** 2 / (reference if name == "chi2" else 1)).sum() / 2)


def maximise(name: str, values: Vector, reference: Vector) -> Vector:
    tensors = torch.from_numpy(reference), torch.from_numpy(values)
    found: Vector = DIVERGENCES[name].ascend(tensors[0], *tensors).numpy()
    return found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_from_the_reference_one_ascent_is_the_maximum(name: str, scale: float) -> None:
    rng = np.random.default_rng(0)
    for size in (1, 2, 7, 40):
        reference, values = rng.dirichlet(np.ones(size)) + 1e-3, scale * rng.standard_normal(size)
        reference /= reference.sum()
        found = maximise(name, values, reference)
        np.testing.assert_allclose(found, closed_form(name, values, reference), atol=1e-10)
        assert found.sum() == pytest.approx(1)
        moved = maximise(name, values + 5, reference)
        np.testing.assert_allclose(moved, found, atol=1e-10, err_msg="a constant changes nothing")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("lam", [0.5, 3.0])
def test_a_solver_finds_no_better_distribution(name: str, lam: float) -> None:
    losses = np.array([2.0, 0.3, 1.1, 0.7])
    found = maximise(name, losses / lam, Q0)
    solved = minimize(
        lambda q: lam * divergence(name, q, Q0) - q @ losses, Q0, method="SLSQP", bounds=[(0, 1)] * 4,
        constraints={"type": "eq", "fun": lambda q: q.sum() - 1}, options={"ftol": 1e-14, "maxiter": 500},
    )  # fmt: skip
    np.testing.assert_allclose(found, solved.x, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_share_of_zero(name: str) -> None:
    """KL and chi-square never leave it; L2 does."""
    found = maximise(name, np.array([9.0, 1.0, 0.0]), np.array([0.0, 0.5, 0.5]))
    assert (found[0] > 0) == (name == "l2")
    assert np.isfinite(found).all()
    pull = DIVERGENCES[name].gradient(torch.tensor([0.0, 0.4, 0.6]), torch.tensor([0.0, 0.5, 0.5]))
    assert bool(torch.isfinite(pull).all())


@pytest.mark.parametrize("name", NAMES)
def test_a_concept_that_has_lost_all_weight_comes_back(name: str) -> None:
    reference = torch.tensor([0.5, 0.5], dtype=torch.float64)
    gone = DIVERGENCES[name].ascend(reference, reference, torch.tensor([2000.0, 0.0], dtype=torch.float64))
    assert gone.tolist() == [1, 0]
    back = -3.0 * DIVERGENCES[name].gradient(gone, reference) + torch.tensor([0.0, 2000.0])
    assert float(DIVERGENCES[name].ascend(gone, reference, back)[1]) > 0.9


def random_batches(steps: int) -> list[tuple[Vector, NDArray[np.int64]]]:
    rng = np.random.default_rng(4)
    drawn = []
    for _ in range(steps):
        concepts = rng.choice(4, 64, p=Q0)
        drawn.append((rng.exponential(np.array([4.0, 1.0, 2.0, 1.5]))[concepts], concepts))
    return drawn


@pytest.mark.parametrize("name", NAMES)
def test_the_adversary_follows_a_numpy_transcription(name: str) -> None:
    lam, s, c = 2.0, 20, 10.0
    adversary = ConceptAdversary(COUNTS, lam, s, c, divergence=name)
    q = Q0.copy()
    for t, (losses, concepts) in enumerate(random_batches(200), 1):
        adversary.update(torch.from_numpy(losses), torch.from_numpy(concepts))
        estimates = np.array([losses[concepts == k].sum() for k in range(4)]) / Q0 / 64
        eta = 1 / (lam * t * (c if t <= s else 1))
        # The p that maximises p g - D_D(p, q) / eta, with D_D the Bregman divergence of D.
        if name == "kl":
            q = q * np.exp(eta * (estimates - lam * np.log(q / Q0)))
            q /= q.sum()
        else:
            scale = Q0 if name == "chi2" else np.ones(4)
            point = q + eta * (scale * estimates - lam * (q - Q0))
            nu = brentq(lambda nu, point=point, scale=scale: np.maximum(0, point - nu * scale).sum() - 1, -1e4, 1e4)
            q = np.maximum(0, point - nu * scale)
        np.testing.assert_allclose(adversary.q.numpy(), q, atol=1e-6)


def test_kl_is_the_closed_form_of_the_mean_of_all_estimates() -> None:
    """At eta = 1 / (lambda t) from the first step on."""
    adversary = ConceptAdversary(COUNTS, 3.0, 0, divergence="kl")
    total = np.zeros(4)
    for t, (losses, concepts) in enumerate(random_batches(100), 1):
        adversary.update(torch.from_numpy(losses), torch.from_numpy(concepts))
        total += np.array([losses[concepts == k].sum() for k in range(4)]) / Q0 / 64
        np.testing.assert_allclose(adversary.q.numpy(), closed_form("kl", total / t / 3, Q0), rtol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_with_losses_that_stay_the_ascent_ends_at_the_closed_form(name: str) -> None:
    """Each batch has the shares of the set, so that the estimates are the losses."""
    concepts = np.repeat(np.arange(4), COUNTS.numpy() // 20)
    losses = np.array([2.0, 0.3, 1.1, 0.7])
    adversary = ConceptAdversary(COUNTS, 2.5, 10, 10.0, divergence=name)
    for _ in range(1500):
        adversary.update(torch.from_numpy(losses[concepts]), torch.from_numpy(concepts))
    np.testing.assert_allclose(adversary.q.numpy(), closed_form(name, losses / 2.5, Q0), atol=2e-3)


@pytest.mark.parametrize("name", NAMES)
def test_it_goes_on_from_its_state(name: str) -> None:
    whole, first, second = (ConceptAdversary(COUNTS, 1.0, 5, divergence=name) for _ in range(3))
    batches = [(torch.from_numpy(losses), torch.from_numpy(concepts)) for losses, concepts in random_batches(12)]
    for batch in batches:
        whole.update(*batch)
    for batch in batches[:6]:
        first.update(*batch)
    second.load_state_dict(first.state_dict())
    for batch in batches[6:]:
        second.update(*batch)
    assert torch.equal(second.q, whole.q)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_chooses_it(name: str) -> None:
    recipe = Recipe(method="cl", q_divergence=name, lam=2.0, q_warmup_steps=0)
    adversary: Any = create_objective(recipe, CONCEPTS).adversary
    adversary.update(torch.tensor([1.0, 3.0]), torch.tensor([0, 1]))
    q0 = np.array([0.8, 0.2])
    np.testing.assert_allclose(adversary.q.numpy(), closed_form(name, np.array([0.5, 1.5]) / q0 / 2, q0), atol=1e-6)


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(InputError, match="q_divergence='l1': must be one of l2, kl, chi2"):
        Recipe(q_divergence="l1")
    with pytest.raises(InputError, match="q_warmup_divisor='auto': is Theorem 3's, of `q_divergence=l2`"):
        dataclasses.replace(Recipe(), q_divergence="kl", q_warmup_divisor="auto")
