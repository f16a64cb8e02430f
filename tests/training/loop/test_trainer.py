"""Runs of the trainer: what they write, what they refuse, and that a killed one ends as an unbroken one."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional

from robustfeat.errors import CheckpointError, DataError, InputError, TrainingError
from robustfeat.training.data.batches import EpochPlan, TrainingBatches
from robustfeat.training.data.opening import open_training_data
from robustfeat.training.loop.checkpoint import load_checkpoint
from robustfeat.training.loop.trainer import train
from robustfeat.training.network import build_network
from robustfeat.training.objective import Objective, StepBatch
from robustfeat.training.recipe import load_recipe
from tests.command_server import ForkedCommand
from tests.conftest import ROOT, Run, Start, train_arguments
from tests.training.small import recipe


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same_parameters(a: Path, b: Path) -> None:
    first, second = load_checkpoint(a), load_checkpoint(b)
    assert first.global_step == second.global_step
    for key, value in first.model.items():
        assert torch.equal(value, second.model[key]), key
    for key, state in first.optimizer["state"].items():
        assert torch.equal(state["momentum_buffer"], second.optimizer["state"][key]["momentum_buffer"])
    assert torch.equal(first.objective["adversary"]["q"], second.objective["adversary"]["q"])


def test_metrics_hold_loss_accuracy_q_and_the_weights_range(finished_run: Path) -> None:
    lines = metrics(finished_run)
    assert [line["event"] for line in lines] == ["train", "epoch", "train", "epoch"]
    line = lines[2]
    assert {"loss", "objective", "accuracy", "lr", "tau", "q", "weight_min", "weight_max", "images_per_s"} <= set(line)
    assert sum(line["q"]) == pytest.approx(1, abs=1e-5)
    assert line["weight_min"] <= 1 <= line["weight_max"]
    assert line["tau"] == pytest.approx(1.0 * 32 / 224, abs=1e-6)
    assert lines[3]["step"] == 10


def test_erm_is_plain_sgd_bit_for_bit(dataset: Path, tmp_path: Path) -> None:
    """The trainer against a loop written out here, with the real network."""
    settings = recipe(dataset, method="erm", width=64, weight_decay=1e-3, batch_size=15)
    train(dataset, settings, tmp_path / "run", workers=0, threads=1, quiet=True)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = build_network(10).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-3)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
    data, _ = open_training_data(dataset)
    for epoch in range(2):
        batches = TrainingBatches(data, 32, EpochPlan(data, 15, seed=0, epoch=epoch))
        for step in range(2):
            batch = batches[step]
            loss = functional.cross_entropy(network((batch.images.float() / 255 - mean) / std), batch.labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    saved = load_checkpoint(tmp_path / "run").model
    assert all(torch.equal(value, saved[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize("method", ["erm", "el", "cl", "hrrl"])
@pytest.mark.slow
def test_each_method_trains_with_bf16(dataset: Path, tmp_path: Path, method: str) -> None:
    result = train(
        dataset,
        recipe(dataset, method=method, precision="bf16", epochs=1),
        tmp_path / "run",
        workers=0,
        threads=1,
        quiet=True,
    )
    assert 0 <= result.validation_accuracy <= 1
    line = metrics(tmp_path / "run")[0]
    assert ("q" in line) == (method in {"cl", "hrrl"})
    assert (line["tau"] > 0) == (method in {"el", "hrrl"})


def test_training_learns(dataset: Path, tmp_path: Path) -> None:
    train(
        dataset,
        recipe(dataset, batch_size=30, epochs=20, lr=0.05, min_crop_area=0.9),
        tmp_path / "run",
        workers=0,
        threads=1,
        quiet=True,
    )
    losses = [line["loss"] for line in metrics(tmp_path / "run") if line["event"] == "train"]
    assert losses[-1] < 0.7 * losses[0]


class Doubled(Objective):
    """A researcher's own: the images as they are, twice the loss."""

    def training_images(self, model: nn.Module, batch: StepBatch) -> torch.Tensor:
        return batch.images

    def training_loss(self, losses: torch.Tensor, batch: StepBatch) -> torch.Tensor:
        return batch.mean(2 * losses)


