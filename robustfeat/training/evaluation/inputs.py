"""Prepares a task's images for a network, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import normalize

from robustfeat.errors import DecodeError
from robustfeat.hub.preprocessing import Preprocessing
from robustfeat.training.data.batches import Batch, load_batches

__all__ = ["REPAIR", "network_inputs"]

REPAIR = "repair or remove it: a score would be of other images"


def network_inputs(
    batches: Dataset[Batch], contract: Preprocessing, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Normalised images (n, 3, S, S), channels last, and their labels (n,), on the device.

    Raises:
        DecodeError: an image cannot be read.
    """
    for batch in load_batches(batches, 0):
        if batch.failures:
            raise DecodeError(batch.failures[0], fix=REPAIR)
        x = normalize(batch.pixels(device, contract.image_size) / 255, list(contract.mean), list(contract.std))
        yield x.contiguous(memory_format=torch.channels_last), batch.labels.to(device)
