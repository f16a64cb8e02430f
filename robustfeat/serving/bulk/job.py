"""What an embedding run consists of: its identity, the folder of its shards, and its output files."""

from __future__ import annotations

import hashlib
import itertools
import json
import platform
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL

import robustfeat
from robustfeat.errors import InputError
from robustfeat.serving.bulk.formats import FORMATS, Block, read_features
from robustfeat.serving.bulk.storage import LocalFolder, RemoteFolder, file_exists, open_input, open_output
from robustfeat.serving.extractor import FeatureExtractor
from robustfeat.serving.inputs.input_list import InputList
from robustfeat.serving.inputs.remote import is_remote

__all__ = [
    "JOB_FILE",
    "Existing",
    "Job",
    "Places",
    "claim_folder",
    "finished_shards",
    "identify",
    "join_shards",
    "read_existing",
    "unknown_inputs",
]

JOB_FILE = "job.json"


@dataclass(frozen=True)
class Places:
    """Where the output files lie, and the folder of shards until they are there; paths or URLs."""

    features: str
    index: str
    meta: str
    shards: str
    suffix: str

    @classmethod
    def of(cls, out: str, argument: str = "--out") -> Places:
        """Those of one file of features, given as `argument`.

        Raises:
            InputError: the suffix is unknown or the folder missing.
        """
        stem, dot, ending = out.rpartition(".")
        if dot + ending not in FORMATS or not stem.rpartition("/")[2]:
            raise InputError(f"{argument} {out}: expected a name ending in {', '.join(FORMATS)}")
        folder, slash, name = out.rpartition("/")
        if not is_remote(out):
            if not Path(folder or ".").is_dir():
                raise InputError(f"{argument} {out}: the folder {folder} does not exist; make it first")
            if Path(out).is_dir():
                raise InputError(f"{argument} {out}: is a folder; name a file")
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
    """The files that `--append` adds to."""

    meta: dict[str, Any]
    sha256: str
    rows: int


def identify(extractor: FeatureExtractor, inputs: InputList, batch_size: int) -> dict[str, Any]:
    """What decides the bytes of features and index."""
    config, engine = extractor.config, extractor.engine
    return {
        "model": config.name,
        "revision": extractor.folder.revision,
        "files": dict(config.files),
        "precision": extractor.precision,
        "engine": engine.name,
        "device": engine.device,
        "decoding": extractor.decoding,
        "preprocessing_hash": config.preprocessing.hash,
        "feature_size": extractor.feature_size,
        "batch_size": batch_size,
        "threads": engine.threads,
        "versions": {
            "robustfeat": robustfeat.__version__,
            engine.name: engine.version,
            "numpy": np.__version__,
            "pillow": PIL.__version__,
        },
        "inputs": len(inputs),
        "inputs_sha256": inputs.sha256,
    }


def claim_folder(folder: LocalFolder | RemoteFolder, job: Job, places: Places, *, restart: bool) -> set[int]:
    """Makes the folder of a new run or finds that of an unfinished one; gives the shards that are done.

    Raises:
        InputError: another process is at work there, or an unfinished run differs from this one.
    """
    try:
        folder.create()
        names = folder.names()
        found = json.loads(folder.read(JOB_FILE)) if JOB_FILE in names else None
        # The hashes of the files tell models apart; the commit also changes with the card.
        mine = job.identity | {"shard_rows": job.shard_rows, "revision": None}
        if found is not None and mine["appended_to"] and found["appended_to"] not in {None, mine["appended_to"]}:
            found = None  # it was appending to a file that has been replaced since
        if found is not None and found != mine and not restart:
            changes = [
                f"{key} was {_brief(found.get(key))}, now {_brief(mine.get(key))}"
                for key in sorted({*found, *mine})
                if found.get(key) != mine.get(key)
            ]
            folder.release()
            raise InputError(
                f"{places.features}: an unfinished run is there with other settings ({'; '.join(changes)}); "
                "repeat that command to finish it, or pass --restart to discard it"
            )
        if found is None or restart:
            folder.remove(JOB_FILE)
            folder.create()
            folder.write(JOB_FILE, json.dumps(mine).encode())
            return set()
        return finished_shards(folder)
    except OSError as exc:
        raise InputError(f"{places.features}: cannot be written ({exc.strerror or exc}); choose another place") from exc


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:36]}..."


