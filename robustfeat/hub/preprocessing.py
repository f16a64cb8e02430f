"""Prepares the network's input from the bytes of an image file, with only NumPy and Pillow.

Training's evaluation, bulk embedding and serving all call these functions, so they all compute the same vectors. The
steps, in order:

1. `decode` reads the first frame, applies the EXIF orientation, scales 16 bits to 8, converts to RGB, and puts
   transparent pixels on white (version 1 of the contract dropped the alpha and showed hidden pixels).
2. `resize_and_crop` resizes the shorter side to floor(image_size / crop_pct), antialiased, then takes the centre square
   (other crop modes squash or pad the image).
3. `normalise` scales to [0, 1], subtracts the mean, divides by the standard deviation, and puts channels first.

Steps 2 and 3 agree with torchvision's `Resize`, `CenterCrop` and `Normalize` on a Pillow image to one of 255 levels.
They differ because only the pixels inside the crop are computed.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.ImageFile import ImageFile

from robustfeat.errors import DecodeError, first_line
from robustfeat.hub.heif import HEIF_FORMATS, format_of, is_readable, open_heif
from robustfeat.hub.image_files import name_contents, without_png_metadata
from robustfeat.hub.tiff import refuse_misread
from robustfeat.hub.transparency import key_bits, on_white, opacity

__all__ = [
    "BYTES_PER_PIXEL",
    "CONTRACT_VERSION",
    "CROP_MODES",
    "FORMATS",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "INTERPOLATIONS",
    "MAX_PIXELS",
    "Preprocessing",
    "crop_share",
    "decode",
    "image_size",
    "normalise",
    "prepare_square",
    "preprocess",
    "readable_formats",
    "resize_and_crop",
    "to_rgb",
]

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF")
"""Formats that are read by default, recognised by content. HEIF (HEIC) needs the extra `heic`. EPS is never added,
since reading it starts an interpreter."""

CONTRACT_VERSION = 2
"""Version for new models. Version 1, which dropped the alpha of transparent images, stays for models that have it."""

MAX_PIXELS = 100_000_000
"""Largest accepted image. Larger ones are refused from their header, without decoding."""

BYTES_PER_PIXEL = 24
"""Most memory for decoding, besides the file: 4 for RGB, 8 with rotation, 16 for WebP, 22 for AVIF and HEIC with alpha
and more than 8 bits, 23 for WebP with alpha."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

INTERPOLATIONS = {
    name: Image.Resampling[name.upper()] for name in ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")
}
"""Filters by timm's names. All except nearest are antialiased."""

CROP_MODES = ("center", "squash", "border")
"""Crop modes by timm's names."""

_CHOICES = {
    "interpolation": tuple(INTERPOLATIONS),
    "crop_mode": CROP_MODES,
    "crop_rounding": ("even", "down"),
    "channel_order": ("rgb", "bgr"),
}
_LATER = {"crop_mode": "center", "crop_rounding": "even", "channel_order": "rgb"}
"""Fields added after version 2. They are omitted at these values, so older hashes stay valid."""

