"""Features that a small move of an image hardly changes: the distance of `method = "stable"`, and what it is kept to.

An image moves by tau to x + d, where its features are furthest from an anchor a: f(x), or what the network gave for x
before training. Its loss then has beta ||f(x + d) - a||^2 in it. This is not part of the paper.

The search for d begins with a random direction of length tau. Each step is d <- tau g / ||g||, with g the gradient of
||f(x + d) - a||^2 by d. If f is linear, this is the power method: d tends to the direction that f stretches most.

Sources: virtual adversarial training (Miyato et al., TPAMI 2019) for the search, with this distance in place of a KL
divergence; FARE (Schlarmann et al., ICML 2024) for the loss with the start's features as anchors, there with steps in
L-infinity. Task-Agnostic Robust Representation Learning (Nguyen, Lim and Torr, 2022) bounds a loss on any task by one
on clean data and a regulariser of the features; its regulariser may be another.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from robustfeat.training.network import pooled_features

__all__ = ["FrozenStart", "feature_distances"]


def feature_distances(features: Tensor, anchors: Tensor) -> Tensor:
    """||f - a||^2 per image: (m, D) and (m, D) to (m,) float32."""
    return (features.float() - anchors.float()).square().sum(1)


class FrozenStart:
    """The network as it was before training, in evaluation mode: its features are what an export of it gives.

    Args:
        network: the network, which is copied with its current weights.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = copy.deepcopy(network).eval().requires_grad_(False)

    def features(self, images: Tensor) -> Tensor:
        """(m, 3, S, S) in the network's input space to (m, D) float32."""
        with torch.no_grad():
            return pooled_features(self._network, images.contiguous(memory_format=torch.channels_last)).float()

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint, since the source of the weights may be gone when the run resumes."""
        state: dict[str, Any] = self._network.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes weights: a checkpoint's, or those that training starts from."""
        self._network.load_state_dict(state)
