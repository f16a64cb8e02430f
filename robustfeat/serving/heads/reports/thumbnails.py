"""Small pictures of images that the arguments of a command name."""

from __future__ import annotations

import io
from collections.abc import Collection, Sequence

from PIL import Image

from robustfeat.errors import RobustFeatError
from robustfeat.hub.preprocessing import decode
from robustfeat.serving.inputs.listing import list_inputs
from robustfeat.serving.inputs.parquet import ParquetImages
from robustfeat.serving.inputs.sources import ImageSource

__all__ = ["read_thumbnails"]

_SIDE = 144
"""Pixels of the longer side."""


def read_thumbnails(inputs: Sequence[str], paths: Collection[str]) -> dict[str, bytes]:
    """WebP files, by path, of those of `paths` that are found among `inputs` and can be read.

    The images were decoded before, by decoders that may crash; these few are decoded here.

    Args:
        inputs: as `list_inputs` takes them; `-` cannot be read a second time.
        paths: as the index has them.
    """
    if not paths or not inputs or "-" in inputs:
        return {}
    wanted = set(paths)
    try:
        with list_inputs(inputs) as found:
            sources = {image.path: image for image in found if image.path in wanted}
    except RobustFeatError:  # moved or deleted since
        return {}
    drawn = ((path, _draw(source)) for path, source in sources.items())
    return {path: picture for path, picture in drawn if picture is not None}


def _draw(source: ImageSource) -> bytes | None:
    try:
        of_parquet = source.kind == "parquet"
        data = ParquetImages(source.file, source.detail).read(source.at) if of_parquet else source.read()
        if isinstance(data, str):  # why the row has no image
            return None
        image = decode(data, at_least=_SIDE)
        image.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
        written = io.BytesIO()
        image.save(written, "WEBP", quality=75)
    except (RobustFeatError, OSError, ValueError):
        return None
    return written.getvalue()
