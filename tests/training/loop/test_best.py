"""The probe of a run's features, and best.pt: the checkpoint of the epoch that was best."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from robustfeat.errors import CheckpointError, DataError, InputError
from robustfeat.hub.preprocessing import preprocess
from robustfeat.training.data.image_set import ImageSet
from robustfeat.training.data.opening import open_training_data
from robustfeat.training.evaluation.subject import open_network
from robustfeat.training.export.runs import export_run
from robustfeat.training.loop import epochs
from robustfeat.training.loop.checkpoint import load_checkpoint, network_of, save_checkpoint
from robustfeat.training.loop.trainer import train
from robustfeat.training.network import feature_network
from robustfeat.training.recipe import Recipe
from robustfeat.training.start import resolve_start
from tests.training.loop.test_trainer import assert_same_parameters
from tests.training.small import recipe


def run(dataset: Path, out: Path, made: Recipe, **options: Any) -> list[dict[str, Any]]:
    result = train(dataset, made, out, workers=0, threads=1, quiet=True, device="cpu", **options)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    probes = [line for line in lines if line["event"] == "probe"]
    assert result.probe_accuracy == (pytest.approx(probes[-1]["accuracy"], abs=1e-5) if probes else None)
    return probes


@pytest.fixture(scope="module")
def probed(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three epochs, probed after each, with best.pt; the averaged weights are far from the raw ones."""
    out = tmp_path_factory.mktemp("probed") / "run"
    run(dataset, out, recipe(dataset, probe=str(dataset), best="probe", epochs=3, ema=0.9))
    return out


def embed(network: torch.nn.Module, images: ImageSet) -> NDArray[Any]:
    contract = Recipe(image_sizes=((0, 32),), validation_size=32).preprocessing()
    inputs = preprocess([images.image(row) for row in range(len(images))], contract)
    with torch.no_grad():
        features: NDArray[Any] = feature_network(network)(torch.from_numpy(inputs)).double().numpy()
    unit: NDArray[Any] = features / np.linalg.norm(features, axis=1, keepdims=True)
    return unit


def accuracy_of_neighbours(file: Path, data: Path) -> float:
    """The majority of the ten nearest by cosine, written out."""
    images, test_images = open_training_data(data)
    network = network_of(load_checkpoint(file))
    cosines = embed(network, test_images) @ embed(network, images).T
    nearest = images.labels[np.argsort(-cosines, axis=1)[:, :10]]
    predicted = [int(np.bincount(labels).argmax()) for labels in nearest]
    return float(np.mean(predicted == test_images.labels))


def test_the_probe_is_a_vote_of_neighbours_and_best_is_its_first_highest_epoch(probed: Path, dataset: Path) -> None:
    lines = [json.loads(line) for line in (probed / "metrics.jsonl").read_text().splitlines()]
    scores = {line["epoch"]: line["accuracy"] for line in lines if line["event"] == "probe"}
    assert list(scores) == [1, 2, 3]
    best = load_checkpoint(probed / "best.pt")
    assert best.epoch == max(scores, key=lambda epoch: scores[epoch])
    assert best.best == {"epoch": best.epoch, "score": pytest.approx(scores[best.epoch])}
    assert load_checkpoint(probed).best == best.best
    assert accuracy_of_neighbours(probed / "best.pt", dataset) == pytest.approx(scores[best.epoch])
    assert accuracy_of_neighbours(probed / "checkpoint.pt", dataset) == pytest.approx(scores[3])


def test_a_probe_changes_no_parameter_and_best_resumes(probed: Path, dataset: Path, tmp_path: Path) -> None:
    made = recipe(dataset, epochs=3)
    run(dataset, tmp_path / "plain", made)
    assert_same_parameters(tmp_path / "plain", probed)
    with_probe = made.replace(probe=str(dataset), best="probe", ema=0.9)
    run(dataset, tmp_path / "parts", with_probe.replace(epochs=1))
    half = load_checkpoint(tmp_path / "parts")
    save_checkpoint(dataclasses.replace(half, recipe=with_probe.to_dict()), tmp_path / "parts")
    run(dataset, tmp_path / "parts", with_probe, resume=True)
    assert_same_parameters(tmp_path / "parts", probed)
    whole, parts = (load_checkpoint(folder / "best.pt") for folder in (probed, tmp_path / "parts"))
    assert whole.best == parts.best
    run(dataset, tmp_path / "parts", with_probe, resume=True)  # nothing is left but to tell the accuracies
    assert all(torch.equal(value, parts.result[name]) for name, value in whole.result.items())


