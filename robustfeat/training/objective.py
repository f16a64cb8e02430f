"""What training minimises: one small class with two hooks, and the methods as instances of it.

To try an idea of your own, subclass `Objective`, override a hook and pass `--method package.module:Class`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed, nn

from robustfeat.errors import InputError
from robustfeat.training.concepts import ConceptMap
from robustfeat.training.groupdro import GroupAdversary
from robustfeat.training.hrrl import ConceptAdversary, perturb, step_along
from robustfeat.training.recipe import Recipe

__all__ = ["METHODS", "Objective", "StepBatch", "create_objective"]

TAU_REFERENCE_PX = 224
"""Recipes give tau at this image side; keeping tau / side constant keeps the change per pixel the same."""


@dataclass(frozen=True)
class StepBatch:
    """What one step trains on; under data parallelism this rank's part.

    Attributes:
        images: (m, 3, S, S) float, in the network's normalised input space.
        labels: (m,) int64.
        concepts: (m,) int64, each example's concept.
        epoch: epochs done so far, as a fraction.
        replay: how often this batch was trained on just before (`Objective.replays`).
        total: the examples of all ranks together.
    """

    images: Tensor
    labels: Tensor
    concepts: Tensor
    epoch: float
    total: int
    replay: int = 0

    def mean(self, values: Tensor) -> Tensor:
        """The scalar to descend so that the step follows the mean of all ranks' `values`, (m,).

        The gradients of the ranks are averaged, also where a bad image made their parts unequal.
        """
        if not distributed.is_initialized():
            return values.mean()
        return values.sum() * (distributed.get_world_size() / self.total)


class Objective:
    """HRRL's objective (Eq. 4) and, with a level switched off or replaced, its relatives.

    The trainer calls `training_images`, runs the model on what it returns, computes one loss per image and calls
    `training_loss` on them; it descends the gradient of what that returns.

    Args:
        recipe: where tau, lambda, s, c and the like come from.
        concepts: each class's concept, and the training examples of each class.
        direction: of the example level: `gradient`, `random` (the control) or None (off).
        weighting: of the concept level: `adversary` (Eqs. 4 to 6), `groups` (GroupDRO), `classes` (each class
            weighs the same) or None (off).

    Attributes:
        replays: how many steps in a row are made with one batch.
    """

    def __init__(
        self,
        recipe: Recipe,
        concepts: ConceptMap,
        *,
        direction: str | None = "gradient",
        weighting: str | None = "adversary",
    ) -> None:
        self.direction = direction
        self.inner, self.inner_batch_norm = recipe.inner, recipe.inner_batch_norm
        self.replays = recipe.replays if direction == "gradient" and recipe.inner == "free" else 1
        self.tau_at_224px = recipe.tau if direction else 0.0
        self.tau_ramp_epochs = recipe.tau_ramp_epochs
        self.std = torch.tensor(recipe.preprocessing().std).view(1, 3, 1, 1) if recipe.tau_unit == "pixel" else None
        self._names = concepts.names
        self._counts = torch.from_numpy(concepts.counts).double()
        self._last_images: Tensor | None = None
        self.adversary: ConceptAdversary | GroupAdversary | None = None
        self._class_weights: Tensor | None = None
        if weighting == "adversary":
            self.adversary = ConceptAdversary(
                self._counts,
                recipe.lam,
                recipe.q_warmup_steps,
                recipe.q_warmup_divisor,
                None if recipe.reference is None else torch.from_numpy(concepts.distribution(recipe.reference)),
                steps=recipe.q_steps,
                baseline=recipe.q_baseline,
            )
        elif weighting == "groups":
            self.adversary = GroupAdversary(len(self._counts), recipe.group_rate)
        elif weighting == "classes":
            counts = torch.from_numpy(concepts.class_counts).double()
            self._class_weights = (counts.sum() / (counts > 0).sum() / counts.clamp_min(1)).float()

    def tau(self, side_px: int, epoch: float) -> float:
        """The length added at this image side, `epoch` (a fraction counts) epochs into training."""
        ramp = min(1.0, epoch / self.tau_ramp_epochs) if self.tau_ramp_epochs else 1.0
        return self.tau_at_224px * side_px / TAU_REFERENCE_PX * ramp

    def training_images(self, model: nn.Module, batch: StepBatch) -> Tensor:
        """First hook: the images to train on.

        Args:
            model: the network, for passes of the objective's own.
            batch: this step's.

        Returns:
            (m, 3, S, S), without a graph.
        """
        images, tau = batch.images, self.tau(batch.images.shape[-1], batch.epoch)
        if not self.direction or tau == 0:
            return images
        if self.inner == "free" and self.direction == "gradient":
            return self._replayed_images(images, tau, batch.replay)
        std = self._std(images)
        if self.direction == "random":
            noise = torch.randn_like(images)
            # With `std`, `step_along` takes a gradient, and divides by it.
            return step_along(images, noise if std is None else noise * std, tau, std)
        half = self.inner == "half"
        return perturb(model, images, batch.labels, tau, half=half, batch_norm=self.inner_batch_norm, std=std)

    def _replayed_images(self, images: Tensor, tau: float, replay: int) -> Tensor:
        """Z comes from the input's gradient in the step before, on the same batch; the first has none.

        Where a replay follows, a leaf that asks for its gradient: the step's own backward pass leaves it there.
        """
        last = self._last_images
        if replay and last is not None and last.grad is not None and last.shape == images.shape:
            images = step_along(images, last.grad, tau, self._std(images))
        self._last_images = images.detach()
        if replay + 1 < self.replays:
            self._last_images.requires_grad_()
        return self._last_images

    def _std(self, images: Tensor) -> Tensor | None:
        if self.std is not None and self.std.device != images.device:
            self.std = self.std.to(images.device)
        return self.std

    def training_loss(self, losses: Tensor, batch: StepBatch) -> Tensor:
        """Second hook: weighs the losses of this step and learns from them for the next.

        Args:
            losses: (m,) float32, with their graph.
            batch: this step's.

        Returns:
            The scalar to descend; `batch.mean` makes it of (m,) values.
        """
        if isinstance(self.adversary, GroupAdversary):
            return batch.mean(self.adversary.update(losses, batch.concepts) * losses)
        if self.adversary is not None:
            # Algorithm 1: the model's step uses q_t; the same losses then give q_{t+1}.
            weighted = batch.mean(self.adversary.weights(batch.concepts) * losses)
            self.adversary.update(losses, batch.concepts)
            return weighted
        if self._class_weights is not None:
            self._class_weights = self._class_weights.to(losses.device)
            return batch.mean(self._class_weights[batch.labels] * losses)
        return batch.mean(losses)

    def metrics(self) -> dict[str, Any]:
        """For the log: q, the range of the weights (N / N_k) q_k, and the concepts at its ends."""
        if self.adversary is None:
            return {}
        q = self.adversary.q.cpu()
        weights = self._counts.sum() / self._counts * q
        lightest, heaviest = int(weights.argmin()), int(weights.argmax())
        return {
            "q": [round(value, 6) for value in q.tolist()],
            "weight_min": round(float(weights[lightest]), 6),
            "weight_max": round(float(weights[heaviest]), 6),
            "lightest": self._names[lightest],
            "heaviest": self._names[heaviest],
        }

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {} if self.adversary is None else {"adversary": self.adversary.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a checkpoint."""
        if self.adversary is not None:
            self.adversary.load_state_dict(state["adversary"])


