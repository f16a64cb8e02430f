"""A writer of TIFF files that knows nothing of Pillow, and what its files show."""

from __future__ import annotations

import itertools
import lzma
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["COMPRESSIONS", "Kind", "lab_to_rgb", "tiff"]

Samples = NDArray[np.int64]
COMPRESSIONS = {"none": 1, "lzw": 5, "deflate": 8, "packbits": 32773, "lzma": 34925}
_ROWS, _TILE = 7, (16, 32)
_REVERSED = bytes(int(f"{value:08b}"[::-1], 2) for value in range(256))


@dataclass(frozen=True)
class Kind:
    """What decides how samples lie in a file.

    Attributes:
        order: `<` or `>`.
        bits: of each sample.
        photometric, planar, fill_order, sample_format, extra_samples: the tags' values.
        layout: strip, strips or tiles.
        compression: a key of `COMPRESSIONS`.
        differences: whether each sample is stored as its difference from its neighbour (predictor 2).
        palette: of 3 * 2**bits numbers of 16 bits.
    """

    order: str
    bits: int
    photometric: int
    planar: int = 1
    layout: str = "strips"
    compression: str = "none"
    differences: bool = False
    fill_order: int = 1
    sample_format: int = 1
    extra_samples: tuple[int, ...] = ()
    palette: tuple[int, ...] = ()

    def shown(self, samples: Samples, *, on_white: bool) -> Samples:
        """The picture, (H, W, 3), 8 bits a channel, with its alpha dropped or on a white page."""

        def to_8(values: Samples) -> Samples:
            full = (1 << self.bits) - 1
            return values >> self.bits - 8 if self.bits >= 8 else (values * 255 * 2 + full) // (2 * full)

        if self.photometric == 3:
            colours = np.array(self.palette).reshape(3, -1)[:, samples[..., 0]].transpose(1, 2, 0) // 256
            return _on_white(colours, to_8(samples[..., 1:2])) if on_white and 2 in self.extra_samples else colours
        if self.photometric == 0:
            samples = (1 << self.bits) - 1 - samples
        values = to_8(samples)
        if self.photometric == 5:
            return ((255 - values[..., :3]) * (255 - values[..., 3:4]) + 127) // 255
        if self.photometric == 8:
            return lab_to_rgb(values)
        if self.photometric == 6 and samples.shape[2] == 3:
            y, cb, cr = values[..., 0], values[..., 1] - 128, values[..., 2] - 128
            return _rounded(np.stack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb], 2))
        channels = 3 if self.photometric == 2 else 1
        colours = values[..., :channels]
        if 1 in self.extra_samples:  # premultiplied
            colours = np.minimum(255, colours * 255 // np.maximum(1, values[..., channels : channels + 1]))
        if on_white and {1, 2} & set(self.extra_samples):
            colours = _on_white(colours, values[..., channels : channels + 1])
        return np.broadcast_to(colours, (*samples.shape[:2], 3))


def _on_white(colours: Samples, alpha: Samples) -> Samples:
    return (colours * alpha + 255 * (255 - alpha) + 127) // 255


def lab_to_rgb(values: Samples) -> Samples:
    """CIE L*a*b* of D50 to sRGB, by CIE 15 and Bradford's matrix; a and b are signed bytes."""
    lightness = (values[..., 0] * 100 / 255 + 16) / 116
    a, b = ((values[..., at] + 128) % 256 - 128 for at in (1, 2))
    steps = np.stack([lightness + a / 500, lightness, lightness - b / 200], 2)
    xyz = np.where(steps > 6 / 29, steps**3, 3 * (6 / 29) ** 2 * (steps - 4 / 29)) * [0.9642, 1, 0.8249]
    to_linear = [
        [3.1338561, -1.6168667, -0.4906146],
        [-0.9787684, 1.9161415, 0.0334540],
        [0.0719453, -0.2289914, 1.4052427],
    ]
    linear = np.clip(xyz @ np.array(to_linear).T, 0, 1)
    return _rounded(255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055))


def _rounded(values: NDArray[np.float64]) -> Samples:
    return np.rint(np.clip(values, 0, 255)).astype(np.int64)


