"""The two levels of an objective: which images a step trains on, and how much the loss of each weighs.

A base class is a level that is switched off.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional

from robustfeat.training.concepts import ConceptMap
from robustfeat.training.divergences import DIVERGENCES
from robustfeat.training.groupdro import GroupAdversary
from robustfeat.training.hrrl import ConceptAdversary, Losses, inner_output, input_gradient, perturb, step_along
from robustfeat.training.loop.distributed import gather_tensors
from robustfeat.training.network import StepOutput
from robustfeat.training.recipe import Recipe
from robustfeat.training.stable import feature_distances

__all__ = [
    "Adversary",
    "ConceptLevel",
    "ExampleLevel",
    "StepBatch",
    "Weighting",
    "create_concept_level",
    "create_example_level",
    "create_example_weighting",
]


@dataclass(frozen=True)
class StepBatch:
    """What one step trains on; under data parallelism this rank's part.

    Attributes:
        images: (m, 3, S, S) float, in the network's normalised input space.
        labels: (m,) int64, each example's class; of a mixture the larger part's.
        concepts: (m,) int64, each example's concept.
        epoch: epochs done so far, as a fraction.
        replay: how often this batch was trained on just before (`Objective.replays`).
        total: the examples of all ranks together.
        shares: (m, C) float, each example's shares of classes, where it is a mixture.
        teacher: (m, D) float32 of length 1, the teacher's features of the images as they were before any move.
        anchors: (m, D) float32, what the network gave for the same images before training, where that is learned.
    """

    images: Tensor
    labels: Tensor
    concepts: Tensor
    epoch: float
    total: int
    replay: int = 0
    shares: Tensor | None = None
    teacher: Tensor | None = None
    anchors: Tensor | None = None

    @property
    def targets(self) -> Tensor:
        """What the classifier learns: the shares of classes, or the labels."""
        return self.labels if self.shares is None else self.shares

    def mean(self, values: Tensor) -> Tensor:
        """The scalar to descend so that the step follows the mean of all ranks' `values`, (m,).

        The gradients of the ranks are averaged, also where a bad image made their parts unequal.
        """
        if not distributed.is_initialized():
            return values.mean()
        return values.sum() * (distributed.get_world_size() / self.total)


class ExampleLevel:
    """The example level, switched off: images stay as they are.

    Attributes:
        replays: how many steps in a row are made with one batch.
    """

    replays = 1

    def move(self, model: nn.Module, batch: StepBatch, tau: float, losses: Losses) -> Tensor:
        """The images to train on.

        Args:
            model: for passes of the level's own.
            batch: of this step.
            tau: length of the move, above 0.
            losses: from what the model gives for the batch's images, moved or not, to their losses.

        Returns:
            (n, 3, S, S), without a graph; the first m are the batch's, moved or not.
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
        self._half, self._batch_norm, self._unit = half, batch_norm, unit

    def move(self, model: nn.Module, batch: StepBatch, tau: float, losses: Losses) -> Tensor:
        return perturb(
            model,
            batch.images,
            batch.targets,
            tau,
            losses=losses,
            half=self._half,
            batch_norm=self._batch_norm,
            std=self.std(batch.images),
            unit=self._unit,
        )


class _FreeGradient(_Moving):
    """Along the gradient that the step before left on the same batch; the first step of a batch has none.

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
        steps: of the search for that direction.
        weight: beta.
        still: train on the images as they are, too.
    """

    def __init__(
        self, std: Tensor | None, *, half: bool, batch_norm: str, steps: int, weight: float, still: bool
    ) -> None:
        super().__init__(std)
        self._inner: dict[str, Any] = {"half": half, "batch_norm": batch_norm}
        self._steps, self._weight, self._still = steps, weight, still

    def move(self, model: nn.Module, batch: StepBatch, tau: float, losses: Losses) -> Tensor:
        images = batch.images
        if batch.anchors is None or self._inner["half"]:  # features at half the resolution have other anchors
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


class Adversary(Protocol):
    """A distribution over concepts that learns from the losses.

    Attributes:
        q: (K,) float64.
    """

    q: Tensor

    def weigh(self, losses: Tensor, concepts: Tensor) -> Tensor:
        """(m,) float32 weights for the (m,) losses of this step, of examples of these (m,) concepts; q learns."""

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to resume."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resumes from a saved state."""


class Weighting:
    """What weighs losses, switched off: all weigh the same."""

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
    """What weighs the examples of a batch by their losses."""
    if not recipe.p_lam:
        return Weighting()
    return _ExampleDistribution(recipe.p_lam, recipe.p_divergence, recipe.batch_size)


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
        """What a checkpoint keeps."""
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


def create_concept_level(weighting: str | None, recipe: Recipe, concepts: ConceptMap) -> ConceptLevel:
    """The concept level by its weighting: see `methods.Method`."""
    if weighting is None:
        return ConceptLevel()
    if weighting == "classes":
        return _ClassWeights(concepts)
    if weighting == "groups":
        return _AdversaryLevel(GroupAdversary(len(concepts.counts)), concepts)
    reference, repeats = recipe.reference, recipe.replays if recipe.inner == "free" else 1
    adversary = ConceptAdversary(
        torch.from_numpy(concepts.counts).double(),
        recipe.lam,
        recipe.q_warmup_steps,
        recipe.q_warmup_divisor,
        None if reference is None else torch.from_numpy(concepts.distribution(reference)),
        divergence=recipe.q_divergence,
        baseline=recipe.q_baseline,
        pass_steps=max(1, int(concepts.counts.sum()) // recipe.batch_size) * repeats,
        repeats=repeats,
    )
    return _AdversaryLevel(adversary, concepts)
