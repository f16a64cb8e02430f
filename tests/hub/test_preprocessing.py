"""Against torchvision's Resize, CenterCrop and Normalize, on real photographs in every form that users have."""

from __future__ import annotations

import io
import math
import os
import struct
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pillow_heif
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from timm.data.transforms_factory import create_transform
from torchvision.transforms import v2

from robustfeat.errors import DecodeError
from robustfeat.hub.heif import format_of
from robustfeat.hub.preprocessing import (
    BYTES_PER_PIXEL,
    CROP_MODES,
    FORMATS,
    Preprocessing,
    crop_share,
    decode,
    prepare_square,
    preprocess,
    readable_formats,
    resize_and_crop,
    to_rgb,
)
from robustfeat.system import python_command


def encode(image: Image.Image, file_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def photo(example_files: list[Path]) -> Image.Image:
    return Image.open(example_files[5]).convert("RGB").resize((201, 267))


def torchvision_square(image: Image.Image, contract: Preprocessing) -> np.ndarray:
    mode = {"bilinear": v2.InterpolationMode.BILINEAR, "bicubic": v2.InterpolationMode.BICUBIC}[contract.interpolation]
    transform = v2.Compose(
        [v2.Resize(contract.resize_size, mode, antialias=True), v2.CenterCrop(contract.image_size), v2.ToImage()]
    )
    square: torch.Tensor = transform(image)
    return square.permute(1, 2, 0).numpy()


def torchvision_input(image: Image.Image, contract: Preprocessing) -> np.ndarray:
    pixels = torch.from_numpy(torchvision_square(image, contract).copy()).permute(2, 0, 1)
    scaled = v2.functional.to_dtype(pixels, torch.float32, scale=True)
    normalised: torch.Tensor = v2.functional.normalize(scaled, list(contract.mean), list(contract.std))
    return normalised.numpy()


@pytest.mark.parametrize(
    "contract",
    [
        Preprocessing(64),
        Preprocessing(224, 0.875),
        Preprocessing(96, 0.9, "bicubic"),
        Preprocessing(232, 0.965),
    ],
)
def test_photographs_give_torchvisions_input(example_files: list[Path], contract: Preprocessing) -> None:
    for file in example_files[:12]:
        image = Image.open(file)
        ours = preprocess([decode(file.read_bytes())], contract)
        np.testing.assert_allclose(ours[0], torchvision_input(image.convert("RGB"), contract), atol=1.01 / 255 / 0.224)


@pytest.mark.parametrize("size", [(64, 64), (65, 64), (64, 67), (501, 40), (40, 501), (33, 33), (1, 1), (7, 300)])
def test_odd_sizes_give_torchvisions_crop(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (size[1], size[0], 3), np.uint8)
    contract = Preprocessing(64, 0.9)
    image = Image.fromarray(pixels)
    # Pillow keeps the box of the crop in single precision, and rounds a level up or down by it.
    difference = resize_and_crop(image, contract).astype(int) - torchvision_square(image, contract)
    assert np.abs(difference).max() <= 1
    assert abs(difference.mean()) < 0.02


def test_antialiasing_agrees_with_torchvisions_tensors(photo: Image.Image) -> None:
    """torchvision's other backend, which resizes float tensors: the same filter within rounding."""
    contract = Preprocessing(64, 0.875)
    tensor = v2.functional.to_dtype(v2.functional.to_image(photo), torch.float32, scale=True)
    resized = v2.functional.center_crop(v2.functional.resize(tensor, [contract.resize_size], antialias=True), [64, 64])
    ours = resize_and_crop(photo, contract).astype(np.float32) / 255
    np.testing.assert_allclose(ours, resized.permute(1, 2, 0).numpy(), atol=1.5 / 255)


@pytest.mark.parametrize(
    ("mode", "file_format"),
    [
        ("RGB", "JPEG"),
        ("L", "JPEG"),
        ("CMYK", "JPEG"),
        ("RGB", "PNG"),
        ("L", "PNG"),
        ("1", "PNG"),
        ("P", "PNG"),
        ("LA", "PNG"),
        ("RGBA", "PNG"),
        ("RGB", "WEBP"),
        ("RGBA", "WEBP"),
        ("P", "GIF"),
        ("RGB", "BMP"),
        ("RGB", "TIFF"),
        ("CMYK", "TIFF"),
        ("L", "TIFF"),
    ],
)
def test_every_form_decodes_to_what_pillow_shows(photo: Image.Image, mode: str, file_format: str) -> None:
    if "A" in mode:
        image = photo.convert(mode)
        image.putalpha(Image.linear_gradient("L").resize(photo.size))
    else:
        image = photo.convert(mode)
    data = encode(image, file_format)
    opened = Image.open(io.BytesIO(data))
    np.testing.assert_array_equal(decode(data, version=1), np.asarray(opened.convert("RGB")))
    np.testing.assert_allclose(levels(decode(data)), on_white(opened), atol=1 if "A" in mode else 0)


def levels(image: Image.Image) -> NDArray[np.int64]:
    return np.asarray(image).astype(np.int64)


def on_white(image: Image.Image) -> NDArray[np.int64]:
    """By the formula of alpha compositing."""
    rgba = levels(image.convert("RGBA"))
    colours, alpha = rgba[..., :3], rgba[..., 3:]
    return np.rint((colours * alpha + 255 * (255 - alpha)) / 255).astype(np.int64)


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_a_transparent_palette_is_seen_on_white_in_version_2(photo: Image.Image) -> None:
    palette = photo.quantize(32)
    data = encode(palette, "PNG", transparency=bytes([0, 128] * 16))
    np.testing.assert_array_equal(decode(data, version=1), np.asarray(palette.convert("RGB")))
    expected = on_white(Image.open(io.BytesIO(data)))
    assert (expected == 255).all(2).mean() > 0.2
    np.testing.assert_allclose(levels(decode(data)), expected, atol=1)


@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "TIFF"])
def test_what_cannot_be_seen_makes_no_difference_in_version_2(photo: Image.Image, file_format: str) -> None:
    mask = Image.new("L", photo.size)
    mask.paste(255, (40, 40, 150, 200))
    files = []
    for hidden in (Image.new("RGB", photo.size), Image.effect_noise(photo.size, 90).convert("RGB")):
        cut = Image.composite(photo, hidden, mask)
        cut.putalpha(mask)
        options = {"lossless": True, "exact": True} if file_format == "WEBP" else {}
        files.append(encode(cut, file_format, **options))
    first, second = map(decode, files)
    np.testing.assert_array_equal(first, second)
    assert (levels(first)[:40] == 255).all()
    np.testing.assert_array_equal(levels(first)[40:200, 40:150], levels(photo)[40:200, 40:150])
    assert (levels(decode(files[0], version=1)) != levels(decode(files[1], version=1))).mean() > 0.5


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_an_alpha_of_zeros_is_none(photo: Image.Image, mode: str) -> None:
    """Many programs write it so."""
    image = photo.convert(mode)
    image.putalpha(0)
    expected = photo.convert(mode[:-1]).convert("RGB")
    np.testing.assert_array_equal(decode(encode(image, "PNG")), np.asarray(expected))


