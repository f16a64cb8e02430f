"""Which test images a classifier tells, as text for JSON."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["pack", "unpack"]


def pack(right: NDArray[np.bool_]) -> str:
    """(m,) bool as text: the number of images, and eight of them per byte in hexadecimal digits."""
    return f"{len(right)}:{np.packbits(right).tobytes().hex()}"


def unpack(text: str) -> NDArray[np.bool_]:
    """The inverse of `pack`.

    Raises:
        ValueError: it is no such text.
    """
    count, _, digits = text.partition(":")
    packed = np.frombuffer(bytes.fromhex(digits), np.uint8)
    if len(packed) != -(-int(count) // 8):
        raise ValueError(f"expected {count} answers; got {8 * len(packed)}")
    bits = np.unpackbits(packed, count=int(count))
    right: NDArray[np.bool_] = bits.astype(bool)
    return right
