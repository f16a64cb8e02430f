"""Manages the folder of a run's shards: claims it, writes shards and joins them.

A shard is two files: NUMBER.f32 with the features, then NUMBER.jsonl with its lines of the index. The second file marks
the shard as complete.
"""

from __future__ import annotations

import itertools
import json
import platform
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from robustfeat.errors import InputError
from robustfeat.serving.bulk.commits import count_completed
from robustfeat.serving.bulk.formats import Block, BlockStream
from robustfeat.serving.bulk.job import Job, Places, brief
from robustfeat.serving.bulk.outputs import COMMIT
from robustfeat.serving.bulk.pipeline import Pipeline
from robustfeat.serving.bulk.plan import Plan
from robustfeat.serving.bulk.storage import LocalFolder, RemoteFolder
from robustfeat.serving.bulk.writing import OutputWriter
from robustfeat.serving.inputs.input_list import InputList

__all__ = [
    "ShardCollector",
    "abandon_folder",
    "claim_folder",
    "discard_folder",
    "finished_shards",
    "write_shards",
]

_JOB_FILE = "job.json"
_SHARD = re.compile("([0-9]{6,12})[.]jsonl")


def claim_folder(folder: LocalFolder | RemoteFolder, job: Job, places: Places, *, restart: bool) -> set[int]:
    """Creates the folder of a new run or claims an unfinished one. Returns the finished shards.

    Raises:
        InputError: another process works there, or an unfinished run differs from this one.
    """
    try:
        folder.create()
        names = folder.names()
        found = _read_job(folder, places, restart=restart) if _JOB_FILE in names else None
        # Hashes identify a model in any place. The commit is not compared, since it also changes with the card.
        mine = job.identity | {"shard_rows": job.shard_rows, "first_row": job.first_row, "revision": None}
        mine.pop("source", None)
        if found is not None and mine["continues"] and found.get("continues") not in {None, mine["continues"]}:
            found = None  # the run continued a file that has been replaced
        if found is not None and found != mine and not restart:
            changes = [
                f"{key} was {brief(found.get(key))}, now {brief(mine.get(key))}"
                for key in sorted({*found, *mine})
                if found.get(key) != mine.get(key)
            ]
            raise InputError(
                f"{places.features}: an unfinished run is there with other settings ({'; '.join(changes)})",
                fix="repeat that command to finish it, or pass `restart=True` to discard it",
            )
        if found is None or restart:
            discard_folder(folder)
            folder.create()
            folder.write(_JOB_FILE, json.dumps(mine).encode())
            return set()
        return finished_shards(folder, job)
    except BaseException as exc:
        folder.release()
        if isinstance(exc, OSError):
            raise InputError(
                f"{places.features}: cannot be written ({exc.strerror or exc})", fix="choose another place"
            ) from exc
        raise


def _read_job(folder: LocalFolder | RemoteFolder, places: Places, *, restart: bool) -> dict[str, Any]:
    try:
        found = json.loads(folder.read(_JOB_FILE))
        if not isinstance(found, dict):
            raise ValueError("no object")
    except (ValueError, RecursionError) as exc:
        if restart:
            return {}
        raise InputError(
            f"{places.features}: an unfinished run is there, and its {_JOB_FILE} is damaged",
            fix="pass `restart=True` to discard it",
        ) from exc
    return found


