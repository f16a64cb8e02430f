"""`--ray`: actors on a Ray cluster write what one process writes, whatever happens to them."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow
import pytest

from robustfeat import FeatureExtractor
from robustfeat.errors import EngineError, InputError
from robustfeat.serving.bulk.embedding import EmbeddingResult, embed_files
from robustfeat.serving.bulk.job import Job
from robustfeat.serving.bulk.ray import _Plan, _raise_error, _ShardWriter, plan_pool
from robustfeat.serving.engines.options import RunOptions
from robustfeat.serving.inputs.listing import list_inputs
from tests.conftest import Run

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
ray = pytest.importorskip("ray")

Embed = Callable[..., EmbeddingResult]


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of one in which there is room for two actors."""
    options = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.CRITICAL}
    context = ray.init(address="local", num_cpus=3, object_store_memory=2**27, **options)
    yield str(context.address_info["gcs_address"])
    ray.shutdown()


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory, example_files: list[Path]) -> Path:
    """45 images of which number 28 is broken."""
    root = tmp_path_factory.mktemp("photos")
    for number in range(45):
        (root / f"{number:03}.jpg").symlink_to(example_files[number % len(example_files)])
    (root / "028.jpg").unlink()
    (root / "028.jpg").write_bytes(b"\xff\xd8\xff junk")
    return root


@pytest.fixture(scope="module")
def embed(photos: Path) -> Embed:
    extractor = FeatureExtractor.from_pretrained(threads=1)

    def call(out: Path, **options: Any) -> EmbeddingResult:
        with list_inputs([photos]) as inputs:
            return embed_files(extractor, inputs, out, **{"batch_size": 4, "shard_rows": 4, "quiet": True, **options})

    return call


@pytest.fixture(scope="module")
def local(embed: Embed, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("local") / "feats.npy"
    embed(out)
    return out


def written(out: Path) -> tuple[bytes, bytes, dict[str, Any]]:
    meta = json.loads(out.with_suffix(".meta.json").read_text())
    del meta["timing"]
    return out.read_bytes(), out.with_suffix(".index.jsonl").read_bytes(), meta


@pytest.mark.parametrize(
    ("cpus", "threads", "shards", "expected"),
    [
        ([2], 2, 9, (1, 1)),  # one is left for Ray Data
        ([2], 1, 9, (1, 1)),
        ([1], 1, 9, (1, 0.5)),
        ([8], 4, 9, (1, 4)),
        ([9], 4, 9, (2, 4)),
        ([9], 4, 1, (1, 4)),
        ([8, 8, 0], 4, 9, (3, 4)),
        ([8, 8], 8, 9, (1, 8)),
        ([4, 64], 64, 9, (1, 64)),
        ([4, 4], 64, 9, (1, 4)),
        ([16], 64, 9, (1, 15)),
    ],
)
def test_actors_take_their_threads_and_leave_a_processor(
    cpus: list[float], threads: int, shards: int, expected: tuple[int, float]
) -> None:
    assert plan_pool([{"CPU": count} for count in cpus], threads, shards) == expected


def test_actors_on_gpus_take_one_each() -> None:
    nodes = [{"CPU": 16.0, "GPU": 2.0}, {"CPU": 16.0, "GPU": 8.0}, {"CPU": 64.0}]
    assert plan_pool(nodes, 4, 99, gpu=True) == (2 + 4, 4)
    with pytest.raises(EngineError, match="no machine of the cluster offers a GPU"):
        plan_pool([{"CPU": 64.0}, {}], 4, 99, gpu=True)


@pytest.mark.slow
def test_files_of_a_folder_are_written_while_actors_work(
    embed: Embed, cluster: str, local: Path, tmp_path: Path
) -> None:
    result = embed(f"{tmp_path}/feats/", ray=cluster, rows_per_file=8)
    assert (result.images, result.failed) == (45, 1)
    features = [np.load(file) for file in sorted((tmp_path / "feats").glob("*.npy"))]
    assert [len(part) for part in features] == [8, 8, 8, 8, 8, 5]
    assert np.concatenate(features).tobytes() == np.load(local).tobytes()


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("somewhere", "expected HOST:PORT"),
        ("ray://127.0.0.1:10001", "expected HOST:PORT"),
        ("127.0.0.1:123456", "no cluster answers there"),
        ("{nobody}", "no cluster answers there"),
    ],
)
def test_an_address_without_a_cluster_is_named(
    embed: Embed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str, reason: str
) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with socket.socket() as bound:  # and never listens
        bound.bind(("127.0.0.1", 0))
        address = address.format(nobody=f"127.0.0.1:{bound.getsockname()[1]}")
        with pytest.raises(InputError, match=f"ray={address}: {reason}"):
            embed(tmp_path / "feats.npy", ray=address)
    assert list(tmp_path.iterdir()) == []


