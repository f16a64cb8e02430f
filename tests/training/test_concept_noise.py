"""The concept level's noise: the formulas of docs/concept-noise.md against the real adversary on simulated losses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.utils._python_dispatch import TorchDispatchMode

from robustfeat.training.hrrl import ConceptAdversary
from robustfeat.training.loop.trainer import train
from tests.training.small import recipe

Array = NDArray[np.float64]

RARE = 50
SHARES = np.array([0.005] * RARE + [0.015] * RARE)
MEAN, DEVIATION = 5.0, 1.0  # of the losses, in each concept
M, STEPS, LAM = 100, 40, 1e5  # lambda keeps q off the edges of the simplex
PASS_STEPS = 20


def simulate(*, runs: int = 24, steps: int = STEPS, shuffled: bool = False, **options: Any) -> tuple[Array, Array]:
    """Deviation over the runs of a concept's weight, and what the adversary expects: of the rare and the frequent."""
    counts = np.round(SHARES * M * PASS_STEPS).astype(int)
    pool, rng = np.repeat(np.arange(len(counts)), counts), np.random.default_rng(0)
    weights, expected = [], []
    for _ in range(runs):
        passes = PASS_STEPS if shuffled else None
        adversary = ConceptAdversary(torch.from_numpy(counts), LAM, pass_steps=passes, **options)
        for step in range(steps):
            if shuffled and step % PASS_STEPS == 0:
                pool = rng.permutation(pool)
            at = step % PASS_STEPS * M
            concepts = pool[at : at + M] if shuffled else rng.choice(pool, M)
            adversary.update(torch.from_numpy(rng.normal(MEAN, DEVIATION, M)), torch.from_numpy(concepts))
        weights.append(adversary.concept_weights().numpy() - 1)
        expected.append(adversary.noise.deviations().numpy() / SHARES)
    measured, told = (np.square(values).mean(0).reshape(2, RARE).mean(1) for values in (weights, expected))
    return np.sqrt(measured), np.sqrt(told)


def of_one_batch(loss: float, tangent: Array | None = None) -> Array:
    """Deviation of a weight, times lambda, that one batch's gradient gives it: l / (q0^1.5 sqrt(m)), more exactly.

    With `tangent`, q0, that of chi-square and KL: l / sqrt(q0 m).
    """
    covariance = np.diag(loss**2 / SHARES) - (loss**2 - DEVIATION**2)
    moves = np.eye(len(SHARES)) - 1 / len(SHARES)
    if tangent is not None:
        moves = tangent[:, None] * (np.eye(len(SHARES)) - tangent)
    variance = np.diag(moves @ covariance @ moves.T) / M
    deviation: Array = (np.sqrt(variance) / SHARES)[[0, -1]]
    return deviation


@pytest.mark.parametrize("baseline", [False, True])
def test_a_weight_deviates_as_the_formula_says(baseline: bool) -> None:
    measured, expected = simulate(warmup_steps=0, baseline=baseline)
    loss = DEVIATION if baseline else math.hypot(MEAN, DEVIATION)
    formula = of_one_batch(loss) / (LAM * math.sqrt(STEPS))
    np.testing.assert_allclose(measured, formula, rtol=0.06)
    np.testing.assert_allclose(expected, formula, rtol=0.03)
    short = loss / (LAM * SHARES[[0, -1]] ** 1.5 * math.sqrt(M * STEPS))
    np.testing.assert_allclose(formula, short, rtol=0.03)


@pytest.mark.parametrize("divergence", ["chi2", "kl"])
def test_with_other_divergences_a_weight_deviates_less(divergence: str) -> None:
    measured, expected = simulate(warmup_steps=0, divergence=divergence)
    loss = math.hypot(MEAN, DEVIATION)
    formula = of_one_batch(loss, SHARES) / (LAM * math.sqrt(STEPS))
    np.testing.assert_allclose(measured, formula, rtol=0.06)
    np.testing.assert_allclose(expected, formula, rtol=0.03)
    np.testing.assert_allclose(formula, loss / (LAM * np.sqrt(SHARES[[0, -1]] * M * STEPS)), rtol=0.03)


