"""Draws a map's thumbnails on sheets, square WebP images of some hundred thumbnails.

Decoder processes decode the images, so a damaged image can only lose its own thumbnail.
"""

from __future__ import annotations

import io
import itertools
import tempfile
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from robustfeat.hub.preprocessing import MAX_PIXELS, Preprocessing
from robustfeat.progress import Progress
from robustfeat.serving.decoding.parts import PartReader
from robustfeat.serving.decoding.pool import DecoderPool
from robustfeat.serving.decoding.worker import Decoded, Task
from robustfeat.serving.inputs.sources import ImageSource
from robustfeat.system import available_cpus

__all__ = ["Sprites", "draw_sprites", "plan_sprites"]

SIDES = (128, 96, 64, 48)
"""Possible sides of a thumbnail in pixels. The largest that fits is chosen."""

_SHEET = 1536
_QUALITIES = (80, 65, 50, 35)
_PER_PIXEL = 0.36
"""Bytes per pixel of a thumbnail on the page, for the choice of the side. Photographs at quality 80 measured 0.32,
including base64."""

_PART_ROWS = 16


@dataclass(frozen=True, eq=False)
class Sprites:
    """Thumbnails on sheets.

    Attributes:
        side: side of a thumbnail, in pixels.
        columns: thumbnails per row of a sheet. A sheet has at most as many rows.
        rows: the points of the thumbnails, in the order of the sheets, row by row.
        sheets: WebP files.
        failed: chosen points whose image could not be read.
    """

    side: int
    columns: int
    rows: NDArray[np.int32]
    sheets: tuple[bytes, ...]
    failed: int


def plan_sprites(
    places: NDArray[np.float32], wanted: NDArray[np.int64], limit_bytes: int
) -> tuple[int, NDArray[np.int64]]:
    """Chooses the side of the thumbnails, and the points that get one, in the order of the sheets.

    Neighbours on the map are neighbours on the sheets, so a view of a part of the map decodes few sheets. If the limit
    is too small for all, every k-th point in that order gets one.

    Args:
        places: (n, 2) coordinates of the points, from 0 to 1.
        wanted: points with a known image.
        limit_bytes: most bytes of all thumbnails on the page.
    """
    ordered = wanted[np.argsort(_curve(places[wanted]), kind="stable")]
    for side in SIDES:
        if len(ordered) * side * side * _PER_PIXEL <= limit_bytes:
            return side, ordered
    room = int(limit_bytes / (SIDES[-1] ** 2 * _PER_PIXEL))
    return SIDES[-1], ordered[np.linspace(0, len(ordered) - 1, room).astype(np.int64)] if room else ordered[:0]


def _curve(places: NDArray[np.float32]) -> NDArray[np.int64]:
    """The position of each point on Morton's curve, which interleaves the bits of x and y."""
    cells = np.clip(places.astype(np.float64) * 1023, 0, 1023).astype(np.int64)
    numbers = np.zeros(len(places), np.int64)
    for bit in range(10):
        for axis in (0, 1):
            numbers |= ((cells[:, axis] >> bit) & 1) << (2 * bit + axis)
    return numbers


