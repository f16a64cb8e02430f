"""Common corruptions whose strength suits the image's size, by the published strengths for 32, 64 and 224 px."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robustfeat.training.evaluation.corruptions import CORRUPTIONS, Work, worsen

__all__ = ["SCALED", "SIDES", "ScaledCorruption", "corrupt_to_scale"]

SIDES = (32, 64, 224)
"""Sides in pixels that have published strengths: CIFAR-10-C, Tiny ImageNet-C and ImageNet-C."""


def _shot(image: Tensor, photons: float, generator: torch.Generator) -> Tensor:
    counted = torch.poisson(image / 255 * photons, generator=generator) / photons
    return (counted.clamp(0, 1) * 255).round().to(torch.uint8)


def _impulse(image: Tensor, share: float, generator: torch.Generator) -> Tensor:
    hit = torch.rand(image.shape, generator=generator) < share
    white = torch.rand(image.shape, generator=generator) < 0.5
    return torch.where(hit, white.to(torch.uint8) * 255, image)


@dataclass(frozen=True)
class ScaledCorruption:
    """A corruption with the strengths at severities 1 to 5.

    Attributes:
        work: what is done.
        strengths: five strengths for each of `SIDES`.
        in_pixels: whether the strength is a length, which grows with images above 224 px.
    """

    work: Work
    strengths: tuple[tuple[float, ...], ...]
    in_pixels: bool = False

    def strength(self, severity: int, side: int) -> float:
        """The strength for an image of this side in pixels.

        It is linear in the logarithm of the side between two of `SIDES`, and constant beyond them.
        """
        published = [five[severity - 1] for five in self.strengths]
        strength = float(np.interp(math.log(side), [math.log(one) for one in SIDES], published))
        return strength * max(1.0, side / SIDES[-1]) if self.in_pixels else strength


def _known(name: str, at_64: tuple[float, ...], at_224: tuple[float, ...], in_pixels: bool = False) -> ScaledCorruption:
    """A corruption of `CORRUPTIONS`, whose strengths are the published ones at 32 px."""
    work, at_32 = CORRUPTIONS[name]
    return ScaledCorruption(work, (at_32, at_64, at_224), in_pixels)


SCALED = {
    "noise": _known("noise", (0.04, 0.08, 0.12, 0.15, 0.18), (0.08, 0.12, 0.18, 0.26, 0.38)),
    "shot noise": ScaledCorruption(_shot, ((500, 250, 100, 75, 50), (250, 100, 50, 30, 15), (60, 25, 12, 5, 3))),
    "impulse noise": ScaledCorruption(
        _impulse, ((0.01, 0.02, 0.03, 0.05, 0.07), (0.01, 0.02, 0.05, 0.08, 0.14), (0.03, 0.06, 0.09, 0.17, 0.27))
    ),
    "blur": _known("blur", (0.5, 0.75, 1, 1.25, 1.5), (1, 2, 3, 4, 6), in_pixels=True),
    "jpeg": _known("jpeg", (65, 58, 50, 40, 25), (25, 18, 15, 10, 7)),
    "brightness": _known("brightness", (0.1, 0.2, 0.3, 0.4, 0.5), (0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": _known("contrast", (0.4, 0.3, 0.2, 0.1, 0.05), (0.4, 0.3, 0.2, 0.1, 0.05)),
    "pixelate": _known("pixelate", (0.9, 0.8, 0.7, 0.6, 0.5), (0.6, 0.5, 0.4, 0.3, 0.25)),
}
"""By name, with the strengths of Hendrycks and Dietterich (ICLR 2019)."""


def corrupt_to_scale(square: NDArray[np.uint8], name: str, severity: int, seed: int = 0) -> NDArray[np.uint8]:
    """One image, worse by a severity that suits its size.

    Args:
        square: (S, S, 3) as the network sees it before normalisation.
        name: one of `SCALED`.
        severity: 1 to 5.
        seed: random seed of the noise.

    Returns:
        (S, S, 3) uint8.
    """
    kind = SCALED[name]
    return worsen(square, kind.work, kind.strength(severity, len(square)), seed * 10 + severity)
