"""This process among those that torchrun starts. Loads no PyTorch."""

from __future__ import annotations

import os
from dataclasses import dataclass

from robustfeat.errors import InputError

__all__ = ["Ranks"]


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together.

    Attributes:
        rank, world: its number, and how many there are.
        local_rank, local_world: the same on this machine.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1

    @classmethod
    def from_environment(cls) -> Ranks:
        """Reads the ranks from torchrun's environment; a single process without torchrun.

        Raises:
            InputError: the variables that torchrun sets make no sense.
        """
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            return cls()
        values = [os.environ.get(name, default) for name, default in zip(names, "0101", strict=True)]
        try:
            ranks = cls(*map(int, values))
        except ValueError:
            ranks = cls(-1)
        if not (0 <= ranks.rank < ranks.world and 0 <= ranks.local_rank < ranks.local_world <= ranks.world):
            raise InputError(
                f"{', '.join(names)}: expected what torchrun sets; got {', '.join(values)}", fix="unset them"
            )
        return ranks
