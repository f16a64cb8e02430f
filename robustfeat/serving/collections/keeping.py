"""Measures images to choose the one to keep per group of duplicates."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from robustfeat.errors import DecodeError, RobustFeatError
from robustfeat.hub.preprocessing import decode, image_size
from robustfeat.progress import Progress
from robustfeat.serving.inputs.listing import list_inputs
from robustfeat.serving.inputs.parquet import ParquetSources
from robustfeat.serving.inputs.sources import ImageSource

__all__ = ["KEEP", "Measures", "measure_images", "sharpness"]

KEEP = ("first", "largest", "sharpest")
"""Which image to keep: the first row, the most pixels, or the most detail."""

Measures = dict[tuple[str, bytes | None], tuple[float, int]]
"""Quality of images, larger is better: pixels or sharpness, then the size of the file.

Keys are path and sha256, since images of several folders may have the same path. Features without sha256 use path and
None.
"""

_AT_ONCE = 32
"""Image files in memory at a time."""

_SIDE = 512
"""Longer side in pixels at which sharpness is compared."""


def measure_images(
    keep: str,
    inputs: Sequence[str],
    paths: Collection[str],
    *,
    threads: int = 1,
    progress: Progress | None = None,
) -> Measures:
    """Measures the quality of images.

    Missing and unreadable images are left out. Decoder processes decoded these images before, so it is safe to decode
    these few here.

    Args:
        keep: `largest` or `sharpest`.
        inputs: the images, see `list_inputs`.
        paths: paths of the images to measure, as in the index.
        threads: number of images to decode in parallel.
        progress: counts images.
    """
    measure = {"largest": _pixels, "sharpest": _detail}[keep]
    wanted, parquet = set(paths), ParquetSources()
    measured: Measures = {}
    with list_inputs(inputs) as found, ThreadPoolExecutor(threads) as pool:
        chosen = (image for image in found if image.path in wanted)
        while part := list(itertools.islice(chosen, _AT_ONCE)):
            contents = [_read(source, parquet) for source in part]
            for source, data, value in zip(part, contents, pool.map(_try(measure), contents), strict=True):
                if value is not None:
                    sha256 = hashlib.sha256(data).digest()
                    measured[source.path, sha256] = measured[source.path, None] = value, len(data)
            if progress:
                progress.advance(len(part))
    return measured


def _read(source: ImageSource, parquet: ParquetSources) -> bytes:
    """Reads an image file; returns nothing if it cannot be read."""
    try:
        data = parquet.read(source) if source.kind == "parquet" else source.read()
    except (RobustFeatError, OSError):
        return b""
    return data if isinstance(data, bytes) else b""


def _try(measure: Callable[[bytes], float]) -> Callable[[bytes], float | None]:
    def measured(data: bytes) -> float | None:
        try:
            return measure(data)
        except DecodeError:
            return None

    return measured


def _pixels(data: bytes) -> float:
    width, height = image_size(data)
    return float(width * height)


def _detail(data: bytes) -> float:
    image = decode(data, at_least=_SIDE).convert("L")
    longer = max(image.size)
    # Enlarge small images, so a reduced copy never has more detail than its original.
    size = (max(1, image.width * _SIDE // longer), max(1, image.height * _SIDE // longer))
    return sharpness(np.asarray(image.resize(size, Image.Resampling.BILINEAR), np.float32))


def sharpness(grey: NDArray[np.float32]) -> float:
    """The variance of the Laplacian of a grey image, (H, W); 0 below 3 pixels per side.

    Source: Pech-Pacheco et al., Diatom autofocusing in brightfield microscopy, ICPR 2000.
    """
    if min(grey.shape) < 3:
        return 0.0
    inner = grey[1:-1, 1:-1]
    return float((grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * inner).var())
