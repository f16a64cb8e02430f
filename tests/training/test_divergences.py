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
from robustfeat.training import weighting
from robustfeat.training.divergences import DIVERGENCES
from robustfeat.training.hrrl import ConceptAdversary
from robustfeat.training.objective import StepBatch, create_objective
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
        normalised: Vector = weights / weights.sum()
        return normalised

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


def step_batch(labels: NDArray[np.int64], total: int) -> StepBatch:
    return StepBatch(torch.empty(len(labels), 0), torch.from_numpy(labels), torch.from_numpy(labels), 0.0, total)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", ["erm", "cl"])
def test_examples_of_a_batch_weigh_by_eq_2(name: str, method: str) -> None:
    """The scalar is sum_i p_i (N / N_k) q_k l_i; its gradient by the losses are these weights (Danskin)."""
    recipe = Recipe(method=method, p_lam=0.9, p_divergence=name, reference={"bird": 1, "dog": 1})
    values, labels = np.array([2.0, 0.3, 1.1, 0.7, 5.0]), np.array([0, 0, 1, 0, 1])
    losses = torch.tensor(values, dtype=torch.float32, requires_grad=True)
    objective = create_objective(recipe, CONCEPTS)
    scalar = objective.training_loss(losses, step_batch(labels, 5))
    p = closed_form(name, values / 0.9, np.full(5, 0.2))
    weights = p * (np.array([500 / 400, 500 / 100])[labels] / 2 if method == "cl" else 1)
    assert float(scalar.detach()) == pytest.approx(float(weights @ values), rel=1e-6)
    scalar.backward()
    assert losses.grad is not None
    np.testing.assert_allclose(losses.grad.numpy(), weights, rtol=1e-6, atol=1e-9)
    if method == "cl":  # q learns from the weighed losses
        plain = create_objective(recipe.replace(p_lam=0.0), CONCEPTS)
        plain.training_loss(torch.from_numpy(5 * p * values).float(), step_batch(labels, 5))
        np.testing.assert_allclose(objective.metrics()["q"], plain.metrics()["q"], atol=2e-6)


@pytest.mark.parametrize("name", NAMES)
def test_ranks_share_one_distribution(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three ranks with 2, 3 and 1 of at most 3 examples each, one after the other."""
    values = np.array([2.0, 0.3, 1.1, 0.7, 5.0, 0.1])
    expected = 6 * closed_form(name, values, np.full(6, 1 / 6))
    parts = np.split(values, [2, 5])
    padded = np.full((3, 3), -np.inf)
    for row, part in zip(padded, parts, strict=True):
        row[: len(part)] = part
    level = weighting.create_example_weighting(Recipe(p_lam=1.0, p_divergence=name, batch_size=9))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    for rank, part in enumerate(parts):

        def gather(own: torch.Tensor, rank: int = rank) -> torch.Tensor:
            np.testing.assert_array_equal(own.numpy(), padded[rank])
            return torch.from_numpy(padded)

        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        monkeypatch.setattr(weighting, "gather_tensors", gather)
        weighed = level.weigh(torch.from_numpy(part), step_batch(np.zeros(len(part), np.int64), 6))
        np.testing.assert_allclose(weighed.numpy() / part, np.split(expected, [2, 5])[rank], rtol=1e-6, atol=1e-7)


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(InputError, match="q_divergence='l1': must be one of l2, kl, chi2"):
        Recipe(q_divergence="l1")
    with pytest.raises(InputError, match="p_lam=-1: must be from 0"):
        Recipe(p_lam=-1)
    with pytest.raises(InputError, match="q_warmup_divisor='auto': is Theorem 3's, of `q_divergence=l2`"):
        dataclasses.replace(Recipe(), q_divergence="kl", q_warmup_divisor="auto")
