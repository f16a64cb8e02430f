"""What training minimises: one small class with two hooks, and the paper's four methods as instances of it.

To try an idea of your own, subclass `Objective`, override a hook and pass `--method package.module:Class`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from robustfeat.errors import InputError
from robustfeat.training.hrrl import ConceptAdversary, perturb
from robustfeat.training.recipe import Recipe

__all__ = ["METHODS", "Objective", "create_objective"]

TAU_REFERENCE_PX = 224
"""Recipes give tau at this image side; keeping tau / side constant keeps the change per pixel the same."""


class Objective:
    """HRRL's objective (Eq. 4) and, with a level switched off, its relatives.

    The trainer calls `training_images`, runs the model on what it returns, computes one loss per image and calls
    `training_loss` on them; it descends the gradient of what that returns.

    Args:
        recipe: where tau, lambda, s and c come from.
        counts: (K,) training examples of each concept.
        examples: perturb the images (example level).
        concepts: weigh the losses by the concept adversary (concept level).
    """

    def __init__(self, recipe: Recipe, counts: Tensor, *, examples: bool = True, concepts: bool = True) -> None:
        self.tau_at_224px = recipe.tau if examples else 0.0
        self.tau_ramp_epochs = recipe.tau_ramp_epochs
        self.adversary = (
            ConceptAdversary(counts, recipe.lam, recipe.q_warmup_steps, recipe.q_warmup_divisor) if concepts else None
        )

    def tau(self, side_px: int, epoch: float) -> float:
        """The length added at this image side, `epoch` (a fraction counts) epochs into training."""
        ramp = min(1.0, epoch / self.tau_ramp_epochs) if self.tau_ramp_epochs else 1.0
        return self.tau_at_224px * side_px / TAU_REFERENCE_PX * ramp

    def training_images(self, model: nn.Module, images: Tensor, labels: Tensor, epoch: float) -> Tensor:
        """First hook: the images to train on.

        Args:
            images: (m, 3, S, S) float, in the network's normalised input space.
            labels: (m,) int64.
            epoch: epochs done so far, as a fraction.

        Returns:
            (m, 3, S, S), detached.
        """
        return perturb(model, images, labels, self.tau(images.shape[-1], epoch))

    def training_loss(self, losses: Tensor, concepts: Tensor) -> Tensor:
        """Second hook: weighs the losses of this step and learns from them for the next.

        Args:
            losses: (m,) float32, with their graph.
            concepts: (m,) int64, each example's concept.

        Returns:
            The scalar to descend.
        """
        if self.adversary is None:
            return losses.mean()
        # Algorithm 1: the model's step uses q_t; the same losses then give q_{t+1}.
        weighted = (self.adversary.weights(concepts) * losses).mean()
        self.adversary.update(losses, concepts)
        return weighted

    def metrics(self) -> dict[str, Any]:
        """Numbers for the log: q and the range of the weights (N / N_k) q_k."""
        if self.adversary is None:
            return {}
        weights = self.adversary.concept_weights()
        return {
            "q": [round(value, 6) for value in self.adversary.q.tolist()],
            "weight_min": round(float(weights.min()), 6),
            "weight_max": round(float(weights.max()), 6),
        }

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {} if self.adversary is None else {"adversary": self.adversary.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a checkpoint."""
        if self.adversary is not None:
            self.adversary.load_state_dict(state["adversary"])


METHODS: dict[str, Callable[[Recipe, Tensor], Objective]] = {
    "erm": partial(Objective, examples=False, concepts=False),
    "el": partial(Objective, examples=True, concepts=False),
    "cl": partial(Objective, examples=False, concepts=True),
    "hrrl": Objective,
}


def create_objective(recipe: Recipe, counts: Tensor) -> Objective:
    """The objective that `recipe.method` names: one of `METHODS`, or `package.module:Class`.

    A class of one's own is called with (recipe, counts) and offers what `Objective` offers.

    Raises:
        InputError: there is no such method, or the class cannot be imported.
    """
    name = recipe.method
    if name in METHODS:
        return METHODS[name](recipe, counts)
    module_name, colon, class_name = name.partition(":")
    if not colon:
        raise InputError(f"--method {name}: expected {', '.join(METHODS)} or package.module:Class")
    try:
        factory = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError) as exc:
        raise InputError(f"--method {name}: cannot be imported ({exc}); is its folder on PYTHONPATH?") from exc
    objective: Objective = factory(recipe, counts)
    missing = [
        hook
        for hook in ("training_images", "training_loss", "state_dict", "load_state_dict", "metrics")
        if not hasattr(objective, hook)
    ]
    if missing:
        raise InputError(
            f"--method {name}: lacks {', '.join(missing)}; subclass robustfeat.training.objective.Objective"
        )
    return objective
