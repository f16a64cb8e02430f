"""Converts logits to probabilities in NumPy, since loading SciPy takes longer than fitting a small head."""

from __future__ import annotations

import numpy as np

from robustfeat.serving.heads.kinds import Array

__all__ = ["sigmoid", "softmax"]


def sigmoid(logits: Array) -> Array:
    """1 / (1 + exp(-x)), element by element."""
    shares: Array = np.exp(-np.logaddexp(0, -logits))
    return shares


def softmax(logits: Array) -> Array:
    """Converts (m, K) logits to probabilities, whose rows sum to 1."""
    powers = np.exp(logits - logits.max(1, keepdims=True))
    shares: Array = powers / powers.sum(1, keepdims=True)
    return shares
