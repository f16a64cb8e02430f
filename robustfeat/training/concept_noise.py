"""How far the sampling of batches alone moves q: an estimate beside `ConceptAdversary`, which it does not touch.

docs/concept-noise.md derives it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["ConceptNoise"]


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
        repeats: how many steps in a row use one batch; `pass_steps` counts each of them.
    """

    def __init__(
        self,
        lam: float,
        n_over_nk: Tensor,
        tangent: Tensor | None = None,
        pass_steps: int | None = None,
        repeats: int = 1,
    ) -> None:
        self._lam, self._n_over_nk = lam, n_over_nk
        self._scale = torch.ones_like(n_over_nk) if tangent is None else tangent
        self._shares = self._scale / self._scale.sum()  # of the mean that is taken off
        self._pass_steps, self._repeats = pass_steps, repeats
        self._steps = 0
        # Of lambda D'(q), over independent batches: all of it, and the part from differences between losses.
        self._variances = n_over_nk.new_zeros(2, len(n_over_nk))
        # Of the weights: the sum of squares, the sum in this pass, and what complete passes take off the first.
        self._weights = n_over_nk.new_zeros(3)

    def learn(self, sums: Tensor, squares: Tensor, counts: Tensor, rho: float | Tensor) -> None:
        """Takes in one step.

        Args:
            sums, squares: (K,) float64 of the batch's losses, less the baseline, and of their squares.
            counts: (K,) float64, its examples.
            rho: lambda eta.
        """
        mean = sums.sum() / counts.sum()
        parts = [
            self._variance(sums, squares, counts.sum()),
            self._variance(sums - mean * counts, squares - 2 * mean * sums + mean.square() * counts, counts.sum()),
        ]
        self._variances = (1 - rho) ** 2 * self._variances + rho**2 * self._repeats * torch.stack(parts)
        squared, in_pass, off = self._weights.unbind()
        squared, in_pass, off = (1 - rho) ** 2 * squared + rho**2, (1 - rho) * in_pass + rho, (1 - rho) ** 2 * off
        self._steps += 1
        if self._pass_steps and self._steps % self._pass_steps == 0:
            off, in_pass = off + in_pass.square() / self._pass_steps, torch.zeros_like(in_pass)
        self._weights = torch.stack([squared, in_pass, off])

    def _variance(self, sums: Tensor, squares: Tensor, total: Tensor) -> Tensor:
        """(K,): of one batch's gradient less its mean by `_shares`, estimated from that batch.

        It is the diagonal of P S P', with S the covariance of the mean of m draws and P what takes the mean off.
        """
        own, means = self._n_over_nk.square() * squares / total, self._n_over_nk * sums / total
        shares = self._shares
        spread = own - 2 * shares * own + (shares.square() * own).sum() - (means - (shares * means).sum()).square()
        return spread.clamp_min(0) / (total - 1).clamp_min(1)

    def deviations(self) -> Tensor:
        """(K,) float64: the standard deviation of each share q_k; 0 before the first step."""
        squared, in_pass, off = self._weights.unbind()
        if self._pass_steps:
            off = off + in_pass.square() / self._pass_steps
        left = (1 - off / squared.clamp_min(1e-300)).clamp_min(0)
        whole, differences = self._variances.unbind()
        return self._scale * (differences + left * (whole - differences)).clamp_min(0).sqrt() / self._lam

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to resume."""
        return {
            "steps": self._steps,
            "variances": self._variances.cpu().clone(),
            "weights": self._weights.cpu().clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resumes from a saved state."""
        device = self._variances.device
        self._steps = int(state["steps"])
        self._variances, self._weights = state["variances"].to(device), state["weights"].to(device)

    def move_to(self, device: torch.device) -> None:
        """Moves all tensors to this device."""
        self._n_over_nk, self._variances = self._n_over_nk.to(device), self._variances.to(device)
        self._weights = self._weights.to(device)
        self._scale, self._shares = self._scale.to(device), self._shares.to(device)
