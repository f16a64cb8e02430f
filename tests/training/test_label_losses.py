"""The label-distributionally robust loss against its definition, and as a recipe's loss."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch.nn import functional

from robustfeat.errors import InputError
from robustfeat.training.hrrl import step_along
from robustfeat.training.label_losses import ldr_kl_losses
from robustfeat.training.loop.ranks import Ranks
from robustfeat.training.loop.step import TrainingStep
from tests.training.test_objective import CONCEPTS, CPU, SMALL, pixels, seen

LABELS = torch.tensor([0, 1, 3, 3, 2])


def drawn(scale: float = 2.0) -> torch.Tensor:
    return scale * torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


def margins(label: int, margin: float) -> NDArray[np.float64]:
    found = np.full(4, margin)
    found[label] = 0
    return found


def expected(logits: torch.Tensor, label: int, lam: float, margin: float) -> NDArray[np.float64]:
    """Of each image, as if all had this label."""
    f = logits.double().numpy()
    exponents = (f - f[:, [label]] + margins(label, margin)) / lam
    top = exponents.max(1, keepdims=True)
    found: NDArray[np.float64] = lam * (top[:, 0] + np.log(np.exp(exponents - top).sum(1)))
    return found


@pytest.mark.parametrize("lam", [0.01, 0.5, 1.0, 20.0])
@pytest.mark.parametrize("margin", [0.0, 0.3, 2.0])
def test_it_is_the_definition(lam: float, margin: float) -> None:
    logits = drawn()
    found = ldr_kl_losses(logits, LABELS, lam=lam, margin=margin)
    assert found.dtype == torch.float32
    by_label = np.stack([expected(logits, label, lam, margin) for label in range(4)], 1)
    np.testing.assert_allclose(found.numpy(), by_label[np.arange(5), LABELS.numpy()], rtol=1e-5, atol=1e-6)
    shares = functional.softmax(drawn(1.0), 1)
    soft = ldr_kl_losses(logits, shares, lam=lam, margin=margin, label_smoothing=0.2)
    smoothed = 0.8 * shares.numpy() + 0.2 / 4
    np.testing.assert_allclose(soft.numpy(), (smoothed * by_label).sum(1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("lam", [0.5, 3.0])
def test_it_is_the_worst_case_over_distributions_of_classes(lam: float) -> None:
    logits, margin = drawn(1.0), 0.7
    found = ldr_kl_losses(logits, LABELS, lam=lam, margin=margin)
    for f, label, loss in zip(logits.double().numpy(), LABELS.tolist(), found.tolist(), strict=True):
        gains = f - f[label] + margins(label, margin)

        def value(p: NDArray[np.float64], gains: NDArray[np.float64] = gains) -> float:
            return float(p @ gains - lam * (p * np.log(np.maximum(4 * p, 1e-30))).sum())

        solved = minimize(
            lambda p, value=value: -value(p), np.full(4, 0.25), method="SLSQP", bounds=[(1e-9, 1)] * 4,
            constraints={"type": "eq", "fun": lambda p: p.sum() - 1}, options={"ftol": 1e-12},
        )  # fmt: skip
        assert loss == pytest.approx(-solved.fun + lam * np.log(4), abs=1e-4)


def test_it_is_the_cross_entropy_or_the_hinge_loss_at_its_ends() -> None:
    logits = drawn()
    entropy = functional.cross_entropy(logits, LABELS, reduction="none", label_smoothing=0.1)
    torch.testing.assert_close(ldr_kl_losses(logits, LABELS, lam=1.0, label_smoothing=0.1), entropy)
    f = logits.numpy()
    hinge = [max(f[i] - f[i, y] + margins(y, 1.5)) for i, y in enumerate(LABELS.tolist())]
    np.testing.assert_allclose(ldr_kl_losses(logits, LABELS, lam=0.004, margin=1.5).numpy(), hinge, atol=0.01)


@pytest.mark.parametrize("margin", [0.0, 5.0])
def test_logits_of_any_size_have_finite_losses_and_gradients(margin: float) -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]], requires_grad=True)
    losses = ldr_kl_losses(logits, torch.tensor([0, 1]), lam=0.01, margin=margin)
    losses.sum().backward()
    assert bool(torch.isfinite(losses).all())
    assert logits.grad is not None
    assert bool(torch.isfinite(logits.grad).all())
    assert bool((losses >= 0).all())


def make(**options: Any) -> TrainingStep:
    recipe = dataclasses.replace(SMALL, loss="ldr_kl", ldr_lam=0.5, ldr_margin=0.2)
    step = TrainingStep(dataclasses.replace(recipe, **options), CONCEPTS, CPU, Ranks())
    step.train()
    return step


def test_a_step_moves_images_along_its_gradient_and_descends_it() -> None:
    step = make(method="tests.training.test_objective:Seen", lr=1e-12)
    step.network.eval()
    images, labels = pixels()
    x = step.to_input(images).requires_grad_()
    losses = ldr_kl_losses(step.network(x), labels, lam=0.5, margin=0.2)
    (gradient,) = torch.autograd.grad(losses.sum(), x)
    result = step(images, labels, 0.0, 0)
    torch.testing.assert_close(seen(step).after.detach(), step_along(x, gradient, 1.0), rtol=1e-4, atol=1e-5)
    after = ldr_kl_losses(step.network(seen(step).after), labels, lam=0.5, margin=0.2)
    torch.testing.assert_close(result.losses, after.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"loss": "hinge"}, "loss='hinge': must be one of cross_entropy, ldr_kl"),
        ({"ldr_lam": 0}, "ldr_lam=0: must be from 1e-06"),
        ({"ldr_margin": -1}, "ldr_margin=-1: must be from 0"),
        ({"labels": False, "teacher": "a"}, "loss=ldr_kl: needs labels, which are not learned"),
    ],
)
def test_what_makes_no_sense_is_refused(keys: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        dataclasses.replace(SMALL, **{"loss": "ldr_kl", **keys})
