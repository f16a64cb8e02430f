"""Methods and their options, a step at a time."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from robustfeat.errors import DataError, InputError
from robustfeat.training.concepts import ConceptMap
from robustfeat.training.hrrl import input_gradient, step_along
from robustfeat.training.loop.ranks import Ranks
from robustfeat.training.loop.step import TrainingStep
from robustfeat.training.methods import METHODS
from robustfeat.training.objective import Objective, StepBatch, create_objective
from robustfeat.training.recipe import Recipe

CONCEPTS = ConceptMap(("bird", "dog"), np.array([0, 0, 1, 1]), np.array([100, 300, 50, 50]))
SMALL = Recipe(width=8, image_sizes=((0, 32),), validation_size=32, tau=7.0)  # a length of 1 at 32 px
CPU = torch.device("cpu")


def make(**options: Any) -> TrainingStep:
    step = TrainingStep(dataclasses.replace(SMALL, **options), CONCEPTS, CPU, Ranks())
    step.train()
    return step


def pixels(seed: int = 0, size: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (size, 3, 32, 32), generator=generator).float()
    return images, torch.arange(size) % 4


def make_in_parts(**options: Any) -> tuple[TrainingStep, TrainingStep]:
    """After six steps, and after three of them that go on from the state of three others."""
    whole, first, second = (make(**options) for _ in range(3))
    for number in range(6):
        whole(*pixels(number), 0.0, number)
    for number in range(3):
        first(*pixels(number), 0.0, number)
    second.load_state_dict(first.state_dict())
    for number in range(3, 6):
        second(*pixels(number), 0.0, number)
    return whole, second


class Seen(Objective):
    """Keeps what the network was trained on."""

    def training_images(self, model: torch.nn.Module, batch: StepBatch) -> torch.Tensor:
        self.before = batch.images
        self.after = super().training_images(model, batch)
        return self.after


class SeenRandom(Seen):
    def __init__(self, recipe: Recipe, concepts: ConceptMap) -> None:
        super().__init__(recipe, concepts, direction="random", weighting=None)


def seen(step: TrainingStep) -> Seen:
    assert isinstance(step.objective, Seen)
    return step.objective


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_one_batch(method: str) -> None:
    step = make(method=method, lr=0.01)
    images, labels = pixels()
    losses = [float(step(images, labels, 0.0, number).losses.mean()) for number in range(12)]
    assert losses[-1] < 0.7 * losses[0]


def test_random_directions_have_length_tau_and_follow_from_seed_and_step() -> None:
    method = f"{__name__}:SeenRandom"
    first, again, other = make(method=method), make(method=method), make(method=method, seed=1)
    for step, number in ((first, 5), (again, 5), (other, 5)):
        step(*pixels(), 0.0, number)
    moved = (seen(first).after - seen(first).before).flatten(1)
    np.testing.assert_allclose(moved.norm(dim=1), 1, rtol=1e-4)
    assert torch.equal(seen(first).after, seen(again).after)
    assert not torch.equal(seen(first).after, seen(other).after)
    again(*pixels(), 0.0, 6)
    assert not torch.equal(seen(first).after, seen(again).after)
    assert float(moved[0] @ moved[1]) < 0.1, "each image has a direction of its own"


@pytest.mark.parametrize("name", ["Seen", "SeenRandom"])
def test_a_length_in_pixels_is_measured_in_pixels(name: str) -> None:
    step = make(method=f"{__name__}:{name}", tau_unit="pixel")
    step(*pixels(), 0.0, 0)
    std = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
    moved = ((seen(step).after - seen(step).before) * std).flatten(1)
    np.testing.assert_allclose(moved.norm(dim=1), 1, rtol=1e-4)


@pytest.mark.parametrize("inner", ["full", "half"])
def test_a_recipe_asks_for_the_step_of_theorem_2(inner: str) -> None:
    step = make(method=f"{__name__}:Seen", tau_step="gradient", inner=inner, lr=1e-12)
    step.network.eval()
    images, labels = pixels()
    x = step.to_input(images).requires_grad_()
    small = functional.avg_pool2d(x, 2) if inner == "half" else x
    functional.cross_entropy(step.network(small), labels, reduction="sum").backward()
    step(images, labels, 0.0, 0)
    assert x.grad is not None
    expected = (x + 7 * (32 / 224) ** 2 * x.grad).detach()
    torch.testing.assert_close(seen(step).after.detach(), expected, rtol=1e-4, atol=1e-5)
    assert not torch.equal(seen(step).after, seen(step).before)


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"tau_step": "g"}, "tau_step='g': must be one of unit, gradient"),
        ({"tau_step": "gradient", "method": "cl"}, "tau_step=gradient: does nothing in cl; leave it out"),
        ({"tau_step": "gradient", "inner": "free"}, "tau_step=gradient: needs the gradient of an image's own loss"),
    ],
)
def test_a_step_that_makes_no_sense_is_refused(keys: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        dataclasses.replace(SMALL, **keys)


def test_balanced_weighs_every_class_the_same() -> None:
    objective = create_objective(Recipe(method="balanced"), CONCEPTS)
    labels = torch.tensor([0, 0, 1, 2, 3, 3])
    losses = torch.rand(6)
    batch = StepBatch(torch.empty(6, 0), labels, torch.tensor([0, 0, 0, 1, 1, 1]), 0.0, 6)
    weights = {0: 500 / 400, 1: 500 / 1200, 2: 500 / 200, 3: 500 / 200}  # N / (C N_y)
    expected = np.mean([weights[int(label)] * float(loss) for label, loss in zip(labels, losses, strict=True)])
    assert float(objective.training_loss(losses, batch)) == pytest.approx(expected)


def test_free_takes_its_direction_from_the_step_before_on_the_same_batch() -> None:
    step = make(method=f"{__name__}:Seen", inner="free", replays=3, lr=1e-12)
    step.network.eval()
    images, labels = pixels()
    assert step.objective.replays == 3
    step(images, labels, 0.0, 0, replay=0)
    x = seen(step).before
    assert torch.equal(seen(step).after, x), "the first has no gradient yet"
    for replay in (1, 2):
        # The network stands still, so a pass of its own at the last images gives the gradient that was left there.
        expected = step_along(x, input_gradient(step.network, seen(step).after.detach(), labels), 1.0)
        step(images, labels, 0.0, replay, replay=replay)
        torch.testing.assert_close(seen(step).after.detach(), expected, rtol=1e-4, atol=1e-5)
    step(*pixels(1), 0.0, 3, replay=0)
    assert torch.equal(seen(step).after, seen(step).before), "another batch begins anew"


def test_free_replays_only_where_there_is_a_direction() -> None:
    assert [make(method=m, inner="free").objective.replays for m in ("erm", "cl", "random", "el", "hrrl")] == [
        1, 1, 1, 4, 4,
    ]  # fmt: skip


def test_the_noise_of_the_concept_level_knows_whether_batches_repeat() -> None:
    """CL makes one step a batch, whatever `inner`; HRRL's four correlated ones have noise of more variance."""
    batch = StepBatch(torch.empty(6, 0), torch.arange(6) % 4, torch.tensor([0, 0, 0, 1, 1, 1]), 0.0, 6)
    noise: dict[tuple[str, str], float] = {}
    for method, inner in itertools.product(("cl", "hrrl"), ("half", "free")):
        level = create_objective(Recipe(method=method, inner=inner, batch_size=6), CONCEPTS).concept_level
        level.weigh(torch.arange(6.0), batch)
        noise[method, inner] = level.metrics()["weight_noise"]
    assert noise["cl", "free"] == noise["cl", "half"] == noise["hrrl", "half"] > 0
    assert noise["hrrl", "free"] > 1.5 * noise["hrrl", "half"]


