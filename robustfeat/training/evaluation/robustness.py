"""A classifier on its own benchmark's images: moved along their gradients (Figure 4), and by concept (Figure 5)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from robustfeat.hub.preprocessing import Preprocessing
from robustfeat.training.data.batches import EvaluationBatches
from robustfeat.training.data.image_set import ImageSet
from robustfeat.training.evaluation.inputs import network_inputs
from robustfeat.training.hrrl import input_gradient, step_along
from robustfeat.training.objective import TAU_REFERENCE_PX

__all__ = ["accuracy_by_step", "class_hits"]

_BATCH = 256


def accuracy_by_step(
    network: nn.Module, contract: Preprocessing, images: ImageSet, steps: Sequence[float], device: torch.device
) -> list[float]:
    """Accuracy on images that Theorem 2's augmentation moved, by the length of the step.

    Args:
        network: to logits, in evaluation mode; each image follows its own gradient.
        contract: how images become the network's input.
        images: images of the network's classes.
        steps: lengths at 224 px, scaled to the network's size as tau is; 0 leaves the images as they are.
        device: the network's.

    Source: Section 4.5 and Figure 4.
    """
    right = torch.zeros(len(steps), dtype=torch.int64)
    for x, labels in network_inputs(EvaluationBatches(images, _BATCH, contract), contract, device):
        gradient = input_gradient(network, x, labels)
        for place, step in enumerate(steps):
            moved = step_along(x, gradient, step * contract.image_size / TAU_REFERENCE_PX) if step else x
            with torch.no_grad():
                right[place] += int((network(moved).argmax(1) == labels).sum())
    return [int(count) / len(images) for count in right]


def class_hits(
    network: nn.Module, contract: Preprocessing, images: ImageSet, device: torch.device
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Number of right predictions and of images per class, (classes,) each.

    Source: Section 4.5 and Figure 5, which sums them up by concept.
    """
    right = np.zeros(len(images.classes), np.int64)
    for x, labels in network_inputs(EvaluationBatches(images, _BATCH, contract), contract, device):
        with torch.no_grad():
            hits = network(x).argmax(1) == labels
        np.add.at(right, labels[hits].cpu().numpy(), 1)
    return right, np.bincount(images.labels, minlength=len(right))