def test_without_ray_the_command_says_what_to_install(robustfeat: Run, photos: Path, tmp_path: Path) -> None:
    fake = tmp_path / "modules" / "ray.py"
    fake.parent.mkdir()
    fake.write_text("raise ModuleNotFoundError(name='ray')")
    environment = {**os.environ, "PYTHONPATH": str(fake.parent)}
    result = robustfeat("embed", photos, "--out", tmp_path / "feats.npy", "--quiet", "--ray", env=environment)
    assert (result.returncode, result.stderr) == (1, "robustfeat: this needs ray: pip install 'robustfeat[ray]'\n")
    assert list(tmp_path.iterdir()) == [fake.parent]


@pytest.mark.slow
def test_ray_goes_on_with_what_a_stopped_run_has_left(
    cluster: str, embed: Embed, photos: Path, local: Path, tmp_path: Path, robustfeat: Run
) -> None:
    """Locally, then on Ray, then by the command line in a process of its own."""
    out, shards = tmp_path / "feats.npy", tmp_path / ".feats.npy.shards"
    with pytest.raises(InputError, match=r"^028.jpg: [^\n]* \(row 28\); stopped at this image$"):
        embed(out, on_error="stop")
    assert {int(file.stem) for file in shards.glob("*.jsonl")} == set(range(7))
    (shards / "000003.jsonl").unlink()
    stamps = {file: file.stat().st_mtime_ns for file in shards.glob("*.jsonl")}
    with pytest.raises(InputError, match=r"^028.jpg: [^\n]* \(row 28\); stopped at this image$"):
        embed(out, on_error="stop", ray=cluster)
    assert not out.exists()
    kept = {file: file.stat().st_mtime_ns for file in shards.glob("*.jsonl")}
    assert stamps.items() <= kept.items()
    options = ["--batch-size=4", "--shard-rows=4", "--threads=1", "--ray"]
    environment = {**os.environ, "RAY_ADDRESS": cluster}
    result = robustfeat("embed", photos, "--out", out, *options, env=environment)
    said = result.stderr.splitlines()
    assert result.returncode == 3, said
    (before,) = (int(line.split()[1]) for line in said if line.startswith("resuming: "))
    assert before >= 4 * len(kept)
    ours = ("resuming", "embed ", f"{out}: 45 x 512", "robustfeat: 1 of 45 images failed")
    assert [line for line in said if not line.startswith(ours)] == []  # and nothing of Ray's
    assert written(out) == written(local)


def actor_processes() -> list[int]:
    """Those that the cluster of this process runs."""

    def parent(pid: int) -> int:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])

    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (folder / "cmdline").read_bytes().startswith(b"ray::MapWorker"):
                found += [int(folder.name)] if parent(parent(int(folder.name))) == os.getpid() else []
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def test_ray_writes_the_bytes_of_one_process_though_its_actors_are_killed(
    cluster: str, embed: Embed, local: Path, tmp_path: Path
) -> None:
    out, killed = tmp_path / "feats.npy", []

    def kill() -> None:
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob(".feats.npy.shards/*.jsonl"))) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        for pid in actor_processes():
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)

    killer = threading.Thread(target=kill)
    killer.start()
    result = embed(out, ray="auto")
    killer.join()
    assert killed
    assert (result.images, result.failed) == (45, 1)
    assert written(out) == written(local)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["feats.index.jsonl", "feats.meta.json", "feats.npy"]


def test_a_shard_that_kills_every_actor_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options, job = RunOptions(streams=1), Job(20, 0, 4, {})
    plan = _Plan("builtin", str(tmp_path), job, options, workers=None, deadline_s=60, stop=False, access=None)
    restarted = SimpleNamespace(was_current_actor_reconstructed=False)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: restarted)
    for _ in range(9):
        _ShardWriter(plan)._count_losses(2)  # of new actors: nobody has died
    restarted.was_current_actor_reconstructed = True
    for number in (2, 3, 2, 3):
        _ShardWriter(plan)._count_losses(number)
    with pytest.raises(EngineError, match="3 actors died over the inputs 8 to 11"):
        _ShardWriter(plan)._count_losses(2)


@pytest.mark.parametrize(
    "error",
    [InputError("expected less", argument="batch_size", value=8, fix="leave `batch_size` out"), OSError(28, "full")],
)
def test_an_error_of_an_actor_keeps_its_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: InputError | OSError
) -> None:
    def refuse(self: object) -> None:
        raise error

    monkeypatch.setattr(_ShardWriter, "_open", refuse)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(was_current_actor_reconstructed=False))
    plan = _Plan(
        "builtin", str(tmp_path), Job(20, 0, 4, {}), RunOptions(streams=1), workers=None, deadline_s=60, stop=False,
        access=None,
    )  # fmt: skip
    shard = pyarrow.table({"number": [2], "start": [0], "size": [0]})
    (result,) = _ShardWriter(plan)(shard).to_pylist()
    with pytest.raises(type(error)) as caught:
        _raise_error(result)
    if isinstance(error, InputError):
        assert vars(caught.value) == vars(error)
    else:
        assert caught.value.args == (28, f"full, on {socket.gethostname()}")