_ORIENTATION_TAG = 0x0112
_TURNING = ("exif", "xmp", "Raw profile type exif", "XML:com.adobe.xmp")
"""Keys of an image's `info` in which Pillow looks for an orientation."""
_BITS_TAG, _PHOTOMETRIC_TAG = 258, 262
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Preprocessing:
    """The preprocessing contract of a model, which fully determines the network's input.

    Attributes:
        image_size: side S of the network's square input, in pixels.
        crop_pct: the shorter side is resized to floor(S / crop_pct) before the centre crop, as in timm.
        interpolation: one of `INTERPOLATIONS`.
        mean, std: per channel, in the order of `channel_order`, for values in [0, 1].
        version: version of the contract. It decides how `decode` treats transparent images.
        crop_mode: how an image becomes a square. With R = floor(S / crop_pct): `center` resizes the shorter side to R.
            `squash` resizes both sides to R and changes the aspect ratio. `border` resizes the longer side to R and
            pads the shorter one with the mean colour. Each then takes the centre S x S.
        crop_rounding: how fractional margins of the centre crop are rounded: `even` to the nearest, ties to even, as in
            torchvision and timm; `down` as in transformers.
        channel_order: `rgb` or `bgr`.
    """

    image_size: int
    crop_pct: float = 1.0
    interpolation: str = "bilinear"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    version: int = CONTRACT_VERSION
    crop_mode: str = "center"
    crop_rounding: str = "even"
    channel_order: str = "rgb"

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", tuple(float(value) for value in self.mean))
        object.__setattr__(self, "std", tuple(float(value) for value in self.std))
        object.__setattr__(self, "crop_pct", float(self.crop_pct))
        if type(self.version) is not int or not 1 <= self.version <= CONTRACT_VERSION:
            raise ValueError(f"version must be from 1 to {CONTRACT_VERSION}; got {self.version!r}: update robustfeat")
        if not 8 <= self.image_size <= 4096:
            raise ValueError(f"image_size must be between 8 and 4096; got {self.image_size}")
        if not 0.1 <= self.crop_pct <= 1.0:
            raise ValueError(f"crop_pct must be between 0.1 and 1; got {self.crop_pct}")
        for name, options in _CHOICES.items():
            if getattr(self, name) not in options:
                raise ValueError(f"{name} must be one of {', '.join(options)}; got {getattr(self, name)!r}")
        in_range = all(-1e6 <= value <= 1e6 for value in self.mean) and all(1e-6 <= value <= 1e6 for value in self.std)
        if len(self.mean) != 3 or len(self.std) != 3 or not in_range:
            raise ValueError(
                "mean and std must hold three numbers, mean from -1e6 to 1e6 and std from 1e-6 to 1e6; got "
                f"{list(self.mean)} and {list(self.std)}"
            )

    @property
    def resize_size(self) -> int:
        """R in pixels: the size of the shorter side, or of the side that `crop_mode` selects, after resizing."""
        return math.floor(self.image_size / self.crop_pct)

    @property
    def hash(self) -> str:
        """sha256 of the contract, 64 hex digits. Equal hashes mean equal inputs for equal files."""
        canonical = self._fields()
        canonical["contract"] = canonical.pop("version")
        return hashlib.sha256(json.dumps(canonical, sort_keys=True).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON. Version 1 is omitted, since it was written before there were versions."""
        data = {**self._fields(), "mean": list(self.mean), "std": list(self.std)}
        if self.version == 1:
            del data["version"]
        return data

    def _fields(self) -> dict[str, Any]:
        """The fields, without those of `_LATER` at their defaults."""
        return {name: value for name, value in asdict(self).items() if _LATER.get(name) != value}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Preprocessing:
        """Reverses `to_dict`.

        Raises:
            ValueError: a key is unknown or missing, or a value is out of range.
        """
        data = {"version": 1, **_LATER, **data}
        known = {field.name for field in fields(cls)}
        if set(data) != known:
            odd = sorted(set(data) ^ known)
            raise ValueError(f"preprocessing needs exactly {sorted(known)}; check {odd}")
        return cls(**data)


class TooLargeError(DecodeError):
    """The image has more pixels than the limit."""


def decode(
    data: bytes,
    *,
    version: int = CONTRACT_VERSION,
    formats: Sequence[str] = FORMATS,
    max_pixels: int = MAX_PIXELS,
    at_least: int | None = None,
) -> Image.Image:
    """Decodes an image file.

    Args:
        data: the file's bytes.
        version: version of the contract.
        formats: Pillow's names of the accepted formats.
        max_pixels: largest accepted image; larger ones are refused before decoding.
        at_least: smallest length in pixels of a JPEG's shorter side. Larger JPEGs may be decoded at a half, a quarter
            or an eighth of their size.

    Returns:
        An upright RGB image.

    Raises:
        DecodeError: the file cannot be decoded; the message is one line.
    """
    if not data:
        raise DecodeError("the file is empty")
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > 2 * Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels  # Pillow refuses twice this limit
    try:
        with _open(data, formats) as image:
            is_heif = image.format == "HEIF"  # its thumbnail may show anything
            if at_least is not None and image.width * image.height <= max_pixels and not is_heif:
                image.draft(None, (at_least, at_least))  # other formats ignore it
            return to_rgb(image, version=version, max_pixels=max_pixels)
    except DecodeError:
        raise
    except UnidentifiedImageError:
        raise _unidentified(data, formats) from None
    except Image.DecompressionBombError:
        raise TooLargeError(f"over the limit of {max_pixels:,} pixels") from None
    except MemoryError:
        raise DecodeError("out of memory while decoding") from None
    except Exception as exc:  # Pillow's plugins raise almost any error for damaged files
        raise DecodeError(f"damaged: {first_line(exc)}") from exc


def image_size(data: bytes) -> tuple[int, int]:
    """Reads width and height in pixels from an image file's header, without applying the orientation.

    Raises:
        DecodeError: the header cannot be read.
    """
    try:
        with _open(data, FORMATS) as image:
            return image.size
    except Exception as exc:  # see `decode`
        raise DecodeError(f"damaged: {first_line(exc)}") from exc


def readable_formats(formats: Sequence[str] = FORMATS) -> tuple[str, ...]:
    """Filters formats to those that this installation reads."""
    return tuple(name for name in formats if name not in HEIF_FORMATS.values() or is_readable(name))


def _open(data: bytes, formats: Sequence[str]) -> ImageFile:
    """Opens an image and reads its header. Of an animation or a collection, the first shown image counts."""
    name = format_of(data)
    if name is not None and name in formats:
        return open_heif(data, name)
    others = [name for name in formats if name not in HEIF_FORMATS.values()]
    return Image.open(io.BytesIO(without_png_metadata(data)), formats=others)


def _unidentified(data: bytes, formats: Sequence[str]) -> DecodeError:
    wanted = f"not an image of these formats: {', '.join(readable_formats(formats))}"
    what, fix = name_contents(data) or ("", None)
    return DecodeError(f"{wanted}; it is {what}" if what else wanted, fix=fix)


def to_rgb(image: Image.Image, *, version: int = CONTRACT_VERSION, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Converts an open Pillow image to the network's view: first frame, upright, 8-bit RGB.

    Transparent pixels are put on white. Version 1 of the contract drops the alpha instead.

    Raises:
        DecodeError: the image has too many pixels or a pixel type without a defined range (32-bit integers or floats),
            or is a TIFF that Pillow misreads.
    """
    sees_alpha = version > 1
    width, height = image.size
    if width * height > max_pixels:
        raise TooLargeError(f"{width} x {height} is over the limit of {max_pixels:,} pixels")
    if image.format == "TIFF":
        refuse_misread(image.tag_v2, sees_alpha=sees_alpha)  # type: ignore[attr-defined]
    bits = key_bits(image)
    image.load()  # first, since Pillow rotates a TIFF at load and then removes its orientation
    orientation = _orientation(image)
    if image.mode in {"RGBa", "La"}:  # HEIC with premultiplied alpha
        image = image.convert(image.mode.upper())
    alpha = opacity(image, bits) if sees_alpha else None
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_8_bits(image)
    if image.mode != "RGB":
        image = image.convert("RGB")
    if alpha is not None:
        image = on_white(image, alpha)
    if orientation not in _TRANSPOSE:
        return image
    image = image.transpose(_TRANSPOSE[orientation])
    for name in _TURNING:  # the image is upright now
        image.info.pop(name, None)
    return image


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # damaged metadata must not lose the picture
        return 1


def _to_8_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    tags = getattr(image, "tag_v2", {})  # Pillow does not invert a TIFF of more than 8 bits
    if values.dtype.kind == "f" or values.min(initial=0) < 0 or values.max(initial=0) > 65535:
        raise DecodeError(f"pixel mode {image.mode} has no defined range", fix="save it with 8 or 16 bits per channel")
    bits = 12 if tags.get(_BITS_TAG) == (12,) else 16
    if tags.get(_PHOTOMETRIC_TAG) == 0:
        values = values ^ 2**bits - 1  # white is zero
    # Keep the high byte, as Pillow does for a 16-bit RGB file, so grey and colour files agree.
    return Image.fromarray((values >> bits - 8).astype(np.uint8))


def resize_and_crop(image: Image.Image, contract: Preprocessing) -> NDArray[np.uint8]:
    """Resizes and crops to the network's square, in 8 bits.

    Args:
        image: an RGB image.

    Returns:
        (S, S, 3) uint8.
    """
    width, height = image.size
    size = contract.image_size
    new_width, new_height = _resized(width, height, contract)
    if new_width < size or new_height < size:
        return _padded(image, (new_width, new_height), contract)
    left, top = _margin(new_width, contract), _margin(new_height, contract)
    if (new_width, new_height) == (width, height):
        return np.asarray(image.crop((left, top, left + size, top + size)))
    if contract.crop_mode != "center" or contract.interpolation not in {"bilinear", "bicubic"}:
        whole = image.resize((new_width, new_height), INTERPOLATIONS[contract.interpolation])
        return np.asarray(whole.crop((left, top, left + size, top + size)))
    # The box is in the original's coordinates, so pixels outside the crop are not resized. Pillow keeps it in single
    # precision, which changes a few pixels by one level with these two filters, and more with others.
    x, y = width / new_width, height / new_height
    box = (left * x, top * y, min((left + size) * x, width), min((top + size) * y, height))
    return np.asarray(image.resize((size, size), INTERPOLATIONS[contract.interpolation], box))


def _margin(side: int, contract: Preprocessing) -> int:
    """The margin before the centre crop, in pixels."""
    extra = side - contract.image_size
    # round() rounds ties to even, as in torchvision's centre crop.
    return extra // 2 if contract.crop_rounding == "down" else round(extra / 2)


def _resized(width: int, height: int, contract: Preprocessing) -> tuple[int, int]:
    """Width and height of the whole image after resizing."""
    side = contract.resize_size
    if contract.crop_mode == "squash":
        return side, side
    if contract.crop_mode == "border":
        ratio = max(width, height) / side
        return max(1, round(width / ratio)), max(1, round(height / ratio))
    if width <= height:
        return side, int(side * height / width)
    return int(side * width / height), side


def _padded(image: Image.Image, resized: tuple[int, int], contract: Preprocessing) -> NDArray[np.uint8]:
    """Pastes the resized image into the middle of a square of the mean colour, and crops to the square."""
    size = contract.image_size
    pixels = np.asarray(image.resize(resized, INTERPOLATIONS[contract.interpolation]))
    square = np.empty((size, size, 3), np.uint8)
    colour = [min(255, max(0, round(255 * value))) for value in contract.mean]
    square[:] = colour if contract.channel_order == "rgb" else colour[::-1]
    source, target = zip(*(_overlap(side, contract) for side in pixels.shape[:2]), strict=True)
    square[target] = pixels[source]
    return square


def _overlap(side: int, contract: Preprocessing) -> tuple[slice, slice]:
    """The overlap of a centred line of pixels and a square, in coordinates of the line and of the square."""
    size = contract.image_size
    if side < size:
        start = (size - side) // 2
        return slice(0, side), slice(start, start + side)
    start = _margin(side, contract)
    return slice(start, start + size), slice(0, size)


def prepare_square(
    data: bytes, contract: Preprocessing, *, scaled: bool = False, max_pixels: int = MAX_PIXELS
) -> NDArray[np.uint8]:
    """Decodes an image file to the network's square.

    Args:
        data: the file's bytes.
        scaled: decode a large JPEG at a fraction of its size, but at least twice the resized size. This is up to
            several times as fast and changes features slightly (docs/embedding.md has figures).
        max_pixels: see `decode`.

    Returns:
        (S, S, 3) uint8.

    Raises:
        DecodeError: the file cannot be decoded; the message is one line.
    """
    at_least = 2 * contract.resize_size if scaled else None
    image = decode(data, version=contract.version, max_pixels=max_pixels, at_least=at_least)
    return resize_and_crop(image, contract)


def normalise(
    squares: NDArray[np.uint8], contract: Preprocessing, out: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """Normalises (N, S, S, 3) uint8 to contiguous (N, 3, S, S) float32: ((v / 255) - mean) / std.

    The squares are RGB. The result has the contract's `channel_order`, and is written to `out` if given.
    """
    if contract.channel_order == "bgr":
        squares = squares[..., ::-1]
    mean = np.asarray(contract.mean, np.float32)[:, None, None]
    std = np.asarray(contract.std, np.float32)[:, None, None]
    # Transposing the small array first, then working in place, is six times as fast as the formula in one line.
    if out is None:
        out = np.empty((len(squares), 3, *squares.shape[1:3]), np.float32)
    np.copyto(out, squares.transpose(0, 3, 1, 2))
    out /= np.float32(255)
    out -= mean
    out /= std
    return out


def preprocess(images: Sequence[Image.Image], contract: Preprocessing) -> NDArray[np.float32]:
    """Prepares the network's input from decoded images.

    Args:
        images: RGB images, which may differ in size.

    Returns:
        (N, 3, S, S) float32.
    """
    if not images:
        return np.empty((0, 3, contract.image_size, contract.image_size), np.float32)
    return normalise(np.stack([resize_and_crop(image, contract) for image in images]), contract)


def crop_share(size: int, resized: int) -> float:
    """The `crop_pct` with which a contract resizes to exactly `resized` pixels, despite rounding."""
    share = size / resized
    while math.floor(size / share) < resized:
        share = math.nextafter(share, 0)
    return share
