"""Splits a run into parts that any scheduler can distribute, for joining later."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from robustfeat.serving.bulk.plan import Plan
from robustfeat.serving.inputs.input_list import InputList

__all__ = ["Part", "plan_part"]


@dataclass(frozen=True)
class Part:
    """One of `of` parts of a list of inputs.

    Attributes:
        number: number of the part, from 1.
        of: number of parts.
    """

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Part:
        """Reads `3/7`.

        Raises:
            ValueError: the text is not such a part.
        """
        match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
        part = cls(int(match[1]), int(match[2])) if match else None
        if part is None or not 1 <= part.number <= part.of:
            raise ValueError(f"expected I/N with I from 1 to N, such as 3/7; got {text!r}")
        return part

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def rows(self, inputs: int, shard_rows: int) -> range:
        """The inputs of this part. They are whole shards, so batches are the same as in a run without parts."""
        shards = -(-inputs // shard_rows)
        first, end = (number * shards // self.of * shard_rows for number in (self.number - 1, self.number))
        return range(min(first, inputs), min(end, inputs))


@contextmanager
def plan_part(inputs: InputList, part: Part, shard_rows: int) -> Iterator[Plan]:
    """Plans a run over the inputs of one part, which is empty if there are fewer shards than parts."""
    rows = part.rows(len(inputs), shard_rows)
    with inputs.another() as fresh:
        for line in inputs.lines(rows.start, rows.stop):
            fresh.append_line(line)
        yield Plan(
            fresh,
            part={
                "number": part.number,
                "of": part.of,
                "first_row": rows.start,
                "inputs": len(inputs),
                "inputs_sha256": inputs.sha256,
                "shard_rows": shard_rows,
            },
        )