def draw_sprites(
    sources: Mapping[int, ImageSource],
    chosen: NDArray[np.int64],
    side: int,
    limit_bytes: int,
    *,
    workers: int | None = None,
    max_pixels: int = MAX_PIXELS,
    quiet: bool = False,
) -> Sprites:
    """Reads images and draws the sheets.

    Args:
        sources: the image of each point.
        chosen, side: see `plan_sprites`.
        limit_bytes: most bytes of all sheets on the page.
        workers: number of decoder processes; by default all that the cgroup allows.
        max_pixels: largest accepted image.
        quiet: hide progress.

    Raises:
        InputError: a Parquet file or remote storage cannot be read.
        EngineError: no decoder process can be started.
    """
    columns = max(1, _SHEET // side)
    in_order = np.sort(chosen)  # rows of Parquet files must be read in order
    place_of = {int(row): place for place, row in enumerate(chosen)}
    with tempfile.TemporaryFile(prefix="robustfeat-") as scratch:
        # Keep squares on disk, since 100,000 thumbnails of 48 pixels take 691 MB.
        shape = (max(1, len(chosen)), side, side, 3)
        scratch.truncate(int(np.prod(shape)))
        squares = np.memmap(scratch, np.uint8, "r+", shape=shape)
        drawn = np.zeros(len(chosen), bool)
        progress = Progress("thumbnails", len(chosen), quiet=quiet)
        images = [sources[int(row)] for row in in_order]
        for first, found in _read_squares(images, side, workers or available_cpus(), max_pixels):
            for offset, square in enumerate(found):
                if square is not None:
                    place = place_of[int(in_order[first + offset])]
                    squares[place] = square
                    drawn[place] = True
            progress.advance(len(found))
        progress.finish()
        readable = np.flatnonzero(drawn)
        kept, sheets = _encode(squares, readable, columns, limit_bytes)
    rows = chosen[kept].astype(np.int32)
    return Sprites(side, columns, rows, tuple(sheets), len(chosen) - len(readable))


def _read_squares(
    images: Sequence[ImageSource], side: int, workers: int, max_pixels: int
) -> Iterator[tuple[int, list[NDArray[np.uint8] | None]]]:
    """Yields blocks of centre squares: the index of the first, and None for each failed image."""
    contract = Preprocessing(side, interpolation="lanczos")
    slots = deque(range(2 * workers + 1))
    waiting: deque[tuple[Future[Decoded], int, int, int]] = deque()
    lines = [image.to_line() for image in images]
    reader = PartReader()
    places = len(slots) * _PART_ROWS

    def results() -> Iterator[tuple[int, list[NDArray[np.uint8] | None]]]:
        future, first, count, slot = waiting.popleft()
        failed = set(future.result().failed)
        start = slot * _PART_ROWS
        yield first, [None if at in failed else pool.squares[start + at].copy() for at in range(count)]
        slots.append(slot)

    with DecoderPool(contract, scaled=True, workers=workers, places=places, max_pixels=max_pixels) as pool:
        first = 0
        for rows, data in reader.parts(lines, _PART_ROWS):
            if not slots:
                yield from results()
            slot = slots.popleft()
            future = pool.submit(Task(first, slot * _PART_ROWS, rows, data, {}))
            waiting.append((future, first, len(rows), slot))
            first += len(rows)
        while waiting:
            yield from results()


def _encode(
    squares: NDArray[np.uint8], kept: NDArray[np.int64], columns: int, limit_bytes: int
) -> tuple[NDArray[np.int64], list[bytes]]:
    """Encodes sheets that fit the limit as base64, if necessary at lower quality or with fewer thumbnails."""
    per_sheet = columns * columns
    for quality in itertools.chain(_QUALITIES, itertools.repeat(_QUALITIES[-1])):
        parts = [kept[start : start + per_sheet] for start in range(0, len(kept), per_sheet)]
        sheets = [_draw_sheet(squares, part, columns, quality) for part in parts]
        size = sum(-(-len(sheet) // 3) * 4 for sheet in sheets)
        if size <= limit_bytes:
            break
        if quality == _QUALITIES[-1]:
            kept = kept[np.linspace(0, len(kept) - 1, int(0.9 * len(kept) * limit_bytes / size)).astype(np.int64)]
    return kept, sheets


def _draw_sheet(squares: NDArray[np.uint8], places: NDArray[np.int64], columns: int, quality: int) -> bytes:
    side = squares.shape[1]
    sheet = np.zeros((-(-len(places) // columns) * side, columns * side, 3), np.uint8)
    for at, place in enumerate(places):
        top, left = at // columns * side, at % columns * side
        sheet[top : top + side, left : left + side] = squares[place]
    written = io.BytesIO()
    Image.fromarray(sheet).save(written, "WEBP", quality=quality, method=4)
    return written.getvalue()
