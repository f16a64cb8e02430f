"""One update of parameters against NumPy's: SGD and AdamW, which weights decay, and clipping."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from robustfeat.errors import InputError
from robustfeat.training.loop.descent import Descent
from robustfeat.training.loop.ranks import Ranks
from robustfeat.training.loop.step import TrainingStep
from robustfeat.training.loop.trainer import train
from robustfeat.training.recipe import Recipe
from tests.training.small import recipe
from tests.training.test_objective import CONCEPTS, CPU, SMALL, make_in_parts, pixels

Arrays = dict[str, NDArray[np.float64]]


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Tanh(), nn.Linear(7, 1))


def batch_loss(network: nn.Module, number: int) -> Tensor:
    """Of twelve examples that follow from the number."""
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(12, 5, generator=generator, dtype=torch.float64).to(next(network.parameters()).dtype)
    loss: Tensor = 10 * (network(x) - x.sum(1, keepdim=True)).square().mean()
    return loss


def gradients(network: nn.Module, values: Arrays, number: int) -> Arrays:
    exact = copy.deepcopy(network).double()
    exact.load_state_dict({name: torch.from_numpy(value) for name, value in values.items()})
    named = dict(exact.named_parameters())
    found = torch.autograd.grad(batch_loss(exact, number), list(named.values()))
    return {name: gradient.numpy() for name, gradient in zip(named, found, strict=True)}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("decay_norms", [True, False])
@pytest.mark.parametrize("clip_norm", [0.0, 2.0])
def test_updates_are_numpys(optimizer: str, decay_norms: bool, clip_norm: float) -> None:
    network = small_network()
    values: Arrays = {name: value.detach().double().numpy().copy() for name, value in network.named_parameters()}
    first = {name: np.zeros_like(value) for name, value in values.items()}
    second = {name: np.zeros_like(value) for name, value in values.items()}
    descent = Descent(
        network, CPU, lr=1.0, momentum=0.9, weight_decay=0.1, optimizer=optimizer, decay_norms=decay_norms,
        clip_norm=clip_norm,
    )  # fmt: skip
    for number, lr in enumerate((0.02, 0.02, 0.01, 0.005, 0.005)):
        gradient = gradients(network, values, number)
        length = np.sqrt(sum(float((one**2).sum()) for one in gradient.values()))
        descent.add(batch_loss(network, number))
        told = descent.update(lr)
        if clip_norm:
            assert float(told) == pytest.approx(length, rel=1e-4)  # type: ignore[arg-type]
            assert length > clip_norm
            gradient = {name: one * clip_norm / length for name, one in gradient.items()}
        for name, g in gradient.items():
            decay = 0.1 if decay_norms or name in {"0.weight", "3.weight"} else 0.0
            if optimizer == "sgd":
                first[name] = 0.9 * first[name] + g + decay * values[name]
                values[name] = values[name] - lr * first[name]
                continue
            values[name] = values[name] - lr * decay * values[name]
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.999 * second[name] + 0.001 * g**2
            mean, square = first[name] / (1 - 0.9 ** (number + 1)), second[name] / (1 - 0.999 ** (number + 1))
            values[name] = values[name] - lr * mean / (np.sqrt(square) + 1e-8)
    for name, value in network.named_parameters():
        np.testing.assert_allclose(value.detach().numpy(), values[name], rtol=2e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_with_every_option_goes_on_from_its_state(precision: str) -> None:
    options = {"optimizer": "adamw", "decay_norms": False, "clip_norm": 0.5, "lr": 0.01, "precision": precision}
    whole, second = make_in_parts(**options)
    for key, value in whole.network.state_dict().items():
        assert torch.equal(value, second.network.state_dict()[key]), key


def test_the_norm_of_gradients_is_in_the_log(dataset: Path, narrow_run: Path, tmp_path: Path) -> None:
    made = recipe(dataset, epochs=1, optimizer="adamw", clip_norm=0.01)
    train(dataset, made, tmp_path / "run", workers=0, threads=1, quiet=True)
    clipped, plain = (
        json.loads((run / "metrics.jsonl").read_text().splitlines()[0]) for run in (tmp_path / "run", narrow_run)
    )
    assert clipped["gradient_norm"] > 0.1  # before it is clipped
    assert "gradient_norm" not in plain


def test_ranks_share_a_network_without_running_statistics() -> None:
    made = SMALL.replace(network="timm:test_convnext", method="erm")
    step = TrainingStep(made, CONCEPTS, CPU, Ranks(rank=0, world=2, local_rank=0, local_world=2))
    assert step(*pixels(), 0.0, 0).losses.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "adam"}, "must be one of sgd, adamw"),
        ({"decay_norms": 1}, "must be true or false"),
        ({"clip_norm": -1.0}, "must be from 0"),
    ],
)
def test_odd_keys_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Recipe(**changes)