def finished_shards(folder: LocalFolder | RemoteFolder, job: Job) -> set[int]:
    """Numbers of complete shards, including those in complete files of a new output."""
    names = folder.names()
    done = {int(match[1]) for name in names if (match := _SHARD.fullmatch(name))}
    if job.identity["continues"] is None:
        rows = count_completed(names) * (job.rows_per_file or job.images)
        done.update(range(min(-(-rows // job.shard_rows), job.shards)))
    return done


def discard_folder(folder: LocalFolder | RemoteFolder) -> None:
    """Deletes the folder, first the file without which the rest is ignored."""
    folder.remove(_JOB_FILE)


def abandon_folder(folder: LocalFolder | RemoteFolder) -> bool:
    """Deletes the folder of a failed run, unless the new output is complete. Returns whether it did.

    A complete output is read from the folder, and the next command moves it to its place (see `commits`).
    """
    if COMMIT in folder.names():
        return False
    discard_folder(folder)
    return True


def write_shards(
    pipeline: Pipeline,
    inputs: InputList,
    folder: LocalFolder | RemoteFolder,
    job: Job,
    numbers: Sequence[int],
    *,
    origin: int = 0,
    stop: bool = False,
) -> Iterator[tuple[int, int]]:
    """Embeds shards and writes NUMBER.f32 (features), then NUMBER.jsonl (index) of each to `folder`.

    Args:
        inputs: the rows of shard `origin` and the following shards.
        numbers: the shards to embed, ascending.
        stop: raise an error for the first failed image.

    Yields:
        Rows and failed rows of each batch.
    """
    offset = origin * job.shard_rows
    # Use one block of memory for all shards, since many small ones would fragment the memory over hours.
    features = np.empty((job.shard_rows, job.identity["feature_size"]), "<f4")
    # Embed consecutive shards together, so the pipeline never runs empty.
    for _, run in itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        shards = [number for _, number in run]
        number, filled = shards[0], 0
        index: list[bytes] = []
        start, end = job.rows(number).start - offset, job.rows(shards[-1]).stop - offset
        for batch in pipeline.embed(inputs, start, end, first_row=job.first_row + offset):
            if stop and batch.failed:
                record = json.loads(batch.index.splitlines()[batch.failed[0]])
                raise InputError(f"{record['path']}: {record['error']} (row {record['row']}); stopped at this image")
            features[filled : filled + len(batch.features)] = batch.features
            filled += len(batch.features)
            index.append(batch.index)
            if filled == len(job.rows(number)):
                folder.write(f"{number:06}.f32", features[:filled].data.cast("B"))
                folder.write(f"{number:06}.jsonl", *index)
                number, filled, index = number + 1, 0, []
            yield len(batch.features), len(batch.failed)


class ShardCollector:
    """Makes an output of shards and of existing rows.

    A file of a new dataset is written as soon as its shards are complete, and the shards are deleted. So a run takes
    the disk space of its output and of one more file.

    Args:
        places: the places of the output.
        folder: the claimed folder of shards.
        job: the run.
        plan: the contents of the output.
    """

    def __init__(self, places: Places, folder: LocalFolder | RemoteFolder, job: Job, plan: Plan) -> None:
        self._folder, self._job, self._plan = folder, job, plan
        meta = {key: value for key, value in job.identity.items() if key not in {"continues", "inputs"}}
        meta["versions"] = meta["versions"] | {"python": platform.python_version()}
        self._feature_size = int(meta["feature_size"])
        self._writer = OutputWriter(places, folder, plan.images, meta, plan.kept_files(places, job.rows_per_file))

    def collect(self) -> None:
        """Writes the files of a new dataset whose shards are complete."""
        if self._plan.existing or not self._job.rows_per_file:
            return
        done = finished_shards(self._folder, self._job)
        while (rows := self._writer.next_rows) is not None and rows.stop < self._plan.images:
            shards = range(rows.start // self._job.shard_rows, rows.stop // self._job.shard_rows)
            if not done.issuperset(shards):
                return
            self._writer.write(BlockStream(self._fresh(rows.start)).take(len(rows)))
            self._folder.delete(*(f"{number:06}.{kind}" for number in shards for kind in ("jsonl", "f32")))

    def finish(self, timing: dict[str, float]) -> tuple[int, int]:
        """Writes the remaining files and commits the output. Returns its rows and failed rows.

        Then it deletes the folder. After a kill at any point, a repeated call ends with the same files.

        Raises:
            InputError: another process has changed the existing output, or it cannot be read.
        """
        plan = self._plan
        if plan.existing and plan.unchanged:
            discard_folder(self._folder)
            return plan.existing.rows, int(plan.existing.meta["failed"])
        stream = BlockStream(plan.blocks(self._fresh, self._writer.rows))
        while (rows := self._writer.next_rows) is not None:
            self._writer.write(stream.take(len(rows)))
        left_out = plan.fresh.left_out
        counts = {"skipped": sum(left_out.values()), "left_out": left_out, "timing": timing}
        failed = self._writer.commit(counts, after=plan.existing)
        discard_folder(self._folder)
        return plan.images, failed

    def _fresh(self, start: int) -> Iterator[Block]:
        """Yields the rows of the inputs from `start` on."""
        first, extra = divmod(start, self._job.shard_rows)

        def blocks() -> Iterator[Block]:
            for number in range(first, self._job.shards):
                features = np.frombuffer(self._folder.read(f"{number:06}.f32"), "<f4")
                yield Block(features.reshape(-1, self._feature_size), self._folder.read(f"{number:06}.jsonl"))

        return BlockStream(blocks()).skip(extra)
