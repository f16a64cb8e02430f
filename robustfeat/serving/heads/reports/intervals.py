"""Computes the confidence interval of a measured accuracy."""

from __future__ import annotations

import math

__all__ = ["wilson_interval"]

_Z = 1.959963984540054  # the 97.5 % quantile of the normal distribution


def wilson_interval(share: float, rows: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of independent rows.

    It is also valid for few rows and for shares near 0 and 1. It does not account for settings that the same rows
    chose, since the best of many scores is partly luck.

    Source: Wilson, JASA 1927; recommended by Brown, Cai and DasGupta, Statistical Science 2001.

    >>> wilson_interval(0.81, 100)
    (0.7222..., 0.8748...)
    """
    z2 = _Z**2 / rows
    middle, half = share + z2 / 2, _Z * math.sqrt(share * (1 - share) / rows + z2 / (4 * rows))
    return max(0.0, (middle - half) / (1 + z2)), min(1.0, (middle + half) / (1 + z2))
