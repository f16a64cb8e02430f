"""`method = "stable"`: the move that changes features most, the loss, and runs with labels, a teacher or a start."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from robustfeat import FeatureExtractor
from robustfeat.errors import CheckpointError, InputError
from robustfeat.serving.verify import check_golden
from robustfeat.training.example_level import create_example_level
from robustfeat.training.export.runs import export_run
from robustfeat.training.loop.checkpoint import load_checkpoint, save_checkpoint
from robustfeat.training.loop.divergence import explain_divergence
from robustfeat.training.loop.ranks import Ranks
from robustfeat.training.loop.step import Guidance, TrainingStep
from robustfeat.training.network import StepOutput
from robustfeat.training.objective import create_objective
from robustfeat.training.step_batch import StepBatch
from tests.training import small
from tests.training.small import run, run_one_epoch
from tests.training.test_objective import CONCEPTS, CPU, SMALL, pixels

STABLE = dataclasses.replace(SMALL, method="stable", stable_weight=0.5)


class Linear(nn.Module):
    """Features W x of images of 2 x 2 pixels."""

    def __init__(self, size: int = 5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size, 12, generator=torch.Generator().manual_seed(1)))

    def forward(self, images: torch.Tensor) -> StepOutput:
        features = images.flatten(1) @ self.weight.T
        return StepOutput(features, features, {})


def linear_batch(**changes: Any) -> StepBatch:
    images = torch.randn(3, 3, 2, 2, generator=torch.Generator().manual_seed(2))
    return StepBatch(images, torch.tensor([0, 1, 2]), torch.zeros(3, dtype=torch.long), 0.0, 3, **changes)


def find_move(model: Linear, batch: StepBatch, **keys: Any) -> NDArray[np.float64]:
    """d of each image, for tau = 2."""
    level = create_example_level("features", dataclasses.replace(STABLE, **keys))
    torch.manual_seed(7)
    seen = level.move(model, batch, 2.0, lambda output: output.logits)
    still, moved = seen.chunk(2)
    assert torch.equal(still, batch.images)
    return (moved - still).flatten(1).double().numpy()


def unit(values: NDArray[np.float64]) -> NDArray[np.float64]:
    scaled: NDArray[np.float64] = values / np.linalg.norm(values, axis=1, keepdims=True)
    return scaled


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("unit_of_tau", ["normalised", "pixel"])
def test_the_move_is_the_power_methods_from_a_random_start(steps: int, unit_of_tau: str) -> None:
    model, batch = Linear(), linear_batch()
    found = find_move(model, batch, stable_steps=steps, tau_unit=unit_of_tau)
    torch.manual_seed(7)
    direction = unit(torch.randn(3, 3, 2, 2).double().numpy().reshape(3, 12))
    w = model.weight.detach().double().numpy()
    # In pixels: of u = std x, with features (W / std) u.
    std = np.repeat([0.229, 0.224, 0.225], 4) if unit_of_tau == "pixel" else np.ones(12)
    for _ in range(steps):
        direction = unit(direction @ (w / std).T @ (w / std))
    np.testing.assert_allclose(found * std, 2 * direction, rtol=1e-3, atol=1e-4)


def test_many_steps_find_the_direction_that_moves_features_most() -> None:
    model = Linear()
    found = find_move(model, linear_batch(), stable_steps=100)
    w = model.weight.detach().double().numpy()
    stretched = np.linalg.norm(found @ w.T, axis=1)
    np.testing.assert_allclose(stretched, 2 * np.linalg.svd(w)[1][0], rtol=1e-4)


def test_with_anchors_the_move_leads_away_from_them() -> None:
    model = Linear()
    anchors = torch.randn(3, 5, generator=torch.Generator().manual_seed(3))
    batch = linear_batch(anchors=anchors)
    found = find_move(model, batch)
    torch.manual_seed(7)
    x, w = batch.images.flatten(1).double().numpy(), model.weight.detach().double().numpy()
    started = x + 2 * unit(torch.randn(3, 3, 2, 2).double().numpy().reshape(3, 12))
    expected = unit((started @ w.T - anchors.double().numpy()) @ w)
    np.testing.assert_allclose(found, 2 * expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("teacher", [True, False])
@pytest.mark.parametrize("anchor", ["self", "start"])
def test_the_loss_is_what_the_page_says(labels: bool, teacher: bool, anchor: str) -> None:
    if not labels and not teacher and anchor == "self":
        return  # refused: see below
    recipe = dataclasses.replace(
        STABLE, labels=labels, teacher="any" if teacher else "", teacher_size=6, teacher_weight=3.0,
        stable_anchor=anchor, init="any",
    )  # fmt: skip
    objective = create_objective(recipe, CONCEPTS)
    rng = np.random.default_rng(0)
    both = 4 if not labels and not teacher else 8
    logits, features, projected = (rng.standard_normal(shape) for shape in ((both, 4), (both, 5), (both, 6)))
    start, taught, y = rng.standard_normal((4, 5)), rng.standard_normal((4, 6)), np.array([0, 1, 3, 3])
    batch = StepBatch(
        torch.empty(4, 0), torch.from_numpy(y), torch.zeros(4, dtype=torch.long), 0.0, 4,
        teacher=torch.from_numpy(taught) if teacher else None,
        anchors=torch.from_numpy(start) if anchor == "start" else None,
    )  # fmt: skip
    output = StepOutput(
        torch.from_numpy(logits), torch.from_numpy(features), {"teacher": torch.from_numpy(projected)}
    )  # fmt: skip
    anchors = start if anchor == "start" else features[:4]
    expected = 0.5 * ((features[-4:] - anchors) ** 2).sum(1)
    if labels:
        expected += np.log(np.exp(logits[:4]).sum(1)) - logits[np.arange(4), y]
    if teacher:
        expected += 3.0 * (1 - (unit(projected[:4]) * unit(taught)).sum(1))
    np.testing.assert_allclose(objective.losses(output, batch).numpy(), expected, rtol=1e-5)


def make(**options: Any) -> TrainingStep:
    step = TrainingStep(dataclasses.replace(STABLE, **options), CONCEPTS, CPU, Ranks())
    step.train()
    return step


@pytest.mark.parametrize("inner", ["full", "half"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_search_leaves_no_trace_and_a_step_learns(inner: str, precision: str) -> None:
    step = make(inner=inner, precision=precision, lr=1e-12)
    step(*pixels(), 0.0, 0)
    assert int(step.network.bn1.num_batches_tracked) == 1  # type: ignore[union-attr, arg-type]
    first, again = make(lr=0.01, precision=precision, inner=inner), make(lr=0.01, precision=precision, inner=inner)
    losses = [float(first(*pixels(), 0.0, number).losses.mean()) for number in range(12)]
    assert losses[-1] < 0.7 * losses[0]
    for number in range(12):
        again(*pixels(), 0.0, number)
    for name, value in first.network.state_dict().items():
        assert torch.equal(value, again.network.state_dict()[name]), name


def test_the_start_and_its_batch_statistics_stay() -> None:
    step = make(stable_anchor="start", init="any", labels=False, lr=0.001)
    step.take_start()
    images, labels = pixels()
    before = {name: value.clone() for name, value in step.network.state_dict().items()}
    assert float(step.evaluate(images, labels)[0]) == 0, "also in training mode"
    results = [step(images, labels, 0.0, number, guidance=Guidance()) for number in range(3)]
    assert all(np.isnan(float(result.correct)) for result in results)
    state = step.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in state["start"].items())
    assert all(torch.equal(state["model"][name], value) for name, value in before.items() if "running" in name)
    assert not torch.equal(state["model"]["conv1.weight"], before["conv1.weight"])
    assert torch.equal(state["model"]["fc.weight"], before["fc.weight"])


@pytest.fixture(scope="module")
def photos(example_files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs without class folders."""
    folder = tmp_path_factory.mktemp("photos")
    for number, file in enumerate(example_files[:14]):
        with Image.open(file) as image:
            image.convert("RGB").resize((40, 40)).save(folder / f"{number}.png")
    return folder