def test_a_method_of_ones_own_is_used(dataset: Path, tmp_path: Path) -> None:
    mine, plain = tmp_path / "mine", tmp_path / "plain"
    options = {"weight_decay": 0.0, "epochs": 1}
    train(
        dataset,
        recipe(dataset, method="tests.training.loop.test_trainer:Doubled", lr=0.01, **options),
        mine,
        workers=0,
        threads=1,
        quiet=True,
    )
    train(dataset, recipe(dataset, method="erm", lr=0.02, **options), plain, workers=0, threads=1, quiet=True)
    first, second = load_checkpoint(mine).model, load_checkpoint(plain).model
    torch.testing.assert_close(first["fc.weight"], second["fc.weight"], rtol=1e-4, atol=1e-6)
    assert metrics(mine)[0]["objective"] == pytest.approx(2 * metrics(mine)[0]["loss"], rel=1e-3)


class Unreduced(Objective):
    """A mistake: a loss for each image."""

    def training_loss(self, losses: torch.Tensor, batch: StepBatch) -> torch.Tensor:
        return losses


def test_a_method_that_returns_no_scalar_is_told(dataset: Path, tmp_path: Path) -> None:
    own = recipe(dataset, method="tests.training.loop.test_trainer:Unreduced")
    with pytest.raises(InputError, match=r"Unreduced: training_loss must return a scalar.*got shape \(6,\)"):
        train(dataset, own, tmp_path / "run", workers=0, threads=1, quiet=True)
    with pytest.raises(InputError, match=r"tests\.training\.loop\.test_trainer has no Unwritten"):
        train(
            dataset,
            own.replace(method="tests.training.loop.test_trainer:Unwritten"),
            tmp_path / "other",
            workers=0,
            quiet=True,
        )


