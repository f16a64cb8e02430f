"""Bulk embedding: image files to a file of features, with an index and a description beside it.

Rows are embedded in shards. Each is written whole to a folder beside the output, `.NAME.shards`; a killed run goes on
behind the last one. When all are there, they are joined to the output files, and the folder is deleted.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from robustfeat.errors import InputError, RobustFeatError
from robustfeat.progress import Progress
from robustfeat.serving.bulk.job import (
    JOB_FILE,
    Job,
    Places,
    claim_folder,
    finished_shards,
    identify,
    join_shards,
    read_existing,
    unknown_inputs,
)
from robustfeat.serving.bulk.pipeline import Pipeline
from robustfeat.serving.bulk.storage import LocalFolder, RemoteFolder, open_folder
from robustfeat.serving.decoding.pool import DEADLINE_S
from robustfeat.serving.extractor import FeatureExtractor
from robustfeat.serving.inputs.input_list import InputList

__all__ = ["SHARD_ROWS", "EmbeddingResult", "embed_files", "write_shards"]

SHARD_ROWS = 4096
"""Rows between two points that a killed run can go on from."""


@dataclass(frozen=True)
class EmbeddingResult:
    """What was written.

    Attributes:
        features, index, meta: the three files.
        images: rows in them.
        failed: how many of those are NaN.
        skipped: files with other suffixes, not in them.
        known: inputs that an appended file held already.
        feature_size: D.
        seconds: wall time.
    """

    features: str
    index: str
    meta: str
    images: int
    failed: int
    skipped: int
    known: int
    feature_size: int
    seconds: float


def embed_files(
    extractor: FeatureExtractor,
    inputs: InputList,
    out: str | Path,
    *,
    batch_size: int | None = None,
    workers: int | None = None,
    on_error: str = "nan",
    restart: bool = False,
    append: bool = False,
    shard_rows: int = SHARD_ROWS,
    deadline_s: float = DEADLINE_S,
    ray: str | None = None,
    quiet: bool = False,
) -> EmbeddingResult:
    """Embeds every image of `inputs` into `out`, row by row in their order.

    Writes `out`, (n, D) float32 as .npy, .safetensors (tensor `features`) or .parquet (path, features, error), where a
    failed image is a row of NaN; and beside it NAME.index.jsonl (row, path, sha256 of the bytes, error or null) and
    NAME.meta.json. They appear once they are complete. A call that was killed goes on where it was when it is
    repeated, and its files are then the same, byte for byte, as those of an unbroken one.

    Args:
        extractor: made with `streams` equal to its threads, for the best throughput.
        inputs: from `list_inputs`.
        out: a path, or a URL of fsspec.
        batch_size: the extractor's by default.
        workers: decoder processes; by default what the cgroup grants.
        on_error: `nan`, or `stop` at the first image that fails.
        restart: discard what an unfinished run has left.
        append: add the inputs that `out` does not hold yet (by path), as further rows.
        shard_rows: how many rows a killed run may lose.
        deadline_s: an image that takes longer is a failed row.
        ray: run on Ray, at this address (`auto`: the running cluster, or one on this machine).
        quiet: no progress.

    Raises:
        InputError: `out` cannot be written, an unfinished run there differs from this one, `append` has nothing to
            add to, or an image failed and `on_error` is `stop`.
        EngineError: no decoder process can be started.
    """
    if on_error not in {"nan", "stop"}:
        raise ValueError(f"on_error must be nan or stop; got {on_error!r}")
    places = Places.of(str(out))
    began = time.monotonic()
    batch_size = batch_size or extractor.batch_size
    existing = read_existing(places, extractor) if append else None
    with unknown_inputs(inputs, places, existing) if existing else nullcontext(inputs) as fresh:
        identity = identify(extractor, fresh, batch_size) | {"appended_to": existing.sha256 if existing else None}
        shard_rows = -(-shard_rows // batch_size) * batch_size
        job = Job(len(fresh), existing.rows if existing else 0, shard_rows, identity)
        folder = open_folder(places.shards)
        done = claim_folder(folder, job, places, restart=restart)
        pending = [number for number in range(job.shards) if number not in done]
        before = sum(len(job.rows(number)) for number in done)
        progress = Progress("embed", job.images, start=before, quiet=quiet)
        if done:
            progress.say(f"going on: {before:,} of {job.images:,} images were embedded before")
        failed = 0
        try:
            stop = on_error == "stop"
            with ExitStack() as stack:
                if ray is None:
                    pipeline = Pipeline(extractor, batch_size=batch_size, workers=workers, deadline_s=deadline_s)
                    counts = write_shards(stack.enter_context(pipeline), fresh, folder, job, pending, stop=stop)
                else:
                    from robustfeat.serving.bulk.ray import embed_on_ray

                    counts = embed_on_ray(
                        extractor,
                        fresh,
                        places.shards,
                        job,
                        pending,
                        ray,
                        workers=workers,
                        deadline_s=deadline_s,
                        stop=stop,
                    )
                for rows, bad in counts:
                    failed += bad
                    progress.advance(rows, f"{failed:,} failed" if failed else "")
            progress.finish(f"{failed:,} failed" if failed else "")
            seconds = time.monotonic() - began
            speed = (job.images - before) / max(seconds, 1e-9)
            timing = {"seconds": round(seconds, 3), "images_per_s": round(speed, 1)}
            images, failed = join_shards(
                places, folder, job, extractor.feature_size, existing, skipped=inputs.skipped, timing=timing
            )
        except BaseException as exc:
            kept = 0
            with suppress(RobustFeatError, OSError):  # storage may be what failed
                kept = sum(len(job.rows(number)) for number in finished_shards(folder))
                if not kept:
                    folder.remove(JOB_FILE)
            if isinstance(exc, OSError):
                raise InputError(f"{out}: cannot be written ({exc.strerror or exc}); {_advice(kept, job)}") from exc
            if kept and not isinstance(exc, RobustFeatError):
                progress.say(_advice(kept, job))
            raise
        finally:
            folder.release()
        return EmbeddingResult(
            features=places.features,
            index=places.index,
            meta=places.meta,
            images=images,
            failed=failed,
            skipped=inputs.skipped,
            known=len(inputs) - len(fresh),
            feature_size=extractor.feature_size,
            seconds=time.monotonic() - began,
        )


def _advice(kept: int, job: Job) -> str:
    if not kept:
        return "nothing was left behind: free space or choose another place, then run again"
    return f"{kept:,} of {job.images:,} images are kept: the same command goes on from there"


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
        inputs: those of shard `origin` and the following ones.
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
