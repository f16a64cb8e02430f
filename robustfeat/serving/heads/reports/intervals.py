"""How far a measured accuracy may lie from the true one."""

from __future__ import annotations

import math

__all__ = ["wilson_interval"]

_Z = 1.959963984540054  # 97.5 % of the normal distribution


def wilson_interval(share: float, rows: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of independent rows.

    It holds for few rows and for shares near 0 and 1, too. It knows nothing of settings that were chosen by the same
    rows: the best of many scores is partly luck.

    Source: Wilson, JASA 1927; recommended by Brown, Cai and DasGupta, Statistical Science 2001.

    >>> wilson_interval(0.81, 100)
    (0.7222..., 0.8748...)
    """
    z2 = _Z**2 / rows
    middle, half = share + z2 / 2, _Z * math.sqrt(share * (1 - share) / rows + z2 / (4 * rows))
    return max(0.0, (middle - half) / (1 + z2)), min(1.0, (middle + half) / (1 + z2))
