"""Commits the files of an output together. A kill at any point leaves all old or all new files.

A run writes the files into its folder of shards, then the meta file with their hashes, then a commit file. Then it
moves them to their final names. A reader that finds the commit file reads the remaining files from the folder.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import PurePosixPath
from typing import Any

from robustfeat.errors import InputError
from robustfeat.serving.bulk.formats import FORMATS
from robustfeat.serving.bulk.job import Places
from robustfeat.serving.bulk.outputs import COMMIT, FILES_KEY, MALFORMED, FileRecord, Output, read_meta, read_records
from robustfeat.serving.bulk.storage import (
    LocalFolder,
    RemoteFolder,
    file_exists,
    make_folder,
    open_folder,
    open_input,
    open_output,
)
from robustfeat.serving.identity import ModelIdentity

__all__ = [
    "FINISH",
    "NewOutput",
    "count_completed",
    "finish_commit",
    "require_own_place",
    "require_own_stem",
    "require_same_model",
]


FINISH = "free space or restore the permissions, then repeat the command"
"""The fix after a complete output could not be moved to its place. All its files are kept."""

_OWN_NAME = re.compile(r"[0-9]{6,9}\.(npy|parquet|safetensors)|_[0-9]{6,9}\.index\.jsonl")


class NewOutput:
    """A new output in a run's folder of shards.

    Args:
        places: the final places.
        folder: the folder of shards, claimed by the run.
    """

    def __init__(self, places: Places, folder: LocalFolder | RemoteFolder) -> None:
        self._places, self._folder = places, folder

    def completed(self, first: int = 0) -> Iterator[FileRecord]:
        """The consecutive complete files from `first` on."""
        for number in range(first, count_completed(self._folder.names(), first)):
            yield FileRecord(**json.loads(self._folder.read(_record_name(number))))

    @contextmanager
    def open(self, kind: str, number: int) -> Iterator[HashingFile]:
        """Opens file `number` of `features` or `index` for sequential writing."""
        with open_output(f"{self._places.shards}/{self._places.staged(kind, number)}") as handle:
            yield HashingFile(handle)

    def complete(self, number: int, record: FileRecord) -> None:
        """Marks file `number` of features and index as complete."""
        self._folder.write(_record_name(number), json.dumps(asdict(record)).encode())

    def commit(self, meta: Mapping[str, Any], files: Sequence[FileRecord], *, after: Output | None = None) -> None:
        """Writes the meta file with the hashes of all others, and replaces the old output.

        Args:
            meta: the content of the meta file, without the files.
            files: all files of the output.
            after: the output that this one continues.

        Raises:
            InputError: another process has replaced `after`.
        """
        places = self._places
        if after:
            with open_input(places.meta) as handle:
                if hashlib.sha256(handle.read()).hexdigest() != after.meta_sha256:
                    what = f"{places.features}: another process has changed it"
                    raise InputError(what, fix="repeat the command")
        data = {**meta, "format": places.suffix, **_listed(places, files)}
        stale = _names_of_earlier(places) - _names(places, len(files))
        self._folder.write(places.staged("meta"), json.dumps(data, indent=2).encode() + b"\n")
        self._folder.write(COMMIT, json.dumps({"files": len(files), "stale": sorted(stale)}).encode())
        _move(places, self._folder)


class HashingFile:
    """A file that is written sequentially, with the hash of its bytes."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self.sha256 = hashlib.sha256()

    def write(self, data: Any) -> int:
        """Writes all of `data`."""
        self.sha256.update(data)
        return int(self._handle.write(data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)


def count_completed(names: Set[str], first: int = 0) -> int:
    """The number of the first incomplete file in a folder of shards, from `first` on."""
    return next(number for number in itertools.count(first) if _record_name(number) not in names)


def _record_name(number: int) -> str:
    return f"new-{number:06}.json"


def _listed(places: Places, files: Sequence[FileRecord]) -> dict[str, Any]:
    """The entry of the files in a meta file."""
    if not places.is_dataset:
        return {"features_sha256": files[0].features_sha256, "index_sha256": files[0].index_sha256}
    names = [
        {kind: PurePosixPath(places.file(kind, number)).name for kind in ("features", "index")}
        for number in range(len(files))
    ]
    return {FILES_KEY: [{**name, **asdict(record)} for name, record in zip(names, files, strict=True)]}


def _kinds(places: Places, files: int) -> Iterator[tuple[str, int]]:
    """Kind and number of each file of an output."""
    # The meta file comes first, so its hashes reveal files that are still old.
    yield "meta", 0
    for number in range(files):
        yield "index", number
        yield "features", number


def _names(places: Places, files: int) -> set[str]:
    return {PurePosixPath(places.file(kind, number)).name for kind, number in _kinds(places, files)}


def _names_of_earlier(places: Places) -> set[str]:
    """The names of the existing dataset's files."""
    if not places.is_dataset:
        return set()
    try:
        meta, _, _, _ = read_meta(places)
    except InputError:
        return set()
    return _names(places.with_suffix(meta["format"]), len(read_records(meta)))


def finish_commit(places: Places) -> None:
    """Finishes the commit of a killed run.

    Raises:
        InputError: a file cannot be moved, or another process is working on it.
    """
    folder = open_folder(places.shards)
    if COMMIT not in folder.names():
        return
    folder.create()
    try:
        _move(places, folder)
    except OSError as exc:
        raise InputError(
            f"{places.features}: cannot be written ({exc.strerror or exc})",
            fix=FINISH,
        ) from exc
    finally:
        folder.release()


def _move(places: Places, folder: LocalFolder | RemoteFolder) -> None:
    names = folder.names()
    try:
        commit = json.loads(folder.read(COMMIT))
    except ValueError:  # version 0.1 wrote an empty file
        commit = {"files": 1, "stale": []}
    if places.is_dataset:
        make_folder(places.features)
    for kind, number in _kinds(places, commit["files"]):
        if (name := places.staged(kind, number)) in names:
            folder.move(name, places.file(kind, number))
    # In a folder that others write to, the commit file may be theirs: it deletes nothing else.
    if stale := [name for name in commit["stale"] if _OWN_NAME.fullmatch(name)]:
        open_folder(places.features.rstrip("/")).delete(*stale)
    folder.delete(COMMIT)


def require_own_stem(places: Places) -> None:
    """Refuses an output whose index and meta file belong to an output of another format with the same stem.

    Raises:
        InputError: such an output exists. The message names it.
    """
    for suffix in () if places.is_dataset else FORMATS:
        if suffix == places.suffix:
            continue
        other = places.with_format(suffix)
        unfinished = bool(open_folder(other.shards).names())
        if unfinished or (file_exists(other.features) and _describes(places.meta, suffix, places)):
            what = "an unfinished run is there for" if unfinished else "they belong to"
            raise InputError(
                f"{places.features}: its index and meta files would be {places.index} and {places.meta}, "
                f"and {what} {other.features}",
                fix="choose another name",
            )


def require_same_model(places: Places, model: ModelIdentity) -> None:
    """Refuses to replace an output of another model. An output of an unknown model may be replaced.

    Raises:
        InputError: the models differ. The message names both.
    """
    try:
        _, there, _, _ = read_meta(places)
    except InputError:
        return
    if not there.same_features(model):
        theirs, ours = f"{there.name} ({there.weights_sha256[:12]})", f"{model.name} ({model.weights_sha256[:12]})"
        raise InputError(
            f"{places.features}: has features of the model {theirs}; this run uses {ours}",
            fix="use another `out`, or pass `restart=True` to replace them",
        )


def _describes(meta: str, suffix: str, places: Places) -> bool:
    """Whether a meta file belongs to features in a file with this suffix."""
    if not file_exists(meta):
        return False
    try:
        with open_input(meta) as handle:
            found = json.loads(handle.read())["format"]
    except MALFORMED:  # written by version 0.1 or another program
        return not file_exists(places.features)
    return bool(found == suffix)


def require_own_place(places: Places) -> None:
    """Refuses to overwrite files that `embed` did not write.

    Raises:
        InputError: such files exist. The message names one.
    """
    if file_exists(places.meta):
        return
    if not places.is_dataset:
        others = [place for place in (places.features, places.index) if file_exists(place)]
    else:
        names = sorted(open_folder(places.features.rstrip("/")).names())
        others = [f"{places.features}{name}" for name in names if not name.startswith(".")]
    if others:
        raise InputError(
            f"{others[0]}: already exists without {places.meta}, so robustfeat embed did not write it",
            fix="choose another name, or remove it",
        )
