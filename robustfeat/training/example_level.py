"""The example level of an objective: which images a step trains on, and what that adds to their losses.

The base class is the level, switched off.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from robustfeat.training.hrrl import Losses, inner_output, input_gradient, perturb, step_along
from robustfeat.training.network import StepOutput
from robustfeat.training.recipe import Recipe
from robustfeat.training.stable import feature_distances
from robustfeat.training.step_batch import StepBatch

__all__ = ["ExampleLevel", "create_example_level"]


class ExampleLevel:
    """The example level, switched off: images stay as they are.

    Attributes:
        replays: number of consecutive steps per batch.
        half: whether the model sees the images at half their side, too.
    """

    replays = 1
    half = False

    def move(self, model: nn.Module, batch: StepBatch, tau: float, losses: Losses) -> Tensor:
        """The images to train on.

        Args:
            model: for passes of the level's own.
            batch: the batch of this step.
            tau: length of the move, above 0.
            losses: from what the model gives for the batch's images, moved or not, to their losses.

        Returns:
            (n, 3, S, S), without a graph. The first m are the batch's images, moved or not.
        """
        return batch.images

    def penalties(self, output: StepOutput, batch: StepBatch) -> Tensor | None:
        """What the level adds to each image's loss, (m,) float32 with their graph, from the output for `move`'s images.

        None where it adds nothing.
        """
        return None


class _Moving(ExampleLevel):
    """Moves images by tau.

    Args:
        std: (1, 3, 1, 1) where tau is a length in pixels from 0 to 1; see `step_along`.
    """

    def __init__(self, std: Tensor | None) -> None:
        self._std = std

    def std(self, images: Tensor) -> Tensor | None:
        """`std` on the device of the images."""
        if self._std is not None and self._std.device != images.device:
            self._std = self._std.to(images.device)
        return self._std

    def random_step(self, images: Tensor, tau: float) -> Tensor:
        """The images, moved by tau in a random direction each."""
        noise, std = torch.randn_like(images), self.std(images)
        # With `std`, `step_along` takes a gradient, and divides by it.
        return step_along(images, noise if std is None else noise * std, tau, std)


class _Gradient(_Moving):
    """Theorem 2: along the gradient of an inner pass.

    Args:
        std: see `_Moving`.
        half: run the inner pass at half the resolution.
        batch_norm: see `input_gradient`.
        unit: see `perturb`.
    """

    def __init__(self, std: Tensor | None, *, half: bool, batch_norm: str, unit: bool) -> None:
        super().__init__(std)
        self.half, self._batch_norm, self._unit = half, batch_norm, unit

    def move(self, model: nn.Module, batch: StepBatch, tau: float, losses: Losses) -> Tensor:
        return perturb(
            model,
            batch.images,
            batch.targets,
            tau,
            losses=losses,
            half=self.half,
            batch_norm=self._batch_norm,
            std=self.std(batch.images),
            unit=self._unit,
        )


class _FreeGradient(_Moving):
    """Moves along the gradient of the previous step on the same batch. A batch's first step has no gradient.

    Args:
        std: see `_Moving`.
        replays: steps per batch.
    """

    def __init__(self, std: Tensor | None, replays: int) -> None:
        super().__init__(std)
        self.replays = replays
        self._last_images: Tensor | None = None

    def move(self, model: nn.Module, batch: StepBatch, tau: float, losses: Losses) -> Tensor:
        images, last = batch.images, self._last_images
        if batch.replay and last is not None and last.grad is not None and last.shape == images.shape:
            images = step_along(images, last.grad, tau, self.std(images))
        self._last_images = images.detach()
        if batch.replay + 1 < self.replays:
            # A leaf that asks for its gradient: the step's own backward pass leaves it there for the next replay.
            self._last_images.requires_grad_()
        return self._last_images


class _RandomDirection(_Moving):
    """Along a random direction: the control of the example level."""

    def move(self, model: nn.Module, batch: StepBatch, tau: float, losses: Losses) -> Tensor:
        return self.random_step(batch.images, tau)


class _FeatureDirection(_Moving):
    """Along the direction that moves an image's features most, which the loss then keeps small: see `stable`.

    Args:
        std, half, batch_norm: see `_Gradient`.
        steps: number of steps in the search for that direction.
        weight: beta.
        still: train on the images as they are, too.
    """

    def __init__(
        self, std: Tensor | None, *, half: bool, batch_norm: str, steps: int, weight: float, still: bool
    ) -> None:
        super().__init__(std)
        self.half = half
        self._inner: dict[str, Any] = {"half": half, "batch_norm": batch_norm}
        self._steps, self._weight, self._still = steps, weight, still

    def move(self, model: nn.Module, batch: StepBatch, tau: float, losses: Losses) -> Tensor:
        images = batch.images
        if batch.anchors is None or self.half:  # features at half the resolution have other anchors
            anchors: Tensor = inner_output(model, images, **self._inner).features
        else:
            anchors = batch.anchors

        def distances(output: StepOutput) -> Tensor:
            return feature_distances(output.features, anchors)

        # At the image itself the gradient is zero.
        moved = self.random_step(images, tau)
        for _ in range(self._steps):
            gradient = input_gradient(model, moved, batch.targets, losses=distances, **self._inner)
            moved = step_along(images, gradient, tau, self.std(images))
        return torch.cat([images, moved]) if self._still else moved

    def penalties(self, output: StepOutput, batch: StepBatch) -> Tensor | None:
        size = len(batch.images)
        anchors = output.features[:size] if batch.anchors is None else batch.anchors
        return self._weight * feature_distances(output.features[-size:], anchors)


def create_example_level(direction: str | None, recipe: Recipe) -> ExampleLevel:
    """The example level by its direction: see `methods.Method`."""
    if direction is None:
        return ExampleLevel()
    std = torch.tensor(recipe.preprocessing().std).view(1, 3, 1, 1) if recipe.tau_unit == "pixel" else None
    if direction == "random":
        return _RandomDirection(std)
    inner: dict[str, Any] = {"half": recipe.inner == "half", "batch_norm": recipe.inner_batch_norm}
    if direction == "features":
        return _FeatureDirection(
            std,
            steps=recipe.stable_steps,
            weight=recipe.stable_weight,
            still=recipe.labels or bool(recipe.teacher) or recipe.stable_anchor == "self",
            **inner,
        )
    if recipe.inner == "free":
        return _FreeGradient(std, recipe.replays)
    return _Gradient(std, **inner, unit=recipe.tau_step == "unit")
