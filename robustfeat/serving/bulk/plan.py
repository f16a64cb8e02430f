"""Plans a run: the inputs to embed, and the rows that an existing output already has."""

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
    """A run to a new output, which embeds every input.

    Attributes:
        fresh: the inputs to embed.
        existing: the existing output, if the new one reuses its rows and replaces it.
        known: number of inputs whose features `existing` already has.
        part: the part's number and inputs for the meta file, if the run is one of several parts.
    """

    fresh: InputList
    existing: Output | None = None
    known: int = 0
    part: Mapping[str, Any] | None = None

    @property
    def images(self) -> int:
        """Number of rows of the output."""
        return len(self.fresh)

    @property
    def first_row(self) -> int:
        """The row number of the first of `fresh`."""
        return 0

    @property
    def unchanged(self) -> bool:
        """Whether the output stays unchanged."""
        return False

    def kept_files(self, places: Places, rows_per_file: int | None) -> Sequence[FileRecord]:
        """Number of first files of `existing` that the new output keeps."""
        return ()

    def blocks(self, fresh: Fresh, start: int) -> Iterator[Block]:
        """Yields the rows of the output from `start` on, in order.

        Args:
            fresh: returns the rows of the inputs `fresh` from a number on.
            start: number of rows to skip.

        Raises:
            InputError: the existing output cannot be read.
        """
        return fresh(start)
