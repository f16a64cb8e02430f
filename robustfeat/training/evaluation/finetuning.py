"""Fine-tuning: a pre-trained network as the start of training on a task (Section 4.4 and Figure 3)."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional

from robustfeat.errors import InputError, TrainingError
from robustfeat.hub.preprocessing import Preprocessing
from robustfeat.progress import Progress
from robustfeat.training.data.batches import EpochPlan, TrainingBatches
from robustfeat.training.evaluation.inputs import network_inputs
from robustfeat.training.evaluation.robustness import class_hits
from robustfeat.training.evaluation.tasks import Task
from robustfeat.training.loop.descent import Descent

__all__ = ["finetune", "require_batch"]


def finetune(
    network: nn.Module,
    feature_size: int,
    contract: Preprocessing,
    task: Task,
    *,
    epochs: int = 100,
    lr: float = 0.01,
    milestone: int = 50,
    batch_size: int = 128,
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
    min_crop_area: float = 0.35,
    seed: int = 0,
    device: torch.device | None = None,
    label: str = "",
    quiet: bool = True,
) -> list[float]:
    """Trains all layers, and a new classifier, on a task by ERM.

    Args:
        network: images to (n, D) features; a copy of it is trained.
        feature_size: D.
        contract: how images become the network's input.
        task: its training images are cropped and mirrored at random, its test images scored after each epoch.
        epochs, lr, milestone: the learning rate falls to a tenth after `milestone` epochs.
        batch_size, momentum, weight_decay, min_crop_area: settings of SGD and the crops.
        seed: random seed of the classifier, the order and the crops.
        device: the device; by default the CPU.
        label: for the progress line.
        quiet: hide progress.

    Returns:
        The test error after each epoch, as a share. The last is the result: the best would be chosen by test images.

    Raises:
        InputError: fewer training images than one batch.
        TrainingError: the loss is no longer finite.
    """
    require_batch(task, batch_size)
    device = device or torch.device("cpu")
    torch.manual_seed(seed)
    model = nn.Sequential(copy.deepcopy(network), nn.Linear(feature_size, len(task.train.classes)))
    model = model.to(device).to(memory_format=torch.channels_last)
    descent = Descent(model, device, lr=lr, momentum=momentum, weight_decay=weight_decay)
    errors, note = [], ""
    progress = Progress(label or f"fine-tuning on {task.name}", epochs * len(task.train), quiet=quiet)
    for epoch in range(epochs):
        model.train()
        plan = EpochPlan(task.train, batch_size, seed=seed, epoch=epoch, min_crop_area=min_crop_area)
        for x, labels in network_inputs(TrainingBatches(task.train, contract.image_size, plan), contract, device):
            loss = functional.cross_entropy(model(x), labels)
            if not torch.isfinite(loss):
                raise TrainingError(
                    f"fine-tuning on {task.name} diverged in epoch {epoch + 1}", fix="try a smaller `lr`"
                )
            descent.add(loss)
            descent.update(lr if epoch < milestone else lr / 10)
            progress.advance(len(labels), note)
        model.eval()
        right, count = class_hits(model, contract, task.test, device)
        errors.append(int((count - right).sum()) / len(task.test))
        note = f"test error {errors[-1]:.2%} after epoch {epoch + 1}"
    progress.finish(note)
    return errors


def require_batch(task: Task, batch_size: int) -> None:
    """Whether a task has the training images of one batch.

    Raises:
        InputError: it has fewer.
    """
    if len(task.train) < batch_size:
        raise InputError(
            f"{task.name}: {len(task.train)} training images, fewer than one batch of {batch_size}",
            fix="pass a smaller `batch_size`",
        )