def test_a_cache_without_a_size_is_refused(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cache=ram: caches squares of `cache_px`, which is 0"):
        train(dataset, recipe(dataset), tmp_path / "run", cache="ram", workers=0, quiet=True)


@pytest.mark.slow
def test_a_file_of_concepts_may_be_named_from_any_folder(dataset: Path, tmp_path: Path, robustfeat: Run) -> None:
    relative = os.path.relpath(dataset / "concepts.csv", ROOT)
    arguments = train_arguments(dataset, tmp_path / "run", concepts=relative, epochs=1)
    assert robustfeat(*arguments, "--quiet").returncode == 0
    assert load_recipe(str(tmp_path / "run" / "recipe.toml")).concepts == str((dataset / "concepts.csv").resolve())
    moved = tmp_path / "moved.csv"
    moved.write_bytes((dataset / "concepts.csv").read_bytes())
    again = robustfeat(*train_arguments(dataset, tmp_path / "run", concepts=moved, epochs=1), "--resume", "--quiet")
    assert again.returncode == 0, again.stderr


def wait_for_step(process: subprocess.Popen[str] | ForkedCommand, run: Path, step: int) -> None:
    """Until the run has a checkpoint and a metrics line at this step or later."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if process.poll() is not None:
            return
        file = run / "metrics.jsonl"
        if file.exists() and (run / "checkpoint.pt").exists():
            lines = file.read_text().splitlines()
            if lines and lines[-1].endswith("}") and json.loads(lines[-1])["step"] >= step:
                return
        time.sleep(0.005)
    raise AssertionError("the run made no progress")


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_as_an_unbroken_one(
    dataset: Path, tmp_path: Path, robustfeat: Run, start: Start
) -> None:
    options = {"epochs": 3, "checkpoint-every-s": 0, "workers": 1}
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    assert robustfeat(*train_arguments(dataset, unbroken, **options), "--quiet").returncode == 0
    arguments = [*train_arguments(dataset, broken, **options), "--quiet"]
    for step in (2, 6):
        process = start(arguments if step == 2 else [*arguments, "--resume"])
        wait_for_step(process, broken, step)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    result = robustfeat(*arguments, "--resume")
    assert result.returncode == 0, result.stderr
    assert_same_parameters(unbroken, broken)
    steps = [line["step"] for line in metrics(broken) if line["event"] == "epoch"]
    assert steps == [5, 10, 15]
    assert not list(broken.glob(".*partial"))


def test_a_run_killed_before_its_first_epoch_ended_resumes(
    dataset: Path, tmp_path: Path, robustfeat: Run, start: Start
) -> None:
    # Epochs of 15 larger steps: the first checkpoint of one comes well after the run's first.
    options = {"epochs": 1, "batch-size": 2, "image-size": 96}
    arguments = [*train_arguments(dataset, tmp_path / "run", **options), "--quiet"]
    process = start(arguments)
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "checkpoint.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert load_checkpoint(tmp_path / "run").global_step == 0
    assert robustfeat(*arguments, "--resume").returncode == 0
    assert load_checkpoint(tmp_path / "run").global_step == 15


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_a_signal_saves_a_checkpoint_first(
    dataset: Path, tmp_path: Path, robustfeat: Run, start: Start, number: signal.Signals
) -> None:
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    options = {"epochs": 8, "workers": 1}
    each_step = {"robustfeat.training.loop.epochs._LOG_EVERY_STEPS": 1}
    process = start([*train_arguments(dataset, broken, **options), "--quiet"], constants=each_step)
    wait_for_step(process, broken, 6)  # within an epoch
    os.killpg(process.pid, number)  # as a terminal or a job scheduler does: the workers get it, too
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "pass --resume to resume it" in stderr
    assert len(stderr.splitlines()) == 1
    saved = load_checkpoint(broken).global_step
    assert 6 <= saved < 40
    assert saved == metrics(broken)[-1]["step"]
    if number == signal.SIGINT:  # what follows is the same
        return
    assert robustfeat(*train_arguments(dataset, broken, **options), "--resume").returncode == 0
    assert robustfeat(*train_arguments(dataset, unbroken, **options)).returncode == 0
    assert_same_parameters(unbroken, broken)


def test_a_run_is_not_overwritten(dataset: Path, narrow_run: Path) -> None:
    with pytest.raises(CheckpointError, match="pass `resume=True`"):
        train(dataset, recipe(dataset), narrow_run, workers=0, threads=1, quiet=True)


def test_a_folder_that_cannot_be_looked_at_is_refused(dataset: Path) -> None:
    place = "x" * 300
    with pytest.raises(InputError, match=f"^out={place}: cannot be read"):
        train(dataset, recipe(dataset), Path(place), workers=0, threads=1, quiet=True)
    with pytest.raises(CheckpointError, match=f"^{place}: cannot be read"):
        train(dataset, recipe(dataset), Path(place), resume=True, workers=0, threads=1, quiet=True)


def test_resume_refuses_another_recipe_or_other_data(dataset: Path, narrow_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(narrow_run, tmp_path / "run"))
    with pytest.raises(CheckpointError, match=r"was trained with lr = 0\.02, now it is 0\.5"):
        train(dataset, recipe(dataset, lr=0.5), run, resume=True, workers=0, threads=1, quiet=True)
    other = Path(shutil.copytree(dataset, tmp_path / "data"))
    next((other / "train" / "hat").iterdir()).unlink()
    (tmp_path / "data" / "concepts.csv").unlink()
    with pytest.raises(CheckpointError, match="was trained on other data"):
        train(other, recipe(dataset), run, resume=True, workers=0, threads=1, quiet=True)


def test_a_run_of_an_earlier_version_resumes(dataset: Path, narrow_run: Path, tmp_path: Path) -> None:
    """Its recipe has keys that are gone, and its adversary another tensor."""
    run = Path(shutil.copytree(narrow_run, tmp_path / "run"))
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    state["recipe"] |= {
        "nesterov": False, "tau_ramp_epochs": 0.0, "q_steps": "decaying", "group_rate": 0.01, "batch_norm": "batch",
    }  # fmt: skip
    adversary = state["objective"]["adversary"]
    adversary["iterate"] = adversary["q"].clone()
    torch.save(state, run / "checkpoint.pt")
    accuracy = train(dataset, recipe(dataset), run, resume=True, workers=0, threads=1, quiet=True).validation_accuracy
    assert accuracy == pytest.approx(metrics(run)[-1]["validation_accuracy"], abs=1e-5)
    state["recipe"]["nesterov"] = True
    torch.save(state, run / "checkpoint.pt")
    with pytest.raises(InputError, match=r"^nesterov=True: is no longer supported; expected False, or no nesterov$"):
        train(dataset, recipe(dataset), run, resume=True, workers=0, threads=1, quiet=True)


@pytest.mark.parametrize("damage", [b"", b"junk", None])
def test_a_damaged_checkpoint_is_one_line(
    dataset: Path, narrow_run: Path, tmp_path: Path, damage: bytes | None
) -> None:
    run = Path(shutil.copytree(narrow_run, tmp_path / "run"))
    file = run / "checkpoint.pt"
    file.write_bytes(file.read_bytes()[:-5000] if damage is None else damage)
    with pytest.raises(CheckpointError, match="damaged or not a checkpoint"):
        train(dataset, recipe(dataset), run, resume=True, workers=0, threads=1, quiet=True)


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "pwned"),)

    torch.save({"format_version": 1, "recipe": Evil()}, tmp_path / "checkpoint.pt")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        load_checkpoint(tmp_path)
    assert not (tmp_path / "pwned").exists()


def test_damaged_images_are_left_out_and_reported(dataset: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(dataset, tmp_path / "data"))
    victim = next((data / "train" / "hat").iterdir())
    victim.write_bytes(b"junk")
    result = train(data, recipe(dataset, epochs=1), tmp_path / "run", workers=1, threads=1, quiet=True)
    assert len(result.bad_images) == 1
    assert victim.name in result.bad_images[0]


def test_too_many_damaged_images_stop_the_run(dataset: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(dataset, tmp_path / "data"))
    for file in (data / "train").rglob("*.png"):
        file.write_bytes(b"junk")
    with pytest.raises(DataError, match="cannot be decoded, over 1 %"):
        train(data, recipe(dataset, epochs=1), tmp_path / "run", workers=0, threads=1, quiet=True)


def test_damaged_images_count_against_their_own_split(dataset: Path, tmp_path: Path) -> None:
    """11 of 1,200 training images are under 1 %, though they outnumber 1 % of the 10 validation images."""
    data = Path(shutil.copytree(dataset, tmp_path / "data"))
    for file in sorted((data / "train").rglob("*.png")):
        for copy in range(40):
            shutil.copy(file, file.with_name(f"{file.stem}-{copy}.png"))
    for file in sorted((data / "train").rglob("*-7.png"))[:11]:
        file.write_bytes(b"junk")
    result = train(data, recipe(dataset, epochs=1, batch_size=615), tmp_path / "run", workers=0, threads=1, quiet=True)
    assert len(result.bad_images) == 11


@pytest.mark.parametrize("method", ["erm", "hrrl"])
def test_divergence_stops_with_step_checkpoint_and_likely_cause(dataset: Path, tmp_path: Path, method: str) -> None:
    with pytest.raises(TrainingError) as caught:
        train(dataset, recipe(dataset, lr=1e30, method=method), tmp_path / "run", workers=0, threads=1, quiet=True)
    message = str(caught.value)
    step = int(re.match(r"training diverged at step (\d) \(.*not finite\); ", message)[1])  # type: ignore[index]
    assert 1 <= step <= 3
    assert "likely cause: a learning rate of 1e+30 is too high. " in message
    assert "checkpoint.pt is intact, of step 0; try a smaller `lr`" in message
    assert load_checkpoint(tmp_path / "run").global_step == 0


class BadAtSeven(Objective):
    """Its loss is NaN at the eighth step."""

    steps = 0

    def training_loss(self, losses: torch.Tensor, batch: StepBatch) -> torch.Tensor:
        self.steps += 1
        return super().training_loss(losses, batch) * (math.nan if self.steps == 8 else 1.0)


def test_a_nan_in_the_second_epoch_leaves_the_first_ones_checkpoint(dataset: Path, tmp_path: Path) -> None:
    method = "tests.training.loop.test_trainer:BadAtSeven"
    with pytest.raises(TrainingError, match=r"diverged at step 7 .* is intact, of step 5"):
        train(dataset, recipe(dataset, method=method), tmp_path / "run", workers=0, threads=1, quiet=True)
    saved = load_checkpoint(tmp_path / "run")
    assert saved.global_step == 5
    assert all(value.isfinite().all() for value in saved.model.values())


class Heavy(Objective):
    """Its loss is NaN once a line was logged in which a concept weighs much."""

    def training_loss(self, losses: torch.Tensor, batch: StepBatch) -> torch.Tensor:
        value = super().training_loss(losses, batch)
        return value * (math.nan if batch.epoch >= 1 else 1.0)


def test_a_heavy_concept_is_named_as_the_cause(dataset: Path, tmp_path: Path) -> None:
    """A reference that gives the smallest of the classes all of the weight."""
    settings = recipe(
        dataset,
        method="tests.training.loop.test_trainer:Heavy",
        concepts="classes",
        reference={folder.name: float(folder.name == "hat") for folder in (dataset / "train").iterdir()},
        lr=1e-6,
        lam=1e9,
    )
    with pytest.raises(TrainingError, match=r"concept hat weighed 10\.0 times .* larger `lam` or a smaller `lr`"):
        train(dataset, settings, tmp_path / "run", workers=0, threads=1, quiet=True)


def test_a_run_shows_what_it_did(finished_run: Path, dataset: Path) -> None:
    """TensorBoard's events by its own reader, the curves as an image, the recipe as a file that trains the same."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(finished_run / "tensorboard"))
    board.Reload()
    lines = metrics(finished_run)
    assert {"train/loss", "train/accuracy", "q/upper", "q/other", "epoch/validation_accuracy"} <= set(
        board.Tags()["scalars"]
    )
    steps = [line for line in lines if line["event"] == "train"]
    assert [event.step for event in board.Scalars("train/loss")] == [line["step"] for line in steps]
    assert [event.value for event in board.Scalars("q/upper")] == pytest.approx([line["q"][1] for line in steps])
    with Image.open(finished_run / "curves.png") as image:
        assert image.size[0] > 1000
        colours = image.convert("RGB").getcolors(2**20)
    assert colours is not None
    assert len(colours) > 50  # not blank
    assert load_recipe(str(finished_run / "recipe.toml")).to_dict() == load_checkpoint(finished_run).recipe


def test_a_run_says_what_was_left_out_its_concepts_weights_and_the_time_left(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("robustfeat.training.loop.epochs._LOG_EVERY_STEPS", 2)
    monkeypatch.setattr("robustfeat.progress._PLAIN_LINE_S", 0)
    folder = Path(shutil.copytree(dataset, tmp_path / "data"))
    (folder / "train" / "hat" / "photo.psd").touch()
    train(folder, recipe(dataset), tmp_path / "run", workers=0, threads=1)
    _, remark, *_, line = capsys.readouterr().err.splitlines()[:5]
    assert remark.startswith(f"{folder / 'train'}: files left out: 1 (")
    assert re.search(
        r"^epoch 1/2 at 32 px 18/30 images, [\d.]+/s, .* left, loss \d\.\d+, accuracy [\d.]+%, "
        r"weights 0\.\d\d (upper|other) to 1\.\d\d (upper|other), run 0:\d\d left$",
        line,
    ), line


@pytest.mark.parametrize("inner", ["half", "free"])
def test_every_inner_pass_trains_as_many_steps(dataset: Path, tmp_path: Path, inner: str) -> None:
    train(dataset, recipe(dataset, inner=inner, replays=3), tmp_path / "run", workers=0, threads=1, quiet=True)
    assert load_checkpoint(tmp_path / "run").global_step == 10


def test_free_shows_every_image_within_as_many_epochs_as_replays(dataset: Path) -> None:
    data, _ = open_training_data(dataset)
    plans = [EpochPlan(data, 6, seed=0, epoch=epoch, replays=5) for epoch in range(6)]
    assert [(plan.steps, plan.batches) for plan in plans] == [(5, 1)] * 6
    seen = np.concatenate([plan.rows(0) for plan in plans[:5]])
    assert sorted(seen) == list(range(30))
    assert not np.array_equal(plans[5].rows(0), plans[0].rows(0))


@pytest.mark.slow
def test_a_stopped_free_run_goes_on_at_a_whole_batch(
    dataset: Path, tmp_path: Path, robustfeat: Run, start: Start
) -> None:
    options = {"epochs": 6, "inner": "free", "checkpoint-every-s": 0}
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    assert robustfeat(*train_arguments(dataset, unbroken, **options), "--quiet").returncode == 0
    process = start([*train_arguments(dataset, broken, **options), "--quiet"])
    wait_for_step(process, broken, 7)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert load_checkpoint(broken).step in {0, 4}
    assert robustfeat(*train_arguments(dataset, broken, **options), "--resume", "--quiet").returncode == 0
    assert_same_parameters(unbroken, broken)


@pytest.mark.slow
def test_resume_takes_the_runs_own_recipe(dataset: Path, tmp_path: Path, robustfeat: Run, start: Start) -> None:
    arguments = [*train_arguments(dataset, tmp_path / "run", epochs=3), "--set", "q_baseline=true", "--quiet"]
    process = start([*arguments, "--checkpoint-every-s=0"])
    wait_for_step(process, tmp_path / "run", 2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    result = robustfeat("train", dataset, "--out", tmp_path / "run", "--resume", "--device", "cpu", "--workers", 0)
    assert result.returncode == 0, result.stderr
    assert load_checkpoint(tmp_path / "run").global_step == 15


def test_resume_with_an_option_keeps_the_rest_of_the_recipe(
    dataset: Path, narrow_run: Path, tmp_path: Path, robustfeat: Run
) -> None:
    run = Path(shutil.copytree(narrow_run, tmp_path / "run"))
    (run / "recipe.toml").unlink()
    result = robustfeat("train", dataset, "--out", run, "--resume", "--device", "cpu", "--lr", 0.3)
    assert result.returncode == 1
    assert "was trained with lr = 0.02, now it is 0.3" in result.stderr


def test_an_option_that_is_there_and_empty_is_refused(dataset: Path, tmp_path: Path, robustfeat: Run) -> None:
    """As an unset variable of a shell leaves it."""
    result = robustfeat("train", dataset, "--out", tmp_path / "new", "--reference", "")
    assert (result.returncode, result.stderr) == (
        1,
        "robustfeat: --reference: expected a name; got an empty one; pass a name, or leave it out\n",
    )


def test_a_recalibrated_run_reports_both_accuracies(dataset: Path, tmp_path: Path) -> None:
    train(dataset, recipe(dataset, recalibrate=3), tmp_path / "run", workers=0, threads=1, quiet=True)
    plain = train(dataset, recipe(dataset), tmp_path / "plain", workers=0, threads=1, quiet=True)
    events = metrics(tmp_path / "run")
    assert [line["event"] for line in events] == ["train", "epoch", "train", "epoch", "recalibrated"]
    assert events[3]["validation_accuracy"] == pytest.approx(plain.validation_accuracy, abs=1e-5)
    assert events[4]["validation_loss"] != events[3]["validation_loss"]
    first, second = load_checkpoint(tmp_path / "run").model, load_checkpoint(tmp_path / "plain").model
    assert torch.equal(first["fc.weight"], second["fc.weight"])
    assert not torch.equal(first["bn1.running_mean"], second["bn1.running_mean"])


def test_a_cached_run_is_the_decoding_run(dataset: Path, tmp_path: Path) -> None:
    """At the images' own size, bit for bit."""
    train(dataset, recipe(dataset, cache_px=40), tmp_path / "cached", workers=1, threads=1, quiet=True)
    train(dataset, recipe(dataset), tmp_path / "plain", workers=0, threads=1, quiet=True)
    assert_same_parameters(tmp_path / "cached", tmp_path / "plain")
