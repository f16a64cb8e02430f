"""Embedding on Ray: the shards of a run are the rows of a Ray dataset, and a pool of actors embeds them.

An actor is a pipeline such as the local one. It reads what is in its shards from one file in the folder of shards, and
writes the shards to that folder itself, so every machine must see it under the same path or URL. Counts travel back.
"""

from __future__ import annotations

import logging
import os
import pickle
import socket
import sys
import traceback
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from robustfeat.errors import EngineError, InputError, RobustFeatError, first_line
from robustfeat.hub.remote import HubAccess
from robustfeat.serving.bulk.job import Job
from robustfeat.serving.bulk.pipeline import Pipeline
from robustfeat.serving.bulk.shards import write_shards
from robustfeat.serving.bulk.storage import LocalFolder, RemoteFolder, open_folder, open_input, open_output
from robustfeat.serving.decoding.pool import DEADLINE_S
from robustfeat.serving.engines.options import AUTO, RunOptions
from robustfeat.serving.extractor import FeatureExtractor
from robustfeat.serving.identity import BYTE_KEYS, ModelIdentity
from robustfeat.serving.inputs.input_list import InputList
from robustfeat.serving.inputs.remote import is_remote
from robustfeat.serving.inputs.sources import ImageSource

__all__ = ["embed_on_ray", "plan_pool"]

_ANSWER_S = 10.0
_MAX_LOSSES = 3
_INPUTS = "inputs"


def embed_on_ray(
    extractor: FeatureExtractor,
    inputs: InputList,
    place: str,
    job: Job,
    numbers: Sequence[int],
    address: str = AUTO,
    *,
    workers: int | None = None,
    deadline_s: float = DEADLINE_S,
    stop: bool = False,
) -> Iterator[tuple[int, int]]:
    """Embeds shards on a Ray cluster; on like processors their files are those of `write_shards`, byte for byte.

    Each actor is configured with the threads of `extractor`, which are part of the run's identity. It takes as many
    CPUs of the cluster, or fewer where there are not that many to spare (see `plan_pool`).

    Args:
        inputs: those of the whole job.
        place: the folder of shards, made and claimed by the caller.
        numbers: the shards to embed.
        address: HOST:PORT, `local` or `auto`: the cluster of RAY_ADDRESS, or of `ray start` on this machine, or else
            one that this process starts. A program that has called `ray.init` keeps the cluster that it has.
        workers: decoder processes of an actor; as many as its threads by default.
        deadline_s: an image that takes longer is a failed row.
        stop: raise at an image that fails. Shards that are finished by then stay.

    Yields:
        Shard by shard, as they are finished, the rows and how many of them failed.

    Raises:
        InputError: the cluster does not answer, an archive cannot be read, or an image failed and `stop` is set.
        EngineError: Ray or an actor cannot run, or other versions are installed where it runs.
        OSError: a shard cannot be written.
    """
    if not numbers:
        return
    access = extractor.folder.access
    plan = _Plan(
        model=extractor.folder.source,
        access=access,
        shards=place if is_remote(place) else os.path.abspath(place),  # noqa: PTH100 - a path as text, as in `Places`
        job=job,
        options=replace(extractor.options, revision=extractor.folder.revision if access else None),
        workers=workers,
        deadline_s=deadline_s,
        stop=stop,
    )
    with _cluster(address) as ray:
        try:
            results = iter(_results(ray, plan, inputs, numbers))
            with closing(results):  # ends the actors too, where an error comes before the last result
                for batch in results:
                    for result in batch.to_pylist():
                        _raise_error(result)
                        yield result["rows"], result["failed"]
        except ray.exceptions.RayError as exc:
            raise EngineError(f"Ray: {_reason(exc)}", fix="repeat the command to resume") from exc


@dataclass(frozen=True)
class _Plan:
    """What an actor is told.

    Attributes:
        model: as a user names it.
        shards: the folder of shards, a path or a URL.
        options: how it is run; for a model on the Hub with its commit.
        access: how the Hub is reached, for a model that is there.
    """

    model: str
    shards: str
    job: Job
    options: RunOptions
    workers: int | None
    deadline_s: float
    stop: bool
    access: HubAccess | None