METHODS: dict[str, Callable[[Recipe, ConceptMap], Objective]] = {
    "erm": partial(Objective, direction=None, weighting=None),
    "el": partial(Objective, weighting=None),
    "cl": partial(Objective, direction=None),
    "hrrl": Objective,
    # Controls and a relative, for comparisons.
    "random": partial(Objective, direction="random", weighting=None),
    "balanced": partial(Objective, direction=None, weighting="classes"),
    "groupdro": partial(Objective, direction=None, weighting="groups"),
}


def create_objective(recipe: Recipe, concepts: ConceptMap) -> Objective:
    """The objective that `recipe.method` names: one of `METHODS`, or `package.module:Class`.

    A class of one's own is called with (recipe, concepts) and offers what `Objective` offers.

    Raises:
        InputError: there is no such method, or the class cannot be imported.
    """
    name = recipe.method
    if name in METHODS:
        return METHODS[name](recipe, concepts)
    module_name, colon, class_name = name.partition(":")
    if not colon:
        raise InputError(f"--method {name}: expected {', '.join(METHODS)} or package.module:Class")
    try:
        factory = getattr(importlib.import_module(module_name), class_name)
    except AttributeError as exc:
        raise InputError(f"--method {name}: {module_name} has no {class_name}") from exc
    except (ImportError, ValueError) as exc:
        raise InputError(f"--method {name}: cannot be imported ({exc}); is its folder on PYTHONPATH?") from exc
    try:
        objective: Objective = factory(recipe, concepts)
    except TypeError as exc:
        raise InputError(f"--method {name}: cannot be called with (recipe, concepts): {exc}") from exc
    if not isinstance(objective, Objective):
        raise InputError(f"--method {name}: is no Objective; subclass robustfeat.training.objective.Objective")
    return objective
