"""Draws random crops, and cuts a whole batch of them at once on the CPU or a GPU."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["crop_boxes", "crop_squares"]


def crop_boxes(draws: NDArray[np.float64], sizes: NDArray[np.int64], min_area: float) -> NDArray[np.float64]:
    """Random boxes: between `min_area` and all of an image's area, at aspect ratios from 3/4 to 4/3.

    Args:
        draws: (m, 4) from [0, 1): area, ratio, left, top.
        sizes: (m, 2) width and height in pixels.

    Returns:
        (m, 4) left, top, width, height in pixels, fractions of them included.
    """
    width, height = sizes[:, 0].astype(np.float64), sizes[:, 1].astype(np.float64)
    area = height * width * (min_area + (1 - min_area) * draws[:, 0])
    ratio = np.exp((2 * draws[:, 1] - 1) * np.log(4 / 3))
    w, h = np.minimum(np.sqrt(area * ratio), width), np.minimum(np.sqrt(area / ratio), height)
    return np.stack([draws[:, 2] * (width - w), draws[:, 3] * (height - h), w, h], axis=1)


def crop_squares(images: Tensor, boxes: Tensor, flips: Tensor, side: int) -> Tensor:
    """Cuts one box out of each image and resizes it, as Pillow's `resize(box=..., BILINEAR)` does.

    Each pass, along rows and along columns, is a product with a matrix of that image's own weights, and ends in whole
    levels as Pillow's passes do.

    Args:
        images: (m, P, P, 3) uint8.
        boxes: (m, 4) float: left, top, width, height as fractions of the image.
        flips: (m,) bool: mirror from left to right.
        side: S.

    Returns:
        (m, 3, S, S) float32 of whole numbers from 0 to 255, on the images' device.
    """
    m, rows, columns, _ = images.shape
    boxes = boxes.to(images.device, torch.float32)
    across = _weights(boxes[:, 0] * columns, boxes[:, 2] * columns, columns, side)
    across = torch.where(flips.to(images.device).view(-1, 1, 1), across.flip(1), across)
    down = _weights(boxes[:, 1] * rows, boxes[:, 3] * rows, rows, side)
    pixels = images.permute(0, 3, 1, 2).reshape(m, 3 * rows, columns).float()
    narrow = torch.bmm(pixels, across.transpose(1, 2)).round_().clamp_(0, 255)
    small = torch.matmul(down.unsqueeze(1), narrow.view(m, 3, rows, side))
    return small.round_().clamp_(0, 255)


def _weights(start: Tensor, length: Tensor, size: int, side: int) -> Tensor:
    """(m, side, size): what each pixel of a row of `size` adds to each of `side` (a triangle, widened to shrink)."""
    scale = (length / side).view(-1, 1, 1)
    width = scale.clamp_min(1)
    middle = start.view(-1, 1, 1) + (torch.arange(side, device=start.device).view(1, -1, 1) + 0.5) * scale
    pixels = torch.arange(size, device=start.device).view(1, 1, -1) + 0.5
    weights = (1 - (pixels - middle).abs() / width).clamp_min(0)
    return weights / weights.sum(2, keepdim=True)
