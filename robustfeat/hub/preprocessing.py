"""From the bytes of an image file to the network's input, in NumPy and Pillow alone.

Training's evaluation, bulk embedding and serving all call these functions, so that a vector computed in one
place equals a vector computed in another. The steps, in order:

1. `decode`: the first frame, EXIF orientation applied, 16 bits scaled to 8, RGB; what is transparent is seen on a
   white page (version 1 of the contract dropped the alpha, so that hidden pixels counted);
2. `resize_and_crop`: the shorter side to floor(image_size / crop_pct), antialiased, then the centre square (other
   crop modes squash the image or pad it);
3. `normalise`: to [0, 1], minus the mean, over the standard deviation, channels first.

Steps 2 and 3 give what torchvision's `Resize`, `CenterCrop` and `Normalize` give for a Pillow image, to within one
of 255 levels: only the pixels that the crop keeps are computed.
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
"""What is read by default, told by content; HEIF (HEIC) by the extra `heic`. EPS is never added: reading it starts an
interpreter."""

CONTRACT_VERSION = 2
"""Of new models. Version 1 dropped the alpha of transparent images, and stays as it is for models that have it."""

MAX_PIXELS = 100_000_000
"""Images of more pixels are refused from their header, before anything is decoded."""

BYTES_PER_PIXEL = 24
"""What decoding takes at most, beside the file: 4 for RGB, 8 where it is turned, 16 for WebP, 22
for AVIF and HEIC with alpha and more than 8 bits, 23 for WebP with alpha."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

INTERPOLATIONS = {
    name: Image.Resampling[name.upper()] for name in ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")
}
"""Filters by timm's names. All but nearest are antialiased."""

CROP_MODES = ("center", "squash", "border")
"""By timm's names."""

_CHOICES = {
    "interpolation": tuple(INTERPOLATIONS),
    "crop_mode": CROP_MODES,
    "crop_rounding": ("even", "down"),
    "channel_order": ("rgb", "bgr"),
}
_LATER = {"crop_mode": "center", "crop_rounding": "even", "channel_order": "rgb"}
"""Fields that came after version 2, which are not named at these values: older hashes stay."""

