"""The losses of linear heads: squared hinge and logistic per output, and softmax over all outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from robustfeat.serving.heads.kinds import Array

__all__ = ["Loss", "loss_of"]


class Loss(Protocol):
    """A loss of the margins of K outputs.

    Attributes:
        joint: whether the outputs of a row depend on each other.
    """

    joint: bool

    def __call__(self, part: slice, margins: Array) -> tuple[Array, Array, Array]:
        """Sums of losses, (K,) or (1,) if joint, with slopes and curvatures, (n, K), of margins (n, K)."""
        ...

    def bend(self, curvature: NDArray[np.float32], change: Array) -> Array:
        """Second derivatives of the losses times a change of the margins, (n, K)."""
        ...

    def only(self, chosen: NDArray[np.bool_]) -> Loss:
        """The loss of the chosen outputs. Joint outputs stay together."""
        ...


@dataclass(frozen=True, eq=False)
class _Apart:
    """A separate loss per output, with signs s (m, K)."""

    signs: NDArray[np.int8]
    joint = False

    def bend(self, curvature: NDArray[np.float32], change: Array) -> Array:
        bent: Array = curvature * change
        return bent

    def only(self, chosen: NDArray[np.bool_]) -> Self:
        return type(self)(self.signs[:, chosen])


class _SquaredHinge(_Apart):
    """The squared hinge loss, max(0, 1 - s m)^2."""

    def __call__(self, part: slice, margins: Array) -> tuple[Array, Array, Array]:
        signs = self.signs[part]
        slack: Array = np.maximum(0, 1 - signs * margins)
        return (slack**2).sum(0), -2.0 * signs * slack, np.where(slack > 0, 2.0, 0.0)


class _Logistic(_Apart):
    """The logistic loss, log(1 + exp(-s m))."""

    def __call__(self, part: slice, margins: Array) -> tuple[Array, Array, Array]:
        signs = self.signs[part]
        agreement = signs * margins
        wrong = 1 / (1 + np.exp(np.minimum(agreement, 700)))
        return np.logaddexp(0, -agreement).sum(0), -signs * wrong, wrong * (1 - wrong)


@dataclass(frozen=True, eq=False)
class _Softmax:
    """The softmax loss, minus the log-probability of the true class, with classes (m,)."""

    targets: NDArray[np.int64]
    joint = True

    def __call__(self, part: slice, margins: Array) -> tuple[Array, Array, Array]:
        targets = self.targets[part]
        at = np.arange(len(targets))
        margins = margins - margins.max(1, keepdims=True)
        shares = np.exp(margins)
        totals = shares.sum(1, keepdims=True)
        shares /= totals
        loss = np.log(totals).sum() - margins[at, targets].sum()
        slopes = shares.copy()
        slopes[at, targets] -= 1
        return np.array([loss]), slopes, shares

    def bend(self, curvature: NDArray[np.float32], change: Array) -> Array:
        bent: Array = curvature * (change - (curvature * change).sum(1, keepdims=True))
        return bent

    def only(self, chosen: NDArray[np.bool_]) -> Self:
        return self


def loss_of(kind: str, targets: NDArray[Any], outputs: int) -> Loss:
    """The loss of a kind of head, equal to scikit-learn's.

    Args:
        kind: svm or logistic.
        targets: (m,) int64, or (m, K) bool for several labels per row.
        outputs: K, or 1 for two classes.
    """
    if kind == "logistic" and outputs > 1 and targets.ndim == 1:
        return _Softmax(targets)
    if targets.ndim == 2:
        positive = targets
    elif outputs == 1:
        positive = targets[:, None] == 1
    else:
        positive = targets[:, None] == np.arange(outputs)
    signs = np.where(positive, np.int8(1), np.int8(-1))
    return _SquaredHinge(signs) if kind == "svm" else _Logistic(signs)
