"""How far an adversary's distribution q may go from its reference q0: three divergences D, and an ascent for each.

An adversary maximises sum_k q_k L_k - lambda D(q || q0) over the simplex. It knows L from batches, so it climbs: a step
adds eta (L - lambda D'(q)) to D'(q), the gradient of D, and takes the distribution that has this gradient, up to what
the simplex asks for (mirror ascent with D itself as the mirror map: Nemirovski and Yudin, 1983; Beck and Teboulle,
2003). With L2 this is Eq. 6, projected gradient ascent. At eta = 1 / (lambda t), the D'(q) of KL is the mean of the L
of all steps over lambda, as is that of the others while no q_k is 0.

| name | D | the q that maximises | whose |
|---|---|---|---|
| `l2` | sum (q_k - q0_k)^2 / 2 | max(0, q0_k + (L_k - nu) / lambda) | the paper's, Eqs. 4 and 6 |
| `chi2` | sum (q_k - q0_k)^2 / (2 q0_k) | q0_k max(0, 1 + (L_k - nu) / lambda) | Namkoong and Duchi, NeurIPS 2016 |
| `kl` | sum q_k log(q_k / q0_k) | q0_k exp(L_k / lambda), normalised | Hu and Hong, 2013 |

nu makes the sum 1.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

__all__ = ["DIVERGENCES", "Divergence", "project_simplex"]


class Divergence(Protocol):
    """A divergence D from a reference; all tensors are (K,) float64, and on a GPU nothing waits for their numbers."""

    def gradient(self, q: Tensor, reference: Tensor) -> Tensor:
        """D'(q), up to a constant; 0 at the reference."""

    def ascend(self, q: Tensor, reference: Tensor, step: Tensor) -> Tensor:
        """The p on the simplex that maximises p (step + D'(q)) - D(p); from the reference, the maximum itself."""


class _SquaredL2:
    def gradient(self, q: Tensor, reference: Tensor) -> Tensor:
        return q - reference

    def ascend(self, q: Tensor, reference: Tensor, step: Tensor) -> Tensor:
        return _project(q + step)


class _ChiSquare:
    def gradient(self, q: Tensor, reference: Tensor) -> Tensor:
        return _over(q - reference, reference)

    def ascend(self, q: Tensor, reference: Tensor, step: Tensor) -> Tensor:
        """p_k = reference_k max(0, r_k - nu), with r = q / reference + step."""
        ratios = torch.where(reference > 0, _over(q, reference) + step, -torch.inf)
        ratios = ratios - ratios.max()  # the answer is the same, and sums stay exact for large steps
        descending, order = torch.sort(ratios, descending=True)
        shares = reference[order]
        products = torch.where(shares > 0, shares * descending, 0.0)
        thresholds = (products.cumsum(0) - 1) / shares.cumsum(0)
        last = (descending > thresholds).sum().clamp_min(1) - 1
        nu = thresholds.gather(0, last.view(1))
        return reference * (ratios - nu).clamp_min(0)


class _KullbackLeibler:
    def gradient(self, q: Tensor, reference: Tensor) -> Tensor:
        return torch.where(reference > 0, _log(q) - _log(reference), 0.0)

    def ascend(self, q: Tensor, reference: Tensor, step: Tensor) -> Tensor:
        return torch.softmax(torch.where(reference > 0, _log(q) + step, -torch.inf), 0)


def _over(values: Tensor, reference: Tensor) -> Tensor:
    """(K,) quotients, and 0 where a reference of 0 keeps q at 0."""
    return torch.where(reference > 0, values / reference.clamp_min(_LEAST), 0.0)


def _log(shares: Tensor) -> Tensor:
    return shares.clamp_min(_LEAST).log()


_LEAST = 1e-300
"""A share that underflowed would have no way back: its logarithm is -inf."""

DIVERGENCES: dict[str, Divergence] = {"l2": _SquaredL2(), "kl": _KullbackLeibler(), "chi2": _ChiSquare()}
"""Divergences by their names in recipes."""


def project_simplex(v: Tensor) -> Tensor:
    """Euclidean projection of `v` onto the probability simplex.

    Args:
        v: (K,) float, finite.

    Returns:
        (K,) of the same dtype: non-negative, summing to 1.

    Raises:
        ValueError: `v` is not 1-D, is empty or is not finite.

    Source: Duchi et al., ICML 2008, sort-based, O(K log K); Eq. 6 of HRRL.

    >>> project_simplex(torch.tensor([2.0, 0.0, -1.0]))
    tensor([1., 0., 0.])
    """
    if v.ndim != 1 or v.numel() == 0:
        raise ValueError(f"v must be 1-D and not empty; got shape {tuple(v.shape)}")
    if not bool(torch.isfinite(v).all()):
        raise ValueError("v must be finite; got NaN or infinity")
    return _project(v.double()).to(v.dtype)


def _project(values: Tensor) -> Tensor:
    """(K,) float64 to its projection, without a look at the numbers: on a GPU nothing waits for them."""
    # Shifting by a constant leaves the projection unchanged and keeps the sums exact for large values.
    values = values - values.max()
    descending, _ = torch.sort(values, descending=True)
    excess = torch.cumsum(descending, 0) - 1
    ranks = torch.arange(1, values.numel() + 1, device=values.device, dtype=torch.float64)
    rho = (descending - excess / ranks > 0).sum().clamp_min(1)
    theta = excess.gather(0, (rho - 1).view(1)) / rho
    return (values - theta).clamp_min(0)
