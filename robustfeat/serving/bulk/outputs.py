"""The three files of an output: features, index and meta. They name each other and change as one.

NAME.meta.json holds the sha256 of the other two. A run writes all three into its folder of shards, then a commit file,
and then moves them to their names. A reader who finds the commit file takes those that are not moved yet from the
folder: it reads the three old files or the three new ones.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robustfeat.errors import InputError
from robustfeat.serving.bulk.formats import FORMATS
from robustfeat.serving.bulk.job import Places
from robustfeat.serving.bulk.storage import LocalFolder, RemoteFolder, file_exists, open_folder, open_input, open_output
from robustfeat.serving.identity import ModelIdentity
from robustfeat.serving.inputs.sources import path_of_index

__all__ = [
    "NewOutput",
    "Output",
    "finish_commit",
    "index_records",
    "open_existing",
    "read_meta",
    "require_own_stem",
    "require_same_model",
]

_COMMIT = "commit"
_STAGED = {"features": "new-features", "index": "new-index", "meta": "new-meta"}
_MALFORMED = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)


@dataclass(frozen=True)
class Output:
    """A complete output, opened: its files belong together, also if another process replaces them now.

    Attributes:
        places: where it lies.
        features, index: files, opened for reading at random.
        meta: the contents of the third file.
        meta_sha256: its hash, which tells outputs apart.
        model: what made the features.
        rows: rows of the features, and lines of the index.
    """

    places: Places
    features: Any
    index: Any
    meta: Mapping[str, Any]
    meta_sha256: str
    model: ModelIdentity
    rows: int


class NewOutput:
    """An output in the making, in the folder of shards of a run that has claimed it.

    Args:
        places: where the output will lie.
        folder: the folder of shards.
    """

    def __init__(self, places: Places, folder: LocalFolder | RemoteFolder) -> None:
        self._places, self._folder = places, folder
        self._hashes: dict[str, str] = {}

    @contextmanager
    def open(self, kind: str) -> Iterator[Any]:
        """Opens `features` or `index` to be written in one go."""
        with open_output(f"{self._places.shards}/{_STAGED[kind]}") as handle:
            hashing = _HashingFile(handle)
            yield hashing
        self._hashes[f"{kind}_sha256"] = hashing.sha256.hexdigest()

    def commit(self, meta: Mapping[str, Any], *, after: Output | None = None) -> None:
        """Writes the meta file, with the hashes of the other two, and replaces the output by the new one.

        Args:
            after: the output that this one continues.

        Raises:
            InputError: another process has replaced `after`.
        """
        if after:
            with open_input(self._places.meta) as handle:
                if hashlib.sha256(handle.read()).hexdigest() != after.meta_sha256:
                    what = f"{self._places.features}: another process has changed it"
                    raise InputError(what, fix="repeat the command")
        data = {**meta, "format": self._places.suffix, **self._hashes}
        self._folder.write(_STAGED["meta"], json.dumps(data, indent=2).encode() + b"\n")
        self._folder.write(_COMMIT, b"")
        _move(self._places, self._folder)


class _HashingFile:
    """A file that is written from its start to its end, with the hash of what was written."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self.sha256 = hashlib.sha256()

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        return int(self._handle.write(data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)


def finish_commit(places: Places) -> None:
    """Ends the commit of a run that was killed in the midst of it.

    Raises:
        InputError: a file cannot be moved, or another process is at it.
    """
    folder = open_folder(places.shards)
    if _COMMIT not in folder.names():
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
    # The meta file comes first: where the others are still the old ones, their hashes are not those that it says.
    for kind in ("meta", "index", "features"):
        if _STAGED[kind] in names:
            folder.move(_STAGED[kind], getattr(places, kind))
    folder.delete(_COMMIT)


def require_own_stem(places: Places) -> None:
    """Refuses an output whose index and meta file belong to another one: that of the same stem in another format.

    Raises:
        InputError: naming the other one.
    """
    for suffix in FORMATS:
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
    except _MALFORMED:  # written by version 0.1, or by something else
        return not file_exists(places.features)
    return bool(found == suffix)


@contextmanager
def open_existing(places: Places) -> Iterator[Output]:
    """Opens the output at `places` for the block.

    Raises:
        InputError: a file is missing or damaged, or the files do not belong together.
    """
    last = None
    while True:
        with ExitStack() as stack:
            try:
                output = _open(places, stack)
            except InputError as exc:
                # Another process may have moved files between two steps, but not twice with the same error.
                if str(exc) == last:
                    raise
                last = str(exc)
                continue
            yield output
            return


def read_meta(places: Places) -> tuple[dict[str, Any], ModelIdentity, int, str]:
    """The meta file alone: its content, what made the features, their rows, and its sha256.

    Raises:
        InputError: it is missing or damaged.
    """
    with _open_current(places, "meta") as handle:
        data = handle.read()
    try:
        meta = json.loads(data)
        model, rows = ModelIdentity.of_meta(meta), int(meta["images"])
        if rows < 0:
            raise ValueError(f"images is {rows}")
    except _MALFORMED as exc:
        raise InputError(f"{places.meta}: not what robustfeat embed writes ({exc!r})") from exc
    return meta, model, rows, hashlib.sha256(data).hexdigest()


def _open(places: Places, stack: ExitStack) -> Output:
    meta, model, rows, meta_sha256 = read_meta(places)
    # Version 0.1 wrote no hashes: the numbers of rows have to do.
    expected = {kind: meta.get(f"{kind}_sha256") for kind in ("features", "index")}
    files = {}
    for kind, sha256 in expected.items():
        files[kind] = handle = stack.enter_context(_open_current(places, kind))
        if sha256 is not None and (found := hashlib.file_digest(handle, "sha256").hexdigest()) != sha256:
            raise InputError(
                f"{getattr(places, kind)}: its sha256 is {found[:12]}..., {places.meta} says {str(sha256)[:12]}...; "
                "the files do not belong together",
                fix="embed the images again",
            )
        handle.seek(0)
    return Output(places, files["features"], files["index"], meta, meta_sha256, model, rows)


@contextmanager
def _open_current(places: Places, kind: str) -> Iterator[Any]:
    """Opens one of the files: at its place, or in the folder of shards where it is not moved yet."""
    staged = f"{places.shards}/{_STAGED[kind]}"
    place = staged if _committed(places) and file_exists(staged) else getattr(places, kind)
    if not file_exists(place):
        raise InputError(
            f"{place}: no such file; expected what robustfeat embed writes: "
            f"{Path(places.features).name} with its index and meta files beside it"
        )
    with ExitStack() as stack:
        try:
            handle = stack.enter_context(open_input(place))
        except FileNotFoundError as exc:
            raise InputError(f"{place}: was moved or deleted") from exc
        yield handle


def _committed(places: Places) -> bool:
    return file_exists(f"{places.shards}/{_COMMIT}")


def index_records(output: Output) -> Iterator[dict[str, Any]]:
    """The lines of the index, from its start.

    Raises:
        InputError: a line is damaged or belongs to another row, or there are not as many as rows.
    """
    shown = output.places.index
    row = -1
    output.index.seek(0)
    for row, line in enumerate(output.index):
        try:
            record = json.loads(line)
            path_of_index(record)
            if record["row"] != row:
                raise ValueError(f"row {record['row']} in line {row + 1}")
            record["error"]
        except _MALFORMED as exc:
            raise InputError(f"{shown}: not what robustfeat embed writes ({exc})") from exc
        yield record
    if row + 1 != output.rows:
        raise InputError(
            f"{shown}: has {row + 1:,} rows, {output.places.meta} says {output.rows:,}; "
            "the files do not belong together",
            fix="embed the images again",
        )
