"""Training on two real processes, over gloo: what both must agree on, and what must equal one process.

torchrun starts new interpreters, which import PyTorch for a while: a few tests are about it. The others start the ranks
themselves, with the environment that torchrun gives them.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch._C._distributed_c10d import TCPStore

from robustfeat.training.loop.checkpoint import load_checkpoint
from robustfeat.training.loop.trainer import train
from tests.command_server import CommandServer, ForkedCommand
from tests.conftest import ROOT, train_arguments
from tests.training import small
from tests.training.loop.test_trainer import assert_same_parameters, wait_for_step
from tests.training.recording import FOLDER, read, read_lines

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]


@contextlib.contextmanager
def ranks_of(
    commands: CommandServer, arguments: list[str], ranks: int, code: str | None = None, **environment: str
) -> Iterator[list[ForkedCommand]]:
    """So many processes of a command, or of `code`, which meet at a store of this one."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        **environment,
    }
    processes = [
        commands.start(arguments, os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, code=code)
        for rank in range(ranks)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)


def run_ranks(commands: CommandServer, arguments: list[str], folder: Path, ranks: int) -> None:
    """A training of narrow networks on so many processes."""
    with ranks_of(commands, arguments, ranks, **{FOLDER: str(folder)}) as processes:
        for process in processes:
            _, stderr = process.communicate(timeout=240)
            assert process.returncode == 0, stderr


def start(arguments: list[str], folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*TORCHRUN, "robustfeat", *arguments],
        cwd=ROOT,
        env=os.environ | {FOLDER: str(folder)},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    try:
        stdout, stderr = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(process.communicate()[1]) from None
    return process.returncode, stdout, stderr


