"""How much the losses of a step weigh: by the examples of a batch (Eq. 2), and by concepts (Eqs. 3 to 6).

The base classes are levels that are switched off.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, distributed
from torch.nn import functional

from robustfeat.training.concepts import ConceptMap
from robustfeat.training.divergences import DIVERGENCES
from robustfeat.training.groupdro import GroupAdversary
from robustfeat.training.hrrl import ConceptAdversary
from robustfeat.training.loop.distributed import gather_tensors
from robustfeat.training.recipe import Recipe
from robustfeat.training.step_batch import StepBatch

__all__ = ["Adversary", "ConceptLevel", "Weighting", "create_concept_level", "create_example_weighting"]


class Weighting:
    """Weighs all losses equally."""

    def weigh(self, losses: Tensor, batch: StepBatch) -> Tensor:
        """(m,) losses, with their graph, to (m,) weighted ones; learns from them for the next step."""
        return losses


class _ExampleDistribution(Weighting):
    """Eq. 2 on the batch: weights m p_i, with the p that maximises sum_i p_i l_i - lam D(p || 1 / m).

    m are the examples of all ranks, and each rank weighs its own.

    Args:
        lam: lambda of this level.
        divergence: D; see `divergences`.
        batch_size: most examples of all ranks.
    """

    def __init__(self, lam: float, divergence: str, batch_size: int) -> None:
        self._lam, self._divergence, self._batch_size = lam, DIVERGENCES[divergence], batch_size

    def weigh(self, losses: Tensor, batch: StepBatch) -> Tensor:
        missing = rank = 0
        if distributed.is_initialized():
            missing, rank = self._batch_size // distributed.get_world_size() - len(losses), distributed.get_rank()
        # Bad images make the ranks' parts unequal: -inf in the place of a missing loss gets no weight.
        all_losses = gather_tensors(functional.pad(losses.detach().double(), (0, missing), value=-torch.inf))
        uniform = torch.where(all_losses > -torch.inf, 1 / batch.total, 0.0).flatten()
        shares = self._divergence.ascend(uniform, uniform, all_losses.flatten() / self._lam)
        return (batch.total * shares).view_as(all_losses)[rank, : len(losses)].float() * losses


def create_example_weighting(recipe: Recipe) -> Weighting:
    """Weighs the examples of a batch by their losses."""
    if not recipe.p_lam:
        return Weighting()
    return _ExampleDistribution(recipe.p_lam, recipe.p_divergence, recipe.batch_size)


class Adversary(Protocol):
    """A distribution over concepts that learns from the losses.

    Attributes:
        q: (K,) float64.
    """

    q: Tensor

    def weigh(self, losses: Tensor, concepts: Tensor) -> Tensor:
        """(m,) float32 weights for the (m,) losses of this step, of examples of these (m,) concepts; q learns."""

    def state_dict(self) -> dict[str, Any]:
        """The state for `load_state_dict`."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resumes from a saved state."""


class ConceptLevel(Weighting):
    """The concept level, switched off.

    Attributes:
        adversary: what the level learns with, if it learns.
    """

    adversary: Adversary | None = None

    def metrics(self) -> dict[str, Any]:
        """Numbers for the log."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resumes from a checkpoint."""


class _ClassWeights(ConceptLevel):
    """N / (C N_y): each class weighs the same, whatever its loss."""

    def __init__(self, concepts: ConceptMap) -> None:
        counts = torch.from_numpy(concepts.class_counts).double()
        self._weights = (counts.sum() / (counts > 0).sum() / counts.clamp_min(1)).float()

    def weigh(self, losses: Tensor, batch: StepBatch) -> Tensor:
        self._weights = self._weights.to(losses.device)
        return self._weights[batch.labels] * losses


class _AdversaryLevel(ConceptLevel):
    """Weights that an adversary chooses."""

    def __init__(self, adversary: Adversary, concepts: ConceptMap) -> None:
        self.adversary: Adversary = adversary
        self._names = concepts.names
        self._counts = torch.from_numpy(concepts.counts).double()

    def weigh(self, losses: Tensor, batch: StepBatch) -> Tensor:
        return self.adversary.weigh(losses, batch.concepts) * losses

    def metrics(self) -> dict[str, Any]:
        """q, the range of the weights (N / N_k) q_k, the concepts at its ends, and the weights' signal and noise."""
        q = self.adversary.q.cpu()
        weights = self._counts.sum() / self._counts * q
        lightest, heaviest = int(weights.argmin()), int(weights.argmax())
        told: dict[str, Any] = {}
        if isinstance(self.adversary, ConceptAdversary):
            signal, noise = self.adversary.weight_noise()
            told = {"weight_signal": round(float(signal), 6), "weight_noise": round(float(noise), 6)}
        return {
            "q": [round(value, 6) for value in q.tolist()],
            "weight_min": round(float(weights[lightest]), 6),
            "weight_max": round(float(weights[heaviest]), 6),
            "lightest": self._names[lightest],
            "heaviest": self._names[heaviest],
            **told,
        }

    def state_dict(self) -> dict[str, Any]:
        return {"adversary": self.adversary.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.adversary.load_state_dict(state["adversary"])


def create_concept_level(weighting: str | None, recipe: Recipe, concepts: ConceptMap, replays: int = 1) -> ConceptLevel:
    """The concept level by its weighting: see `methods.Method`; `replays` are the steps in a row of one batch."""
    if weighting is None:
        return ConceptLevel()
    if weighting == "classes":
        return _ClassWeights(concepts)
    if weighting == "groups":
        return _AdversaryLevel(GroupAdversary(len(concepts.counts)), concepts)
    reference = recipe.reference
    adversary = ConceptAdversary(
        torch.from_numpy(concepts.counts).double(),
        recipe.lam,
        recipe.q_warmup_steps,
        recipe.q_warmup_divisor,
        None if reference is None else torch.from_numpy(concepts.distribution(reference)),
        divergence=recipe.q_divergence,
        baseline=recipe.q_baseline,
        pass_steps=max(1, int(concepts.counts.sum()) // recipe.batch_size) * replays,
        repeats=replays,
    )
    return _AdversaryLevel(adversary, concepts)
