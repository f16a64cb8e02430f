"""Appends to an output: its rows stay, and new inputs follow."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from robustfeat.errors import InputError
from robustfeat.serving.bulk.formats import Block, BlockStream
from robustfeat.serving.bulk.job import Places, brief
from robustfeat.serving.bulk.outputs import FileRecord, Output, index_records, open_existing, read_records
from robustfeat.serving.bulk.plan import Fresh, Plan
from robustfeat.serving.bulk.storage import file_exists
from robustfeat.serving.identity import FEATURE_KEYS, ModelIdentity
from robustfeat.serving.inputs.input_list import InputList

__all__ = ["open_to_continue", "plan_append"]


@dataclass(frozen=True)
class _Append(Plan):
    existing: Output

    @property
    def images(self) -> int:
        return self.existing.rows + len(self.fresh)

    @property
    def first_row(self) -> int:
        return self.existing.rows

    @property
    def unchanged(self) -> bool:
        return not len(self.fresh)

    def kept_files(self, places: Places, rows_per_file: int | None) -> Sequence[FileRecord]:
        there = self.existing
        if there.places != places or there.meta.get("rows_per_file") != rows_per_file or rows_per_file is None:
            return ()
        return [record for record in read_records(there.meta) if record.rows == rows_per_file]

    def blocks(self, fresh: Fresh, start: int) -> Iterator[Block]:
        there = self.existing
        if start < there.rows:
            first = start // there.files[0].rows
            before = sum(file.rows for file in there.files[:first])
            yield from BlockStream(self._existing_blocks(first)).skip(start - before)
        yield from fresh(max(0, start - there.rows))

    def _existing_blocks(self, first_file: int) -> Iterator[Block]:
        lines = self.existing.index_lines(first_file)
        for features in self.existing.features(first_file):
            yield Block(features, b"".join(itertools.islice(lines, len(features))))


@contextmanager
def plan_append(inputs: InputList, places: Places, model: ModelIdentity) -> Iterator[Plan]:
    """Opens the output to append to. Inputs are new if their path is not in its index.

    If the inputs have a path more often than the index, the additional ones are new.

    Raises:
        InputError: see `open_to_continue`, or the output does not exist.
    """
    if not output_exists(places):
        raise InputError(
            f"{places.features} does not exist", argument="append", value=True, fix="run without `append` first"
        )
    with open_to_continue(places, model, "append") as existing, inputs.another() as fresh:
        known = Counter(_path_digest(record) for record in index_records(existing))
        for image in inputs:
            key = _path_digest(image.index_fields())
            if known[key] > 0:
                known[key] -= 1
            else:
                fresh.append(image)
        yield _Append(fresh, existing, len(inputs) - len(fresh))


def output_exists(places: Places) -> bool:
    """Whether an output, or a part of one, exists."""
    return file_exists(places.meta) or file_exists(places.features)


@contextmanager
def open_to_continue(places: Places, model: ModelIdentity, argument: str) -> Iterator[Output]:
    """Opens the output to which features of `model` will be added.

    Args:
        argument: the caller's parameter, for messages.

    Raises:
        InputError: the output is damaged, or was made by another model or with other options.
    """
    with open_existing(places) as output:
        if key := output.model.difference(model, FEATURE_KEYS):
            theirs, mine = brief(output.model.values(key)[key]), brief(model.values(key)[key])
            raise InputError(
                f"{places.features} was made with {key} {theirs}; this run uses {mine}",
                argument=argument,
                value=True,
                fix="use the same model and options, or another `out`",
            )
        # Check the header now rather than after the work.
        if output.rows:
            next(output.features())
        yield output


def _path_digest(fields: dict[str, str]) -> bytes:
    return hashlib.sha256(fields.get("path_bytes", fields["path"]).encode()).digest()[:16]
