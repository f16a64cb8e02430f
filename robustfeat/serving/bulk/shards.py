"""The folder of a run's shards: who writes there, what is done, and how shards are written and joined.

A shard is two files: NUMBER.f32 with the features, then NUMBER.jsonl with its lines of the index. The second file says
that the shard is complete.
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
from robustfeat.serving.bulk.pipeline import Pipeline
from robustfeat.serving.bulk.plan import Plan
from robustfeat.serving.bulk.storage import LocalFolder, RemoteFolder
from robustfeat.serving.bulk.writing import OutputWriter
from robustfeat.serving.inputs.input_list import InputList

__all__ = ["ShardCollector", "claim_folder", "discard_folder", "finished_shards", "write_shards"]

_JOB_FILE = "job.json"
_SHARD = re.compile("([0-9]{6,12})[.]jsonl")


def claim_folder(folder: LocalFolder | RemoteFolder, job: Job, places: Places, *, restart: bool) -> set[int]:
    """Makes the folder of a new run, or finds the folder of an unfinished one; gives the shards that are done.

    Raises:
        InputError: another process is at work there, or an unfinished run differs from this one.
    """
    try:
        folder.create()
        names = folder.names()
        found = _read_job(folder, places, restart=restart) if _JOB_FILE in names else None
        # The hashes of the files tell models apart, wherever they lie; the commit also changes with the card.
        mine = job.identity | {"shard_rows": job.shard_rows, "first_row": job.first_row, "revision": None}
        mine.pop("source", None)
        if found is not None and mine["continues"] and found.get("continues") not in {None, mine["continues"]}:
            found = None  # it was continuing a file that has been replaced since
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
    """Numbers of the shards that are complete, and of those that are in a complete file of a new output."""
    names = folder.names()
    done = {int(match[1]) for name in names if (match := _SHARD.fullmatch(name))}
    if job.identity["continues"] is None:
        rows = count_completed(names) * (job.rows_per_file or job.images)
        done.update(range(min(-(-rows // job.shard_rows), job.shards)))
    return done


def discard_folder(folder: LocalFolder | RemoteFolder) -> None:
    """Deletes the folder, first the file without which it means nothing."""
    folder.remove(_JOB_FILE)


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
    """Embeds shards and writes each to `folder`: NUMBER.f32, the features, and then NUMBER.jsonl, the index.

    Args:
        inputs: the rows of shard `origin` and the following shards.
        numbers: the shards to embed, ascending.
        stop: raise at the first image that fails.

    Yields:
        Batch by batch, the rows and how many of them failed.
    """
    offset = origin * job.shard_rows
    # One block of memory for all shards: many small ones would leave holes that add up over hours.
    features = np.empty((job.shard_rows, job.identity["feature_size"]), "<f4")
    # Neighbouring shards in one go, so that the pipeline never runs empty.
    for _, run in itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        shards = [number for _, number in run]
        number, filled = shards[0], 0
        index: list[bytes] = []
        start, end = job.rows(number).start - offset, job.rows(shards[-1]).stop - offset
        for batch in pipeline.embed(inputs, start, end, first_row=job.first_row + offset):
            if stop and batch.failed:
                record = json.loads(batch.index.splitlines()[batch.failed[0]])
                raise InputError(f"{record['path']}: {record['error']} (row {record['row']}); stopped, as asked")
            features[filled : filled + len(batch.features)] = batch.features
            filled += len(batch.features)
            index.append(batch.index)
            if filled == len(job.rows(number)):
                folder.write(f"{number:06}.f32", features[:filled].data.cast("B"))
                folder.write(f"{number:06}.jsonl", *index)
                number, filled, index = number + 1, 0, []
            yield len(batch.features), len(batch.failed)


class ShardCollector:
    """Makes an output of shards, and of the rows that are there already.

    A file of a new dataset is written as soon as its shards are there, and these are deleted: a run takes the room of
    its output and of one file more.

    Args:
        places: where the output will lie.
        folder: the folder of shards, claimed.
        job: the run.
        plan: what the output consists of.
    """

    def __init__(self, places: Places, folder: LocalFolder | RemoteFolder, job: Job, plan: Plan) -> None:
        self._folder, self._job, self._plan = folder, job, plan
        meta = {key: value for key, value in job.identity.items() if key not in {"continues", "inputs"}}
        meta["versions"] = meta["versions"] | {"python": platform.python_version()}
        self._feature_size = int(meta["feature_size"])
        self._writer = OutputWriter(places, folder, plan.images, meta, plan.kept_files(places, job.rows_per_file))

    def collect(self) -> None:
        """Writes the files of a new dataset whose shards are there."""
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
        """Writes the remaining files and puts the output to its place; gives its rows and how many of them failed.

        The folder is deleted then. Repeated after a kill at any point, it ends with the same files.

        Raises:
            InputError: another process has changed the output that is there, or it cannot be read.
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
        """The rows of the inputs from `start` on."""
        first, extra = divmod(start, self._job.shard_rows)

        def blocks() -> Iterator[Block]:
            for number in range(first, self._job.shards):
                features = np.frombuffer(self._folder.read(f"{number:06}.f32"), "<f4")
                yield Block(features.reshape(-1, self._feature_size), self._folder.read(f"{number:06}.jsonl"))

        return BlockStream(blocks()).skip(extra)