def finished_shards(folder: LocalFolder | RemoteFolder) -> set[int]:
    """Numbers of the shards that are complete."""
    return {int(name.removesuffix(".jsonl")) for name in folder.names() if name.endswith(".jsonl")}


def join_shards(
    places: Places,
    folder: LocalFolder | RemoteFolder,
    job: Job,
    size: int,
    existing: Existing | None,
    *,
    skipped: int,
    timing: dict[str, float],
) -> tuple[int, int]:
    """Joins the shards to the output files and deletes their folder; gives the rows and how many of them failed.

    Done again after a kill at any point, it ends with the same files: those of rows that were there before begin
    with the same bytes before and after, and the meta file, which tells them apart, comes last.
    """
    if existing and not job.images:
        folder.remove(JOB_FILE)
        return existing.rows, int(existing.meta["failed"])
    images = job.first_row + job.images
    identity = {key: value for key, value in job.identity.items() if key != "appended_to"}
    about = {key: str(identity[key]) for key in ("model", "precision", "engine", "preprocessing_hash")}

    def old_index() -> Iterator[bytes]:
        if existing:
            with open_input(places.index) as handle:
                yield from itertools.islice(handle, existing.rows)

    def blocks() -> Iterator[Block]:
        lines = old_index()
        if existing:
            for features in read_features(places.features, places.suffix, size, existing.rows):
                yield Block(features, b"".join(itertools.islice(lines, len(features))))
        for number in range(job.shards):
            features = np.frombuffer(folder.read(f"{number:06}.f32"), "<f4").reshape(-1, size)
            yield Block(features, folder.read(f"{number:06}.jsonl"))

    FORMATS[places.suffix].write(places.features, (images, size), about, blocks())
    failed = 0
    with open_output(places.index) as handle:
        for part in itertools.chain(old_index(), (folder.read(f"{number:06}.jsonl") for number in range(job.shards))):
            failed += part.count(b"\n") - part.count(b'"error": null}\n')
            handle.write(part)
    meta = identity | {
        "versions": identity["versions"] | {"python": platform.python_version()},
        "images": images,
        "failed": failed,
        "skipped": skipped,
        "timing": timing,
    }
    del meta["inputs"]
    with open_output(places.meta) as handle:
        handle.write(json.dumps(meta, indent=2).encode() + b"\n")
    folder.remove(JOB_FILE)
    return images, failed


_SAME_FEATURES = (
    "files",
    "preprocessing_hash",
    "precision",
    "engine",
    "device",
    "decoding",
    "feature_size",
    "batch_size",
)


def read_existing(places: Places, extractor: FeatureExtractor) -> Existing:
    """The files to append to.

    Raises:
        InputError: one is missing, or another model or other options made them.
    """
    for place in (places.features, places.index, places.meta):
        if not file_exists(place):
            raise InputError(f"--append: {place} does not exist; run without --append first")
    with open_input(places.meta) as handle:
        data = handle.read()
    try:
        meta = json.loads(data)
        rows, found = int(meta["images"]), {key: meta[key] for key in (*_SAME_FEATURES, "inputs_sha256")}
    except (ValueError, KeyError, TypeError) as exc:
        raise InputError(f"--append: {places.meta} is not what robustfeat embed writes ({exc!r})") from exc
    with InputList() as none:
        mine = identify(extractor, none, found["batch_size"])
    for key in _SAME_FEATURES:
        if found[key] != mine[key]:
            raise InputError(
                f"--append: {places.features} was made with {key} {_brief(found[key])}, this is {_brief(mine[key])}; "
                "use the same model and options, or another --out"
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
