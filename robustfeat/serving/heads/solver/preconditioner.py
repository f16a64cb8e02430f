"""Keeps inverses of Hessians, with which conjugate gradients need few passes over the rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustfeat.serving.heads.kinds import Array
from robustfeat.serving.heads.solver.rows import ScaledRows

__all__ = ["Preconditioner"]

_PASS, _INVERSION = 12.0, 2.7
"""Costs in operations: of a pass per value and output (four, each three times as slow as in a product of large
matrices), and of an inversion per r^3."""

_LARGEST = 2**26
"""Most values of separate preconditioners. Above it, the outputs share one."""

_AT_ONCE = 2**22
"""Values of the products that one pass over the rows sums."""


class Preconditioner:
    """Inverses of earlier Hessians: at first one for all outputs, later one for each output that is worth it.

    A new inverse costs a pass over the rows whose curvature changed, and an inversion. An output gets one when the
    passes since its last one have cost as much. So the total is at most twice the cheaper alternative.
    """

    def __init__(self, rows: ScaledRows, shrunk: Array, outputs: int) -> None:
        self._rows, self._outputs, self._c = rows, outputs, 0.0
        self._shrunk = np.maximum(shrunk, 1e-9)
        self._shared = True
        self._products: Array | None = None  # X^T B X, (1, r, r) while shared, then (K, r, r)
        self._inverses: Array | None = None  # inverses of the Hessians with these products
        self._counted = np.empty((0, 0), np.float32)  # B in the products, (m, K)
        self._level = 0.0  # initial value of B, when all rows have the same curvature
        self._spent = np.zeros(outputs)

    def set_c(self, c: float) -> None:
        """Changes C. The products stay valid, since the losses have the same curvatures."""
        if c != self._c:
            self._c, self._inverses = c, None

    def count(self, active: NDArray[np.int64], passes: NDArray[np.int64]) -> None:
        """Adds the passes that outputs needed, (n,), or (1,) for joint ones."""
        self._spent[active] += passes

    def __call__(self, active: NDArray[np.int64], vectors: Array) -> Array:
        """Applies the inverses to (n, r) of these outputs."""
        if self._inverses is None:
            assert self._products is not None
            self._invert(np.arange(len(self._products)))
        inverses = self._inverses
        assert inverses is not None
        if self._shared:
            product: Array = vectors @ inverses[0]
        else:
            product = np.empty_like(vectors)

            def multiply(place: int) -> None:
                product[place] = inverses[active[place]] @ vectors[place]

            self._rows.each(multiply, range(len(active)))
        return product

    def renew_where_worthwhile(self, active: NDArray[np.int64], curvature: NDArray[np.float32]) -> None:
        """Updates products: all at first, then where passes have cost enough; curvatures are (m, n)."""
        size, count = self._rows.size, self._rows.count
        if self._products is None:  # at zero weights, all rows have the same curvature
            self._level = float(curvature.mean())
            self._products = self._product(np.full((count, 1), self._level))
        if self._outputs * size**2 > _LARGEST:
            return
        least = _INVERSION * size**3
        outdated = []
        for output, bends in zip(active, curvature.T, strict=True):
            spent = self._spent[output] * _PASS * count * size
            if spent < least:
                continue
            if self._shared:
                self._part()
            rows = min(np.count_nonzero(bends != self._counted[:, output]), np.count_nonzero(bends))
            if spent > least + rows * float(size) ** 2:
                outdated.append((output, bends))
        at_once = max(1, _AT_ONCE // size**2)
        for start in range(0, len(outdated), at_once):
            self._renew(outdated[start : start + at_once])

    def _part(self) -> None:
        """Splits the shared product into one per output."""
        assert self._products is not None
        self._shared = False
        self._products = np.repeat(self._products, self._outputs, 0)
        self._counted = np.full((self._rows.count, self._outputs), self._level, np.float32)
        if self._inverses is not None:
            self._inverses = np.repeat(self._inverses, self._outputs, 0)

    def _renew(self, outdated: Sequence[tuple[np.int64, NDArray[np.float32]]]) -> None:
        """Updates a product by the rows whose curvature changed, or from all rows if that is cheaper."""
        assert self._products is not None
        outputs, changes = np.array([output for output, _ in outdated]), []
        for output, bends in outdated:
            change = bends - self._counted[:, output]
            if np.count_nonzero(bends) < np.count_nonzero(change):
                change, self._products[output] = bends, 0
            changes.append(change)
            self._counted[:, output] = bends
        self._products[outputs] += self._product(np.stack(changes, 1))
        self._spent[outputs] = 0
        if self._inverses is not None:
            self._invert(outputs)

    def _invert(self, outputs: NDArray[np.int64]) -> None:
        assert self._products is not None
        if self._inverses is None:
            self._inverses = np.empty_like(self._products)
        products, inverses, at = self._products, self._inverses, np.arange(self._rows.size)

        def invert(output: int) -> None:
            hessian = self._c * products[output]
            hessian[at, at] += self._shrunk
            inverses[output] = _inverse(hessian)

        self._rows.each(invert, outputs.tolist())

    def _product(self, bends: NDArray[np.floating[Any]]) -> Array:
        """X^T B X, (n, r, r), for n diagonals B, (m, n), which may be negative."""
        shape = (bends.shape[1], self._rows.size, self._rows.size)

        def terms(part: slice, x: Array) -> tuple[Array]:
            total: Array = np.zeros(shape)
            for at, diagonal in enumerate(bends[part].T):
                for sign in (1, -1):
                    used = np.flatnonzero(sign * diagonal > 0)
                    if len(used):
                        scaled = x[used] * np.sqrt(np.abs(diagonal[used]), dtype=np.float64)[:, None]
                        total[at] += sign * (scaled.T @ scaled)
            return (total,)

        (products,) = self._rows.sum(terms, large=True)
        return products


def _inverse(matrix: Array) -> Array:
    """Inverts a symmetric positive definite (r, r) by halves and their Schur complement.

    This takes half the operations of `np.linalg.inv`, mostly in products of large matrices.
    """
    size = len(matrix)
    if size <= 64:
        return np.asarray(np.linalg.inv(matrix), np.float64)
    half = size // 2
    top, across = _inverse(matrix[:half, :half]), matrix[:half, half:]
    moved = top @ across
    rest = matrix[half:, half:] - across.T @ moved
    bottom = _inverse(0.5 * (rest + rest.T))  # rounding errors of asymmetry would grow
    corner = moved @ bottom
    inverse: Array = np.block([[top + corner @ moved.T, -corner], [-corner.T, bottom]])
    return inverse
