"""The minimum of a linear head's objective, for all classes at once, by Newton's method.

An objective is 1/2 |w|^2 + C times the sum of a loss over rows, for each class by itself (squared hinge and logistic
loss, one against the rest) or for all together (softmax). Its Hessian is I + C X^T B X, where B holds the losses'
second derivatives: for the squared hinge 2 on the rows that violate the margin. A Newton step is solved by conjugate
gradients, all classes in the same passes over the rows, preconditioned by the inverse of an earlier Hessian. So a
Hessian is computed about once for each C, rather than once a step, and a step takes a few passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from robustfeat.serving.heads.kinds import Array

__all__ = ["Loss", "Minimum", "Newton", "Rows", "loss_of"]

_T = TypeVar("_T")

_TOLERANCE = 1e-9
"""Of the objective: half the squared Newton decrement over the value."""

_FORCING = 0.05
"""A step is solved until its residual has shrunk to this share."""

_PASS, _INVERSION = 12.0, 2.7
"""Costs in operations: of a pass for each value and output (four, each three times as slow as in a product of large
matrices), and of an inversion for r^3."""

_MAX_STEPS, _MAX_PASSES = 100, 100
_LARGEST_GRADIENT = 1e120  # its square is a number, too
_LARGEST = 2**26
"""Values that the outputs' preconditioners may have together; beyond it they share one."""


class Rows(Protocol):
    """Rows of scaled features, the last of which is 1, for the intercept.

    Attributes:
        size: r, features with the intercept.
        count: m.
    """

    size: int
    count: int

    def map(self, function: Callable[[slice, Array], _T]) -> Iterator[_T]:
        """Calls `function` with each block's places and (n, r) float64 rows; results come in order."""
        ...


class Loss(Protocol):
    """Of margins, for K outputs.

    Attributes:
        joint: whether the outputs of a row depend on each other.
    """

    joint: bool

    def __call__(self, part: slice, margins: Array) -> tuple[Array, Array, Array]:
        """Margins (n, K) to the sums of losses (K,), or (1,) where they are joint, and slopes and curvatures (n, K)."""
        ...

    def bend(self, curvature: NDArray[np.float32], change: Array) -> Array:
        """Second derivatives of the losses times a change of the margins, (n, K)."""
        ...

    def only(self, chosen: NDArray[np.bool_]) -> Loss:
        """The loss of some outputs; not of joint ones."""
        ...


@dataclass(frozen=True, eq=False)
class _Apart:
    """A loss of each output by itself, with signs s (m, K)."""

    signs: NDArray[np.int8]
    joint = False

    def bend(self, curvature: NDArray[np.float32], change: Array) -> Array:
        bent: Array = curvature * change
        return bent

    def only(self, chosen: NDArray[np.bool_]) -> Self:
        return type(self)(self.signs[:, chosen])


class _SquaredHinge(_Apart):
    """max(0, 1 - s m)^2."""

    def __call__(self, part: slice, margins: Array) -> tuple[Array, Array, Array]:
        signs = self.signs[part]
        slack: Array = np.maximum(0, 1 - signs * margins)
        return (slack**2).sum(0), -2.0 * signs * slack, np.where(slack > 0, 2.0, 0.0)


class _Logistic(_Apart):
    """log(1 + exp(-s m))."""

    def __call__(self, part: slice, margins: Array) -> tuple[Array, Array, Array]:
        signs = self.signs[part]
        agreement = signs * margins
        wrong = 1 / (1 + np.exp(np.minimum(agreement, 700)))
        return np.logaddexp(0, -agreement).sum(0), -signs * wrong, wrong * (1 - wrong)


@dataclass(frozen=True, eq=False)
class _Softmax:
    """Minus the logarithm of the true class's share, with classes (m,)."""

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

    def only(self, chosen: NDArray[np.bool_]) -> Loss:
        raise NotImplementedError("joint outputs stay together")


