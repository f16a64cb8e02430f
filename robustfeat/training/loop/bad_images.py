"""Images of a run that cannot be decoded: they are left out, as long as they are few."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from robustfeat.errors import DataError
from robustfeat.training.loop.distributed import fail_together, gather_objects

__all__ = ["BadImages"]

_MAX_SHARE = 0.01
_ALWAYS_ALLOWED = 10


class BadImages:
    """The bad images of each split, `training`, `validation` and `probe`, on all ranks.

    Args:
        known: from a checkpoint.
    """

    def __init__(self, known: Mapping[str, Iterable[str]] | None = None) -> None:
        self._lines: dict[str, set[str]] = {"training": set(), "validation": set(), "probe": set()}
        for split, lines in (known or {}).items():
            self._lines[split].update(lines)

    def add(self, split: str, failures: tuple[str, ...]) -> list[str]:
        """Adds the failures of all ranks, a collective call; returns the new ones, in the order of the ranks."""
        bad = self._lines[split]
        gathered = [line for lines in gather_objects(failures) for line in lines]
        new = [line for line in dict.fromkeys(gathered) if line not in bad]
        bad.update(new)
        return new

    def require_few(self, split: str, images: int) -> None:
        """Ends all ranks when too many of a split's images are bad; a collective call.

        Raises:
            DataError: more than 10 and more than 1 % are.
        """
        bad = self._lines[split]
        if len(bad) > max(_ALWAYS_ALLOWED, _MAX_SHARE * images):
            fail_together(
                DataError(
                    f"{len(bad)} {split} images cannot be decoded, over 1 % of {images}; first {min(bad)}",
                    fix="repair or remove them, then train again",
                )
            )

    def by_split(self) -> dict[str, list[str]]:
        """The state for a checkpoint: sorted lines by split."""
        return {split: sorted(lines) for split, lines in self._lines.items()}

    def all(self) -> tuple[str, ...]:
        """The lines of all splits, sorted."""
        return tuple(sorted(set().union(*self._lines.values())))
