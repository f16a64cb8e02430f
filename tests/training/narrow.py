"""A network that is a hundredth of ResNet-18, for tests of what happens around a network."""

from __future__ import annotations

from typing import Any

from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

import robustfeat.training.network

__all__ = ["NARROW", "NarrowResNet", "install"]

NARROW = "tests.training.narrow:install"
"""For the `prepare` of a command."""


class NarrowResNet(ResNet):
    """ResNet-18's first layer, then four stages of one block each with an eighth of its channels: 64 features.

    What `build_network` makes of it has the same layers, in the same order and with the same names, as far as they go.
    """

    def __init__(self, *, num_classes: int) -> None:
        super().__init__(BasicBlock, [1, 1, 1, 1], num_classes=num_classes)
        self.fc = nn.Linear(64, num_classes)

    def _make_layer(self, block: Any, planes: int, *rest: Any, **more: Any) -> nn.Sequential:
        return super()._make_layer(block, planes // 8, *rest, **more)


def install() -> None:
    """From now on this process trains narrow networks."""
    robustfeat.training.network.resnet18 = NarrowResNet  # type: ignore[assignment]
