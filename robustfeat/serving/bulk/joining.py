"""Joins the parts of a run, each an output of its own, to one output."""

from __future__ import annotations

import itertools
import os
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from robustfeat.errors import InputError
from robustfeat.files import START_OVER
from robustfeat.progress import Progress
from robustfeat.serving.bulk.commits import FINISH, finish_commit, require_own_place, require_own_stem
from robustfeat.serving.bulk.embedding import EmbeddingResult
from robustfeat.serving.bulk.formats import Block, BlockStream
from robustfeat.serving.bulk.job import Job, Places, brief
from robustfeat.serving.bulk.outputs import FILES_KEY, open_existing, read_meta
from robustfeat.serving.bulk.shards import abandon_folder, claim_folder, discard_folder
from robustfeat.serving.bulk.storage import file_exists, open_folder
from robustfeat.serving.bulk.writing import OutputWriter, cut_files
from robustfeat.serving.identity import FEATURE_KEYS, ModelIdentity
from robustfeat.serving.inputs.remote import is_remote

__all__ = ["join_parts"]

_ROW = re.compile(rb'^\{"row": [0-9]+')
_OTHER_NAME = "choose another name"
_OWN_KEYS = {"part", "images", "failed", "skipped", "left_out", "timing", "format", "features_sha256", "index_sha256"}
_OWN_KEYS |= {"rows_per_file", FILES_KEY}
"""Keys of a meta file that belong to the part rather than the run."""


@dataclass(frozen=True)
class _Part:
    places: Places
    meta: dict[str, Any]
    model: ModelIdentity
    rows: int
    meta_sha256: str

    @property
    def about(self) -> dict[str, Any]:
        """The part's number and inputs."""
        return dict(self.meta["part"])


def join_parts(
    parts: Sequence[str], out: str, *, rows_per_file: int | None = None, quiet: bool = False
) -> EmbeddingResult:
    """Joins all parts of a run to one output, byte-identical to a run without parts.

    The parts are kept. They may be in any place, order and format. If a call is killed, repeat it: it resumes.

    Args:
        parts: all outputs of `embed_files` with `part`.
        out: a path, or a URL of fsspec. With a trailing slash it is a dataset.
        rows_per_file: see `embed_files`.
        quiet: hide progress.

    Raises:
        InputError: a part is missing, given twice, damaged, or of another run. Or `out` is a part, has features of
            another model or files that `embed` did not write, or cannot be written. Or an unfinished run is there, or
            `rows_per_file` is set for one file.
    """
    began = time.monotonic()
    places = Places.of(out)
    found = _in_order([_read(place) for place in parts])
    first = found[0]
    _require_room(places, found)
    counts = {key: first.meta[key] for key in ("skipped", "left_out")}
    failed = _write(found, places, counts, rows_per_file, quiet=quiet)
    return EmbeddingResult(
        features=places.features,
        index=places.index,
        meta=places.meta,
        images=int(first.about["inputs"]),
        failed=failed,
        skipped=int(counts["skipped"]),
        left_out=counts["left_out"],
        known=0,
        feature_size=first.model.feature_size,
        seconds=time.monotonic() - began,
    )


def _write(
    parts: Sequence[_Part], places: Places, counts: dict[str, Any], rows_per_file: int | None, *, quiet: bool
) -> int:
    """Writes the whole of ordered parts; how many rows failed."""
    first = parts[0]
    images, shard_rows = int(first.about["inputs"]), int(first.about["shard_rows"])
    seconds = sum(float(part.meta["timing"]["seconds"]) for part in parts)
    counts["timing"] = {"seconds": round(seconds, 3), "images_per_s": round(images / max(seconds, 1e-9), 1)}
    cut = {"rows_per_file": rows} if (rows := cut_files(places, rows_per_file, shard_rows)) else {}
    meta = {key: value for key, value in first.meta.items() if key not in _OWN_KEYS}
    meta |= {"inputs_sha256": first.about["inputs_sha256"], **cut}
    folder = open_folder(places.shards)
    job = Job(0, 0, 1, {"joins": [part.meta_sha256 for part in parts], "continues": None, **cut})
    claim_folder(folder, job, places, restart=False)
    progress = Progress("join", images, "rows", quiet=quiet)
    try:
        require_own_stem(places)
        writer = OutputWriter(places, folder, images, meta)
        stream = BlockStream(BlockStream(_blocks(parts, shard_rows, progress)).skip(writer.rows))
        while (wanted := writer.next_rows) is not None:
            writer.write(stream.take(len(wanted)))
        failed = writer.commit(counts)
        discard_folder(folder)
    except Exception as exc:  # not where the user stops it: a repeated call resumes
        fix = START_OVER if abandon_folder(folder) else FINISH
        if isinstance(exc, OSError):
            raise InputError(f"{places.features}: cannot be written ({exc.strerror or exc})", fix=fix) from exc
        raise
    finally:
        folder.release()
    progress.finish()
    return failed


