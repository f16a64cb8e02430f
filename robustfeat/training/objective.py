"""The training objective: one small class with three hooks, for the images, their losses and the scalar of a step.

To try an idea of your own, subclass `Objective`, override a hook and pass `--method module:Class`.
"""

from __future__ import annotations

import importlib
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn

from robustfeat.errors import InputError
from robustfeat.training.concepts import ConceptMap
from robustfeat.training.example_level import create_example_level
from robustfeat.training.label_losses import create_label_loss
from robustfeat.training.methods import METHODS, import_failed, local_modules, require_method
from robustfeat.training.network import StepOutput
from robustfeat.training.recipe import Recipe
from robustfeat.training.step_batch import StepBatch
from robustfeat.training.teacher import teacher_losses
from robustfeat.training.weighting import Adversary, create_concept_level, create_example_weighting

__all__ = ["Objective", "StepBatch", "StepOutput", "create_objective"]

TEACHER_HEAD = "teacher"
"""The head that projects features to a teacher's."""

TAU_REFERENCE_PX = 224
"""Recipes give tau at this image side; keeping tau / side constant keeps the change per pixel the same."""


class Objective:
    """HRRL's objective (Eq. 4) and, with a level switched off or replaced, its relatives.

    The trainer calls `training_images`, runs the model on what it returns, calls `losses` on the model's output and
    `training_loss` on the losses; it descends the gradient of what that returns.

    Args:
        recipe: where tau, lambda, s, c and the like come from.
        concepts: each class's concept, and the training examples of each class.
        direction: of the example level: `gradient`, `features` (see `stable`), `random` (the control) or None (off).
        weighting: of the concept level: `adversary` (Eqs. 4 to 6), `groups` (GroupDRO), `classes` (each class
            weighs the same) or None (off).

    Attributes:
        example_level, concept_level: what moves the images, and what weighs the losses.
        example_weighting: what weighs the losses of a batch before that (`Recipe.p_lam`).
        replays: number of consecutive steps per batch.
        tau_at_224px: length of the example-level step; 0 where that level is off.
    """

    def __init__(
        self,
        recipe: Recipe,
        concepts: ConceptMap,
        *,
        direction: str | None = "gradient",
        weighting: str | None = "adversary",
    ) -> None:
        self.example_level = create_example_level(direction, recipe)
        self.example_weighting = create_example_weighting(recipe)
        self.concept_level = create_concept_level(weighting, recipe, concepts, self.example_level.replays)
        self.replays = self.example_level.replays
        self.tau_at_224px = recipe.tau if direction else 0.0
        self._unit_step = recipe.tau_step == "unit"
        self._labels, self._teacher_weight = recipe.labels, recipe.teacher_weight
        self._label_loss = create_label_loss(recipe)
        self._teacher_size = recipe.teacher_size if recipe.teacher else None

    @property
    def adversary(self) -> Adversary | None:
        """The state with which the concept level learns, if it learns."""
        return self.concept_level.adversary

    def tau(self, side_px: int, epoch: float) -> float:
        """The length added at this image side; a subclass may let it depend on `epoch`, the epochs done so far.

        With `tau_step = "gradient"` it is the factor of the gradient.
        """
        if self._unit_step:
            return self.tau_at_224px * side_px / TAU_REFERENCE_PX
        # At twice the side, four pixels share the effect of one, and each has a quarter of its gradient.
        return self.tau_at_224px * (side_px / TAU_REFERENCE_PX) ** 2

    def create_heads(self, feature_size: int, classes: int) -> nn.ModuleDict:
        """Modules of the objective's own that are trained with the network and thrown away with the run.

        Args:
            feature_size: D.
            classes: C.

        Returns:
            By name, modules from (n, D) features; `StepOutput.heads` has what they give. A teacher's projector is
            among them.
        """
        if self._teacher_size is None:
            return nn.ModuleDict()
        return nn.ModuleDict({TEACHER_HEAD: nn.Linear(feature_size, self._teacher_size)})

    def training_images(self, model: nn.Module, batch: StepBatch) -> Tensor:
        """First hook: the images to train on.

        Args:
            model: from images to a `StepOutput`, for passes of the objective's own.
            batch: this step's.

        Returns:
            (n, 3, S, S), without a graph. The first m are the batch's images, moved or not.
        """
        tau = self.tau(batch.images.shape[-1], batch.epoch)
        if tau == 0:
            return batch.images
        return self.example_level.move(model, batch, tau, partial(self.losses, batch=batch))

    def losses(self, output: StepOutput, batch: StepBatch) -> Tensor:
        """Second hook: the loss of each image; here the recipe's `loss`, and what a teacher and the example level add.

        The example level's inner pass asks it, too, about images of its own: it must not learn from them.

        Args:
            output: output for the images of `training_images`.
            batch: this step's.

        Returns:
            (m,) float32, with their graph.
        """
        parts = []
        if self._labels:
            parts.append(self.label_losses(output, batch))
        if batch.teacher is not None:
            parts.append(self._teacher_losses(output, batch.teacher))
        if (penalties := self.example_level.penalties(output, batch)) is not None:
            parts.append(penalties)
        if not parts:
            raise InputError(
                "leaves nothing to learn from",
                argument="labels",
                value="False",
                fix="pass a `teacher`, or give the objective direction='features'",
            )
        return reduce(torch.add, parts)

    def label_losses(self, output: StepOutput, batch: StepBatch) -> Tensor:
        """The part of `losses` that comes from labels, (m,) float32: the recipe's `loss`."""
        return self._label_loss(output.logits[: len(batch.labels)].float(), batch.targets)

    def _teacher_losses(self, output: StepOutput, features: Tensor) -> Tensor:
        if TEACHER_HEAD not in output.heads:
            raise InputError(
                f"create_heads leaves out {TEACHER_HEAD!r}, which learns from the teacher",
                fix="add your heads to what super().create_heads returns",
            )
        return self._teacher_weight * teacher_losses(output.heads[TEACHER_HEAD][: len(features)], features)

    def training_loss(self, losses: Tensor, batch: StepBatch) -> Tensor:
        """Third hook: weighs the losses of this step and learns from them for the next.

        Args:
            losses: (m,) float32, with their graph.
            batch: this step's.

        Returns:
            The scalar to descend; `batch.mean` makes it of (m,) values.
        """
        return batch.mean(self.concept_level.weigh(self.example_weighting.weigh(losses, batch), batch))

    def metrics(self) -> dict[str, Any]:
        """For the log: q, the range of the weights (N / N_k) q_k, and the concepts at its ends."""
        return self.concept_level.metrics()

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint."""
        return self.concept_level.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resumes from a checkpoint."""
        self.concept_level.load_state_dict(state)


def create_objective(recipe: Recipe, concepts: ConceptMap) -> Objective:
    """The objective that `recipe.method` names: one of `methods.METHODS`, or `module:Class`.

    A custom class is called with (recipe, concepts) and has the interface of `Objective`.

    Raises:
        InputError: there is no such method, or the class cannot be imported.
    """
    name = recipe.method
    if name in METHODS:
        method = METHODS[name]
        return Objective(recipe, concepts, direction=method.direction, weighting=method.weighting)
    require_method(name)
    module_name, _, class_name = name.partition(":")
    try:
        with local_modules():
            factory = getattr(importlib.import_module(module_name), class_name)
    except AttributeError as exc:
        raise InputError(f"{module_name} has no {class_name}", argument="method", value=name) from exc
    except (ImportError, ValueError) as exc:
        raise import_failed(name, exc) from exc
    try:
        objective: Objective = factory(recipe, concepts)
    except TypeError as exc:
        raise InputError(f"cannot be called with (recipe, concepts): {exc}", argument="method", value=name) from exc
    if not isinstance(objective, Objective):
        raise InputError(
            "is no Objective",
            argument="method",
            value=name,
            fix="subclass robustfeat.training.objective.Objective",
        )
    return objective
