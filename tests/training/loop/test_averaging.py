"""`ema`: the average of the weights against NumPy's, and that it is what a run validates and gives away."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from robustfeat.errors import CheckpointError
from robustfeat.training.data.batches import EvaluationBatches
from robustfeat.training.data.opening import open_training_data
from robustfeat.training.export import runs
from robustfeat.training.export.folder import Backbone
from robustfeat.training.loop.checkpoint import Checkpoint, load_checkpoint, network_of, save_checkpoint
from robustfeat.training.loop.step import TrainingStep
from robustfeat.training.loop.trainer import train
from robustfeat.training.objective import Objective
from robustfeat.training.recipe import Recipe
from robustfeat.training.start import resolve_start
from tests.conftest import Share
from tests.training.small import recipe
from tests.training.test_objective import make, make_in_parts, pixels


class Headed(Objective):
    """With a head of its own, which is averaged, too."""

    def create_heads(self, feature_size: int, classes: int) -> nn.ModuleDict:
        return nn.ModuleDict({"extra": nn.Linear(feature_size, 2)})

    def training_loss(self, losses: Tensor, batch: object) -> Tensor:
        return losses.mean()

    def losses(self, output: object, batch: object) -> Tensor:
        plain = super().losses(output, batch)  # type: ignore[arg-type]
        return plain + output.heads["extra"].square().sum(1)  # type: ignore[attr-defined, no-any-return]


def tensors(state: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{part} {name}": value for part in ("model", "heads") for name, value in state[part].items()}


def raw(step: TrainingStep) -> dict[str, NDArray[np.float64]]:
    return {name: value.numpy().astype(np.float64) for name, value in tensors(step.state_dict()).items()}


@pytest.mark.parametrize("ema", [0.4, 0.999])
def test_the_average_is_numpys(ema: float) -> None:
    step = make(method=f"{__name__}:Headed", ema=ema, lr=0.05)
    expected = raw(step)
    for number in range(5):
        step(*pixels(number), 0.0, number)
        decay = min(ema, (2 + number) / (11 + number))
        for name, trained in raw(step).items():
            counter = name.endswith("num_batches_tracked")
            expected[name] = trained if counter else decay * expected[name] + (1 - decay) * trained
    average, present = tensors(step.state_dict()["average"]), raw(step)
    assert average.keys() == expected.keys()
    assert {"heads extra.weight", "model bn1.running_var", "model fc.weight"} <= average.keys()
    for name, value in average.items():
        np.testing.assert_allclose(value.numpy(), expected[name], rtol=1e-5, atol=1e-6, err_msg=name)
    assert not np.allclose(present["model fc.weight"], expected["model fc.weight"], atol=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_average_goes_on_from_its_state(precision: str) -> None:
    options = {"method": f"{__name__}:Headed", "ema": 0.99, "lr": 0.01, "precision": precision}
    whole, second = make_in_parts(**options)
    expected, state = whole.state_dict()["average"], second.state_dict()["average"]
    assert expected["updates"] == state["updates"] == 6
    assert all(torch.equal(value, tensors(state)[name]) for name, value in tensors(expected).items())


@pytest.fixture
def averaged_run(dataset: Path, share: Share) -> Path:
    made = recipe(dataset, ema=0.9, recalibrate=2)
    return share("averaged-run", lambda out: train(dataset, made, out, workers=0, threads=1, quiet=True))


def last_event(run: Path) -> dict[str, Any]:
    event: dict[str, Any] = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    return event


def test_the_network_that_is_trained_does_not_see_its_average(
    averaged_run: Path, narrow_run: Path, dataset: Path
) -> None:
    with_average, without = load_checkpoint(averaged_run), load_checkpoint(narrow_run)
    assert not without.average
    assert without.result == without.model
    assert all(torch.equal(value, with_average.model[name]) for name, value in without.model.items())
    assert not torch.equal(with_average.result["fc.weight"], with_average.model["fc.weight"])


def test_the_average_is_recalibrated_validated_and_exported(
    averaged_run: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = load_checkpoint(averaged_run)
    network = network_of(saved)
    assert all(torch.equal(value, saved.average["model"][name]) for name, value in network.state_dict().items())
    made = Recipe.from_dict(saved.recipe)
    contract, images = made.preprocessing(), open_training_data(dataset)[1]
    batch = EvaluationBatches(images, len(images), contract)[0]
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (contract.mean, contract.std))
    with torch.no_grad():
        logits = network((batch.images / 255 - mean) / std)
    event = last_event(averaged_run)
    assert event["event"] == "recalibrated"
    expected = functional.cross_entropy(logits, batch.labels)
    assert event["validation_loss"] == pytest.approx(float(expected), abs=1e-4)
    written: list[Backbone] = []
    monkeypatch.setattr(runs, "write_model_folder", lambda backbone, *_, **__: written.append(backbone))
    runs.export_run(averaged_run, tmp_path / "model", int8=False)
    (backbone,) = written
    for state in (backbone.state, backbone.network.state_dict()):
        assert all(torch.equal(value, saved.average["model"][name]) for name, value in state.items())


def test_a_run_is_a_start_by_its_average(averaged_run: Path, dataset: Path, tmp_path: Path) -> None:
    _, state = resolve_start(Recipe(init=str(averaged_run)))
    saved = load_checkpoint(averaged_run)
    assert all(torch.equal(value, saved.average["model"][name]) for name, value in state.items())
    # The average of a run with a start begins there, not at random weights.
    changes = {"init": str(averaged_run), "lr": 1e-12, "weight_decay": 0, "epochs": 1, "ema": 0.999}
    train(dataset, recipe(dataset, **changes), tmp_path / "next", workers=0, threads=1, quiet=True)
    after = load_checkpoint(tmp_path / "next").average["model"]
    torch.testing.assert_close(after["conv1.weight"], state["conv1.weight"], rtol=0, atol=1e-7)


def test_a_stopped_run_ends_with_the_same_average(dataset: Path, tmp_path: Path) -> None:
    made = recipe(dataset, ema=0.9)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(dataset, made, whole, workers=0, threads=1, quiet=True)
    train(dataset, made.replace(epochs=1), parts, workers=0, threads=1, quiet=True)
    half = load_checkpoint(parts)
    save_checkpoint(Checkpoint(**{**vars(half), "recipe": made.to_dict()}), parts)
    train(dataset, made, parts, resume=True, workers=0, threads=1, quiet=True)
    expected, average = load_checkpoint(whole).average, load_checkpoint(parts).average
    assert expected["updates"] == average["updates"] == 10
    assert all(torch.equal(value, average["model"][name]) for name, value in expected["model"].items())
    assert last_event(parts) == last_event(whole)


def test_a_damaged_average_is_named(averaged_run: Path, tmp_path: Path) -> None:
    saved = load_checkpoint(averaged_run)
    save_checkpoint(Checkpoint(**{**vars(saved), "average": {"x": 1}}), tmp_path)
    with pytest.raises(CheckpointError, match=r"damaged \(average must hold a model"):
        load_checkpoint(tmp_path)
