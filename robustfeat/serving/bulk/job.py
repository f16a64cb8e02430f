"""What an embedding run consists of: its identity, its output files, and the files that it appends to."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robustfeat.errors import InputError
from robustfeat.serving.bulk.formats import FORMATS
from robustfeat.serving.bulk.storage import file_exists, open_input
from robustfeat.serving.identity import FEATURE_KEYS, ModelIdentity
from robustfeat.serving.inputs.input_list import InputList
from robustfeat.serving.inputs.remote import is_remote

__all__ = ["Existing", "Job", "Places", "brief", "identify", "read_existing", "unknown_inputs"]


@dataclass(frozen=True)
class Places:
    """Where the output files lie, and the folder of shards until they are there; paths or URLs."""

    features: str
    index: str
    meta: str
    shards: str
    suffix: str

    @classmethod
    def of(cls, out: str, argument: str | None = "out") -> Places:
        """The places around one file of features.

        Args:
            out: that file.
            argument: the caller's parameter that named it, for messages.

        Raises:
            InputError: the suffix is unknown or the folder missing.
        """

        def error(what: str, fix: str | None = None) -> InputError:
            if argument is None:
                return InputError(f"{out}: {what}", fix=fix)
            return InputError(what, argument=argument, value=out, fix=fix)

        stem, dot, ending = out.rpartition(".")
        if dot + ending not in FORMATS or not stem.rpartition("/")[2]:
            raise error(f"expected a name ending in {', '.join(FORMATS)}")
        folder, slash, name = out.rpartition("/")
        if not is_remote(out):
            if not Path(folder or ".").is_dir():
                raise error(f"the folder {folder} does not exist", "make it first")
            if Path(out).is_dir():
                raise error("is a folder", "name a file")
        return cls(out, f"{stem}.index.jsonl", f"{stem}.meta.json", f"{folder}{slash}.{name}.shards", dot + ending)


@dataclass(frozen=True)
class Job:
    """What a run consists of: what stays the same when it is resumed.

    Attributes:
        images: inputs to embed.
        first_row: number of the first one (rows before it are in the file that is appended to).
        shard_rows: rows in a shard, a multiple of the batch size.
        identity: all that decides the bytes of the output.
    """

    images: int
    first_row: int
    shard_rows: int
    identity: dict[str, Any]

    @property
    def shards(self) -> int:
        """How many."""
        return -(-self.images // self.shard_rows)

    def rows(self, shard: int) -> range:
        """The inputs of a shard."""
        return range(shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.images))


@dataclass(frozen=True)
class Existing:
    """The files that a run appends to."""

    meta: dict[str, Any]
    sha256: str
    rows: int


def identify(model: ModelIdentity, inputs: InputList, batch_size: int) -> dict[str, Any]:
    """What decides the bytes of features and index."""
    return {**model.to_meta(batch_size), "inputs": len(inputs), "inputs_sha256": inputs.sha256}


def read_existing(places: Places, model: ModelIdentity) -> Existing:
    """The files to append to.

    Raises:
        InputError: one is missing, or another model or other options made them.
    """
    for place in (places.features, places.index, places.meta):
        if not file_exists(place):
            raise InputError(f"{place} does not exist", argument="append", value=True, fix="run without `append` first")
    with open_input(places.meta) as handle:
        data = handle.read()
    try:
        meta = json.loads(data)
        rows, found = int(meta["images"]), ModelIdentity.of_meta(meta)
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise InputError(
            f"{places.meta} is not what robustfeat embed writes ({exc!r})", argument="append", value=True
        ) from exc
    if key := found.difference(model, FEATURE_KEYS):
        theirs, mine = brief(found.values(key)[key]), brief(model.values(key)[key])
        raise InputError(
            f"{places.features} was made with {key} {theirs}, this is {mine}",
            argument="append",
            value=True,
            fix="use the same model and options, or another `out`",
        )
    return Existing(meta, hashlib.sha256(data).hexdigest(), rows)


def unknown_inputs(inputs: InputList, places: Places, existing: Existing) -> InputList:
    """The inputs whose path is not in the index yet; where a path is there several times, those beyond that."""
    known: Counter[bytes] = Counter()
    with open_input(places.index) as handle:
        for line in itertools.islice(handle, existing.rows):
            known[_path_digest(json.loads(line))] += 1
    fresh = InputList()
    fresh.skipped = inputs.skipped
    for image in inputs:
        key = _path_digest(image.index_fields())
        if known[key] > 0:
            known[key] -= 1
        else:
            fresh.append(image)
    return fresh


def _path_digest(fields: dict[str, str]) -> bytes:
    return hashlib.sha256(fields.get("path_bytes", fields["path"]).encode()).digest()[:16]


def brief(value: Any) -> str:
    """A value for a message, cut short."""
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:36]}..."
