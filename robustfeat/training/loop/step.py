"""Runs one training step of the network, its optimiser and the objective on one device, with or without other ranks."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from robustfeat.errors import InputError
from robustfeat.training.concepts import ConceptMap
from robustfeat.training.loop.averaging import MovingAverage
from robustfeat.training.loop.descent import Descent
from robustfeat.training.loop.distributed import sum_over_ranks
from robustfeat.training.loop.ranks import Ranks
from robustfeat.training.network import (
    PROJECTION,
    Outputs,
    batch_norms,
    build_network,
    classifier_of,
    feature_size,
    projection_head,
    require_side,
)
from robustfeat.training.objective import TEACHER_HEAD, Objective, StepBatch, create_objective
from robustfeat.training.recipe import Recipe
from robustfeat.training.stable import FrozenStart, feature_distances
from robustfeat.training.teacher import teacher_losses

__all__ = ["Group", "Guidance", "StepResult", "TrainingStep"]


@dataclass(frozen=True)
class Group:
    """The batches whose mean gradient makes one update; see `Recipe.accumulate`.

    Attributes:
        size: number of batches in the group.
        ends: whether this batch is the last of them.
    """

    size: int = 1
    ends: bool = True


@dataclass(frozen=True)
class Guidance:
    """Guidance for a step's images besides their labels.

    Attributes:
        teacher: (m, D), see `StepBatch`.
        concepts: (m,) int64, where the labels do not decide.
        shares: (m, C), see `StepBatch`.
    """

    teacher: Tensor | None = None
    concepts: Tensor | None = None
    shares: Tensor | None = None


@dataclass(frozen=True)
class StepResult:
    """Measurements of a step, on the device, so nothing has to wait for them.

    Attributes:
        losses: (m,) float32 at the images that were trained on.
        objective: the scalar that was descended.
        correct: number of the m images that were classified correctly; NaN if labels are not learned.
        gradient_norm: norm of an update before clipping, if the recipe has `clip_norm`.
    """

    losses: Tensor
    objective: Tensor
    correct: Tensor
    gradient_norm: Tensor | None = None


class TrainingStep:
    """Everything that changes from step to step, and the step itself (Algorithm 1, one pass of its loop).

    Args:
        recipe: how it is trained.
        concepts: concepts of the training set's classes.
        device: where.
        ranks: this process among those that train together; where there are several, call `distribute`.

    Attributes:
        network: the one that is trained, neither wrapped nor compiled.
        objective: with the adversary's state.
    """

    def __init__(self, recipe: Recipe, concepts: ConceptMap, device: torch.device, ranks: Ranks) -> None:
        if recipe.precision == "fp32":
            # Exact resume needs the same kernels each time, and fp32 means fp32.
            torch.backends.cudnn.deterministic = True
            torch.backends.cudnn.allow_tf32 = False
        else:
            torch.backends.cudnn.benchmark = True
        self.recipe, self.device, self._ranks = recipe, device, ranks
        torch.manual_seed(recipe.seed)
        classes = len(concepts.of_class)
        network = build_network(classes, recipe.network, width=recipe.width, image_size=recipe.validation_size)
        self.network = network.to(memory_format=torch.channels_last).to(device)
        classifier = classifier_of(network)
        if not recipe.labels:
            classifier.requires_grad_(False)  # data parallelism waits for the gradients of all others
        learned = {id(parameter) for parameter in classifier.parameters()}
        self._features = [parameter for parameter in network.parameters() if id(parameter) not in learned]
        self.objective: Objective = create_objective(recipe, concepts)
        heads = self.objective.create_heads(feature_size(network), classes)
        if recipe.projection:
            heads[PROJECTION] = projection_head(feature_size(network), recipe.projection)
        self._heads = heads.to(device)
        self._outputs = Outputs(self.network, self._heads)
        self._descent = Descent(
            self._outputs,
            device,
            lr=recipe.lr,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
            precision=recipe.precision,
            optimizer=recipe.optimizer,
            decay_norms=recipe.decay_norms,
            clip_norm=recipe.clip_norm,
        )
        self._average = MovingAverage(self._outputs, recipe.ema) if recipe.ema else None
        self._start = FrozenStart(network) if recipe.stable_anchor == "start" else None
        self._parallel: nn.parallel.DistributedDataParallel | None = None
        self._apart = False  # whether the ranks have gradients that they have not exchanged
        self._inner = self._trained = _compiled(self._outputs) if recipe.compile else self._outputs
        self._concept_of_class = torch.from_numpy(concepts.of_class).to(device)
        contract = recipe.preprocessing()
        self._mean = torch.tensor(contract.mean, device=device).view(1, 3, 1, 1)
        self._std = torch.tensor(contract.std, device=device).view(1, 3, 1, 1)
        for _, side in recipe.image_sizes:
            require_side(network, recipe.network, side)
            if self.objective.example_level.half and self.objective.tau_at_224px:
                require_side(network, recipe.network, (side + 1) // 2)
        if not batch_norms(self._outputs.classifying):
            for argument, what in (("recalibrate", "measured anew"), ("freeze_norms", "kept")):
                if value := getattr(recipe, argument):
                    raise InputError(
                        f"{recipe.network} has no BatchNorm, whose statistics are {what}",
                        argument=argument,
                        value=value,
                        fix="leave it out",
                    )

    @property
    def result(self) -> Outputs:
        """The network that is validated, recalibrated and exported, and its heads: the average where there is one."""
        return self._outputs if self._average is None else self._average.outputs

    def take_start(self) -> None:
        """The network's weights of now are those that training starts from."""
        if self._average is not None:
            self._average.restart(self._outputs)
        if self._start is not None:
            self._start.load_state_dict(self.network.state_dict())

    def distribute(self) -> None:
        """From here on steps are made together with the other ranks; a collective call."""
        if self._ranks.world == 1:
            return
        # Newer versions of PyTorch call it so, and warn of the old name.
        parameters = inspect.signature(nn.parallel.DistributedDataParallel.__init__).parameters
        sync = "forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers"
        options: dict[str, Any] = {sync: False}
        # Its hooks do not work with autograd.grad: inner passes use the bare network. Buffers: `_share_statistics`.
        self._parallel = nn.parallel.DistributedDataParallel(
            self._outputs,
            device_ids=[self.device.index] if self.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            **options,
        )
        self._trained = _compiled(self._parallel) if self.recipe.compile else self._parallel

    def _share_statistics(self, outputs: Outputs) -> None:
        """Averages the running statistics over the ranks, so all evaluate and save the same network."""
        buffers = [buffer for buffer in outputs.buffers() if buffer.is_floating_point()]
        if not buffers:  # for example in networks with LayerNorm
            return
        mean = sum_over_ranks(torch.cat([buffer.flatten() for buffer in buffers])) / self._ranks.world
        parts = torch.split(mean, [buffer.numel() for buffer in buffers])
        for buffer, part in zip(buffers, parts, strict=True):
            buffer.copy_(part.view_as(buffer))

    def train(self, epoch: int = 0) -> None:
        """To training mode. Beside a start's features, BatchNorm keeps the start's statistics, which those have."""
        self._outputs.train()
        if self._start is not None or self.recipe.freeze_norms or epoch < self.recipe.classifier_epochs:
            for layer in batch_norms(self.network):
                layer.eval()

    def __call__(
        self,
        pixels: Tensor,
        labels: Tensor,
        epoch: float,
        number: int,
        *,
        replay: int = 0,
        total: int | None = None,
        guidance: Guidance = Guidance(),
        group: Group = Group(),
    ) -> StepResult:
        """One step: the gradient of a batch and, at the end of its group, the update.

        Args:
            pixels: (m, 3, S, S) float from 0 to 255, on the device.
            labels: (m,) int64; of a mixture the larger part's.
            epoch: epochs done so far, as a fraction; decides the learning rate.
            number: number of the step since training began. It determines random numbers together with the seed.
            replay: see `StepBatch`.
            total: examples of all ranks; m where there is one rank.
            guidance: guidance for the same images.
            group: the group of batches for one update.

        Raises:
            DivergedError: a loss is not finite (on a CPU, and for methods with a concept level).
        """
        # Methods that draw random numbers draw the same ones after a resume, and each rank its own.
        torch.manual_seed(((self.recipe.seed * 1_000_003 + number) * 4099 + self._ranks.rank) % 2**63)
        labels = labels.to(self.device, non_blocking=True)
        concepts, images = guidance.concepts, self.to_input(pixels)
        batch = StepBatch(
            images,
            labels,
            self._concept_of_class[labels] if concepts is None else concepts.to(self.device, non_blocking=True),
            epoch,
            total or len(labels),
            replay,
            shares=guidance.shares,
            teacher=guidance.teacher,
            anchors=self._anchors(images),
        )
        with self._exchanging(group.ends):
            with self.autocast():
                x = self.objective.training_images(self._inner, batch)
                output = self._trained(x.contiguous(memory_format=torch.channels_last))
            losses = self.objective.losses(output, batch)
            self._require_shape("losses", losses, (len(labels),), "(m,), one per image")
            objective = self.objective.training_loss(losses, batch)
            self._require_shape("training_loss", objective, (), "a scalar, as batch.mean makes it")
            self._descent.add(objective if group.size == 1 else objective / group.size)
        norm = self.update(epoch) if group.ends else None
        correct = self._count_correct(output.logits.detach()[: len(labels)], labels)
        return StepResult(losses.detach(), objective.detach(), correct, norm)

    @contextmanager
    def _exchanging(self, now: bool) -> Iterator[None]:
        """Backward passes within the block average the gradients of all ranks, or leave that to a later one."""
        with nullcontext() if now or self._parallel is None else self._parallel.no_sync():
            yield
        self._apart = not now

    def update(self, epoch: float) -> Tensor | None:
        """The update of a group of batches, at the learning rate of this moment; a collective call.

        A step makes it where its group ends. It is there for a group whose last batch is left out.

        Returns:
            See `Descent.update`; None, too, where all of the group is left out.
        """
        if not self._descent.pending:
            return None
        if self._ranks.world > 1:
            if self._apart:
                for gradient in self._descent.gradients:
                    gradient.copy_(sum_over_ranks(gradient) / self._ranks.world)
            self._share_statistics(self._outputs)
        if epoch < self.recipe.classifier_epochs:
            for parameter in self._features:
                parameter.grad = None  # which also stops its decay and momentum
        norm = self._descent.update(self.recipe.learning_rate(epoch))
        if self._average is not None:
            self._average.update(self._outputs)
        return norm

    def _anchors(self, images: Tensor) -> Tensor | None:
        if self._start is None:
            return None
        with self.autocast():
            return self._start.features(images)

    def _require_shape(self, hook: str, value: Tensor, shape: tuple[int, ...], expected: str) -> None:
        if tuple(value.shape) != shape:
            raise InputError(
                f"{hook} must return {expected}; got shape {tuple(value.shape)}",
                argument="method",
                value=self.recipe.method,
            )

    def to_input(self, pixels: Tensor) -> Tensor:
        """(m, 3, S, S) from 0 to 255 to the network's normalised input."""
        return (pixels / 255 - self._mean) / self._std

    def autocast(self) -> torch.autocast:
        """The recipe's precision."""
        return self._descent.autocast()

    def _count_correct(self, logits: Tensor, labels: Tensor) -> Tensor:
        if not self.recipe.labels:
            return torch.full((), torch.nan, device=logits.device)
        return (logits.argmax(1) == labels).sum()

    def evaluate(self, pixels: Tensor, labels: Tensor, teacher: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The sum of the losses of `result`, float64, and the number of images that it classifies correctly.

        Args:
            pixels, labels: see `__call__`.
            teacher: the teacher's features, where the loss is the distance to them: where labels are not learned.

        Without labels and without a teacher, the loss is the squared distance to the start's features.
        """
        labels = labels.to(self.device, non_blocking=True)
        if not self.recipe.labels:
            images = self.to_input(pixels)
            with torch.no_grad(), self.autocast():
                output = self.result(images)
            if teacher is not None:
                distances = teacher_losses(output.heads[TEACHER_HEAD], teacher)
            else:
                anchors = self._anchors(images)
                assert anchors is not None
                distances = feature_distances(output.features, anchors)
            return distances.double().sum(), self._count_correct(output.logits, labels)
        with torch.no_grad(), self.autocast():
            logits = self.result.logits(self.to_input(pixels)).float()
        losses = functional.cross_entropy(logits, labels, reduction="none")
        return losses.double().sum(), (logits.argmax(1) == labels).sum()

    def embed(self, pixels: Tensor) -> Tensor:
        """(m, D) float32 features of `result`, in evaluation mode, of `pixels` as `__call__` takes them."""
        with torch.no_grad(), self.autocast():
            features: Tensor = self.result.eval()(self.to_input(pixels)).features
        return features.float()

    def recalibrate(self, batches: Iterable[Tensor]) -> None:
        """Measures the running statistics of `result` anew, as plain means over these batches of all ranks.

        Training leaves the statistics of x~, but images are not perturbed at test time.

        Args:
            batches: (m, 3, S, S) float from 0 to 255, on the device.
        """
        result = self.result
        classifying = result.classifying
        layers = batch_norms(classifying)
        momenta = [layer.momentum for layer in layers]
        classifying.train()
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # cumulative
        with torch.no_grad(), self.autocast():
            for pixels in batches:
                result.logits(self.to_input(pixels).contiguous(memory_format=torch.channels_last))
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        if self._ranks.world > 1:
            self._share_statistics(result)

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint: model, heads, start, optimizer, objective, scaler, average."""
        return {
            "model": self.network.state_dict(),
            "heads": self._heads.state_dict(),
            "start": self._start.state_dict() if self._start else {},
            "objective": self.objective.state_dict(),
            "average": {} if self._average is None else self._average.state_dict(),
            **self._descent.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resumes from a checkpoint."""
        self.network.load_state_dict(state["model"])
        self._heads.load_state_dict(state["heads"])
        if self._start is not None:
            self._start.load_state_dict(state["start"])
        self._descent.load_state_dict(state)
        self.objective.load_state_dict(state["objective"])
        if self._average is not None:
            self._average.load_state_dict(state["average"])


def _compiled(network: nn.Module) -> nn.Module:
    compiled: nn.Module = torch.compile(network)  # type: ignore[assignment]
    return compiled
