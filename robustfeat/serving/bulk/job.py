"""Defines an embedding run: its identity and the places of its files."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from robustfeat.errors import InputError
from robustfeat.serving.bulk.formats import FORMATS
from robustfeat.serving.bulk.storage import file_exists
from robustfeat.serving.identity import ModelIdentity
from robustfeat.serving.inputs.input_list import InputList
from robustfeat.serving.inputs.remote import is_remote

__all__ = ["Job", "Places", "brief", "holds_dataset", "identify"]

_DATASET_META = "_meta.json"


@dataclass(frozen=True)
class Places:
    """The paths or URLs of an output's files, and of the folder of shards.

    An output is one file of features or a dataset, a folder of several files.

    Attributes:
        features: the file of features, or the folder of a dataset, which ends in a slash.
        index: the index file, or the pattern of a dataset's index files.
        meta: the meta file.
        shards: the folder of shards.
        suffix: the format of the features.
    """

    features: str
    index: str
    meta: str
    shards: str
    suffix: str

    @classmethod
    def of(cls, out: str, argument: str | None = "out") -> Places:
        """The places for one file of features or for a dataset.

        Args:
            out: the file; or the folder, with a trailing slash unless it already is a dataset.
            argument: the caller's parameter, for messages.

        Raises:
            InputError: the suffix is unknown, the folder is missing, or a file or folder of another kind is there.
        """

        def error(what: str, fix: str | None = None) -> InputError:
            if argument is None:
                return InputError(f"{out}: {what}", fix=fix)
            return InputError(what, argument=argument, value=out, fix=fix)

        is_dataset = out.endswith("/") or holds_dataset(out)
        folder, slash, name = out.rstrip("/").rpartition("/")
        stem, dot, ending = name.rpartition(".")
        suffix = dot + ending
        if is_dataset and suffix not in FORMATS:
            stem, suffix = name, ".npy"
        if suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
            raise error("needs pyarrow", "pip install 'robustfeat[parquet]', or choose a name ending in .npy")
        if suffix not in FORMATS or not stem or name in {".", ".."} or folder.endswith(":/"):
            raise error(f"expected a name ending in {', '.join(FORMATS)}, or in / for a folder of several files")
        if not is_remote(out):
            if not Path(folder or slash or ".").is_dir():
                raise error(f"the folder {folder} does not exist", "make it first")
            if not is_dataset and Path(out).is_dir():
                raise error("is a folder", "name a file")
            if is_dataset and Path(out.rstrip("/")).is_file():
                raise error("is a file", "choose another name")
        beside, shards = f"{folder}{slash}", f"{folder}{slash}.{name}.shards"
        if is_dataset:
            root = f"{beside}{name}/"
            return cls(root, f"{root}_*.index.jsonl", f"{root}{_DATASET_META}", shards, suffix)
        return cls(out, f"{beside}{stem}.index.jsonl", f"{beside}{stem}.meta.json", shards, suffix)

    @property
    def is_dataset(self) -> bool:
        """Whether the output is a folder of several files."""
        return self.features.endswith("/")

    def file(self, kind: str, number: int = 0) -> str:
        """The place of the `meta` file, or of file `number` of the `features` or the `index`.

        Names with a leading underscore are ignored by readers of Parquet, such as Spark.
        """
        if not self.is_dataset or kind == "meta":
            return str(getattr(self, kind))
        return (
            f"{self.features}{number:06}{self.suffix}"
            if kind == "features"
            else (f"{self.features}_{number:06}.index.jsonl")
        )

    def staged(self, kind: str, number: int = 0) -> str:
        """The file's name in the folder of shards, where it is until all files are complete."""
        return f"new-{kind}-{number:06}" if self.is_dataset and kind != "meta" else f"new-{kind}"

    def with_suffix(self, suffix: str) -> Places:
        """The dataset with files of another format."""
        return replace(self, suffix=suffix)

    def with_format(self, suffix: str) -> Places:
        """The output of the same stem in another format, which would share index and meta file."""
        features, shards = self.features.removesuffix(self.suffix), self.shards.removesuffix(f"{self.suffix}.shards")
        return replace(self, features=features + suffix, shards=f"{shards}{suffix}.shards", suffix=suffix)


def holds_dataset(place: str) -> bool:
    """Whether a local folder, or a URL that ends in a slash, is a dataset of features."""
    if is_remote(place):
        return place.endswith("/") and file_exists(f"{place}{_DATASET_META}")
    return Path(place, _DATASET_META).is_file()


@dataclass(frozen=True)
class Job:
    """The parts of a run that stay the same when it resumes.

    Attributes:
        images: number of inputs to embed.
        first_row: number of the first row, after the rows of an output to which it appends.
        shard_rows: rows per shard, a multiple of the batch size.
        identity: everything that determines the bytes of the output.
    """

    images: int
    first_row: int
    shard_rows: int
    identity: dict[str, Any]

    @property
    def rows_per_file(self) -> int | None:
        """Rows per file of a dataset; None for one file."""
        rows: int | None = self.identity.get("rows_per_file")
        return rows

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.images // self.shard_rows)

    def rows(self, shard: int) -> range:
        """The inputs of a shard."""
        return range(shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.images))


def identify(model: ModelIdentity, inputs: InputList, batch_size: int) -> dict[str, Any]:
    """Everything that determines the bytes of features and index."""
    return {**model.to_meta(batch_size), "inputs": len(inputs), "inputs_sha256": inputs.sha256}


def brief(value: Any) -> str:
    """Shortens a value for a message."""
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:36]}..."
