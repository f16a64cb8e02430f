"""Labelled, encoded images from any source."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from robustfeat.errors import DecodeError
from robustfeat.hub.heif import is_readable
from robustfeat.hub.preprocessing import CONTRACT_VERSION, decode

__all__ = ["ImageSet", "Source", "decoding_key", "sort_classes"]


class Source(Protocol):
    """A source of encoded images."""

    def read(self, index: int) -> bytes:
        """An image's bytes; OSError where they cannot be read."""

    def name(self, index: int) -> str:
        """The name in messages."""


def decoding_key(preprocessing_version: int) -> dict[str, int]:
    """The part of a decoded-image file's key for the version. Version 1 keeps the keys from before there were versions.

    Where HEIC is read is said, too: a file of where it is not has such images as bad.
    """
    key = {"preprocessing_version": preprocessing_version} if preprocessing_version > 1 else {}
    return key | ({"heic": 1} if is_readable("HEIF") else {})


@runtime_checkable
class _Divisible(Protocol):
    """A source that wants to know which of its rows are left."""

    def subset(self, indices: NDArray[np.int64]) -> Source: ...


@dataclass(frozen=True)
class ImageSet:
    """Labelled images, encoded.

    Attributes:
        classes: the C class names.
        labels: (N,) int64.
        source: gives each image's bytes and its name for messages.
        fingerprint: sha256 over the classes, the labels and the images' names and sizes.
        blocks: (B + 1,) int64, where each block of rows that are read together begins, and last N; None where any row
            is as quick as any other.
        remarks: remarks for the user, such as skipped files or the origin.
        preprocessing_version: version of the contract by which `image` decodes.
    """

    classes: tuple[str, ...]
    labels: NDArray[np.int64]
    source: Source
    fingerprint: str
    blocks: NDArray[np.int64] | None = None
    remarks: tuple[str, ...] = ()
    preprocessing_version: int = CONTRACT_VERSION

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> bytes:
        """An image as it is encoded.

        Raises:
            DecodeError: naming the image.
        """
        try:
            return self.source.read(index)
        except (DecodeError, OSError) as exc:
            reason = exc.strerror if isinstance(exc, OSError) and exc.strerror else exc
            raise DecodeError(f"{self.source.name(index)}: {reason}") from exc

    def image(self, index: int) -> Image.Image:
        """RGB, upright.

        Raises:
            DecodeError: naming the image.
        """
        data = self.read(index)
        try:
            return decode(data, version=self.preprocessing_version)
        except DecodeError as exc:
            raise DecodeError(f"{self.source.name(index)}: {exc}") from exc

    def original_sizes(self, indices: NDArray[np.int64]) -> NDArray[np.int64] | None:
        """(m, 2) widths and heights of these images themselves; None where `image` returns them as they are."""
        return None

    def decoded_by(self, preprocessing_version: int) -> ImageSet:
        """The images, decoded by this version of the preprocessing contract."""
        return replace(self, preprocessing_version=preprocessing_version)

    def subset(self, indices: NDArray[np.int64]) -> ImageSet:
        """A subset of rows in this order. Ascending rows keep the blocks."""
        digest = hashlib.sha256(self.fingerprint.encode() + indices.tobytes()).hexdigest()
        blocks = None
        if self.blocks is not None and (np.diff(indices) > 0).all():
            blocks = np.unique(np.searchsorted(indices, self.blocks))  # without those that are empty now
        source = self.source.subset(indices) if isinstance(self.source, _Divisible) else _Subset(self.source, indices)
        version = self.preprocessing_version
        return ImageSet(self.classes, self.labels[indices], source, digest, blocks, self.remarks, version)


class _Subset:
    def __init__(self, source: Source, indices: NDArray[np.int64]) -> None:
        self._source, self._indices = source, indices

    def read(self, index: int) -> bytes:
        return self._source.read(int(self._indices[index]))

    def name(self, index: int) -> str:
        return self._source.name(int(self._indices[index]))


def sort_classes(labels: Iterable[object]) -> tuple[str, ...]:
    """Class names out of labels, each once: by number where all are integers ("2" before "10")."""
    names = {str(label) for label in labels}
    if all(re.fullmatch("-?[0-9]+", name) for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))
