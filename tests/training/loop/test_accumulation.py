"""`accumulate`: the updates of groups of batches against a loop written out here."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Collection
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from robustfeat.errors import InputError, StoppedError
from robustfeat.training.data.batches import EpochPlan, TrainingBatches
from robustfeat.training.data.opening import open_training_data
from robustfeat.training.loop.checkpoint import load_checkpoint
from robustfeat.training.loop.ranks import Ranks
from robustfeat.training.loop.step import Group, TrainingStep
from robustfeat.training.loop.trainer import train
from robustfeat.training.network import build_network
from robustfeat.training.objective import Objective, StepBatch
from robustfeat.training.recipe import Recipe
from tests.training.loop.test_trainer import assert_same_parameters
from tests.training.small import recipe
from tests.training.test_objective import CONCEPTS, CPU, make, pixels


def written_out(dataset: Path, groups: list[list[int]], size: int, left_out: Collection[int] = ()) -> nn.Module:
    """Plain SGD over one epoch's groups of batches."""
    torch.manual_seed(0)
    network = build_network(10, width=8).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-4)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
    data, _ = open_training_data(dataset)
    batches = TrainingBatches(data, 32, EpochPlan(data, size, seed=0, epoch=0))
    for group in groups:
        optimizer.zero_grad()
        for number in (one for one in group if one not in left_out):
            batch = batches[number]
            loss = functional.cross_entropy(network((batch.images.float() / 255 - mean) / std), batch.labels)
            (loss / len(group)).backward()
        optimizer.step()
    return network


def test_updates_are_those_of_groups_of_batches(dataset: Path, tmp_path: Path) -> None:
    """Five batches an epoch: the last group has one."""
    made = recipe(dataset, method="erm", accumulate=2, epochs=1, ema=0.5)
    train(dataset, made, tmp_path / "run", workers=0, threads=1, quiet=True)
    torch.set_num_threads(1)
    expected, saved = written_out(dataset, [[0, 1], [2, 3], [4]], 6), load_checkpoint(tmp_path / "run")
    for name, value in expected.state_dict().items():
        assert torch.equal(value, saved.model[name]), name
    assert (saved.global_step, saved.average["updates"]) == (5, 3)


def test_a_batch_that_is_left_out_counts_as_no_gradient(dataset: Path, tmp_path: Path) -> None:
    """Batches of two images, one of which cannot be decoded: BatchNorm needs two."""
    data = Path(shutil.copytree(dataset, tmp_path / "data"))
    rows = EpochPlan(open_training_data(data)[0], 2, seed=0, epoch=0)
    files = sorted((data / "train").rglob("*.png"))
    for number in (4, 7):  # at the beginning of a group, and at its end
        files[rows.rows(number)[0]].write_bytes(b"junk")
    made = recipe(data, method="erm", accumulate=4, epochs=1, batch_size=2)
    result = train(data, made, tmp_path / "run", workers=0, threads=1, quiet=True)
    assert len(result.bad_images) == 2
    groups = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14]]
    expected = written_out(dataset, groups, 2, left_out={4, 7}).state_dict()
    saved = load_checkpoint(tmp_path / "run").model
    assert all(torch.equal(value, saved[name]) for name, value in expected.items())


def test_the_adversary_moves_with_every_batch(dataset: Path, tmp_path: Path) -> None:
    train(dataset, recipe(dataset, accumulate=3), tmp_path / "run", workers=0, threads=1, quiet=True)
    assert load_checkpoint(tmp_path / "run").objective["adversary"]["step"] == 10


class Stopping(Objective):
    """Asks for the end of the run with the first batch of a group, where a test says so."""

    stop = False

    def training_loss(self, losses: Tensor, batch: StepBatch) -> Tensor:
        if Stopping.stop:
            Stopping.stop = False
            os.kill(os.getpid(), signal.SIGTERM)
        return super().training_loss(losses, batch)


def test_a_stop_waits_for_the_groups_end_and_resumes(dataset: Path, tmp_path: Path) -> None:
    made = recipe(dataset, method=f"{__name__}:Stopping", accumulate=3, ema=0.9, clip_norm=1.0)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(dataset, made, whole, workers=0, threads=1, quiet=True)
    Stopping.stop = True
    with pytest.raises(StoppedError):
        train(dataset, made, parts, workers=0, threads=1, quiet=True)
    assert load_checkpoint(parts).global_step == 3
    train(dataset, made, parts, resume=True, workers=0, threads=1, quiet=True)
    assert_same_parameters(whole, parts)
    average = load_checkpoint(parts).average["model"]
    assert all(torch.equal(value, average[name]) for name, value in load_checkpoint(whole).average["model"].items())


def test_gradients_that_ranks_have_not_exchanged_are_averaged_at_the_end() -> None:
    """Without a group of processes the sum over the ranks is this rank's part alone, which two ranks halve."""
    options = {"method": "erm", "lr": 0.1, "momentum": 0.0, "weight_decay": 0.0}
    alone = make(**options)
    shared = TrainingStep(alone.recipe, CONCEPTS, CPU, Ranks(0, 2, 0, 2))
    before = alone.network.state_dict()["fc.weight"].clone()
    for step in (alone, shared):
        step.train()
        assert step.update(0.0) is None  # nothing is there yet
        step(*pixels(), 0.0, 0, group=Group(2, ends=False))
        assert torch.equal(step.network.state_dict()["fc.weight"], before)
        step.update(0.0)
    moved = [step.network.state_dict()["fc.weight"] - before for step in (alone, shared)]
    assert moved[0].abs().max() > 1e-4
    torch.testing.assert_close(moved[0], 2 * moved[1])


def test_replays_do_not_accumulate() -> None:
    with pytest.raises(InputError, match=r"accumulate=2: must be 1 with `inner=free`"):
        Recipe(accumulate=2, inner="free")
    with pytest.raises(InputError, match="must be a whole number from 1"):
        Recipe(accumulate=0)