def loss_of(kind: str, targets: NDArray[Any], outputs: int) -> Loss:
    """The loss of a kind of head, as scikit-learn's classifier of this kind has it.

    Args:
        kind: svm or logistic.
        targets: (m,) int64, or (m, K) bool for several labels a row.
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


@dataclass(frozen=True, eq=False)
class Minimum:
    """Where an objective is least.

    Attributes:
        weights: (K, r).
        value: the objective, (K,) or (1,).
        converged: whether it was reached.
    """

    weights: Array
    value: Array
    converged: bool


class Newton:
    """Minimises for one C after another, each from the minimum before.

    Args:
        rows: the features.
        loss: of margins.
        shrunk: (r,), 1 for weights that 1/2 |w|^2 counts, 0 for others.
        outputs: K.
        report: called with each pass's number.

    Attributes:
        passes: over the rows, so far.
    """

    def __init__(
        self, rows: Rows, loss: Loss, shrunk: Array, outputs: int, report: Callable[[int], None] | None = None
    ) -> None:
        self._rows, self._loss, self._shrunk, self._report = rows, loss, shrunk, report
        self._weights = np.zeros((outputs, rows.size))
        self._preconditioner = _Preconditioner(rows, shrunk, outputs)
        self.passes = 0

    def forget(self) -> None:
        """Frees the preconditioner, the most of what this takes; the next C makes another one."""
        self._preconditioner = _Preconditioner(self._rows, self._shrunk, len(self._weights))

    def minimise(self, c: float) -> Minimum:
        """The minimum for this C.

        Raises:
            ValueError: the features are too large for the objective to be finite.
        """
        self._preconditioner.set_c(c)
        found, loss, active = self._weights.copy(), self._loss, np.arange(len(self._weights))
        point = self._evaluate(loss, found, c)
        values = point.value.copy()
        for _ in range(_MAX_STEPS):
            if not (np.isfinite(point.value).all() and np.abs(point.gradient).max() < _LARGEST_GRADIENT):
                raise ValueError("they are too large: scale them")
            self._preconditioner.renew_where_worthwhile(active, point.curvature)
            step, passes = self._solve(loss, active, point, c)
            self._preconditioner.count(active, passes)
            slope = _dot(loss, point.gradient, step)
            going = -slope / 2 > _TOLERANCE * point.value
            if not going.any():
                active = active[:0]
                break
            if not going.all():  # each output by itself: those at their minimum are left alone from here
                active, loss, step, slope = active[going], loss.only(going), step[going], slope[going]
                point = point.only(going)
            moved = self._move(loss, point, step, slope, c)
            if moved is None:
                break
            point = moved
            found[active] = point.weights
            values[active if len(values) > 1 else slice(None)] = point.value
        if loss.joint:  # what no margin's difference shows
            found[:, self._shrunk == 0] -= found[:, self._shrunk == 0].mean(0)
        self._weights = found
        return Minimum(found, values, not len(active))

    def _evaluate(self, loss: Loss, weights: Array, c: float) -> _Point:
        curvatures = np.empty((self._rows.count, len(weights)), np.float32)

        def terms(part: slice, x: Array) -> tuple[Array, Array]:
            with np.errstate(over="ignore", invalid="ignore"):  # seen in the value
                value, slopes, curvatures[part] = loss(part, x @ weights.T)
                return value, slopes.T @ x

        value, gradient = self._sum(terms)
        own = _dot(loss, weights, self._shrunk * weights)
        return _Point(weights, 0.5 * own + c * value, self._shrunk * weights + c * gradient, curvatures)

    def _sum(self, terms: Callable[[slice, Array], tuple[Array, ...]]) -> list[Array]:
        self.passes += 1
        if self._report:
            self._report(self.passes)
        totals: list[Array] = []
        for found in self._rows.map(terms):
            totals = [total + more for total, more in zip(totals, found, strict=True)] if totals else list(found)
        return totals

    def _move(self, loss: Loss, point: _Point, step: Array, slope: Array, c: float) -> _Point | None:
        """The point that a line search along the step finds (Armijo's rule); None if there is none."""
        length = np.ones(len(slope))
        for _ in range(30):
            there = self._evaluate(loss, point.weights + length[:, None] * step, c)
            rounding = 1e-12 * np.abs(point.value)
            high = ~(there.value <= point.value + 1e-4 * length * slope + rounding)
            if not high.any():
                return there
            # The minimum of the parabola through both values, with the slope at the start.
            with np.errstate(all="ignore"):
                lowest = -0.5 * slope * length**2 / (there.value - point.value - slope * length)
            length = np.where(high, np.clip(np.nan_to_num(lowest), 0.1 * length, 0.5 * length), length)
        return None

    def _solve(self, loss: Loss, active: NDArray[np.int64], point: _Point, c: float) -> tuple[Array, NDArray[np.int64]]:
        """The Newton step (K, r) by preconditioned conjugate gradients, and the passes that each output needed."""

        def condition(vectors: Array) -> Array:
            return self._preconditioner(active, vectors)

        step, residual = np.zeros_like(point.gradient), -point.gradient
        direction = condition(residual)
        first = old = _dot(loss, residual, direction)
        passes = np.zeros(len(old), np.int64)
        for _ in range(_MAX_PASSES):
            going = old > _FORCING**2 * first
            if not going.any():
                break
            passes += going
            bent = self._times_hessian(loss, direction, point.curvature, c, going)
            with np.errstate(all="ignore"):
                rate = np.where(going, old / _dot(loss, direction, bent), 0.0)[:, None]
            step = step + rate * direction
            residual = residual - rate * bent
            conditioned = condition(residual)
            new = np.where(going, _dot(loss, residual, conditioned), old)
            with np.errstate(all="ignore"):
                direction = conditioned + np.nan_to_num(new / old)[:, None] * direction
            old = new
        return step, passes

    def _times_hessian(
        self, loss: Loss, direction: Array, curvature: NDArray[np.float32], c: float, going: NDArray[np.bool_]
    ) -> Array:
        """(K, r), zero for outputs that are not `going`."""
        chosen = slice(None) if going.all() else going
        moved, bends = direction[chosen], curvature[:, chosen]
        product = np.zeros_like(direction)
        (total,) = self._sum(lambda part, x: (loss.bend(bends[part], x @ moved.T).T @ x,))
        product[chosen] = self._shrunk * moved + c * total
        return product


@dataclass(frozen=True, eq=False)
class _Point:
    """The objective at some weights.

    Attributes:
        weights: (K, r).
        value: (K,), or (1,) of joint outputs.
        gradient: (K, r).
        curvature: of the losses, (m, K).
    """

    weights: Array
    value: Array
    gradient: Array
    curvature: NDArray[np.float32]

    def only(self, chosen: NDArray[np.bool_]) -> _Point:
        """Of some outputs."""
        return _Point(self.weights[chosen], self.value[chosen], self.gradient[chosen], self.curvature[:, chosen])


def _dot(loss: Loss, a: Array, b: Array) -> Array:
    """(K,) products, or their sum (1,) where outputs are joint."""
    product: Array = np.einsum("kr,kr->k", a, b)
    return product.sum(keepdims=True) if loss.joint else product


class _Preconditioner:
    """Inverses of earlier Hessians: one for all outputs at first, and then one for each that is worth it.

    A new one costs a pass over the rows whose losses bend differently than before, and an inversion. An output gets one
    when the passes that conjugate gradients have spent on it since the last one have cost as much, so that both
    together are at most twice the cheaper one.
    """

    def __init__(self, rows: Rows, shrunk: Array, outputs: int) -> None:
        self._rows, self._outputs, self._c = rows, outputs, 0.0
        self._shrunk = np.maximum(shrunk, 1e-9)
        self._shared = True
        self._products: Array | None = None  # X^T B X, (1, r, r) while shared, then (K, r, r)
        self._inverses: Array | None = None  # of the Hessians with these
        self._counted = np.empty((0, 0), np.float32)  # B in the products, (m, K)
        self._level = 0.0  # of B at first, when all rows bend alike
        self._spent = np.zeros(outputs)

    def set_c(self, c: float) -> None:
        """What is computed so far serves another C as well, as the same losses bend."""
        if c != self._c:
            self._c, self._inverses = c, None

    def count(self, active: NDArray[np.int64], passes: NDArray[np.int64]) -> None:
        """Passes that outputs have needed, (n,), or (1,) of joint ones."""
        self._spent[active] += passes

    def __call__(self, active: NDArray[np.int64], vectors: Array) -> Array:
        """(n, r) of these outputs to (n, r)."""
        if self._inverses is None:
            self._invert(slice(None))
        assert self._inverses is not None
        if self._shared:
            product: Array = vectors @ self._inverses[0]
        else:
            inverses = self._inverses if len(active) == self._outputs else self._inverses[active]
            product = np.matmul(inverses, vectors[:, :, None])[:, :, 0]
        return product

    def renew_where_worthwhile(self, active: NDArray[np.int64], curvature: NDArray[np.float32]) -> None:
        """Brings products up to date: all at first, then where passes have cost enough; curvatures are (m, n)."""
        size, count = self._rows.size, self._rows.count
        if self._products is None:  # all rows bend alike where the weights are zero
            self._level = float(curvature.mean())
            self._products = self._product(np.full(count, self._level))[None]
        if self._outputs * size**2 > _LARGEST:
            return
        least = _INVERSION * size**3
        for output, bends in zip(active, curvature.T, strict=True):
            spent = self._spent[output] * _PASS * count * size
            if spent < least:
                continue
            if self._shared:
                self._part()
            changed = np.count_nonzero(bends != self._counted[:, output])
            used = np.count_nonzero(bends)
            if spent > least + min(changed, used) * float(size) ** 2:
                self._renew(output, bends, anew=bool(used < changed))

    def _part(self) -> None:
        """From one for all to one for each."""
        assert self._products is not None
        self._shared = False
        self._products = np.repeat(self._products, self._outputs, 0)
        self._counted = np.full((self._rows.count, self._outputs), self._level, np.float32)
        if self._inverses is not None:
            self._inverses = np.repeat(self._inverses, self._outputs, 0)

    def _renew(self, output: int, bends: NDArray[np.float32], *, anew: bool) -> None:
        assert self._products is not None
        if anew:
            self._products[output] = self._product(bends)
        else:
            self._products[output] += self._product(bends - self._counted[:, output])
        self._counted[:, output] = bends
        self._spent[output] = 0
        if self._inverses is not None:
            self._invert(output)

    def _invert(self, chosen: Any) -> None:
        assert self._products is not None
        if self._inverses is None:
            self._inverses = np.empty_like(self._products)
        hessians = self._c * self._products[chosen]
        at = np.arange(self._rows.size)
        hessians[..., at, at] += self._shrunk
        self._inverses[chosen] = np.linalg.inv(hessians)

    def _product(self, bends: NDArray[np.floating[Any]]) -> Array:
        """X^T B X, (r, r), for a diagonal B, (m,), whose values may be below zero."""

        def terms(part: slice, x: Array) -> Array:
            total = np.zeros((self._rows.size, self._rows.size))
            for sign in (1, -1):
                used = np.flatnonzero(sign * bends[part] > 0)
                if len(used):
                    scaled = x[used] * np.sqrt(np.abs(bends[part][used]), dtype=np.float64)[:, None]
                    total += sign * (scaled.T @ scaled)
            return total

        total = np.zeros((self._rows.size, self._rows.size))
        for more in self._rows.map(terms):
            total += more
        return total
