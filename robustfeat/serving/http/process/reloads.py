"""Shares the result of the last reload between supervisor and workers."""

from __future__ import annotations

import mmap

__all__ = ["Reloads"]


class Reloads:
    """Whether the last reload was refused, in memory that all processes of a server share."""

    def __init__(self) -> None:
        self._shared = mmap.mmap(-1, 1)

    @property
    def refused(self) -> bool:
        """Whether the last reload was refused."""
        return bool(self._shared[0])

    @refused.setter
    def refused(self, value: bool) -> None:
        self._shared[0] = value
