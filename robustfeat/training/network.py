"""The network that is trained: images to logits, and to features once its classifier is removed."""

from __future__ import annotations

from torch import nn
from torchvision.models import resnet18

__all__ = ["build_network"]


def build_network(classes: int) -> nn.Module:
    """ResNet-18 with `classes` outputs, randomly initialised; torchvision's parameter names (timm's are the same)."""
    network: nn.Module = resnet18(num_classes=classes)
    return network