def png_of(samples: NDArray[Any], bits: int, colour: int, key: bytes) -> bytes:
    """A PNG file, written by hand, whose pixels of the colour `key` are transparent."""
    height, width = samples.shape[:2]
    if bits == 16:
        rows = samples.astype(">u2").reshape(height, -1).view(np.uint8)
    else:
        unpacked = (samples.reshape(height, -1, 1) >> np.arange(bits - 1, -1, -1)) & 1
        rows = np.packbits(unpacked.reshape(height, -1).astype(np.uint8), axis=1)
    body = zlib.compress(np.pad(rows, ((0, 0), (1, 0))).tobytes())
    head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"tRNS", key), (b"IDAT", body), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, data) for kind, data in chunks)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_a_transparent_grey_is_seen_on_white_in_version_2(bits: int) -> None:
    most = 2**bits - 1
    samples = np.random.default_rng(0).integers(0, most + 1, (9, 16))
    key = int(samples[4, 4])
    grey = samples >> 8 if bits == 16 else samples * (255 // most)
    data = png_of(samples, bits, 0, struct.pack(">H", key))
    np.testing.assert_array_equal(levels(decode(data, version=1)), np.repeat(grey[..., None], 3, 2))
    seen = np.where(samples == key, 255, grey)
    np.testing.assert_array_equal(levels(decode(data)), np.repeat(seen[..., None], 3, 2))


def test_a_transparent_colour_is_seen_on_white_in_version_2() -> None:
    samples = np.random.default_rng(0).integers(0, 2, (9, 16, 3)) * 200
    data = png_of(samples, 8, 2, struct.pack(">HHH", 200, 0, 200))
    seen = np.where((samples == (200, 0, 200)).all(2)[..., None], 255, samples)
    assert (seen != samples).any()
    np.testing.assert_array_equal(levels(decode(data, version=1)), samples)
    np.testing.assert_array_equal(levels(decode(data)), seen)


def test_a_transparent_colour_of_16_bits_is_refused_in_version_2() -> None:
    samples = np.random.default_rng(0).integers(0, 2**16, (9, 16, 3))
    data = png_of(samples, 16, 2, struct.pack(">HHH", 3, 4, 5))
    np.testing.assert_array_equal(levels(decode(data, version=1)), samples >> 8)
    with pytest.raises(DecodeError, match="a transparent colour of 16 bits per channel is not read; save it with an"):
        decode(data)


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_16_bits_are_scaled_to_8(photo: Image.Image, file_format: str) -> None:
    grey = np.asarray(photo.convert("L"))
    data = encode(Image.fromarray(grey.astype(np.uint16) * 257), file_format)
    np.testing.assert_array_equal(decode(data), np.repeat(grey[..., None], 3, 2))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(photo: Image.Image, orientation: int) -> None:
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the transposition that a camera would have made
    stored = photo.transpose(Image.Transpose(undo[orientation])) if orientation > 1 else photo
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(decode(encode(stored, "PNG", exif=exif)), np.asarray(photo))


def test_animations_give_their_first_frame(photo: Image.Image) -> None:
    first = photo.quantize(16)
    data = encode(first, "GIF", save_all=True, append_images=[photo.rotate(90).quantize(16)])
    np.testing.assert_array_equal(decode(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_an_open_image_decodes_as_its_bytes_do(photo: Image.Image) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(photo, "JPEG", exif=exif)
    np.testing.assert_array_equal(to_rgb(Image.open(io.BytesIO(data))), decode(data))
    np.testing.assert_array_equal(to_rgb(decode(data)), decode(data))  # it is not turned again


def chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


EXIF = b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"
RAW_PROFILE = b"\nexif\n%8d\n%s\n" % (len(EXIF) + 6, (b"Exif\0\0" + EXIF).hex().encode())
XMP = b'<x tiff:Orientation="6"/>'


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (b"eXIf", EXIF),
        (b"tEXt", b"Raw profile type exif\0" + RAW_PROFILE),
        (b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(RAW_PROFILE)),
        (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP),
        (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(XMP)),
    ],
)
def test_metadata_that_turn_a_png_are_kept(photo: Image.Image, kind: bytes, body: bytes) -> None:
    plain = encode(photo, "PNG")
    large = chunk(b"zTXt", b"comment\0\0" + zlib.compress(bytes(2**21)))
    data = plain[:33] + chunk(kind, body) + large + plain[33:]
    np.testing.assert_array_equal(decode(data), np.asarray(photo.transpose(Image.Transpose.ROTATE_270)))
    np.testing.assert_array_equal(to_rgb(decode(data)), decode(data))


def test_a_png_cut_anywhere_is_told_as_damage(photo: Image.Image) -> None:
    plain = encode(photo.resize((30, 40)), "PNG")
    data = plain[:33] + chunk(b"tEXt", b"k\0v") + plain[33:]
    for length in range(8, len(data) - 40, 70):
        with pytest.raises(DecodeError, match=r"damaged|not an image"):
            decode(data[:length])


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"\0\0\0\x1cftypisom\0\0\0\0", "a video"),
        (b"\xff\x0a\xfa\x1f", "a JPEG XL image"),
        (b"\0\0\0\x0cJXL \x0d\x0a\x87\x0a", "a JPEG XL image"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer, not the file itself; run git lfs pull"),
        (b"../../.git/annex/objects/aa/bb/MD5E-s1--0.jpg", "a git-annex pointer"),
        (b"\n<!DOCTYPE HTML>", "an HTML page"),
        (b'<?xml version="1.0"?>\n<svg>', "an SVG drawing"),
        (b"%PDF-1.7", "a PDF document"),
        (b"P6\n10 10\n255\n", "a PNM image"),
        (b"PK\x03\x04", "a zip archive"),
        (bytes(1000), "nothing but zeros"),
    ],
)
def test_other_formats_are_called_by_their_names(data: bytes, what: str) -> None:
    with pytest.raises(DecodeError, match=f"not an image of these formats: JPEG, PNG, .*; it is {what}"):
        decode(data + bytes(range(1, 60)) if any(data) else data)


