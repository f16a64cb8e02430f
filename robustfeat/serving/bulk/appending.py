"""Appending to an output: whether it is possible, and which inputs are new."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from robustfeat.errors import InputError
from robustfeat.serving.bulk.formats import read_features
from robustfeat.serving.bulk.job import Places, brief
from robustfeat.serving.bulk.outputs import Output, index_records, open_existing
from robustfeat.serving.bulk.storage import file_exists
from robustfeat.serving.identity import FEATURE_KEYS, ModelIdentity
from robustfeat.serving.inputs.input_list import InputList

__all__ = ["open_to_append", "unknown_inputs"]


@contextmanager
def open_to_append(places: Places, model: ModelIdentity) -> Iterator[Output]:
    """Opens the output that features of `model` are to be appended to.

    Raises:
        InputError: there is none, it is damaged, or another model or other options made it.
    """
    if not file_exists(places.meta) and not file_exists(places.features):
        raise InputError(
            f"{places.features} does not exist", argument="append", value=True, fix="run without `append` first"
        )
    with open_existing(places) as output:
        if key := output.model.difference(model, FEATURE_KEYS):
            theirs, mine = brief(output.model.values(key)[key]), brief(model.values(key)[key])
            raise InputError(
                f"{places.features} was made with {key} {theirs}, this is {mine}",
                argument="append",
                value=True,
                fix="use the same model and options, or another `out`",
            )
        # The header is checked before the work, not after it.
        if output.rows:
            next(read_features(output.features, places.features, places.suffix, model.feature_size, output.rows))
        yield output


def unknown_inputs(inputs: InputList, existing: Output) -> InputList:
    """The inputs whose path is not in the index yet; where a path is there several times, those beyond that.

    Raises:
        InputError: the index is damaged.
    """
    known = Counter(_path_digest(record) for record in index_records(existing))
    fresh = InputList(choice=inputs.choice)
    for image in inputs:
        key = _path_digest(image.index_fields())
        if known[key] > 0:
            known[key] -= 1
        else:
            fresh.append(image)
    return fresh


def _path_digest(fields: dict[str, str]) -> bytes:
    return hashlib.sha256(fields.get("path_bytes", fields["path"]).encode()).digest()[:16]