_ORIENTATION_TAG = 0x0112
_TURNING = ("exif", "xmp", "Raw profile type exif", "XML:com.adobe.xmp")
"""Where Pillow finds an orientation in an image's `info`."""
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
    """The preprocessing contract of a model: everything that decides the network's input.

    Attributes:
        image_size: side S of the network's square input, in pixels.
        crop_pct: the shorter side is resized to floor(S / crop_pct) before the centre crop, as timm does.
        interpolation: one of `INTERPOLATIONS`.
        mean, std: per channel, in the order of `channel_order`, for values in [0, 1].
        version: of the contract, which decides how `decode` treats transparent images.
        crop_mode: how an image becomes a square. With R = floor(S / crop_pct): `center` resizes the shorter side to R,
            `squash` resizes both sides to R and changes the aspect ratio, and `border` resizes the longer side to R and
            pads the shorter one with the mean colour. Each then takes the centre S x S.
        crop_rounding: where the margins of that centre are no whole pixels, `even` rounds to the even one, as
            torchvision and timm do, and `down` takes the smaller one, as transformers does.
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
        """R, what the shorter side (or the side that `crop_mode` says) is resized to, in pixels."""
        return math.floor(self.image_size / self.crop_pct)

    @property
    def hash(self) -> str:
        """sha256 of the contract, 64 hex digits; equal hashes mean equal inputs for equal files."""
        canonical = self._fields()
        canonical["contract"] = canonical.pop("version")
        return hashlib.sha256(json.dumps(canonical, sort_keys=True).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; version 1 is not named, as it was written before there was another."""
        data = {**self._fields(), "mean": list(self.mean), "std": list(self.std)}
        if self.version == 1:
            del data["version"]
        return data

    def _fields(self) -> dict[str, Any]:
        """Without those of `_LATER` that have their defaults."""
        return {name: value for name, value in asdict(self).items() if _LATER.get(name) != value}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Preprocessing:
        """The inverse of `to_dict`.

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
    """The picture in an image file.

    Args:
        data: the file's bytes.
        version: of the contract.
        formats: Pillow's names of the formats that may be read.
        max_pixels: larger images are refused before they are decoded.
        at_least: a JPEG may be decoded at a half, a quarter or an eighth of its size, as long as its shorter side
            keeps this many pixels.

    Returns:
        RGB, upright.

    Raises:
        DecodeError: with the reason, in one line.
    """
    if not data:
        raise DecodeError("the file is empty")
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > 2 * Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels  # Pillow refuses twice its own limit
    try:
        with _open(data, formats) as image:
            is_heif = image.format == "HEIF"  # whose thumbnail may show anything
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
    except Exception as exc:  # Pillow's plugins raise almost anything on damaged files
        raise DecodeError(f"damaged: {first_line(exc)}") from exc


def image_size(data: bytes) -> tuple[int, int]:
    """Width and height in pixels, by the header of an image file, before it is turned upright.

    Raises:
        DecodeError: the header cannot be read.
    """
    try:
        with _open(data, FORMATS) as image:
            return image.size
    except Exception as exc:  # as in `decode`
        raise DecodeError(f"damaged: {first_line(exc)}") from exc


def readable_formats(formats: Sequence[str] = FORMATS) -> tuple[str, ...]:
    """Those of the formats that this installation reads."""
    return tuple(name for name in formats if name not in HEIF_FORMATS.values() or is_readable(name))


def _open(data: bytes, formats: Sequence[str]) -> ImageFile:
    """An image whose header is read; of an animation or a collection, the image that is shown first."""
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
    """An open Pillow image as the network sees it: first frame, upright, 8 bits, RGB, on white where transparent.

    In version 1 of the contract, the alpha is dropped.

    Raises:
        DecodeError: too many pixels, a pixel type without a defined range (32-bit integers or floats), or a TIFF that
            Pillow misreads.
    """
    sees_alpha = version > 1
    width, height = image.size
    if width * height > max_pixels:
        raise TooLargeError(f"{width} x {height} is over the limit of {max_pixels:,} pixels")
    if image.format == "TIFF":
        refuse_misread(image.tag_v2, sees_alpha=sees_alpha)  # type: ignore[attr-defined]
    bits = key_bits(image)
    image.load()  # first: a TIFF is turned by Pillow as it loads, and its orientation is then gone
    orientation = _orientation(image)
    if image.mode in {"RGBa", "La"}:  # HEIC whose colours are multiplied with their alpha
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
    for name in _TURNING:  # it is upright now, whoever looks at it next
        image.info.pop(name, None)
    return image


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # damaged metadata is no reason to lose the picture
        return 1


def _to_8_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    tags = getattr(image, "tag_v2", {})  # of a TIFF, which Pillow leaves as it is beyond 8 bits
    if values.dtype.kind == "f" or values.min(initial=0) < 0 or values.max(initial=0) > 65535:
        raise DecodeError(f"pixel mode {image.mode} has no defined range", fix="save it with 8 or 16 bits a channel")
    bits = 12 if tags.get(_BITS_TAG) == (12,) else 16
    if tags.get(_PHOTOMETRIC_TAG) == 0:
        values = values ^ 2**bits - 1  # white is zero
    # The high byte: what Pillow itself keeps of a 16-bit RGB file, so grey and colour files agree.
    return Image.fromarray((values >> bits - 8).astype(np.uint8))


def resize_and_crop(image: Image.Image, contract: Preprocessing) -> NDArray[np.uint8]:
    """The square that the network sees, still in 8 bits.

    Args:
        image: RGB.

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
    # The crop in the coordinates of the original, so that nothing outside it is resized. Pillow keeps it in single
    # precision, which these two filters show by a level here and there, and the others by more.
    x, y = width / new_width, height / new_height
    box = (left * x, top * y, min((left + size) * x, width), min((top + size) * y, height))
    return np.asarray(image.resize((size, size), INTERPOLATIONS[contract.interpolation], box))


