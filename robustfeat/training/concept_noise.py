"""Estimates how far only the sampling of batches moves q, without affecting `ConceptAdversary`.

docs/concept-noise.md derives it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["ConceptNoise"]

_MOST_WAITING = 256

_Array = NDArray[np.float64]


class ConceptNoise:
    """The standard deviation of q over draws of the batches, estimated from the losses of one run.

    q - q0 is a weighted sum of the batches' gradients, since Eq. 6 with rate eta takes (1 - rho) of what was there
    and adds rho / lambda times the new one, where rho = lambda eta. Its variance is the sum of the squared weights
    times the variance of one batch's gradient. That has two parts. One comes from the concepts' uneven numbers in
    a batch and is as large as the mean loss; one comes from the differences between losses. The batches of a pass
    over the data, drawn without replacement, even out the first: with n batches and the weights w_t, the sum of
    w_t² becomes that less (the sum of w_t)² / n.

    All this is about D'(q), the gradient of the divergence, which the recursion is of. q is taken for a linear function
    of it: for L2 its projection onto the plane of sum 1, for the others their tangent at q0. So the estimate is too
    large where a share is 0.

    Args:
        lam: lambda of Eq. 4.
        n_over_nk: (K,) float64, N / N_k.
        tangent: (K,) float64 q0, for chi-square and KL: q_k moves by q0_k times D'(q)_k less its mean under q0. None,
            for L2: by D'(q)_k less its plain mean.
        pass_steps: n, the steps of one pass over the data; None: batches are drawn independently.
        repeats: number of consecutive steps per batch; `pass_steps` counts each of them.
    """

    def __init__(
        self,
        lam: float,
        n_over_nk: Tensor,
        tangent: Tensor | None = None,
        pass_steps: int | None = None,
        repeats: int = 1,
    ) -> None:
        self._lam, self._n_over_nk = lam, n_over_nk.cpu().numpy()
        self._scale = np.ones_like(self._n_over_nk) if tangent is None else tangent.cpu().numpy()
        self._shares = self._scale / self._scale.sum()  # weights of the mean that is subtracted
        self._pass_steps, self._repeats = pass_steps, repeats
        self._steps = 0
        # Of lambda D'(q), over independent batches: all of it, and the part from differences between losses.
        self._variances = np.zeros((2, len(self._n_over_nk)))
        # Of the weights: the sum of squares, the sum in this pass, and what complete passes take off the first.
        self._weights = np.zeros(3)
        self._waiting: list[tuple[Tensor, float | Tensor]] = []

    def learn(self, sums: Tensor, squares: Tensor, counts: Tensor, rho: float | Tensor) -> None:
        """Takes in one step.

        Args:
            sums, squares: (K,) float64 of the batch's losses, less the baseline, and of their squares.
            counts: (K,) float64, its examples.
            rho: lambda eta.
        """
        # The arithmetic is 60 kernels on K numbers, which a GPU would launch one by one: it waits for a reader.
        self._waiting.append((torch.stack([sums, squares, counts]), rho))
        if len(self._waiting) == _MOST_WAITING:
            self._take_in()

    def _take_in(self) -> None:
        """The steps that wait, one after the other: the numbers do not depend on when somebody reads them."""
        if not self._waiting:
            return
        totals = torch.stack([step for step, _ in self._waiting]).cpu().numpy()
        with np.errstate(over="ignore", invalid="ignore"):  # in a run that diverges, which others report
            for (sums, squares, counts), (_, rho) in zip(totals, self._waiting, strict=True):
                self._take_in_step(sums, squares, counts, float(rho))
        self._waiting = []

    def _take_in_step(self, sums: _Array, squares: _Array, counts: _Array, rho: float) -> None:
        total = counts.sum()
        mean = sums.sum() / total
        parts = [
            self._variance(sums, squares, total),
            self._variance(sums - mean * counts, squares - 2 * mean * sums + mean**2 * counts, total),
        ]
        self._variances = (1 - rho) ** 2 * self._variances + rho**2 * self._repeats * np.stack(parts)
        squared, in_pass, off = self._weights.tolist()
        squared, in_pass, off = (1 - rho) ** 2 * squared + rho**2, (1 - rho) * in_pass + rho, (1 - rho) ** 2 * off
        self._steps += 1
        if self._pass_steps and self._steps % self._pass_steps == 0:
            off, in_pass = off + in_pass**2 / self._pass_steps, 0.0
        self._weights = np.array([squared, in_pass, off])

    def _variance(self, sums: _Array, squares: _Array, total: float) -> _Array:
        """(K,): of one batch's gradient less its mean by `_shares`, estimated from that batch.

        It is the diagonal of P S P', with S the covariance of the mean of m draws and P what takes the mean off.
        """
        own, means = self._n_over_nk**2 * squares / total, self._n_over_nk * sums / total
        shares = self._shares
        spread = own - 2 * shares * own + (shares**2 * own).sum() - (means - (shares * means).sum()) ** 2
        variance: _Array = spread.clip(0) / max(total - 1, 1)
        return variance

    def deviations(self) -> Tensor:
        """(K,) float64 on the CPU: the standard deviation of each share q_k; 0 before the first step."""
        self._take_in()
        squared, in_pass, off = self._weights.tolist()
        if self._pass_steps:
            off = off + in_pass**2 / self._pass_steps
        left = max(1 - off / max(squared, 1e-300), 0.0)
        whole, differences = self._variances
        with np.errstate(over="ignore", invalid="ignore"):
            variances = (differences + left * (whole - differences)).clip(0)
        return torch.from_numpy(self._scale * np.sqrt(variances) / self._lam)

    def state_dict(self) -> dict[str, Any]:
        """The state for `load_state_dict`."""
        self._take_in()
        return {
            "steps": self._steps,
            "variances": torch.from_numpy(self._variances.copy()),
            "weights": torch.from_numpy(self._weights.copy()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resumes from a saved state."""
        self._waiting = []
        self._steps = int(state["steps"])
        self._variances, self._weights = state["variances"].numpy().copy(), state["weights"].numpy().copy()
