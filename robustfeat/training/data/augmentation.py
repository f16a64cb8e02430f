"""Applies torchvision's TrivialAugment and random erasing, with random numbers from a seed per image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms import InterpolationMode, RandomErasing, TrivialAugmentWide

__all__ = ["Augmentation"]


class Augmentation:
    """Changes crops, after they are flipped.

    Args:
        trivial_augment: one of 14 operations at a random strength, such as a rotation or a contrast.
        erasing: probability that a rectangle of 2 to 33 % of the area becomes `fill`.
        fill: the mean colour of the network's input, from 0 to 1: it is 0 after the normalisation.

    Sources: TrivialAugment (Mueller and Hutter, ICCV 2021), in the wide space; random erasing (Zhong et al., AAAI
    2020). Interpolation and fill are as in torchvision's training recipes.
    """

    def __init__(self, *, trivial_augment: bool, erasing: float, fill: Sequence[float]) -> None:
        self._change = TrivialAugmentWide(interpolation=InterpolationMode.BILINEAR) if trivial_augment else None
        self._erase = RandomErasing(erasing, value=[round(255 * part) for part in fill]) if erasing else None

    def __call__(self, square: NDArray[np.uint8], seed: int) -> NDArray[np.uint8]:
        """(S, S, 3) to another of this shape; PyTorch's global random numbers stay where they are."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            if self._change is not None:
                square = np.asarray(self._change(Image.fromarray(square)))
            if self._erase is None:
                return square
            erased: NDArray[np.uint8] = self._erase(torch.from_numpy(square.copy()).permute(2, 0, 1)).numpy()
            return erased.transpose(1, 2, 0)
