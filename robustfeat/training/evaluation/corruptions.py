"""Common corruptions: what a classifier on frozen features keeps when test images get worse, and how features drift."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
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
from robustfeat.serving.heads.head import Head
from robustfeat.serving.verify import cosine
from robustfeat.training.data.image_set import ImageSet
from robustfeat.training.evaluation.inputs import REPAIR
from robustfeat.training.evaluation.subject import Subject

__all__ = [
    "CORRUPTIONS",
    "SEVERITIES",
    "Corrupted",
    "Work",
    "classify_corrupted",
    "corrupt",
    "embed_corrupted",
    "worsen",
]

Work = Callable[[Tensor, float, torch.Generator], Tensor]
"""What is done to a (3, S, S) uint8 image, with a strength and the source of its randomness."""

Worsen = Callable[[NDArray[np.uint8], str, int, int], NDArray[np.uint8]]
"""Makes a corrupted square of a square, a name, a severity and a seed; see `corrupt`."""

SEVERITIES = (1, 2, 3, 4, 5)


def _noise(image: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    # torchvision's gaussian_noise takes no generator.
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
    return (image.int() + round(255 * more)).clamp(max=255).to(torch.uint8)


def _contrast(image: Tensor, factor: float, generator: torch.Generator) -> Tensor:
    flat: Tensor = transforms.adjust_contrast(image, factor)
    return flat


def _pixelate(image: Tensor, share: float, generator: torch.Generator) -> Tensor:
    side = image.shape[-1]
    small = functional.interpolate(image[None].float(), [max(1, int(side * share))] * 2, mode="area")
    large: Tensor = functional.interpolate(small, [side, side], mode="nearest")[0]
    return large.round().to(torch.uint8)


CORRUPTIONS: dict[str, tuple[Work, tuple[float, ...]]] = {
    "noise": (_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),
    "blur": (_blur, (0.4, 0.6, 0.7, 0.8, 1.0)),
    "jpeg": (_jpeg, (80, 65, 58, 50, 40)),
    "brightness": (_brightness, (0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": (_contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    "pixelate": (_pixelate, (0.95, 0.9, 0.85, 0.75, 0.65)),
}
"""By name: what is done, and its strength at severities 1 to 5. They are those of CIFAR-10-C (Hendrycks and Dietterich,
ICLR 2019), which are made for small images; brightness is added to each channel instead of the value of HSV, and
contrast is torchvision's, which leads to the image's mean grey instead of the mean of each channel."""


def corrupt(square: NDArray[np.uint8], name: str, severity: int, seed: int = 0) -> NDArray[np.uint8]:
    """One image, worse.

    Args:
        square: (S, S, 3) as the network sees it before normalisation.
        name: one of `CORRUPTIONS`.
        severity: 1 to 5.
        seed: random seed of the noise.

    Returns:
        (S, S, 3) uint8.
    """
    work, strengths = CORRUPTIONS[name]
    return worsen(square, work, strengths[severity - 1], seed * 10 + severity)


def worsen(square: NDArray[np.uint8], work: Work, strength: float, seed: int) -> NDArray[np.uint8]:
    """Applies a corruption to an (S, S, 3) square."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.from_numpy(square.copy()).permute(2, 0, 1)
    worse: NDArray[np.uint8] = work(image, strength, generator).permute(1, 2, 0).numpy()
    return worse