@pytest.mark.parametrize(
    ("data", "what", "name"),
    [
        (b"\0\0\0\x18ftypheic", "a HEIC image", "HEIF"),
        (b"\0\0\0\x18ftyphevc", "a HEIC image", "HEIF"),
        (b"\0\0\0\x1cftypmif1\0\0\0\0mif1heic", "a HEIC image", "HEIF"),
        (b"\0\0\0\x1cftypmif1\0\0\0\0mif1avifmiaf", "an AVIF image", "AVIF"),
        (b"\0\0\0\x1cftypavif\0\0\0\0", "an AVIF image", "AVIF"),
        (b"\0\0\0\x1cftypavis\0\0\0\0", "an AVIF image", "AVIF"),
    ],
)
def test_heic_and_avif_are_told_apart_and_called_by_their_names(data: bytes, what: str, name: str) -> None:
    assert format_of(data + bytes(50)) == name
    with pytest.raises(DecodeError, match=r"^damaged: "):
        decode(data + bytes(50))
    with pytest.raises(DecodeError, match=f"these formats: JPEG; it is {what}; convert it to JPEG or PNG"):
        decode(data + bytes(50), formats=["JPEG"])


def heic(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    pillow_heif.from_pillow(image).save(buffer, quality=-1, chroma=444, **options)
    return buffer.getvalue()


def test_the_extra_is_named_where_heic_is_not_read(photo: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    data = heic(photo)
    assert decode(data).size == photo.size
    assert readable_formats() == FORMATS
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(DecodeError) as caught:
        decode(data)
    assert caught.value.what == "a HEIC image, which this installation does not read"
    assert caught.value.fix == "pip install 'robustfeat[heic]', or convert it to JPEG or PNG"
    assert readable_formats() == FORMATS[:-1]
    with pytest.raises(DecodeError, match=r"GIF, BMP, TIFF, AVIF$"):
        decode(b"hello")


def test_a_decoder_that_does_not_load_is_no_damage(
    photo: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = heic(photo)
    (tmp_path / "pillow_heif.py").write_text("raise ImportError('libheif.so: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "pillow_heif")
    with pytest.raises(DecodeError, match=r"does not load \(libheif.so: .*\); pip install --force-reinstall"):
        decode(data)


def test_pillow_of_the_whole_process_is_left_without_heic(photo: Image.Image) -> None:
    data = heic(photo)
    assert decode(data).size == photo.size
    with pytest.raises(UnidentifiedImageError):
        Image.open(io.BytesIO(data))


def exif_of(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["AVIF", "HEIF"])
def test_avif_and_heic_are_turned_as_their_container_says(photo: Image.Image, kind: str, orientation: int) -> None:
    exif = exif_of(orientation).tobytes()
    written = heic(photo, exif=exif) if kind == "HEIF" else encode(photo, "AVIF", quality=100, exif=exif)
    # Pillow's own idea of it, from the same pixels as JPEG.
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(encode(photo, "JPEG", quality=100, exif=exif))))
    found = decode(written)
    assert found.size == expected.size
    assert np.abs(np.asarray(found).astype(int) - np.asarray(expected)).mean() < 2
    np.testing.assert_array_equal(to_rgb(found), found)


@pytest.mark.parametrize("kind", ["AVIF", "HEIF"])
def test_metadata_do_not_turn_avif_and_heic(photo: Image.Image, kind: str) -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    image = photo.resize((64, 80))
    if kind == "AVIF":
        assert Image.open(io.BytesIO(encode(image, "AVIF", xmp=xmp))).getexif()[0x0112] == 6
        data = encode(image, "AVIF", xmp=xmp)
    else:
        data = heic(image, exif=exif_of(6).tobytes()).replace(b"irot", b"free")
    assert decode(data).size == image.size


def test_a_thumbnail_is_not_taken_for_its_image(photo: Image.Image) -> None:
    data = heic(photo.resize((800, 1000)), thumbnails=[100])
    plugin: Any = pillow_heif.HeifImageFile
    with plugin(io.BytesIO(data)) as image:
        image.draft(None, (20, 20))
        assert image.size == (80, 100)
    assert decode(data, at_least=20).size == (800, 1000)


def signed_tiff() -> bytes:
    """Pillow reads it as if it were unsigned."""
    return encode(Image.fromarray(np.ones((4, 4), np.uint16)), "TIFF", tiffinfo={339: 2})


def damaged() -> dict[str, tuple[bytes, str]]:
    noise = Image.effect_noise((80, 60), 60).convert("RGB")
    jpeg, png = encode(noise, "JPEG"), encode(noise, "PNG")
    return {
        "empty": (b"", "empty"),
        "text": (b"hello", "not an image"),
        "truncated jpeg": (jpeg[: len(jpeg) // 2], "damaged: .*truncated"),
        "truncated png": (png[: len(png) // 2], "damaged"),
        "header alone": (jpeg[:30], "damaged|not an image"),
        "float": (encode(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "have no defined range"),
        "signed": (signed_tiff(), "have no defined range"),
        "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not an image of these formats"),
    }


@pytest.mark.parametrize("case", damaged())
def test_damaged_files_give_one_line(case: str) -> None:
    data, message = damaged()[case]
    with pytest.raises(DecodeError, match=message) as caught:
        decode(data)
    assert "\n" not in str(caught.value)


MEASURE = """
import io, os, resource, sys
from PIL import Image, ImageOps, UnidentifiedImageError
from robustfeat.hub.preprocessing import Preprocessing, prepare_square
def peak(data):
    child = os.fork()
    if not child:
        prepare_square(data, Preprocessing(64))
        os._exit(0)
    _, status, used = os.wait4(child, 0)
    assert status == 0
    return used.ru_maxrss * 1024
for file in sys.argv[1:]:
    data = open(file, "rb").read()
    print((peak(data) - peak(open(file.replace(".", "-small."), "rb").read())) / 2000**2)
"""


def save(image: Image.Image, file: Path, bits: int = 8, **options: Any) -> None:
    if file.suffix != ".heic":
        image.save(file, **options)
    elif bits == 8:
        pillow_heif.from_pillow(image).save(file, **options)
    else:
        values = np.asarray(image).astype("<u2") * 257
        pillow_heif.from_bytes(f"{image.mode};16", image.size, values.tobytes()).save(file, **options)


@pytest.mark.skipif(not hasattr(os, "wait4") or sys.platform == "darwin", reason="macOS counts in other units")
def test_no_image_takes_more_memory_than_is_promised_for_its_pixels(tmp_path: Path) -> None:
    picture = Image.linear_gradient("L").resize((2000, 2000)).convert("RGB")
    turned = Image.Exif()
    turned[0x0112] = 6
    grey16 = Image.fromarray(np.full((2000, 2000), 300, np.uint16))
    seen_through = picture.copy()
    seen_through.putalpha(picture.getchannel("R"))
    kinds: dict[str, tuple[Image.Image, float, dict[str, Any]]] = {
        "a.jpeg": (picture, 5, {}),
        "b.jpeg": (picture, 9, {"exif": turned}),
        "c.jpeg": (picture.convert("CMYK"), 16, {"progressive": True, "exif": turned}),
        "d.png": (picture.convert("RGBA"), 13, {"exif": turned, "compress_level": 1}),
        "e.png": (grey16, 12, {"exif": turned}),
        "f.webp": (picture, 16, {"exif": turned}),
        "g.tiff": (grey16, 10, {"tiffinfo": {262: 0}}),
        "h.png": (seen_through, 14, {"exif": turned, "compress_level": 1}),
        "i.png": (seen_through.convert("LA"), 14, {"exif": turned}),
        "j.png": (picture.quantize(64), 15, {"exif": turned, "transparency": bytes(range(64))}),
        "k.png": (picture, 14, {"exif": turned, "transparency": (3, 3, 3)}),
        "l.png": (grey16, 12, {"exif": turned, "transparency": 3}),
        "m.webp": (seen_through, BYTES_PER_PIXEL, {"exif": turned}),
        "n.avif": (picture, 12, {"exif": turned.tobytes(), "speed": 10}),
        "o.avif": (seen_through, BYTES_PER_PIXEL, {"exif": turned.tobytes(), "speed": 10, "subsampling": "4:4:4"}),
        "p.heic": (picture, 12, {"exif": turned.tobytes()}),
        "q.heic": (seen_through, 16, {"exif": turned.tobytes(), "chroma": 444}),
        "r.heic": (seen_through, BYTES_PER_PIXEL, {"chroma": 444, "bits": 10}),
    }
    for name, (image, _, options) in kinds.items():
        stem, suffix = name.split(".")
        save(image, tmp_path / name, **options)
        save(image.resize((64, 64)), tmp_path / f"{stem}-small.{suffix}", **options)
    command = python_command(MEASURE, *(str(tmp_path / name) for name in kinds))
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    over = {
        name: got for (name, (_, most, _)), got in zip(kinds.items(), found, strict=True) if float(got) > most + 0.5
    }
    assert not over


THREADS = """
import os, sys, threading
from robustfeat.hub.heif import use_one_thread
from robustfeat.hub.preprocessing import decode
if sys.argv[1] == "one":
    use_one_thread()
most, done = 0, threading.Event()
def watch():
    global most
    while not done.is_set():
        most = max(most, len(os.listdir("/proc/self/task")))
watcher = threading.Thread(target=watch)
watcher.start()
for file in sys.argv[2:]:
    decode(open(file, "rb").read())
done.set()
watcher.join()
print(most - 1)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted on Linux alone")
def test_decoder_processes_start_one_thread_at_most_for_avif_and_heic(tmp_path: Path) -> None:
    picture = Image.effect_noise((512, 512), 60).convert("RGB")
    picture.save(tmp_path / "a.avif", speed=10)
    save(picture, tmp_path / "b.heic")
    threads = {}
    for how in ("one", "usual"):
        command = python_command(THREADS, how, str(tmp_path / "a.avif"), str(tmp_path / "b.heic"))
        threads[how] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert threads["one"] <= 2 < threads["usual"]


def test_huge_images_are_refused_from_their_header() -> None:
    # A PNG header that promises 60,000 x 60,000 pixels, with nothing behind it.
    header = encode(Image.new("L", (1, 1)), "PNG")
    size = (60_000).to_bytes(4, "big") * 2
    body = b"IHDR" + size + header[24:29]
    bomb = header[:8] + (13).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big") + header[33:]
    with pytest.raises(DecodeError, match="over the limit"):
        decode(bomb)


def test_pixel_limit_is_an_option() -> None:
    data = encode(Image.new("RGB", (20, 30)), "PNG")
    with pytest.raises(DecodeError, match="20 x 30 is over the limit of 599 pixels"):
        decode(data, max_pixels=599)
    assert decode(data, max_pixels=600).size == (20, 30)


def test_pillows_own_limit_gives_way_to_a_higher_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    data = encode(Image.new("RGB", (50, 50)), "PNG")
    with pytest.raises(DecodeError, match="over the limit of 2,000 pixels"):
        decode(data, max_pixels=2000)
    assert decode(data, max_pixels=5000).size == (50, 50)
    assert Image.MAX_IMAGE_PIXELS == 5000


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_scaled_decoding_keeps_twice_the_size_that_is_needed(photo: Image.Image, mode: str) -> None:
    large = encode(photo.resize((1600, 1200)).convert(mode), "JPEG")
    assert decode(large, at_least=1201).size == (1600, 1200)
    assert decode(large, at_least=300).size == (400, 300)
    contract = Preprocessing(64)
    exact, scaled = (prepare_square(large, contract, scaled=scaled).astype(int) for scaled in (False, True))
    assert 0 < np.abs(exact - scaled).mean() < 3
    # What is not a JPEG, or not large enough, comes out as ever.
    for data in (encode(photo, "PNG"), encode(photo.resize((180, 120)), "JPEG")):
        np.testing.assert_array_equal(
            prepare_square(data, contract, scaled=True), prepare_square(data, contract, scaled=False)
        )


def test_scaled_decoding_refuses_the_same_sizes() -> None:
    large = encode(Image.new("L", (1600, 1200)), "JPEG")
    with pytest.raises(DecodeError, match="1600 x 1200 is over the limit"):
        decode(large, max_pixels=1_000_000, at_least=10)


def test_eps_is_never_a_default() -> None:
    assert "EPS" not in FORMATS


def test_hash_changes_with_every_field() -> None:
    base = Preprocessing(64)
    others = [
        Preprocessing(64, version=1),
        Preprocessing(65),
        Preprocessing(64, 0.9),
        Preprocessing(64, interpolation="bicubic"),
        Preprocessing(64, mean=(0.5, 0.5, 0.5)),
        Preprocessing(64, std=(0.5, 0.5, 0.5)),
    ]
    assert len({contract.hash for contract in (base, *others)}) == 7
    # Pinned: a folder that was published keeps its hash for ever.
    assert others[0].hash == "2ca6862ae3504bb5c4b9217f772eda8f26c22332d33cdb0cdbb20bd6dce64477"
    assert base.hash == "e3c3b6236e36c25f4e190dc1b04a7457b96df5bbeae660bd98df9da7af05ba8c"
    for contract in (base, others[0]):
        assert Preprocessing.from_dict(contract.to_dict()) == contract
    assert "version" not in others[0].to_dict()  # as published folders have it


@pytest.mark.parametrize(
    "change",
    [
        {"image_size": 4},
        {"crop_pct": 0.0},
        {"crop_pct": 1.1},
        {"interpolation": "cubic"},
        {"std": (1.0, 0.0, 1.0)},
        {"version": 0},
        {"version": 3},
        {"version": True},
    ],
)
def test_bad_contracts_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="must"):
        Preprocessing(**{"image_size": 64, **change})  # type: ignore[arg-type]


def test_unknown_keys_are_refused() -> None:
    with pytest.raises(ValueError, match="antialias"):
        Preprocessing.from_dict({**Preprocessing(64).to_dict(), "antialias": True})


def test_no_images_give_an_empty_batch() -> None:
    assert preprocess([], Preprocessing(64)).shape == (0, 3, 64, 64)


def test_elongated_images_need_no_more_memory_than_others() -> None:
    """Some hundred bytes that a resize of the shorter side would blow up to 3,000 million pixels."""
    image = Image.linear_gradient("L").resize((1, 60_000)).convert("RGB")
    square = resize_and_crop(image, Preprocessing(224))
    assert square.shape == (224, 224, 3)
    assert set(square.ravel()) <= {127, 128}  # the middle of the gradient


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0, 1e-50, 1e50])
def test_a_mean_or_std_that_gives_no_finite_input_is_refused(value: float) -> None:
    """1e-50 is 0 and 1e50 infinite in float32."""
    with pytest.raises(ValueError, match="mean and std must hold three numbers"):
        Preprocessing(32, std=(0.2, value, 0.2))
    if not abs(value) <= 1:
        with pytest.raises(ValueError, match="mean and std must hold three numbers"):
            Preprocessing(32, mean=(0.2, value, 0.2))


def timm_square(image: Image.Image, contract: Preprocessing) -> np.ndarray:
    transform = create_transform(
        (3, contract.image_size, contract.image_size),
        interpolation=contract.interpolation,
        crop_pct=contract.crop_pct,
        crop_mode=contract.crop_mode,
        mean=contract.mean,
        std=contract.std,
        use_prefetcher=True,  # it leaves 8 bits
    )
    square: np.ndarray = np.asarray(transform(image))
    return square.transpose(1, 2, 0) if square.shape[0] == 3 else square


@pytest.mark.parametrize("crop_mode", CROP_MODES)
@pytest.mark.parametrize("crop_pct", [1.0, 0.875, 0.3])
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"])
def test_crop_modes_and_filters_are_timms(
    photo: Image.Image, crop_mode: str, crop_pct: float, interpolation: str
) -> None:
    contract = Preprocessing(64, crop_pct, interpolation, crop_mode=crop_mode)
    for size in [(201, 267), (267, 201), (64, 64), (33, 33), (40, 300), (301, 7), (1, 1), (64, 65)]:
        image = photo.resize(size)
        difference = resize_and_crop(image, contract).astype(int) - timm_square(image, contract)
        shortened = crop_mode == "center" and interpolation in {"bilinear", "bicubic"}
        assert np.abs(difference).max() <= (2 if shortened else 0), size


def test_crop_modes_have_hashes_of_their_own_and_center_keeps_the_old_one() -> None:
    contracts = [Preprocessing(64, crop_mode=mode) for mode in CROP_MODES]
    assert len({contract.hash for contract in contracts}) == 3
    assert all(Preprocessing.from_dict(contract.to_dict()) == contract for contract in contracts)
    assert "crop_mode" not in contracts[0].to_dict()
    # Written down before there were crop modes.
    assert contracts[0].hash.startswith("e3c3b6236e36c25f")


@pytest.mark.parametrize(("name", "value"), [("crop_mode", "pad"), ("interpolation", "cubic"), ("crop_mode", None)])
def test_unknown_modes_and_filters_are_named_with_the_known_ones(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} must be one of .*; got {value!r}"):
        Preprocessing(64, **{name: value})


@pytest.mark.parametrize("size", [(64, 67), (501, 40), (33, 36), (40, 41)])
@pytest.mark.parametrize("interpolation", ["bilinear", "nearest"])
def test_margins_are_rounded_as_the_contract_says(size: tuple[int, int], interpolation: str) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8))
    contract = Preprocessing(32, crop_pct=32 / 35, interpolation=interpolation, crop_rounding="down")
    whole = v2.functional.resize(image, [35], v2.InterpolationMode(interpolation), antialias=True)
    left, top = (whole.width - 32) // 2, (whole.height - 32) // 2
    expected = np.asarray(whole.crop((left, top, left + 32, top + 32)), np.int64)
    assert np.abs(resize_and_crop(image, contract) - expected).max() <= 1
    # 1.5 pixels become 1 or 2.
    assert not np.array_equal(
        resize_and_crop(image, contract), resize_and_crop(image, replace(contract, crop_rounding="even"))
    )


def test_bgr_is_the_same_input_in_the_other_order(photo: Image.Image) -> None:
    rgb = Preprocessing(32, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    bgr = replace(rgb, mean=rgb.mean[::-1], std=rgb.std[::-1], channel_order="bgr")
    np.testing.assert_array_equal(preprocess([photo], bgr), preprocess([photo], rgb)[:, ::-1])
    padded = replace(bgr, crop_mode="border")
    np.testing.assert_array_equal(
        resize_and_crop(photo, padded), resize_and_crop(photo, replace(rgb, crop_mode="border"))
    )


@pytest.mark.parametrize(("name", "value"), [("crop_rounding", "down"), ("channel_order", "bgr")])
def test_later_fields_are_named_where_they_differ(name: str, value: Any) -> None:
    plain, changed = Preprocessing(64), replace(Preprocessing(64), **{name: value})
    assert name not in plain.to_dict()
    assert changed.hash != plain.hash
    assert Preprocessing.from_dict(changed.to_dict()) == changed
    with pytest.raises(ValueError, match=f"{name} must be one of .*; got 'x'"):
        Preprocessing.from_dict(plain.to_dict() | {name: "x"})


def test_crop_share_survives_the_floor() -> None:
    for size in range(32, 400):
        for resized in range(size, size + 80):
            assert math.floor(size / crop_share(size, resized)) == resized
