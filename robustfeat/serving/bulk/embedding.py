"""Embeds image files in bulk to features, with an index and a meta file.

Rows are embedded in shards. Each shard is written whole to a folder beside the output, `.NAME.shards`. A repeated
command resumes a killed run after its last shard. A dataset's files are made as soon as their shards are complete, and
a single file at the end. Then the folder is deleted.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping, Set
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robustfeat.errors import InputError, RobustFeatError
from robustfeat.files import START_OVER
from robustfeat.progress import Progress
from robustfeat.serving.bulk.appending import plan_append
from robustfeat.serving.bulk.commits import (
    FINISH,
    finish_commit,
    require_own_place,
    require_own_stem,
    require_same_model,
)
from robustfeat.serving.bulk.job import Job, Places, identify
from robustfeat.serving.bulk.parts import Part, plan_part
from robustfeat.serving.bulk.pipeline import Pipeline
from robustfeat.serving.bulk.plan import Plan
from robustfeat.serving.bulk.ray import embed_on_ray
from robustfeat.serving.bulk.shards import ShardCollector, abandon_folder, claim_folder, finished_shards, write_shards
from robustfeat.serving.bulk.storage import LocalFolder, RemoteFolder, open_folder
from robustfeat.serving.bulk.syncing import plan_sync
from robustfeat.serving.bulk.writing import cut_files
from robustfeat.serving.decoding.pool import DEADLINE_S
from robustfeat.serving.extractor import FeatureExtractor
from robustfeat.serving.identity import ModelIdentity
from robustfeat.serving.inputs.input_list import InputList

__all__ = ["SHARD_ROWS", "EmbeddingResult", "embed_files", "require_on_error"]

SHARD_ROWS = 4096
"""Rows per shard, after each of which a killed run can resume."""


@dataclass(frozen=True)
class EmbeddingResult:
    """The result of bulk embedding.

    Attributes:
        features, index, meta: the three files. A dataset has its folder, the pattern of its index files and its meta
            file.
        images: number of rows.
        failed: number of failed rows, which are NaN.
        skipped: number of skipped files of folders and archives.
        left_out: number of skipped files by kind: a suffix, `hidden`, `not matched`, ...
        known: number of inputs whose features the output already had (`append`, `sync`).
        feature_size: D, the length of a feature vector.
        seconds: wall time.
    """

    features: str
    index: str
    meta: str
    images: int
    failed: int
    skipped: int
    left_out: dict[str, int]
    known: int
    feature_size: int
    seconds: float


def require_on_error(on_error: str) -> None:
    """Raises `ValueError` for values other than `nan` and `stop`."""
    if on_error not in {"nan", "stop"}:
        raise ValueError(f"on_error must be nan or stop; got {on_error!r}")


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
    sync: bool = False,
    part: Part | None = None,
    rows_per_file: int | None = None,
    shard_rows: int = SHARD_ROWS,
    deadline_s: float = DEADLINE_S,
    ray: str | None = None,
    quiet: bool = False,
) -> EmbeddingResult:
    """Embeds all images of `inputs` into `out`, one row per image, in their order.

    `out` is (n, D) float32 as .npy, .safetensors (tensor `features`) or .parquet (path, features, error), with NaN for
    failed images. Beside it are NAME.index.jsonl (row, path, sha256 of the bytes, error or null) and NAME.meta.json,
    which has the sha256 of the other two. All three appear together, once they are complete. A repeated call resumes a
    killed one, with byte-identical output.

    An `out` that ends in a slash is a dataset: a folder of such files, 000000.npy and so on, each with its own index
    file, and one meta file for all. Rows are numbered across files.

    Args:
        extractor: the model. For the best throughput, `streams` must equal its threads.
        inputs: the images, from `list_inputs`.
        out: a path, or a URL of fsspec. NAME.parquet/ is a dataset of Parquet files.
        batch_size: images per batch; by default the extractor's.
        workers: number of decoder processes; by default all that the cgroup allows.
        on_error: `nan`, or `stop` at the first failed image.
        restart: discard an unfinished run, and replace features of another model.
        append: add inputs whose path `out` does not have yet.
        sync: make the rows of `out` match `inputs`, and embed only images whose bytes it does not have yet.
        part: embed only this part of `inputs`. `join_parts` joins all parts.
        rows_per_file: rows per file of a dataset, rounded up to whole shards; by default as in the existing dataset,
            or `ROWS_PER_FILE`.
        shard_rows: most rows that a killed run loses.
        deadline_s: time limit per image. A slower image is a failed row.
        ray: run on Ray at this address. `auto` is the running cluster, or one on this machine.
        quiet: hide progress.

    Raises:
        InputError: `out` cannot be written or continued, shares its index with another output, or has features of
            another model or files that `embed` did not write. Or an unfinished run there differs from this one, more
            than one of `append`, `sync` and `part` is set, `rows_per_file` is set for one file, or an image failed and
            `on_error` is `stop`.
        EngineError: no decoder process can be started.
    """
    require_on_error(on_error)
    began = time.monotonic()
    places = _find_places(str(out), None if append or sync else extractor.identity, restart=restart)
    batch_size = batch_size or extractor.batch_size
    shard_rows = -(-shard_rows // batch_size) * batch_size  # a shard has whole batches
    rows_per_file = cut_files(places, rows_per_file, shard_rows)
    asked = {"append": append, "sync": sync, "part": part}
    with _open_plan(asked, inputs, places, extractor.identity, shard_rows, quiet=quiet) as plan:
        job = _plan_job(extractor, plan, batch_size, shard_rows, rows_per_file)
        with _open_run(places, job, restart=restart, quiet=quiet) as run:
            stop = on_error == "stop"
            collector = ShardCollector(places, run.folder, job, plan)
            counts = _embed(run, extractor, plan.fresh, ray=ray, workers=workers, deadline_s=deadline_s, stop=stop)
            run.follow(counts, collector)
            images, failed = collector.finish(run.timing(time.monotonic() - began))
        return EmbeddingResult(
            features=places.features,
            index=places.index,
            meta=places.meta,
            images=images,
            failed=failed,
            skipped=sum(inputs.left_out.values()),
            left_out=inputs.left_out,
            known=plan.known,
            feature_size=extractor.feature_size,
            seconds=time.monotonic() - began,
        )


def _find_places(out: str, model: ModelIdentity | None, *, restart: bool) -> Places:
    """The places of `out`, after checks that it may be written.

    Args:
        model: refuse to replace features of another model.
    """
    places = Places.of(out)
    finish_commit(places)
    if not restart:
        require_own_place(places)
        if model:
            require_same_model(places, model)
    return places


def _open_plan(
    asked: Mapping[str, Any], inputs: InputList, places: Places, model: ModelIdentity, shard_rows: int, *, quiet: bool
) -> AbstractContextManager[Plan]:
    """Plans the run by the arguments `append`, `sync` and `part` of `embed_files`."""
    chosen = {name: value for name, value in asked.items() if value}
    if len(chosen) > 1:
        (first, value), (second, _), *_ = chosen.items()
        raise InputError(f"excludes `{second}`", argument=first, value=value, fix="choose one of them")
    if "append" in chosen:
        return plan_append(inputs, places, model)
    if "sync" in chosen:
        return plan_sync(inputs, places, model, quiet=quiet)
    if "part" in chosen:
        return plan_part(inputs, chosen["part"], shard_rows)
    return nullcontext(Plan(inputs))


def _plan_job(
    extractor: FeatureExtractor, plan: Plan, batch_size: int, shard_rows: int, rows_per_file: int | None
) -> Job:
    """Describes the run as a `Job`."""
    identity = identify(extractor.identity, plan.fresh, batch_size) | {
        "max_pixels": extractor.options.max_pixels,
        "continues": plan.existing.meta_sha256 if plan.existing else None,
    }
    if plan.part:
        identity["part"] = plan.part
    if rows_per_file:
        identity["rows_per_file"] = rows_per_file
    return Job(len(plan.fresh), plan.first_row, shard_rows, identity)


@dataclass(frozen=True)
class _Run:
    """A run with a claimed folder of shards.

    Attributes:
        done: shards that an earlier process finished.
    """

    places: Places
    job: Job
    folder: LocalFolder | RemoteFolder
    done: Set[int]
    progress: Progress

    @property
    def pending(self) -> list[int]:
        """Remaining shards."""
        return [number for number in range(self.job.shards) if number not in self.done]

    def follow(self, counts: Generator[tuple[int, int]], collector: ShardCollector) -> None:
        """Consumes `counts`, pairs of rows and failed rows, shows progress, and collects their shards."""
        failed, uncollected = 0, 0
        with closing(counts):
            for rows, bad in counts:
                failed += bad
                self.progress.advance(rows, f"{failed:,} failed" if failed else "")
                uncollected += rows
                if uncollected >= self.job.shard_rows:
                    collector.collect()
                    uncollected = 0
        self.progress.finish(f"{failed:,} failed" if failed else "")

    def timing(self, seconds: float) -> dict[str, float]:
        """Timing for the meta file. Images that an earlier process embedded do not count."""
        images = sum(len(self.job.rows(number)) for number in self.pending)
        return {"seconds": round(seconds, 3), "images_per_s": round(images / max(seconds, 1e-9), 1)}


@contextmanager
def _open_run(places: Places, job: Job, *, restart: bool, quiet: bool) -> Iterator[_Run]:
    """Claims the folder of shards for the block. If the block fails, finished shards stay for a later run.

    Raises:
        InputError: see `claim_folder`, or the block raised an `OSError`.
    """
    folder = open_folder(places.shards)
    done = claim_folder(folder, job, places, restart=restart)
    before = sum(len(job.rows(number)) for number in done)
    progress = Progress("embed", job.images, start=before, quiet=quiet or not job.images)
    if done:
        progress.say(f"resuming: {before:,} of {job.images:,} images were embedded before")
    try:
        require_own_stem(places)
        yield _Run(places, job, folder, done, progress)
    except BaseException as exc:
        kept, fix = 0, START_OVER
        with suppress(RobustFeatError, OSError):  # storage itself may have failed
            if kept := sum(len(job.rows(number)) for number in finished_shards(folder, job)):
                fix = f"{kept:,} of {job.images:,} images are kept: repeat the command to resume"
            elif not abandon_folder(folder):
                fix = FINISH
        if isinstance(exc, OSError):
            raise InputError(f"{places.features}: cannot be written ({exc.strerror or exc})", fix=fix) from exc
        if kept and not isinstance(exc, RobustFeatError):
            progress.say(fix)
        raise
    finally:
        folder.release()


def _embed(
    run: _Run,
    extractor: FeatureExtractor,
    inputs: InputList,
    *,
    ray: str | None,
    workers: int | None,
    deadline_s: float,
    stop: bool,
) -> Generator[tuple[int, int]]:
    """Writes the pending shards, here or on Ray. Yields the number of rows and of failed rows."""
    if ray is not None:
        yield from embed_on_ray(
            extractor,
            inputs,
            run.places.shards,
            run.job,
            run.pending,
            ray,
            workers=workers,
            deadline_s=deadline_s,
            stop=stop,
        )
        return
    batch_size = run.job.identity["batch_size"]
    with Pipeline(extractor, batch_size=batch_size, workers=workers, deadline_s=deadline_s) as pipeline:
        yield from write_shards(pipeline, inputs, run.folder, run.job, run.pending, stop=stop)
