"""A recipe of ten steps, and a network that is a hundredth of ResNet-18: for tests of what happens around it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

from robustfeat.training import network
from robustfeat.training.recipe import Recipe

__all__ = ["NARROW", "NarrowResNet", "install", "recipe"]

NARROW = "tests.training.small:install"
"""For the `prepare` of a command."""


class NarrowResNet(ResNet):  # type: ignore[misc] # torchvision has no types
    """ResNet-18's first layer, then four stages of one block each with an eighth of its channels: 64 features.

    What `build_network` makes of it has the same layers, in the same order and with the same names, as far as they go.
    """

    def __init__(self, *, num_classes: int) -> None:
        super().__init__(BasicBlock, [1, 1, 1, 1], num_classes=num_classes)
        self.fc = nn.Linear(64, num_classes)

    def _make_layer(self, block: Any, planes: int, *rest: Any, **more: Any) -> nn.Sequential:
        stage: nn.Sequential = super()._make_layer(block, planes // 8, *rest, **more)
        return stage


def install() -> None:
    """From now on this process trains narrow networks."""
    network.resnet18 = NarrowResNet  # type: ignore[attr-defined]


def recipe(dataset: Path, **changes: object) -> Recipe:
    """Two epochs on the fixture `dataset`, of five steps with six images each."""
    values = {
        "concepts": str(dataset / "concepts.csv"), "epochs": 2, "batch_size": 6, "lr": 0.02,
        "image_sizes": ((0, 32),), "validation_size": 32, **changes,
    }  # fmt: skip
    return Recipe(**values)  # type: ignore[arg-type]
