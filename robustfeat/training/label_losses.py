"""Computes the loss of each image from its logits and its label."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from robustfeat.training.recipe import Recipe

__all__ = ["LabelLoss", "create_label_loss", "ldr_kl_losses"]

LabelLoss = Callable[[Tensor, Tensor], Tensor]
"""From (m, C) float32 logits, and (m,) int64 labels or (m, C) shares of classes, to (m,) float32."""


def create_label_loss(recipe: Recipe) -> LabelLoss:
    """The recipe's `loss`, with smoothed targets where it has `label_smoothing`."""
    if recipe.loss == "cross_entropy":
        return partial(functional.cross_entropy, reduction="none", label_smoothing=recipe.label_smoothing)
    return partial(ldr_kl_losses, lam=recipe.ldr_lam, margin=recipe.ldr_margin, label_smoothing=recipe.label_smoothing)


def ldr_kl_losses(
    logits: Tensor, targets: Tensor, *, lam: float, margin: float = 0.0, label_smoothing: float = 0.0
) -> Tensor:
    """The label-distributionally robust loss with KL: lambda log sum_k exp((f_k - f_y + c_ky) / lambda).

    It is max_p sum_k p_k (f_k - f_y + c_ky) - lambda KL(p || 1 / C) over distributions p of classes, plus the constant
    lambda log C, without which it could be negative. c_ky is the margin, and 0 for k = y. With lambda = 1 and no margin
    it is the cross-entropy; with lambda near 0, the multi-class hinge loss.

    Args:
        logits: (m, C) float32.
        targets: (m,) int64, or (m, C) shares of classes, which weigh the losses of the classes.
        lam: lambda, positive.
        margin: c.
        label_smoothing: label smoothing, as for the cross-entropy.

    Returns:
        (m,) float32, non-negative, with the graph of `logits`.

    Source: Zhu, Ying and Yang, ICML 2023.
    """
    scores = logits / lam
    largest = scores.argmax(1, keepdim=True)
    # The sum over all classes but y. For the largest score it is a sum of its own: 1 - p_y would lose its digits.
    beside_largest = scores.scatter(1, largest, -torch.inf).logsumexp(1, keepdim=True)
    beside_others = scores.logsumexp(1, keepdim=True) + torch.log1p(-scores.softmax(1).scatter(1, largest, 0.0))
    others = beside_others.scatter(1, largest, beside_largest)
    losses = lam * functional.softplus(others + margin / lam - scores)  # of each class as the label
    expected = losses.gather(1, targets[:, None])[:, 0] if targets.ndim == 1 else (targets * losses).sum(1)
    return (1 - label_smoothing) * expected + label_smoothing * losses.mean(1)
