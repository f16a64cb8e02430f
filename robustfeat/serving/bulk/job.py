"""What an embedding run consists of: its identity and its output files."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from robustfeat.errors import InputError
from robustfeat.serving.bulk.formats import FORMATS
from robustfeat.serving.identity import ModelIdentity
from robustfeat.serving.inputs.input_list import InputList
from robustfeat.serving.inputs.remote import is_remote

__all__ = ["Job", "Places", "brief", "identify"]


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
        if dot + ending == ".parquet" and importlib.util.find_spec("pyarrow") is None:
            raise error("needs pyarrow", "pip install 'robustfeat[parquet]', or choose a name ending in .npy")
        if dot + ending not in FORMATS or not stem.rpartition("/")[2]:
            raise error(f"expected a name ending in {', '.join(FORMATS)}")
        folder, slash, name = out.rpartition("/")
        if not is_remote(out):
            if not Path(folder or ".").is_dir():
                raise error(f"the folder {folder} does not exist", "make it first")
            if Path(out).is_dir():
                raise error("is a folder", "name a file")
        return cls(out, f"{stem}.index.jsonl", f"{stem}.meta.json", f"{folder}{slash}.{name}.shards", dot + ending)

    def with_format(self, suffix: str) -> Places:
        """The output of the same stem in another format; it would share index and meta file."""
        features, shards = self.features.removesuffix(self.suffix), self.shards.removesuffix(f"{self.suffix}.shards")
        return replace(self, features=features + suffix, shards=f"{shards}{suffix}.shards", suffix=suffix)


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


def identify(model: ModelIdentity, inputs: InputList, batch_size: int) -> dict[str, Any]:
    """What decides the bytes of features and index."""
    return {**model.to_meta(batch_size), "inputs": len(inputs), "inputs_sha256": inputs.sha256}


def brief(value: Any) -> str:
    """A value for a message, cut short."""
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:36]}..."