def test_a_reference_by_names_is_where_q_starts() -> None:
    objective = create_objective(Recipe(reference={"dog": 3, "bird": 1}), CONCEPTS)
    assert objective.metrics()["q"] == [0.25, 0.75]
    assert objective.metrics()["heaviest"] == "dog"
    assert objective.metrics()["weight_max"] == pytest.approx(0.75 * 5)
    with pytest.raises(DataError, match="'cat' is no concept here; known are bird, dog"):
        create_objective(Recipe(reference={"cat": 1.0}), CONCEPTS)


@pytest.mark.parametrize(
    "keys",
    [
        {"method": "hrrl"}, {"method": "groupdro"}, {"method": "stable", "stable_anchor": "start", "init": "any"},
        {"q_divergence": "kl", "p_lam": 50.0, "tau_step": "gradient", "loss": "ldr_kl", "projection": 16},
    ],
)  # fmt: skip
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_goes_on_from_its_state(keys: dict[str, Any], precision: str) -> None:
    whole, second = make_in_parts(precision=precision, lr=0.001, **keys)
    for part in ("model", "heads", "start"):
        for key, value in whole.state_dict()[part].items():
            assert torch.equal(value, second.state_dict()[part][key]), f"{part} {key}"


def test_recalibration_gives_the_statistics_of_clean_batches() -> None:
    """Against the plain means over the batches, computed with hooks."""
    step = make(method="hrrl")
    for number in range(3):
        step(*pixels(number), 0.0, number)
    layer = step.network.layer1[0].bn1  # type: ignore[union-attr, index]
    inputs: list[torch.Tensor] = []
    handle = layer.register_forward_hook(lambda module, args, output: inputs.append(args[0]))
    batches = [pixels(seed)[0] for seed in (7, 8, 9)]
    before = layer.running_mean.clone()
    step.recalibrate(batches)
    handle.remove()
    means = torch.stack([x.mean((0, 2, 3)) for x in inputs]).mean(0)
    variances = torch.stack([x.var((0, 2, 3)) for x in inputs]).mean(0)
    torch.testing.assert_close(layer.running_mean, means, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.running_var, variances, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(before, means, atol=1e-3)
    assert layer.momentum == 0.1


@pytest.mark.slow  # and needs a C++ compiler
def test_a_compiled_step_makes_the_update_of_a_plain_one() -> None:
    plain, compiled = make(method="hrrl"), make(method="hrrl", compile=True)
    for step in (plain, compiled):
        step(*pixels(), 0.0, 0)
    for key, value in plain.network.state_dict().items():
        torch.testing.assert_close(compiled.network.state_dict()[key], value, rtol=1e-2, atol=1e-3)


def test_what_a_device_cannot_do_is_said() -> None:
    with pytest.raises(InputError, match="precision=fp16: needs a GPU"):
        make(precision="fp16")


STEPS: list[dict[str, Any]] = [
    *({"method": method, "inner": inner} for method in METHODS for inner in ("full", "half", "free")),
    {"method": "stable", "stable_anchor": "start", "init": "any"}, {"q_divergence": "kl"}, {"q_divergence": "chi2"},
    {"p_lam": 50.0}, {"tau_step": "gradient"}, {"loss": "ldr_kl"}, {"projection": 16},
]  # fmt: skip
STEPS.remove({"method": "stable", "inner": "free"})


@pytest.mark.gpu
@pytest.mark.parametrize("keys", STEPS, ids=lambda keys: " ".join(f"{key}={value}" for key, value in keys.items()))
def test_no_step_waits_for_the_gpu(keys: dict[str, Any]) -> None:
    device = torch.device("cuda", 0)
    recipe = dataclasses.replace(SMALL, precision="bf16", **keys)
    step = TrainingStep(recipe, CONCEPTS, device, Ranks())
    images, labels = (part.to(device) for part in pixels())
    for number in range(3):
        step(images, labels, 0.0, number)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in range(3, 8):
            step(images, labels, 0.0, number, replay=number % step.objective.replays)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_fp16_directions_are_those_of_fp32() -> None:
    """Cosine, per image, of z in fp16 against z in fp32."""
    device = torch.device("cuda", 0)
    z = {}
    for precision in ("fp32", "fp16"):
        step = TrainingStep(dataclasses.replace(SMALL, precision=precision), CONCEPTS, device, Ranks())
        images, labels = (part.to(device) for part in pixels())
        with step.autocast():
            z[precision] = input_gradient(step.network.eval(), step.to_input(images), labels).flatten(1)
    assert (functional.cosine_similarity(z["fp32"], z["fp16"]) > 0.99).all()
