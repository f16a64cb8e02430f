"""Common corruptions: what a classifier on frozen features keeps when test images get worse, and how features drift."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torchvision.transforms.v2 import functional as transforms

from robustfeat.errors import DecodeError
from robustfeat.progress import Progress
from robustfeat.serving.extractor import cosine
from robustfeat.serving.heads.head import Head
from robustfeat.training.data import ImageSet
from robustfeat.training.evaluation.subject import Subject

__all__ = ["CORRUPTIONS", "SEVERITIES", "corrupt", "corruption_scores"]

SEVERITIES = (1, 2, 3, 4, 5)


def _noise(image: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    # torchvision's gaussian_noise takes no generator of one's own.
    noisy = image / 255 + sigma * torch.randn(image.shape, generator=generator)
    return (noisy.clamp(0, 1) * 255).round().to(torch.uint8)


def _blur(image: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    size = 2 * int(np.ceil(3 * sigma)) + 1
    blurred: Tensor = transforms.gaussian_blur(image, [size, size], [sigma, sigma])
    return blurred


def _jpeg(image: Tensor, quality: float, generator: torch.Generator) -> Tensor:
    # Pillow's: torchvision's own is deprecated.
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=int(quality))
    return torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1)


def _brightness(image: Tensor, more: float, generator: torch.Generator) -> Tensor:
    return (image + round(255 * more)).clamp(max=255).to(torch.uint8) if more else image


def _contrast(image: Tensor, factor: float, generator: torch.Generator) -> Tensor:
    flat: Tensor = transforms.adjust_contrast(image, factor)
    return flat


def _pixelate(image: Tensor, share: float, generator: torch.Generator) -> Tensor:
    side = image.shape[-1]
    small = functional.interpolate(image[None].float(), [max(1, int(side * share))] * 2, mode="area")
    large: Tensor = functional.interpolate(small, [side, side], mode="nearest")[0]
    return large.round().to(torch.uint8)


CORRUPTIONS: dict[str, tuple[Callable[[Tensor, float, torch.Generator], Tensor], tuple[float, ...]]] = {
    "noise": (_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),
    "blur": (_blur, (0.4, 0.6, 0.7, 0.8, 1.0)),
    "jpeg": (_jpeg, (80, 65, 58, 50, 40)),
    "brightness": (_brightness, (0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": (_contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    "pixelate": (_pixelate, (0.95, 0.9, 0.85, 0.75, 0.65)),
}
"""By name: what is done, and its strength at severities 1 to 5. They are those of CIFAR-10-C (Hendrycks and Dietterich,
ICLR 2019), which are made for small images; brightness is added to each channel instead of the value of HSV."""


def corrupt(square: NDArray[np.uint8], name: str, severity: int, seed: int = 0) -> NDArray[np.uint8]:
    """One image, worse.

    Args:
        square: (S, S, 3) as the network sees it before normalisation.
        name: one of `CORRUPTIONS`.
        severity: 1 to 5.
        seed: of the noise.

    Returns:
        (S, S, 3) uint8.
    """
    work, strengths = CORRUPTIONS[name]
    generator = torch.Generator().manual_seed(seed * 10 + severity)
    image = torch.from_numpy(square.copy()).permute(2, 0, 1)
    worse: NDArray[np.uint8] = work(image, strengths[severity - 1], generator).permute(1, 2, 0).numpy()
    return worse


def corruption_scores(
    subject: Subject,
    head: Head,
    images: ImageSet,
    *,
    names: Sequence[str] = tuple(CORRUPTIONS),
    severities: Sequence[int] = SEVERITIES,
    quiet: bool = True,
) -> dict[str, Any]:
    """Accuracy on corrupted test images of a head that was fitted on clean ones, and the drift of the features.

    Args:
        subject: the model.
        head: its classes are numbers.
        images: the task's test images.
        names, severities: what is tried.
        quiet: no progress.

    Returns:
        `clean` accuracy; `corrupted`, the mean accuracy over all kinds and severities; `kept`, corrupted / clean;
        `drift`, the mean of 1 - cosine between an image's features before and after; `by_corruption`: accuracy and
        drift by kind and severity.

    Raises:
        DecodeError: naming an image that cannot be read.
    """
    kinds = [(name, severity) for name in names for severity in severities]
    right, drift = dict.fromkeys(kinds, 0), dict.fromkeys(kinds, 0.0)
    clean_right = 0
    progress = Progress(f"{subject.name}: corruptions", len(images), quiet=quiet)
    for start in range(0, len(images), subject.batch_size):
        rows = range(start, min(start + subject.batch_size, len(images)))
        squares = np.stack([_square(subject, images, row) for row in rows])
        labels = images.labels[rows.start : rows.stop]
        clean = subject.embed_prepared(squares)
        clean_right += int((head.predict(clean) == labels).sum())
        for kind in kinds:
            worse = np.stack([corrupt(square, *kind, seed=row) for row, square in zip(rows, squares, strict=True)])
            features = subject.embed_prepared(worse)
            right[kind] += int((head.predict(features) == labels).sum())
            drift[kind] += float((1 - cosine(features, clean)).sum())
        progress.advance(len(rows))
    progress.finish()
    count, accuracy = len(images), {kind: hits / len(images) for kind, hits in right.items()}
    corrupted = float(np.mean(list(accuracy.values())))
    return {
        "clean": clean_right / count,
        "corrupted": corrupted,
        "kept": corrupted * count / clean_right if clean_right else 0.0,
        "drift": float(np.mean(list(drift.values()))) / count,
        "by_corruption": {
            name: {str(s): {"accuracy": accuracy[name, s], "drift": drift[name, s] / count} for s in severities}
            for name in names
        },
    }


def _square(subject: Subject, images: ImageSet, row: int) -> NDArray[np.uint8]:
    try:
        return subject.prepare(images.source.read(row))
    except (DecodeError, OSError) as exc:
        raise DecodeError(f"{images.source.name(row)}: {exc}") from exc