def test_an_imported_network_is_hardened_without_labels_resumed_without_its_source_and_exported(
    photos: Path, tmp_path: Path
) -> None:
    source = tmp_path / "weights.safetensors"
    torch.manual_seed(1)
    save_file(timm.create_model("test_convnext").state_dict(), source)
    given = load_file(source)
    made = small.recipe(
        photos, init=str(source), network="timm:test_convnext", method="stable", stable_anchor="start", labels=False,
        concepts="classes", lr=0.01, tau=70, val_fraction=0.2,
    )  # fmt: skip
    whole = run(photos, tmp_path / "whole", made)
    resumed = run_one_epoch(photos, tmp_path / "parts", tmp_path / "whole", made)
    half = load_checkpoint(tmp_path / "parts")
    source.unlink()
    parts = run(photos, tmp_path / "parts", resumed, resume=True)
    assert all(torch.equal(parts[name], value) for name, value in whole.items())
    kept = load_checkpoint(tmp_path / "parts").start
    for name, value in kept.items():
        if not name.startswith("head.fc."):
            torch.testing.assert_close(value, given[name])
    assert not torch.equal(whole["stem.0.weight"], given["stem.0.weight"])
    report = export_run(tmp_path / "whole", tmp_path / "model", int8=False)
    extractor = FeatureExtractor.from_pretrained(report.folder.path)
    assert check_golden(extractor).cosine > 0.9999  # type: ignore[operator]
    assert extractor.embed(sorted(photos.iterdir())[:2]).shape == (2, 64)
    object.__setattr__(half, "start", {})
    save_checkpoint(half, tmp_path / "parts")
    with pytest.raises(CheckpointError, match="does not fit its network"):
        run(photos, tmp_path / "parts", resumed, resume=True)


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"labels": False}, "labels=False: leaves nothing to learn from; pass a `teacher`, or `init`, `method=stable`"),
        ({"stable_anchor": "start"}, "stable_anchor=start: are the features of a start; pass `init`"),
        ({"stable_anchor": "start", "init": "a", "method": "hrrl"}, "stable_anchor=start: does nothing in hrrl"),
        (
            {"stable_anchor": "start", "init": "a", "recalibrate": 10},
            "recalibrate=10: would replace the start's statistics",
        ),
        ({"inner": "free"}, "inner=free: takes the direction from the gradient of the step before"),
        ({"stable_steps": 0}, "stable_steps='?0'?: must be a whole number from 1 to 100"),
        ({"stable_weight": -1}, "stable_weight=-1: must be from 0"),
        ({"stable_anchor": "teacher"}, "stable_anchor='teacher': must be one of self, start"),
    ],
)
def test_what_makes_no_sense_is_refused(keys: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        dataclasses.replace(STABLE, **keys)


def test_a_run_that_diverges_names_the_weight_of_the_distance(tmp_path: Path) -> None:
    error = explain_divergence(STABLE, 3, "a", metrics={}, tau_at_224px=1.0, folder=tmp_path, saved_step=0)
    assert "a learning rate of 0.1 is too high, or a `stable_weight` of 0.5" in str(error)
    assert "try a smaller `lr` or `stable_weight`" in str(error)
