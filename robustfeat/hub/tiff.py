"""Refuses TIFF files that Pillow opens but decodes to wrong pixels.

Pillow reads compressed files with libtiff and uncompressed ones itself. Its own reader treats separate planes as 8-bit
samples, without an error. `tests/hub/test_tiff.py` compares every pixel type of Pillow, in each layout and compression,
with the written pixels.
"""

from __future__ import annotations

from typing import Any

from robustfeat.errors import DecodeError

__all__ = ["refuse_misread"]

_BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER, _SAMPLES, _PLANAR = 258, 259, 262, 266, 277, 284
_EXTRA_SAMPLES, _SAMPLE_FORMAT, _SUBSAMPLING = 338, 339, 530
_UNCOMPRESSED, _WORD_ALIGNED_FAX = 1, 32771
_BLACK_IS_ZERO, _RGB, _PALETTE, _CMYK, _YCBCR, _LAB = 1, 2, 3, 5, 6, 8
_CHANNELS = {_RGB: 3, _CMYK: 4, _YCBCR: 3, _LAB: 3}
_UNSIGNED, _PREMULTIPLIED = {1}, 1
_PLAIN_PLANES = {1: (_BLACK_IS_ZERO,), 8: (_BLACK_IS_ZERO, _RGB, _PALETTE, _CMYK)}


def refuse_misread(tags: Any, *, sees_alpha: bool) -> None:
    """Refuses a file that Pillow would decode wrongly, or whose values have no defined range.

    Args:
        tags: the tags of the first page, `tag_v2` of Pillow's image.
        sees_alpha: whether the alpha is used, so it must be right, too.

    Raises:
        DecodeError: the file is refused.
    """
    bits = tags.get(_BITS, (1,))
    if set(tags.get(_SAMPLE_FORMAT, (1,))) != _UNSIGNED or max(bits) > 16:
        raise DecodeError(
            "TIFF: signed, 32-bit and floating-point pixels have no defined range",
            fix="save it with 8 or 16 bits per channel",
        )
    compression, photometric = tags.get(_COMPRESSION, _UNCOMPRESSED), tags.get(_PHOTOMETRIC, 0)
    if compression == _WORD_ALIGNED_FAX:
        raise DecodeError("TIFF: word-aligned fax compression is not read", fix="save it with group 4 or LZW")
    if photometric == _BLACK_IS_ZERO and _PREMULTIPLIED in tags.get(_EXTRA_SAMPLES, ()):
        raise DecodeError("TIFF: premultiplied grey is not read", fix="save it without alpha")
    uncompressed = compression == _UNCOMPRESSED
    if uncompressed and photometric == _YCBCR and len(bits) > 1 and tags.get(_SUBSAMPLING, (2, 2)) != (1, 1):
        raise DecodeError("uncompressed TIFF: subsampled colours are not read", fix="save it as RGB")
    if tags.get(_PLANAR, 1) == 2 and (
        not _are_planes_read(tags, bits, photometric, uncompressed=uncompressed)
        # Pillow misreads a separate alpha plane beside a grey or palette plane.
        or (sees_alpha and _CHANNELS.get(photometric, 1) == 1 and any(tags.get(_EXTRA_SAMPLES, ())))
    ):
        raise DecodeError(
            f"{'uncompressed' if uncompressed else 'compressed'} TIFF: separate planes of this kind are not read",
            fix="save it with interleaved channels (planar configuration 1)",
        )


def _are_planes_read(tags: Any, bits: tuple[int, ...], photometric: int, *, uncompressed: bool) -> bool:
    """Whether Pillow reads separate planes correctly."""
    accounted = _CHANNELS.get(photometric, 1) + len(tags.get(_EXTRA_SAMPLES, ()))
    if photometric == _LAB or tags.get(_SAMPLES, 1) > accounted:
        return False
    if not uncompressed:
        return True
    if tags.get(_FILL_ORDER, 1) != 1:
        return False
    return photometric in _PLAIN_PLANES.get(max(bits), ())
