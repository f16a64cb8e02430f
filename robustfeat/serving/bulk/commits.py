"""Writing an output: its files appear together, and a kill at any point leaves the old ones or the new ones.

A run writes the files into its folder of shards, then the meta file with their hashes, then a commit file, and then
moves them to their names. A reader who finds the commit file takes those that are not moved yet from the folder.
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
    "NewOutput",
    "count_completed",
    "finish_commit",
    "require_own_place",
    "require_own_stem",
    "require_same_model",
]


_OWN_NAME = re.compile(r"[0-9]{6,9}\.(npy|parquet|safetensors)|_[0-9]{6,9}\.index\.jsonl")


class NewOutput:
    """An output in the making, in the folder of shards of a run that has claimed it.

    Args:
        places: where the output will lie.
        folder: the folder of shards.
    """

    def __init__(self, places: Places, folder: LocalFolder | RemoteFolder) -> None:
        self._places, self._folder = places, folder

    def completed(self, first: int = 0) -> Iterator[FileRecord]:
        """The files from `first` on that are complete, up to the first one that is not."""
        for number in range(first, count_completed(self._folder.names(), first)):
            yield FileRecord(**json.loads(self._folder.read(_record_name(number))))

    @contextmanager
    def open(self, kind: str, number: int) -> Iterator[HashingFile]:
        """Opens file `number` of `features` or `index` to be written in one go."""
        with open_output(f"{self._places.shards}/{self._places.staged(kind, number)}") as handle:
            yield HashingFile(handle)

    def complete(self, number: int, record: FileRecord) -> None:
        """Notes that file `number` is written, both of its features and of its index."""
        self._folder.write(_record_name(number), json.dumps(asdict(record)).encode())

    def commit(self, meta: Mapping[str, Any], files: Sequence[FileRecord], *, after: Output | None = None) -> None:
        """Writes the meta file, with the hashes of all others, and replaces the output by the new one.

        Args:
            meta: its content, but for the files.
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
    """A file that is written from its start to its end, and the hash of its bytes."""

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
    """The number of the first file, from `first` on, that a folder of shards does not have completely."""
    return next(number for number in itertools.count(first) if _record_name(number) not in names)


def _record_name(number: int) -> str:
    return f"new-{number:06}.json"


def _listed(places: Places, files: Sequence[FileRecord]) -> dict[str, Any]:
    """What a meta file says of the files."""
    if not places.is_dataset:
        return {"features_sha256": files[0].features_sha256, "index_sha256": files[0].index_sha256}
    names = [
        {kind: PurePosixPath(places.file(kind, number)).name for kind in ("features", "index")}
        for number in range(len(files))
    ]
    return {FILES_KEY: [{**name, **asdict(record)} for name, record in zip(names, files, strict=True)]}


def _kinds(places: Places, files: int) -> Iterator[tuple[str, int]]:
    """Kind and number of each file of an output."""
    # The meta file comes first: where the others are still the old ones, its hashes do not fit them.
    yield "meta", 0
    for number in range(files):
        yield "index", number
        yield "features", number


def _names(places: Places, files: int) -> set[str]:
    return {PurePosixPath(places.file(kind, number)).name for kind, number in _kinds(places, files)}


def _names_of_earlier(places: Places) -> set[str]:
    """The names of the files of the dataset that is there."""
    if not places.is_dataset:
        return set()
    try:
        meta, _, _, _ = read_meta(places)
    except InputError:
        return set()
    return _names(places.with_suffix(meta["format"]), len(read_records(meta)))


def finish_commit(places: Places) -> None:
    """Ends the commit of a run that was killed in the midst of it.

    Raises:
        InputError: a file cannot be moved, or another process is at it.
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
            fix="free space or restore the permissions, then repeat the command",
        ) from exc
    finally:
        folder.release()


def _move(places: Places, folder: LocalFolder | RemoteFolder) -> None:
    names = folder.names()
    try:
        commit = json.loads(folder.read(COMMIT))
    except ValueError:  # of version 0.1, which wrote it empty
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
    """Refuses an output whose index and meta file belong to another one, of the same stem in another format.

    Raises:
        InputError: naming the other one.
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
    """Refuses to replace an output of another model; one that does not say its model may be replaced.

    Raises:
        InputError: naming both.
    """
    try:
        _, there, _, _ = read_meta(places)
    except InputError:
        return
    if not there.same_features(model):
        theirs, ours = f"{there.name} ({there.weights_sha256[:12]})", f"{model.name} ({model.weights_sha256[:12]})"
        raise InputError(
            f"{places.features}: holds features of the model {theirs}, this is {ours}",
            fix="use another `out`, or pass `restart=True` to replace them",
        )


def _describes(meta: str, suffix: str, places: Places) -> bool:
    """Whether a meta file belongs to the features in a file with this suffix."""
    if not file_exists(meta):
        return False
    try:
        with open_input(meta) as handle:
            found = json.loads(handle.read())["format"]
    except MALFORMED:  # written by version 0.1, or by something else
        return not file_exists(places.features)
    return bool(found == suffix)


def require_own_place(places: Places) -> None:
    """Refuses to write where files lie that `embed` did not write.

    Raises:
        InputError: naming one of them.
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
            f"{others[0]}: is there already, and {places.meta}, which would say that robustfeat embed wrote it, is not",
            fix="choose another name, or remove it",
        )
