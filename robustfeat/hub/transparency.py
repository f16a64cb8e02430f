"""Puts transparent images on a white background."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops

from robustfeat.errors import DecodeError

__all__ = ["key_bits", "on_white", "opacity"]

_EXTRA_SAMPLES_TAG = 338
_BITS = {"1": 1, "L;2": 2, "L;4": 4, "I;16B": 16, "RGB;16B": 16}
"""Bits per sample, by Pillow's name of a PNG file's pixels; 8 for other names."""


def key_bits(image: Image.Image) -> int:
    """Bits per sample of an opened file, in which its transparent colour is given; 8 for a loaded image."""
    tiles: Any = getattr(image, "tile", None)
    arguments = tiles[0][3] if tiles else None
    return _BITS.get(arguments, 8) if isinstance(arguments, str) else 8


def opacity(image: Image.Image, bits: int) -> Image.Image | None:
    """The opacity of each pixel in 8 bits; None if all pixels are opaque.

    An alpha of only zeros is ignored, since many programs write it for opaque images.

    Args:
        image: a loaded image.
        bits: see `key_bits`.

    Raises:
        DecodeError: the transparent colour has 16 bits per channel, of which Pillow kept 8.
    """
    key = image.info.get("transparency")
    if image.mode in {"LA", "PA", "RGBA"}:
        # The fourth channel of a TIFF may be anything unless the file calls it alpha.
        tags: Any = getattr(image, "tag_v2", {}) if image.format == "TIFF" else {_EXTRA_SAMPLES_TAG: (2,)}
        alpha = image.getchannel("A") if {1, 2} & set(tags.get(_EXTRA_SAMPLES_TAG, ())) else None
    elif image.mode == "P" and image.has_transparency_data:
        alpha = image.convert("RGBA").getchannel("A")
    elif image.mode in {"1", "L", "I;16"} and isinstance(key, int):
        alpha = _opacity_of_grey(image, key & 2**bits - 1, bits)
    elif image.mode == "RGB" and isinstance(key, tuple) and len(key) == 3:
        if bits == 16 or max(key) > 255:
            raise DecodeError(
                "PNG: a transparent colour of 16 bits per channel is not read", fix="save it with an alpha channel"
            )
        alpha = _opacity_of_colours(image, key)
    else:
        alpha = None
    if alpha is None or alpha.getbbox() is None or alpha.getextrema() == (255, 255):
        return None
    return alpha


def on_white(picture: Image.Image, alpha: Image.Image) -> Image.Image:
    """Blends an RGB picture with white: alpha * colour + (1 - alpha) * white."""
    page = Image.new("RGB", picture.size, "white")
    page.paste(picture, mask=alpha)
    return page


def _opacity_of_grey(image: Image.Image, key: int, bits: int) -> Image.Image:
    if image.mode == "I;16":
        seen: NDArray[np.bool_] = np.asarray(image) != key
        return Image.fromarray(seen.view(np.uint8) * np.uint8(255))
    key = key * 255 // (2**bits - 1)  # Pillow scales samples to 8 bits, but not the key
    grey = image.convert("L") if image.mode == "1" else image
    return grey.point([0 if value == key else 255 for value in range(256)])


def _opacity_of_colours(image: Image.Image, key: tuple[int, int, int]) -> Image.Image:
    masks = [
        image.getchannel(channel).point([0 if value == wanted else 255 for value in range(256)])
        for channel, wanted in zip("RGB", key, strict=True)
    ]
    return ImageChops.lighter(ImageChops.lighter(masks[0], masks[1]), masks[2])
