"""Makes thumbnails of a command's images."""

from __future__ import annotations

import io
from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from robustfeat.errors import RobustFeatError
from robustfeat.hub.preprocessing import Preprocessing
from robustfeat.serving.decoding.parts import PartReader
from robustfeat.serving.decoding.pool import DecoderPool
from robustfeat.serving.decoding.worker import Task
from robustfeat.serving.inputs.listing import list_inputs
from robustfeat.system import available_cpus

__all__ = ["read_thumbnails"]

_SIDE = 144
"""Longer side in pixels."""

_PADDING = (1, 254, 2)
"""Padding colour, which is cropped off again. It is unlikely at the edge of a photograph."""

_PART = 12
"""Images per decoder process, which take about as long as its start."""


def read_thumbnails(inputs: Sequence[str], paths: Collection[str]) -> dict[str, bytes]:
    """Reads WebP thumbnails, by path, of the `paths` that are among `inputs` and can be read.

    Decoder processes read them, so an image that crashes one only loses its thumbnail.

    Args:
        inputs: see `list_inputs`; `-` cannot be read a second time.
        paths: paths as in the index.
    """
    if not paths or not inputs or "-" in inputs:
        return {}
    wanted = set(paths)
    try:
        with list_inputs(inputs) as found:
            lines = {image.path: image.to_line() for image in found if image.path in wanted}
        squares = _decode(list(lines.values()))
    except RobustFeatError:  # moved or deleted in the meantime
        return {}
    return {path: _encode(square) for path, square in zip(lines, squares, strict=True) if square is not None}


def _decode(lines: Sequence[bytes]) -> list[NDArray[np.uint8] | None]:
    """Padded squares of images; None for unreadable ones."""
    if not lines:
        return []
    red, green, blue = (value / 255 for value in _PADDING)
    contract = Preprocessing(_SIDE, interpolation="lanczos", crop_mode="border", mean=(red, green, blue))
    workers = min(available_cpus(), -(-len(lines) // _PART))
    failed: set[int] = set()
    with DecoderPool(contract, scaled=True, workers=workers, places=len(lines)) as pool:
        place, waiting = 0, []
        for part, data in PartReader().parts(lines, -(-len(lines) // workers)):
            waiting.append((place, pool.submit(Task(place, place, part, data, {}))))
            place += len(part)
        for first, future in waiting:
            failed |= {first + offset for offset in future.result().failed}
        return [None if at in failed else pool.squares[at].copy() for at in range(len(lines))]


def _encode(square: NDArray[np.uint8]) -> bytes:
    """Encodes the image without its padding as WebP."""
    shown = (square != np.array(_PADDING, np.uint8)).any(2)
    rows, columns = (np.flatnonzero(shown.any(axis)) for axis in (1, 0))
    if len(rows):
        square = square[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    written = io.BytesIO()
    Image.fromarray(square).save(written, "WEBP", quality=75)
    return written.getvalue()
