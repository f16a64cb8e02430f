"""What the supervisor tells its workers of reloads."""

from __future__ import annotations

import mmap

__all__ = ["Reloads"]


class Reloads:
    """Whether the last reload was refused, in memory that all processes of a server share."""

    def __init__(self) -> None:
        self._shared = mmap.mmap(-1, 1)

    @property
    def refused(self) -> bool:
        """Whether the last one was refused."""
        return bool(self._shared[0])

    @refused.setter
    def refused(self, value: bool) -> None:
        self._shared[0] = value
