"""AVIF and HEIC images, which share a container: who reads them here, and opening them.

Pillow reads AVIF by libavif. HEIC needs pillow-heif, an extra, because its wheels hold an encoder under the GPL. Both
say an image's size before anything is decoded. How an image is turned is told by the container, whatever Exif or XMP
say: pillow-heif turns it as it loads, and Pillow puts it into the Exif data of an AVIF image.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from PIL import ImageFile, features

from robustfeat.errors import DecodeError, first_line
from robustfeat.hub.image_files import AVIF, HEIC, name_contents

__all__ = ["HEIF_FORMATS", "decoder_versions", "format_of", "is_readable", "open_heif", "use_one_thread"]

HEIF_FORMATS: Mapping[str, str] = MappingProxyType({AVIF: "AVIF", HEIC: "HEIF"})
"""The formats of this module, as Pillow calls them, by what `name_contents` says."""

_PACKAGE = "pillow_heif"
_FIXES = {
    "AVIF": "use a Pillow with AVIF, such as PyPI's from 11.3 on, or convert it to JPEG or PNG",
    "HEIF": "pip install 'robustfeat[heic]', or convert it to JPEG or PNG",
}

_SIZE = re.compile(rb"ispe\0{4}(.{4})(.{4})", re.DOTALL)
_HEAD_BYTES = 2**16
_AVIF_SIDE, _AVIF_PIXELS = 2**15, 2**28

_one_thread = False


def format_of(data: bytes) -> str | None:
    """`AVIF`, `HEIF`, or None for the bytes of any other file."""
    found = name_contents(data)
    return HEIF_FORMATS.get(found[0]) if found else None


def is_readable(name: str) -> bool:
    """Whether this installation reads `AVIF` or `HEIF`."""
    if name == "AVIF":
        return bool(features.check("avif"))
    try:
        return importlib.util.find_spec(_PACKAGE) is not None
    except ValueError:  # its entry in sys.modules is None
        return False


def decoder_versions() -> dict[str, str]:
    """The versions of installed libraries that decode these formats, but for Pillow's own."""
    if not is_readable("HEIF"):
        return {}
    from importlib.metadata import version  # loads the parser of emails, which takes as long as Pillow

    return {"pillow-heif": version("pillow-heif")}


def use_one_thread() -> None:
    """Lets libraries start one thread at most: where there is a process per processor, more cost memory alone."""
    global _one_thread  # noqa: PLW0603
    from PIL import AvifImagePlugin

    _one_thread = True
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1


def open_heif(data: bytes, name: str) -> ImageFile.ImageFile:
    """An AVIF or HEIC image, not yet decoded; of several, the primary one.

    Args:
        data: the file's bytes.
        name: `AVIF` or `HEIF`.

    Raises:
        DecodeError: it is damaged, or nothing here reads it.
    """
    what = next(said for said, format_name in HEIF_FORMATS.items() if format_name == name)
    if not is_readable(name):
        raise DecodeError(f"{what}, which this installation does not read", fix=_FIXES[name])
    # The plugins themselves: Image.open drops their reasons, and asks for plugins that the whole process then has.
    try:
        image: ImageFile.ImageFile = _plugin(name)(io.BytesIO(data))
    except ImportError as exc:
        said = f"{what}, and its decoder does not load ({first_line(exc)})"
        raise DecodeError(said, fix="pip install --force-reinstall pillow-heif") from exc
    except SyntaxError as exc:
        over = _too_large(data) if name == "AVIF" else None
        raise DecodeError(over or f"damaged: {first_line(exc)}") from exc
    image.info.pop("xmp", None)  # Pillow would take an orientation from it
    return image


def _too_large(data: bytes) -> str | None:
    """What is said of an image that libavif refuses by its size, and calls damaged."""
    for match in _SIZE.finditer(data, 0, _HEAD_BYTES):
        width, height = (int.from_bytes(side, "big") for side in match.groups())
        if max(width, height) > _AVIF_SIDE or width * height > _AVIF_PIXELS:
            limits = f"{_AVIF_PIXELS:,} pixels, and {_AVIF_SIDE:,} a side"
            return f"{width} x {height} is over the limit of libavif: {limits}"
    return None


def _plugin(name: str) -> Any:
    if name == "AVIF":
        from PIL import AvifImagePlugin

        return AvifImagePlugin.AvifImageFile
    module = importlib.import_module(_PACKAGE)
    if _one_thread:
        module.options.DECODE_THREADS = 1
    return module.HeifImageFile