def plan_pool(
    nodes: Sequence[Mapping[str, float]], threads: int, shards: int, *, gpu: bool = False
) -> tuple[int, float]:
    """How many actors there are, and how many CPUs each takes.

    As many CPUs as it has threads, where a machine of the cluster has them and one CPU is left over; fewer otherwise.
    Ray Data has tasks of its own: a pool that takes all CPUs can wait for them for ever.

    Args:
        nodes: what each machine offers: `CPU`, and `GPU` where it has one.
        threads: of each actor.
        shards: what there is to do.
        gpu: each actor takes one.

    Raises:
        EngineError: no machine can hold an actor.
    """
    total = sum(node.get("CPU", 0.0) for node in nodes)
    usable = [node for node in nodes if node.get("CPU", 0.0) > 0 and (not gpu or node.get("GPU", 0.0) >= 1)]
    if not usable:
        raise EngineError(f"Ray: no machine of the cluster offers a {'GPU' if gpu else 'CPU'}")
    each = min(float(threads), max(node["CPU"] for node in usable))
    if total - each < 1:
        each = max(each - 1, each / 2)
    actors = sum(int(min(node["CPU"] // each, node["GPU"] if gpu else node["CPU"])) for node in usable)
    if total - actors * each < 1:
        actors -= 1
    return max(1, min(actors, shards)), each


def _results(ray: Any, plan: _Plan, inputs: InputList, numbers: Sequence[int]) -> Any:
    """What the actors answer, as they do; iterating it starts them."""
    identity = plan.job.identity
    gpu = identity["device"] == "cuda"
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    actors, cpus = plan_pool(nodes, identity["threads"], len(numbers), gpu=gpu)
    rows = _write_inputs(plan, inputs, numbers)
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        _ShardWriter,
        fn_constructor_args=(plan,),
        batch_size=1,
        batch_format="pyarrow",
        # A shard takes seconds at least: waiting behind another, it would only be late at the end.
        compute=ray.data.ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=1),
        num_cpus=cpus,
        num_gpus=1 if gpu else 0,
    )
    dataset.context.enable_progress_bars = False
    dataset.context.execution_no_progress_timeout_s = -1  # a shard may take any time, and so may CPUs of a busy cluster
    return dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)


def _write_inputs(plan: _Plan, inputs: InputList, numbers: Sequence[int]) -> list[dict[str, int]]:
    """Writes the lines of each shard to a file for the actors, compressed; gives where in it they are.

    As values of the dataset they would all be in memory at once.
    """
    rows, start = [], 0
    with open_output(f"{plan.shards}/{_INPUTS}") as handle:
        for number in numbers:
            wanted = plan.job.rows(number)
            lines = zlib.compress(b"".join(inputs.lines(wanted.start, wanted.stop)), 1)
            handle.write(lines)
            rows.append({"number": number, "start": start, "size": len(lines)})
            start += len(lines)
    return rows


