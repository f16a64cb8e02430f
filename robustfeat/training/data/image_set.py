"""Labelled images, still encoded, whatever they lie in."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from robustfeat.errors import DecodeError
from robustfeat.hub.preprocessing import decode

__all__ = ["ImageSet", "Source"]


class Source(Protocol):
    """Where encoded images lie."""

    def read(self, index: int) -> bytes:
        """An image's bytes; OSError where they cannot be read."""

    def name(self, index: int) -> str:
        """What messages call it."""


@dataclass(frozen=True)
class ImageSet:
    """Labelled images, encoded.

    Attributes:
        classes: the C class names.
        labels: (N,) int64.
        source: gives each image's bytes and its name for messages.
        fingerprint: sha256 over the classes, the labels and the images' names and sizes.
    """

    classes: tuple[str, ...]
    labels: NDArray[np.int64]
    source: Source
    fingerprint: str

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Image.Image:
        """RGB, upright.

        Raises:
            DecodeError: naming the image.
        """
        try:
            return decode(self.source.read(index))
        except (DecodeError, OSError) as exc:
            raise DecodeError(f"{self.source.name(index)}: {exc}") from exc

    def original_size(self, index: int) -> tuple[int, int] | None:
        """Width and height before `image` was brought to another shape; None where it was not."""
        return None

    def subset(self, indices: NDArray[np.int64]) -> ImageSet:
        """These rows, in this order."""
        digest = hashlib.sha256(self.fingerprint.encode() + indices.tobytes()).hexdigest()
        return ImageSet(self.classes, self.labels[indices], _Subset(self.source, indices), digest)


class _Subset:
    def __init__(self, source: Source, indices: NDArray[np.int64]) -> None:
        self._source, self._indices = source, indices

    def read(self, index: int) -> bytes:
        return self._source.read(int(self._indices[index]))

    def name(self, index: int) -> str:
        return self._source.name(int(self._indices[index]))
