"""What a run embeds, and how its output is made of that and of rows that are there already."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from robustfeat.serving.bulk.formats import Block
from robustfeat.serving.bulk.job import Places
from robustfeat.serving.bulk.outputs import FileRecord, Output
from robustfeat.serving.inputs.input_list import InputList

__all__ = ["Fresh", "Plan"]

Fresh = Callable[[int], Iterator[Block]]


@dataclass(frozen=True)
class Plan:
    """A run into a new output: each input is embedded.

    Attributes:
        fresh: the inputs to embed.
        existing: the output that is there and that the new one replaces, if this one is made of it.
        known: inputs that are not embedded, since `existing` holds their features.
        part: for the meta file, which part of which inputs this is, if the run is one of several.
    """

    fresh: InputList
    existing: Output | None = None
    known: int = 0
    part: Mapping[str, Any] | None = None

    @property
    def images(self) -> int:
        """Rows of the output."""
        return len(self.fresh)

    @property
    def first_row(self) -> int:
        """The number that decoders give to the first of `fresh`."""
        return 0

    @property
    def unchanged(self) -> bool:
        """Whether the output stays as it is."""
        return False

    def kept_files(self, places: Places, rows_per_file: int | None) -> Sequence[FileRecord]:
        """The first files of `existing` that the new output has, too."""
        return ()

    def blocks(self, fresh: Fresh, start: int) -> Iterator[Block]:
        """The rows of the output from `start` on, in order.

        Args:
            fresh: gives the rows of the inputs `fresh` from a number on.
            start: how many rows need not be given.

        Raises:
            InputError: the existing output cannot be read.
        """
        return fresh(start)