def test_best_is_exported_evaluated_and_started_from(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter((0.5, 0.7, 0.7))
    monkeypatch.setattr(epochs, "probe", lambda run, step, report: _Accuracy(next(scores)))
    out = tmp_path / "run"
    lines = run(dataset, out, recipe(dataset, probe=str(dataset), best="probe", epochs=3))
    assert [line["accuracy"] for line in lines] == [0.5, 0.7, 0.7]
    best = load_checkpoint(out / "best.pt")
    assert (best.epoch, best.best) == (2, {"epoch": 2, "score": 0.7})
    assert not torch.equal(best.model["conv1.weight"], load_checkpoint(out).model["conv1.weight"])
    _, state = resolve_start(Recipe(init=str(out / "best.pt")))
    assert torch.equal(state["conv1.weight"], best.model["conv1.weight"])
    assert open_network(str(out / "best.pt"), device="cpu").name == "run at epoch 2 of 3"
    report = export_run(out, tmp_path / "model", best=True, int8=False)
    assert (report.folder.config.name, report.folder.config.provenance["epoch"]) == ("run", 2)
    assert "The weights are from epoch 2 of 3, the best." in (tmp_path / "model" / "README.md").read_text()
    exported = load_file(tmp_path / "model" / "model.safetensors")
    assert torch.equal(exported["conv1.weight"], best.model["conv1.weight"])


@dataclasses.dataclass
class _Accuracy:
    accuracy: float
    balanced_accuracy: float = 0.0


def test_best_by_validation_takes_the_loss_where_labels_are_not_learned(
    dataset: Path, small_model: Path, tmp_path: Path
) -> None:
    made = recipe(dataset, teacher=str(small_model), labels=False, best="validation")
    run(dataset, tmp_path / "taught", made)
    lines = [json.loads(line) for line in (tmp_path / "taught" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["validation_loss"] for line in lines if line["event"] == "epoch"]
    best = load_checkpoint(tmp_path / "taught" / "best.pt").best
    assert best == {"epoch": 1 + int(np.argmin(losses)), "score": pytest.approx(-min(losses), abs=1e-5)}


def test_the_svm_is_due_every_so_many_epochs_and_at_the_end_and_bad_images_are_left_out(
    dataset: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(dataset, data)
    bad = next((data / "val").rglob("*.png"))
    bad.write_bytes(b"no image")
    made = recipe(dataset, probe=str(data), probe_every=2, probe_classifier="svm", epochs=3)
    lines = run(dataset, tmp_path / "run", made)
    assert [(line["epoch"], line["classifier"]) for line in lines] == [(2, "svm"), (3, "svm")]
    assert all(round(line["accuracy"] * 9, 3) % 1 == 0 for line in lines), "nine test images are left"
    saved = load_checkpoint(tmp_path / "run")
    assert bad.name in saved.bad_images["probe"][0]
    assert not (tmp_path / "run" / "best.pt").exists()
    bad.unlink()
    with pytest.raises(CheckpointError, match="was probed with other images"):
        run(dataset, tmp_path / "run", made, resume=True)
    with pytest.raises(CheckpointError, match=r"holds no best\.pt; .*; train with best = validation or best = probe"):
        export_run(tmp_path / "run", tmp_path / "model", best=True)


def test_a_probe_without_an_image_that_can_be_decoded_is_refused(dataset: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(dataset, data)
    for file in (data / "val").rglob("*.png"):
        file.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"probe=.*: too few of its 30 training and 10 test images can be decoded"):
        run(dataset, tmp_path / "run", recipe(dataset, probe=str(data), epochs=1))


def test_what_makes_no_sense_is_refused(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="best=probe: needs a probe; pass `probe`, or `best=validation`"):
        Recipe(best="probe")
    with pytest.raises(InputError, match="probe_every=0: must be a whole number from 1"):
        Recipe(probe_every=0)
    with pytest.raises(DataError, match="nosuch: no such folder"):
        run(dataset, tmp_path / "run", recipe(dataset, probe=str(tmp_path / "nosuch")))
