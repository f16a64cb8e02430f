"""Principal components of a network's features, as its last layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from robustfeat.errors import DataError
from robustfeat.hub.preprocessing import Preprocessing, normalise
from robustfeat.training.network import classifier_of, pooled_features

__all__ = ["principal_directions", "project_features"]

_BATCH = 32


def project_features(
    network: nn.Module, squares: Sequence[NDArray[np.uint8]], contract: Preprocessing, size: int
) -> dict[str, Tensor]:
    """Replaces the classifier by the projection onto the first principal components of the features.

    The network then gives (N, size), without subtracting the mean. timm's namesake with `num_classes=size` takes the
    state dict.

    Args:
        network: a network from `build_network`, in evaluation mode.
        squares: images (S, S, 3) that the components are measured on.
        contract: how they become the network's input.
        size: number of components.

    Returns:
        `weight` (C, size) and `bias` (C,) of the classifier of the components. It gives the replaced one's logits for
        features whose other components are the mean's.

    Raises:
        DataError: there are not more images than components.
    """
    if len(squares) <= size:
        raise DataError(f"{size} components need more than {size} training images; found {len(squares)}")
    batches = [np.stack(squares[first : first + _BATCH]) for first in range(0, len(squares), _BATCH)]
    with torch.no_grad():
        features = torch.cat([_features(network, normalise(batch, contract)) for batch in batches]).double()
        classifier = classifier_of(network)
        assert isinstance(classifier, nn.Linear)
        directions = torch.from_numpy(principal_directions(features.numpy(), size))
        weight, mean = classifier.weight.double(), features.mean(0)
        left_out = mean - directions.T @ (directions @ mean)
        bias = classifier.bias.double() + weight @ left_out
        made = {"weight": (weight @ directions.T).float(), "bias": bias.float()}
        classifier.weight = nn.Parameter(
            torch.from_numpy(principal_directions(features.double().numpy(), size)).float()
        )
        classifier.bias = nn.Parameter(torch.zeros(size))
        classifier.out_features = size
    return made


def _features(network: nn.Module, pixels: NDArray[np.float32]) -> Tensor:
    images = torch.from_numpy(pixels).contiguous(memory_format=torch.channels_last)
    return pooled_features(network, images).float().cpu()


def principal_directions(features: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """The directions of greatest variance, as the rows W of the projection x -> W x.

    Each direction's entry of greatest absolute value is positive, so the result does not depend on the solver's signs.

    Args:
        features: (n, D).
        size: d, at most D.

    Returns:
        (d, D) with orthonormal rows, ordered by variance.

    Source: Pearson (1901); eigenvectors of the covariance matrix.
    """
    _, vectors = np.linalg.eigh(np.cov(features, rowvar=False))
    directions = vectors[:, ::-1][:, :size].T
    largest = np.take_along_axis(directions, np.abs(directions).argmax(1)[:, None], 1)
    return np.ascontiguousarray(directions * np.sign(largest))
