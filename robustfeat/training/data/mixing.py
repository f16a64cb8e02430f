"""MixUp and CutMix: two images of a batch become one, and its target is shared by their classes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["Examples", "mix"]


@dataclass(frozen=True)
class Examples:
    """The images of a batch as a step and a teacher see them.

    Attributes:
        pixels: (m, 3, S, S) float32 from 0 to 255, on the device.
        labels: (m,) int64; of a mixture, of its larger part.
        rows: (m,) int64, of the training set; of a mixture, of its larger part.
        shares: (m, C) float32, each mixture's shares of classes; None where nothing is mixed.
    """

    pixels: Tensor
    labels: Tensor
    rows: Tensor | None = None
    shares: Tensor | None = None


def mix(examples: Examples, classes: int, *, mixup: float, cutmix: float, rng: np.random.Generator) -> Examples:
    """Mixes each image with another one of the batch; one draw of Beta(alpha, alpha) gives the shares of all pairs.

    The partners are a permutation of the batch. So each image is the larger part of exactly one mixture, and the
    concepts are as frequent in the batch as before.

    Args:
        examples: unmixed.
        classes: C.
        mixup, cutmix: alpha of each; 0 switches one off. With both on, either mixes half of the batches.
        rng: all random numbers come from it.

    Returns:
        The mixtures. The share of an image in a CutMix is the share of its pixels.

    Sources: MixUp (Zhang et al., ICLR 2018); CutMix (Yun et al., ICCV 2019).
    """
    pixels, labels = examples.pixels, examples.labels
    use_mixup = bool(mixup) and (not cutmix or rng.random() < 0.5)
    alpha = mixup if use_mixup else cutmix
    share = rng.beta(alpha, alpha)
    partners = torch.from_numpy(rng.permutation(len(labels)))
    others = pixels[partners.to(pixels.device, non_blocking=True)]
    if use_mixup:
        mixed = torch.lerp(others, pixels, share)
    else:
        top, bottom, left, right = _box(pixels.shape[-1], share, rng)
        mixed = pixels.clone()
        mixed[:, :, top:bottom, left:right] = others[:, :, top:bottom, left:right]
        share = 1 - (bottom - top) * (right - left) / pixels.shape[-1] ** 2
    own, other = (
        functional.one_hot(part.to(pixels.device, non_blocking=True), classes) for part in (labels, labels[partners])
    )
    larger = torch.arange(len(labels)) if share >= 0.5 else partners
    return Examples(
        mixed,
        labels[larger],
        None if examples.rows is None else examples.rows[larger],
        share * own + (1 - share) * other,
    )


def _box(side: int, share: float, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Top, bottom, left, right of a box of 1 - share of a square's area, around a random pixel, cut at the borders."""
    length = int(side * math.sqrt(1 - share))
    edges = []
    for middle in rng.integers(side, size=2).tolist():
        start = middle - length // 2
        edges += [max(start, 0), min(start + length, side)]
    return edges[0], edges[1], edges[2], edges[3]
