"""The two adversaries of Hierarchically Robust Representation Learning (Qian, Hu and Li, CVPR 2020).

`perturb` is the example level (Theorem 2): an image moves by tau along its normalised input gradient.
`ConceptAdversary` is the concept level (Eqs. 4 to 6): a distribution q over concepts climbs the weighted loss.
Algorithm 1 joins them: with x~ = perturb(x), the model descends mean(weights * loss(x~)) (Eq. 5), and the same
losses then move q (Eq. 6).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["ConceptAdversary", "DivergedError", "perturb", "project_simplex"]


class DivergedError(ValueError):
    """The losses are no longer finite."""


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
    # Shifting by a constant leaves the projection unchanged and keeps the sums exact for large v.
    values = v.double() - v.double().max()
    descending, _ = torch.sort(values, descending=True)
    excess = torch.cumsum(descending, 0) - 1
    ranks = torch.arange(1, v.numel() + 1, device=v.device, dtype=torch.float64)
    rho = int((descending - excess / ranks > 0).sum())
    theta = excess[rho - 1] / rho
    return (values - theta).clamp_min(0).to(v.dtype)


@contextmanager
def _batch_statistics_only(model: nn.Module) -> Iterator[None]:
    """BatchNorm uses the batch's statistics as in training and leaves its running ones alone."""
    layers = [
        module
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training and module.track_running_stats
    ]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True


def perturb(model: nn.Module, images: Tensor, labels: Tensor, tau: float) -> Tensor:
    """The augmentation of Theorem 2: x~ = x + tau * grad / ||grad||, per image; x~ = x where the gradient is 0.

    The inner pass computes the input's gradient alone: parameters get no gradient, and BatchNorm's running
    statistics stay as they are. Under data parallelism pass the wrapped module (`ddp.module`).

    Args:
        model: maps images to logits (m, C); used in the mode that it is in.
        images: (m, 3, H, W) float, in the network's normalised input space.
        labels: (m,) int64.
        tau: L2 length of the step, in the same space.

    Returns:
        (m, 3, H, W), detached, of the dtype of `images`.

    Source: Theorem 2 and Algorithm 1, line 9. The step is not clipped to valid pixels: the paper does not.
    """
    if tau == 0:
        return images.detach()
    x = images.detach().requires_grad_()
    with torch.enable_grad(), _batch_statistics_only(model):
        # The sum, not the mean: a mean divides each image's gradient by m, and fp16 then underflows.
        loss = functional.cross_entropy(model(x).float(), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, x)
    gradient = gradient.float()
    norm = gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    z = torch.where(norm > 0, gradient / norm, torch.zeros_like(gradient))
    return (images.detach() + tau * z).to(images.dtype)


class ConceptAdversary:
    """The adversarial distribution q over K concepts and its ascent (Eqs. 4 to 6 and Algorithm 1).

    Args:
        counts: (K,) N_k, the training examples of each concept, all positive.
        lam: lambda of Eq. 4, positive and finite; a smaller one lets q go further from the reference.
        warmup_steps: s of Algorithm 1; for the first s steps the step size is 1 / (c lambda t).
        c: the divisor during those steps, at least 1.
        reference: (K,) q0, on the simplex; N_k / N by default.

    Attributes:
        q: (K,) float64, the current distribution.
        reference: (K,) float64, q0.
        step: how many updates were made.

    q, its gradient and the projection are float64: in float32 (N / N_k)(N_k / N) is not 1 for a quarter of counts.
    """

    def __init__(
        self,
        counts: Tensor,
        lam: float,
        warmup_steps: int = 1000,
        c: float = 10.0,
        reference: Tensor | None = None,
    ) -> None:
        counts = torch.as_tensor(counts).double()
        if counts.ndim != 1 or counts.numel() == 0 or not bool((counts > 0).all()):
            raise ValueError("counts must be 1-D and positive: drop concepts without examples first")
        if not 0 < lam < float("inf"):
            raise ValueError(f"lam must be positive and finite; got {lam}")
        if warmup_steps < 0 or c < 1:
            raise ValueError(f"warmup_steps must be >= 0 and c >= 1; got {warmup_steps} and {c}")
        self.lam, self.warmup_steps, self.c = float(lam), int(warmup_steps), float(c)
        self._n_over_nk = counts.sum() / counts
        if reference is None:
            self.reference = counts / counts.sum()
        else:
            self.reference = torch.as_tensor(reference).double()
            if self.reference.shape != counts.shape or not bool((self.reference >= 0).all()):
                raise ValueError(f"reference must be {tuple(counts.shape)} and non-negative")
            if abs(float(self.reference.sum()) - 1) > 1e-6:
                raise ValueError(f"reference must sum to 1; got {float(self.reference.sum())}")
        self.q = self.reference.clone()
        self.step = 0

    def weights(self, concepts: Tensor) -> Tensor:
        """(N / N_k) q_k for each example: (m,) int64 concepts to (m,) float32 weights (Eq. 5)."""
        self._move_to(concepts.device)
        return self.concept_weights().float()[concepts]

    def concept_weights(self) -> Tensor:
        """(K,) float64: (N / N_k) q_k, what an example of each concept weighs now; 1 for all at q = N_k / N."""
        return self._n_over_nk * self.q

    def update(self, losses: Tensor, concepts: Tensor) -> None:
        """One step of Eq. 6 from this batch's losses.

        Args:
            losses: (m,) the unweighted losses at x~.
            concepts: (m,) int64.

        Raises:
            DivergedError: a loss is not finite.
        """
        self._move_to(losses.device)
        losses = losses.detach().double()
        if not bool(torch.isfinite(losses).all()):
            raise DivergedError("a loss is not finite")
        t = self.step + 1
        rate = 1 / (self.lam * t * (self.c if t <= self.warmup_steps else 1.0))
        # A product, not index_add_: that sums in no fixed order on a GPU.
        sums = functional.one_hot(concepts, len(self.q)).double().T @ losses
        gradient = self._n_over_nk * sums / losses.numel() - self.lam * (self.q - self.reference)
        self.q = project_simplex(self.q + rate * gradient)
        self.step = t

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on from here."""
        return {"q": self.q.cpu().clone(), "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a saved state.

        Raises:
            ValueError: the state is of another number of concepts.
        """
        if state["q"].shape != self.q.shape:
            raise ValueError(f"the state has {state['q'].numel()} concepts, this adversary {self.q.numel()}")
        self.q = state["q"].double().to(self.q.device)
        self.step = int(state["step"])

    def _move_to(self, device: torch.device) -> None:
        if self.q.device != device:
            self.q, self.reference = self.q.to(device), self.reference.to(device)
            self._n_over_nk = self._n_over_nk.to(device)
