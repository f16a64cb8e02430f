"""Class folders: `CLASS/image.jpg`."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from robustfeat.errors import DataError
from robustfeat.serving.inputs.choice import IMAGE_SUFFIXES, say_left_out
from robustfeat.serving.inputs.listing import list_folder
from robustfeat.serving.inputs.sources import ImageSource
from robustfeat.training.data.image_set import ImageSet

__all__ = ["UNLABELLED", "ImageFiles", "class_folders", "holds_bare_images", "open_bare_folder", "open_folders"]

UNLABELLED = ("unlabelled",)
"""The classes of images without labels."""


class ImageFiles:
    """Image bytes from files under a folder, as a `Source`."""

    def __init__(self, root: Path, names: Sequence[str]) -> None:
        self._root, self._names = root, names

    def read(self, index: int) -> bytes:
        """See `Source`."""
        return ImageSource(self._names[index], str(self._root / self._names[index])).read()

    def name(self, index: int) -> str:
        """See `Source`."""
        return self._names[index]


def class_folders(root: Path) -> list[str]:
    """Names of the folders in `root` that hold image files."""
    folders = (entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    return sorted(
        folder.name for folder in folders if any(file.suffix.lower() in IMAGE_SUFFIXES for file in folder.iterdir())
    )


def open_folders(root: Path, classes: tuple[str, ...] | None = None) -> ImageSet:
    """Reads the images under `root`, one folder per class. A remark counts skipped files.

    Args:
        classes: of the training split, for another split; by default the folders' names, sorted.

    Raises:
        DataError: there are no class folders, no images, or a class that the training split lacks.
    """
    found = tuple(sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")))
    if not found:
        raise DataError(f"{root}: holds no class folders; expected {root.name}/CLASS/image.jpg")
    classes = classes or found
    unknown = sorted(set(found) - set(classes))
    if unknown:
        raise DataError(f"{root}: class {unknown[0]!r} is not in the training split", fix="remove it or add it there")
    loose = (entry for entry in root.iterdir() if entry.is_file() and not entry.name.startswith("."))
    left_out = Counter({"beside the folders": sum(entry.suffix.lower() in IMAGE_SUFFIXES for entry in loose)})
    listing = _Listing(root, "\n".join(classes))
    for label, name in enumerate(classes):
        if (root / name).is_dir():
            left_out.update(listing.add(root / name, f"{name}/", label))
    return listing.image_set(classes, left_out, "in CLASS/ and end")


def holds_bare_images(root: Path) -> bool:
    """Whether images are in `root` itself, or in no folder that could be a class."""
    files = (entry for entry in root.iterdir() if entry.is_file() and not entry.name.startswith("."))
    return any(file.suffix.lower() in IMAGE_SUFFIXES for file in files) or len(class_folders(root)) < 2


def open_bare_folder(root: Path) -> ImageSet:
    """The images under `root`, however deep, without labels.

    Raises:
        DataError: there are none.
    """
    listing = _Listing(root, "")
    return listing.image_set(UNLABELLED, Counter(listing.add(root, "", 0)), "those that end")


class _Listing:
    """Image files of a split, with their labels."""

    def __init__(self, root: Path, head: str) -> None:
        self._root = root
        self._names: list[str] = []
        self._labels: list[int] = []
        self._digest = hashlib.sha256(head.encode(errors="surrogateescape"))

    def add(self, folder: Path, prefix: str, label: int) -> dict[str, int]:
        """Adds the images of a folder, and counts skipped files by kind."""
        images, others = list_folder(folder)
        for image in images:
            name = f"{prefix}{image.path}"
            self._names.append(name)
            self._labels.append(label)
            # A broken link has no size. It is reported as a bad image later.
            size = Path(image.file).stat().st_size if Path(image.file).exists() else -1
            self._digest.update(f"{name}\0{size}\n".encode(errors="surrogateescape"))
        return others

    def image_set(self, classes: tuple[str, ...], left_out: Counter[str], taken: str) -> ImageSet:
        """The added images. A remark counts skipped files.

        Raises:
            DataError: it is nothing.
        """
        suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
        if not self._names:
            raise DataError(f"{self._root}: holds no images; expected files ending in {suffixes}")
        said = say_left_out(+left_out)
        remarks = (f"{self._root}: {said}; images are {taken} in {suffixes}",) if said else ()
        labels = np.array(self._labels, np.int64)
        source = ImageFiles(self._root, self._names)
        return ImageSet(classes, labels, source, self._digest.hexdigest(), remarks=remarks)
