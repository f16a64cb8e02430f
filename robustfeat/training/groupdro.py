"""GroupDRO, to compare HRRL's concept level with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from robustfeat.errors import DivergedError
from robustfeat.training.hrrl import concept_totals

__all__ = ["GroupAdversary"]


class GroupAdversary:
    """The group distribution of GroupDRO, by exponentiated gradient.

    q_k <- q_k exp(eta L_k), normalised, with L_k the mean loss of group k in the batch (0 where the batch has none);
    the model then descends sum_k q_k L_k. Neither the entropy geometry nor the means within the batch are Eq. 6's,
    and nothing pulls q back.

    Args:
        size: K.
        rate: eta.

    Source: Sagawa, Koh, Hashimoto and Liang, ICLR 2020, Algorithm 1.
    """

    def __init__(self, size: int, rate: float = 0.01) -> None:
        self.q = torch.full((size,), 1 / size, dtype=torch.float64)
        self.rate = rate

    def weigh(self, losses: Tensor, concepts: Tensor) -> Tensor:
        """Moves q by this batch, and then weighs the batch's examples.

        Args:
            losses: (m,) of this rank.
            concepts: (m,) int64.

        Returns:
            (m,) float32 weights whose products with the losses have sum_k q_k L_k as their mean over all ranks.

        Raises:
            DivergedError: a loss is not finite (on a GPU the weights become NaN instead).
        """
        self.q = self.q.to(losses.device)
        sums, counts, _ = concept_totals(losses, concepts, len(self.q))
        if losses.device.type == "cpu" and not bool(torch.isfinite(sums).all()):
            raise DivergedError("a loss is not finite")
        means = sums / counts.clamp_min(1)
        self.q = torch.softmax(self.q.log() + self.rate * means, 0)
        return (self.q * counts.sum() / counts.clamp_min(1)).float()[concepts]

    def state_dict(self) -> dict[str, Any]:
        """The state for `load_state_dict`."""
        return {"q": self.q.cpu().clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resumes from a saved state."""
        self.q = state["q"].to(self.q.device)
