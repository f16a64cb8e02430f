"""Every kind of TIFF that Pillow opens is read right or refused; what is right is what was written."""

from __future__ import annotations

import io
import itertools
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin

from robustfeat.errors import DecodeError
from robustfeat.hub.preprocessing import decode, to_rgb
from tests.hub.tiff_files import Kind, tiff

RNG = np.random.default_rng(0)
LAYOUTS = ("strip", "strips", "tiles")
WAYS = [*itertools.product(LAYOUTS, ("none", "deflate")), *(("strips", name) for name in ("lzw", "packbits", "lzma"))]
DIFFERENCES = [("tiles", "deflate"), ("strips", "lzw")]


def pixel_types() -> Iterator[tuple[Kind, int]]:
    """What Pillow claims to read, and the number of samples."""
    for prefix, photometric, formats, fill_order, bits, extra_samples in TiffImagePlugin.OPEN_INFO:
        palette = tuple(int(value) for value in RNG.integers(0, 65536, 3 << bits[0])) if photometric == 3 else ()
        kind = Kind(
            "<" if prefix == b"II" else ">",
            bits[0],
            photometric,
            fill_order=fill_order,
            sample_format=formats[0],
            extra_samples=extra_samples,
            palette=palette,
        )
        yield kind, len(bits)


def variants(kind: Kind) -> Iterator[Kind]:
    """The layouts and compressions of a pixel type."""
    for planar, (layout, compression) in itertools.product((1, 2), WAYS):
        yield replace(kind, planar=planar, layout=layout, compression=compression)
        if (layout, compression) in DIFFERENCES and kind.bits in {8, 16}:
            yield replace(kind, planar=planar, layout=layout, compression=compression, differences=True)


def draw_samples(kind: Kind, count: int) -> NDArray[np.int64]:
    """Odd sizes; premultiplied colours are no larger than their alpha, and a and b are small as in photographs."""
    samples = RNG.integers(0, 1 << kind.bits, (19, 37, count))
    if kind.photometric == 8:
        samples[..., 0] = samples[..., 0] // 2 + 64
        samples[..., 1:] = (samples[..., 1:] % 41 - 20) % 256
    if 1 in kind.extra_samples:
        channels = 3 if kind.photometric == 2 else 1
        samples[..., channels] |= 1 << kind.bits - 8
        samples[..., :channels] = samples[..., :channels] * samples[..., channels, None] >> kind.bits
    return samples


@pytest.mark.parametrize("version", [1, 2])
def test_every_kind_is_read_right_or_refused(version: int) -> None:
    wrong, read = [], defaultdict(set)
    for kind, count in pixel_types():
        samples = draw_samples(kind, count)
        shown = kind.shown(samples, on_white=version > 1)
        # Conversions of colour round in their own ways.
        tolerance = {2: 0, 5: 1, 6: 2, 8: 20}.get(kind.photometric, 0) + (
            2 * bool(kind.extra_samples) if version > 1 else 1 in kind.extra_samples
        )
        for variant in variants(kind):
            try:
                picture = np.asarray(decode(tiff(samples, variant), version=version)).astype(int)
            except DecodeError:
                continue
            read[kind.photometric, kind.bits].add((variant.planar, variant.layout, variant.compression))
            if picture.shape != shown.shape or np.abs(picture - shown).max() > tolerance or kind.sample_format != 1:
                wrong.append(variant)
    assert not wrong
    everywhere = {(planar, *way) for planar, way in itertools.product((1, 2), WAYS)}
    planes = {(2, layout, "none") for layout in LAYOUTS}
    assert read[2, 8] == everywhere
    usual = [(0, 1), (0, 8), (1, 1), (1, 8), (1, 12), (1, 16), (2, 16), (3, 4), (3, 8), (5, 8), (5, 16)]
    assert all(read[kind] >= everywhere - planes for kind in usual)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("planar", [1, 2])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("bits", [8, 16])
def test_tifffile_reads_what_the_writer_of_these_tests_writes(bits: int, order: str, planar: int, layout: str) -> None:
    samples = RNG.integers(0, 1 << bits, (37, 53, 3))
    found = tifffile.imread(io.BytesIO(tiff(samples, Kind(order, bits, 2, planar, layout, "deflate"))))
    np.testing.assert_array_equal(found if planar == 1 else np.moveaxis(found, 0, -1), samples)


@pytest.mark.parametrize(
    ("kind", "count", "message"),
    [
        (Kind("<", 16, 2, planar=2), 3, "uncompressed TIFF: separate planes of this kind are not read; save it with"),
        (Kind("<", 16, 1, planar=2), 1, "uncompressed TIFF: separate planes"),
        (Kind("<", 8, 2, planar=2, compression="lzw"), 4, "compressed TIFF: separate planes"),
        (Kind("<", 8, 1, extra_samples=(1,)), 2, "premultiplied grey is not read; save it without alpha"),
        (Kind("<", 8, 1, sample_format=2), 1, "signed, 32-bit and floating-point pixels have no defined range"),
        (Kind(">", 32, 1, sample_format=2), 1, "no defined range; save it with 8 or 16 bits"),
    ],
)
def test_reason_is_clear_when_a_kind_is_refused(kind: Kind, count: int, message: str) -> None:
    with pytest.raises(DecodeError, match=message):
        decode(tiff(np.ones((19, 37, count), np.int64), kind))


@pytest.mark.parametrize("compression", ["tiff_ccitt", "group3", "group4", "zstd"])
def test_further_compressions_are_read_right(compression: str) -> None:
    picture = Image.fromarray(RNG.integers(0, 2, (37, 53), np.uint8) * 255).convert("1")
    buffer = io.BytesIO()
    picture.save(buffer, "TIFF", compression=compression)
    np.testing.assert_array_equal(decode(buffer.getvalue()), picture.convert("RGB"))


def test_word_aligned_fax_is_refused() -> None:
    """libtiff reports bad code words in such files and goes on."""
    buffer = io.BytesIO()
    Image.new("1", (53, 37)).save(buffer, "TIFF", compression="tiff_raw_16")
    with pytest.raises(DecodeError, match="word-aligned fax"):
        decode(buffer.getvalue())


def test_an_open_tiff_is_refused_as_its_bytes_are() -> None:
    data = tiff(np.ones((37, 53, 3), np.int64), Kind("<", 16, 2, planar=2))
    with pytest.raises(DecodeError, match="separate planes"):
        to_rgb(Image.open(io.BytesIO(data)))
