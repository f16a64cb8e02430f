"""Inverses of Hessians, by which conjugate gradients need few passes over the rows."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustfeat.serving.heads.kinds import Array
from robustfeat.serving.heads.solver.rows import ScaledRows

__all__ = ["Preconditioner"]

_PASS, _INVERSION = 12.0, 2.7
"""Costs in operations: of a pass for each value and output (four, each three times as slow as in a product of large
matrices), and of an inversion for r^3."""

_LARGEST = 2**26
"""Values that the outputs' preconditioners may have together; beyond it they share one."""


class Preconditioner:
    """Inverses of earlier Hessians: one for all outputs at first, and then one for each that is worth it.

    A new one costs a pass over the rows whose losses bend differently than before, and an inversion. An output gets one
    when the passes that conjugate gradients have spent on it since the last one have cost as much, so that both
    together are at most twice the cheaper one.
    """

    def __init__(self, rows: ScaledRows, shrunk: Array, outputs: int) -> None:
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
