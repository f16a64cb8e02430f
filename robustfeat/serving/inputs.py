"""Which images a command's arguments name, in which order."""

from __future__ import annotations

import base64
import errno
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from robustfeat.errors import InputError

__all__ = ["IMAGE_SUFFIXES", "ImageFile", "Inputs", "list_folder", "list_images"]

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"})


@dataclass(frozen=True)
class ImageFile:
    """One row of the output.

    Attributes:
        file: where to read.
        path: relative to the argument's folder, POSIX.
    """

    file: Path
    path: bytes

    def read(self) -> bytes:
        """The file's bytes.

        Raises:
            OSError: it cannot be read, or is no regular file (reading a pipe or a device might never end).
        """
        if not stat.S_ISREG(self.file.stat().st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        return self.file.read_bytes()

    def index_fields(self) -> dict[str, str]:
        """`path`, and `path_bytes` (base64) where the name is not UTF-8."""
        try:
            return {"path": self.path.decode("utf-8")}
        except UnicodeDecodeError:
            lossy = self.path.decode("utf-8", "replace")
            return {"path": lossy, "path_bytes": base64.b64encode(self.path).decode("ascii")}


@dataclass(frozen=True)
class Inputs:
    """The images to embed, and how many other files lay between them."""

    images: tuple[ImageFile, ...]
    skipped: int


def list_images(arguments: Sequence[str | Path]) -> Inputs:
    """Images in the order of the arguments, within a folder in the byte order of their relative path.

    In a folder every file with an image suffix is a row, dangling links and unreadable ones included; files with
    another suffix are counted as skipped; hidden files and folders are ignored. A file named itself is always a row.

    Raises:
        InputError: an argument does not exist, or there is no image at all.
    """
    images: list[ImageFile] = []
    skipped = 0
    for argument in arguments:
        root = Path(argument)
        if root.is_dir():
            found, others = list_folder(root)
            images.extend(found)
            skipped += others
        elif os.path.lexists(root):
            images.append(ImageFile(root, os.fsencode(root.name)))
        else:
            raise InputError(f"{root}: no such file or folder; expected a folder of images or an image file")
    if not images:
        places = ", ".join(str(argument) for argument in arguments)
        aside = f" ({skipped} files with other suffixes)" if skipped else ""
        raise InputError(
            f"{places}: no images found{aside}; expected files ending in {', '.join(sorted(IMAGE_SUFFIXES))}"
        )
    return Inputs(tuple(images), skipped)


def list_folder(root: Path) -> tuple[list[ImageFile], int]:
    """The images under `root` in the byte order of their relative path, and the number of other files."""
    images: list[ImageFile] = []
    skipped = 0

    def refuse(exc: OSError) -> None:
        raise InputError(f"{exc.filename}: cannot be listed ({exc.strerror}); make it readable or leave it out")

    for folder, subfolders, names in os.walk(root, onerror=refuse):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in names:
            if name.startswith("."):
                continue
            if Path(name).suffix.lower() not in IMAGE_SUFFIXES:
                skipped += 1
                continue
            file = Path(folder, name)
            images.append(ImageFile(file, os.fsencode(file.relative_to(root).as_posix())))
    images.sort(key=lambda image: image.path)
    return images, skipped