class _ShardWriter:
    """The actor: opens the model once and writes the shards that it is given.

    Errors are returned, pickled: raised, they would arrive as Ray's tracebacks of several pages.
    """

    def __init__(self, plan: _Plan) -> None:
        self._plan = plan
        self._folder: LocalFolder | RemoteFolder = open_folder(plan.shards)
        self._pipeline: Pipeline | None = None

    def __call__(self, batch: Any) -> Any:
        import pyarrow

        (shard,) = batch.to_pylist()
        answer = {"rows": 0, "failed": 0}
        error: Exception | None = None
        host = socket.gethostname()
        try:
            if self._pipeline is None:
                self._count_losses(shard["number"])
                self._pipeline = self._open()
            self._write(self._pipeline, shard, answer)
        except RobustFeatError as exc:
            error = exc
        except OSError as exc:
            error = OSError(exc.errno or 0, f"{exc.strerror or first_line(exc)}, on {host}")
        except Exception as exc:
            traceback.print_exc()  # to Ray's logs
            error = EngineError(
                f"Ray: an actor failed on {host} ({type(exc).__name__}: {first_line(exc)}); Ray's logs say more"
            )
        pickled = b"" if error is None else pickle.dumps(error)
        return pyarrow.table({name: [value] for name, value in {**answer, "error": pickled}.items()})

    def _write(self, pipeline: Pipeline, shard: Mapping[str, int], answer: dict[str, int]) -> None:
        try:
            with open_input(f"{self._plan.shards}/{_INPUTS}") as handle:
                handle.seek(shard["start"])
                lines = zlib.decompress(handle.read(shard["size"])).splitlines()
        except FileNotFoundError as exc:
            raise InputError(
                f"{self._plan.shards}: not there on {socket.gethostname()}",
                fix="name an `out` that all machines share",
            ) from exc
        job, number = self._plan.job, shard["number"]
        with InputList(map(ImageSource.from_line, lines)) as inputs:
            for rows, failed in write_shards(
                pipeline, inputs, self._folder, job, [number], origin=number, stop=self._plan.stop
            ):
                answer["rows"] += rows
                answer["failed"] += failed

    def _open(self) -> Pipeline:
        plan, identity = self._plan, self._plan.job.identity
        # As the command line does it: int8 is checked anew, on this processor.
        extractor = FeatureExtractor.load(plan.model, plan.options, plan.access)
        here, there = extractor.identity, ModelIdentity.of_meta(identity)
        if not here.same_bytes(there):
            key = str(here.difference(there, BYTE_KEYS))
            raise EngineError(
                f"Ray: {key} is {here.values(key)[key]} on {socket.gethostname()} and {there.values(key)[key]} where "
                "the command runs",
                fix="install the same on all machines",
            )
        workers = plan.workers or identity["threads"]
        return Pipeline(extractor, batch_size=identity["batch_size"], workers=workers, deadline_s=plan.deadline_s)

    def _count_losses(self, number: int) -> None:
        """Ray starts an actor that died anew, as often as it takes; a shard that kills each of them must end the run.

        Raises:
            EngineError: it has.
        """
        import ray

        if not ray.get_runtime_context().was_current_actor_reconstructed:
            return
        name = f"{number:06}.losses"
        losses = 1 + (int(self._folder.read(name)) if name in self._folder.names() else 0)
        self._folder.write(name, str(losses).encode())
        if losses >= _MAX_LOSSES:
            rows = self._plan.job.rows(number)
            raise EngineError(
                f"Ray: {losses} actors died over the inputs {rows.start} to {rows.stop - 1}",
                fix="check the memory of the machines and Ray's logs",
            )


def _raise_error(result: Mapping[str, Any]) -> None:
    if result["error"]:
        raise pickle.loads(result["error"])


@contextmanager
def _cluster(address: str) -> Iterator[Any]:
    """The module `ray`, connected, and without its statistics, progress bars and messages."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Read at import: or each death of an actor would be told on stdout, where --json prints.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
    import ray

    known, target = ray.is_initialized(), address
    if address == AUTO:
        target = os.environ.get("RAY_ADDRESS") or AUTO
    if not known and target not in {AUTO, "local"}:
        _check_answer(target)
    import ray.data

    if known:
        yield ray
        return
    try:
        with _quiet_core():
            ray.init(
                # None takes what `ray start` has made. `auto` would also take the private cluster of another run on
                # this machine, and die with it.
                address=None if address == AUTO else address,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.CRITICAL,
            )
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as exc:
        cause: BaseException = exc
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise InputError(f"Ray cannot be reached or started ({_reason(cause)})", argument="ray", value=target) from exc
    try:
        for handler in logging.getLogger("ray.data").handlers:
            if handler.name == "console":  # the other one writes Ray's log files
                handler.setLevel(logging.CRITICAL)
        yield ray
    finally:
        ray.shutdown()


@contextmanager
def _quiet_core() -> Iterator[None]:
    """Silences Ray's C++ core, which writes to stderr of this process that restarts of actors may fail.

    It reads the level as it starts, and tells about it. Whoever has set one gets its messages.
    """
    if "RAY_BACKEND_LOG_LEVEL" in os.environ:
        yield
        return
    os.environ["RAY_BACKEND_LOG_LEVEL"] = "fatal"
    sys.stderr.flush()
    stderr = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        del os.environ["RAY_BACKEND_LOG_LEVEL"]


def _check_answer(address: str) -> None:
    """Ray itself waits for minutes, and writes to stderr all the while."""
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        raise InputError(
            "expected HOST:PORT of the cluster's head, on one of its machines",
            argument="ray",
            value=address,
            fix="from elsewhere, submit the program with `ray job submit`",
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), _ANSWER_S).close()
    except (OSError, OverflowError) as exc:
        raise InputError(f"no cluster answers there ({first_line(exc)})", argument="ray", value=address) from exc


def _reason(exc: BaseException) -> str:
    """The last line: those above are a traceback."""
    return (str(exc).strip() or type(exc).__name__).splitlines()[-1]