@pytest.fixture(scope="module")
def noise(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The classes of `dataset` with images of noise.

    Where a photograph is flat, max-pooling meets ties, and a last bit decides which pixel gets the gradient.
    """
    root = tmp_path_factory.mktemp("noise")
    rng = np.random.default_rng(0)
    for file in dataset.rglob("*.png"):
        target = root / file.relative_to(dataset)
        target.parent.mkdir(parents=True, exist_ok=True)
        for copy in range(10):
            image = Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8))
            image.save(target.with_stem(f"{target.stem}-{copy}"))
    shutil.copy(dataset / "concepts.csv", root)
    return root


@pytest.fixture(scope="module")
def one_and_two(noise: Path, tmp_path_factory: pytest.TempPathFactory, commands: CommandServer) -> tuple[Path, Path]:
    """The same 50 steps on one rank and on two, with BatchNorm's running statistics; what each step saw."""
    folders = []
    for ranks in (1, 2):
        folder = tmp_path_factory.mktemp(f"ranks{ranks}")
        # A small rate: the network without batch statistics is chaotic in float32. In float64 the two agree to
        # 1e-15 at any rate; in float32 a last bit decides a ReLU now and then, and that turns the directions z.
        options = {
            "epochs": 1, "method": "tests.training.recording:Frozen", "lambda": 1, "lr": 2e-5, "tau": 0.05,
            "set": "ema=0.9", "probe": noise,
        }  # fmt: skip
        keys = ["--set=clip_norm=1", "--set=best=probe", "--set=p_lam=20"]
        arguments = [*train_arguments(noise, folder / "run", **options), *keys]
        run_ranks(commands, [*arguments, "--json"], folder, ranks)
        folders.append(folder)
    return folders[0], folders[1]


def assert_q_is_the_same_bits_on_both_ranks_at_every_step(one_and_two: tuple[Path, Path]) -> None:
    first, second = (read(one_and_two[1] / f"rank{rank}.jsonl")[0] for rank in (0, 1))
    assert len(first) == 50
    assert first == second
    moved = [abs(float.fromhex(share) - float.fromhex(start)) for share, start in zip(first[-1], first[0], strict=True)]
    assert max(moved) > 1e-3


def assert_two_ranks_make_the_steps_that_one_makes(one_and_two: tuple[Path, Path]) -> None:
    one, two = one_and_two
    alone_q, alone_losses = read(one / "rank0.jsonl")
    parts = [read(two / f"rank{rank}.jsonl") for rank in (0, 1)]
    for step in range(50):
        q = [[float.fromhex(share) for share in shares] for shares in (alone_q[step], parts[0][0][step])]
        np.testing.assert_allclose(q[0], q[1], rtol=0, atol=1e-6)
        assert len(parts[0][1][step]) == len(parts[1][1][step]) == 3
        joined = parts[0][1][step] + parts[1][1][step]
        assert np.mean(joined) == pytest.approx(np.mean(alone_losses[step]), abs=1e-5)
    alone, shared = load_checkpoint(one / "run"), load_checkpoint(two / "run")
    assert alone.average["updates"] == shared.average["updates"] == 50
    for name, value in alone.model.items():
        torch.testing.assert_close(value, shared.model[name], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(alone.result[name], shared.result[name], rtol=1e-3, atol=1e-4)


def assert_one_rank_writes_and_evaluation_is_summed_exactly(one_and_two: tuple[Path, Path]) -> None:
    epochs, probed = [], []
    for folder in one_and_two:
        lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if line["event"] == "epoch"] == [50]
        assert len(list((folder / "run" / "tensorboard").iterdir())) == 1
        epochs.append([line for line in lines if line["event"] in {"train", "epoch"}])
        probed.append([line["accuracy"] for line in lines if line["event"] == "probe"])
        best = load_checkpoint(folder / "run" / "best.pt").best
        assert (best["epoch"], round(best["score"], 5)) == (1, probed[-1][0])
    assert probed[0] == pytest.approx(probed[1], abs=0.02)  # of 100 images
    for alone, shared in zip(*epochs, strict=True):
        if alone["event"] == "train":
            assert shared["gradient_norm"] == pytest.approx(alone["gradient_norm"], rel=1e-3)
            assert alone["gradient_norm"] > 1  # and was clipped
            continue
        assert shared["validation_loss"] == pytest.approx(alone["validation_loss"], abs=2e-5)
        assert shared["validation_accuracy"] == alone["validation_accuracy"]


def test_two_ranks_train_as_one(one_and_two: tuple[Path, Path]) -> None:
    """One test, since runs are what takes time and workers of pytest do not share them."""
    assert_q_is_the_same_bits_on_both_ranks_at_every_step(one_and_two)
    assert_two_ranks_make_the_steps_that_one_makes(one_and_two)
    assert_one_rank_writes_and_evaluation_is_summed_exactly(one_and_two)


@pytest.mark.slow
def test_two_killed_ranks_go_on_to_the_result_of_an_unbroken_run(dataset: Path, tmp_path: Path) -> None:
    """Killed in the middle of an epoch, where each rank's batches have BatchNorm statistics of their own."""
    method = "tests.training.recording:Recording"
    options = {"epochs": 3, "method": method, "set": "inner_batch_norm=eval"}
    mixed = ["--set=cutmix=1.0", "--set=mixup=0.2", "--set=trivial_augment=true", "--set=erasing=0.2"]
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    code, _, stderr = finish(start([*train_arguments(dataset, unbroken, **options), *mixed], tmp_path))
    assert code == 0, stderr
    running = [[line["running"] for line in read_lines(tmp_path / f"rank{rank}.jsonl")] for rank in (0, 1)]
    assert running[0] == running[1], "the running statistics are those of one network"
    assert len(set(running[0])) == 15
    process = start([*train_arguments(dataset, broken, **options, **{"checkpoint-every-s": 0}), *mixed], tmp_path)
    wait_for_step(process, broken, 7)
    # torchrun gives each rank a session of its own.
    subprocess.run(["pkill", "-KILL", "-f", str(broken)], check=True)
    process.communicate()
    saved = load_checkpoint(broken)
    assert 6 <= saved.global_step < 15
    code, _, stderr = finish(start([*train_arguments(dataset, broken, **options), *mixed, "--resume"], tmp_path))
    assert code == 0, stderr
    assert_same_parameters(unbroken, broken)


@pytest.mark.slow
def test_a_signal_to_torchrun_saves_first(dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start([*train_arguments(dataset, out, epochs=200), "--quiet"], tmp_path)
    wait_for_step(process, out, 5)
    process.send_signal(signal.SIGTERM)
    code, _, stderr = finish(process)
    assert code != 0
    assert [line for line in stderr.splitlines() if "pass --resume" in line] == [
        f"robustfeat: stopped; {out / 'checkpoint.pt'} is up to date; pass --resume to resume it"
    ]
    assert load_checkpoint(out).global_step >= 5


def test_what_is_wrong_is_said_once_and_ends_both(dataset: Path, tmp_path: Path) -> None:
    process = start(train_arguments(dataset, tmp_path / "run", **{"batch-size": 5}), tmp_path)
    code, _, stderr = finish(process)
    assert code != 0
    assert (
        stderr.count("--batch-size 5: is shared by 2 processes and must be a multiple of that, at least 2 for each")
        == 1
    )


FOUND = """
import os, sys, torch
from robustfeat.errors import RobustFeatError
from robustfeat.training.loop.distributed import join_group, require_same
from robustfeat.training.loop.ranks import Ranks
ranks = Ranks.from_environment()
try:
    with join_group(ranks, torch.device("cpu")):
        require_same({"init": None, "teacher": "the same"})
        require_same({"init": None, "teacher": sys.argv[1 + ranks.rank]})
except RobustFeatError as exc:
    print(f"{ranks.rank}: {exc}", file=sys.stderr, flush=True)
    os._exit(1)  # at an ordinary exit, PyTorch's libraries may report leaks of their own
"""


def test_ranks_that_found_different_teachers_do_not_train(commands: CommandServer) -> None:
    with ranks_of(commands, ["a", "b"], 2, code=FOUND) as processes:
        said = [process.communicate(timeout=240)[1] for process in processes]
    assert said[0].count("\n") == 1
    assert said[0].startswith("0: teacher: is not the same on all ranks, because it changed while they started; run")
    assert said[1] == ""
    assert [process.returncode for process in processes] == [1, 1]


@pytest.mark.slow
def test_a_bad_image_of_either_rank_is_named_by_the_first(dataset: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(dataset, tmp_path / "data"))
    victims = [next((data / "train" / name).iterdir()) for name in ("hat", "skirt", "dress")]
    for victim in victims:
        victim.write_bytes(b"junk")
    process = start([*train_arguments(data, tmp_path / "run", epochs=1), "--json"], tmp_path)
    code, stdout, stderr = finish(process)
    assert json.loads(stdout)["bad_images"] == 3
    assert all(stderr.count(f"left out: {victim.parent.name}/{victim.name}") == 1 for victim in victims)
    assert "left out 3 images that could not be decoded" in stderr
    assert code == 0, "torchrun would report a crash"


def test_two_ranks_accumulate_as_one(
    noise: Path, tmp_path: Path, commands: CommandServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five batches an epoch in groups of three and two; momentum holds the gradients, whatever the learning rate."""
    monkeypatch.setenv(FOLDER, str(tmp_path))
    options = {"epochs": 1, "method": "tests.training.recording:Frozen", "lr": 2e-5, "tau": 0.05}
    arguments = train_arguments(noise, tmp_path / "two", **options, **{"batch-size": 60, "set": "accumulate=3"})
    run_ranks(commands, arguments, tmp_path, 2)
    one = small.recipe(noise, **options, batch_size=60, accumulate=3)
    train(noise, one, tmp_path / "one", workers=0, threads=1, quiet=True, device="cpu")
    alone, shared = (load_checkpoint(tmp_path / name).optimizer["state"] for name in ("one", "two"))
    for key, state in alone.items():
        momentum = state["momentum_buffer"]
        scale = float(momentum.abs().max())
        torch.testing.assert_close(momentum, shared[key]["momentum_buffer"], rtol=1e-2, atol=1e-3 * scale)