def _require_room(places: Places, parts: Sequence[_Part]) -> None:
    """Refuses to replace a part, or features of another model."""
    if any(_real(part.places.meta) == _real(places.meta) for part in parts):
        raise InputError("is also a part, or shares its index", argument="out", value=places.features, fix=_OTHER_NAME)
    finish_commit(places)
    require_own_place(places)
    if file_exists(places.meta):
        _, there, _, _ = read_meta(places)
        if not there.same_features(parts[0].model):
            raise InputError(
                f"{places.features}: has features of the model {there.name}, but the parts of {parts[0].model.name}",
                fix=_OTHER_NAME,
            )


def _real(place: str) -> str:
    return place if is_remote(place) else os.path.realpath(place)


def _read(place: str) -> _Part:
    places = Places.of(place, argument=None)
    meta, model, rows, sha256 = read_meta(places)
    part = _Part(places, meta, model, rows, sha256)
    try:
        about = part.about
        numbers = [int(about[key]) for key in ("number", "of", "first_row", "inputs", "shard_rows")]
        float(meta["timing"]["seconds"])
        if min(numbers) < 0 or not 1 <= numbers[0] <= numbers[1] or about["shard_rows"] < 1:
            raise ValueError(brief(about))
    except (KeyError, TypeError, ValueError) as exc:
        raise InputError(f"{place}: not a part of a run", fix="name outputs of robustfeat embed with `part`") from exc
    return part


def _in_order(parts: Sequence[_Part]) -> list[_Part]:
    """Sorts the parts by their numbers.

    Raises:
        InputError: a part is missing, given twice, or of another run.
    """
    if not parts:
        raise InputError("got none", argument="parts", fix="name all parts")
    first = parts[0]
    for other in parts[1:]:
        if key := first.model.difference(other.model, FEATURE_KEYS):
            values = [brief(part.model.values(key)[key]) for part in (first, other)]
            raise InputError(
                f"{first.places.features} and {other.places.features} differ in {key}: {values[0]} and {values[1]}",
                fix="embed one of them again, with the same model and options",
            )
        limits = [part.meta.get("max_pixels") for part in (first, other)]
        if limits[0] != limits[1]:  # an image between them would fail in one part only
            what = (
                f"{first.places.features} and {other.places.features} differ in max_pixels: {limits[0]} and {limits[1]}"
            )
            raise InputError(what, fix="embed one of them again, with the same model and options")
        for key in ("of", "inputs", "inputs_sha256", "shard_rows"):
            if first.about[key] != other.about[key]:
                raise InputError(
                    f"{first.places.features} and {other.places.features} are parts of different runs: {key} is "
                    f"{brief(first.about[key])} and {brief(other.about[key])}",
                    fix="list the inputs once, and pass the list to every part as `files_from`",
                )
    count = int(first.about["of"])
    numbers = Counter(int(part.about["number"]) for part in parts)
    missing = [number for number in range(1, count + 1) if not numbers[number]]
    doubled = [number for number in range(1, count + 1) if numbers[number] > 1]
    if missing or doubled:
        wrong = [_say(missing, count, "is missing"), _say(doubled, count, "is given twice")]
        raise InputError(", and ".join(filter(None, wrong)), argument="parts", fix="name each part once")
    ordered = sorted(parts, key=lambda part: int(part.about["number"]))
    starts = itertools.accumulate((part.rows for part in ordered), initial=0)
    for part, start in zip([*ordered, None], starts, strict=True):
        expected = int(part.about["first_row"]) if part else int(first.about["inputs"])
        if start != expected:
            shown = (part or ordered[-1]).places.features
            raise InputError(
                f"{shown}: the parts before it end at row {start:,}, not at {expected:,}", fix="embed it again"
            )
    return ordered


def _say(numbers: Sequence[int], count: int, what: str) -> str:
    if not numbers:
        return ""
    more = f"{', '.join(map(str, numbers[1:6]))}{', ...' if len(numbers) > 6 else ''}"
    return f"part {numbers[0]} of {count} {what}{f' (also {more})' if more else ''}"


def _blocks(parts: Sequence[_Part], shard_rows: int, progress: Progress) -> Iterator[Block]:
    """The rows of all parts in blocks of a shard, as in a run without parts."""
    row = 0
    for part in parts:
        with open_existing(part.places) as output:
            if output.meta_sha256 != part.meta_sha256:
                raise InputError(f"{part.places.features}: another process has changed it", fix="repeat the command")
            vectors, index_lines = itertools.chain.from_iterable(output.features()), output.index_lines()
            for start in range(0, part.rows, shard_rows):
                count = min(shard_rows, part.rows - start)
                features = np.stack(list(itertools.islice(vectors, count)))
                lines = list(itertools.islice(index_lines, count))
                index = b"".join(_ROW.sub(b'{"row": %d' % (row + at), line) for at, line in enumerate(lines))
                row += count
                progress.advance(count)
                yield Block(features, index)