@dataclass(frozen=True, eq=False)
class Corrupted:
    """Predictions for m test images with and without corruptions.

    Attributes:
        kinds: names and severities, in the order of the rows below.
        clean: (m,) bool, whether the clean image is right.
        right: (kinds, m) bool, whether the corrupted image is right.
        drift: (kinds, m) float32, 1 - cosine between an image's features before and after.
    """

    kinds: tuple[tuple[str, int], ...]
    clean: NDArray[np.bool_]
    right: NDArray[np.bool_]
    drift: NDArray[np.float32]

    def to_dict(self) -> dict[str, Any]:
        """For JSON.

        `clean`: accuracy; `corrupted`: its mean over all kinds; `kept`: corrupted / clean; `drift`: its mean;
        `by_corruption`: accuracy and drift by name and severity.
        """
        clean, corrupted = float(self.clean.mean()), float(self.right.mean())
        by_corruption: dict[str, dict[str, Any]] = {}
        for place, (name, severity) in enumerate(self.kinds):
            by_corruption.setdefault(name, {})[str(severity)] = {
                "accuracy": float(self.right[place].mean()),
                "drift": float(self.drift[place].mean(dtype=np.float64)),
            }
        return {
            "clean": clean,
            "corrupted": corrupted,
            "kept": corrupted / clean if clean else 0.0,
            "drift": float(self.drift.mean(dtype=np.float64)),
            "by_corruption": by_corruption,
        }


def classify_corrupted(
    subject: Subject,
    head: Head,
    images: ImageSet,
    *,
    names: Sequence[str] = tuple(CORRUPTIONS),
    severities: Sequence[int] = SEVERITIES,
    quiet: bool = True,
) -> Corrupted:
    """Asks a head that was fitted on clean images about corrupted ones.

    Args:
        subject: the model.
        head: its classes are numbers.
        images: the task's test images.
        names, severities: the corruptions and severities to try.
        quiet: hide progress.

    Raises:
        DecodeError: naming an image that cannot be read.
    """
    kinds = tuple((name, severity) for name in names for severity in severities)
    clean = np.empty(len(images), np.bool_)
    right = np.empty((len(kinds), len(images)), np.bool_)
    drift = np.empty((len(kinds), len(images)), np.float32)
    for here, before, corrupted in embed_corrupted(subject, images, kinds, quiet=quiet):
        clean[here] = head.predict(before) == images.labels[here]
        for place, after in enumerate(corrupted):
            right[place, here] = head.predict(after) == images.labels[here]
            drift[place, here] = _drift(after, before)
    return Corrupted(kinds, clean, right, drift)


def embed_corrupted(
    subject: Subject,
    images: ImageSet,
    kinds: Sequence[tuple[str, int]],
    work: Worsen = corrupt,
    *,
    quiet: bool = True,
) -> Iterator[tuple[slice, NDArray[np.float32], Iterator[NDArray[np.float32]]]]:
    """Embeds images and their corrupted versions, batch by batch.

    Args:
        subject: the model.
        images: the images.
        kinds: names and severities.
        work: corrupts a square. Its seed is the row.
        quiet: hide progress.

    Yields:
        The rows of a batch, their (n, D) features, and an iterator over their features by kind.

    Raises:
        DecodeError: naming an image that cannot be read.
    """
    images = images.decoded_by(subject.contract.version)
    progress = Progress(f"{subject.name}: corruptions", len(images), quiet=quiet)
    for start in range(0, len(images), subject.batch_size):
        rows = range(start, min(start + subject.batch_size, len(images)))
        try:
            squares = np.stack([subject.prepare(images.image(row)) for row in rows])
        except DecodeError as exc:
            raise DecodeError(str(exc), fix=REPAIR) from exc
        here, before = slice(rows.start, rows.stop), subject.embed_prepared(squares)
        yield here, before, _embed_kinds(subject, squares, rows, kinds, work)
        progress.advance(len(rows))
    progress.finish()


def _embed_kinds(
    subject: Subject, squares: NDArray[np.uint8], rows: range, kinds: Sequence[tuple[str, int]], work: Worsen
) -> Iterator[NDArray[np.float32]]:
    for kind in kinds:
        worse = np.stack([work(square, *kind, row) for row, square in zip(rows, squares, strict=True)])
        yield subject.embed_prepared(worse)


def _drift(after: NDArray[np.float32], before: NDArray[np.float32]) -> NDArray[np.float64]:
    """1 - cosine; where a vector is zero 1, or 0 if both are."""
    moved = 1 - cosine(after, before)
    return np.where(np.isnan(moved), (after != before).any(1), moved)
