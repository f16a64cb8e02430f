"""Embeds on Ray. The shards of a run are the rows of a Ray dataset, and a pool of actors embeds them.

An actor runs the same pipeline as a local run. It reads the inputs of its shards from a file in the folder of shards,
and writes the shards to that folder, so all machines must see it under the same path or URL. Actors return only counts.
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
    """Embeds shards on a Ray cluster. On equal processors the files are byte-identical to `write_shards`.

    Each actor uses as many threads as `extractor`, since they are part of the run's identity. It takes as many CPUs of
    the cluster, or fewer if they are not available (see `plan_pool`).

    Args:
        inputs: the inputs of the whole job.
        place: the folder of shards, created and claimed by the caller.
        numbers: the shards to embed.
        address: HOST:PORT, `local` or `auto`: the cluster of RAY_ADDRESS, of `ray start` on this machine, or else a new
            one. A program that has called `ray.init` keeps its cluster.
        workers: number of decoder processes per actor; by default one per thread.
        deadline_s: time limit per image. A slower image is a failed row.
        stop: raise an error for a failed image. Finished shards stay.

    Yields:
        Rows and failed rows of each finished shard.

    Raises:
        InputError: the cluster does not answer, an archive cannot be read, or an image failed and `stop` is set.
        EngineError: Ray or an actor cannot run, or an actor's machine has other versions installed.
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
            with closing(results):  # also ends the actors if an error comes before the last result
                for batch in results:
                    for result in batch.to_pylist():
                        _raise_error(result)
                        yield result["rows"], result["failed"]
        except ray.exceptions.RayError as exc:
            raise EngineError(f"Ray: {_reason(exc)}", fix="repeat the command to resume") from exc


@dataclass(frozen=True)
class _Plan:
    """The plan for an actor.

    Attributes:
        model: the argument that names the model.
        shards: the folder of shards, a path or a URL.
        options: how to run the model, with the commit of a model on the Hub.
        access: how to reach the Hub, for a model on the Hub.
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
    """Chooses the number of actors, and the CPUs of each.

    An actor takes one CPU per thread if a machine of the cluster has them and one CPU is left over, otherwise fewer.
    Ray Data has its own tasks, and a pool that takes all CPUs could wait for them forever.

    Args:
        nodes: the resources of each machine: `CPU`, and `GPU` if it has one.
        threads: number of threads per actor.
        shards: number of shards.
        gpu: whether each actor takes a GPU.

    Raises:
        EngineError: no machine can run an actor.
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
    """Yields the results of the actors as they arrive. Iteration starts the actors."""
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
        # A shard takes at least seconds, so a queue per actor would only delay the last shards.
        compute=ray.data.ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=1),
        num_cpus=cpus,
        num_gpus=1 if gpu else 0,
    )
    dataset.context.enable_progress_bars = False
    dataset.context.execution_no_progress_timeout_s = -1  # a shard, and CPUs of a busy cluster, may take any time
    return dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)


def _write_inputs(plan: _Plan, inputs: InputList, numbers: Sequence[int]) -> list[dict[str, int]]:
    """Writes the lines of each shard to a compressed file for the actors, and returns their positions.

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
    """The actor, which opens the model once and writes its shards.

    It returns errors pickled, since Ray would turn raised errors into tracebacks of several pages.
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
        # As on the command line, int8 is checked again on this processor.
        extractor = FeatureExtractor.load(plan.model, plan.options, plan.access)
        here, there = extractor.identity, ModelIdentity.of_meta(identity)
        if not here.same_bytes(there):
            key = str(here.difference(there, BYTE_KEYS))
            raise EngineError(
                f"Ray: {key} is {here.values(key)[key]} on {socket.gethostname()}, but {there.values(key)[key]} where "
                "the command runs",
                fix="install the same on all machines",
            )
        workers = plan.workers or identity["threads"]
        return Pipeline(extractor, batch_size=identity["batch_size"], workers=workers, deadline_s=plan.deadline_s)

    def _count_losses(self, number: int) -> None:
        """Counts dead actors. Ray restarts them without limit, so a shard that kills each one must end the run.

        Raises:
            EngineError: the shard has killed too many actors.
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
    """Imports and connects `ray`, without its statistics, progress bars and messages."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray reads this at import. Otherwise it would print each death of an actor to stdout, where --json prints.
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
                # None uses the cluster of `ray start`. `auto` could also use the private cluster of another run on this
                # machine, and end with it.
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
            if handler.name == "console":  # the other handler writes Ray's log files
                handler.setLevel(logging.CRITICAL)
        yield ray
    finally:
        ray.shutdown()


@contextmanager
def _quiet_core() -> Iterator[None]:
    """Silences Ray's C++ core, which would print warnings about restarts of actors to stderr.

    The core reads the level at its start and reports it. A level set by the user stays.
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
    """Checks that the cluster answers, since Ray itself waits for minutes and prints messages."""
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
    """The last line of an error, after its traceback."""
    return (str(exc).strip() or type(exc).__name__).splitlines()[-1]