def _margin(side: int, contract: Preprocessing) -> int:
    """Pixels of a side that lie before the centre crop."""
    extra = side - contract.image_size
    # round() halves to even, as torchvision's centre crop does.
    return extra // 2 if contract.crop_rounding == "down" else round(extra / 2)


def _resized(width: int, height: int, contract: Preprocessing) -> tuple[int, int]:
    """Width and height of the whole image after it is resized."""
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
    """The whole image at its new size in the middle of a square of the mean colour; what protrudes is cut off."""
    size = contract.image_size
    pixels = np.asarray(image.resize(resized, INTERPOLATIONS[contract.interpolation]))
    square = np.empty((size, size, 3), np.uint8)
    colour = [min(255, max(0, round(255 * value))) for value in contract.mean]
    square[:] = colour if contract.channel_order == "rgb" else colour[::-1]
    source, target = zip(*(_overlap(side, contract) for side in pixels.shape[:2]), strict=True)
    square[target] = pixels[source]
    return square


def _overlap(side: int, contract: Preprocessing) -> tuple[slice, slice]:
    """Where a centred line of pixels and a square meet, in the coordinates of the line and of the square."""
    size = contract.image_size
    if side < size:
        start = (size - side) // 2
        return slice(0, side), slice(start, start + side)
    start = _margin(side, contract)
    return slice(start, start + size), slice(0, size)


def prepare_square(
    data: bytes, contract: Preprocessing, *, scaled: bool = False, max_pixels: int = MAX_PIXELS
) -> NDArray[np.uint8]:
    """The square that the network sees of an image file.

    Args:
        data: the file's bytes.
        scaled: decode a large JPEG at a fraction of its size, at least twice the size that it is then resized to.
            Up to several times as fast; the features move a little (docs/embedding.md has the figures).
        max_pixels: see `decode`.

    Returns:
        (S, S, 3) uint8.

    Raises:
        DecodeError: with the reason, in one line.
    """
    at_least = 2 * contract.resize_size if scaled else None
    image = decode(data, version=contract.version, max_pixels=max_pixels, at_least=at_least)
    return resize_and_crop(image, contract)


def normalise(
    squares: NDArray[np.uint8], contract: Preprocessing, out: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """(N, S, S, 3) uint8 to (N, 3, S, S) float32, contiguous: ((v / 255) - mean) / std.

    The squares are RGB, the result has the contract's `channel_order`. It is `out`, where that is given.
    """
    if contract.channel_order == "bgr":
        squares = squares[..., ::-1]
    mean = np.asarray(contract.mean, np.float32)[:, None, None]
    std = np.asarray(contract.std, np.float32)[:, None, None]
    # Transposed while it is small, then in place: six times as fast as the formula written in one line.
    if out is None:
        out = np.empty((len(squares), 3, *squares.shape[1:3]), np.float32)
    np.copyto(out, squares.transpose(0, 3, 1, 2))
    out /= np.float32(255)
    out -= mean
    out /= std
    return out


def preprocess(images: Sequence[Image.Image], contract: Preprocessing) -> NDArray[np.float32]:
    """Decoded images to the network's input.

    Args:
        images: RGB; sizes may differ.

    Returns:
        (N, 3, S, S) float32.
    """
    if not images:
        return np.empty((0, 3, contract.image_size, contract.image_size), np.float32)
    return normalise(np.stack([resize_and_crop(image, contract) for image in images]), contract)


def crop_share(size: int, resized: int) -> float:
    """The `crop_pct` for which a contract resizes to `resized`, whatever the last bits of size / resized are."""
    share = size / resized
    while math.floor(size / share) < resized:
        share = math.nextafter(share, 0)
    return share
