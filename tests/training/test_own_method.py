"""The method in docs/training-methods.md is a file that works as it stands."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from robustfeat.cli.train_command import command
from robustfeat.training.loop.checkpoint import load_checkpoint
from robustfeat.training.loop.trainer import train
from robustfeat.training.network import StepOutput
from robustfeat.training.objective import Objective, StepBatch, create_objective
from robustfeat.training.recipe import Recipe
from tests.conftest import ROOT, train_arguments


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    text = (ROOT / "docs" / "training-methods.md").read_text()
    block = re.search(r"<!-- own method -->\n```python\n(.*?)```", text, re.DOTALL)
    assert block
    (tmp_path / "steady.py").write_text(block[1])
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "steady", raising=False)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    return tmp_path


def test_it_trains_and_resumes_exactly(here: Path, dataset: Path) -> None:
    arguments = train_arguments(dataset, here / "run", method="steady:Steady", epochs=1)
    assert command.main([*arguments[1:], "--quiet"], standalone_mode=False) == 0
    again = train_arguments(dataset, here / "twice", method="steady:Steady", epochs=1)
    assert command.main([*again[1:], "--quiet"], standalone_mode=False) == 0
    models = [load_checkpoint(here / name).model for name in ("run", "twice")]
    assert all(torch.equal(value, models[1][name]) for name, value in models[0].items())
    assert str(here) not in sys.path


def test_its_loss_is_what_the_page_says(here: Path) -> None:
    from tests.training.test_objective import CONCEPTS

    objective = create_objective(Recipe(method="steady:Steady"), CONCEPTS)
    images, labels = torch.randn(3, 3, 8, 8), torch.tensor([0, 1, 3])
    batch = StepBatch(images, labels, torch.zeros(3, dtype=torch.long), 0.0, 3)
    both = objective.training_images(torch.nn.Identity(), batch)
    assert torch.equal(both[:3], images)
    assert 0.05 < float((both[3:] - images).std()) < 0.2
    logits, features = torch.randn(6, 4), torch.randn(6, 5)
    found = objective.losses(StepOutput(logits, features, {}), batch)
    moved = ((features[3:] - features[:3]).numpy() ** 2).sum(1)
    expected = functional.cross_entropy(logits[:3], labels, reduction="none").numpy() + 0.01 * moved
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)


class Projected(Objective):
    """Learns from a head of its own, and lets the network's classifier be."""

    def create_heads(self, feature_size: int, classes: int) -> torch.nn.ModuleDict:
        return torch.nn.ModuleDict({"logits": torch.nn.Linear(feature_size, classes)})

    def losses(self, output: StepOutput, batch: StepBatch) -> torch.Tensor:
        return super().losses(output._replace(logits=output.heads["logits"]), batch)


def test_heads_learn_are_saved_and_stay_behind(dataset: Path, tmp_path: Path) -> None:
    made = Recipe(
        method=f"{__name__}:Projected", concepts=str(dataset / "concepts.csv"), epochs=1, batch_size=10, lr=0.01,
        image_sizes=((0, 32),), validation_size=32, width=8, weight_decay=0,
    )  # fmt: skip
    train(dataset, made, tmp_path / "run", workers=0, threads=1, quiet=True)
    saved = load_checkpoint(tmp_path / "run")
    assert set(saved.heads) == {"logits.weight", "logits.bias"}
    assert float(saved.heads["logits.bias"].abs().max()) > 0
    assert not [name for name in saved.model if "logits" in name]
    torch.manual_seed(made.seed)
    from robustfeat.training.network import build_network

    first = build_network(10, width=8).state_dict()
    assert torch.equal(saved.model["fc.weight"], first["fc.weight"])
    assert not torch.equal(saved.model["conv1.weight"], first["conv1.weight"])


@pytest.mark.parametrize(("hook", "value"), [("losses", torch.zeros(5)), ("training_loss", torch.zeros(2))])
def test_a_hook_of_another_shape_is_named(hook: str, value: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    from robustfeat.errors import InputError
    from tests.training.test_objective import make, pixels

    monkeypatch.setattr(Objective, hook, lambda *_: value)
    with pytest.raises(InputError, match=f"{hook} must return .*; got shape"):
        make(method="erm")(*pixels(), 0.0, 0)
