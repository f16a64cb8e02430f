"""The MLP between features and classifier: what sees it, what does not, and what is left of it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from robustfeat import FeatureExtractor
from robustfeat.errors import DataError, InputError
from robustfeat.training.export.runs import export_run
from robustfeat.training.loop.ranks import Ranks
from robustfeat.training.loop.step import Guidance, TrainingStep
from robustfeat.training.network import PROJECTION
from robustfeat.training.target import estimate_reference
from tests.training import small
from tests.training.test_objective import CONCEPTS, CPU, SMALL, pixels


def make(**options: Any) -> TrainingStep:
    step = TrainingStep(dataclasses.replace(SMALL, projection=16, **options), CONCEPTS, CPU, Ranks())
    step.train()
    return step


def project(step: TrainingStep, features: torch.Tensor) -> np.ndarray:
    """P f in NumPy, with BatchNorm's running statistics."""
    state = {name: value.double().numpy() for name, value in step._heads[PROJECTION].state_dict().items()}
    hidden = features.double().numpy() @ state["0.weight"].T
    hidden = (hidden - state["1.running_mean"]) / np.sqrt(state["1.running_var"] + 1e-5)
    hidden = np.maximum(0, hidden * state["1.weight"] + state["1.bias"])
    return np.asarray(hidden @ state["3.weight"].T + state["3.bias"])


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_classifier_and_teacher_see_the_projection_and_nothing_else_does(ema: float) -> None:
    step = make(teacher="any", teacher_size=6, ema=ema)
    taught = functional.normalize(torch.randn(8, 6, generator=torch.Generator().manual_seed(5)), dim=1)
    for number in range(3):
        step(*pixels(number), 0.0, number, guidance=Guidance(taught))
    images, labels = pixels(9)
    network = step._outputs.eval()
    output = network(step.to_input(images))
    features = network.network.pooled(step.to_input(images)).detach()  # type: ignore[operator]
    torch.testing.assert_close(output.features.detach(), features)
    projected = project(step, features)
    assert set(output.heads) == {"teacher"}
    for name, layer, found in (
        ("classifier", network.network.fc, output.logits), ("teacher", step._heads["teacher"], output.heads["teacher"]),
    ):  # fmt: skip
        expected = projected @ layer.weight.detach().double().numpy().T + layer.bias.detach().double().numpy()  # type: ignore[union-attr, operator]
        np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-3, atol=1e-4, err_msg=name)
    loss, _ = step.evaluate(images, labels)
    logits = step.result.eval()(step.to_input(images)).logits.detach()
    assert float(loss) == pytest.approx(float(functional.cross_entropy(logits, labels, reduction="sum")), rel=1e-5)
    torch.testing.assert_close(step.embed(images), step.result(step.to_input(images)).features)


def test_recalibration_also_measures_the_projection() -> None:
    step = make(method="erm", lr=0.01)
    for number in range(3):
        step(*pixels(number), 0.0, number)
    layer: Any = step._heads[PROJECTION][1]  # type: ignore[index]
    inputs: list[torch.Tensor] = []
    handle = layer.register_forward_hook(lambda module, args, output: inputs.append(args[0]))
    step.result.eval()  # as validation leaves it
    step.recalibrate([pixels(seed)[0] for seed in (7, 8)])
    handle.remove()
    torch.testing.assert_close(layer.running_mean, torch.stack([x.mean(0) for x in inputs]).mean(0))
    assert layer.momentum == 0.1


def test_inner_passes_leave_its_statistics_alone() -> None:
    step = make(method="hrrl", lr=1e-12)
    step(*pixels(), 0.0, 0)
    assert int(step._heads[PROJECTION][1].num_batches_tracked) == 1  # type: ignore[index]


def test_without_one_the_step_is_what_it_was() -> None:
    plain, other = (TrainingStep(dataclasses.replace(SMALL, projection=p), CONCEPTS, CPU, Ranks()) for p in (0, 16))
    assert not list(plain._heads.parameters())
    for name, value in plain.network.state_dict().items():
        assert torch.equal(value, other.network.state_dict()[name]), "the same numbers are drawn for the network"


def test_a_run_resumes_and_its_model_has_features_and_no_classifier(dataset: Path, tmp_path: Path) -> None:
    made = small.recipe(dataset, projection=16)
    whole = small.run(dataset, tmp_path / "whole", made)
    resumed = small.run_one_epoch(dataset, tmp_path / "parts", tmp_path / "whole", made)
    parts = small.run(dataset, tmp_path / "parts", resumed, resume=True)
    assert any(name.startswith(f"head {PROJECTION}") for name in whole)
    assert all(torch.equal(parts[name], value) for name, value in whole.items())
    model = export_run(tmp_path / "whole", tmp_path / "model", int8=False).folder.path
    assert json.loads((model / "config.json").read_text())["num_classes"] == 0
    assert not any(name.startswith(("fc.", "_")) for name in load_file(model / "model.safetensors"))
    assert "on 30 images in 2 concepts" in (model / "README.md").read_text()
    assert FeatureExtractor.from_pretrained(model).feature_size == 64
    with pytest.raises(DataError, match="was trained with `projection` or without labels"):
        estimate_reference(str(dataset), str(dataset / "concepts.csv"), str(model))
    torch.manual_seed(made.seed)
    again = small.run(dataset, tmp_path / "next", made.replace(init=str(tmp_path / "whole"), lr=1e-12, epochs=1))
    torch.testing.assert_close(again["conv1.weight"], whole["conv1.weight"])
    assert not torch.allclose(again["fc.weight"], whole["fc.weight"])


def test_where_nothing_sees_it_it_is_refused() -> None:
    with pytest.raises(InputError, match="projection=16: is what labels or a teacher see, and neither is learned"):
        dataclasses.replace(SMALL, projection=16, labels=False, init="a", method="stable", stable_anchor="start")
    with pytest.raises(InputError, match="projection=-1: must be a whole number from 0"):
        dataclasses.replace(SMALL, projection=-1)