def tiff(samples: Samples, kind: Kind) -> bytes:
    """The file of `samples`, (H, W, N)."""
    height, width, count = samples.shape
    planes = [samples] if kind.planar == 1 else np.split(samples, count, 2)
    blocks = [_encode(block, kind) for plane in planes for block in _blocks(plane, kind.layout)]
    entries: dict[int, tuple[str, Sequence[int]]] = {
        256: ("I", [width]),
        257: ("I", [height]),
        258: ("H", [kind.bits] * count),
        259: ("H", [COMPRESSIONS[kind.compression]]),
        262: ("H", [kind.photometric]),
        266: ("H", [kind.fill_order]),
        277: ("H", [count]),
        284: ("H", [kind.planar]),
        317: ("H", [2 if kind.differences else 1]),
        339: ("H", [kind.sample_format] * count),
    }
    if kind.layout == "tiles":
        entries |= {322: ("I", _TILE[1:]), 323: ("I", _TILE[:1])}
    else:
        entries[278] = ("I", [height if kind.layout == "strip" else _ROWS])
    if kind.extra_samples:
        entries[338] = ("H", kind.extra_samples)
    if kind.palette:
        entries[320] = ("H", kind.palette)
    if kind.photometric == 6:
        entries[530] = ("H", [1, 1])
    offsets = [8, *itertools.accumulate((len(block) for block in blocks), initial=8)][1:-1]
    offset_tag, size_tag = (324, 325) if kind.layout == "tiles" else (273, 279)
    entries |= {offset_tag: ("I", offsets), size_tag: ("I", [len(block) for block in blocks])}
    return _file(kind.order, b"".join(blocks), entries)


def _blocks(plane: Samples, layout: str) -> Iterator[Samples]:
    height, width, _ = plane.shape
    if layout != "tiles":
        rows = height if layout == "strip" else _ROWS
        yield from (plane[top : top + rows] for top in range(0, height, rows))
        return
    rows, columns = _TILE
    padded = np.pad(plane, ((0, -height % rows), (0, -width % columns), (0, 0)))
    for top, left in itertools.product(range(0, height, rows), range(0, width, columns)):
        yield padded[top : top + rows, left : left + columns]


def _encode(block: Samples, kind: Kind) -> bytes:
    if kind.differences:
        block = np.diff(block, axis=1, prepend=0) & (1 << kind.bits) - 1
    lines = block.reshape(len(block), -1)
    packed = {8: "u1", 16: "u2", 32: "u4"}.get(kind.bits)
    data = lines.astype(f"{kind.order}{packed}").tobytes() if packed else _pack(lines, kind.bits)
    data = _COMPRESS[kind.compression](data, len(data) // len(block))
    return data.translate(_REVERSED) if kind.fill_order == 2 else data


def _pack(lines: Samples, bits: int) -> bytes:
    digits = (lines[..., None] >> np.arange(bits - 1, -1, -1)) & 1
    return np.packbits(digits.reshape(len(lines), -1).astype(np.uint8), axis=1).tobytes()


def _lzw(data: bytes) -> bytes:
    """Single bytes as codes of nine bits; the table is cleared before its codes have ten."""
    codes = [code for at in range(0, len(data), 200) for code in (256, *data[at : at + 200])]
    digits = "".join(f"{code:09b}" for code in (*codes, 257))
    return int(digits + "0" * (-len(digits) % 8), 2).to_bytes(-(-len(digits) // 8), "big")


def _packbits(data: bytes, line: int) -> bytes:
    """Runs of bytes as they are; none crosses the end of a line."""
    pieces = (data[at : min(at + 128, at - at % line + line)] for at in _packbits_starts(len(data), line))
    return b"".join(bytes([len(piece) - 1]) + piece for piece in pieces)


def _packbits_starts(size: int, line: int) -> Iterator[int]:
    for start in range(0, size, line):
        yield from range(start, start + line, 128)


_COMPRESS: dict[str, Callable[[bytes, int], bytes]] = {
    "none": lambda data, line: data,
    "lzw": lambda data, line: _lzw(data),
    "deflate": lambda data, line: zlib.compress(data),
    "packbits": _packbits,
    "lzma": lambda data, line: lzma.compress(data),
}


def _file(order: str, body: bytes, entries: dict[int, tuple[str, Sequence[int]]]) -> bytes:
    start = 8 + len(body)
    directory, behind = struct.pack(f"{order}H", len(entries)), b""
    for tag, (form, values) in sorted(entries.items()):
        data = struct.pack(f"{order}{len(values)}{form}", *values)
        if len(data) > 4:
            place = start + 2 + 12 * len(entries) + 4 + len(behind)
            data, behind = struct.pack(f"{order}I", place), behind + data
        directory += struct.pack(f"{order}HHI", tag, {"H": 3, "I": 4}[form], len(values)) + data.ljust(4, b"\0")
    mark = b"II*\0" if order == "<" else b"MM\0*"
    return mark + struct.pack(f"{order}I", start) + body + directory + bytes(4) + behind
