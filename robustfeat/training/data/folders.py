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

__all__ = ["ImageFiles", "class_folders", "open_folders"]


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
    """The images under `root`, one folder a class; a remark tells of files that are passed over.

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
    names: list[str] = []
    labels: list[int] = []
    loose = (entry for entry in root.iterdir() if entry.is_file() and not entry.name.startswith("."))
    left_out = Counter({"beside the folders": sum(entry.suffix.lower() in IMAGE_SUFFIXES for entry in loose)})
    digest = hashlib.sha256("\n".join(classes).encode(errors="surrogateescape"))
    for label, name in enumerate(classes):
        images, others = list_folder(root / name) if (root / name).is_dir() else ([], {})
        left_out.update(others)
        for image in images:
            names.append(f"{name}/{image.path}")
            labels.append(label)
            # A dangling link has no size; it is left out, and named, when its turn comes.
            size = Path(image.file).stat().st_size if Path(image.file).exists() else -1
            digest.update(f"{names[-1]}\0{size}\n".encode(errors="surrogateescape"))
    if not names:
        raise DataError(f"{root}: holds no images; expected files ending in {', '.join(sorted(IMAGE_SUFFIXES))}")
    remarks: tuple[str, ...] = ()
    if said := say_left_out(+left_out):
        remarks = (f"{root}: {said}; images are in CLASS/ and end in {', '.join(sorted(IMAGE_SUFFIXES))}",)
    return ImageSet(classes, np.array(labels, np.int64), ImageFiles(root, names), digest.hexdigest(), remarks=remarks)
