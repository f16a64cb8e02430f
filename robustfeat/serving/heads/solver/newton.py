"""Minimises a linear head's objective for all classes at once by Newton's method.

The objective is 1/2 |w|^2 + C times the sum of a loss over rows. Squared hinge and logistic loss have one objective per
class (one against the rest), softmax has a joint one. The Hessian is I + C X^T B X, where B has the losses' second
derivatives: for the squared hinge, 2 on rows that violate the margin. Conjugate gradients solve a Newton step, for all
classes in the same passes over the rows, preconditioned by the inverse of an earlier Hessian. So a Hessian is computed
about once per C instead of once per step, and a step takes a few passes. With few rows, Hessians are small, and each
step computes and solves them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from robustfeat.serving.heads.kinds import Array
from robustfeat.serving.heads.solver.losses import Loss
from robustfeat.serving.heads.solver.preconditioner import Preconditioner
from robustfeat.serving.heads.solver.rows import ScaledRows

__all__ = ["Newton"]

_TOLERANCE = 1e-9
"""Relative tolerance of the objective: half the squared Newton decrement over the value."""

_FORCING = 0.05
"""Share of its residual at which a step counts as solved."""

_MAX_STEPS, _MAX_PASSES = 100, 100
_LARGEST_GRADIENT = 1e120  # its square is still finite


class Newton:
    """Minimises the objective for one C after another, each from the previous minimum.

    Args:
        rows: the features.
        loss: the loss of margins.
        shrunk: (r,), 1 for weights that are regularised, 0 for others.
        outputs: K.
        report: called with each pass's number.

    Attributes:
        passes: number of passes over the rows so far.
    """

    def __init__(
        self, rows: ScaledRows, loss: Loss, shrunk: Array, outputs: int, report: Callable[[int], None] | None = None
    ) -> None:
        self._rows, self._loss, self._shrunk, self._report = rows, loss, shrunk, report
        self._weights = np.zeros((outputs, rows.size))
        self._preconditioner = Preconditioner(rows, shrunk, outputs)
        self.passes = 0

    def forget(self) -> None:
        """Frees the preconditioner, which takes most of the memory. The next C makes a new one."""
        self._preconditioner = Preconditioner(self._rows, self._shrunk, len(self._weights))

    def minimise(self, c: float) -> tuple[Array, bool]:
        """Minimises the objective with this C. Returns the weights (K, r), and whether the minimum was reached.

        Raises:
            ValueError: the features are so large that the objective is infinite.
        """
        self._preconditioner.set_c(c)
        found, loss, active = self._weights.copy(), self._loss, np.arange(len(self._weights))
        point = self._evaluate(loss, found, c)
        for _ in range(_MAX_STEPS):
            if not (np.isfinite(point.value).all() and np.abs(point.gradient).max() < _LARGEST_GRADIENT):
                raise ValueError("they are too large: scale them")
            if self._rows.is_small and not loss.joint:
                step = self._solve_exactly(point, c)
            else:
                self._preconditioner.renew_where_worthwhile(active, point.curvature)
                step, passes = self._solve(loss, active, point, c)
                self._preconditioner.count(active, passes)
            slope = _dot(loss, point.gradient, step)
            going = -slope / 2 > _TOLERANCE * point.value
            if not going.any():
                active = active[:0]
                break
            if not going.all():  # for separate outputs, the finished ones are left out from here
                active, loss, step, slope = active[going], loss.only(going), step[going], slope[going]
                point = point.only(going)
            moved = self._move(loss, point, step, slope, c)
            if moved is None:
                break
            point = moved
            found[active] = point.weights
        if loss.joint:  # shift out the part that does not affect differences of margins
            found[:, self._shrunk == 0] -= found[:, self._shrunk == 0].mean(0)
        self._weights = found
        return found, not len(active)

    def _evaluate(self, loss: Loss, weights: Array, c: float) -> _Point:
        curvatures = np.empty((self._rows.count, len(weights)), np.float32)

        def terms(part: slice, x: Array) -> tuple[Array, Array]:
            with np.errstate(over="ignore", invalid="ignore"):  # the value shows an overflow
                value, slopes, curvatures[part] = loss(part, x @ weights.T)
                return value, slopes.T @ x

        value, gradient = self._sum(terms)
        own = _dot(loss, weights, self._shrunk * weights)
        return _Point(weights, 0.5 * own + c * value, self._shrunk * weights + c * gradient, curvatures)

    def _sum(self, terms: Callable[[slice, Array], tuple[Array, ...]]) -> list[Array]:
        self.passes += 1
        if self._report:
            self._report(self.passes)
        return self._rows.sum(terms)

    def _move(self, loss: Loss, point: _Point, step: Array, slope: Array, c: float) -> _Point | None:
        """Finds a point along the step by line search (Armijo's rule); None if there is none."""
        length = np.ones(len(slope))
        for _ in range(30):
            there = self._evaluate(loss, point.weights + length[:, None] * step, c)
            rounding = 1e-12 * np.abs(point.value)
            high = ~(there.value <= point.value + 1e-4 * length * slope + rounding)
            if not high.any():
                return there
            # Take the minimum of the parabola through both values and the slope at the start.
            with np.errstate(all="ignore"):
                lowest = -0.5 * slope * length**2 / (there.value - point.value - slope * length)
            length = np.where(high, np.clip(np.nan_to_num(lowest), 0.1 * length, 0.5 * length), length)
        return None

    def _solve_exactly(self, point: _Point, c: float) -> Array:
        """Solves for the Newton step (K, r) with the Hessians themselves."""

        def hessians(part: slice, x: Array) -> tuple[Array]:
            return (np.matmul(x.T * point.curvature[part].T[:, None, :], x),)

        (total,) = self._sum(hessians)
        total *= c
        at = np.arange(self._rows.size)
        total[:, at, at] += np.maximum(self._shrunk, 1e-9)
        return np.asarray(np.linalg.solve(total, -point.gradient[:, :, None])[:, :, 0], np.float64)

    def _solve(self, loss: Loss, active: NDArray[np.int64], point: _Point, c: float) -> tuple[Array, NDArray[np.int64]]:
        """Solves for the Newton step (K, r) by preconditioned conjugate gradients, and counts passes per output."""

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
            rate = _ratio(old, _dot(loss, direction, bent), going)[:, None]
            step = step + rate * direction
            residual = residual - rate * bent
            conditioned = condition(residual)
            new = np.where(going, _dot(loss, residual, conditioned), old)
            direction = conditioned + _ratio(new, old, old > 0)[:, None] * direction
            old = new
        return step, passes

    def _times_hessian(
        self, loss: Loss, direction: Array, curvature: NDArray[np.float32], c: float, going: NDArray[np.bool_]
    ) -> Array:
        """The Hessian's product, (K, r), zero for outputs that are not `going`."""
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
        value: (K,), or (1,) for joint outputs.
        gradient: (K, r).
        curvature: curvatures of the losses, (m, K).
    """

    weights: Array
    value: Array
    gradient: Array
    curvature: NDArray[np.float32]

    def only(self, chosen: NDArray[np.bool_]) -> _Point:
        """The point for some outputs."""
        return _Point(self.weights[chosen], self.value[chosen], self.gradient[chosen], self.curvature[:, chosen])


def _ratio(a: Array, b: Array, where: NDArray[np.bool_]) -> Array:
    """A / b, and 0 where b is 0."""
    return np.divide(a, b, out=np.zeros_like(a), where=where)


def _dot(loss: Loss, a: Array, b: Array) -> Array:
    """Products per output, (K,), or their sum (1,) for joint outputs."""
    product: Array = np.einsum("kr,kr->k", a, b)
    return product.sum(keepdims=True) if loss.joint else product
