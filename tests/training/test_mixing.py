"""Soft targets: label smoothing, MixUp and CutMix, from the mixture to the step and the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from robustfeat.errors import InputError
from robustfeat.training.concepts import load_concepts
from robustfeat.training.data.mixing import Examples, mix
from robustfeat.training.hrrl import step_along
from robustfeat.training.loop.step import Guidance
from robustfeat.training.objective import Objective, StepBatch, StepOutput, create_objective
from robustfeat.training.recipe import Recipe
from robustfeat.training.teacher import Teacher, open_teacher
from tests.training import small
from tests.training.small import run
from tests.training.test_objective import CONCEPTS, SMALL, make, pixels, seen
from tests.training.test_teacher import assert_resumes

SIDE, COUNT = 10, 7


def mixed(seed: int, **alphas: float) -> tuple[torch.Tensor, Examples]:
    """Images of which each is a class of its own, with row 10 + place, before and after."""
    images = torch.rand(COUNT, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed)) * 255
    examples = Examples(images, torch.arange(COUNT), torch.arange(COUNT) + 10)
    options = {"mixup": 0.0, "cutmix": 0.0, **alphas}
    return images, mix(examples, COUNT, rng=np.random.default_rng(seed), **options)


@pytest.mark.parametrize("seed", range(8))
def test_a_mixup_is_the_sum_of_two_images_by_their_shares(seed: int) -> None:
    images, result = mixed(seed, mixup=1.0)
    assert result.shares is not None
    shares = result.shares.numpy()
    np.testing.assert_allclose(shares.sum(1), 1, rtol=1e-6)
    np.testing.assert_allclose(shares.sum(0), 1, rtol=1e-6)  # partners are a permutation
    expected = np.einsum("ic,cxyz->ixyz", shares, images.numpy())
    np.testing.assert_allclose(result.pixels.numpy(), expected, rtol=1e-5, atol=1e-3)
    assert result.labels.tolist() == shares.argmax(1).tolist()
    assert result.rows is not None
    assert result.rows.tolist() == [10 + label for label in result.labels]
    assert sorted(result.labels.tolist()) == list(range(COUNT)), "each is the larger part of one mixture"


@pytest.mark.parametrize("seed", range(8))
def test_a_cutmix_pastes_a_box_and_shares_by_pixels(seed: int) -> None:
    images, result = mixed(seed, cutmix=1.0)
    assert result.shares is not None
    boxes = set()
    for place, (image, share) in enumerate(zip(result.pixels, result.shares, strict=True)):
        sources = [(image == other).all(0) for other in images]
        found = [int(source.sum()) for source in sources]
        assert sum(found) == SIDE**2, "each pixel is of one of the images"
        np.testing.assert_allclose(share.numpy(), np.array(found) / SIDE**2, rtol=1e-5)
        own = sources[place].numpy()
        if not own.all() and own.any():
            rows, columns = np.nonzero(~own)
            boxes.add((rows.min(), rows.max(), columns.min(), columns.max()))
            assert (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1) == (~own).sum()
        assert share[result.labels[place]] >= 0.5 - 1e-6
    assert len(boxes) <= 1, "one box for all"


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_the_shares_are_betas(alpha: float) -> None:
    drawn = [mixed(seed, mixup=alpha)[1].shares for seed in range(600)]
    largest = np.array([float(shares.max(1).values.median()) for shares in drawn if shares is not None])
    expected = alpha / (2 * (2 * alpha + 1))  # E[p (1 - p)] of Beta(alpha, alpha)
    assert np.mean(largest * (1 - largest)) == pytest.approx(expected, abs=0.012)


def test_either_mixes_half_of_the_batches_where_both_are_on() -> None:
    cuts = []
    for images, result in (mixed(seed, mixup=1.0, cutmix=1.0) for seed in range(200)):
        assert result.shares is not None
        place = int(result.shares.max(1).values.argmin())  # one that is mixed
        cuts.append(bool((result.pixels[place] == images).all(1).any()))  # a pixel is one image's
    assert sum(cuts) == pytest.approx(100, abs=20)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("soft", [False, True])
def test_the_loss_is_the_cross_entropy_with_smoothed_shares(smoothing: float, soft: bool) -> None:
    objective = create_objective(Recipe(label_smoothing=smoothing), CONCEPTS)
    rng = np.random.default_rng(0)
    logits, y = rng.standard_normal((5, 4)), np.array([0, 3, 1, 1, 2])
    shares = rng.dirichlet(np.ones(4), 5) if soft else np.eye(4)[y]
    batch = StepBatch(
        torch.empty(5, 0), torch.from_numpy(y), torch.zeros(5, dtype=torch.long), 0.0, 5,
        shares=torch.from_numpy(shares).float() if soft else None,
    )  # fmt: skip
    output = StepOutput(torch.from_numpy(logits), torch.empty(5, 2), {})
    targets = (1 - smoothing) * shares + smoothing / 4
    expected = -(targets * (logits - np.log(np.exp(logits).sum(1, keepdims=True)))).sum(1)
    np.testing.assert_allclose(objective.losses(output, batch).numpy(), expected, rtol=1e-5)


def test_images_move_along_the_gradient_of_the_smoothed_loss_of_the_mixture() -> None:
    step = make(method="tests.training.test_objective:Seen", label_smoothing=0.2, lr=1e-12)
    step.network.eval()
    images, labels = pixels()
    shares = torch.rand(8, 4, generator=torch.Generator().manual_seed(1)).softmax(1)
    x = step.to_input(images).requires_grad_()
    logs = step.network(x).log_softmax(1)
    (gradient,) = torch.autograd.grad(-((0.8 * shares + 0.05) * logs).sum(), x)
    step(images, labels, 0.0, 0, guidance=Guidance(shares=shares))
    torch.testing.assert_close(seen(step).after.detach(), step_along(x, gradient, 1.0), rtol=1e-4, atol=1e-5)


def test_a_mixture_is_learned_in_bf16() -> None:
    step = make(label_smoothing=0.1, precision="bf16", lr=0.01)
    images, labels = pixels()
    shares = 0.7 * torch.eye(4)[labels] + 0.3 * torch.eye(4)[labels.flip(0)]
    results = [step(images, labels, 0.0, number, guidance=Guidance(shares=shares)) for number in range(12)]
    assert results[0].losses.dtype == torch.float32
    assert float(results[-1].losses.mean()) < 0.9 * float(results[0].losses.mean())


class Watching(Objective):
    """Keeps the batches of a run, and what the teacher says of their images."""

    teacher: Teacher
    batches: list[tuple[StepBatch, torch.Tensor]]

    def training_images(self, model: torch.nn.Module, batch: StepBatch) -> torch.Tensor:
        mean, std = (
            torch.tensor(values).view(1, 3, 1, 1) for values in (SMALL.preprocessing().mean, SMALL.preprocessing().std)
        )
        if batch.teacher is not None:
            self.batches.append((batch, self.teacher.features((batch.images * std + mean) * 255)))
        return super().training_images(model, batch)


def test_the_teacher_sees_the_mixtures_and_a_concept_is_the_larger_parts(
    dataset: Path, small_model: Path, tmp_path: Path
) -> None:
    made = small.recipe(
        dataset, mixup=1.0, cutmix=1.0, teacher=str(small_model), method=f"{__name__}:Watching", epochs=1
    )
    Watching.teacher, Watching.batches = open_teacher(made), []
    run(dataset, tmp_path / "run", made)
    concepts = load_concepts(made.concepts)
    names = sorted(concepts)
    assert len(Watching.batches) == 5
    for batch, features in Watching.batches:
        assert batch.shares is not None
        assert batch.teacher is not None
        assert float((batch.teacher * features).sum(1).min()) > 0.9999
        assert (batch.shares.max(1).values < 0.999).any(), "something is mixed"
        own = batch.shares.gather(1, batch.labels.view(-1, 1)).flatten()
        assert (own >= 0.5 - 1e-6).all()
        numbers = [sorted(set(concepts.values())).index(concepts[names[int(label)]]) for label in batch.labels]
        assert batch.concepts.tolist() == numbers


def test_a_mixed_and_smoothed_run_resumes_exactly(dataset: Path, tmp_path: Path) -> None:
    assert_resumes(dataset, tmp_path, small.recipe(dataset, mixup=0.4, cutmix=1.0, label_smoothing=0.1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_smoothing": 1.0}, "label_smoothing=1.0: must be from 0 to 0.999999"),
        ({"mixup": -0.1}, "mixup=-0.1: must be from 0 to 1000"),
        (
            {"teacher": "t", "labels": False, "label_smoothing": 0.1},
            "needs labels, which are not learned; leave it out",
        ),
        ({"teacher": "t", "teacher_crops": 2, "cutmix": 1.0}, "teacher_crops=2: are features of plain crops"),
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Recipe(**changes)
