"""Opens AVIF and HEIC images, which share a container.

Pillow reads AVIF with libavif. HEIC needs pillow-heif, an extra, since its wheels contain an encoder under the GPL.
Both know an image's size before decoding. The container defines the orientation, and Exif and XMP do not count:
pillow-heif rotates an image as it loads, and Pillow copies the orientation to the Exif data of an AVIF image.
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
"""Pillow's names of the formats, by the names of `name_contents`."""

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
    """Returns `AVIF` or `HEIF`, or None for the bytes of any other file."""
    found = name_contents(data)
    return HEIF_FORMATS.get(found[0]) if found else None


def is_readable(name: str) -> bool:
    """Whether this installation reads the format, `AVIF` or `HEIF`."""
    if name == "AVIF":
        return bool(features.check("avif"))
    try:
        return importlib.util.find_spec(_PACKAGE) is not None
    except ValueError:  # sys.modules has None for it
        return False


def decoder_versions() -> dict[str, str]:
    """Versions of the installed libraries that decode these formats, except Pillow's own."""
    if not is_readable("HEIF"):
        return {}
    from importlib.metadata import version  # imports the email parser, which takes as long as Pillow

    return {"pillow-heif": version("pillow-heif")}


def use_one_thread() -> None:
    """Limits the libraries to one thread. With a process per processor, more threads only cost memory."""
    global _one_thread  # noqa: PLW0603
    from PIL import AvifImagePlugin

    _one_thread = True
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1


def open_heif(data: bytes, name: str) -> ImageFile.ImageFile:
    """Opens an AVIF or HEIC image without decoding it. Of several images, the primary one counts.

    Args:
        data: the file's bytes.
        name: `AVIF` or `HEIF`.

    Raises:
        DecodeError: the image is damaged, or this installation cannot read it.
    """
    what = next(said for said, format_name in HEIF_FORMATS.items() if format_name == name)
    if not is_readable(name):
        raise DecodeError(f"{what}, which this installation does not read", fix=_FIXES[name])
    # Call the plugins directly: Image.open hides their reasons, and registers plugins for the whole process.
    try:
        image: ImageFile.ImageFile = _plugin(name)(io.BytesIO(data))
    except ImportError as exc:
        said = f"{what}, and its decoder does not load ({first_line(exc)})"
        raise DecodeError(said, fix="pip install --force-reinstall pillow-heif") from exc
    except SyntaxError as exc:
        over = _too_large(data) if name == "AVIF" else None
        raise DecodeError(over or f"damaged: {first_line(exc)}") from exc
    image.info.pop("xmp", None)  # Pillow would read an orientation from it
    return image


def _too_large(data: bytes) -> str | None:
    """The error for an image that libavif calls damaged because of its size."""
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