def test_the_first_phase_keeps_the_noise_of_early_batches() -> None:
    s, c = 25, 10.0
    measured, expected = simulate(warmup_steps=s, c=c)
    rates = [1 / (c * t) if t <= s else 1 / t for t in range(1, STEPS + 1)]
    weights = [rate * math.prod(1 - later for later in rates[t + 1 :]) for t, rate in enumerate(rates)]
    formula = of_one_batch(math.hypot(MEAN, DEVIATION)) / LAM * math.sqrt(sum(weight**2 for weight in weights))
    np.testing.assert_allclose(measured, formula, rtol=0.06)
    np.testing.assert_allclose(expected, formula, rtol=0.03)


@pytest.mark.parametrize("steps", [STEPS, STEPS + PASS_STEPS // 2])
def test_complete_passes_even_out_the_concepts_numbers(steps: int) -> None:
    """What is left are differences between losses and, in the middle of a pass, the numbers so far in it."""
    measured, expected = simulate(steps=steps, shuffled=True, warmup_steps=0)
    begun = steps % PASS_STEPS
    numbers = of_one_batch(math.hypot(MEAN, DEVIATION)) ** 2 - of_one_batch(DEVIATION) ** 2
    variance = of_one_batch(DEVIATION) ** 2 * steps + numbers * begun * (1 - begun / PASS_STEPS)
    formula = np.sqrt(variance) / (LAM * steps)
    np.testing.assert_allclose(measured, formula, rtol=0.06)
    np.testing.assert_allclose(expected, formula, rtol=0.03)


def test_weights_are_told_apart_from_what_sampling_does_to_them() -> None:
    """From q and the noise's variances, written out."""
    counts, rng = np.array([30, 10, 60]), np.random.default_rng(1)
    adversary = ConceptAdversary(torch.from_numpy(counts), 20.0, warmup_steps=0)
    assert [float(value) for value in adversary.weight_noise()] == [0, 0]
    for _ in range(30):
        concepts = rng.choice(3, 16, p=counts / 100)
        adversary.update(torch.from_numpy(np.array([1.0, 5.0, 2.0])[concepts]), torch.from_numpy(concepts))
    weights, deviations = adversary.concept_weights().numpy(), adversary.noise.deviations().numpy() * 100 / counts
    distance, noise = (float((counts / 100 * values**2).sum()) for values in (weights - 1, deviations))
    assert distance > noise > 0
    told = [float(value) for value in adversary.weight_noise()]
    assert told == pytest.approx([math.sqrt(distance - noise), math.sqrt(noise)])


def test_a_step_launches_one_kernel_for_the_noise() -> None:
    """The arithmetic is for readers: at each step, a GPU would be told of sixty kernels on a few numbers."""

    class Count(TorchDispatchMode):
        operators = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.operators += 1
            return function(*args, **(kwargs or {}))

    noise = ConceptAdversary(torch.tensor([30, 10, 60]), 2.0).noise
    sums, squares, counts = torch.rand(3, 3).double()
    with Count() as count:  # type: ignore[no-untyped-call]
        noise.learn(sums, squares, counts, 0.1)
    assert count.operators == 1


@pytest.mark.parametrize("c", [10.0, "auto"])
def test_the_noise_goes_on_from_its_state(c: float | str) -> None:
    """And it is the same bits whoever looked at it on the way, also after more steps than wait for that."""
    options: dict[str, Any] = {"pass_steps": 4, "baseline": True, "c": c}
    whole, first, second = (ConceptAdversary(torch.tensor([30, 10, 60]), 2.0, **options) for _ in range(3))
    rng = np.random.default_rng(2)
    batches = [(torch.from_numpy(rng.gamma(2.0, 1.0, 8)), torch.from_numpy(rng.choice(3, 8))) for _ in range(270)]
    for batch in batches:
        whole.update(*batch)
    for batch in batches[:6]:
        first.update(*batch)
        first.weight_noise()
    second.load_state_dict(first.state_dict())
    for batch in batches[6:]:
        second.update(*batch)
    assert torch.equal(whole.noise.deviations(), second.noise.deviations())
    assert float(whole.noise.deviations().min()) > 0


def test_a_run_says_once_that_noise_exceeds_the_signal(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    train(dataset, recipe(dataset, lam=0.1), run, workers=0, threads=1)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sampling noise moves")]
    assert len(said) == 1
    assert said[0].endswith("less noise: `q_baseline=true`, a larger `lam` or `batch_size`, or a longer run")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["event"] == "train"]
    assert all(step["weight_noise"] > step["weight_signal"] for step in steps)
