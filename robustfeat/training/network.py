"""The network that is trained: images to logits, and to features once its classifier is removed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import resnet18

__all__ = ["FirstConv", "build_network"]


def build_network(classes: int) -> nn.Module:
    """ResNet-18 with `classes` outputs, randomly initialised; torchvision's parameter names (timm's are the same)."""
    network: Any = resnet18(num_classes=classes)
    first = FirstConv()
    first.weight = network.conv1.weight
    network.conv1 = first
    return network  # type: ignore[no-any-return]


class FirstConv(nn.Conv2d):
    """ResNet's first layer, 7 x 7 with stride 2, with a faster gradient with regard to the images on a CPU.

    No ordinary training asks for that gradient; HRRL does at each step, and three output channels are slow to compute:
    42 ms of 600 for 256 images of 64 px in bf16. The same sum, written as a convolution with stride 1 to twelve
    channels, one for each colour and each of the four positions that a stride of 2 tells apart, is 2.3 times as fast.
    """

    def __init__(self) -> None:
        super().__init__(3, 64, kernel_size=7, stride=2, padding=3, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """(m, 3, H, W) to (m, 64, H / 2, W / 2), rounded up."""
        if images.device.type != "cpu" or not (torch.is_grad_enabled() and images.requires_grad):
            return super().forward(images)
        output: Tensor = _ImageGradient.apply(super().forward(images.detach()), images, self.weight)
        return output


class _ImageGradient(torch.autograd.Function):
    """Passes the layer's output on, and its gradient both to it (for the weights) and, convolved, to the images."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, images: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.height, ctx.width, ctx.dtype = *images.shape[2:], images.dtype
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        (weight,) = ctx.saved_tensors
        # Image row 2 i + a meets output row i - 1 + u through the kernel's row a + 5 - 2 u, u = 0 to 3; columns alike.
        parts = functional.pad(weight.to(gradient.dtype), (1, 0, 1, 0)).view(64, 3, 4, 2, 4, 2)
        kernel = parts.flip(2, 4).permute(1, 3, 5, 0, 2, 4).reshape(12, 64, 4, 4)
        shifted = functional.conv2d(gradient, kernel.contiguous(memory_format=torch.channels_last), padding=2)
        images = functional.pixel_shuffle(shifted[:, :, 1:, 1:], 2)
        return gradient, images[:, :, : ctx.height, : ctx.width].to(ctx.dtype), None
